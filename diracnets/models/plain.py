"""Models with the topology of a DiracNet: plain, with other initializations, and with skips.

`plain` is the DiracNet without parametrization; each of the others differs from `plain` in one
aspect only, after which it is named. The initialization of `plain` is that of the DiracNet.
`diracnets.fold` folds all but `resnet` into models with the state dict of a `diracnet.DiracNet`.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from diracnet import Topology, batch_norm, conv_block, make_layers, stem_conv
from diracnets.models.blocks import with_block


class PlainNet(nn.Module):
    """A chain of blocks with the topology of a DiracNet: (N, in_channels, H, W) to logits.

    block: makes a block from (in channels, out channels). group: makes the module of a group from
    its blocks. stem_relu: a ReLU after the batch norm of the stem. last_relu: a ReLU before the
    average pooling.
    """

    def __init__(
        self, topology: Topology, block: Callable[[int, int], nn.Module],
        group: Callable[[OrderedDict], nn.Module] = nn.Sequential,
        stem_relu: bool = False, last_relu: bool = True,
    ) -> None:
        super().__init__()
        stem = {'conv': stem_conv(topology, bias=False), 'bn': batch_norm(topology.channels[0])}
        nn.init.kaiming_normal_(stem['conv'].weight)
        if stem_relu:
            stem['stem_relu'] = nn.ReLU()
        self.features = nn.Sequential(make_layers(topology, stem, block, group, last_relu))
        self.fc = nn.Linear(topology.channels[-1], topology.num_classes)
        nn.init.kaiming_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.features(inputs).flatten(1))


class ResidualGroup(nn.Sequential):
    """Blocks with a skip-connection around each pair: (N, C, H, W) to (N, C', H, W).

    The skips have no parameters: in channel-expanding layers the new channels are zero (option A of
    He et al., arXiv 1512.03385, section 3.3).
    """

    def forward(self, x: Tensor) -> Tensor:
        blocks = list(self)
        for first, second in zip(blocks[::2], blocks[1::2]):
            out = second(first(x))
            x = out + F.pad(x, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1]))
        return x


_kaiming_block = functools.partial(conv_block, nn.Conv2d)


def _dirac_block(cin, cout):
    block = _kaiming_block(cin, cout)
    nn.init.dirac_(block.conv.weight[:cin])  # filters beyond the input channels stay random
    return block


def plain(topology: Topology, block: str) -> nn.Module:
    """Returns the DiracNet with standard convolutions, or with the blocks of `with_block`.

    (N, in_channels, H, W) to logits (N, num_classes). Raises ValueError as `with_block` does.
    """
    return with_block(PlainNet(topology, _kaiming_block), block)


def dirac_init(topology: Topology) -> PlainNet:
    """Returns `plain` with Dirac initialization, but no parametrization (arXiv 2404.00498)."""
    return PlainNet(topology, _dirac_block)


def default_init(topology: Topology) -> PlainNet:
    """Returns `plain` with the initialization of PyTorch, except in the linear layer.

    The convolutions and batch norms in the branches of `with_block` are initialized in this way,
    except for the identity branch of DBB, whose learned part starts at zero.
    """
    model = PlainNet(topology, _kaiming_block)
    for layer in model.features.modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            layer.reset_parameters()
    return model


def resnet(topology: Topology) -> PlainNet:
    """Returns `plain` with parameter-free skip-connections around pairs of blocks."""
    return PlainNet(topology, _kaiming_block, ResidualGroup)
