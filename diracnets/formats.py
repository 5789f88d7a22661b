"""The file formats of exported models: how each is written and opened."""

import copy
import functools
import io

import torch

from diracnets.checkpoint import PT2_CONFIG
from diracnets.onnx import open_onnx, to_onnx


def in_memory(save, contents):
    """Returns the bytes of a file of torch's: its own writer aborts where the disk is full."""
    file = io.BytesIO()
    save(contents, file)
    return file.getvalue()


def to_pt2(net, inputs, said):
    program = torch.export.export(net, (inputs,), dynamic_shapes=({0: torch.export.Dim('N')},))
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # paths of this machine
    content = in_memory(functools.partial(torch.export.save, extra_files=said), program)
    if PT2_CONFIG.encode() not in content:
        raise ValueError(f'.pt2 of torch {torch.__version__}: its parameters cannot be read '
                         'without running what is in the file: expected torch 2.9 or newer')
    return content


def open_pt2(path, net):
    return torch.export.load(path).module()


def open_state_dict(state, net):
    net = copy.deepcopy(net)
    net.load_state_dict(state, assign=True)
    return net


def to_safetensors(net, inputs, said):
    from safetensors.torch import save

    return save(net.state_dict(), said)


def open_safetensors(path, net):
    from safetensors.torch import load_file

    return open_state_dict(load_file(path), net)


def to_pth(net, inputs, said):
    state = net.state_dict()
    state._metadata.update(said)  # which torch.save keeps, and load_state_dict passes over
    return in_memory(torch.save, state)


def open_pth(path, net):
    return open_state_dict(torch.load(path, weights_only=True), net)


# to(net, inputs, what the file says of itself) -> bytes, open(path, net) -> inputs to logits,
# packages
FORMATS = {
    '.onnx': (to_onnx, open_onnx, ('onnx', 'onnxruntime', 'onnxscript')),
    '.pt2': (to_pt2, open_pt2, ()),
    '.safetensors': (to_safetensors, open_safetensors, ('safetensors',)),
    '.pth': (to_pth, open_pth, ()),
}
