"""Architectures by name, one file for each, and the blocks that replace their convolutions."""

from diracnets.models.blocks import BLOCKS, with_block
from diracnets.models.registry import (
    ARCHITECTURES,
    Architecture,
    count_multiply_adds,
    create_model,
    get_architecture,
    list_models,
)

__all__ = [
    'ARCHITECTURES', 'BLOCKS', 'Architecture', 'count_multiply_adds', 'create_model',
    'get_architecture', 'list_models', 'with_block',
]
