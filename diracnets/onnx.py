"""Export to ONNX, and a module that runs an ONNX file with ONNX Runtime on the CPU.

    model = OnnxModel('diracnet-int8.onnx')
    logits = model(inputs)                      # (N, C, S, S) to (N, num_classes)
"""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

FATAL = 4  # log level of ONNX Runtime; its errors are raised as exceptions


class OnnxModel(nn.Module):
    """The model in an ONNX file of export.py, from `inputs` to `logits`, both float32.

    ONNX files contain operators of ONNX Runtime and no code. Raises ValueError for a corrupt file,
    for other inputs or outputs, and if ONNX Runtime is not installed; OSError for a file that
    cannot be read. All of them name the file.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(
                f'{path}: onnxruntime is not installed; pip install onnxruntime'
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = FATAL
        with open(path, 'rb') as file:
            content = file.read()  # given bytes, ONNX Runtime does not open external data files
        try:
            self.session = onnxruntime.InferenceSession(
                content, options, providers=['CPUExecutionProvider']
            )
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
        self.input_shape, (_, self.num_classes) = shapes[0][1:], shapes[1]  # (C, S, S)

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


def to_onnx(model: nn.Module, inputs: Tensor, metadata: Mapping[str, str]) -> bytes:
    """Exports a model to ONNX and returns the bytes of the file.

    inputs: an example (N, C, H, W); N stays variable. metadata: texts by key.
    """
    program = torch.onnx.export(
        model, (inputs,), input_names=['inputs'], output_names=['logits'], opset_version=18,
        dynamic_shapes=({0: torch.export.Dim('N')},), dynamo=True, verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces contain paths of this machine
    return add_metadata(program.model_proto, metadata)


def add_metadata(model, metadata: Mapping[str, str]) -> bytes:
    """Adds metadata to an onnx.ModelProto and returns the bytes of the file."""
    for name, text in metadata.items():
        model.metadata_props.add(key=name, value=text)
    return model.SerializeToString()
