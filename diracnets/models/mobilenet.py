"""MobileNet v1 (Howard et al., arXiv 1704.04861, table 1)."""

from collections import OrderedDict

from torch import Tensor, nn

from diracnets.models.blocks import with_block

STEM_CHANNELS = 32
# output channels and stride of each depthwise-separable layer
LAYERS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5,
          (1024, 2), (1024, 1)]


def _conv_bn_relu(cin: int, cout: int, kernel_size: int, stride: int = 1,
                  groups: int = 1) -> nn.Sequential:
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(
            cin, cout, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
        ),
        bn=nn.BatchNorm2d(cout),
        relu=nn.ReLU(),
    ))


class MobileNet(nn.Module):
    """MobileNet v1 of width 1: (N, 3, H, W) to logits (N, num_classes)."""

    def __init__(self, num_classes: int):
        super().__init__()
        cin = STEM_CHANNELS
        layers = [_conv_bn_relu(3, cin, 3, stride=2)]
        for cout, stride in LAYERS:
            layers += [_conv_bn_relu(cin, cin, 3, stride, groups=cin), _conv_bn_relu(cin, cout, 1)]
            cin = cout
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(cin, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.features(inputs).mean(dim=(2, 3)))  # features: (N, 1024, H/32, W/32)


def mobilenet(num_classes: int, block: str) -> nn.Module:
    """Builds a MobileNet v1 with the blocks of `with_block`."""
    return with_block(MobileNet(num_classes), block)
