"""The network that is trained, made of modules: for tools that look for layers.

    network = ModularNetwork.from_params(params)     # of define_diracnet, a file, or network.state_dict()
    logits = network(inputs)                # the numbers of Network(f, params)

Hooks, torch.nn.utils.prune, SyncBatchNorm.convert_sync_batchnorm, swa_utils.update_bn and torch.ao
find its DiracConv2d and BatchNorm2d. `diracnet.Network`, which computes all W_hat at once, is the
faster of the two to train.
"""

import re
from collections import OrderedDict
from itertools import zip_longest

import torch
from torch import nn

from diracconv import DiracConv2d, check_forward
from diracnet import (
    BN_EPS,
    BN_MOMENTUM,
    DiracNet,
    Topology,
    check_params,
    init_params,
)
from diracnets.fold import fold, has_hooks

COUNT = '.num_batches_tracked'  # of a batch norm; the parameters of a DiracNet have none


def _flat(name):
    """The name in `params` of a layer's tensor: W by the layer, alpha and beta by the block."""
    return re.sub(r'\bconv\.(alpha|beta)$', r'\1', re.sub(r'\bconv\.weight$', 'conv', name))


def _layered(name):
    return re.sub(
        r'\bconv$', 'conv.weight', re.sub(r'(?<!conv\.)\b(alpha|beta)$', r'conv.\1', name)
    )


class ModularNetwork(nn.Sequential):
    """A DiracNet of DiracConv2d and BatchNorm2d: (N, C, H, W) to logits (N, num_classes).

    Its state dict has the flat names of `params`, as that of `diracnet.Network` has; each loads
    that of the other. Its modules, and so its named parameters, are called after the blocks:
    `group0.block0.conv.weight`, `group0.block0.conv.alpha`, `group0.block0.bn.weight`.
    """

    @classmethod
    def from_params(cls, params):
        """Makes the network of flat parameters, which it shares, as `diracnet.Network` does.

        Raises ValueError for those of no DiracNet.
        """
        net = Topology.from_params(params)
        with torch.device('meta'):  # nothing is drawn that would be thrown away
            check_params(params, init_params(net))
            folded = DiracNet.from_topology(net)
            stem, *others = folded.features.named_children()
            stem[1].bias = None
            layers = [stem, ('bn', _batch_norm(net.channels[0])), *others]
            network = cls(OrderedDict(layers, flatten=nn.Flatten(), fc=folded.fc))
            for name, cin, cout in net.layers():
                block = network.get_submodule(name)
                block.conv = DiracConv2d(cin, cout, 3, padding=1, bias=False)
                block.bn = _batch_norm(cout)
        network.load_state_dict(params, assign=True)
        return network

    def fold(self):
        """Returns the DiracNet, of plain convolutions, that has the same logits.

        Raises ValueError where the parameters alone do not tell them: for a subclass with a forward
        of its own, for forward hooks of the modules inside, and for modules of other types than
        `of` makes, SyncBatchNorm aside.
        """
        check_forward(self, ModularNetwork)
        params = self.state_dict()
        made = ModularNetwork.from_params({name: tensor.to('meta') for name, tensor in params.items()})
        for found, expected in zip_longest(_inside(self), _inside(made)):
            if found != expected:
                name, kind, hooked = found or expected
                raise ValueError(
                    f'{name} is a {kind.__name__}{" with hooks" if hooked else ""}: expected the '
                    'modules of ModularNetwork.from_params, without forward hooks'
                )
        return fold(params, self.fc.weight.dtype).to(self.fc.weight.device)

    def state_dict(self, *args, **options):
        state = super().state_dict(*args, **options)
        prefix = options.get('prefix', '')
        for name in [name for name in state if name.startswith(prefix)]:
            tensor = state.pop(name)  # all of them, so that their order stays
            if not name.endswith(COUNT):
                state[_flat(name)] = tensor
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in [name for name in state_dict if name.startswith(prefix)]:
            tensor = state_dict.pop(name)
            state_dict[_layered(name)] = tensor
            if name.endswith('.running_var'):
                count = torch.zeros((), dtype=torch.long, device=tensor.device)
                state_dict.setdefault(name.removesuffix('.running_var') + COUNT, count)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _inside(network):
    """Yields what parameters do not tell of the modules in a network: (name, type, hooked)."""
    for name, module in network.named_modules(remove_duplicate=False):
        kind = nn.BatchNorm2d if type(module) is nn.SyncBatchNorm else type(module)
        if module is not network:
            yield name, kind, has_hooks(module)


def _batch_norm(channels):
    return nn.BatchNorm2d(channels, BN_EPS, BN_MOMENTUM)
