"""Export to ONNX, and a module that runs an ONNX file with ONNX Runtime on the CPU.

    model = OnnxModel('diracnet-int8.onnx')
    logits = model(inputs)                      # (N, C, H, W) to (N, num_classes)
"""

import ast
import copy
import os
import reprlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

NAME_SCOPES = 'pkg.torch.onnx.name_scopes'  # of the exporter's node metadata
OPERATORS = {  # operators in files of this and earlier versions of export.py
    'Add', 'AveragePool', 'BatchNormalization', 'Clip', 'Concat', 'Constant', 'Conv',
    'DequantizeLinear', 'Div', 'Flatten', 'Gemm', 'GlobalAveragePool', 'HardSwish', 'Identity',
    'Max', 'MaxPool', 'Min', 'Mul', 'Pad', 'Pow', 'QuantizeLinear', 'ReduceMax', 'ReduceMean',
    'Relu', 'Reshape', 'Shape', 'Sigmoid', 'Squeeze', 'Tanh',
}
FATAL = 4  # log level of ONNX Runtime; its errors are raised as exceptions


class OnnxModel(nn.Module):
    """The model in an ONNX file of export.py, from `inputs` to `logits`, both float32.

    `input_shape` is (C, H, W), with None for H and W if the file accepts inputs of any size.
    Raises ValueError for a corrupt file, for operators other than OPERATORS, for tensors in other
    files, for other inputs or outputs, and if onnx or ONNX Runtime is not installed; OSError for a
    file that cannot be read. All of them name the file.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__()
        try:
            import onnxruntime
            from onnx import load_model_from_string
        except ImportError as error:
            raise ValueError(
                f'{path}: {error.name} is not installed; pip install onnxruntime onnx'
            ) from error
        with open(path, 'rb') as file:
            content = file.read()
        try:
            model = load_model_from_string(content)
        except Exception as error:  # of protobuf
            raise ValueError(f'{path}: corrupt, or not an ONNX file') from error
        try:
            _check_nodes_and_tensors(model)
        except ValueError as error:
            raise ValueError(f'{path}: {error}; use an ONNX file of export.py') from error
        try:
            self.session = _open_session(onnxruntime, content)
            metadata = self.session.get_modelmeta().custom_metadata_map
        except Exception as error:  # corrupt bytes make it raise almost any exception
            raise ValueError(f'{path}: corrupt, or not an ONNX file') from error
        self.path = str(path)
        self.metadata = dict(metadata)  # {key: text}
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        names = [value.name for value in (*inputs, *outputs)]
        shapes = [tuple(value.shape) for value in (*inputs, *outputs)]
        if names != ['inputs', 'logits'] or [len(shape) for shape in shapes] != [4, 2]:
            raise ValueError(f'{path}: its graph is not from inputs (N, C, S, S) to logits '
                             '(N, classes); use an ONNX file of export.py')
        self.input_shape = tuple(dim if isinstance(dim, int) else None for dim in shapes[0][1:])
        self.num_classes = shapes[1][1]

    def __deepcopy__(self, memo):
        return self  # nothing in it changes

    def forward(self, inputs: Tensor) -> Tensor:
        """Computes logits (N, num_classes); raises RuntimeError that names the file on failure."""
        feed = {'inputs': inputs.detach().float().cpu().numpy()}
        try:
            (logits,) = self.session.run(['logits'], feed)
        except Exception as error:  # ONNX Runtime has exception classes of its own
            reason = str(error).splitlines()[0]
            raise RuntimeError(f'{self.path}: ONNX Runtime failed ({reason})') from error
        return torch.from_numpy(logits).to(inputs.device)


def _open_session(onnxruntime, content):
    """Opens an ONNX Runtime session on the CPU whose int8 sums of products do not saturate.

    On x86 CPUs without VNNI, ONNX Runtime adds them in 16 bits by default. The first option selects
    slower, exact sums; version 1.32 cannot apply it to constants that several nodes share. The
    second one computes in float32.
    """
    def session(entry):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = FATAL
        options.add_session_config_entry(entry, '1')
        return onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])

    try:
        return session('session.x64quantprecision')
    except Exception:  # also for corrupt content, for which the other one fails too
        return session('session.disable_quant_qdq')


def _check_nodes_and_tensors(model):
    """Raises ValueError for operators that export.py does not write, and for external tensors.

    A Loop may never end, and ONNX Runtime reads tensors from files in the current folder.
    """
    from onnx import FunctionProto, NodeProto, TensorProto

    def walk(message):
        yield message
        for field, value in message.ListFields():
            if field.message_type:
                for child in [value] if hasattr(value, 'ListFields') else value:
                    yield from walk(child)

    for message in walk(model):
        if isinstance(message, (NodeProto, FunctionProto)):
            name = getattr(message, 'op_type', message.name)
            if message.domain not in ('', 'ai.onnx') or name not in OPERATORS:
                raise ValueError(f'operator {reprlib.repr(name)} is refused')
        if isinstance(message, TensorProto) and (
                message.external_data or message.data_location == TensorProto.EXTERNAL):
            raise ValueError(f'tensor {reprlib.repr(message.name)} is in another file')


def to_onnx(model: nn.Module, inputs: Tensor, metadata: Mapping[str, str],
            dynamic_size: bool = False) -> bytes:
    """Exports a model to ONNX and returns the bytes of the file.

    inputs: an example (N, C, H, W); N stays variable, and with dynamic_size also H and W. metadata:
    texts by key. Nodes are named after modules, as in '/features/group0/block0/conv/Conv', and
    initializers have the names of the state dict. torch exports some models that take inputs of one
    size only with dynamic_size too: compare the outputs for another size.
    """
    names = {0: 'N', 2: 'H', 3: 'W'} if dynamic_size else {0: 'N'}
    program = torch.onnx.export(
        _with_amax(model), (inputs.contiguous(),), input_names=['inputs'], output_names=['logits'],
        dynamic_shapes=({dim: torch.export.Dim(name) for dim, name in names.items()},),
        opset_version=18, dynamo=True, verbose=False,
    )
    proto = program.model_proto
    _use_global_average_pool(proto.graph)
    _name_nodes(proto.graph)
    return add_metadata(proto, metadata)


class _GlobalMaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(2, 3), keepdim=True)


def _with_amax(model):
    """Returns the model, or a copy without nn.AdaptiveMaxPool2d(1), which torch 2.9 cannot export.

    Training does not use amax, whose gradient differs where several values equal the maximum.
    """
    names = [name for name, module in model.named_modules(remove_duplicate=False)
             if isinstance(module, nn.AdaptiveMaxPool2d) and module.output_size in (1, (1, 1))]
    model = copy.deepcopy(model) if names else model
    for name in names:
        model.set_submodule(name, _GlobalMaxPool())
    return model


def _use_global_average_pool(graph):
    """Replaces ReduceMean over H and W by GlobalAveragePool, and Reshape after it by Flatten.

    Other runtimes and converters expect these operators at the end of a network.
    """
    from onnx.numpy_helper import to_array

    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        before, after = (shapes.get(name, []) for name in ([*node.input, ''][0], node.output[0]))
        if node.op_type == 'Reshape' and len(after) == 2 and before == [*after, 1, 1]:
            node.op_type = 'Flatten'
        elif (node.op_type == 'ReduceMean' and len(before) == 4 and node.input[-1] in constants
              and sorted(to_array(constants[node.input[-1]]) % 4) == [2, 3]):
            node.op_type = 'GlobalAveragePool'
        else:
            continue
        del node.input[1:], node.attribute[:]
        if node.op_type == 'GlobalAveragePool' and len(after) == 2:  # of keepdims=False
            nodes.append(copy.deepcopy(node))
            nodes[-1].op_type = 'Flatten'
            nodes[-1].input[0] = node.output[0] = f'{node.output[0]}_pooled'
    used, kept = {value.name for value in graph.output}, []
    for node in reversed(nodes):  # some versions compute the shape of Reshape by other nodes
        if used & {*node.output}:
            kept.append(node)
            used.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for i, tensor in reversed(list(enumerate(graph.initializer))):
        if tensor.name not in used:
            del graph.initializer[i]


def _name_nodes(graph):
    """Names nodes after the modules of their operators, and removes the metadata of nodes."""
    counts = Counter()
    for node in graph.node:
        scopes = {prop.key: prop.value for prop in node.metadata_props}.get(NAME_SCOPES)
        if scopes:  # "['', 'features', 'features.conv', 'conv2d']": modules and the operator
            *_, module, _ = ['', *ast.literal_eval(scopes)]
            name = '/'.join(['', *filter(None, module.split('.')), node.op_type])
            node.name = f'{name}_{counts[name]}' if counts[name] else name
            counts[name] += 1
        del node.metadata_props[:]  # stack traces contain paths of this machine


def add_metadata(model, metadata: Mapping[str, str]) -> bytes:
    """Adds metadata to an onnx.ModelProto and returns the bytes of the file."""
    for name, text in metadata.items():
        model.metadata_props.add(key=name, value=text)
    return model.SerializeToString()
