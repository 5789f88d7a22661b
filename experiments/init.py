"""Parameters that a training starts from, where its filters are not as the network draws them."""

import torch
from torch import nn

DELTA_ORTHOGONAL, SCALED = 'delta-orthogonal', 'scaled-'


@torch.no_grad()
def started(network, start):
    """Starts the filters of a network, all but 1x1 ones, in another way: returns the network.

    start: 'scaled-0.1', a tenth of what was drawn; or 'delta-orthogonal', an orthogonal matrix in
    the middle of the kernel and zeros around it (Xiao et al., arXiv 1806.05393, algorithm 1).
    """
    for name, parameter in network.named_parameters():
        if parameter.dim() != 4 or parameter.shape[-1] == 1:
            continue
        if start == DELTA_ORTHOGONAL:
            middle = parameter.shape[-1] // 2
            parameter.zero_()
            nn.init.orthogonal_(parameter[:, :, middle, middle])
        elif start.startswith(SCALED):
            parameter.mul_(float(start.removeprefix(SCALED)))
        else:
            raise ValueError(f'{name} cannot be started {start!r}: expected '
                             f'{DELTA_ORTHOGONAL} or {SCALED}NUMBER')
    return network
