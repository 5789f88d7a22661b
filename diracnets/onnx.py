"""An ONNX file at work: a module that ONNX Runtime computes, on the CPU.

    network = OnnxModel('diracnet-int8.onnx')
    logits = network(inputs)                    # (N, C, S, S) to (N, num_classes)
"""

import torch
from torch import nn

QUIET = 4  # of ONNX Runtime's levels: what is wrong is said once, by an exception


class OnnxModel(nn.Module):
    """The network of an ONNX file, as export.py writes it: `inputs` to `logits`, both float32.

    Nothing in such a file is code: operators are those of ONNX Runtime alone. Raises ValueError
    that names a file that is damaged, of other inputs or outputs, or where ONNX Runtime is missing;
    OSError for one that cannot be read.
    """

    def __init__(self, path):
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(
                f'{path}: onnxruntime is missing: expected pip install onnxruntime'
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = QUIET
        with open(path, 'rb') as file:
            content = file.read()  # without a path the runtime follows no names of other files
        try:
            self.session = onnxruntime.InferenceSession(
                content, options, providers=['CPUExecutionProvider']
            )
            said = self.session.get_modelmeta().custom_metadata_map
        except Exception as error:  # damaged bytes make it raise almost anything
            raise ValueError(f'{path}: truncated, damaged or no ONNX file: expected one of '
                             'export.py') from error
        self.path = str(path)
        self.said = dict(said)  # what the file says beside the network: {key: text}
        ins, outs = self.session.get_inputs(), self.session.get_outputs()
        shapes = [list(value.shape) for value in (*ins, *outs)]
        if ([value.name for value in ins], [value.name for value in outs]) != (
            ['inputs'], ['logits']
        ) or [len(shape) for shape in shapes] != [4, 2]:
            raise ValueError(f'{path}: of other inputs or outputs than (N, C, S, S) and (N, '
                             'classes): expected an ONNX file of export.py')
        self.input_shape, (_, self.num_classes) = shapes[0][1:], shapes[1]  # (C, S, S)

    def __deepcopy__(self, memo):
        return self  # nothing in it changes

    def forward(self, inputs):
        """Raises RuntimeError that names the file, where what is in it cannot be computed."""
        feed = {'inputs': inputs.detach().float().cpu().numpy()}
        try:
            (logits,) = self.session.run(['logits'], feed)
        except Exception as error:  # of classes of ONNX Runtime's own
            reason = str(error).splitlines()[0]
            raise RuntimeError(f'{self.path}: cannot be computed ({reason})') from error
        return torch.from_numpy(logits).to(inputs.device)


def to_onnx(net, inputs, said):
    program = torch.onnx.export(
        net, (inputs,), input_names=['inputs'], output_names=['logits'], opset_version=18,
        dynamic_shapes=({0: torch.export.Dim('N')},), dynamo=True, verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces: paths of this machine
    return add_metadata(program.model_proto, said)


def add_metadata(model, said):
    """Returns the bytes of an ONNX model that says this of itself, beside what it says already."""
    for name, text in said.items():
        model.metadata_props.add(key=name, value=text)
    return model.SerializeToString()


def open_onnx(path, net):
    return OnnxModel(path)
