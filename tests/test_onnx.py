"""Exported ONNX graphs: operators, names of nodes, inputs of any size, other runtimes."""

import contextlib
import io

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import diracnets
import export
from diracnets.architectures import ACTIVATIONS
from diracnets.onnx import OnnxModel, to_onnx
from diracnets.quantization import quantize
from test_export import error_of, run_onnx, table_of


class Pooled(nn.Module):
    """A convolution and a pooling function."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3), pool

    def forward(self, inputs):
        return self.pool(self.conv(inputs))


@pytest.fixture(scope='module')
def dynamic(run_folder, tmp_path_factory):
    """A file of `export.py --dynamic_size`, and the table that was printed."""
    path = tmp_path_factory.mktemp('dynamic') / 'any-size.onnx'
    with contextlib.redirect_stdout(io.StringIO()) as out:
        export.main([str(run_folder), '--to', str(path), '--dynamic_size'])
    return path, table_of(out.getvalue())


@pytest.mark.parametrize(('pool', 'operators'), [
    (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), ['GlobalAveragePool', 'Flatten']),
    (lambda x: x.mean((2, 3)), ['GlobalAveragePool', 'Flatten']),
    (lambda x: x.mean((-1, -2), keepdim=True).squeeze(3).squeeze(2), ['GlobalAveragePool']),
    (lambda x: x.mean((1, 2)), ['ReduceMean']),  # 8 channels and 8 rows
    (lambda x: x.mean((0, 3)), ['ReduceMean']),
    (lambda x: x.flatten(2).mean(2), ['ReduceMean']),
    (lambda x: x.reshape(2, 8, 64, 1, 1).reshape(2, 8, 64).amax(2), []),
])
def test_to_onnx_writes_global_average_pool_for_means_over_pixels(tmp_path, pool, operators):
    model, inputs = Pooled(pool).eval(), torch.randn(2, 3, 10, 10)
    path = tmp_path / 'pooled.onnx'
    path.write_bytes(to_onnx(model, inputs, {}))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    graph = onnx.load(path).graph
    assert [n.op_type for n in graph.node if n.op_type in (
        'GlobalAveragePool', 'Flatten', 'ReduceMean')] == operators
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used
    torch.testing.assert_close(run_onnx(path, inputs), model(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_onnx_file_of_each_activation_is_loaded(tmp_path, activation):
    model = diracnets.fold(diracnets.create_model(
        'diracnet-fast', 'CIFAR10', width=0.05, activation=activation).eval())
    inputs, path = torch.randn(2, 3, 32, 32), tmp_path / 'model.onnx'
    path.write_bytes(to_onnx(model, inputs, {}))
    torch.testing.assert_close(OnnxModel(path)(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_export_names_nodes_after_modules_and_initializers_after_parameters(dynamic, run_folder):
    graph = onnx.load(dynamic[0]).graph
    model = diracnets.fold(diracnets.load(run_folder).model)
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [name for name in names if name.endswith('/Conv')] == [
        f'/{name.replace(".", "/")}/Conv' for name in convs]
    assert names[-3:] == ['/features/avg_pool/GlobalAveragePool', '/Flatten', '/fc/Gemm']
    assert {tensor.name for tensor in graph.initializer} == model.state_dict().keys()
    assert not any(node.metadata_props for node in graph.node)


def test_nodes_of_a_module_that_is_called_twice_have_different_names():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1), relu, nn.Flatten()).eval()
    graph = onnx.load_from_string(to_onnx(model, torch.zeros(2, 3, 4, 4), {})).graph
    names = [node.name for node in graph.node if node.op_type == 'Relu']
    assert len(set(names)) == 2


@pytest.mark.parametrize('size', [(32, 32), (8, 8), (37, 50)])
def test_dynamic_size_accepts_any_height_and_width(dynamic, run_folder, size):
    inputs = torch.randn(3, 3, *size)
    expected = diracnets.load(run_folder).model(inputs).detach()
    loaded = diracnets.load(dynamic[0])
    assert loaded.model.input_shape == (3, None, None)
    assert loaded.preprocess.shape == (3, 32, 32)
    torch.testing.assert_close(loaded.model(inputs), expected, rtol=1e-4, atol=1e-4)


def test_dynamic_size_is_verified_at_another_size(dynamic):
    cells = dynamic[1]['max difference, 48 x 64']
    assert float(cells['any-size.onnx'].split()[0]) < 1e-4


@pytest.mark.parametrize('model', [
    nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2)),
    nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),  # the exporter computes a kernel size
], ids=['linear', 'adaptive pooling'])
def test_export_refuses_dynamic_size_when_another_size_fails(tmp_path, model):
    inputs, path = torch.randn(2, 3, 4, 4), tmp_path / 'model.onnx'
    path.write_bytes(to_onnx(model.eval(), inputs, {}, dynamic_size=True))
    with pytest.raises(ValueError, match='--dynamic_size: .* 6 x 8 pixels'):
        export.verify_other_size({'x': OnnxModel(path)}, {'x': 1e-4}, inputs, model.double())


@pytest.mark.parametrize('ending', ['.pt2', '.pth'])
def test_export_refuses_dynamic_size_for_other_formats(run_folder, capsys, ending):
    options = [str(run_folder), '--to', f'x{ending}', '--dynamic_size']
    assert '--dynamic_size' in error_of(export.main, options, capsys)


def test_load_refuses_a_graph_of_another_size_than_its_metadata(dynamic, tmp_path):
    model = onnx.load(dynamic[0])
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 48
    onnx.save(model, tmp_path / 'other.onnx')
    with pytest.raises(ValueError, match=r'expected \(3, 48, None\)'):
        diracnets.load(tmp_path / 'other.onnx')


def test_opencv_runs_an_exported_file(run_folder, digits, tmp_path):
    model = diracnets.fold(diracnets.load(run_folder).model)
    path = tmp_path / 'model.onnx'
    path.write_bytes(to_onnx(model, digits[0][:2], {}))
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(digits[0][:8].numpy())
    np.testing.assert_allclose(network.forward(), model(digits[0][:8]).detach(), atol=1e-3)


@pytest.mark.slow
def test_int8_of_a_dynamic_size_accepts_other_sizes(dynamic, run_folder, digits, tmp_path):
    images = dict(enumerate(digits[0][:32]))
    _, int8 = quantize(dynamic[0].read_bytes(), list(images), images.get, {})
    path = tmp_path / 'int8.onnx'
    path.write_bytes(int8)
    inputs = nn.functional.interpolate(digits[0][:100], (40, 48))
    expected = diracnets.load(run_folder).model(inputs).argmax(1)
    assert (run_onnx(path, inputs).argmax(1) == expected).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize('first_fails', [False, True])
def test_int8_sums_do_not_saturate(dynamic, digits, tmp_path, monkeypatch, first_fails):
    """They would by default on x86 CPUs without VNNI; with VNNI, this test cannot fail."""
    images = dict(enumerate(digits[0][:32]))
    _, int8 = quantize(dynamic[0].read_bytes(), list(images), images.get, {})
    path = tmp_path / 'int8.onnx'
    path.write_bytes(int8)
    options = onnxruntime.SessionOptions()  # dequantizes weights and activations, and uses float32
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    make_session, failed = onnxruntime.InferenceSession, []
    session = make_session(path, options, providers=['CPUExecutionProvider'])
    expected, = session.run(['logits'], {'inputs': digits[0][:100].numpy()})

    def make_second_session(*args, **kwargs):
        if not failed:  # as for some models with constants that several nodes share
            failed.append(True)
            raise RuntimeError('Attempt to replace the existing tensor')
        return make_session(*args, **kwargs)

    if first_fails:
        monkeypatch.setattr(onnxruntime, 'InferenceSession', make_second_session)
    error = OnnxModel(path)(digits[0][:100]).numpy() - expected
    assert np.square(error).mean() < 1e-3 * np.square(expected).mean()
