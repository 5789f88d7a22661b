"""A first convolution that whitens: its filters are the principal directions of image patches."""

import torch
import torch.nn.functional as F

PIXELS = 5000 * 32**2  # of the images whose patches are looked at
LEAST_VARIANCE = 5e-4  # added to that of a direction, of inputs of variance 1: weak ones are noise


def whitening_filters(inputs, size):
    """The filters whose outputs on patches of these inputs are uncorrelated, of variance 1.

    inputs: (N, C, H, W), floating point; size: of a patch. Returns (C * size**2, C, size, size),
    those of the largest variance first; computed in float64.
    """
    number, n = inputs.shape[1] * size**2, 0
    products = torch.zeros(number, number, dtype=torch.float64)
    for part in inputs.split(64):
        patches = F.unfold(part.double(), size).transpose(1, 2).reshape(-1, number)
        products += patches.T @ patches
        n += len(patches)
    variances, directions = torch.linalg.eigh(products / n)
    filters = (directions / (variances + LEAST_VARIANCE).sqrt()).T.flip(0)
    return filters.view(-1, inputs.shape[1], size, size)


def whiten(network, inputs):
    """Starts the first convolution with whitening filters, each with both signs, and freezes it.

    inputs: as of `whitening_filters`. Raises ValueError for a network whose first parameter is not
    of square filters, or which has more of them than there are.
    """
    first = next(network.parameters())
    if first.dim() != 4 or first.shape[2] != first.shape[3]:
        raise ValueError(f'--whiten: the first parameter is {tuple(first.shape)}: expected filters '
                         'of square patches')
    filters = whitening_filters(inputs, first.shape[2])
    signed = torch.stack([filters, -filters], 1).flatten(0, 1)
    if len(first) > len(signed):
        raise ValueError(f'--whiten: the first convolution has {len(first)} filters: expected at '
                         f'most {len(signed)}, two for each number of a patch')
    with torch.no_grad():
        first.copy_(signed[: len(first)])
    first.requires_grad_(False)
