"""Networks with their convolutions replaced by blocks to train with; `diracfold.fold` undoes it.

It follows the order in which a module registers its children, in which all networks of this
folder and of torchvision name a convolution and then the batch norm that takes its output.
"""

from collections import OrderedDict

from torch import nn

from baselines.diverse_branch import ACBlock, DiverseBranchBlock

BLOCKS = {'base': None, 'dbb': DiverseBranchBlock, 'acb': ACBlock}
LARGE_KERNEL = 7  # from here on a kernel has no diverse branches, and neither has one of 1


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


def with_block(network, block):
    """Replaces every convolution and its batch norm by a block of BLOCKS, in place.

    A kernel of 1, or of 7 and more, stays a convolution, and gets a batch norm if it has none.
    block: 'dbb' (Ding et al., arXiv 2103.13425), 'acb' (Ding et al., arXiv 1908.03930) or 'base',
    which changes nothing. Returns the network. Raises ValueError for any other.
    """
    if block not in BLOCKS:
        raise ValueError(f'unknown block {block!r}: expected one of {", ".join(BLOCKS)}')
    if block == 'base':
        return network
    for parent, name, norm in _convolutions(network):
        conv = getattr(parent, name)
        if 1 < conv.kernel_size[0] < LARGE_KERNEL:
            replacement = BLOCKS[block](
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
