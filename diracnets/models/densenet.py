"""DenseNets for CIFAR (Huang et al., arXiv 1608.06993)."""

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diracnet import check_integers
from diracnets.network import run_checkpointed


def _bn_relu_conv(cin: int, cout: int, kernel_size: int,
                  droprate: float) -> OrderedDict[str, nn.Module]:
    layers = OrderedDict(
        bn=nn.BatchNorm2d(cin),
        relu=nn.ReLU(),
        conv=nn.Conv2d(cin, cout, kernel_size, padding=kernel_size // 2, bias=False),
    )
    if droprate > 0:
        layers['dropout'] = nn.Dropout(droprate)
    return layers


class DenseLayer(nn.Module):
    """Layer of a dense block: feature maps, each (N, C_i, H, W), to (N, growth, H, W).

    bottleneck adds a 1x1 convolution to 4 * growth channels before the 3x3 convolution.
    """

    def __init__(self, channels: int, growth: int, bottleneck: bool, droprate: float):
        super().__init__()
        layers = OrderedDict()
        if bottleneck:
            first = _bn_relu_conv(channels, 4 * growth, 1, droprate)
            layers.update((f'{name}1', layer) for name, layer in first.items())
            channels = 4 * growth
        last = _bn_relu_conv(channels, growth, 3, droprate)
        layers.update((f'{name}2', layer) for name, layer in last.items())
        self.layers = nn.Sequential(layers)

    def forward(self, *features: Tensor) -> Tensor:
        return self.layers(torch.cat(features, dim=1) if len(features) > 1 else features[0])


class DenseBlock(nn.ModuleList):
    """Layers that each take the outputs of all layers before: (N, C, H, W) to (N, C', H, W).

    checkpointing stores only the output of each layer for the backward pass and recomputes the
    rest, with equal results.
    """

    def __init__(self, layers: Iterable[DenseLayer], checkpointing: bool = False):
        super().__init__(layers)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            features = [x]
            for layer in self:
                features.append(run_checkpointed(layer, layer, *features))
            return torch.cat(features, dim=1)
        for layer in self:  # two tensors at a time, whose gradients are faster than those of many
            x = torch.cat([x, layer(x)], dim=1)
        return x


class DenseNet(nn.Module):
    """DenseNet of three blocks: (N, 3, H, W) to logits (N, num_classes).

    per_block is the number of layers of each block; the other arguments are those of `densenet`.
    """

    def __init__(self, num_classes: int, per_block: int, growth: int, reduce: float,
                 bottleneck: bool, droprate: float, checkpointing: bool):
        super().__init__()
        channels = 2 * growth
        stages = OrderedDict(conv=nn.Conv2d(3, channels, 3, padding=1, bias=False))
        for i in range(3):
            stages[f'block{i}'] = DenseBlock(
                (DenseLayer(channels + j * growth, growth, bottleneck, droprate)
                 for j in range(per_block)), checkpointing)
            channels += per_block * growth
            if i < 2:
                reduced = int(channels * reduce)
                if reduced < 1:
                    raise ValueError(f'reduce {reduce}: leaves no channels of {channels}')
                transition = _bn_relu_conv(channels, reduced, 1, droprate)
                stages[f'transition{i}'] = nn.Sequential(
                    OrderedDict(**transition, pool=nn.AvgPool2d(2))
                )
                channels = reduced
        stages['bn'] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(stages)
        self.fc = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out')  # variance 2 / (k k out)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu(self.features(inputs))  # (N, C, H / 4, W / 4): 8 x 8 for 32 x 32 images
        return self.fc(x.mean(dim=(2, 3)))


def densenet(num_classes: int, layers: int, growth: int, reduce: float, bottleneck: bool,
             droprate: float, checkpointing: bool) -> DenseNet:
    """Builds a DenseNet for CIFAR: (N, 3, H, W) to logits (N, num_classes).

    layers is the total depth, 6n + 4 with bottleneck and 3n + 4 without. growth is the number of
    channels that each layer adds. reduce, in (0, 1], is the fraction of the channels that a
    transition keeps. bottleneck adds a 1x1 before each 3x3 convolution. droprate is the probability
    of the dropout after each convolution except the first. checkpointing saves memory, takes longer
    and gives equal results. Raises ValueError for other values. See sections 3 and 4.2.
    """
    check_integers(layers=layers)
    check_integers(1, growth=growth)
    period = 6 if bottleneck else 3
    if layers < 4 + period or (layers - 4) % period:
        below = max(4 + period, (layers - 4) // period * period + 4)
        raise ValueError(
            f'layers {layers}: DenseNets {"with" if bottleneck else "without"} bottleneck have '
            f'{period}n + 4; the nearest are {below} and {below + period}'
        )
    if not 0 < reduce <= 1:
        raise ValueError(f'reduce {reduce}: expected more than 0 and at most 1')
    per_block = (layers - 4) // period
    return DenseNet(num_classes, per_block, growth, reduce, bottleneck, droprate, checkpointing)
