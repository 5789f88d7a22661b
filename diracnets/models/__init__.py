"""Architectures by name, one file for each, and the blocks that replace their convolutions."""

from diracnets.architectures import (
    ARCHITECTURES,
    BLOCKS,
    Architecture,
    get_architecture,
    list_models,
)
from diracnets.models.blocks import with_block
from diracnets.models.registry import count_multiply_adds, create_model

__all__ = [
    'ARCHITECTURES', 'BLOCKS', 'Architecture', 'count_multiply_adds', 'create_model',
    'get_architecture', 'list_models', 'with_block',
]
