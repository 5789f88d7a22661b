"""Channels of like ranges: int8 loses less then, and float32 nothing.

    net = equalize(fold(params), inputs)        # inputs: some that the network is to see

int8 has one scale for all activations that a convolution takes. In a DiracNet some channels are
many times as large as others, as each layer passes on what came in; small ones keep few of the 256
steps. Between two convolutions with only ReLU and pooling a channel may be divided by any positive
number in the first if it is multiplied by it in the second (Nagel et al., arXiv 1906.04721, section
4.1, do so by the ranges of filters; here it is by those of activations).
"""

import copy
import os
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from diracnets.fold import trace
from diracnets.onnx import add_metadata
from diracnets.preprocessing import IMAGE_EXTENSIONS

MAX_SCALE = 4.0  # times that a channel is scaled: rare channels would become large without a limit
MIN_RANGE = 0.02  # of the largest channel: what is below is taken for noise, and left
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
SCALED_ALIKE = (nn.ReLU, nn.Dropout, nn.Identity, *POOLS)  # f(x / s) = f(x) / s, for each channel


def conv_pairs(net):
    """Lists the pairs of convolutions of which the second alone sees what the first gives.

    Between them stands only what passes the scale of a channel on. net: as folded. Raises
    ValueError as diracnets.trace does.
    """
    layers, pairs, graph = dict(net.named_modules(remove_duplicate=False)), [], trace(net)
    calls = Counter(layers[node.target] for node in graph.nodes if node.op == 'call_module')

    def is_conv(node):
        layer = layers.get(node.target) if node.op == 'call_module' else None
        return type(layer) is nn.Conv2d and layer.groups == 1 and calls[layer] == 1

    for node in graph.nodes:
        before = node.args[0] if is_conv(node) else None
        while before is not None and len(before.users) == 1 and before.op == 'call_module':
            if is_conv(before):
                pairs.append((layers[before.target], layers[node.target]))
                break
            if not isinstance(layers[before.target], SCALED_ALIKE):
                break
            before = before.args[0]
    return pairs


@torch.no_grad()
def equalize(net, inputs):
    """A copy of a folded network whose channels have like ranges between convolutions.

    net: (N, C, H, W) to logits, in evaluation mode; inputs: (N, C, H, W). Its outputs are those of
    net but for rounding (the scales are found and applied in float64); its dtype stays. Raises
    ValueError as diracnets.trace does.
    """
    dtype = next(net.parameters()).dtype
    net = copy.deepcopy(net).double()
    pairs, ranges = conv_pairs(net), {}

    def look(conv, inputs):
        seen = inputs[0].abs().amax((0, 2, 3))
        ranges[conv] = torch.maximum(seen, ranges.get(conv, seen))

    hooks = [second.register_forward_pre_hook(look) for _, second in pairs]
    for part in inputs.double().split(16):
        net(part)
    for hook in hooks:
        hook.remove()
    for first, second in pairs:
        scale = _scale(ranges[second])
        first.weight /= scale[:, None, None, None]
        if first.bias is not None:
            first.bias /= scale
        second.weight *= scale[:, None, None]
    return net.to(dtype)


def _scale(ranges):
    """What each channel is divided by: its range, over the geometric mean of the live ones."""
    live = ranges > MIN_RANGE * ranges.max()
    scale = ranges / ranges[live].log().mean().exp()
    return torch.where(live, scale, 1.0).clamp(1 / MAX_SCALE, MAX_SCALE)


# ---------------------------------------------------------------- int8

CALIBRATION_IMAGES = 256
DISK_HEADROOM = 5  # float32 files, of which int8 takes four on its way


class Calibration:
    """Hands batches of inputs to ONNX Runtime's quantizer: {'inputs': (n, C, S, S)}, then None."""

    def __init__(self, paths, transform):
        self.paths = tqdm(paths, 'calibrating', unit='img', disable=None, leave=False)
        self.batches = map(transform, self.paths)

    def get_next(self):
        inputs = next(self.batches, None)
        return None if inputs is None else {'inputs': inputs[None].numpy()}


def check_disk_space(folder, content):
    """Raises OSError where DISK_HEADROOM files of this content do not fit into a temporary folder.

    ONNX Runtime itself would print a traceback, and read again what it could not write.
    """
    files = [Path(folder, f'room-{i}') for i in range(DISK_HEADROOM)]
    try:
        for file in files:
            file.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error
    for file in files:
        file.unlink()


def quantize(content, paths, transform, said):
    """Makes int8 of the bytes of a float32 ONNX file: activations per tensor, filters per channel.

    paths: of the images to calibrate on, which transform makes inputs of; said: what the int8 file
    says of itself. Returns the bytes of both files, float32 optimised as int8 is.
    """
    import onnx
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:  # ONNX Runtime goes by files, here and within
        float32, int8 = (Path(folder, name) for name in ('float32.onnx', 'int8.onnx'))
        check_disk_space(folder, content)
        float32.write_bytes(content)
        # all shapes but the batch's are numbers: in symbols, some networks' cannot be inferred
        quant_pre_process(float32, float32, skip_symbolic_shape=True)
        quantize_static(float32, int8, Calibration(paths, transform), per_channel=True)
        model = onnx.load(int8)
        del model.metadata_props[:]  # what the float32 file said
        return float32.read_bytes(), add_metadata(model, said)


def calibration_set(folder):
    """Chooses up to CALIBRATION_IMAGES image files under a folder, evenly over the sorted paths.

    Returns (their paths, what an int8 file says of them): no seed, as nothing is drawn. Raises
    ValueError for a folder without an image.
    """
    paths = sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(IMAGE_EXTENSIONS)
    )
    if not paths:
        raise ValueError(f'--int8 {folder}: no image in it: expected images to calibrate on')
    chosen = paths[:: -(-len(paths) // CALIBRATION_IMAGES)]
    return chosen, {
        'dataset': os.path.basename(os.path.abspath(folder)), 'images': len(chosen),
        'of': len(paths), 'chosen': 'evenly over the sorted paths', 'seed': None,
    }
