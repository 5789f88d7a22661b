"""Models of torchvision, which is imported when one of them is built."""

import functools
from typing import Any

from torch import nn

from diracnets.models.blocks import with_block


def _build(name: str, **arguments: Any) -> nn.Module:
    try:
        from torchvision.models import get_model
    except ImportError as error:
        raise ValueError(f'{name}: torchvision is missing; pip install torchvision') from error
    return get_model(name, **arguments)


def with_replaced_convs(name: str, num_classes: int, block: str) -> nn.Module:
    """Builds a model by its torchvision name, with the blocks of `with_block`."""
    return with_block(_build(name, num_classes=num_classes), block)


resnet18, resnet34, resnet50, alexnet = (
    functools.partial(with_replaced_convs, name)
    for name in ('resnet18', 'resnet34', 'resnet50', 'alexnet')
)


def densenet121(num_classes: int, droprate: float, checkpointing: bool) -> nn.Module:
    """Builds DenseNet-121 for ImageNet: (N, 3, H, W) to logits (N, num_classes).

    checkpointing selects torchvision's own. It updates the running statistics of the first batch
    norm of each layer twice per batch, because the layer runs again in the backward pass.
    """
    return _build(
        'densenet121', num_classes=num_classes, drop_rate=droprate, memory_efficient=checkpointing
    )
