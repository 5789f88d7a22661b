"""The DiracNet topology with other convolutions: plain, started at the identity, with skips.

What differs from a DiracNet is the one thing in a network's name; the rest, initialisation of the
batch norms included, is the DiracNet's. Folded by `diracnets.fold`, plain and dirac-init have the
state dict of a `diracnet.DiracNet` and load into one.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import nn

from diracnets.models.blocks import with_block


def _batch_norm(channels):
    bn = nn.BatchNorm2d(channels)
    nn.init.uniform_(bn.weight)
    return bn


def conv_block(conv, activation):
    """Activation, convolution, batch norm: (N, C, H, W) to (N, conv.out_channels, H, W)."""
    return nn.Sequential(OrderedDict(
        relu=activation, conv=conv, bn=_batch_norm(conv.out_channels)
    ))


class PlainNet(nn.Module):
    """A chain of the shape of a DiracNet: (N, in_channels, H, W) to logits.

    net: a diracnet.Topology; block: a function (in channels, out channels) to a module; group: the
    Sequential that holds the blocks of a group; stem_relu: a ReLU behind the stem's batch norm;
    last_relu: one before the average pooling.
    """

    def __init__(self, net, block, group=nn.Sequential, stem_relu=False, last_relu=True):
        super().__init__()
        cin = net.channels[0]
        layers = OrderedDict(
            conv=nn.Conv2d(
                net.in_channels, cin, net.stem, 1 + net.imagenet, padding=net.stem // 2, bias=False
            ),
            bn=_batch_norm(cin),
        )
        nn.init.kaiming_normal_(layers['conv'].weight)
        if stem_relu:
            layers['stem_relu'] = nn.ReLU()
        if net.imagenet:
            layers['max_pool'] = nn.MaxPool2d(3, stride=2, padding=1)
        for g, (cout, blocks) in enumerate(zip(net.channels, net.blocks)):
            if g > 0:
                layers[f'group{g}_pool'] = nn.MaxPool2d(2)
            sizes = [(cin, cout)] + [(cout, cout)] * (blocks - 1)
            layers[f'group{g}'] = group(OrderedDict(
                (f'block{b}', block(*size)) for b, size in enumerate(sizes)
            ))
            cin = cout
        if last_relu:
            layers['relu'] = nn.ReLU()
        layers['avg_pool'] = nn.AdaptiveAvgPool2d(1)
        self.features = nn.Sequential(layers)
        self.fc = nn.Linear(cin, net.num_classes)
        nn.init.kaiming_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, inputs):
        return self.fc(self.features(inputs).flatten(1))


class ResidualGroup(nn.Sequential):
    """Blocks with a skip-connection around each pair of them, (N, C, H, W) to (N, C', H, W).

    It has no parameters: where channels are added it passes zeros in the new ones (option A of He
    et al., arXiv 1512.03385, section 3.3).
    """

    def forward(self, x):
        blocks = list(self)
        for first, second in zip(blocks[::2], blocks[1::2]):
            out = second(first(x))
            x = out + F.pad(x, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1]))
        return x


def _kaiming_block(cin, cout):
    conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv_block(conv, nn.ReLU())


def _dirac_block(cin, cout):
    block = _kaiming_block(cin, cout)
    nn.init.dirac_(block.conv.weight[:cin])  # filters beyond the input's channels stay random
    return block


def plain(net, block):
    """The DiracNet of a Topology with ordinary convolutions, or the blocks of `with_block`.

    (N, in_channels, H, W) to logits (N, num_classes). Raises ValueError as `replace.with_block`
    does.
    """
    return with_block(PlainNet(net, _kaiming_block), block)


def dirac_init(net):
    """`plain`, its filters started at the identity but not parameterised (arXiv 2404.00498)."""
    return PlainNet(net, _dirac_block)


def resnet(net):
    """`plain` with skip-connections around pairs of blocks, which have no parameters."""
    return PlainNet(net, _kaiming_block, ResidualGroup)
