"""Training blocks that replace convolutions: DBB, ACB, RepVGG, Dirac parametrization.

`with_block` identifies a convolution and its batch norm by the order in which their parent
registers them. All models in this package and in torchvision register the batch norm directly
after the convolution. `diracnets.fold` converts all blocks back to standard convolutions.
"""

import functools
from collections import OrderedDict
from collections.abc import Iterator

from torch import nn

from diracconv import dirac
from diracnets.models.asymmetric_convolution import ACBlock
from diracnets.models.diverse_branch import DiverseBranchBlock
from diracnets.models.repvgg import RepVGGBlock

MIN_LARGE_KERNEL = 7  # convolutions of kernel size 1, and of this size and above, are not replaced


def _convs_and_norms(model: nn.Module) -> Iterator[tuple[nn.Module, str, str | None]]:
    """Yields (parent, name of a convolution, name of the batch norm after it or None)."""
    for parent in list(model.modules()):
        children = [*parent._modules.items(), (None, None)]  # named_children() leaves out repeats
        for (name, child), (next_name, next_child) in zip(children, children[1:]):
            if isinstance(child, nn.Conv2d):
                yield parent, name, next_name if isinstance(next_child, nn.BatchNorm2d) else None


def _is_replaced(conv: nn.Conv2d) -> bool:
    return any(1 < size < MIN_LARGE_KERNEL for size in conv.kernel_size)


def _block_arguments(conv: nn.Conv2d, name: str) -> tuple[int, ...]:
    """Returns the first seven arguments of a block; raises ValueError if none fits."""
    same = tuple(size // 2 for size in conv.kernel_size)
    padding = {'same': same, 'valid': (0, 0)}.get(conv.padding, conv.padding)
    sizes = conv.kernel_size, conv.stride, padding, conv.dilation
    if any(height != width for height, width in sizes) or conv.padding_mode != 'zeros':
        raise ValueError(f'{name} is {conv}: expected equal sizes in both dimensions, and zero '
                         'padding')
    return conv.in_channels, conv.out_channels, *(height for height, _ in sizes), conv.groups


def _with_branches(block: type[nn.Module], model: nn.Module) -> nn.Module:
    replaced = set()
    for parent, name, norm in _convs_and_norms(model):
        conv = getattr(parent, name)
        if _is_replaced(conv):
            if conv in replaced:
                raise ValueError(f'{name} is used in several places: expected a layer of its own')
            replaced.add(conv)
            replacement = block(*_block_arguments(conv, name)).to(conv.weight)
            if norm and isinstance(parent, nn.Sequential):
                delattr(parent, norm)  # `del parent[i]` would rename the modules after it
            elif norm:
                setattr(parent, norm, nn.Identity())
            setattr(parent, name, replacement)
        elif not norm:
            conv.bias = None  # the new batch norm has a bias
            bn = nn.BatchNorm2d(conv.out_channels).to(conv.weight)
            setattr(parent, name, nn.Sequential(OrderedDict(conv=conv, bn=bn)))
    return model


def _with_dirac(model: nn.Module) -> nn.Module:
    stem = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    return dirac(model, lambda name, conv: conv is not stem and _is_replaced(conv))


REPLACEMENTS = {  # by block: a function that replaces the convolutions of a model and returns it
    'base': lambda model: model,
    'dbb': functools.partial(_with_branches, DiverseBranchBlock),
    'acb': functools.partial(_with_branches, ACBlock),
    'repvgg': functools.partial(_with_branches, RepVGGBlock),
    'dirac': _with_dirac,
}


def with_block(model: nn.Module, block: str) -> nn.Module:
    """Replaces the convolutions of a model by a training block, in place; returns the model.

    block is one of
    - 'dbb' (Ding et al., arXiv 2103.13425), 'acb' (Ding et al., arXiv 1908.03930) or 'repvgg' (Ding
      et al., arXiv 2101.03697): replaces each convolution together with its batch norm.
      Convolutions of kernel size 1, or 7 and above, remain, and get a batch norm if they have none;
    - 'dirac' (Zagoruyko & Komodakis, arXiv 1706.00388): gives the same convolutions the weight
      W_hat. The first convolution of the model remains standard, as in DiracNets;
    - 'base': changes nothing.
    Raises ValueError for another block, for a model that contains no nn.Conv2d, and for a
    convolution that branches would replace, but cannot: one whose kernel size, stride, padding or
    dilation differs between height and width, without zero padding, or used in several places.
    """
    if block not in REPLACEMENTS:
        raise ValueError(f'unknown block {block!r}: expected one of {", ".join(REPLACEMENTS)}')
    if block != 'base' and not any(_convs_and_norms(model)):
        raise ValueError(f'{type(model).__name__} contains no nn.Conv2d that block {block!r} can '
                         'replace')
    return REPLACEMENTS[block](model)
