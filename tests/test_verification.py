"""Errors that export.py detects before it writes a file, and files that readers refuse."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import export
from diracnets.onnx import OnnxModel, to_onnx
from diracnets.quantization import quantize


def test_verify_raises_when_logits_are_nan():
    expected = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r'wrong\.onnx differs .* nan'):
        export.verify({'wrong.onnx': lambda inputs: expected * float('nan')}, {'wrong.onnx': 1e-4},
                      torch.zeros(2), expected)


def test_quantize_gives_each_filter_a_scale():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    images = dict(enumerate(torch.randn(4, 3, 8, 8)))
    content = to_onnx(model, torch.zeros(2, 3, 8, 8), {})
    _, int8 = quantize(content, list(images), images.get, {})
    graph = onnx.load_model_from_string(int8).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    scales = {
        tuple(tensors[node.input[0]].dims): tuple(tensors[node.input[1]].dims)
        for node in graph.node if node.op_type == 'DequantizeLinear' and node.input[0] in tensors
    }
    assert scales[8, 3, 3, 3] == (8,)
    assert scales[4, 8, 3, 3] == (4,)


@pytest.mark.parametrize(('inputs', 'logits'), [
    (['N', 3, 8], ['N', 3, 8]), (['N', 3], ['N', 3]), (['N', 3, 8, 8], ['N', 3, 8, 8]),
])
def test_onnx_model_refuses_other_shapes(tmp_path, inputs, logits):
    graph = helper.make_graph(
        [helper.make_node('Identity', ['inputs'], ['logits'])], 'identity',
        [helper.make_tensor_value_info('inputs', TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info('logits', TensorProto.FLOAT, logits)],
    )
    path = tmp_path / 'model.onnx'
    path.write_bytes(helper.make_model(
        graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=8).SerializeToString())
    with pytest.raises(ValueError, match=r'model\.onnx: .*\(N, C, S, S\)'):
        OnnxModel(path)


def identity_model(nodes, tensors=()):
    """Returns an onnx.ModelProto from inputs (N, 3, 2, 2) to logits (N, 12)."""
    graph = helper.make_graph(
        [*nodes, helper.make_node('Flatten', ['inputs'], ['logits'])], 'flatten',
        [helper.make_tensor_value_info('inputs', TensorProto.FLOAT, ['N', 3, 2, 2])],
        [helper.make_tensor_value_info('logits', TensorProto.FLOAT, ['N', 12])], tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=8)


def loop_model():
    true = helper.make_tensor('true', TensorProto.BOOL, [], [True])
    done = helper.make_tensor_value_info('next', TensorProto.BOOL, [])
    condition = helper.make_tensor_value_info('condition', TensorProto.BOOL, [])
    count = helper.make_tensor_value_info('count', TensorProto.INT64, [])
    body = helper.make_graph([helper.make_node('Identity', ['condition'], ['next'])], 'body',
                             [count, condition], [done])
    return identity_model([helper.make_node('Loop', ['', 'true'], [], body=body)], [true])


def function_model():
    model = identity_model([])
    model.functions.add(name='Relu', domain='custom', input=['x'], output=['x'])
    return model


def external_model(attribute=False):
    tensor = TensorProto(name='weight', data_type=TensorProto.FLOAT, dims=[4],
                         data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key='location', value='weight.bin')
    if attribute:
        return identity_model([helper.make_node('Constant', [], ['weight'], value=tensor)])
    return identity_model([], [tensor])


@pytest.mark.parametrize(('model', 'message'), [
    (loop_model(), "operator 'Loop'"), (function_model(), "operator 'Relu'"),
    (identity_model([helper.make_node('Relu', ['inputs'], ['x'], domain='custom')]),
     "operator 'Relu'"),
    (identity_model([helper.make_node('Hardmax', ['inputs'], ['x'])]), "operator 'Hardmax'"),
    (external_model(), "tensor 'weight'"), (external_model(attribute=True), "tensor 'weight'"),
], ids=['loop', 'function', 'domain', 'operator', 'external', 'external attribute'])
def test_onnx_model_refuses_other_operators_and_external_tensors(
    tmp_path, monkeypatch, model, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'weight.bin').write_bytes(bytes(16))
    path = tmp_path / 'model.onnx'
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=rf'model\.onnx: {message}'):
        OnnxModel(path)
    path.write_bytes(identity_model([]).SerializeToString())
    assert OnnxModel(path)(torch.ones(2, 3, 2, 2)).shape == (2, 12)
