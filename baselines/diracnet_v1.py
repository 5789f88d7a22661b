"""DiracNet v1, the form of 2017 (Zagoruyko & Komodakis, arXiv 1706.00388v1).

Blocks are NCReLU, convolution, batch norm; NCReLU keeps the negative part as well, so that each
convolution has twice the input channels, and one alpha and one beta serve a whole filter bank.
"""

import torch
from torch import nn

from baselines.plain import PlainNet, conv_block
from diracconv import DiracConv2d, normalize

ALPHA_INIT, BETA_INIT, WEIGHT_STD = 5.0, 1e-3, 0.1


class NCReLU(nn.Module):
    """Positive part, then negative part, along channels: (N, C, H, W) to (N, 2C, H, W)."""

    def forward(self, x):
        return torch.cat([x.clamp(min=0), x.clamp(max=0)], dim=1)


class DiracConv2dV1(DiracConv2d):
    """A convolution with W_hat = alpha * delta + beta * normalize(W), alpha and beta scalars.

    delta is, in the middle of the kernel, the identity of the smaller number of channels, repeated
    along the larger: behind NCReLU both halves pass through it. Arguments are those of nn.Conv2d;
    raises ValueError for theirs and for groups other than 1.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.groups != 1:
            raise ValueError(f'groups {self.groups}: expected 1')
        self.alpha = nn.Parameter(torch.empty_like(self.alpha[:1]))
        self.beta = nn.Parameter(torch.empty_like(self.beta[:1]))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.normal_(self.weight, std=WEIGHT_STD)
        if hasattr(self, 'alpha'):  # nn.Conv's constructor calls this before there is one
            nn.init.constant_(self.alpha, ALPHA_INIT)
            nn.init.constant_(self.beta, BETA_INIT)

    def transform_weight(self):
        """Returns W_hat, differentiable: (out_channels, in_channels, *kernel_size)."""
        out_channels, in_channels, height, width = self.weight.shape
        smaller = min(out_channels, in_channels)
        identity = torch.eye(smaller, dtype=self.weight.dtype, device=self.weight.device).repeat(
            -(-out_channels // smaller), -(-in_channels // smaller)
        )
        w_hat = self.beta * normalize(self.weight)
        w_hat[:, :, height // 2, width // 2] += (
            self.alpha * identity[:out_channels, :in_channels]
        )
        return w_hat


def _block(cin, cout):
    conv = DiracConv2dV1(2 * cin, cout, 3, padding=1, bias=False)
    return conv_block(conv, NCReLU())


def diracnet_v1(net):
    """DiracNet v1 of a diracnet.Topology: (N, 3, H, W) to logits (N, num_classes).

    The script that trained on CIFAR has a ReLU behind the stem's batch norm, and none before the
    average pooling; in the published definition for ImageNet it is the other way round.
    """
    return PlainNet(net, _block, stem_relu=not net.imagenet, last_relu=net.imagenet)
