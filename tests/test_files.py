"""Exported files speak for themselves: read by their formats' own tools, by ours, and damaged."""

import contextlib
import errno
import importlib
import io
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import diracnets
import export
import predict
import train
from corruption import restated
from diracnets.fold import fold
from diracnets.preprocessing import Preprocessing
from diracnets.quantization import quantize
from runs import write_images
from training import checkpoint

ROOT = Path(__file__).parent.parent
FORMS = ('float.onnx', 'int8.onnx', 'float.pt2', 'float.safetensors', 'float.pth')
CLASSES = [f'class {i}' for i in range(9)] + ['été']
SIZE = 24  # pixels: neither a data set's nor the default


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Images of another size than the network's, in train/CLASS/ and test/CLASS/."""
    root = tmp_path_factory.mktemp('images')
    for part in ('train', 'test'):
        write_images(root / part, CLASSES, n=3, size=(30, 36), seed=len(part))
    return root


@pytest.fixture(scope='module')
def run(trained, images, tmp_path_factory):
    """The folder of a run whose options name places of this machine."""
    folder = tmp_path_factory.mktemp('runs') / 'mine'
    folder.mkdir()
    args = {'model': 'diracnet', 'depth': 10, 'width': 0.5, 'dataset': 'Folder', 'image_size': SIZE,
            'epochs': 3, 'dataroot': f'{images}/', 'save': str(folder), 'resume': str(folder),
            'pretrained': str(Path.home() / 'other.pt7'), 'dtype': 'float', 'seed': 7}
    torch.save({'params': trained[1], 'optimizer': {}, 'epoch': 2, 'args': args,
                'classes': CLASSES}, folder / 'model.pt7')
    return folder


@pytest.fixture(scope='module')
def files(run, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    with contextlib.redirect_stdout(io.StringIO()):
        for form in FORMS:
            int8 = ['--int8', str(images / 'train')] if form.startswith('int8') else []
            export.main([str(run), '--to', str(folder / form), *int8])
    return folder


def said_by(path):
    """What a file says of itself to the tools of its format, in which nothing is ours."""
    if path.suffix == '.onnx':
        texts = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    elif path.suffix == '.pt2':
        texts = {'diracnets': ''}
        torch.export.load(path, extra_files=texts)
    elif path.suffix == '.safetensors':
        with safe_open(path, 'pt') as file:
            texts = file.metadata()
    else:
        texts = torch.load(path, weights_only=True)._metadata
    return json.loads(texts['diracnets'])


@pytest.mark.parametrize('form', FORMS)
def test_every_file_says_what_it_is(files, images, form):
    said = said_by(files / form)
    calibration = said.pop('calibration', None)
    assert said == {
        'network': 'DiracNet-10-0.5', 'exported_from': 'mine', 'epoch': 2, 'classes': CLASSES,
        'inputs': {'kind': 'CIFAR10', 'size': SIZE,
                   'mean': [125.3 / 255, 123.0 / 255, 113.9 / 255],
                   'std': [63.0 / 255, 62.1 / 255, 66.7 / 255]},
        'args': {'model': 'diracnet', 'depth': 10, 'width': 0.5, 'dataset': 'Folder', 'seed': 7,
                 'image_size': SIZE, 'epochs': 3, 'dataroot': images.name, 'dtype': 'float',
                 'pretrained': 'other.pt7'},
    }
    if form == 'int8.onnx':
        assert calibration == {'dataset': 'train', 'images': 30, 'of': 30, 'seed': None,
                               'chosen': 'evenly over the sorted paths'}
    else:
        assert calibration is None


@pytest.mark.parametrize('form', FORMS)
def test_no_path_of_this_machine(files, run, images, form):
    content = (files / form).read_bytes()  # none of the formats compresses
    for place in (ROOT, Path.home(), Path.cwd(), run, images, files, sys.prefix, torch.__path__[0]):
        if len(Path(place).parts) > 2:  # '/' and '/data' may be in any file
            assert str(place).encode() not in content, place


@pytest.mark.parametrize('form', FORMS)
def test_ordinary_permissions(files, form):
    mask = os.umask(0)
    os.umask(mask)
    assert (files / form).stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize('form', FORMS)
def test_one_loader_reads_them_all(files, run, trained, form):
    loaded, expected = diracnets.load(files / form), diracnets.load(run)
    assert (loaded.title, loaded.preprocess, loaded.classes, loaded.num_classes) == (
        expected.title, expected.preprocess, expected.classes, expected.num_classes)
    inputs = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    logits = fold(loaded.model)(inputs)
    with torch.no_grad():
        wanted = trained[0](inputs.double(), {k: t.double() for k, t in trained[1].items()}, False)
    within = 0.5 if form == 'int8.onnx' else 1e-4
    assert (logits - wanted).abs().max() < within * wanted.abs().max()
    assert ('calibration' in loaded.origin) == (form == 'int8.onnx')


def test_a_program_gives_outputs_without_gradients(files):
    program = torch.export.load(files / 'float.pt2').module()
    assert not program(torch.zeros(1, 3, SIZE, SIZE)).requires_grad


@pytest.mark.parametrize('form', FORMS)
def test_evaluate_and_predict_go_by_what_the_file_says(files, run, images, capsys, form):
    """The size of the inputs above all, which no flag states; int8 has its own figures."""
    picture = str(next(images.rglob('*.png')))
    printed = []
    for path in (run, files / form):
        train.main(['--evaluate', '--resume', str(path), '--dataroot', str(images)])
        lines = capsys.readouterr().out.splitlines()
        assert ['image_size', str(SIZE)] in [line.split() for line in lines]
        predict.main([picture, '--model', str(path)])
        words = [*lines[-2:], *capsys.readouterr().out.splitlines()[1:]]
        printed.append([float(re.search(r'[\d.]+', word)[0]) for word in words])
        assert re.search('class [0-8]|été', words[-1])
    if form != 'int8.onnx':
        assert printed[1] == pytest.approx(printed[0], abs=0.02)
    with pytest.raises(SystemExit) as exit:
        train.main(['--evaluate', '--resume', str(files / form), '--dataroot', str(images),
                    '--image_size', '32'])
    assert exit.value.code == 2
    assert f'image_size is {SIZE}, not 32' in capsys.readouterr().err


@pytest.mark.parametrize('form', ['float.pt2', 'float.safetensors', 'float.pth'])
def test_folded_files_are_exported_again(files, tmp_path, form):
    with contextlib.redirect_stdout(io.StringIO()):
        export.main([str(files / form), '--to', str(tmp_path / 'again.pth')])
    first, again = said_by(files / form), said_by(tmp_path / 'again.pth')
    assert again == {**first, 'exported_from': form}
    states = [torch.load(p, weights_only=True) for p in (tmp_path / 'again.pth',
                                                         files / 'float.pth')]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_files_of_older_versions(files, trained, tmp_path):
    said = {'args': {'model': 'diracnet', 'depth': 10, 'width': 0.5, 'dataset': 'Folder',
                     'image_size': SIZE}, 'classes': CLASSES}
    path = restated(files / 'float.pth', json.dumps(said), tmp_path)
    loaded = diracnets.load(path)
    assert (loaded.preprocess, loaded.classes) == (Preprocessing.for_dataset('Folder', SIZE), CLASSES)
    torch.save(trained[1], tmp_path / 'bare.pth')
    assert diracnets.load(tmp_path / 'bare.pth').preprocess == Preprocessing.for_dataset('CIFAR10')


# ---------------------------------------------------------------- predict.py


def test_predict_goes_on_after_what_it_cannot_read(files, images, tmp_path):
    good = sorted(map(str, images.rglob('*.png')))[:2]
    broken, missing = str(tmp_path / 'broken.png'), str(tmp_path / 'missing.png')
    Path(broken).write_bytes(Path(good[0]).read_bytes()[:100])
    done = subprocess.run(
        [sys.executable, 'predict.py', missing, good[0], broken, good[1], '--model',
         str(files / 'int8.onnx')], cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (f'predict.py: {missing}: not readable (No such file or directory)\n'
                           f'predict.py: {broken}: not a readable image\n')
    assert [line for line in done.stdout.splitlines() if line[0] != ' '] == good
    assert done.stdout.count(' % ') == 10


# ---------------------------------------------------------------- what must be refused


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        diracnets.load(path)
    assert str(caught.value).startswith(f'{path}: ')
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


INPUTS = {'kind': 'CIFAR10', 'size': SIZE, 'mean': [0.5] * 3, 'std': [0.25] * 3}
NONSENSE = {  # what a file may say: (a change of what it says, or a text, and what is said of it)
    'no JSON': ('{', 'no JSON of ours'),
    'no dict': ('[1]', 'no JSON of ours'),
    'nested': ('[' * 100_000, 'nested too deep|nested deeper|no JSON of ours'),
    'a long text': ({'network': 'a' * 100_000}, 'a text of 100000 characters'),
    'few classes': ({'classes': ['a']}, '1 names of 10 classes: expected one for each'),
    'depth': ({'args': {'depth': 1e300}}, 'args is .*: expected a dict of plain options'),
    'model': ({'args': {'model': ['diracnet']}}, 'args is .*: expected a dict of plain options'),
    'unknown model': ({'args': {'model': 'vgg'}}, "unknown model 'vgg': expected one of"),
    'another size': ({'inputs': {**INPUTS, 'size': -1}}, 'inputs of size -1: expected 1 to'),
    'half a pixel': ({'inputs': {**INPUTS, 'size': 0.5}}, 'inputs of size 0.5: expected 1 to'),
    'another kind': ({'inputs': {**INPUTS, 'kind': 'sound'}}, "inputs of kind 'sound': expected"),
    'another field': ({'inputs': {**INPUTS, 'x': 1}}, "inputs of 'kind', .*: expected kind, size"),
    'a missing field': ({'inputs': {'kind': 'CIFAR10'}}, "inputs of 'kind': expected kind, size"),
    'no deviation': ({'inputs': {**INPUTS, 'std': [0, 1, 1]}}, 'expected a number for each'),
    'infinite': ({'inputs': {**INPUTS, 'mean': [1e999] * 3}}, 'expected a number for each'),
    'calibration': ({'calibration': 3}, 'calibration is 3: expected a dict'),
    'statistics': ({'stats': 1}, 'stats is 1: expected a dict'),
    'activation': ({'args': {'activation': ['gelu']}}, 'args is .*: expected a dict of plain opt'),
}


@pytest.mark.parametrize('case', NONSENSE)
def test_nonsense_in_what_a_file_says(files, tmp_path, case):
    change, message = NONSENSE[case]
    for form in FORMS:
        said = said_by(files / form)
        text = change if isinstance(change, str) else json.dumps({**said, **change})
        refused(restated(files / form, text, tmp_path), message)


def test_statistics_that_are_no_dict(trained, tmp_path):
    path = tmp_path / 'model.pth'
    for stats, message in (([1], r'stats is \[1\]: expected a dict'),
                           ({'a': 1}, "'a' is a int: expected the tensor of a parameter")):
        torch.save({'params': trained[1], 'stats': stats}, path)
        refused(path, message)
    torch.save({'params': trained[1], 'stats': None}, path)
    assert diracnets.load(path).title == 'DiracNet-10-0.5'


@pytest.mark.parametrize(('args', 'params', 'message'), [
    ({'activation': 'tanh'}, {}, "unknown activation 'tanh': expected one of relu, gelu, silu"),
    ({}, {'fc.weight': torch.tensor(1.0)}, r'fc.weight is \(\), expected \(10, 32\)'),
])
def test_files_of_a_family_that_do_not_fit(tmp_path, args, params, message):
    args = {'model': 'diracnet-fast', 'width': 0.125, 'dataset': 'CIFAR10', **args}
    state = diracnets.create_model('diracnet-fast', 'CIFAR10', width=0.125).state_dict()
    torch.save({'params': {**state, **params}, 'args': args}, tmp_path / 'fast.pth')
    refused(tmp_path / 'fast.pth', message)


def no_memory_of_torchs(*_, **__):
    torch.empty(2**60)


def failing(error):
    def read(*_, **__):
        raise error
    return read


@pytest.mark.parametrize(('read', 'number'), [
    (failing(MemoryError()), errno.ENOMEM), (no_memory_of_torchs, errno.ENOMEM),
    (failing(OSError(errno.EIO, os.strerror(errno.EIO))), errno.EIO),
    (failing(OSError(errno.ESTALE, os.strerror(errno.ESTALE))), errno.ESTALE),
])
def test_a_good_file_that_cannot_be_read_now_is_not_called_damaged(
    files, run, tmp_path, monkeypatch, read, number
):
    """Nor put aside by the training that would go on from it."""
    model = tmp_path / 'model.pt7'
    model.write_bytes((run / 'model.pt7').read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'load', read)
        patch.setattr(zipfile.ZipFile, 'read', read)
        for reading, path in ((diracnets.load, files / 'float.pt2'), (diracnets.load, model),
                              (checkpoint.quarantine, tmp_path)):
            with pytest.raises(OSError, match=os.strerror(number)) as caught:
                reading(path)
            assert caught.value.errno == number
            assert caught.value.filename == str(path if path.is_file() else model)
    assert os.listdir(tmp_path) == ['model.pt7']


@pytest.mark.parametrize('error', [
    OSError(errno.EINVAL, os.strerror(errno.EINVAL)), OSError('no place'), RuntimeError('sizes'),
])
def test_what_damaged_bytes_raise_is_called_damage(files, monkeypatch, error):
    monkeypatch.setattr(torch, 'load', failing(error))
    monkeypatch.setattr(zipfile.ZipFile, 'read', failing(error))
    refused(files / 'float.pth', 'truncated, damaged or no weights')
    refused(files / 'float.pt2', 'truncated, damaged or not of export.py')


@pytest.mark.parametrize('form', ['float.onnx', 'float.pt2'])
def test_a_file_that_says_nothing(files, tmp_path, form):
    refused(restated(files / form, None, tmp_path), 'expected an ONNX file of export.py|says what')


def test_a_program_that_would_run_code(files, tmp_path):
    """As torch.export.load does: the parameters alone are read, and not by pickle."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    path = tmp_path / 'evil.pt2'
    with zipfile.ZipFile(files / 'float.pt2') as good, zipfile.ZipFile(path, 'w') as evil:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith('weight_0'):
                content = pickle.dumps(Evil())
            if name.endswith('model_weights_config.json'):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            evil.writestr(name, content)
    refused(path, 'truncated, damaged or not of export.py')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('form', FORMS)
def test_damaged_files_give_an_error_or_a_network(files, tmp_path, request, form):
    good, path = (files / form).read_bytes(), tmp_path / form
    expected = dict(diracnets.load(files / form).model.state_dict())

    @settings(max_examples=request.config.getoption('--fuzz') // 2, deadline=None, database=None,
              derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.integers(0, len(good) - 1) | st.integers(0, 3000),
                              st.integers(1, 255)), max_size=3), st.just(0) | st.integers(0, 9999))
    def flip_and_cut(flips, cut):
        content = bytearray(good)
        for position, change in flips:
            content[position] ^= change
        path.write_bytes(content[: len(content) - cut])
        loaded, message = None, f'{path}: '
        try:
            loaded = diracnets.load(path)
        except ValueError as error:
            message = str(error)
        assert message.startswith(f'{path}: ')
        assert '\n' not in message
        if loaded is None:
            return
        state = loaded.model.state_dict()
        assert state.keys() == expected.keys()
        if path.suffix in ('.pt2', '.pth'):  # the others have no sums to check
            assert loaded.classes == CLASSES
            assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        with contextlib.suppress(RuntimeError):  # of a graph that cannot be computed
            loaded.model(torch.zeros(1, 3, SIZE, SIZE))

    flip_and_cut()


def error_of(main, arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count('\n') == 1
    return error


def test_onnx_is_run_and_not_exported_again(files, images, tmp_path, capsys, monkeypatch):
    path = str(files / 'float.onnx')
    error = error_of(export.main, [path, '--to', str(tmp_path / 'a.pth')], capsys)
    assert error.startswith(f'export.py: {path}: ONNX, which is run and not written again: ')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    error = error_of(predict.main, ['x.png', '--model', path], capsys)
    assert error == (
        f"predict.py: {path}: onnxruntime is missing: expected pip install onnxruntime\n"
    )


def test_a_file_that_fails_leaves_no_folder(run, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(export, 'write', full)
    with pytest.raises(SystemExit):
        export.main([str(run), '--to', str(tmp_path / 'a' / 'b' / 'c.pth')])
    assert os.listdir(tmp_path) == []


def test_a_full_temporary_folder_is_named(files, tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk, as in test_export."""
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    content = (files / 'float.onnx').read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            quantize(content, [], None, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(tmp_path)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- images


def test_paths_pil_images_and_arrays_are_the_same_input(tmp_path):
    image_of = pytest.importorskip('PIL.Image')
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    exif = image_of.Exif()
    exif[0x112] = 6  # turned by a quarter
    for mode in ('RGB', 'RGBA', 'L', 'P'):
        path = tmp_path / f'{mode}.png'
        image_of.fromarray(pixels).convert(mode).save(path, exif=exif)
        for inputs in (Preprocessing.for_dataset('CIFAR10'), Preprocessing.for_dataset('ImageNet')):
            assert torch.equal(inputs(str(path)), inputs(image_of.open(path)))
            if mode == 'RGB':
                assert torch.equal(inputs(path), inputs(np.rot90(pixels, -1)))
    read = Preprocessing.for_dataset('ImageNet')
    for wrong, message in (
        (pixels / 255, r'an image of float64 \(90, 130, 3\): expected a path, a PIL image or an'),
        (pixels[:, :, 0], r'an image of uint8 \(90, 130\): expected a path'),
        (pixels[:0], 'not a readable image'),
        (image_of.fromarray(pixels[:, :, 0].astype(np.uint16)), 'a PIL image of mode I;16: expec'),
    ):
        with pytest.raises(ValueError, match=message):
            read(wrong)


def test_pil_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'PIL', None)
    monkeypatch.delitem(sys.modules, 'diracnets.preprocessing')
    fresh = importlib.import_module('diracnets.preprocessing')
    assert fresh.preprocess()(np.zeros((9, 9, 3), np.uint8)).shape == (3, 224, 224)
