"""The DiracNet whose delta is repeated where channels grow, in place of passing the first ones.

A question that users of the original asked: v1 repeats it, v2 has that of torch.nn.init.dirac_.
"""

import torch
from torch import nn

from diracconv import DiracConv2d, normalize
from diracnets.models.plain import PlainNet, conv_block


class TiledDeltaConv2d(DiracConv2d):
    """A DiracConv2d whose delta is the identity of the smaller number of channels, repeated.

    It is repeated along the larger number: each filter passes one input channel at least, and each
    input channel is passed. Arguments are those of nn.Conv2d; raises ValueError for theirs and for
    groups other than 1.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.groups != 1:
            raise ValueError(f'groups {self.groups}: expected 1')

    def transform_weight(self):
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


def _block(cin, cout):
    conv = TiledDeltaConv2d(cin, cout, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv_block(conv, nn.ReLU())


def tiled_delta(net):
    """The DiracNet of a diracnet.Topology, its delta repeated: (N, in_channels, H, W) to logits."""
    return PlainNet(net, _block)
