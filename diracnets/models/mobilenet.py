"""MobileNet v1 (Howard et al., arXiv 1704.04861, table 1)."""

from collections import OrderedDict

from torch import nn

from diracnets.models.blocks import with_block

# out channels and stride of each depthwise-separable layer, behind a convolution to 32 channels
LAYERS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5,
          (1024, 2), (1024, 1)]


def _conv_bn_relu(cin, cout, kernel_size, stride=1, groups=1):
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(
            cin, cout, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
        ),
        bn=nn.BatchNorm2d(cout),
        relu=nn.ReLU(),
    ))


class MobileNet(nn.Module):
    """(N, 3, H, W) to logits (N, num_classes)."""

    def __init__(self, num_classes):
        super().__init__()
        layers = [_conv_bn_relu(3, 32, 3, stride=2)]
        cin = 32
        for cout, stride in LAYERS:
            layers += [_conv_bn_relu(cin, cin, 3, stride, groups=cin), _conv_bn_relu(cin, cout, 1)]
            cin = cout
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(cin, num_classes)

    def forward(self, inputs):
        return self.fc(self.features(inputs).mean(dim=(2, 3)))  # features: (N, 1024, H/32, W/32)


def mobilenet(num_classes, block):
    """MobileNet v1, width 1, of plain convolutions or the blocks of `replace.with_block`."""
    return with_block(MobileNet(num_classes), block)
