"""Freezing a part of a model for fine-tuning: its stem, or all features before the last layer."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from diracnets.models.diverse_branch import MultiBranchBlock

CONVOLUTIONS = (nn.Conv2d, MultiBranchBlock)


def last_layer_params(model: nn.Module) -> list[str]:
    """Returns the names of the parameters of the last layer, with or without a bias."""
    names = [name for name, _ in model.named_parameters()]
    layer = names[-1].rpartition('.')[0]
    return [name for name in names if name.rpartition('.')[0] == layer]


def stem(model: nn.Module) -> list[nn.Module]:
    """Returns the first convolution, or the training block in its place, and its batch norm.

    All models register a batch norm that belongs to a convolution directly after it.
    """
    first = next(module for module in model.modules() if isinstance(module, CONVOLUTIONS))
    siblings = next(children for children in (list(parent.children()) for parent in model.modules())
                    if first in children)
    after = siblings[siblings.index(first) + 1 :][:1]
    return [first, *(module for module in after if isinstance(module, _BatchNorm))]


def freeze(model: nn.Module, part: str) -> list[nn.Module]:
    """Freezes the parameters of a part, 'stem' or 'features', or 'none'.

    Returns the batch norms of the part, which must stay in evaluation mode, so that they keep their
    running statistics.
    """
    if part == 'none':
        return []
    if part == 'stem':
        modules = stem(model)
        frozen = [parameter for module in modules for parameter in module.parameters()]
    else:
        modules, last = [model], last_layer_params(model)
        frozen = [parameter for name, parameter in model.named_parameters() if name not in last]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return [module for root in modules for module in root.modules()
            if isinstance(module, _BatchNorm)]
