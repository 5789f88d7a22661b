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
