"""The file formats of exported models: writing a model, and opening it for verification."""

import copy
import functools
import io
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diracnets.checkpoint import load_dict_file
from diracnets.onnx import OnnxModel, to_onnx


def _save_to_bytes(save, contents):
    """Saves in memory, because torch's own file writer aborts the process if the disk is full."""
    file = io.BytesIO()
    save(contents, file)
    return file.getvalue()


def to_pt2(model: nn.Module, inputs: Tensor, metadata: Mapping[str, str]) -> bytes:
    """Exports a model with torch.export; the batch size stays variable."""
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim('N')},))
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # it contains paths of this machine
    return _save_to_bytes(functools.partial(torch.export.save, extra_files=metadata), program)


def to_safetensors(model: nn.Module, inputs: Tensor, metadata: Mapping[str, str]) -> bytes:
    from safetensors.torch import save

    return save(model.state_dict(), metadata)


def to_pth(model: nn.Module, inputs: Tensor, metadata: Mapping[str, str]) -> bytes:
    """Saves a state dict with the metadata in `_metadata`, which load_state_dict ignores."""
    state_dict = model.state_dict()
    state_dict._metadata.update(metadata)
    return _save_to_bytes(torch.save, state_dict)


def _open_state_dict(path: str, model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.load_state_dict(load_dict_file(path), assign=True)
    return model


class Format(NamedTuple):
    """One file format of exported models."""

    to_bytes: Callable[[nn.Module, Tensor, Mapping[str, str]], bytes]
    open: Callable[[str, nn.Module], nn.Module]  # with the model, for state dicts


FORMATS = {  # by the extension of a file's name
    '.onnx': Format(to_onnx, lambda path, model: OnnxModel(path)),
    '.pt2': Format(to_pt2, lambda path, model: torch.export.load(path).module()),
    '.safetensors': Format(to_safetensors, _open_state_dict),
    '.pth': Format(to_pth, _open_state_dict),
}
