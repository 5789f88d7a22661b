"""Networks with their convolutions replaced by blocks to train with; `diracnets.fold` undoes it.

It follows the order in which a module registers its children, in which all networks of this
folder and of torchvision name a convolution and then the batch norm that takes its output.
"""

import functools
from collections import OrderedDict

from torch import nn

from diracconv import dirac
from diracnets.models.diverse_branch import ACBlock, DiverseBranchBlock

LARGE_KERNEL = 7  # from here on a kernel stays what it is, and so does one of 1


def _convolutions(network):
    """Yields (parent, name of a convolution, name of the batch norm behind it or None)."""
    for parent in list(network.modules()):
        children = [*parent.named_children(), (None, None)]
        for (name, child), (next_name, follower) in zip(children, children[1:]):
            if isinstance(child, nn.Conv2d):
                yield parent, name, next_name if isinstance(follower, nn.BatchNorm2d) else None


def _take_out(parent, name):
    """Removes a module that has nothing left to do."""
    if isinstance(parent, nn.Sequential):
        delattr(parent, name)  # `del parent[i]` would rename those behind it
    else:
        setattr(parent, name, nn.Identity())


def _has_block(conv):
    return 1 < conv.kernel_size[0] < LARGE_KERNEL


def _with_branches(block, network):
    for parent, name, norm in _convolutions(network):
        conv = getattr(parent, name)
        if _has_block(conv):
            replacement = block(
                conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0],
                conv.padding[0], conv.dilation[0], conv.groups,
            )
            if norm:
                _take_out(parent, norm)
            setattr(parent, name, replacement)
        elif not norm:
            conv.bias = None  # the batch norm has one
            bn = nn.BatchNorm2d(conv.out_channels)
            setattr(parent, name, nn.Sequential(OrderedDict(conv=conv, bn=bn)))
    return network


def _with_w_hat(network):
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return dirac(network, lambda name, conv: conv is not first and _has_block(conv))


BLOCKS = {  # by name: from a network to the same one with them
    'base': lambda network: network,
    'dbb': functools.partial(_with_branches, DiverseBranchBlock),
    'acb': functools.partial(_with_branches, ACBlock),
    'dirac': _with_w_hat,
}


def with_block(network, block):
    """Replaces convolutions by a block of BLOCKS, in place: returns the network.

    block: one of
    - 'dbb' (Ding et al., arXiv 2103.13425) or 'acb' (Ding et al., arXiv 1908.03930): in place of
      every convolution and its batch norm. A kernel of 1, or of 7 and more, stays a convolution,
      and gets a batch norm if it has none;
    - 'dirac' (Zagoruyko & Komodakis, arXiv 1706.00388): the filters of the same convolutions are
      W_hat, but for the first one's, which in DiracNets is ordinary; all else stays;
    - 'base', which changes nothing.
    Raises ValueError for any other.
    """
    if block not in BLOCKS:
        raise ValueError(f'unknown block {block!r}: expected one of {", ".join(BLOCKS)}')
    return BLOCKS[block](network)
