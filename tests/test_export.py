"""The commands that deploy a trained model: export.py, predict.py, torch.hub and their docs."""

import contextlib
import errno
import hashlib
import importlib.util
import io
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import diracnet
import diracnets
import export
import hubconf
import predict
import train
from corruption import DAMAGES, damaged
from diracnet import DiracNet, define_diracnet
from diracnets import quantization
from diracnets.formats import FORMATS
from diracnets.onnx import to_onnx
from diracnets.quantization import calibration_set
from pages import blocks
from runs import (
    in_child,
)

ROOT = Path(__file__).parent.parent
OPTIONS = {'depth': 10, 'width': 0.5, 'dataset': 'CIFAR10', 'num_classes': 10}


def run_onnx(path, inputs):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry('session.x64quantprecision', '1')  # see docs/deploying.md
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(['logits'], {'inputs': inputs.numpy()})[0])


def run_state_dict(state, inputs):
    net = DiracNet(**OPTIONS)
    net.load_state_dict(state)
    return net(inputs)


RUN = {
    '.onnx': run_onnx,
    '.pt2': lambda path, inputs: torch.export.load(path).module()(inputs),
    '.safetensors': lambda path, inputs: run_state_dict(load_file(path), inputs),
    '.pth': lambda path, inputs: run_state_dict(torch.load(path, weights_only=True), inputs),
}


def table_of(text):
    """Reads a printed table: {row: {column: cell}}."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in text.splitlines() if line.startswith('|')]
    return {name: dict(zip(rows[0][1:], cells)) for name, *cells in rows[2:]}


@pytest.fixture(scope='module')
def exported(run_folder, tmp_path_factory):
    """A folder with an exported file of each format, and the output of export.py for each."""
    folder = tmp_path_factory.mktemp('exported')
    printed = {}
    for ending in RUN:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            export.main([str(run_folder), '--to', str(folder / 'made' / f'diracnet{ending}')])
        printed[ending] = out.getvalue()
    return folder / 'made', printed


# ---------------------------------------------------------------- export.py


@pytest.mark.parametrize('ending', RUN)
def test_export_preserves_the_logits_of_the_unfolded_model(exported, trained, digits, ending):
    f, params = trained
    folder, printed = exported
    with torch.no_grad():
        for n in (1, 7):
            expected = f(digits[0][:n], params, False)
            logits = RUN[ending](str(folder / f'diracnet{ending}'), digits[0][:n])
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize('ending', RUN)
def test_export_prints_a_table(exported, ending):
    folder, printed = exported
    table = table_of(printed[ending])
    name = f'diracnet{ending}'
    # 3 x 3 filters of stem and six layers, alpha, beta, batch norm (2 each), fc
    weights = 9 * (3 * 8 + 2 * 8 * 8 + 8 * 16 + 16 * 16 + 16 * 32 + 32 * 32)
    channels = 2 * (8 + 16 + 32)
    assert table['parameters']['unfolded'] == f'{weights + 4 * channels + 2 * 8 + 330:,}'
    assert table['parameters'][name] == f'{weights + channels + 8 + 330:,}'
    assert table['size, MB'][name] == f'{(folder / name).stat().st_size / 1e6:.2f}'
    assert table['max difference'][name].endswith(' (at most 0.0001)')
    assert float(table['max difference'][name].split()[0]) < 1e-4
    assert float(table['images per second'][name].replace(',', '')) > 0
    assert '16 random inputs' in printed[ending]


def test_onnx_logits_and_predictions_on_all_digits(exported, trained, digits):
    f, params = trained
    inputs, labels = digits
    with torch.no_grad():
        expected = f(inputs, params, False)
    logits = run_onnx(str(exported[0] / 'diracnet.onnx'), inputs)
    assert len(logits) == 1797
    assert (logits - expected).abs().max() < 1e-4
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    assert (expected.argmax(1) == labels).float().mean() > 0.9  # the model was trained


def test_onnx_contains_only_plain_convolutions(exported):
    folder = exported[0]
    assert sorted(os.listdir(folder)) == [f'diracnet{ending}' for ending in sorted(RUN)]
    model = onnx.load(str(folder / 'diracnet.onnx'))
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count('Conv') == 7
    assert 'BatchNormalization' not in kinds
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert str(ROOT).encode() not in (folder / 'diracnet.onnx').read_bytes()


def test_export_writes_nothing_when_the_outputs_differ(run_folder, tmp_path, capsys, monkeypatch):
    fold = export.fold
    monkeypatch.setattr(export, 'fold', lambda network: fold(
        {**network.state_dict(), 'fc.bias': torch.ones(10)}
    ))
    with pytest.raises(SystemExit) as exit:
        export.main([str(run_folder), '--to', str(tmp_path / 'wrong.pth')])
    assert exit.value.code == 1
    assert re.search(r'wrong.pth differs .* at most 0.0001', capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


def test_export_names_the_size_at_which_the_outputs_differ(run_folder, tmp_path, capsys,
                                                           monkeypatch):
    to = str(tmp_path / 'a.onnx')
    verify = export.verify
    monkeypatch.setattr(export, 'verify', lambda models, tolerances, inputs, expected: verify(
        models, tolerances, inputs, expected + (inputs.shape[2] != inputs.shape[3])))
    with pytest.raises(SystemExit) as exit:
        export.main([str(run_folder), '--to', to, '--dynamic_size'])
    assert exit.value.code == 1
    assert re.search(r'inputs of 48 x 64 pixels: unfolded differs .* at most 0.0001; nothing was',
                     capsys.readouterr().err)
    assert not os.path.exists(to)


def export_on_a_full_disk(argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    export.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize('ending', RUN)
def test_export_names_the_file_when_the_disk_is_full(run_folder, tmp_path, ending):
    """In a child process, which torch's own writers would abort; a file limit acts as the disk."""
    folder = tmp_path / 'exported'
    folder.mkdir()
    path = folder / f'diracnet{ending}'
    status, _, errors = in_child(
        tmp_path, export_on_a_full_disk, [str(run_folder), '--to', str(path)])
    assert (status, errors) == (1, f'export.py: {path}: {os.strerror(errno.EFBIG)}\n')
    assert os.listdir(folder) == []


@pytest.fixture(scope='module')
def images(digits, tmp_path_factory):
    """A folder of digits as image files: train/CLASS/ and test/CLASS/, some of each class."""
    folder = tmp_path_factory.mktemp('images')
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in
                 ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))
    for i in range(200):
        pixels = (digits[0][i] * std + mean).round().to(torch.uint8).permute(1, 2, 0).numpy()
        parent = folder / ('train' if i < 100 else 'test') / f'digit {digits[1][i]}'
        parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(parent / f'{i:03}.png'), pixels)
    return folder


def test_int8_accuracy_is_that_of_the_written_file(run_folder, images, digits, tmp_path, capsys):
    path = str(tmp_path / 'int8.onnx')
    export.main([
        str(run_folder), '--to', path, '--int8', str(images / 'train'),
        '--dataset', 'Folder', '--dataroot', str(images),
    ])
    table = table_of(capsys.readouterr().out)
    assert list(table['top-1, %']) == ['unfolded', 'float32', 'int8.onnx']
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert 'QuantizeLinear' in kinds
    filters = [w for w in model.graph.initializer if len(w.dims) == 4]
    assert len(filters) == 7
    assert all(w.data_type == onnx.TensorProto.INT8 for w in filters)
    inputs, labels = digits[0][100:200], digits[1][100:200]
    accuracy = 100 * (run_onnx(path, inputs).argmax(1) == labels).float().mean().item()
    assert float(table['top-1, %']['int8.onnx']) == pytest.approx(accuracy, abs=0.01)
    assert os.listdir(tmp_path) == ['int8.onnx']


def test_calibration_set_is_spread_over_the_sorted_paths(tmp_path, monkeypatch):
    for name, count in (('ant', 5), ('bee', 7)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f'{i}.png').touch()
    monkeypatch.setattr(quantization, 'CALIBRATION_IMAGES', 4)
    paths, metadata = calibration_set(str(tmp_path))
    assert [os.path.relpath(path, tmp_path) for path in paths] == [
        'ant/0.png', 'ant/3.png', 'bee/1.png', 'bee/4.png']
    assert (metadata['images'], metadata['of']) == (4, 12)


@pytest.mark.slow
def test_export_converts_diverse_branches_and_keeps_the_accuracy(images, tmp_path, capsys):
    data = ['--dataset', 'Folder', '--dataroot', str(images)]
    flags = [*data, '--model', 'plain', '--depth', '10', '--width', '0.5', '--block', 'dbb']
    run = str(tmp_path / 'run')
    train.main([*flags, '--epochs', '3', '--batch_size', '10', '--lr', '0.05', '--save', run])
    branches = torch.load(run + '/model.pt7', weights_only=True)['params']
    assert any('dbb_1x1_kxk.conv2' in name for name in branches)

    accuracies = []
    for form in (run, str(tmp_path / 'deployed.pth')):
        if form != run:
            export.main([run, '--to', form])
            assert 'group0.block0.conv.weight' in ' '.join(torch.load(form, weights_only=True))
        capsys.readouterr()
        train.main([*flags, '--evaluate', '--resume', form])
        accuracies.append(capsys.readouterr().out.splitlines()[-1])
    assert accuracies[0] == accuracies[1]

    path = str(tmp_path / 'int8.onnx')
    export.main([run, '--to', path, '--int8', str(images / 'train'), *data])
    table = table_of(capsys.readouterr().out)
    filters = [w for w in onnx.load(path).graph.initializer if len(w.dims) == 4]
    assert len(filters) == 7  # the branches of each block are one convolution
    assert all(w.data_type == onnx.TensorProto.INT8 for w in filters)
    assert f'test_acc: {table["top-1, %"]["unfolded"]}' == accuracies[0]


@pytest.mark.slow
def test_int8_of_the_fast_diracnet(images, tmp_path, capsys):
    """Symbolic shape inference of ONNX Runtime fails for its last pooling, to one pixel."""
    folder, path = tmp_path / 'run', str(tmp_path / 'int8.onnx')
    torch.manual_seed(0)
    network = diracnets.create_model('diracnet-fast', 'CIFAR10', 3, width=0.125)
    args = {'model': 'diracnet-fast', 'width': 0.125, 'dataset': 'CIFAR10'}
    folder.mkdir()
    torch.save({'params': network.state_dict(), 'args': args}, folder / 'model.pt7')
    export.main([str(folder), '--to', path, '--int8', str(images / 'train')])
    assert 'max difference' in table_of(capsys.readouterr().out)
    filters = [w for w in onnx.load(path).graph.initializer if len(w.dims) == 4]
    assert len(filters) == 7
    assert all(w.data_type == onnx.TensorProto.INT8 for w in filters)


def test_to_onnx_names_the_inputs_when_the_argument_has_another_name(tmp_path):
    """torchvision calls it x."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).eval()
    inputs = torch.randn(3, 3, 5, 6)
    (tmp_path / 'net.onnx').write_bytes(to_onnx(net, inputs[:2], {}))
    logits = run_onnx(str(tmp_path / 'net.onnx'), inputs)
    torch.testing.assert_close(logits, net(inputs), rtol=1e-4, atol=1e-5)


def test_commands_infer_the_input_channels_from_the_parameters(images, tmp_path, capsys):
    f, params = define_diracnet(10, 0.5, 'CIFAR10', 3, in_channels=1)
    torch.save({'params': params, 'args': {'depth': 10, 'width': 0.5}}, tmp_path / 'grey.pth')
    inputs = torch.randn(2, 1, 32, 32)
    expected = f(inputs, params, False).detach()
    for name in ('grey.onnx', 'folded.pth'):
        export.main([str(tmp_path / 'grey.pth'), '--to', str(tmp_path / name)])
        (line,) = re.findall(r'^inputs: .*', capsys.readouterr().out, re.M)
        assert all(fact in line for fact in ('(N, 1, 32, 32)', 'mean (0.0000)', 'std (1.0000)'))
    torch.testing.assert_close(
        run_onnx(str(tmp_path / 'grey.onnx'), inputs), expected, rtol=1e-4, atol=1e-5)
    folded = diracnets.load(tmp_path / 'folded.pth').model
    torch.testing.assert_close(folded(inputs), expected, rtol=1e-4, atol=1e-5)
    image = next(str(path) for path in images.glob('*/*/*.png'))
    pixels = diracnets.load(tmp_path / 'folded.pth').preprocess(image)  # of an RGB file
    gray = cv2.imread(image, cv2.IMREAD_COLOR).astype(float) @ [0.114, 0.587, 0.299]  # of BGR
    assert pixels.shape == (1, 32, 32)
    torch.testing.assert_close(pixels[0].double(), torch.from_numpy(gray / 255),
                               atol=0.6 / 255, rtol=0)
    four = {'params': define_diracnet(10, 0.5, 'CIFAR10', 3, in_channels=4)[1]}
    torch.save(four, tmp_path / 'four.pth')
    assert f'{image} has 3 channels: expected 4' in error_of(
        predict.main, [image, '--model', str(tmp_path / 'four.pth')], capsys)
    grey, message = str(tmp_path / 'grey.pth'), 'Digits has images of 3 channels'
    for main, arguments in ((train.main, ['--evaluate', '--resume', grey]),
                            (export.main, [grey, '--to', grey + '.pth'])):
        assert message in error_of(main, [*arguments, '--dataset', 'Digits'], capsys)


# ---------------------------------------------------------------- errors


def error_of(main, arguments, capsys):
    """Runs a command that must end with status 2 and one line on stderr: returns the line."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert printed.out == ''
    assert printed.err.count('\n') == 1
    return printed.err


@pytest.mark.parametrize('kind', sorted(DAMAGES.keys() - {'folded'}))
def test_commands_refuse_a_corrupt_file(trained, tmp_path, capsys, kind):
    path = damaged(kind, trained[1], tmp_path)
    for name, main, arguments in (
        ('export.py', export.main, [path, '--to', str(tmp_path / 'x.pth')]),
        ('predict.py', predict.main, ['x.png', '--model', path]),
    ):
        line = error_of(main, arguments, capsys)
        assert line.startswith(f'{name}: {path}: ')
        assert re.search(DAMAGES[kind], line)
    assert not (tmp_path / 'ran').exists()
    assert not (tmp_path / 'x.pth').exists()


@pytest.mark.slow
def test_export_refuses_a_malicious_pickle(trained, tmp_path):
    path = damaged('malicious', trained[1], tmp_path)
    status, printed, error = in_child(
        tmp_path, export.main, [path, '--to', str(tmp_path / 'x.onnx')])
    assert status == 2
    assert printed == ''
    assert error.count('\n') == 1
    assert 'refused' in error


@pytest.mark.parametrize(('options', 'message'), [
    (['--to', 'x.h5'], 'x.h5: .*.onnx, .pt2, .safetensors, .pth'),
    (['--to', 'x.pt2', '--int8', '.'], 'x.pt2: --int8 .*.onnx'),
    (['--to', 'x.onnx', '--int8', 'tests/nowhere'], 'tests/nowhere'),
    (['--to', 'x.onnx', '--equalise'], '--equalize.*--int8'),
    (['--to', 'x.onnx', '--equalize'], '--equalize.*--int8'),
    (['--to', 'x.onnx', '--int8', '.', '--equalize', 'tests'], '--equalize tests: .*--int8'),
    (['--to', 'x.pth', '--equalize', 'tests/nowhere'], 'tests/nowhere'),
    (['--to', 'x.pth', '--dataset', 'Folder', '--dataroot', 'nowhere'], 'nowhere/test: no such'),
    (['--to', 'x.pth', '--dataset', 'Digits'],
     r'classes differ: .* 10 \(digit 0 to digit 9\), .* 10 \(0 to 9\)'),
    (['--to', 'x.pth', '--dataroot', 'nowhere'], '--dataroot nowhere: needs --dataset'),
    ([], 'the following arguments are required: --to'),
])
def test_export_refuses_wrong_options(run_folder, capsys, options, message):
    assert re.search(message, error_of(export.main, [str(run_folder), *options], capsys))


def test_extensions_of_export_are_the_formats_of_the_library():
    assert export.EXTENSIONS.keys() == FORMATS.keys()


def test_export_refuses_to_overwrite_the_checkpoint(run_folder, tmp_path, capsys):
    path = str(shutil.copy(run_folder / 'model.pt7', tmp_path / 'model.pth'))
    line = error_of(export.main, [path, '--to', path], capsys)
    assert f'--to {path}: ' in line


def test_commands_use_the_previous_checkpoint_when_the_last_is_corrupt(
    run_folder, images, tmp_path, capsys
):
    shutil.copy(run_folder / 'model.pt7', tmp_path / 'previous.pt7')
    content = bytearray((run_folder / 'model.pt7').read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / 'model.pt7').write_bytes(content)
    image, run = str(next(images.rglob('*.png'))), str(tmp_path)
    for main, arguments in (
        (export.main, ['RUN', '--to', str(tmp_path / 'a.pth')]),
        (predict.main, [image, '--model', 'RUN']),
        (train.main, ['--evaluate', '--resume', 'RUN', '--dataset', 'Folder', '--dtype', 'float',
                      '--dataroot', str(images)]),
    ):
        outputs = []
        for path in (run, str(run_folder)):
            main([path if word == 'RUN' else word for word in arguments])
            outputs.append(capsys.readouterr())
        fallback, expected = outputs
        assert fallback.err.startswith(f'{run}/model.pt7: corrupt')
        assert fallback.err.endswith(f'using {run}/previous.pt7 instead\n')
        if main is not export.main:  # which prints rates
            assert fallback.out.splitlines()[-3:] == expected.out.splitlines()[-3:]


def test_commands_give_the_same_results_for_a_run_and_its_exports(
    exported, run_folder, images, tmp_path, capsys
):
    image = str(next(images.rglob('*.png')))
    evaluate = ['--evaluate', '--dataset', 'Folder', '--dataroot', str(images), '--dtype', 'float']
    printed = []
    for file in (exported[0] / 'diracnet.pth', exported[0] / 'diracnet.safetensors', run_folder):
        predict.main([image, '--model', str(file)])
        shown = re.findall(r'([\d.]+) %', capsys.readouterr().out)
        train.main([*evaluate, '--resume', str(file)])
        printed.append((shown, capsys.readouterr().out.splitlines()[-2:]))
        export.main([str(file), '--to', str(tmp_path / 'again.safetensors')])
        again, first = (load_file(path) for path in (
            tmp_path / 'again.safetensors', exported[0] / 'diracnet.safetensors'))
        assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
        capsys.readouterr()
    assert printed[0] == printed[1] == printed[2]


def test_export_names_missing_packages(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    line = error_of(export.main, [str(run_folder), '--to', 'x.onnx'], capsys)
    assert 'onnx, onnxruntime, onnxscript' in line
    assert "pip install '.[deploy]'" in line


# ---------------------------------------------------------------- signals, closed pipe


def export_with_a_signal(argv, number):
    def write(path, content):
        os.kill(os.getpid(), number)

    export.write_synced = write  # called when the temporary folder exists
    export.main(argv)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_export_removes_temporary_folders_after_a_signal(run_folder, tmp_path, number):
    argv = [str(run_folder), '--to', str(tmp_path / 'new' / 'x.pth')]
    status, _, errors = in_child(tmp_path / 'child', export_with_a_signal, argv, number)
    assert (status, errors) == (128 + number, '')
    assert not (tmp_path / 'new').exists()


def load_with_a_failed_import(argv):
    def load(name):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:  # as C extensions do
            raise ValueError('onnxruntime is not installed') from None

    predict.load = load
    predict.main(argv)


def test_ctrl_c_during_an_import_is_not_a_missing_package(tmp_path):
    child = in_child(tmp_path / 'child', load_with_a_failed_import, ['x.png', '--model', 'x.onnx'])
    assert child[::2] == (130, '')


def test_export_writes_the_file_when_stdout_is_closed(run_folder, tmp_path, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, 'w') as closed:
        monkeypatch.setattr(sys, 'stdout', closed)
        export.main([str(run_folder), '--to', str(tmp_path / 'x.pth')])
    assert (tmp_path / 'x.pth').exists()
    assert 'output is discarded' in capsys.readouterr().err


# ---------------------------------------------------------------- predict.py


def test_predict_prints_the_five_most_probable_classes(run_folder, trained, images, digits, capsys):
    files = sorted(str(path) for path in (images / 'test').rglob('*.png'))[:2]
    predict.main([*files, '--model', str(run_folder)])
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[6]] == files
    f, params = trained
    for path, printed in zip(files, (lines[1:6], lines[7:])):
        with torch.no_grad():
            logits = f(digits[0][int(Path(path).stem)][None], params, False)[0].double().numpy()
        p = np.exp(logits - logits.max())
        p /= p.sum()
        expected = [f'  {100 * p[i]:6.2f} %  digit {i}' for i in np.argsort(-p)[:5]]
        assert printed == expected


def test_predict_numbers_the_classes_when_names_are_missing(trained, images, tmp_path, capsys):
    torch.save(trained[1], tmp_path / 'params.pth')
    predict.main([str(next(images.rglob('*.png'))), '--model', str(tmp_path / 'params.pth')])
    assert re.search(r'^ +\d+\.\d\d %  class \d$', capsys.readouterr().out, re.MULTILINE)


def test_predict_names_an_unreadable_image(run_folder, capsys):
    line = error_of(predict.main, [__file__, '--model', str(run_folder)], capsys)
    assert line.startswith(f'predict.py: {__file__}: ')


@pytest.mark.parametrize(('number', 'status', 'message'), [
    (torch.nan, 2, 'fc.weight contains non-finite'),
    (3e38, 1, 'outputs are non-finite'),
])
def test_predict_refuses_non_finite_parameters_and_outputs(
    trained, images, tmp_path, capsys, number, status, message
):
    path = str(tmp_path / 'params.pth')
    weight = torch.full_like(trained[1]['fc.weight'], number)
    torch.save({**trained[1], 'fc.weight': weight}, path)
    with pytest.raises(SystemExit) as exit:
        predict.main([str(next(images.rglob('*.png'))), '--model', path])
    assert exit.value.code == status
    printed = capsys.readouterr()
    assert printed.out == ''
    assert re.fullmatch(f'predict.py: {path}: .*{message}.*\n', printed.err)


# ---------------------------------------------------------------- torch.hub, docs


def sha256_start(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


@pytest.fixture(scope='module')
def torch_home(tmp_path_factory):
    """A cache of torch.hub with stand-ins for the published files of DiracNet-18.

    The name of the folded one contains its own hash, in place of the a2174e15 in MODEL_URLS.
    """
    home = tmp_path_factory.mktemp('torch_home')
    cache = home / 'hub' / 'checkpoints'
    cache.mkdir(parents=True)
    torch.manual_seed(3)
    file = cache / 'folded.pth'
    torch.save(DiracNet(18).state_dict(), file)
    file.rename(cache / f'diracnet18v2folded-{sha256_start(file)}.pth')
    params = define_diracnet(18, 1, 'ImageNet')[1]
    torch.save({'params': params, 'epoch': 100}, cache / 'diracnet18-v2_checkpoint.pth')
    return home


def test_hub_models_have_the_published_sizes(torch_home, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(torch_home))
    (file,) = (torch_home / 'hub' / 'checkpoints').glob('diracnet18v2folded-*.pth')
    monkeypatch.setitem(diracnet.MODEL_URLS, 18, f'http://127.0.0.1:1/{file.name}')
    net = torch.hub.load(str(ROOT), 'diracnet18', source='local', pretrained=True)
    state = torch.load(file, weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    net = torch.hub.load(str(ROOT), 'diracnet34', source='local')
    # the published 21,638,952 less alpha, beta and batch norm, plus the biases that folding leaves
    channels = 2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512)
    folded = 21_638_952 - 4 * channels - 2 * 64 + channels + 64
    assert sum(p.numel() for p in net.parameters()) == folded
    net = torch.hub.load(
        str(ROOT), 'diracnet_cifar', source='local', depth=28, width=1, num_classes=100
    )
    assert sum(p.numel() for p in net.parameters()) == 374_580
    names = ['diracnet18', 'diracnet34', 'diracnet_cifar']
    assert sorted(name for name, value in vars(hubconf).items()  # as torch.hub.list selects
                  if callable(value) and not name.startswith('_')) == names
    for name in names:
        text = getattr(hubconf, name).__doc__
        assert all(word in text for word in ('Inputs (N, 3,', 'std', 'classes', 'figures'))


def run_shell_line(line, project):
    """Runs a line of a bash block, a command of this repository in this process."""
    words = [os.path.expanduser(word) for word in shlex.split(line, comments=True)]
    commands = {'export.py': export.main, 'predict.py': predict.main}
    if words[:1] == ['python'] and words[1] in commands:
        commands[words[1]](words[2:])
        return
    done = subprocess.run(['bash', '-ec', line], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, f'{line}\n{done.stdout}\n{done.stderr}'


@pytest.mark.slow
def test_code_blocks_in_the_deploying_docs_run(
    run_folder, images, torch_home, tmp_path, monkeypatch
):
    """Runs the page's blocks as they stand, in a copy of the project, on small stand-ins."""
    project = tmp_path / 'project'
    others = ('.*', '__pycache__', '*.egg-info', 'build', 'checkpoints', 'logs', 'runs', 'tests')
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(*others))
    (file,) = (torch_home / 'hub' / 'checkpoints').glob('diracnet18v2folded-*.pth')
    monkeypatch.setitem(diracnet.MODEL_URLS, 18, f'http://127.0.0.1:1/{file.name}')
    shutil.copytree(run_folder, project / 'logs' / 'diracnet-28-2')
    shutil.copytree(images, tmp_path / 'home' / 'images')
    shutil.copy(next(images.rglob('*.png')), project / 'cat.jpg')
    variables = {
        'HOME': str(tmp_path / 'home'), 'TORCH_HOME': str(torch_home),
        'PATH': os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH'],
        # pip installs this copy into another folder and downloads nothing
        'PIP_NO_INDEX': '1', 'PIP_NO_DEPS': '1', 'PIP_NO_BUILD_ISOLATION': '0',
        'PIP_TARGET': str(tmp_path / 'installed'),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(project)
    page = blocks('docs/deploying.md')
    assert {language for language, _ in page} == {'bash', 'python'}
    for language, text in page:
        if language == 'python':
            exec(text, {'__name__': 'block'})
        else:
            for line in text.replace('\\\n', ' ').splitlines():
                run_shell_line(line, project)
    for name in ('diracnet.onnx', 'diracnet-int8.onnx', 'diracnet.safetensors'):
        assert (project / name).exists()
