"""A whitening first convolution: its filters are principal components of image patches."""

import torch
import torch.nn.functional as F

from diracnets.models.diverse_branch import MultiBranchBlock
from training.freezing import stem

PIXELS = 5000 * 32**2  # total of the images whose patches are analyzed
MIN_VARIANCE = 5e-4  # added to the variance of each component, as weak ones are noise


def whitening_filters(inputs, size):
    """Returns filters (C * size**2, C, size, size) whose outputs on patches are whitened.

    The outputs have second moment 1, up to MIN_VARIANCE, and cross moments 0; the mean is not
    subtracted. inputs: (N, C, H, W), floating point; size: patch size in pixels. Filters are
    sorted by decreasing variance; they are computed in float64.
    """
    dim, n = inputs.shape[1] * size**2, 0
    products = torch.zeros(dim, dim, dtype=torch.float64)
    for batch in inputs.split(64):
        patches = F.unfold(batch.double(), size).transpose(1, 2).reshape(-1, dim)
        products += patches.T @ patches
        n += len(patches)
    variances, components = torch.linalg.eigh(products / n)
    filters = (components / (variances + MIN_VARIANCE).sqrt()).T.flip(0)
    return filters.view(-1, inputs.shape[1], size, size)


def whiten(model, inputs):
    """Initializes the first convolution with whitening filters of both signs; freezes it.

    inputs: as for `whitening_filters`. Raises ValueError if the first convolution is a block of
    branches, if the model's first parameter is not a tensor of square filters, or if it has more
    filters than signed components.
    """
    if isinstance(stem(model)[0], MultiBranchBlock):
        raise ValueError('--whiten: the first convolution trains as several branches; use --block '
                         'base or dirac')
    first = next(model.parameters())
    if first.dim() != 4 or first.shape[2] != first.shape[3]:
        raise ValueError(f'--whiten: the first parameter is {tuple(first.shape)}: expected square '
                         'convolution filters')
    filters = whitening_filters(inputs, first.shape[2])
    signed = torch.stack([filters, -filters], 1).flatten(0, 1)
    if len(first) > len(signed):
        raise ValueError(f'--whiten: the first convolution has {len(first)} filters: expected at '
                         f'most {len(signed)}, two for each component of a patch')
    with torch.no_grad():
        first.copy_(signed[: len(first)])
    first.requires_grad_(False)
