"""The DiracNet with a tiled identity as delta in channel-expanding layers.

DiracNet v1 tiles the identity; v2 truncates it, as torch.nn.init.dirac_ does. This model isolates
the difference: it is v2 except for delta.
"""

import functools

import torch
from torch import Tensor

from diracconv import DiracConv2d, normalize
from diracnet import Topology, conv_block
from diracnets.models.plain import PlainNet


class TiledDeltaConv2d(DiracConv2d):
    """DiracConv2d whose delta is the identity of the smaller number of channels, tiled.

    The tiles repeat along the larger number of channels, so each filter passes at least one input
    channel and each input channel is passed. Arguments are those of nn.Conv2d. Raises ValueError
    as DiracConv2d does, and for groups other than 1.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.groups != 1:
            raise ValueError(f'groups {self.groups}: expected 1')

    def transform_weight(self) -> Tensor:
        """Returns W_hat, differentiable: (out_channels, in_channels, *kernel_size)."""
        out_channels, in_channels, height, width = self.weight.shape
        smaller = min(out_channels, in_channels)
        identity = torch.eye(smaller, dtype=self.weight.dtype, device=self.weight.device).repeat(
            -(-out_channels // smaller), -(-in_channels // smaller)
        )
        w_hat = self.beta.view(-1, 1, 1, 1) * normalize(self.weight)
        w_hat[:, :, height // 2, width // 2] += (
            self.alpha.view(-1, 1) * identity[:out_channels, :in_channels]
        )
        return w_hat


def tiled_delta(topology: Topology) -> PlainNet:
    """Builds the DiracNet with tiled identities: (N, in_channels, H, W) to (N, num_classes)."""
    return PlainNet(topology, functools.partial(conv_block, TiledDeltaConv2d))
