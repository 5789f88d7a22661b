"""Registers `diracnet18` and `diracnet34` with timm. Needs timm, from the extra `timm`.

    import timm
    import diracnets.timm
    model = timm.create_model('diracnet18', pretrained=True, num_classes=5)
    deployed = diracnets.fold(model)                # standard convolutions, no batch norm

The models are those for training, with Dirac parametrization and batch norm. Pretrained weights are
the authors' unfolded ones. The names of parameters are those of modules, such as `conv.weight` and
`group0.block0.conv.alpha`; `diracnets.load` reads checkpoints with these names.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from diracconv import DiracConv2d
from diracnet import conv_block, make_topology
from diracnets.checkpoint import CHECKPOINT_URLS, parse_checkpoint
from diracnets.models.plain import PlainNet
from diracnets.network import module_name


class TimmDiracNet(nn.Module):
    """The DiracNet for ImageNet with the interface of timm's models: (N, C, H, W) to logits.

    depth: 18 or 34. width: multiplies the numbers of channels. in_chans, num_classes, global_pool,
    drop_rate (before the linear layer), device and dtype are those of timm's models. The levels in
    `feature_info` have strides 2, 4, 8, 16 and 32, and are taken before the ReLU that follows.
    Raises ValueError for an invalid depth or width, or another output stride than 32.
    """

    def __init__(
        self, depth: int, width: float = 1, num_classes: int = 1000, in_chans: int = 3,
        global_pool: str = 'avg', drop_rate: float = 0.0, output_stride: int = 32,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if output_stride != 32:
            raise ValueError(f'output_stride {output_stride}: expected 32')
        topology = make_topology(depth, width, 'ImageNet', None, in_chans)
        layers = PlainNet(topology, functools.partial(conv_block, DiracConv2d)).features
        for name, layer in layers.named_children():
            if name != 'avg_pool':
                self.add_module(name, layer)
        names = 'bn', 'group0', 'group1', 'group2', 'group3'
        channels = topology.channels[0], *topology.channels
        self.feature_info = [
            {'num_chs': number, 'reduction': 2 ** (i + 1), 'module': name}
            for i, (name, number) in enumerate(zip(names, channels))
        ]
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.head_hidden_size = topology.channels[-1]
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the linear layer, or removes it for 0 classes, and sets the type of pooling."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, fc = create_classifier(self.num_features, num_classes, pool_type)
        if num_classes > 0:
            nn.init.kaiming_normal_(fc.weight)
            nn.init.zeros_(fc.bias)
        self.fc = fc.to(self.conv.weight)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        block = r'\.block(\d+)' * (not coarse)
        return {'stem': r'^(?:conv|bn)\.', 'blocks': r'^group(\d+)' + block}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ValueError('gradient checkpointing is not available; use train.py '
                             '--checkpointing')

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes features (N, num_features, H / 32, W / 32), after the last ReLU."""
        x = self.max_pool(self.bn(self.conv(x)))
        x = self.group1_pool(self.group0(x))
        x = self.group2_pool(self.group1(x))
        x = self.group3_pool(self.group2(x))
        return self.relu(self.group3(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools features, and computes logits from them unless pre_logits is set."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Returns a state dict of a TimmDiracNet, from one or from a checkpoint with flat names."""
    if 'conv.weight' in state_dict:
        return dict(state_dict)
    params = parse_checkpoint(state_dict, 'the checkpoint').unfolded_params()
    return {module_name(name): tensor for name, tensor in params.items()}


default_cfgs = generate_default_cfgs({
    f'diracnet{depth}.v2_in1k': {
        'url': url, 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD, 'first_conv': 'conv', 'classifier': 'fc',
        'paper_ids': 'arXiv:1706.00388',
    } for depth, url in CHECKPOINT_URLS.items()
})


def _create(variant, pretrained, **options):
    return build_model_with_cfg(
        TimmDiracNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **options
    )


@register_model
def diracnet18(pretrained: bool = False, **options: Any) -> TimmDiracNet:
    """Returns the DiracNet-18 for training; options are those of TimmDiracNet and of timm."""
    return _create('diracnet18', pretrained, depth=18, **options)


@register_model
def diracnet34(pretrained: bool = False, **options: Any) -> TimmDiracNet:
    """Returns the DiracNet-34 for training; options are those of TimmDiracNet and of timm."""
    return _create('diracnet34', pretrained, depth=34, **options)
