"""DiracNet v1, the form of 2017 (Zagoruyko & Komodakis, arXiv 1706.00388v1).

Its blocks are NCReLU, convolution, batch norm. NCReLU also keeps the negative part, so each
convolution has twice the input channels. All filters of a layer share one alpha and one beta.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from diracnet import Topology, batch_norm
from diracnets.models.plain import PlainNet
from diracnets.models.tiled_delta import TiledDeltaConv2d

WEIGHT_STD = 0.1


class NCReLU(nn.Module):
    """Concatenates the positive and the negative part: (N, C, H, W) to (N, 2C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.clamp(min=0), x.clamp(max=0)], dim=1)


class DiracConv2dV1(TiledDeltaConv2d):
    """Convolution with W_hat = alpha * delta + beta * normalize(W), alpha and beta scalars.

    delta is the tiled identity, which passes both halves of the output of NCReLU. Arguments and
    errors are those of TiledDeltaConv2d.
    """

    initial = {'alpha': 5.0, 'beta': 1e-3}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.empty_like(self.alpha[:1]))
        self.beta = nn.Parameter(torch.empty_like(self.beta[:1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.weight, std=WEIGHT_STD)


def _block(cin: int, cout: int) -> nn.Sequential:
    conv = DiracConv2dV1(2 * cin, cout, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(relu=NCReLU(), conv=conv, bn=batch_norm(cout)))


def diracnet_v1(topology: Topology) -> PlainNet:
    """Builds a DiracNet v1: (N, in_channels, H, W) to logits (N, num_classes).

    The original CIFAR script has a ReLU after the batch norm of the stem and none before the
    average pooling. The published ImageNet definition has only the one before the pooling.
    """
    return PlainNet(topology, _block, stem_relu=not topology.imagenet, last_relu=topology.imagenet)
