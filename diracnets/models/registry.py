"""Builds the architectures: the DiracNet and the models that it is compared with.

    model = create_model('plain', 'CIFAR10', depth=28, width=1, block='dbb')
    logits = model(inputs)                          # (N, 3, H, W) to (N, num_classes)
"""

import importlib
from typing import Any

import torch
from torch import nn

from diracnet import CLASSES, Topology, check_integers, init_params, make_topology
from diracnets.architectures import get_architecture
from diracnets.network import Network


def build_diracnet(topology: Topology, checkpointing: bool = False) -> Network:
    """Builds the DiracNet of a topology, randomly initialized."""
    return Network.from_params(init_params(topology), checkpointing)


def create_model(name: str, dataset: str | None = None, num_classes: int | None = None,
                 in_channels: int = 3, **options: Any) -> nn.Module:
    """Builds a randomly initialized model: (N, in_channels, H, W) to logits (N, num_classes).

    name is one of `list_models()`. dataset ('CIFAR10', 'CIFAR100' or 'ImageNet') selects the
    variant for small or large images and the default number of classes; by default it is the first
    dataset that the architecture supports. options, such as depth, width and block, override the
    defaults in `get_architecture(name).options`. Raises ValueError for an unknown name or option,
    an unsupported dataset, and option values that the architecture rejects.
    """
    architecture = get_architecture(name)
    dataset = architecture.datasets[0] if dataset is None else dataset
    if dataset not in architecture.datasets:
        raise ValueError(
            f'{name} is not for {dataset!r}: expected one of {", ".join(architecture.datasets)}'
        )
    unknown = sorted(options.keys() - architecture.options.keys())
    if unknown:
        raise ValueError(
            f'{name} has no option {", ".join(unknown)}; use {", ".join(architecture.options)}'
        )
    num_classes = CLASSES[dataset] if num_classes is None else num_classes
    check_integers(1, num_classes=num_classes)
    if in_channels != 3 and 'depth' not in architecture.options:
        raise ValueError(f'{name}: expected 3 input channels, got {in_channels}')
    module, function = architecture.build.split('.')
    build = getattr(importlib.import_module(f'diracnets.models.{module}'), function)
    options = {**architecture.options, **options}
    if not 0 <= options.get('droprate', 0) < 1:
        raise ValueError(f'droprate {options["droprate"]}: expected at least 0 and less than 1')
    if 'depth' in options:
        topology = make_topology(
            options.pop('depth'), options.pop('width'), dataset, num_classes, in_channels
        )
        return build(topology, **options)
    return build(num_classes, **options)


def count_multiply_adds(model: nn.Module, image_size: int) -> int:
    """Counts the multiply-adds of the convolutions and linear layers for one square RGB image.

    image_size is in pixels. The model may be on the meta device. It is left in evaluation mode.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    image = torch.empty(1, 3, image_size, image_size, device=next(model.parameters()).device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(image)
    return counter.get_total_flops() // 2
