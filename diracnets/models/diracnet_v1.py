"""DiracNet v1, the form of 2017 (Zagoruyko & Komodakis, arXiv 1706.00388v1).

Blocks are NCReLU, convolution, batch norm; NCReLU keeps the negative part as well, so that each
convolution has twice the input channels, and one alpha and one beta serve a whole filter bank.
"""

import torch
from torch import nn

from diracnets.models.plain import PlainNet, conv_block
from diracnets.models.tiled_delta import TiledDeltaConv2d

ALPHA_INIT, BETA_INIT, WEIGHT_STD = 5.0, 1e-3, 0.1


class NCReLU(nn.Module):
    """Positive part, then negative part, along channels: (N, C, H, W) to (N, 2C, H, W)."""

    def forward(self, x):
        return torch.cat([x.clamp(min=0), x.clamp(max=0)], dim=1)


class DiracConv2dV1(TiledDeltaConv2d):
    """A convolution with W_hat = alpha * delta + beta * normalize(W), alpha and beta scalars.

    delta is repeated along the larger number of channels: behind NCReLU both halves pass through
    it. Arguments and errors are those of `TiledDeltaConv2d`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.empty_like(self.alpha[:1]))
        self.beta = nn.Parameter(torch.empty_like(self.beta[:1]))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.normal_(self.weight, std=WEIGHT_STD)
        if hasattr(self, 'alpha'):  # nn.Conv's constructor calls this before there is one
            nn.init.constant_(self.alpha, ALPHA_INIT)
            nn.init.constant_(self.beta, BETA_INIT)


def _block(cin, cout):
    conv = DiracConv2dV1(2 * cin, cout, 3, padding=1, bias=False)
    return conv_block(conv, NCReLU())


def diracnet_v1(net):
    """DiracNet v1 of a diracnet.Topology: (N, in_channels, H, W) to logits (N, num_classes).

    The script that trained on CIFAR has a ReLU behind the stem's batch norm, and none before the
    average pooling; in the published definition for ImageNet it is the other way round.
    """
    return PlainNet(net, _block, stem_relu=not net.imagenet, last_relu=net.imagenet)
