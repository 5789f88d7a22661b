"""The numbers that must hold: the layer and the networks. `python test.py` also runs tests/.

Arguments are pytest's: `python test.py -k fold`.
"""

import copy
import functools
import hashlib
import http.server
import inspect
import pickle
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import diracnet
from diracconv import (
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    dirac_weight,
    normalize,
)
from diracnet import DiracNet, Network, define_diracnet, diracnet18, topology

LAYERS = [DiracConv1d, DiracConv2d, DiracConv3d]
ROOT = Path(__file__).parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- the layer


def slow_w_hat(weight, alpha, beta, groups):
    """Equation 3 filter by filter in float64, with torch's own dense delta."""
    delta = torch.zeros_like(weight, dtype=torch.float64)
    nn.init.dirac_(delta, groups)
    filters = [
        alpha[o].double() * delta[o]
        + beta[o].double() * weight[o].double() / max(weight[o].double().pow(2).sum() ** 0.5, 1e-12)
        for o in range(len(weight))
    ]
    return torch.stack(filters)


@pytest.mark.parametrize(
    ('shape', 'groups'),
    [
        ((4, 4, 3), 1), ((6, 4, 5), 1), ((3, 5, 3), 1), ((5, 5, 1), 1), ((4, 4, 2), 1),
        ((4, 4, 3, 3), 1), ((8, 2, 3, 3), 4), ((4, 4, 3, 3), 2), ((6, 1, 3, 3), 6),
        ((12, 1, 3, 3), 6), ((4, 3, 2, 4), 1), ((4, 3, 1, 1), 1), ((4, 4, 5, 3), 1),
        ((3, 3, 3, 3, 3), 1), ((4, 2, 3, 2, 1), 2),
    ],
)  # fmt: skip
def test_w_hat_is_equation_3(shape, groups):
    weight, alpha, beta = torch.randn(shape), torch.randn(shape[0]), torch.randn(shape[0])
    expected = slow_w_hat(weight, alpha, beta, groups)
    double = dirac_weight(weight.double(), alpha.double(), beta.double(), groups)
    torch.testing.assert_close(double, expected, rtol=1e-14, atol=1e-14)
    single = dirac_weight(weight, alpha, beta, groups)
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


def test_w_hat_of_channels_last_weights():
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    alpha, beta = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(
        dirac_weight(weight, alpha, beta), slow_w_hat(weight, alpha, beta, 1).float()
    )


def test_normalize_divides_by_the_norm_of_the_whole_filter():
    weight = torch.zeros(3, 2, 1, 2)
    weight[0] = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])  # norm 5
    weight[1, 0, 0, 0] = -2.0
    expected = torch.zeros(3, 2, 1, 2)
    expected[0] = torch.tensor([[[0.6, 0.0]], [[0.0, 0.8]]])
    expected[1, 0, 0, 0] = -1.0
    torch.testing.assert_close(normalize(weight), expected)


@pytest.mark.parametrize(
    ('shape', 'groups'), [((3, 2, 3), 1), ((4, 2, 3, 3), 2), ((2, 3, 2, 2), 1)]
)
def test_gradients_against_finite_differences(shape, groups):
    weight, alpha, beta = (
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in (shape, shape[:1], shape[:1])
    )
    w_hat = functools.partial(dirac_weight, groups=groups)
    assert torch.autograd.gradcheck(w_hat, (weight, alpha, beta))
    assert torch.autograd.gradgradcheck(w_hat, (weight, alpha, beta))


def test_gradient_of_a_filter_whose_norm_is_below_the_epsilon():
    """There W_hat is linear in W: alpha * delta + beta / 1e-12 * W."""
    weight = (torch.randn(2, 2, 3, dtype=torch.float64) * 1e-14).requires_grad_()
    alpha, beta = torch.ones(2).double(), torch.tensor([0.1, -0.3], dtype=torch.float64)
    grad = torch.randn(2, 2, 3, dtype=torch.float64)
    (dirac_weight(weight, alpha, beta) * grad).sum().backward()
    torch.testing.assert_close(weight.grad, grad * beta.view(2, 1, 1) * 1e12)


@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize(('cin', 'cout'), [(4, 4), (4, 6), (6, 4)])
def test_identity_is_exact(layer, kernel_size, cin, cout):
    conv = layer(cin, cout, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.zeros_(conv.beta)
    inputs = torch.randn(2, cin, *[7] * int(layer.__name__[-2]))
    outputs = conv(inputs)
    kept = min(cin, cout)
    assert torch.equal(outputs[:, :kept], inputs[:, :kept])
    assert outputs[:, kept:].abs().sum() == 0


@pytest.mark.parametrize('options', [
    {'groups': 2}, {'groups': 4}, {'dilation': 2, 'padding': 2}, {'padding': 'same'},
    {'padding_mode': 'circular'}, {'padding_mode': 'reflect'}, {'dtype': torch.float64},
])  # fmt: skip
def test_identity_is_exact_with_every_option(options):
    conv = DiracConv2d(4, 4, 3, **{'padding': 1, 'bias': False, **options})
    nn.init.zeros_(conv.beta)
    inputs = torch.randn(2, 4, 6, 6, dtype=options.get('dtype'))
    assert torch.equal(conv(inputs), inputs)


def test_even_kernel_passes_its_input_and_one_element_more():
    conv = DiracConv2d(3, 3, (2, 4), padding=(1, 2), bias=False)
    nn.init.zeros_(conv.beta)
    inputs = torch.randn(2, 3, 6, 5)
    outputs = conv(inputs)
    assert outputs.shape == (2, 3, 7, 6)
    assert torch.equal(outputs[:, :, :6, :5], inputs)


@pytest.mark.parametrize('layer', LAYERS)
def test_constructor_is_the_one_of_nn_conv(layer):
    def arguments(cls):
        return [(p.name, p.default) for p in inspect.signature(cls).parameters.values()]

    assert arguments(layer) == arguments(layer.plain)
    conv = layer(4, 8, 3, 2, 1, 1, 2, False, 'zeros', None, torch.float64)
    assert (conv.stride[0], conv.padding[0], conv.groups, conv.bias) == (2, 1, 2, None)
    assert {p.dtype for p in conv.parameters()} == {torch.float64}
    assert conv.alpha.tolist() == [1.0] * 8
    torch.testing.assert_close(conv.beta, torch.full((8,), 0.1, dtype=torch.float64))
    assert {p.device.type for p in layer(2, 2, 3, device='meta').parameters()} == {'meta'}


@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('options', [
    {}, {'stride': 2, 'padding': 1}, {'padding': 'same', 'dilation': 2}, {'groups': 2},
    {'bias': False}, {'padding': 2, 'padding_mode': 'replicate'},
])  # fmt: skip
def test_layer_and_fold_against_torch_convolution(layer, options):
    conv = layer(4, 6, 3, **options)
    nn.init.normal_(conv.alpha)
    inputs = torch.randn(2, 4, *[8] * int(layer.__name__[-2]))
    expected = layer.plain(4, 6, 3, **options)
    w_hat = slow_w_hat(conv.weight, conv.alpha, conv.beta, conv.groups)
    expected.load_state_dict({**{k: conv.state_dict()[k] for k in expected.state_dict()},
                              'weight': w_hat})
    torch.testing.assert_close(conv(inputs), expected(inputs), rtol=1e-5, atol=1e-5)
    folded = conv.fold()
    assert type(folded) is layer.plain
    assert torch.equal(folded(inputs), conv(inputs))


def test_reset_parameters_resets_alpha_and_beta():
    conv = DiracConv2d(2, 2, 3)
    nn.init.normal_(conv.alpha)
    nn.init.normal_(conv.beta)
    conv.reset_parameters()
    assert conv.alpha.tolist() == [1.0, 1.0]
    assert conv.beta.tolist() == pytest.approx([0.1, 0.1])


def test_state_dict_of_the_original_layer_loads():
    net = nn.Sequential(DiracConv2d(2, 2, 3), nn.Sequential(DiracConv1d(2, 2, 3)))
    state = net.state_dict()
    assert set(state) == {f'{name}.{leaf}' for name in ('0', '1.0')
                          for leaf in ('weight', 'bias', 'alpha', 'beta')}
    net.load_state_dict(state, strict=True)
    original = {**state, '0.delta': torch.ones(2, 2, 3, 3), '1.0.delta': torch.ones(2, 2, 3)}
    net.load_state_dict(original, strict=True)
    with pytest.raises(RuntimeError, match='gamma'):
        net.load_state_dict({**state, '0.gamma': torch.ones(1)}, strict=True)
    with pytest.raises(RuntimeError, match='alpha'):
        net.load_state_dict({k: v for k, v in state.items() if k != '0.alpha'}, strict=True)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_zero_filter_gives_no_nan(dtype):
    weight = torch.randn(3, 3, 3, 3).to(dtype)
    weight[1] = 0
    weight.requires_grad_()
    alpha = torch.ones(3, dtype=dtype, requires_grad=True)
    beta = torch.full((3,), 0.1, dtype=dtype, requires_grad=True)
    w_hat = dirac_weight(weight, alpha, beta)
    expected = torch.zeros(3, 3, 3, dtype=dtype)
    expected[1, 1, 1] = 1
    assert torch.equal(w_hat[1], expected)
    w_hat.sum().backward()
    for grad in (weight.grad, alpha.grad, beta.grad):
        assert grad.isfinite().all()
    assert normalize(weight).isfinite().all()


@pytest.mark.parametrize('plain', [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_parametrization_of_an_existing_layer(plain):
    conv = plain(4, 8, 3, padding=1, groups=2)
    inputs = torch.randn(2, 4, *[5] * int(plain.__name__[-2]))
    w_hat = slow_w_hat(conv.weight, torch.ones(8), torch.full((8,), 0.1), groups=2).float()
    parametrize.register_parametrization(conv, 'weight', DiracParametrization(conv))
    torch.testing.assert_close(conv.weight, w_hat)
    conv(inputs).sum().backward()
    dirac = conv.parametrizations.weight[0]
    assert all(p.grad is not None for p in (dirac.alpha, dirac.beta))
    outputs = conv(inputs)
    parametrize.remove_parametrizations(conv, 'weight')
    assert set(conv.state_dict()) == {'weight', 'bias'}
    torch.testing.assert_close(conv.weight, w_hat)
    assert torch.equal(conv(inputs), outputs)


@pytest.mark.parametrize(
    'module', [nn.ConvTranspose2d(2, 2, 3), nn.Linear(2, 2), nn.LazyConv2d(2, 3)]
)
def test_parametrization_of_anything_else_is_refused(module):
    with pytest.raises(ValueError, match='expected an initialised Conv1d, Conv2d or Conv3d'):
        DiracParametrization(module)


@pytest.mark.parametrize(('arguments', 'message'), [
    ((0, 4, 3), 'in_channels is 0: expected an integer of at least 1'),
    ((4, 2.5, 3), 'out_channels is 2.5: expected an integer'),
    ((4, 4, 0), 'kernel_size is 0'),
    ((4, 4, (3, 3, 3)), r'kernel_size is \(3, 3, 3\): .* or 2 of them'),
    ((4, 4, 3, 0), 'stride is 0'),
    ((4, 4, 3, 1, -1), 'padding is -1: expected an integer of at least 0'),
    ((4, 4, 3, 1, 'half'), 'half'),
    ((4, 4, 3, 1, 1, 0), 'dilation is 0'),
    ((4, 4, 3, 1, 1, 1, 0), 'groups is 0'),
    ((4, 4, 3, 1, 1, 1, 8), 'divisible by groups'),
    ((4, 6, 3, 1, 1, 1, 4), 'divisible by groups'),
    ((4, 4, 3, 2, 'same'), 'same'),
    ((4, 4, 3, 1, 1, 1, 1, True, 'mirror'), 'mirror'),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiracConv2d(*arguments)


# ---------------------------------------------------------------- the networks


def trained(depth, width, dataset, num_classes=None, size=32, steps=3):
    """A network after a few steps of SGD, its batch norms full of real statistics."""
    f, params = define_diracnet(depth, width, dataset, num_classes)
    classes = len(params['fc.bias'])
    optimizer = torch.optim.SGD([p for p in params.values() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = f(torch.randn(16, 3, size, size), params, mode=True)
        F.cross_entropy(logits, torch.randint(classes, (16,))).backward()
        optimizer.step()
    return f, {name: tensor.detach() for name, tensor in params.items()}


@pytest.mark.parametrize(('depth', 'width', 'dataset', 'published'), [
    (16, 1, 'CIFAR10', 173_402), (22, 1, 'CIFAR10', 271_066), (28, 1, 'CIFAR10', 368_730),
    (34, 2, 'CIFAR10', 1_854_378), (28, 5, 'CIFAR10', 9_124_250), (28, 10, 'CIFAR10', 36_450_090),
    (28, 1, 'CIFAR100', 374_580), (18, 1, 'ImageNet', 11_523_368), (34, 1, 'ImageNet', 21_638_952),
])  # fmt: skip
def test_parameter_counts(depth, width, dataset, published):
    with torch.device('meta'):
        _, params = define_diracnet(depth, width, dataset)
    assert sum(p.numel() for p in params.values() if p.requires_grad) == published


def test_names_and_initialisation():
    _, params = define_diracnet(10, 4, 'CIFAR10', num_classes=7)
    bn = ['weight', 'bias', 'running_mean', 'running_var']
    expected = ['conv', *(f'bn.{leaf}' for leaf in bn)]
    for block in (f'group{g}.block{b}' for g in range(3) for b in range(2)):
        expected += [f'{block}.{leaf}' for leaf in ('conv', 'alpha', 'beta')]
        expected += [f'{block}.bn.{leaf}' for leaf in bn]
    assert list(params) == [*expected, 'fc.weight', 'fc.bias']
    for name, tensor in params.items():
        assert tensor.is_leaf
        assert tensor.requires_grad == ('running' not in name), name
    params = {name: tensor.detach() for name, tensor in params.items()}
    # Kaiming, fan-in: variance 2 / fan-in
    assert params['group2.block1.conv'].var().item() == pytest.approx(2 / (256 * 9), rel=0.02)
    assert params['fc.weight'].var().item() == pytest.approx(2 / 256, rel=0.1)
    gammas = params['group2.block1.bn.weight']
    assert 0 <= gammas.min() < 0.05 < 0.95 < gammas.max() < 1
    for leaf, value in [('alpha', 1), ('beta', 0.1), ('bn.bias', 0), ('bn.running_var', 1)]:
        tensor = params[f'group0.block0.{leaf}']
        assert tensor.tolist() == pytest.approx([value] * 64)
    assert params['fc.bias'].tolist() == [0] * 7


@pytest.mark.parametrize('shape', [(4, 4, 3, 3), (6, 4, 3, 3), (4, 6, 3, 3)])
def test_the_four_lines_of_the_readme(shape):
    text = (ROOT / 'README.md').read_text()
    code = re.search(r'```python\n(scale = .*?)```', text, re.S).group(1)
    names = dict(zip(('weight', 'alpha', 'beta'), map(torch.randn, (shape, shape[:1], shape[:1]))))
    expected = slow_w_hat(*names.values(), groups=1)
    exec(code, names)
    assert len(code.splitlines()) == 4
    torch.testing.assert_close(names['w_hat'].double(), expected, rtol=1e-5, atol=1e-6)


def modular_network():
    """The network that the README builds from DiracConv2d modules, DiracNet-28-1 for CIFAR-10."""
    text = (ROOT / 'README.md').read_text()
    code = re.search(r'```python\n(from diracconv import DiracConv2d\n.*?)```', text, re.S).group(1)
    names = {}
    exec(code, names)
    return names['network']


def test_modules_and_function_give_the_same_logits():
    f, params = trained(28, 1, 'CIFAR10', steps=1)
    network = modular_network()
    state = {k: v for k, v in network.state_dict().items() if not k.endswith('batches_tracked')}
    # both list the same tensors in the same order, under names of their own
    assert [v.shape for v in state.values()] == [v.shape for v in params.values()]
    state = dict(zip(state, (v.double() for v in params.values())))
    network.double().load_state_dict(state, strict=False)
    params = {name: tensor.double() for name, tensor in params.items()}
    inputs = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for mode in (True, False):  # training first: it moves the running statistics of both
        network.train(mode)
        torch.testing.assert_close(f(inputs, params, mode), network(inputs), rtol=1e-9, atol=1e-9)
    state = [v for k, v in network.state_dict().items() if not k.endswith('batches_tracked')]
    for ours, theirs in zip(params.values(), state):
        torch.testing.assert_close(ours, theirs)


def test_imagenet_network_against_torch_modules():
    f, params = trained(18, 0.125, 'ImageNet', num_classes=5, size=64, steps=1)
    params = {name: tensor.double() for name, tensor in params.items()}
    inputs = torch.randn(2, 3, 96, 96, dtype=torch.float64)

    def bn(x, name):
        mean, var, gamma, bias = (
            params[f'{name}.{leaf}'].view(-1, 1, 1)
            for leaf in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / (var + 1e-5).sqrt() * gamma + bias

    x = bn(F.conv2d(inputs, params['conv'], stride=2, padding=3), 'bn')
    x = F.max_pool2d(x, 3, 2, 1)
    for g in range(4):
        for b in range(4):
            p = {leaf: params[f'group{g}.block{b}.{leaf}'] for leaf in ('conv', 'alpha', 'beta')}
            w_hat = slow_w_hat(p['conv'], p['alpha'], p['beta'], 1)
            x = bn(F.conv2d(x.clamp(min=0), w_hat, padding=1), f'group{g}.block{b}.bn')
        x = F.max_pool2d(x, 2) if g < 3 else x.clamp(min=0)
    assert x.shape == (2, 64, 3, 3)
    logits = x.mean((2, 3)) @ params['fc.weight'].T + params['fc.bias']
    torch.testing.assert_close(f(inputs, params, False), logits, rtol=1e-9, atol=1e-9)


def test_mode_decides_over_running_statistics():
    f, params = define_diracnet(10, 1, 'CIFAR10')
    inputs = torch.randn(8, 3, 16, 16)
    before = {name: tensor.detach().clone() for name, tensor in params.items()}
    f(inputs, params, mode=False)
    assert all(torch.equal(before[name], params[name]) for name in params)
    f(inputs, params, mode=True)
    changed = {name for name in params if not torch.equal(before[name], params[name])}
    assert changed == {name for name in params if 'running' in name}
    stem = F.conv2d(inputs, params['conv'], padding=1).detach().double()
    expected = 0.1 * stem.mean((0, 2, 3))  # momentum 0.1, from zero
    torch.testing.assert_close(params['bn.running_mean'].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('size', [4, 7, 20, 32, 48])
def test_any_square_input_that_survives_the_pooling(size):
    f, params = define_diracnet(10, 0.5, 'CIFAR100')
    assert f(torch.randn(2, 3, size, size), params, mode=False).shape == (2, 100)


def test_fractional_widths_round_down():
    assert topology(16, 0.3, 'CIFAR10').channels == (4, 9, 19)
    assert topology(18, 0.75, 'ImageNet').channels == (48, 96, 192, 384)


@pytest.mark.parametrize(('arguments', 'message'), [
    ((17, 1, 'CIFAR10'), 'depth 17: .* 6n [+] 4; the nearest are 16 and 22'),
    ((4, 1, 'CIFAR10'), 'the nearest are 10 and 16'),
    ((-8, 1, 'CIFAR10'), 'the nearest are 10 and 16'),
    ((20, 1, 'ImageNet'), 'depth 20: .* 18 or 34'),
    ((16, 0.06, 'CIFAR10'), 'width 0.06: expected at least 0.0625'),
    ((18, 0, 'ImageNet'), 'width 0: expected at least 0.015625'),
    ((16, float('nan'), 'CIFAR10'), 'width nan'),
    ((16, 1, 'MNIST'), "unknown dataset 'MNIST': expected one of CIFAR10, CIFAR100, ImageNet"),
    ((16, 1, 'CIFAR10', 0), 'num_classes 0: expected at least 1'),
])  # fmt: skip
def test_what_is_no_diracnet(arguments, message):
    with pytest.raises(ValueError, match=message):
        define_diracnet(*arguments)


def test_network_carries_the_function():
    f, params = define_diracnet(10, 1, 'CIFAR10')
    network = Network(f, params)
    assert sorted(network.state_dict()) == sorted(params)
    trainable = {name for name, tensor in params.items() if tensor.requires_grad}
    assert {name for name, _ in network.named_parameters()} == trainable
    inputs = torch.randn(4, 3, 32, 32)
    assert torch.equal(network.eval()(inputs), f(inputs, params, False))
    assert torch.equal(network.train()(inputs), f(inputs, params, True))
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other.eval()(inputs), network.eval()(inputs))


def test_network_compiles_to_one_graph():
    network = Network(*define_diracnet(10, 1, 'CIFAR10')).eval()
    inputs = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(network, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(inputs), network(inputs))


# ---------------------------------------------------------------- the folded network


def fold_by_hand(params):
    """Folds batch norm and Dirac term in float64: the state dict of a DiracNet."""
    params = {name: tensor.double() for name, tensor in params.items()}
    state = {'fc.weight': params['fc.weight'], 'fc.bias': params['fc.bias']}
    for name in [name for name in params if name.endswith('conv')]:
        prefix = name[: -len('conv')]
        gamma, bias, mean, var = (
            params[f'{prefix}bn.{leaf}']
            for leaf in ('weight', 'bias', 'running_mean', 'running_var')
        )
        a = gamma / (var + 1e-5).sqrt()
        w_hat = params[name]
        if prefix:
            w_hat = slow_w_hat(w_hat, params[f'{prefix}alpha'], params[f'{prefix}beta'], 1)
        state[f'features.{name}.weight'] = a.view(-1, 1, 1, 1) * w_hat
        state[f'features.{name}.bias'] = bias - mean * a
    return state


@pytest.mark.parametrize(('depth', 'width', 'dataset', 'size'), [
    (16, 1, 'CIFAR10', 32), (28, 2, 'CIFAR100', 32), (18, 0.25, 'ImageNet', 96),
])  # fmt: skip
def test_folded_network_gives_the_same_logits(depth, width, dataset, size):
    f, params = trained(depth, width, dataset, size=size)
    net = DiracNet(depth, width, dataset).eval()
    net.load_state_dict(fold_by_hand(params))
    inputs = torch.randn(8, 3, size, size)
    with torch.no_grad():
        expected = f(inputs, params, False)
        assert (net(inputs) - expected).abs().max() < 1e-4
    assert expected.std() > 1e-3  # the logits differ enough for the comparison to mean something


def test_folded_network_is_a_chain_of_relu_and_convolutions():
    printed = str(DiracNet(18))
    layers = re.findall(r'(Conv2d\(\d+, \d+|ReLU|MaxPool2d|AdaptiveAvgPool2d|Linear)', printed)
    expected = ['Conv2d(3, 64', 'MaxPool2d']
    cin = 64
    for cout in (64, 128, 256, 512):
        if cout > 64:
            expected.append('MaxPool2d')
        for _ in range(4):
            expected += ['ReLU', f'Conv2d({cin}, {cout}']
            cin = cout
    assert layers == [*expected, 'ReLU', 'AdaptiveAvgPool2d', 'Linear']
    keys = set(DiracNet(18).state_dict())
    assert {'features.conv.weight', 'features.group3.block3.conv.bias', 'fc.bias'} <= keys
    assert len(keys) == 2 * (1 + 16 + 1)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Serves a folded checkpoint on the loopback, its hash in its name; torch.hub starts empty."""
    (tmp_path / 'www').mkdir()
    file = tmp_path / 'www' / 'folded.pth'
    torch.save(DiracNet(18).state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    file = file.rename(tmp_path / 'www' / f'diracnet18v2folded-{digest}.pth')
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / 'www')
    )
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(
        diracnet.MODEL_URLS, 18, f'http://127.0.0.1:{server.server_port}/{file.name}'
    )
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    yield file, tmp_path / 'hub' / 'checkpoints' / file.name
    server.shutdown()
    server.server_close()


def test_pretrained_weights_are_fetched_once(published):
    served, cached = published
    state = torch.load(served)
    net = diracnet18(pretrained=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert cached.exists()
    served.unlink()
    diracnet18(pretrained=True)  # from the cache


@pytest.mark.parametrize('defect', ['missing', 'altered', 'damaged cache'])
def test_pretrained_weights_that_cannot_be_had(published, defect):
    served, cached = published
    if defect == 'missing':
        served.unlink()
    elif defect == 'altered':
        served.write_bytes(served.read_bytes()[:-1] + b'!')
    else:
        cached.parent.mkdir(parents=True)
        cached.write_bytes(b'half a file')
    with pytest.raises(RuntimeError, match='put the file from') as error:
        diracnet18(pretrained=True)
    assert diracnet.MODEL_URLS[18] in str(error.value)
    assert str(cached) in str(error.value)


if __name__ == '__main__':
    sys.exit(pytest.main([__file__, str(ROOT / 'tests'), *sys.argv[1:]]))
