"""Layers: W_hat and its gradients against equation 3, folding, state dicts, invalid arguments."""

import functools
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import diracconv
from diracconv import (
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    dirac_weight,
    normalize,
)
from reference import slow_w_hat

LAYERS = [DiracConv1d, DiracConv2d, DiracConv3d]
ROOT = Path(diracconv.__file__).parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ('shape', 'groups'),
    [
        ((4, 4, 3), 1), ((6, 4, 5), 1), ((3, 5, 3), 1), ((5, 5, 1), 1), ((4, 4, 2), 1),
        ((4, 4, 3, 3), 1), ((8, 2, 3, 3), 4), ((4, 4, 3, 3), 2), ((6, 1, 3, 3), 6),
        ((12, 1, 3, 3), 6), ((4, 3, 2, 4), 1), ((4, 3, 1, 1), 1), ((4, 4, 5, 3), 1),
        ((3, 3, 3, 3, 3), 1), ((4, 2, 3, 2, 1), 2),
    ],
)
def test_dirac_weight_equals_equation_3(shape, groups):
    weight, alpha, beta = torch.randn(shape), torch.randn(shape[0]), torch.randn(shape[0])
    expected = slow_w_hat(weight, alpha, beta, groups)
    double = dirac_weight(weight.double(), alpha.double(), beta.double(), groups)
    torch.testing.assert_close(double, expected, rtol=1e-14, atol=1e-14)
    single = dirac_weight(weight, alpha, beta, groups)
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


def test_dirac_weight_equals_equation_3_when_weight_is_channels_last():
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    alpha, beta = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(
        dirac_weight(weight, alpha, beta), slow_w_hat(weight, alpha, beta, 1).float()
    )


@pytest.mark.parametrize('shape', [(4, 4, 3, 3), (6, 4, 3, 3), (4, 6, 3, 3)])
def test_readme_code_equals_equation_3(shape):
    text = (ROOT / 'README.md').read_text()
    code = re.search(r'```python\n(scale = .*?)```', text, re.S).group(1)
    names = dict(zip(('weight', 'alpha', 'beta'), map(torch.randn, (shape, shape[:1], shape[:1]))))
    expected = slow_w_hat(*names.values(), groups=1)
    exec(code, names)
    assert len(code.splitlines()) == 4
    torch.testing.assert_close(names['w_hat'].double(), expected, rtol=1e-5, atol=1e-6)


def test_normalize_divides_by_filter_norm():
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
def test_dirac_weight_gradients_equal_finite_differences(shape, groups):
    weight, alpha, beta = (
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in (shape, shape[:1], shape[:1])
    )
    w_hat = functools.partial(dirac_weight, groups=groups)
    assert torch.autograd.gradcheck(w_hat, (weight, alpha, beta))
    assert torch.autograd.gradgradcheck(w_hat, (weight, alpha, beta))


def test_dirac_weight_is_linear_when_norm_is_below_epsilon():
    """W_hat is alpha * delta + beta / 1e-12 * W."""
    weight = (torch.randn(2, 2, 3, dtype=torch.float64) * 1e-14).requires_grad_()
    alpha, beta = torch.ones(2).double(), torch.tensor([0.1, -0.3], dtype=torch.float64)
    grad = torch.randn(2, 2, 3, dtype=torch.float64)
    (dirac_weight(weight, alpha, beta) * grad).sum().backward()
    torch.testing.assert_close(weight.grad, grad * beta.view(2, 1, 1) * 1e12)


@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize(('cin', 'cout'), [(4, 4), (4, 6), (6, 4)])
def test_layer_is_exact_identity_when_beta_is_zero(layer, kernel_size, cin, cout):
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
])
def test_dirac_conv2d_is_exact_identity_with_every_option(options):
    conv = DiracConv2d(4, 4, 3, **{'padding': 1, 'bias': False, **options})
    nn.init.zeros_(conv.beta)
    inputs = torch.randn(2, 4, 6, 6, dtype=options.get('dtype'))
    assert torch.equal(conv(inputs), inputs)


def test_dirac_conv2d_output_is_longer_when_kernel_is_even():
    conv = DiracConv2d(3, 3, (2, 4), padding=(1, 2), bias=False)
    nn.init.zeros_(conv.beta)
    inputs = torch.randn(2, 3, 6, 5)
    outputs = conv(inputs)
    assert outputs.shape == (2, 3, 7, 6)
    assert torch.equal(outputs[:, :, :6, :5], inputs)


@pytest.mark.parametrize('layer', LAYERS)
def test_layer_constructor_equals_nn_conv(layer):
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
])
def test_layer_and_fold_equal_torch_convolution(layer, options):
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


def test_fold_refuses_a_layer_with_its_own_forward():
    class Circular(DiracConv2d):
        def _conv_forward(self, inputs, weight, bias):
            return super()._conv_forward(F.pad(inputs, (1, 1, 1, 1), 'circular'), weight, bias)

    scaled = DiracConv2d(3, 3, 3)
    scaled.forward = lambda inputs: 2 * DiracConv2d.forward(scaled, inputs)
    for layer in (Circular(3, 3, 3), scaled):
        with pytest.raises(ValueError, match='overrides forward'):
            layer.fold()


def test_reset_parameters_resets_alpha_and_beta():
    conv = DiracConv2d(2, 2, 3)
    nn.init.normal_(conv.alpha)
    nn.init.normal_(conv.beta)
    conv.reset_parameters()
    assert conv.alpha.tolist() == [1.0, 1.0]
    assert conv.beta.tolist() == pytest.approx([0.1, 0.1])


def test_layer_loads_state_dict_with_delta():
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
def test_dirac_weight_is_finite_when_filter_is_zero(dtype):
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


def test_dirac_conv2d_under_autocast_when_parameters_are_bfloat16():
    """Autocast casts float32 inputs to bfloat16."""
    conv = DiracConv2d(4, 4, 3, dtype=torch.bfloat16)
    inputs = torch.randn(2, 4, 8, 8)
    with torch.autocast('cpu', torch.bfloat16):
        found = conv(inputs)
    names = {name: p.detach().double().requires_grad_() for name, p in conv.named_parameters()}
    w_hat = slow_w_hat(names['weight'], names['alpha'], names['beta'], 1)
    expected = F.conv2d(inputs.double(), w_hat, names['bias'])
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    grad = torch.randn(expected.shape)
    found.backward(grad.to(found.dtype))
    expected.backward(grad.double())
    for name, parameter in conv.named_parameters():
        slow = names[name].grad
        assert (parameter.grad - slow).abs().max() < 0.02 * slow.abs().max(), name


@pytest.mark.filterwarnings('ignore:.*torch.jit.script. is deprecated')  # by torch's own jvp
def test_dirac_weight_when_only_weight_is_bfloat16():
    """The arithmetic is float32, as under CUDA autocast; W_hat has the dtype of the weight."""
    parameters = torch.randn(4, 3, 3, 3).bfloat16(), torch.randn(4), torch.randn(4)
    found = [p.clone().requires_grad_() for p in parameters]
    slow = [p.double().requires_grad_() for p in parameters]
    w_hat, expected = dirac_weight(*found), slow_w_hat(*slow, groups=1)
    grad, tangent = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    assert w_hat.dtype == torch.bfloat16
    w_hat.backward(grad)
    expected.backward(grad.double())
    for parameter, wanted in zip(found, slow):
        assert parameter.grad.dtype == parameter.dtype
        assert (parameter.grad - wanted.grad).abs().max() < 0.01 * wanted.grad.abs().max()
    _, moved = torch.func.jvp(
        lambda weight: dirac_weight(weight, *parameters[1:]), parameters[:1], (tangent.bfloat16(),))
    wanted = torch.autograd.functional.jvp(
        lambda weight: slow_w_hat(weight, *slow[1:], 1), slow[0], tangent.bfloat16().double())[1]
    assert (moved - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_dirac_weight_gradient_when_float16_norm_is_below_epsilon():
    """Epsilon is 2**-14, the smallest normal number: W_hat is alpha * delta + beta * 2**14 * W."""
    weight = torch.full((2, 3, 3, 3), 2.0**-20, dtype=torch.float16, requires_grad=True)
    alpha = torch.ones(2, dtype=torch.float16, requires_grad=True)
    beta = torch.full((2,), 2.0**-10, dtype=torch.float16, requires_grad=True)
    grad = torch.full((2, 3, 3, 3), 2.0**10, dtype=torch.float16)
    dirac_weight(weight, alpha, beta).backward(grad)
    assert weight.grad.unique().tolist() == [2.0 ** (10 - 10 + 14)]
    assert alpha.grad.tolist() == [2.0**10] * 2
    assert beta.grad.tolist() == [27 * 2.0 ** (10 - 20 + 14)] * 2


@pytest.mark.parametrize('scale', [2.0**-13, 2.0**9])
def test_dirac_weight_when_float16_squares_underflow_or_overflow(scale):
    weight = (torch.randn(4, 3, 3, 3) * scale).half().requires_grad_()
    alpha, beta = torch.ones(4).half(), torch.randn(4).half()
    found = dirac_weight(weight, alpha, beta)
    expected = slow_w_hat(weight, alpha, beta, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    grad = torch.randn(4, 3, 3, 3) * scale
    slow = torch.autograd.grad(expected, weight, grad.double(), retain_graph=True)[0]
    ours = torch.autograd.grad(found, weight, grad.half())[0]
    torch.testing.assert_close(ours, slow, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize('plain', [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_parametrization_equals_equation_3(plain):
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
def test_parametrization_raises_when_module_is_not_convertible(module):
    with pytest.raises(ValueError, match=f'{type(module).__name__} .* Conv1d, Conv2d or Conv3d'):
        DiracParametrization(module)


@pytest.mark.parametrize(('arguments', 'message'), [
    ((0, 4, 3), 'in_channels is 0: .* at least 1'),
    (((4,), 4, 3), r'in_channels is \(4,\): expected an integer of at least 1$'),
    ((4, 4, 3, 1, 0, 1, 2.0), 'groups is 2.0: expected an integer'),
    ((4, 2.5, 3), 'out_channels is 2.5: .* integer'),
    ((4, 4, 0), 'kernel_size is 0'),
    ((4, 4, (3, 3, 3)), r'kernel_size is \(3, 3, 3\): .* or 2 of them'),
    ((4, 4, 3, 0), 'stride is 0'),
    ((4, 4, 3, 1, -1), 'padding is -1: .* at least 0'),
    ((4, 4, 3, 1, 'half'), 'half'),
    ((4, 4, 3, 1, 1, 0), 'dilation is 0'),
    ((4, 4, 3, 1, 1, 1, 0), 'groups is 0: expected an integer of at least 1'),
    ((4, 4, 3, 1, 1, 1, 8), 'divisible by groups'),
    ((4, 6, 3, 1, 1, 1, 4), 'divisible by groups'),
    ((4, 4, 3, 2, 'same'), 'same'),
    ((4, 4, 3, 1, 1, 1, 1, True, 'mirror'), 'mirror'),
])
def test_dirac_conv2d_raises_when_argument_is_invalid(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiracConv2d(*arguments)
