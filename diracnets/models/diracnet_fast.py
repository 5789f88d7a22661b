"""The DiracNet of the speed-run: few, wide convolutions, most on small feature maps.

It follows the architecture of the airbench networks (Jordan, arXiv 2404.00498, section 3): a stem
on 2x2 patches, three groups of two 3x3 convolutions with max-pooling after the first of each, and
batch norm without a learned scale. Airbench uses Dirac initialization; here W_hat keeps alpha and
beta as parameters too.
"""

from collections import OrderedDict

from torch import Tensor, nn

from diracconv import DiracConv2d
from diracnets.architectures import ACTIVATIONS
from diracnets.models.blocks import with_block

CHANNELS = (64, 256, 256)  # of each group at width 1
CONVOLUTIONS = (2, 2, 2)  # of each group
PATCH = 2  # height and width of a stem patch in pixels
# with alpha 1 and beta 0.1, as elsewhere, the filters stay close to the identity for too long;
# these values start from a multiple of the identity too, because W has Dirac initialization
FAST_ALPHA_INIT, FAST_BETA_INIT = 0.2, 1.0
SUPPORTED_BLOCKS = ('base', 'dirac')
ACTIVATION_LAYERS = {'relu': nn.ReLU, 'gelu': lambda: nn.GELU('tanh'), 'silu': nn.SiLU,
                     'hardswish': nn.Hardswish}


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    """Returns a batch norm whose scale stays 1; a positive scale commutes with a max-pool."""
    bn = nn.BatchNorm2d(channels)
    bn.weight.requires_grad_(False)
    return bn


def _block(cin: int, cout: int, pooled: bool, activation: str) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:cin])  # the other filters have no input channel to pass on
    pool = {'pool': nn.MaxPool2d(2)} if pooled else {}
    return nn.Sequential(OrderedDict(
        conv=conv, **pool, bn=_batch_norm(cout), act=ACTIVATION_LAYERS[activation]()))


class FastNet(nn.Module):
    """The network with standard convolutions: (N, 3, H, W) to logits (N, num_classes).

    The stem has two filters per value of a patch: `--whiten` sets each filter with both signs.
    activation is one of ACTIVATIONS. Raises ValueError for another activation, and for a width
    that leaves a group without channels.
    """

    def __init__(self, num_classes: int, width: float, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f'unknown activation {activation!r}: expected one of {", ".join(ACTIVATIONS)}'
            )
        if not 1 <= width * min(CHANNELS) < float('inf'):
            raise ValueError(f'width {width}: expected a number of at least {1 / min(CHANNELS)}')
        cin = 2 * 3 * PATCH**2
        layers = OrderedDict(
            conv=nn.Conv2d(3, cin, PATCH, bias=False), act=ACTIVATION_LAYERS[activation]())
        for g, (channels, convolutions) in enumerate(zip(CHANNELS, CONVOLUTIONS, strict=True)):
            cout = int(channels * width)
            layers[f'group{g}'] = nn.Sequential(OrderedDict(
                (f'block{b}', _block(cout if b else cin, cout, b == 0, activation))
                for b in range(convolutions)))
            cin = cout
        layers['max_pool'] = nn.AdaptiveMaxPool2d(1)
        self.features = nn.Sequential(layers)
        self.fc = nn.Linear(cin, num_classes, bias=False)
        nn.init.normal_(self.fc.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.features(inputs).flatten(1)  # (N, C)
        # as in airbench: an optimizer step changes the large weights of the last layer little
        return self.fc(features / features.shape[1])


def diracnet_fast(num_classes: int, width: float, block: str, activation: str) -> nn.Module:
    """Builds a FastNet with the blocks of `with_block`: a DiracNet if block is 'dirac'.

    With 'base' the filters have Dirac initialization only, as in airbench. Raises ValueError for
    another block, and as FastNet does.
    """
    if block not in SUPPORTED_BLOCKS:
        raise ValueError(f'block {block!r}: expected {" or ".join(SUPPORTED_BLOCKS)}; the other '
                         'blocks need odd kernels, and the first convolution has an even one')
    model = with_block(FastNet(num_classes, width, activation), block)
    for layer in model.modules():
        if isinstance(layer, DiracConv2d):
            nn.init.constant_(layer.alpha, FAST_ALPHA_INIT)
            nn.init.constant_(layer.beta, FAST_BETA_INIT)
    return model
