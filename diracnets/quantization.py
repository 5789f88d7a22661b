"""Cross-layer range equalization of folded models, and int8 quantization of ONNX files.

    model = equalize(fold(params), inputs)      # inputs: example images (N, C, H, W), normalized

int8 has one scale for all channels of an activation. In a DiracNet some channels are many times as
large as others, because each layer passes on its input, and small channels use few of the 256
levels. Dividing a channel by a positive number in one convolution and multiplying it in the next
changes no float output if only ReLU and pooling are between the two. Nagel et al. (arXiv
1906.04721, section 4.1) choose these scales by the ranges of filters; `equalize` uses the ranges of
activations.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diracnets.folding import count_uses, traces
from diracnets.onnx import add_metadata
from diracnets.preprocessing import find_images

MAX_SCALE = 4.0  # of a channel: without a limit, rarely active channels would become large
MIN_RANGE = 0.02  # relative to the largest channel: live channels are above, others are noise
EQUALIZATION_BATCH = 16  # images
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
SCALE_EQUIVARIANT = (nn.ReLU, nn.Dropout, nn.Identity, *POOLS)  # f(x / s) = f(x) / s per channel


# ---------------------------------------------------------------- equalization


def conv_pairs(model: nn.Module) -> list[tuple[nn.Conv2d, nn.Conv2d]]:
    """Lists the pairs of consecutive convolutions between which channels can be rescaled.

    The second one is the only user of the first one's output, with only SCALE_EQUIVARIANT layers
    between the two, whether optional arguments are given or not. model: a folded model. Raises
    ValueError like `diracnets.folding.traces`.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    pairs, *others = [_pairs_of_graph(graph, layers) for graph in traces(model)]
    return [pair for pair in pairs if all(pair in other for other in others)]


def _pairs_of_graph(graph, layers):
    pairs, uses = [], count_uses(graph, layers)

    def is_conv(node):
        layer = layers.get(node.target) if node.op == 'call_module' else None
        return type(layer) is nn.Conv2d and layer.groups == 1 and uses[layer] == 1

    for node in filter(is_conv, graph.nodes):
        before, = node.all_input_nodes
        while len(before.users) == 1 and before.op == 'call_module':
            if is_conv(before):
                pairs.append((layers[before.target], layers[node.target]))
                break
            if not isinstance(layers[before.target], SCALE_EQUIVARIANT):
                break
            before, = before.all_input_nodes
    return pairs


@torch.no_grad()
def equalize(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Returns a copy of a folded model with similar channel ranges between convolutions.

    model: (N, C, H, W) to logits, in evaluation mode; inputs: examples (N, C, H, W). The outputs
    are those of the model up to rounding (the arithmetic is float64), and the dtype stays. Raises
    ValueError like `diracnets.folding.traces`, and for a model without parameters or without two
    convolutions whose channels can be rescaled.
    """
    dtype = next((parameter.dtype for parameter in model.parameters()), None)
    if dtype is None:
        raise ValueError(f'{type(model).__name__} has no parameters: expected a PyTorch model')
    model = copy.deepcopy(model).double()
    pairs, ranges = conv_pairs(model), {}
    if not pairs:
        raise ValueError(f'{type(model).__name__} cannot be equalized: it has no two convolutions '
                         'with only ReLU and pooling between them')

    def record_range(conv, args, kwargs):
        x, = *args, *kwargs.values()  # (N, C, H, W)
        channel_max = x.abs().amax((0, 2, 3))  # (C,)
        ranges[conv] = torch.maximum(channel_max, ranges.get(conv, channel_max))

    hooks = [second.register_forward_pre_hook(record_range, with_kwargs=True)
             for _, second in pairs]
    for batch in inputs.double().split(EQUALIZATION_BATCH):
        model(batch)
    for hook in hooks:
        hook.remove()
    for first, second in pairs:
        scale = _channel_scale(ranges[second])
        # new parameters: other layers may share the old ones
        first.weight = nn.Parameter(first.weight / scale[:, None, None, None])
        if first.bias is not None:
            first.bias = nn.Parameter(first.bias / scale)
        second.weight = nn.Parameter(second.weight * scale[:, None, None])
    return model.to(dtype)


def _channel_scale(ranges):
    """Returns the divisor of each channel: range over the geometric mean of live ranges."""
    live = ranges > MIN_RANGE * ranges.max()
    scale = ranges / ranges[live].log().mean().exp()
    return torch.where(live, scale, 1.0).clamp(1 / MAX_SCALE, MAX_SCALE)


# ---------------------------------------------------------------- int8

CALIBRATION_IMAGES = 256
DISK_HEADROOM = 5  # float32 files; quantization writes up to four of them


class Calibration:
    """The calibration reader of ONNX Runtime: {'inputs': (1, C, S, S)} per image, then None."""

    def __init__(self, paths, preprocess):
        from tqdm import tqdm

        self.paths = tqdm(paths, 'calibrating', unit='img', disable=None, leave=False)
        self.batches = map(preprocess, self.paths)

    def get_next(self):
        inputs = next(self.batches, None)
        return None if inputs is None else {'inputs': inputs[None].numpy()}


def check_disk_space(folder: str, content: bytes) -> None:
    """Raises OSError if DISK_HEADROOM files of this content do not fit into a temporary folder.

    ONNX Runtime would print a traceback and read back a truncated file.
    """
    files = [Path(folder, f'headroom-{i}') for i in range(DISK_HEADROOM)]
    try:
        for file in files:
            file.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error
    for file in files:
        file.unlink()


def quantize(content: bytes, paths: Sequence[str], preprocess: Callable[[str], Tensor],
             metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Quantizes a float32 ONNX file to int8: activations per tensor, filters per channel.

    content: the bytes of the file; paths: the calibration images, which `preprocess` turns into
    inputs (C, S, S); metadata: metadata of the int8 file. Returns the bytes of the float32 file,
    with the same graph optimizations, and of the int8 file.
    """
    import onnx
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:  # ONNX Runtime reads and writes files
        float32, int8 = (Path(folder, name) for name in ('float32.onnx', 'int8.onnx'))
        check_disk_space(folder, content)
        float32.write_bytes(content)
        # symbolic shape inference fails for some models, and all sizes but N are fixed
        quant_pre_process(float32, float32, skip_symbolic_shape=True)
        quantize_static(float32, int8, Calibration(paths, preprocess), per_channel=True)
        model = onnx.load(int8)
        del model.metadata_props[:]  # of the float32 file
        return float32.read_bytes(), add_metadata(model, metadata)


def calibration_set(folder: str) -> tuple[list[str], dict[str, Any]]:
    """Selects up to CALIBRATION_IMAGES images under a folder, evenly over the sorted paths.

    Returns their paths and the `calibration` entry of the metadata, whose seed is None because
    nothing is random. Raises ValueError for a folder without images.
    """
    paths = find_images(folder)
    selected = paths[:: -(-len(paths) // CALIBRATION_IMAGES)]
    return selected, {
        'dataset': os.path.basename(os.path.abspath(folder)), 'images': len(selected),
        'of': len(paths), 'chosen': 'evenly over the sorted paths', 'seed': None,
    }
