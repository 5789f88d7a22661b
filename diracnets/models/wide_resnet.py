"""Wide residual networks for CIFAR (Zagoruyko & Komodakis, arXiv 1605.07146, table 1)."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from diracnet import Topology

STEM_CHANNELS = 16  # at every width


def _conv(cin: int, cout: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(cin, cout, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode='fan_out')
    return conv


class WideBlock(nn.Module):
    """Pre-activation block with dropout inside: (N, C, H, W) to (N, C', H', W')."""

    def __init__(self, cin: int, cout: int, stride: int, droprate: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = _conv(cin, cout, 3, stride)
        self.bn2 = nn.BatchNorm2d(cout)
        self.dropout = nn.Dropout(droprate)
        self.conv2 = _conv(cout, cout, 3)
        self.shortcut = _conv(cin, cout, 1, stride) if cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(activated)))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-width for CIFAR: (N, in_channels, H, W) to logits (N, num_classes).

    The topology has depth 6n + 4. droprate is the probability of the dropout in each block.
    """

    def __init__(self, topology: Topology, droprate: float):
        super().__init__()
        self.conv = _conv(topology.in_channels, STEM_CHANNELS, 3)
        cin, groups = STEM_CHANNELS, OrderedDict()
        for g, (cout, convolutions) in enumerate(zip(topology.channels, topology.blocks)):
            blocks = OrderedDict()
            for b in range(convolutions // 2):
                stride = 2 if g > 0 and b == 0 else 1
                blocks[f'block{b}'] = WideBlock(cin, cout, stride, droprate)
                cin = cout
            groups[f'group{g}'] = nn.Sequential(blocks)
        self.features = nn.Sequential(groups)
        self.bn = nn.BatchNorm2d(cin)
        self.fc = nn.Linear(cin, topology.num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.features(self.conv(inputs))  # (N, 64 width, H / 4, W / 4)
        return self.fc(F.relu(self.bn(x)).mean(dim=(2, 3)))
