"""The architectures, with their options and datasets.

train.py builds its options from this module, so it does not import torch, which takes seconds.
`diracnets.models.registry` builds the models.
"""

from dataclasses import dataclass
from typing import Any

from diracnets.preprocessing import KINDS

BLOCKS = ('base', 'dbb', 'acb', 'repvgg', 'dirac')  # see diracnets.models.blocks.with_block
ACTIVATIONS = ('relu', 'gelu', 'silu', 'hardswish')


@dataclass(frozen=True)
class Architecture:
    """Builder, options and training settings of an architecture."""

    build: str  # 'module.function' in diracnets.models: takes (Topology, **options) if depth and
    # width are among the options, and (num_classes, **options) otherwise
    options: dict[str, Any]  # model options of train.py that it has, with their defaults
    datasets: tuple[str, ...] = KINDS  # supported datasets, the default first
    decay_all: bool = False  # weight decay also applies to one-dimensional tensors
    crop_padding: str = 'reflect'  # or 'constant': padding of small images before the random crop


CIFAR, IMAGENET = ('CIFAR10', 'CIFAR100'), ('ImageNet',)
SIZE = {'depth': 16, 'width': 1}
BLOCK = {'block': 'base'}
FAST = {'width': 1, 'block': 'dirac', 'activation': 'gelu'}
DENSENET = {'layers': 100, 'growth': 12, 'reduce': 0.5, 'bottleneck': True, 'droprate': 0.0,
            'checkpointing': False}

ARCHITECTURES = {
    'diracnet': Architecture('registry.build_diracnet', {**SIZE, 'checkpointing': False}),
    'diracnet-v1': Architecture('diracnet_v1.diracnet_v1', SIZE, decay_all=True),
    'diracnet-repeated': Architecture('tiled_delta.tiled_delta', SIZE),
    'diracnet-fast': Architecture('diracnet_fast.diracnet_fast', FAST, CIFAR),
    'plain': Architecture('plain.plain', {**SIZE, **BLOCK}),
    'dirac-init': Architecture('plain.dirac_init', SIZE),
    'default-init': Architecture('plain.default_init', SIZE),
    'resnet': Architecture('plain.resnet', SIZE),
    'wide-resnet': Architecture(
        'wide_resnet.WideResNet', {'depth': 28, 'width': 10, 'droprate': 0.0}, CIFAR
    ),
    'densenet': Architecture('densenet.densenet', DENSENET, CIFAR, crop_padding='constant'),
    'densenet121': Architecture(
        'torchvision_models.densenet121', {'droprate': 0.0, 'checkpointing': False}, IMAGENET
    ),
    **{
        name: Architecture(f'torchvision_models.{name}', BLOCK, IMAGENET)
        for name in ('resnet18', 'resnet34', 'resnet50', 'alexnet')
    },
    'mobilenet': Architecture('mobilenet.mobilenet', BLOCK, IMAGENET),
}


def list_models() -> list[str]:
    """Returns the names of the architectures that `create_model` builds."""
    return list(ARCHITECTURES)


def get_architecture(name: str) -> Architecture:
    """Returns the registry entry of an architecture; raises ValueError for an unknown name."""
    if name not in ARCHITECTURES:
        raise ValueError(f'unknown model {name!r}: expected one of {", ".join(ARCHITECTURES)}')
    return ARCHITECTURES[name]
