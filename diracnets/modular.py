"""The DiracNet for training as a chain of modules, for tools that operate on layers.

    model = ModularNetwork.from_params(params)      # of define_diracnet, a file, or a state dict
    logits = model(inputs)                          # equal to those of Network(f, params)

Hooks, torch.nn.utils.prune, SyncBatchNorm.convert_sync_batchnorm, swa_utils.update_bn and torch.ao
find its DiracConv2d and BatchNorm2d. `diracnet.Network` trains faster, because it computes all
W_hat at once.
"""

import functools
import re
from collections import OrderedDict
from itertools import zip_longest

import torch
from torch import nn

from diracconv import DiracConv2d, check_forward
from diracnet import DiracNet, Params, Topology, check_params
from diracnets.fold import fold, has_hooks
from diracnets.models.plain import PlainNet, conv_block

COUNT = '.num_batches_tracked'  # a buffer of BatchNorm2d that is not in the parameters


def _flat_name(name):
    """Returns the flat name in `params` of a parameter in the modules."""
    return re.sub(r'\bconv\.(alpha|beta)$', r'\1', re.sub(r'\bconv\.weight$', 'conv', name))


def _module_name(name):
    return re.sub(
        r'\bconv$', 'conv.weight', re.sub(r'(?<!conv\.)\b(alpha|beta)$', r'conv.\1', name)
    )


class ModularNetwork(nn.Sequential):
    """A DiracNet of DiracConv2d and BatchNorm2d: (N, C, H, W) to logits (N, num_classes).

    The state dict has the flat names of `params`, as that of `diracnet.Network`, so each loads that
    of the other. Modules and named parameters are named after the blocks:
    `group0.block0.conv.weight`, `group0.block0.conv.alpha`, `group0.block0.bn.weight`.
    """

    @classmethod
    def from_params(cls, params: Params) -> 'ModularNetwork':
        """Makes the model of flat parameters, and shares them, as `diracnet.Network` does.

        Raises ValueError if they are not those of a DiracNet.
        """
        topology = Topology.from_params(params)
        with torch.device('meta'):  # no random initialization that is discarded
            net = PlainNet(topology, functools.partial(conv_block, DiracConv2d))
            model = cls(OrderedDict(**net.features._modules, flatten=nn.Flatten(), fc=net.fc))
        check_params(params, model.state_dict())  # a folded DiracNet has a topology too
        model.load_state_dict(params, assign=True)
        return model

    def fold(self) -> DiracNet:
        """Returns the folded DiracNet, which has the same logits.

        Raises ValueError if the parameters do not determine the logits: for a subclass that
        overrides forward, modules with forward hooks, and modules of other types than those of
        `from_params`, except SyncBatchNorm.
        """
        check_forward(self, ModularNetwork)
        params = self.state_dict()
        original = ModularNetwork.from_params({name: t.to('meta') for name, t in params.items()})
        for actual, expected in zip_longest(_submodules(self), _submodules(original)):
            if actual != expected:
                name, kind, hooked = actual or expected
                raise ValueError(
                    f'{name} is a {kind.__name__}{" with hooks" if hooked else ""}: expected the '
                    'modules of ModularNetwork.from_params, without forward hooks'
                )
        return fold(params, self.fc.weight.dtype).to(self.fc.weight.device)

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        state_dict = super().state_dict(*args, **kwargs)
        prefix = kwargs.get('prefix', '')
        for name in [name for name in state_dict if name.startswith(prefix)]:
            tensor = state_dict.pop(name)  # every tensor, to keep the order
            if not name.endswith(COUNT):
                state_dict[_flat_name(name)] = tensor
        return state_dict

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in [name for name in state_dict if name.startswith(prefix)]:
            tensor = state_dict.pop(name)
            state_dict[_module_name(name)] = tensor
            if name.endswith('.running_var'):
                count = torch.zeros((), dtype=torch.long, device=tensor.device)
                state_dict.setdefault(name.removesuffix('.running_var') + COUNT, count)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _submodules(model):
    """Yields (name, type, has hooks) of the modules inside a model."""
    for name, module in model.named_modules(remove_duplicate=False):
        kind = nn.BatchNorm2d if type(module) is nn.SyncBatchNorm else type(module)
        if module is not model:
            yield name, kind, has_hooks(module)
