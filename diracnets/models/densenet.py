"""DenseNets (Huang et al., arXiv 1608.06993): those for CIFAR, and torchvision's for ImageNet."""

import contextlib
import functools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from diracnet import check_integers


def _bn_relu_conv(cin, cout, kernel_size, droprate):
    layers = OrderedDict(
        bn=nn.BatchNorm2d(cin),
        relu=nn.ReLU(),
        conv=nn.Conv2d(cin, cout, kernel_size, padding=kernel_size // 2, bias=False),
    )
    if droprate > 0:
        layers['dropout'] = nn.Dropout(droprate)
    return layers


@contextlib.contextmanager
def _statistics_kept(layer):
    """Within, batch norms leave their running statistics as they are."""
    norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class DenseLayer(nn.Module):
    """Feature maps, each (N, C_i, H, W), to `growth` new ones: (N, growth, H, W).

    bottleneck: a 1x1 convolution to 4 * growth channels first; checkpointing: keep the inputs
    alone for the backward pass and compute the rest again, with the same results.
    """

    def __init__(self, channels, growth, bottleneck, droprate, checkpointing):
        super().__init__()
        self.checkpointing = checkpointing
        layers = OrderedDict()
        if bottleneck:
            first = _bn_relu_conv(channels, 4 * growth, 1, droprate)
            layers.update((f'{name}1', layer) for name, layer in first.items())
            channels = 4 * growth
        last = _bn_relu_conv(channels, growth, 3, droprate)
        layers.update((f'{name}2', layer) for name, layer in last.items())
        self.layers = nn.Sequential(layers)

    def _concat_and_convolve(self, *features):
        return self.layers(torch.cat(features, dim=1))

    def _contexts(self):
        # a batch counts once in the running statistics, though it passes twice
        return contextlib.nullcontext(), _statistics_kept(self)

    def forward(self, *features):
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self._concat_and_convolve(*features)
        return checkpoint(
            self._concat_and_convolve, *features, use_reentrant=False, context_fn=self._contexts
        )


class DenseBlock(nn.ModuleList):
    """Layers that each take all feature maps before them: (N, C, H, W) to (N, C', H, W)."""

    def forward(self, x):
        features = [x]
        for layer in self:
            features.append(layer(*features))
        return torch.cat(features, dim=1)


class DenseNet(nn.Module):
    """A DenseNet of three blocks: (N, 3, H, W) to logits (N, num_classes).

    per_block: layers in each block; make_layer: a function (channels, growth) to a DenseLayer.
    """

    def __init__(self, per_block, growth, reduce, droprate, num_classes, make_layer):
        super().__init__()
        channels = 2 * growth
        stages = OrderedDict(conv=nn.Conv2d(3, channels, 3, padding=1, bias=False))
        for i in range(3):
            layers = [make_layer(channels + j * growth, growth) for j in range(per_block)]
            stages[f'block{i}'] = DenseBlock(layers)
            channels += per_block * growth
            if i < 2:
                reduced = int(channels * reduce)
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

    def forward(self, inputs):
        x = F.relu(self.features(inputs))  # (N, C, H / 4, W / 4): 8 x 8 of 32 x 32 images
        return self.fc(x.mean(dim=(2, 3)))


def densenet(num_classes, layers, growth, reduce, bottleneck, droprate, checkpointing):
    """A DenseNet for CIFAR: (N, 3, H, W) to logits (N, num_classes) (section 3 and 4.2).

    layers: in all, 6n + 4 with bottleneck and 3n + 4 without; growth: channels that each adds;
    reduce: the part of the channels that a transition keeps, in (0, 1]; bottleneck: 1x1 before
    each 3x3 convolution; droprate: of dropout after each convolution, the first apart;
    checkpointing: less memory for more time, with the same results. Raises ValueError for others.
    """
    check_integers(layers=layers, growth=growth)
    period = 6 if bottleneck else 3
    if layers < 4 + period or (layers - 4) % period:
        below = max(4 + period, (layers - 4) // period * period + 4)
        raise ValueError(
            f'layers {layers}: DenseNets {"with" if bottleneck else "without"} bottleneck have '
            f'{period}n + 4; the nearest are {below} and {below + period}'
        )
    if growth < 1:
        raise ValueError(f'growth {growth}: expected at least 1')
    if not 0 < reduce <= 1:
        raise ValueError(f'reduce {reduce}: expected more than 0 and at most 1')
    make_layer = functools.partial(
        DenseLayer, bottleneck=bottleneck, droprate=droprate, checkpointing=checkpointing
    )
    per_block = (layers - 4) // period
    return DenseNet(per_block, growth, reduce, droprate, num_classes, make_layer)


def densenet121(num_classes, droprate, checkpointing):
    """torchvision's DenseNet-121 for ImageNet, four blocks: (N, 3, H, W) to (N, num_classes).

    checkpointing: torchvision's own, in which a batch counts twice in the running statistics of
    the first batch norm of each layer, as it passes twice.
    """
    import torchvision

    return torchvision.models.densenet121(
        num_classes=num_classes, drop_rate=droprate, memory_efficient=checkpointing
    )
