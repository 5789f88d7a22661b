"""The DiracNet of the speed-run: few and wide convolutions, most of them on small maps.

Its shape is that of airbench's networks (Jordan, arXiv 2404.00498, section 3): a stem of 2x2
patches, three groups of two 3x3 convolutions, pooled behind the first of each, batch norm without
scale. There the filters start at the identity; here they are parameterised around it too.
"""

from collections import OrderedDict

from torch import nn

from diracconv import DiracConv2d
from diracnets.models.blocks import with_block

CHANNELS = (64, 256, 256)  # of each group, at width 1
PATCH = 2  # pixels of a side
# alpha and beta as elsewhere, 1 and 0.1, leave the filters at the identity for too long; they start
# there all the same, as W does too
ALPHA_INIT, BETA_INIT = 0.2, 1.0
BLOCKS = ('base', 'dirac')
ACTIVATIONS = {'relu': nn.ReLU, 'gelu': lambda: nn.GELU('tanh'), 'silu': nn.SiLU}


def _batch_norm(channels):
    """Batch norm that learns no scale: it is positive then, and goes through a max-pool."""
    bn = nn.BatchNorm2d(channels)
    bn.weight.requires_grad_(False)
    return bn


def _block(cin, cout, pooled, activation):
    conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:cin])  # those behind have nothing to pass on
    pool = {'pool': nn.MaxPool2d(2)} if pooled else {}
    return nn.Sequential(OrderedDict(
        conv=conv, **pool, bn=_batch_norm(cout), act=ACTIVATIONS[activation]()))


class FastNet(nn.Module):
    """The chain, with ordinary convolutions: (N, 3, H, W) to logits (N, num_classes).

    Its stem has two filters for each number of a patch: those of --whiten, with both signs.
    activation: of ACTIVATIONS. Raises ValueError for another, and for a width without channels.
    """

    def __init__(self, num_classes, width, activation):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f'unknown activation {activation!r}: expected one of {", ".join(ACTIVATIONS)}'
            )
        if not 1 <= width * min(CHANNELS) < float('inf'):
            raise ValueError(f'width {width}: expected a number of at least {1 / min(CHANNELS)}')
        cin = 2 * 3 * PATCH**2
        layers = OrderedDict(
            conv=nn.Conv2d(3, cin, PATCH, bias=False), act=ACTIVATIONS[activation]())
        for g, channels in enumerate(CHANNELS):
            cout = int(channels * width)
            layers[f'group{g}'] = nn.Sequential(OrderedDict(
                block0=_block(cin, cout, True, activation),
                block1=_block(cout, cout, False, activation)))
            cin = cout
        layers['max_pool'] = nn.AdaptiveMaxPool2d(1)
        self.features = nn.Sequential(layers)
        self.fc = nn.Linear(cin, num_classes, bias=False)
        nn.init.normal_(self.fc.weight)

    def forward(self, inputs):
        features = self.features(inputs).flatten(1)
        # as in airbench: a step of the optimizer changes the large weights of the last layer little
        return self.fc(features / features.shape[1])


def fast(num_classes, width, block, activation):
    """The network with the blocks of `replace.with_block`: a DiracNet with 'dirac'.

    (N, 3, H, W) to logits (N, num_classes). With 'base' its filters start at the identity alone, as
    in airbench. Raises ValueError for another block, and as FastNet does.
    """
    if block not in BLOCKS:
        raise ValueError(f'block {block!r}: expected {" or ".join(BLOCKS)}, as the first '
                         'convolution has an even kernel')
    network = with_block(FastNet(num_classes, width, activation), block)
    for layer in network.modules():
        if isinstance(layer, DiracConv2d):
            nn.init.constant_(layer.alpha, ALPHA_INIT)
            nn.init.constant_(layer.beta, BETA_INIT)
    return network
