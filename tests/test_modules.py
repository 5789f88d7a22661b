"""ModularNetwork: same results and state dicts as Network, and tools that look for layers."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.optim import swa_utils

from diracconv import DiracConv2d
from diracnet import DiracNet, Network, define_diracnet
from diracnets.fold import fold
from diracnets.modular import ModularNetwork


@pytest.fixture
def params():
    """Parameters of a small DiracNet in float64."""
    torch.manual_seed(0)
    return {name: p.detach().double() for name, p in
            define_diracnet(10, 0.5, 'CIFAR10')[1].items()}


@pytest.mark.parametrize(('arguments', 'size'), [
    ((10, 0.5, 'CIFAR10'), 16), ((18, 0.125, 'ImageNet', 5), 32),
])
def test_modular_network_trains_with_same_bits_as_network(arguments, size):
    f, params = define_diracnet(*arguments)
    network = Network(f, {name: p.clone() for name, p in params.items()})
    modular = ModularNetwork.from_params({name: p.clone() for name, p in params.items()})
    assert list(modular.state_dict()) == list(network.state_dict()) == list(params)
    inputs, labels = torch.randn(4, 3, size, size), torch.arange(4)
    for _ in range(2):
        for net in (network, modular):
            net.zero_grad()
            F.cross_entropy(net(inputs), labels).backward()
            torch.optim.SGD(net.parameters(), 0.1).step()
    moved = modular.state_dict()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in network.state_dict().items())
    assert not torch.equal(moved['fc.bias'], params['fc.bias'])
    assert torch.equal(network.eval()(inputs), modular.eval()(inputs))


def test_modular_network_and_network_share_state_dicts(params):
    f, other = define_diracnet(10, 0.5, 'CIFAR10')
    modular, other = ModularNetwork.from_params(params), Network(f, other)
    assert modular.group0.block0.conv.weight.data_ptr() == params['group0.block0.conv'].data_ptr()
    file = io.BytesIO()
    torch.save(nn.DataParallel(other).state_dict(), file)
    file.seek(0)
    wrapped = nn.DataParallel(modular)
    wrapped.load_state_dict(torch.load(file))
    loaded = modular.state_dict()
    assert all(torch.equal(loaded[name], t.double()) for name, t in other.state_dict().items())
    other.double().load_state_dict(loaded)
    folded, expected = fold(modular, torch.float64), fold(other, torch.float64)
    assert type(folded) is DiracNet
    assert type(fold(swa_utils.AveragedModel(modular))) is DiracNet
    assert all(map(torch.equal, folded.state_dict().values(), expected.state_dict().values()))
    with pytest.raises(RuntimeError, match='group0.block0.conv.weight'):
        modular.load_state_dict({n: t for n, t in params.items() if n != 'group0.block0.conv'})
    with pytest.raises(ValueError, match='group0.block0.alpha is missing'):
        ModularNetwork.from_params({n: t for n, t in params.items() if n != 'group0.block0.alpha'})


def test_modular_network_supports_hooks_pruning_and_sync_batch_norm(params):
    modular = ModularNetwork.from_params({name: p.clone() for name, p in params.items()}).eval()
    inputs = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    convs = {n: m for n, m in modular.named_modules() if isinstance(m, DiracConv2d)}
    assert len(convs) == 6
    seen = []
    for conv in convs.values():
        conv.register_forward_hook(lambda conv, args, out: seen.append(out.shape))
    expected = modular(inputs)
    assert [shape[1] for shape in seen] == [8, 8, 16, 16, 32, 32]
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(modular))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules()) == 7
    assert list(synchronised.state_dict()) == list(params)
    torch.testing.assert_close(synchronised(inputs), expected)
    for conv in convs.values():
        prune.l1_unstructured(conv, 'weight', 0.5)
        prune.remove(conv, 'weight')
    pruned = modular.state_dict()
    for name in convs:
        weight, kept = params[name], pruned[name] != 0
        assert kept.sum() == weight.numel() // 2
        assert torch.equal(kept, weight.abs() > weight.abs().median())
        params[name] = pruned[name]
    f, _ = define_diracnet(10, 0.5, 'CIFAR10')
    torch.testing.assert_close(modular(inputs), f(inputs, params, False))


class Halved(ModularNetwork):
    """A network that overrides forward."""

    def forward(self, inputs):
        return super().forward(inputs) / 2


def _square(module, args, output):
    return output**2


CHANGES = {  # not determined by the parameters: (change, error message)
    'hook': (lambda net: net.group1.block0.conv.register_forward_hook(_square),
             'group1.block0.conv is a DiracConv2d with hooks: expected the modules of Modular'),
    'hook before': (lambda net: net.fc.register_forward_pre_hook(lambda module, args: None),
                    'fc is a Linear with hooks: expected'),
    'another layer': (lambda net: setattr(net.group0.block1, 'relu', nn.GELU()),
                      'group0.block1.relu is a GELU: expected'),
    'one layer more': (lambda net: net.add_module('last', nn.Softmax(1)),
                       'last is a Softmax: expected'),
    'one layer less': (lambda net: delattr(net, 'group1_pool'), 'group1 is a Sequential: expected'),
    'a layer of a subclass': (
        lambda net: setattr(net.group0.block0.conv, '__class__', type('Mine', (DiracConv2d,), {})),
        'group0.block0.conv is a Mine: expected'),
    'another forward': (lambda net: setattr(net, '__class__', Halved),
                        'Halved .* forward: expected a ModularNetwork'),
}


@pytest.mark.parametrize('case', CHANGES)
def test_modular_network_fold_raises_when_modules_changed(params, case):
    change, message = CHANGES[case]
    modular = ModularNetwork.from_params(params).eval()
    change(modular)
    for folding in (modular.fold, lambda: fold(nn.Sequential(modular))):
        with pytest.raises(ValueError, match=message):
            folding()


def test_modular_network_folds_when_sync_batch_norm_and_outer_hook(params):
    modular = nn.SyncBatchNorm.convert_sync_batchnorm(ModularNetwork.from_params(params)).eval()
    modular.register_forward_hook(_square)
    around = fold(nn.Sequential(modular), torch.float64)
    assert type(around[0]) is DiracNet
    inputs = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    f, _ = define_diracnet(10, 0.5, 'CIFAR10')
    torch.testing.assert_close(around(inputs), f(inputs, params, False) ** 2)


def test_modular_network_supports_update_bn_when_averaged(params):
    modular = ModularNetwork.from_params(params)
    inputs = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    averaged = swa_utils.AveragedModel(modular)
    averaged.update_parameters(modular)
    swa_utils.update_bn([inputs[:4], inputs[4:]], averaged)
    stem = F.conv2d(inputs, params['conv'], padding=1)
    mean = averaged.module.state_dict()['bn.running_mean']
    torch.testing.assert_close(mean, stem.mean((0, 2, 3)))
    assert modular.bn.running_mean.abs().sum() == 0
