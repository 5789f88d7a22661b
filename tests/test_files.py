"""Exported files: their metadata, loading them, corrupt and malicious ones."""

import contextlib
import errno
import importlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.torch_version import TorchVersion

import diracnets
import export
import predict
import train
from corruption import with_metadata
from diracnets.folding import fold
from diracnets.preprocessing import Preprocessing
from diracnets.quantization import quantize
from runs import write_images
from training import checkpoint

ROOT = Path(__file__).parent.parent
READABLE = ('float.onnx', 'int8.onnx', 'float.safetensors', 'float.pth')
FORMS = (*READABLE, 'float.pt2')
CLASSES = [f'class {i}' for i in range(9)] + ['été']
SIZE = 24  # pixels, which no dataset has and no option defaults to


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Images in train/CLASS/ and test/CLASS/, of another size than the inputs of the model."""
    root = tmp_path_factory.mktemp('images')
    for part in ('train', 'test'):
        write_images(root / part, CLASSES, n=3, size=(30, 36), seed=len(part))
    return root


@pytest.fixture(scope='module')
def run(trained, images, tmp_path_factory):
    """The folder of a run whose options contain paths of this machine."""
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


def metadata_of(path):
    """The metadata in a file, read by the library of its format."""
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
def test_export_embeds_metadata(files, images, form):
    metadata = metadata_of(files / form)
    calibration = metadata.pop('calibration', None)
    assert metadata == {
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
def test_export_embeds_no_local_path(files, run, images, form):
    content = (files / form).read_bytes()  # none of the formats compresses
    for place in (ROOT, Path.home(), Path.cwd(), run, images, files, sys.prefix, torch.__path__[0]):
        if len(Path(place).parts) > 2:  # '/' and '/data' may be in any file
            assert str(place).encode() not in content, place


@pytest.mark.parametrize('form', FORMS)
def test_export_sets_default_permissions(files, form):
    mask = os.umask(0)
    os.umask(mask)
    assert (files / form).stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize('form', READABLE)
def test_load_reads_every_format(files, run, trained, form):
    loaded, expected = diracnets.load(files / form), diracnets.load(run)
    assert not loaded.model.training
    assert (loaded.title, loaded.preprocess, loaded.classes, loaded.num_classes) == (
        expected.title, expected.preprocess, expected.classes, expected.num_classes)
    inputs = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    logits = fold(loaded.model)(inputs)
    with torch.no_grad():
        wanted = trained[0](inputs.double(), {k: t.double() for k, t in trained[1].items()}, False)
    within = 0.5 if form == 'int8.onnx' else 1e-4
    assert (logits - wanted).abs().max() < within * wanted.abs().max()
    assert ('calibration' in loaded.origin) == (form == 'int8.onnx')


@pytest.mark.skipif(TorchVersion(torch.__version__) < '2.14',
                    reason='older versions, such as 2.9, load parameters that require gradients')
def test_pt2_outputs_require_no_grad(files):
    program = torch.export.load(files / 'float.pt2').module()
    assert not program(torch.zeros(1, 3, SIZE, SIZE)).requires_grad


@pytest.mark.parametrize('form', READABLE)
def test_commands_use_the_metadata_of_a_file(files, run, images, capsys, form):
    """The size of the inputs above all, which no option gives; int8 has other accuracies."""
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


@pytest.mark.parametrize('form', ['float.safetensors', 'float.pth'])
def test_export_of_an_exported_file_is_the_same(files, tmp_path, form):
    with contextlib.redirect_stdout(io.StringIO()):
        export.main([str(files / form), '--to', str(tmp_path / 'again.pth')])
    first, again = metadata_of(files / form), metadata_of(tmp_path / 'again.pth')
    assert again == {**first, 'exported_from': form}
    states = [torch.load(p, weights_only=True) for p in (tmp_path / 'again.pth',
                                                         files / 'float.pth')]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_load_reads_older_metadata(files, trained, tmp_path):
    metadata = {'args': {'model': 'diracnet', 'depth': 10, 'width': 0.5, 'dataset': 'Folder',
                         'image_size': SIZE}, 'classes': CLASSES}
    path = with_metadata(files / 'float.pth', json.dumps(metadata), tmp_path)
    loaded = diracnets.load(path)
    assert loaded.preprocess == Preprocessing.for_dataset('Folder', SIZE)
    assert loaded.classes == CLASSES
    torch.save(trained[1], tmp_path / 'bare.pth')
    assert diracnets.load(tmp_path / 'bare.pth').preprocess == Preprocessing.for_dataset('CIFAR10')


# ---------------------------------------------------------------- predict.py


@pytest.mark.slow
def test_predict_continues_when_an_image_is_unreadable(files, images, tmp_path):
    good = sorted(map(str, images.rglob('*.png')))[:2]
    broken, missing = str(tmp_path / 'broken.png'), str(tmp_path / 'missing.png')
    Path(broken).write_bytes(Path(good[0]).read_bytes()[:100])
    done = subprocess.run(
        [sys.executable, 'predict.py', missing, good[0], broken, good[1], '--model',
         str(files / 'int8.onnx')], cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert [line.split(': ')[:2] for line in errors] == [
        ['predict.py', missing], ['predict.py', broken]]
    assert [line for line in done.stdout.splitlines() if line[0] != ' '] == good
    assert done.stdout.count(' % ') == 10


# ---------------------------------------------------------------- invalid files


def assert_refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        diracnets.load(path)
    assert str(caught.value).startswith(f'{path}: ')
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


INPUTS = {'kind': 'CIFAR10', 'size': SIZE, 'mean': [0.5] * 3, 'std': [0.25] * 3}
INVALID = {  # by case: changes of the metadata, or a text in their place; a part of the error
    'no JSON': ('{', 'invalid metadata'),
    'no dict': ('[1]', 'invalid metadata'),
    'nested': ('[' * 100_000, 'nested too deep|nested deeper|invalid metadata'),
    'a long text': ({'network': 'a' * 100_000}, 'a text of 100000 characters'),
    'few classes': ({'classes': ['a']}, '1 class names for 10 classes'),
    'depth': ({'args': {'depth': 1e300}}, 'args is .*1e[+]300'),
    'model': ({'args': {'model': ['diracnet']}}, 'args is .*diracnet'),
    'unknown model': ({'args': {'model': 'vgg'}}, 'vgg'),
    'another size': ({'inputs': {**INPUTS, 'size': -1}}, r'size\D* -1'),
    'half a pixel': ({'inputs': {**INPUTS, 'size': 0.5}}, 'size.* 0.5'),
    'another kind': ({'inputs': {**INPUTS, 'kind': 'sound'}}, 'kind.*sound'),
    'another field': ({'inputs': {**INPUTS, 'x': 1}}, r'\bx\b'),
    'a missing field': ({'inputs': {'kind': 'CIFAR10'}}, r'\bmean\b'),
    'zero std': ({'inputs': {**INPUTS, 'std': [0, 1, 1]}}, 'std.*0, 1, 1'),
    'infinite': ({'inputs': {**INPUTS, 'mean': [1e999] * 3}}, 'mean.*inf'),
    'calibration': ({'calibration': 3}, 'calibration is 3'),
    'statistics': ({'stats': 1}, 'stats is 1'),
    'activation': ({'args': {'activation': ['gelu']}}, 'args is .*gelu'),
}


@pytest.mark.parametrize('case', INVALID)
def test_load_refuses_invalid_metadata(files, tmp_path, case):
    change, message = INVALID[case]
    for form in READABLE:
        metadata = metadata_of(files / form)
        text = change if isinstance(change, str) else json.dumps({**metadata, **change})
        assert_refused(with_metadata(files / form, text, tmp_path), message)


def test_load_refuses_statistics_of_another_type(trained, tmp_path):
    path = tmp_path / 'model.pth'
    for stats, message in (([1], r'stats is \[1\]'), ({'a': 1}, "'a' is a int")):
        torch.save({'params': trained[1], 'stats': stats}, path)
        assert_refused(path, message)
    torch.save({'params': trained[1], 'stats': None}, path)
    assert diracnets.load(path).title == 'DiracNet-10-0.5'


@pytest.mark.parametrize(('args', 'params', 'message'), [
    ({'activation': 'tanh'}, {}, 'tanh'),
    ({}, {'fc.weight': torch.tensor(1.0)}, r'fc.weight.*\(\).*\(10, 32\)'),
])
def test_load_refuses_parameters_of_another_size(tmp_path, args, params, message):
    args = {'model': 'diracnet-fast', 'width': 0.125, 'dataset': 'CIFAR10', **args}
    state = diracnets.create_model('diracnet-fast', 'CIFAR10', width=0.125).state_dict()
    torch.save({'params': {**state, **params}, 'args': args}, tmp_path / 'fast.pth')
    assert_refused(tmp_path / 'fast.pth', message)


def torch_out_of_memory(*_, **__):
    torch.empty(2**60)


def failing(error):
    def read(*_, **__):
        raise error
    return read


@pytest.mark.parametrize(('read', 'number'), [
    (failing(MemoryError()), errno.ENOMEM), (torch_out_of_memory, errno.ENOMEM),
    (failing(OSError(errno.EIO, os.strerror(errno.EIO))), errno.EIO),
    (failing(OSError(errno.ESTALE, os.strerror(errno.ESTALE))), errno.ESTALE),
])
def test_load_raises_oserror_when_the_environment_fails(
    run, tmp_path, monkeypatch, read, number
):
    """A good file that cannot be read now is not called corrupt, nor quarantined."""
    model = tmp_path / 'model.pt7'
    model.write_bytes((run / 'model.pt7').read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'load', read)
        for reading, path in ((diracnets.load, model), (checkpoint.quarantine, tmp_path)):
            with pytest.raises(OSError, match=os.strerror(number)) as caught:
                reading(path)
            assert caught.value.errno == number
            assert caught.value.filename == str(model)
    assert os.listdir(tmp_path) == ['model.pt7']


@pytest.mark.parametrize('error', [
    OSError(errno.EINVAL, os.strerror(errno.EINVAL)), OSError('no place'), RuntimeError('sizes'),
])
def test_load_raises_valueerror_when_the_contents_are_corrupt(files, monkeypatch, error):
    monkeypatch.setattr(torch, 'load', failing(error))
    assert_refused(files / 'float.pth', 'corrupt')


def test_load_refuses_onnx_without_metadata(files, tmp_path):
    path = with_metadata(files / 'float.onnx', None, tmp_path)
    assert_refused(path, 'no metadata; use an ONNX file of export.py')


def test_commands_refer_to_torch_export_load_when_the_file_is_pt2(files, tmp_path, capsys):
    path = str(files / 'float.pt2')
    assert_refused(path, 'torch.export.load')
    for main, arguments in (
        (export.main, [path, '--to', str(tmp_path / 'a.pth')]),
        (predict.main, ['x.png', '--model', path]),
        (train.main, ['--evaluate', '--resume', path, '--dataset', 'Digits']),
    ):
        error = error_of(main, arguments, capsys)
        assert path in error
        assert 'torch.export.load' in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('form', READABLE)
def test_load_of_corrupt_bytes_raises_or_returns_a_model(files, tmp_path, request, form):
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
        if path.suffix == '.pth':  # the other formats have no checksums
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


def test_export_refuses_onnx(files, tmp_path, capsys):
    path = str(files / 'float.onnx')
    error = error_of(export.main, [path, '--to', str(tmp_path / 'a.pth')], capsys)
    assert error.startswith(f'export.py: {path}: an ONNX file ')


@pytest.mark.parametrize(('form', 'package'), [
    ('float.onnx', 'onnxruntime'), ('float.safetensors', 'safetensors'),
])
def test_load_names_the_package_when_it_is_missing(files, monkeypatch, form, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(files / form, f'{package} is not installed; pip install {package}')


def test_load_reads_one_file_when_a_safetensors_file_is_replaced(files, tmp_path, monkeypatch):
    path, other = tmp_path / 'model.safetensors', tmp_path / 'other.safetensors'
    shutil.copy(files / 'float.safetensors', path)
    state = load_file(path)
    save_file({name: torch.zeros_like(tensor) for name, tensor in state.items()}, other)
    safe_open = safetensors.safe_open

    def open_and_replace(*arguments, **options):
        file = safe_open(*arguments, **options)
        if other.exists():
            os.replace(other, path)
        return file

    for module in (safetensors, safetensors.torch):
        monkeypatch.setattr(module, 'safe_open', open_and_replace)
    loaded = diracnets.load(path)
    assert not other.exists()
    assert loaded.classes == CLASSES
    assert all(torch.equal(t, state[name]) for name, t in loaded.model.state_dict().items())


def test_export_removes_new_folders_when_it_fails(run, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(export, 'write_synced', full)
    with pytest.raises(SystemExit):
        export.main([str(run), '--to', str(tmp_path / 'a' / 'b' / 'c.pth')])
    assert os.listdir(tmp_path) == []


def test_quantize_names_a_full_temporary_folder(files, tmp_path, monkeypatch):
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


def test_preprocessing_of_path_pil_image_and_array_is_equal(tmp_path):
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
        (pixels / 255, r'float64 \(90, 130, 3\)'),
        (pixels[:, :, 0], r'uint8 \(90, 130\)'),
        (pixels[:0], 'image'),
        (image_of.fromarray(pixels[:, :, 0].astype(np.uint16)), 'I;16'),
        (image_of.new('La', (9, 9)), 'not readable .*La'),
        (image_of.open(io.BytesIO(path.read_bytes()[:-1000])), 'not readable .*truncated'),
    ):
        with pytest.raises(ValueError, match=message):
            read(wrong)


def test_preprocessing_works_without_pil(monkeypatch):
    monkeypatch.setitem(sys.modules, 'PIL', None)
    monkeypatch.delitem(sys.modules, 'diracnets.preprocessing')
    fresh = importlib.import_module('diracnets.preprocessing')
    assert fresh.preprocess()(np.zeros((9, 9, 3), np.uint8)).shape == (3, 224, 224)
