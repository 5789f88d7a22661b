"""The networks by name: the DiracNet and those it is measured against.

    network = create_model('plain', 'CIFAR10', depth=28, width=1, block='dbb')
    logits = network(inputs)                        # (N, 3, H, W) to (N, num_classes)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from diracnet import CLASSES, Network, check_integers, forward, init_params, make_topology
from diracnets.models import (
    densenet,
    diracnet_fast,
    diracnet_v1,
    mobilenet,
    plain,
    tiled_delta,
    wide_resnet,
)
from diracnets.models.blocks import with_block


@dataclass(frozen=True)
class Architecture:
    """One row of ARCHITECTURES."""

    # (Topology, **options), where depth and width are among the options, or (num_classes,
    # **options), to an nn.Module
    build: Callable
    options: dict  # the flags of train.py that size it, and their defaults
    kinds: tuple = tuple(CLASSES)  # of images it is for
    decay_all: bool = False  # weight decay on one-dimensional tensors too
    crop_padding: str = 'reflect'  # or 'constant': around small images, before the random crop


def build_diracnet(net, checkpointing=False):
    return Network(functools.partial(forward, net, checkpointing=checkpointing), init_params(net))


def _from_torchvision(name):
    def from_torchvision(num_classes, block):
        import torchvision

        return with_block(torchvision.models.get_model(name, num_classes=num_classes), block)

    return from_torchvision


CIFAR, IMAGENET = ('CIFAR10', 'CIFAR100'), ('ImageNet',)
SIZE = {'depth': 16, 'width': 1}
BLOCK = {'block': 'base'}
DENSENET = {'layers': 100, 'growth': 12, 'reduce': 0.5, 'bottleneck': True, 'droprate': 0.0,
            'checkpointing': False}

ARCHITECTURES = {
    'diracnet': Architecture(build_diracnet, {**SIZE, 'checkpointing': False}),
    'diracnet-v1': Architecture(diracnet_v1.diracnet_v1, SIZE, decay_all=True),
    'diracnet-repeated': Architecture(tiled_delta.tiled_delta, SIZE),
    'diracnet-fast': Architecture(diracnet_fast.fast, {'width': 1, 'block': 'dirac', 'activation': 'gelu'}, CIFAR),
    'plain': Architecture(plain.plain, {**SIZE, **BLOCK}),
    'dirac-init': Architecture(plain.dirac_init, SIZE),
    'resnet': Architecture(plain.resnet, SIZE),
    'wide-resnet': Architecture(
        wide_resnet.WideResNet, {'depth': 28, 'width': 10, 'droprate': 0.0}, CIFAR
    ),
    'densenet': Architecture(densenet.densenet, DENSENET, CIFAR, crop_padding='constant'),
    'densenet121': Architecture(
        densenet.densenet121, {'droprate': 0.0, 'checkpointing': False}, IMAGENET
    ),
    'resnet18': Architecture(_from_torchvision('resnet18'), BLOCK, IMAGENET),
    'resnet34': Architecture(_from_torchvision('resnet34'), BLOCK, IMAGENET),
    'resnet50': Architecture(_from_torchvision('resnet50'), BLOCK, IMAGENET),
    'alexnet': Architecture(_from_torchvision('alexnet'), BLOCK, IMAGENET),
    'mobilenet': Architecture(mobilenet.mobilenet, BLOCK, IMAGENET),
}


def list_models():
    """Lists the names of the architectures."""
    return list(ARCHITECTURES)


def get_architecture(name):
    """Returns the row of ARCHITECTURES; raises ValueError for an unknown name."""
    if name not in ARCHITECTURES:
        raise ValueError(f'unknown model {name!r}: expected one of {", ".join(ARCHITECTURES)}')
    return ARCHITECTURES[name]


def create_model(name, kind, num_classes=None, in_channels=3, **options):
    """Builds a network of ARCHITECTURES, newly drawn: (N, C, H, W) to logits (N, num_classes).

    kind: of the images, 'CIFAR10', 'CIFAR100' or 'ImageNet'; num_classes: in place of that data
    set's own; in_channels: C; options: those of the family's row, which holds what is not given.
    Raises ValueError for an unknown name, images or an option that the family does not take, and
    what the family itself refuses.
    """
    row = get_architecture(name)
    if kind not in row.kinds:
        raise ValueError(f'{name} is not for {kind!r}: expected one of {", ".join(row.kinds)}')
    refused = sorted(options.keys() - row.options.keys())
    if refused:
        raise ValueError(
            f'{name} takes no {", ".join(refused)}: expected of {", ".join(row.options)}'
        )
    num_classes = CLASSES[kind] if num_classes is None else num_classes
    check_integers(num_classes=num_classes)
    if num_classes < 1:
        raise ValueError(f'num_classes {num_classes}: expected at least 1')
    if in_channels != 3 and 'depth' not in row.options:
        raise ValueError(f'{name} takes images of 3 channels, not {in_channels}')
    options = {**row.options, **options}
    if not 0 <= options.get('droprate', 0) < 1:
        raise ValueError(f'droprate {options["droprate"]}: expected at least 0 and less than 1')
    if 'depth' in options:
        net = make_topology(
            options.pop('depth'), options.pop('width'), kind, num_classes, in_channels
        )
        return row.build(net, **options)
    return row.build(num_classes, **options)


# ---------------------------------------------------------------- size


def count_multiply_adds(network, size):
    """Counts the multiply-adds of the convolutions and linear layers for one image.

    size: its height and width. Works on the meta device; leaves the network in evaluation mode.
    """
    image = torch.empty(1, 3, size, size, device=next(network.parameters()).device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network.eval()(image)
    return counter.get_total_flops() // 2
