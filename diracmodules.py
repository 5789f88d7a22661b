"""The network that is trained, made of modules: for tools that look for layers.

    network = ModularNetwork.of(params)     # of define_diracnet, diracfile.load_params or a Network
    logits = network(inputs)                # the numbers of Network(f, params)

Hooks, torch.nn.utils.prune, SyncBatchNorm.convert_sync_batchnorm, swa_utils.update_bn and torch.ao
find its DiracConv2d and BatchNorm2d. `diracnet.Network`, which computes all W_hat at once, is the
faster of the two to train.
"""

import re
from collections import OrderedDict

import torch
from torch import nn

from diracconv import DiracConv2d
from diracfold import fold
from diracnet import BN_EPS, BN_MOMENTUM, DiracNet, Topology, check_fit, init_params

COUNT = '.num_batches_tracked'  # of a batch norm; the parameters of a DiracNet have none


def _flat(name):
    """The name in `params` of a layer's tensor: W by the layer, alpha and beta by the block."""
    return re.sub(r'\bconv\.(alpha|beta)$', r'\1', re.sub(r'\bconv\.weight$', 'conv', name))


def _layered(name):
    return re.sub(
        r'\bconv$', 'conv.weight', re.sub(r'(?<!conv\.)\b(alpha|beta)$', r'conv.\1', name)
    )


class ModularNetwork(nn.Sequential):
    """A DiracNet of DiracConv2d and BatchNorm2d: (N, 3, H, W) to logits (N, num_classes).

    Its state dict has the flat names of `params`, as that of `diracnet.Network` has; each loads
    that of the other. Its modules, and so its named parameters, are called after the blocks:
    `group0.block0.conv.weight`, `group0.block0.conv.alpha`, `group0.block0.bn.weight`.
    """

    @classmethod
    def of(cls, params):
        """Makes the network of flat parameters, which it shares, as `diracnet.Network` does.

        Raises ValueError for those of no DiracNet.
        """
        net = Topology.of(params)
        with torch.device('meta'):  # nothing is drawn that would be thrown away
            check_fit(params, init_params(net))
            folded = DiracNet.of(net)
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
        """Returns the DiracNet, of plain convolutions, that has the same logits."""
        return fold(self.state_dict(), self.fc.weight.dtype).to(self.fc.weight.device)

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


def _batch_norm(channels):
    return nn.BatchNorm2d(channels, BN_EPS, BN_MOMENTUM)
