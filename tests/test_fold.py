"""Folding, and reading the parameters to fold from files."""

import copy
import functools
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

import diracnets
from corruption import DAMAGES, damaged
from diracconv import DiracConv1d, DiracConv2d, DiracConv3d, DiracParametrization, dirac
from diracnet import DiracNet, Topology, define_diracnet, make_topology
from diracnets.checkpoint import checkpoint_path, load_params, pretrained_params
from diracnets.folding import fold
from diracnets.models.registry import create_model
from diracnets.network import Network
from diracnets.preprocessing import preprocess


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------- DiracNets


@pytest.mark.parametrize(('depth', 'width', 'dataset', 'num_classes', 'size'), [
    (16, 1, 'CIFAR10', None, 32),
    (34, 0.5, 'CIFAR100', None, 16),
    (100, 0.25, 'CIFAR10', 7, 16),
    (18, 0.25, 'ImageNet', None, 64),
    (34, 0.25, 'ImageNet', None, 64),
])
def test_fold_params_keeps_logits(train_a_little, depth, width, dataset, num_classes, size):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(5, 4, 3, size, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (5, 4), generator=generator)
    f, params = train_a_little(depth, width, dataset, num_classes, list(zip(inputs, labels))[:4])
    with torch.no_grad():
        expected = f(inputs[4], params, mode=False)
        net = fold(params, torch.float64)
        assert relative(net(inputs[4]), expected) < 1e-10
        assert relative(net.float()(inputs[4].float()), expected) < 1e-4
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == (depth - 1 if dataset == 'ImageNet' else depth - 3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_fold_params_matches_formula_for_one_filter(trained):
    """Compares one filter and bias with the formula, value by value."""
    params = {name: tensor.double().tolist() for name, tensor in trained[1].items()}
    net = fold(trained[1], torch.float64)
    name, o = 'group1.block0', 3
    w = np.array(params[f'{name}.conv'][o])  # (in, 3, 3)
    norm = sum(v * v for v in w.flat) ** 0.5
    bn = {part: params[f'{name}.bn.{part}'][o]
          for part in ('weight', 'bias', 'running_mean', 'running_var')}
    a = bn['weight'] / (bn['running_var'] + 1e-5) ** 0.5
    expected = w * params[f'{name}.beta'][o] / norm
    expected[o, 1, 1] += params[f'{name}.alpha'][o]
    conv = net.features.group1.block0.conv
    np.testing.assert_allclose(conv.weight[o].detach(), a * expected, rtol=1e-12)
    assert conv.bias[o].item() == pytest.approx(bn['bias'] - bn['running_mean'] * a, rel=1e-12)


def test_fold_network_equals_fold_params_when_wrapped(trained, tmp_path):
    f, params = trained
    expected = fold(params).state_dict()
    init = (tmp_path / 'store').as_uri()
    dist.init_process_group('gloo', init_method=init, rank=0, world_size=1)
    try:
        define = {name: t.clone().requires_grad_('running_' not in name)
                  for name, t in params.items()}
        network = Network(f, define)
        wrapped = nn.parallel.DistributedDataParallel(network)
        for module in (network, wrapped, torch.compile(network)):
            state = fold(module).state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in state)
    finally:
        dist.destroy_process_group()


class Ensemble(nn.Module):
    """Contains two networks in nested containers and combines their outputs."""

    def __init__(self, first, second):
        super().__init__()
        self.members = nn.ModuleDict({'first': first, 'second': nn.Sequential(second)})

    def forward(self, x):
        return self.members['first'](x) - 2 * self.members['second'](x).softmax(1)


CONTAINERS = {
    'softmax': lambda net: nn.Sequential(net, nn.Softmax(1)),
    'DataParallel': nn.DataParallel,
    'average': torch.optim.swa_utils.AveragedModel,
    'ensemble': lambda net: Ensemble(net, copy.deepcopy(net)),
    'used twice': lambda net: Ensemble(net, net),
    'compiled inside': lambda net: nn.Sequential(torch.compile(net, backend='eager'), nn.ReLU()),
    'compiled around': lambda net: torch.compile(CONTAINERS['softmax'](net), backend='eager'),
    'average of all': lambda net: nn.Sequential(
        torch.optim.swa_utils.AveragedModel(nn.DataParallel(CONTAINERS['ensemble'](net)))
    ),
    'after batch norm': lambda net: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sequential(net)
    ),
}


@pytest.mark.parametrize('kind', CONTAINERS)
def test_fold_module_replaces_networks_at_any_depth(trained, digits, kind):
    f, params = trained
    params = {name: tensor.double().clone() for name, tensor in params.items()}
    module = CONTAINERS[kind](Network(f, params)).eval()
    inputs = digits[0][:4].double()
    module.double()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        expected = module(inputs)
        folded = fold(module, torch.float64)
        assert relative(folded(inputs), expected) < 1e-10
    for replaced in (Network, nn.BatchNorm2d, DiracConv2d):
        assert count(folded, replaced) == 0
    assert count(folded, DiracNet) == (kind in ('DataParallel', 'average'))
    assert type(fold(nn.DataParallel(Network(f, params)))) is DiracNet
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_fold_module_keeps_hooks_and_raises_for_overridden_forward(trained, digits):
    class Padded(DiracConv2d):
        def forward(self, inputs):
            return super().forward(F.pad(inputs, (2, 0, 2, 0)))

    with pytest.raises(ValueError, match='Padded'):
        fold(nn.Sequential(Padded(3, 4, 3)))
    network = Network(*trained).double().eval()
    network.register_forward_hook(_double)
    around = nn.DataParallel(nn.Sequential(network, DiracConv1d(10, 2, 1))).double()
    around.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    around.module[1].register_forward_hook(_double, with_kwargs=False, always_call=True)
    inputs = digits[0][:2].double()
    with torch.no_grad():
        network(inputs)
        around.module[0].register_forward_hook(lambda module, args, logits: logits[..., None])
        assert relative(fold(around, torch.float64)(inputs), around(inputs)) < 1e-10


def test_fold_module_keeps_hook_options():
    class Fails(nn.Module):
        def forward(self, inputs):
            raise ArithmeticError

    seen = []
    conv, fails = DiracConv2d(3, 4, 3), Fails()
    conv.register_forward_pre_hook(
        lambda module, args, keywords: seen.append('before'), with_kwargs=True)
    conv.register_forward_hook(
        lambda module, args, keywords, output: seen.append('after'), with_kwargs=True)
    around = nn.DataParallel(nn.Sequential(conv, fails))
    around.register_forward_hook(lambda *_: seen.append('always'), always_call=True)
    with pytest.raises(ArithmeticError):
        fold(around)(torch.zeros(1, 3, 4, 4))
    assert seen == ['before', 'after', 'always']


@pytest.mark.parametrize('wrap', [nn.DataParallel, lambda net: torch.optim.swa_utils.AveragedModel(
    nn.DataParallel(net))])
def test_fold_module_keeps_hook_order_of_wrappers(wrap):
    inside = nn.Sequential(nn.Identity())
    inside.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    inside.register_forward_hook(_double)
    around = wrap(inside)
    around.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    around.register_forward_pre_hook(lambda module, args: (args[0] * args[0],))
    around.register_forward_hook(lambda module, args, output: output + 5)
    x = torch.tensor([1.0, 2.0])
    expected = [2 * 3 * 4 + 5, 2 * 3 * 9 + 5]
    assert around(x).tolist() == expected
    assert fold(around)(x).tolist() == expected
    assert len(inside._forward_pre_hooks) == 1


def test_fold_module_keeps_device(trained):
    with torch.device('meta'):
        net = Network(*define_diracnet(10, 0.5, 'CIFAR10'))
    folded = fold(nn.Sequential(net, nn.Softmax(1)))
    assert {p.device.type for p in folded.parameters()} == {'meta'}
    state = fold(Network(*trained)).state_dict()
    assert [t.shape for t in folded[0].state_dict().values()] == [
        t.shape for t in state.values()]


def test_fold_params_keeps_source_and_random_state(trained):
    params = {name: tensor.double() for name, tensor in trained[1].items()}
    before = {name: tensor.clone() for name, tensor in params.items()}
    state = torch.get_rng_state()
    net = fold(params, torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training
    assert all(p.requires_grad for p in net.parameters())


def test_fold_raises_for_other_types():
    with pytest.raises(ValueError, match='int cannot be folded'):
        fold(3)


# ---------------------------------------------------------------- other modules


def randomize(module, *shape):
    """Randomizes batch norms and alpha in float64; returns the module and inputs of a shape."""
    torch.manual_seed(2)
    for layer in module.modules():
        for part in ('weight', 'bias', 'running_mean', 'running_var', 'alpha'):
            tensor = getattr(layer, part, None)
            if tensor is not None and (part == 'alpha' or 'Norm' in type(layer).__name__):
                nn.init.uniform_(tensor, 0.5, 2)
    return module.double().eval(), torch.randn(*shape, dtype=torch.float64)


def count(module, kind):
    return sum(isinstance(layer, kind) for layer in module.modules())


class Branches(nn.Module):
    """Contains layers that can be fused and layers that must remain."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.dirac = DiracConv2d(4, 4, 3, padding=1, groups=2)
        self.dirac_bn = nn.BatchNorm2d(4, affine=False, eps=1e-2)
        self.twice = nn.Conv2d(4, 4, 1)  # remains: its second output has no batch norm
        self.twice_bn = nn.BatchNorm2d(4)
        self.seen = nn.Conv2d(4, 4, 1)  # remains: its output has another consumer
        self.seen_bn = nn.BatchNorm2d(4)
        self.read = nn.Conv2d(4, 4, 1)  # remains: its weight is read directly
        self.read_bn = nn.BatchNorm2d(4)
        self.batch = nn.Conv2d(4, 4, 1)  # remains: no running statistics
        self.batch_bn = nn.BatchNorm2d(4, track_running_stats=False)
        self.hooked = nn.Conv2d(4, 4, 1)  # remains: a hook changes the input of the batch norm
        self.hooked_bn = nn.BatchNorm2d(4)
        self.hooked.register_forward_hook(_double)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))  # remains
        self.normed_bn = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.dirac_bn(self.dirac(F.relu(self.stem(x))))
        x = self.twice(self.twice_bn(self.twice(x)))
        seen = self.seen(x)
        x = self.seen_bn(seen) * seen
        x = self.read_bn(self.read(x)) + F.conv2d(x, self.read.weight)
        x = self.batch_bn(self.batch(x))
        x = self.hooked_bn(self.hooked(x))
        return self.normed_bn(self.normed(x))


def _double(module, inputs, output):
    return 2 * output


def test_fold_module_replaces_only_fusable_layers():
    module, inputs = randomize(Branches(), 2, 3, 8, 8)
    expected = module(inputs)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    folded = fold(module, torch.float64)
    assert relative(folded(inputs), expected) < 1e-12
    assert type(folded) is Branches
    assert type(folded.dirac) is nn.Conv2d
    assert count(folded, nn.BatchNorm2d) == 6
    assert isinstance(folded.stem[1], nn.Identity)
    assert isinstance(folded.dirac_bn, nn.Identity)
    assert torch.equal(module(inputs), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(('hook', 'left'), [
    (None, 0),
    (lambda pool: pool.register_forward_hook(lambda module, args, output: output**2), 1),
    (lambda pool: pool.register_forward_pre_hook(lambda module, args: (args[0] ** 2,)), 1),
])
def test_fold_module_fuses_batch_norm_after_max_pool_when_pool_has_no_hooks(hook, left):
    module, inputs = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)), 2, 3, 8, 8)
    if hook:
        hook(module[1])
    folded = fold(module, torch.float64)
    assert count(folded, nn.BatchNorm2d) == left
    assert relative(folded(inputs), module(inputs)) < 1e-12


def test_fold_module_keeps_training_mode_of_source():
    module, inputs = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2, 3, 8, 8)
    expected = module(inputs)
    folded = fold(module.train(), torch.float64)
    assert module.training
    assert all(layer.training for layer in module.modules())
    assert not any(layer.training for layer in folded.modules())
    assert relative(folded(inputs), expected) < 1e-12


@pytest.mark.parametrize(('layer', 'norm', 'shape'), [
    (DiracConv1d, nn.BatchNorm1d, (2, 3, 9)),
    (DiracConv2d, nn.SyncBatchNorm, (2, 3, 6, 6)),
    (DiracConv3d, nn.BatchNorm3d, (2, 3, 5, 5, 5)),
])
def test_fold_module_supports_1d_2d_and_3d(layer, norm, shape):
    module, inputs = randomize(nn.Sequential(layer(3, 5, 3), norm(5), nn.ReLU()), *shape)
    folded = fold(module, torch.float64)
    assert type(folded[0]) is layer.plain
    assert relative(folded(inputs), module(inputs)) < 1e-12


def test_fold_module_supports_parametrized_and_shared_layers():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    parametrize.register_parametrization(conv, 'weight', DiracParametrization(conv))
    shared = DiracConv2d(4, 4, 3, padding=1)
    module, inputs = randomize(
        nn.Sequential(conv, nn.BatchNorm2d(4), shared, nn.ReLU(), shared), 2, 4, 6, 6
    )
    folded = fold(module, torch.float64)
    assert type(folded[0]) is nn.Conv2d
    assert type(folded[2]) is nn.Conv2d
    assert folded[2] is folded[4]
    assert count(folded, nn.BatchNorm2d) == 0
    assert relative(folded(inputs), module(inputs)) < 1e-12
    assert parametrize.is_parametrized(conv)


class Tied(nn.Module):
    """Two convolutions that share a weight; the second is transposed, dilated, or has a bias."""

    def __init__(self, kind):
        super().__init__()
        self.first = (nn.Conv2d if kind == 'transposed' else DiracConv2d)(4, 4, 3, padding=1)
        self.second = {
            'transposed': lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
            'dilated': lambda: DiracConv2d(4, 4, 3, padding=2, dilation=2, bias=False),
            'own alpha': lambda: DiracConv2d(4, 4, 3, padding=1),
        }[kind]()
        self.second.weight = self.first.weight
        if kind == 'transposed':
            parametrize.register_parametrization(
                self.first, 'weight', DiracParametrization(self.first))
        if kind == 'dilated':
            self.second.alpha, self.second.beta = self.first.alpha, self.first.beta

    def forward(self, x):
        return self.second(self.first(self.second(x)).relu())


@pytest.mark.parametrize('kind', ['transposed', 'dilated', 'own alpha'])
@pytest.mark.parametrize('traced', [False, True])
def test_fold_module_keeps_outputs_of_layers_that_share_a_weight(kind, traced):
    module, inputs = randomize(Tied(kind), 2, 4, 9, 9)
    folded = fold(torch.fx.symbolic_trace(module) if traced else module, torch.float64)
    assert count(folded, DiracConv2d) == 0
    assert relative(folded(inputs), module(inputs)) < 1e-12


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = DiracConv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.conv_transpose2d(self.conv(x), self.conv.weight, padding=1)


def test_fold_module_refuses_a_weight_that_another_forward_uses():
    with pytest.raises(ValueError, match=r'1.conv.weight is used outside its layer.*a copy'):
        fold(nn.Sequential(nn.ReLU(), ReadsWeight()))


class OptionalSkip(nn.Module):
    """Without `skip`, the batch norm is not the only consumer of the convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x, skip=None):
        x = self.conv(x)
        if skip is None:
            skip = x
        return self.bn(x) + skip


def test_fold_module_keeps_outputs_with_and_without_an_optional_argument():
    module, inputs = randomize(OptionalSkip(), 2, 4, 6, 6)
    folded = fold(module, torch.float64)
    for arguments in ((inputs,), (inputs, inputs)):
        assert relative(folded(*arguments), module(*arguments)) < 1e-12


class Flags(nn.Module):
    def __init__(self, early):
        super().__init__()
        self.early, self.conv, self.bn = early, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, features=False, double=True):
        x = self.conv(x)
        if features and self.early:
            return x
        x = self.bn(x)
        return x if features else 2 * x if double else x.relu()


@pytest.mark.parametrize('early', [True, False])
def test_fold_module_keeps_outputs_for_all_flags(early):
    module, inputs = randomize(Flags(early), 2, 4, 6, 6)
    folded = fold(module, torch.float64)
    assert count(folded, nn.BatchNorm2d) == early  # the convolution is also used without it
    for flags in itertools.product((False, True), repeat=2):
        assert relative(folded(inputs, *flags), module(inputs, *flags)) < 1e-12


class EarlyExit(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
                                   for _ in range(2))

    def forward(self, x, early=False):
        x = self.first(x)
        return x if early else self.second(x)


def test_fold_module_fuses_layers_after_an_early_exit():
    module, inputs = randomize(EarlyExit(), 2, 4, 6, 6)
    folded = fold(module, torch.float64)
    assert count(folded, nn.BatchNorm2d) == 0
    for early in (False, True):
        assert relative(folded(inputs, early), module(inputs, early)) < 1e-12


def test_fold_module_limits_the_number_of_flags():
    class Many(EarlyExit):
        def forward(self, x, a=False, b=False, c=False, d=False, e=False, f=False, g=False):
            return self.first(x)

    with pytest.raises(ValueError, match='7 flags: expected at most 6'):
        fold(Many())


def test_fold_module_supports_dirac_weight_of_a_weight_normed_convolution():
    conv = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    module, inputs = randomize(dirac(nn.Sequential(conv, nn.BatchNorm2d(4))), 2, 4, 6, 6)
    folded = fold(module, torch.float64)
    assert [type(layer) for layer in folded] == [nn.Conv2d, nn.Identity]
    assert relative(folded(inputs), module(inputs)) < 1e-12


def test_fold_module_supports_a_traced_dirac_conv():
    layer, inputs = randomize(DiracConv2d(3, 4, 3), 2, 3, 6, 6)
    folded = fold(fx.symbolic_trace(layer), torch.float64)
    assert not any(name.endswith('alpha') for name, _ in folded.named_parameters())
    assert relative(folded(inputs), layer(inputs)) < 1e-12


def test_fold_module_keeps_complex_tensors():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    module.register_buffer('phase', torch.tensor([1j, 2 + 1j]))
    assert fold(module).phase.tolist() == [1j, 2 + 1j]


def test_fold_module_converts_single_layer_to_dtype():
    conv = DiracConv2d(3, 3, 3)
    folded = fold(conv, torch.bfloat16)
    assert type(folded) is nn.Conv2d
    assert folded.weight.dtype == torch.bfloat16
    expected = conv.double().transform_weight()
    assert relative(folded.weight.double(), expected) < 2**-8


@pytest.mark.parametrize(('kind', 'trains'), [
    (nn.Conv2d, True), (DiracConv2d, True), (DiracConv2d, False),
])
def test_fold_module_raises_for_pruned_weight_until_prune_remove(kind, trains):
    module, inputs = randomize(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)), 2, 3, 8, 8)
    prune.l1_unstructured(module.requires_grad_(trains)[0], 'weight', 0.5)
    expected = module(inputs)
    with pytest.raises(ValueError, match='^0.weight is computed from other tensors'):
        fold(module)
    with pytest.raises(ValueError, match='^weight is computed from other tensors'):
        fold(module[0])
    if kind is DiracConv2d:
        with pytest.raises(ValueError, match='^a tensor of 0 is computed from others.*tracing'):
            fold(fx.symbolic_trace(module))
    prune.remove(module[0], 'weight')
    assert (module[0].weight == 0).sum() == module[0].weight.numel() // 2
    folded = fold(module, torch.float64)
    assert count(folded, nn.BatchNorm2d) == 0
    assert relative(folded(inputs), expected) < 1e-12


@pytest.mark.parametrize('make', [
    nn.utils.spectral_norm, lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
])
def test_fold_module_keeps_weight_hooks_of_plain_convolution(make):
    conv = make(nn.Conv2d(3, 4, 3).requires_grad_(False))
    module, inputs = randomize(nn.Sequential(conv, nn.BatchNorm2d(4)), 2, 3, 8, 8)
    with torch.no_grad():
        folded = fold(module, torch.float64)
        assert count(folded, nn.BatchNorm2d) == 1
        assert relative(folded(inputs), module(inputs)) < 1e-12


class Patches(nn.Module):
    """Has a submodule named fold."""

    def __init__(self):
        super().__init__()
        self.fold = nn.Fold((6, 6), 3)

    def forward(self, x):
        return self.fold(x)


class Unrelated(nn.Identity):
    def fold(self, inputs):
        return inputs


class InPlace(nn.Identity):
    def fold(self):
        self.folded = True


def test_fold_module_accepts_submodule_named_fold_and_raises_when_fold_returns_none():
    inputs = torch.randn(2, 27, 16)
    assert torch.equal(fold(nn.Sequential(Patches()))(inputs), Patches()(inputs))
    assert type(fold(nn.Sequential(Unrelated()))[0]) is Unrelated
    with pytest.raises(ValueError, match=r'InPlace.fold\(\) .* NoneType'):
        fold(nn.Sequential(InPlace()))


class Depends(nn.Module):
    """Its control flow depends on a tensor value, so it cannot be traced."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(DiracConv2d(3, 3, 3), norm)

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


def test_fold_module_raises_when_batch_norm_is_in_untraceable_module():
    with pytest.raises(ValueError, match='Depends cannot be traced'):
        fold(Depends(nn.BatchNorm2d(3)))
    module, inputs = randomize(Depends(nn.Identity()), 2, 3, 6, 6)  # no batch norm: no trace needed
    folded = fold(module, torch.float64)
    assert count(folded, DiracConv2d) == 0
    assert relative(folded(inputs), module(inputs)) < 1e-12


def test_fold_module_raises_when_forward_calls_layers_that_are_not_submodules():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DiracConv2d(3, 3, 3)
            self.layers = [self.conv]

        def forward(self, x):
            return self.layers[0](x)

    with pytest.raises(ValueError, match='Listed calls a layer that is not a submodule: use nn'):
        fold(Listed())


def test_fold_module_raises_when_forward_was_replaced_by_a_function():
    model = nn.Sequential(DiracConv2d(3, 3, 3))
    forward = model[0].forward
    model[0].forward = lambda x: 2 * forward(x)
    with pytest.raises(ValueError, match='^0 has a forward that was replaced by a function'):
        fold(model)


@pytest.mark.parametrize('container', [nn.Identity, nn.Sequential])
def test_fold_refuses_a_program_of_torch_export(container):
    """Its batch norm is an operator: it was returned unfolded before."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),)).module()
    module = program if container is nn.Identity else container(program)
    with pytest.raises(ValueError, match='is a program of torch.export.*fold the model, then'):
        fold(module)
    folded = torch.export.export(fold(model), (torch.randn(2, 3, 8, 8),)).module()
    assert fold(folded)(torch.ones(2, 3, 8, 8)).shape == (2, 4, 6, 6)


@pytest.mark.parametrize('compile', [
    torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(2, 3, 8, 8))])
def test_fold_and_equalize_refuse_a_program_of_torch_jit(compile):
    program = compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    with pytest.raises(ValueError, match='^0 is a program of torch.jit.*fold the model, then'):
        fold(nn.Sequential(program))
    with pytest.raises(ValueError, match='cannot be traced'):
        diracnets.equalize(program, torch.ones(2, 3, 8, 8))


def test_fold_module_names_exception_without_message_when_untraceable():
    class Unfinished(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            raise LookupError

    with pytest.raises(ValueError, match='Unfinished cannot be traced .LookupError'):
        fold(Unfinished())


# ---------------------------------------------------------------- files


def split_stats(params):
    stats = {name: tensor for name, tensor in params.items() if 'running_' in name}
    return {name: t for name, t in params.items() if name not in stats}, stats


def of_original(params):
    deltas = {'eye8_8_3_3': torch.eye(8), 'eye8_16_3_3': torch.eye(8)}
    return {'params': {**params, **deltas}, 'epoch': 200, 'optimizer': {}}


def of_original_with_stats(params):
    params, stats = split_stats(params)
    stats['eye16_16_3_3'] = torch.eye(16)
    return {'params': params, 'stats': stats, 'epoch': 200, 'optimizer': {}}


FORMATS = {
    'model.pt7': lambda params: {
        'params': params, 'optimizer': {}, 'epoch': 1, 'args': {'depth': 10, 'width': 0.5}
    },
    'original.pth': of_original,
    'original_stats.pth': of_original_with_stats,
    'ddp.pt7': lambda params: {
        'params': {f'module.{name}': tensor for name, tensor in params.items()}
    },
    'compiled.pth': lambda params: {f'_orig_mod.{name}': t for name, t in params.items()},
    'legacy.pth': lambda params: params,
    'plain.safetensors': lambda params: params,
    'ddp.safetensors': lambda params: {f'module.{name}': t for name, t in params.items()},
}


@pytest.mark.parametrize('name', FORMATS)
def test_load_params_reads_every_format(trained, digits, tmp_path, name):
    f, params = trained
    path = str(tmp_path / name)
    if name.endswith('.safetensors'):
        save_file(FORMATS[name](params), path)
    else:
        zipped = not name.startswith('legacy')
        torch.save(FORMATS[name](params), path, _use_new_zipfile_serialization=zipped)
    read = load_params(path)
    assert read.keys() == params.keys()
    assert all(torch.equal(read[key], params[key]) for key in params)
    assert not any(t.requires_grad for t in read.values())
    inputs = digits[0][:8]
    with torch.no_grad():
        assert torch.equal(f(inputs, read, False), f(inputs, params, False))
        assert relative(fold(read)(inputs), f(inputs, params, False)) < 1e-4


def test_load_reads_run_folder(run_folder):
    trained = diracnets.load(str(run_folder))
    assert (trained.title, trained.preprocess.kind) == ('DiracNet-10-0.5', 'CIFAR10')
    assert trained.num_classes == 10
    assert trained.preprocess.size == 32
    assert trained.classes[3] == 'digit 3'


@pytest.mark.parametrize(('arguments', 'width'), [
    ((28, 0.3, 'CIFAR10', 3), 19 / 64),
    ((16, 2, 'CIFAR100', None), 2),
    ((18, 1, 'ImageNet', None), 1),
    ((34, 0.25, 'ImageNet', 5), 0.25),
])
def test_topology_from_params_equals_make_topology(arguments, width):
    with torch.device('meta'):
        params, folded = define_diracnet(*arguments)[1], DiracNet(*arguments).state_dict()
    topology = Topology.from_params(params)
    depth, _, dataset, num_classes = arguments
    assert (topology.depth, topology.width) == (depth, width)
    assert topology.imagenet == (dataset == 'ImageNet')
    assert topology.num_classes == params['fc.bias'].numel()
    assert topology == Topology.from_params(folded) == make_topology(*arguments)


@pytest.mark.parametrize('kind', DAMAGES)
def test_load_params_names_corruption(trained, tmp_path, kind):
    path = damaged(kind, trained[1], tmp_path)
    with pytest.raises(ValueError, match=DAMAGES[kind]) as caught:
        load_params(path)
    assert str(caught.value).startswith(path)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'ran').exists()


def test_load_params_raises_for_missing_file():
    with pytest.raises(OSError, match='nowhere'):
        load_params('nowhere')


# ---------------------------------------------------------------- published


def test_pretrained_params_reads_published_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    path = checkpoint_path(18)
    assert path == str(tmp_path / 'hub' / 'checkpoints' / 'diracnet18-v2_checkpoint.pth')
    params = define_diracnet(18, 1, 'ImageNet')[1]
    os.makedirs(os.path.dirname(path))
    torch.save(of_original_with_stats(params), path)
    read = pretrained_params(18)
    assert read.keys() == params.keys()
    learnt = [t.numel() for name, t in read.items() if 'running_' not in name]
    assert sum(learnt) == 11_523_368
    with pytest.raises(ValueError, match='depth 50'):
        pretrained_params(50)
    torch.save({'params': {}}, path)
    with pytest.raises(RuntimeError, match='18-v2_checkpoint.pth: conv is missing'):
        pretrained_params(18)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda params: {**params, 'fc.bias': torch.full((1000,), torch.nan)},
     'fc.bias'),
    (lambda params: define_diracnet(34, 1, 'ImageNet')[1], 'depth 18, width 1.* depth 34'),
    (lambda params: fold(params).state_dict(), 'folded'),
    (list, 'AttributeError'),
])
def test_pretrained_params_raises_for_unusable_checkpoint(tmp_path, monkeypatch, change, message):
    """The file name has no hash, so the contents are checked."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    path = checkpoint_path(18)
    os.makedirs(os.path.dirname(path))
    torch.save(change(define_diracnet(18, 1, 'ImageNet')[1]), path)
    with pytest.raises(RuntimeError, match=message) as error:
        pretrained_params(18)
    assert '\n' not in str(error.value)
    assert str(error.value).endswith(f'download it to {path}')


def test_preprocess_equals_opencv_reference(tmp_path):
    path = str(tmp_path / 'image.png')
    pixels = np.random.default_rng(0).integers(0, 256, (300, 450, 3), np.uint8)  # BGR
    cv2.imwrite(path, pixels)
    resized = cv2.resize(pixels, (384, 256), interpolation=cv2.INTER_CUBIC)
    middle = resized[16:240, 80:304, ::-1] / 255
    expected = (middle - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    inputs = preprocess()(path)
    assert inputs.shape == (3, 224, 224)
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs.permute(1, 2, 0), expected, atol=1e-5)

    small = cv2.resize(pixels, (48, 32), interpolation=cv2.INTER_CUBIC)[:, 8:40, ::-1]
    expected = (small - [125.3, 123.0, 113.9]) / [63.0, 62.1, 66.7]
    inputs = preprocess('CIFAR10')(path).permute(1, 2, 0)
    np.testing.assert_allclose(inputs, expected, atol=1e-5)

    with pytest.raises(ValueError, match='50'):
        preprocess(50)
    with pytest.raises(ValueError, match='test_fold.py'):
        preprocess()(__file__)


class Keywords(nn.Module):
    """Layers that are called with keywords."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)
        self.bn, self.relu, self.last = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
        self.bn.running_mean.normal_()

    def forward(self, x):
        return self.last(input=self.relu(input=self.bn(self.pool(input=self.conv(input=x)))))


def test_fold_and_equalize_accept_layers_that_are_called_with_keywords():
    torch.manual_seed(0)
    model, inputs = Keywords().eval(), torch.randn(2, 3, 12, 12)
    folded = fold(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(inputs), model(inputs))
    equalized = diracnets.equalize(folded, inputs)
    assert not torch.equal(equalized.conv.weight, folded.conv.weight)
    torch.testing.assert_close(equalized(inputs), model(inputs))


def test_load_params_detaches_and_fold_refuses_a_whole_checkpoint(trained, tmp_path):
    params = {name: nn.Parameter(tensor) if tensor.is_floating_point() else tensor
              for name, tensor in trained[1].items()}
    torch.save({'params': params}, tmp_path / 'model.pt7')
    assert not any(tensor.requires_grad for tensor in load_params(tmp_path / 'model.pt7').values())
    with pytest.raises(ValueError, match='expected the parameters of a DiracNet'):
        fold(torch.load(tmp_path / 'model.pt7'))


@pytest.mark.parametrize('make', [
    *(functools.partial(create_model, name, depth=10) for name in ('plain', 'resnet', 'diracnet')),
    *(functools.partial(create_model, 'plain', depth=10, block=block)
      for block in ('dirac', 'dbb', 'acb', 'repvgg')),
    lambda: dirac(create_model('plain', depth=10)),
    lambda: fx.symbolic_trace(nn.Sequential(DiracConv2d(3, 4, 3), nn.BatchNorm2d(4))),
])
@pytest.mark.parametrize('trains', [True, False])
def test_parameters_of_a_folded_model_require_grad_as_its_filters_did(make, trains):
    model = make().requires_grad_(trains)
    assert {p.requires_grad for p in fold(model).parameters()} == {trains}


def test_fold_in_several_threads_leaves_other_models_alone():
    torch.manual_seed(0)
    model = create_model('plain', depth=10, width=0.25).eval()
    served, inputs = fold(model), torch.randn(1, 3, 32, 32)
    expected, errors, done = served(inputs), [], threading.Event()

    def serve():
        while not done.is_set():
            errors.append((served(inputs) - expected).abs().max().item())

    with ThreadPoolExecutor() as pool:
        serving = pool.submit(serve)
        try:
            folded = list(pool.map(lambda _: fold(model), range(8)))
        finally:
            done.set()
        serving.result()
    assert errors
    assert max(errors) <= 1e-5
    for other in folded:
        torch.testing.assert_close(other(inputs), expected)
