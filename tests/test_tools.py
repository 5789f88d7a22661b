"""PyTorch tools on layers and networks: torch.func, export, tracing, quantization."""

import copy
import io

import onnxruntime
import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrize

import diracconv
from diracconv import (
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    dirac_weight,
)
from diracnet import define_diracnet
from diracnets.folding import fold
from diracnets.network import Network
from reference import slow_w_hat


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_params(shape=(4, 2, 3, 3)):
    """Returns random W, alpha and beta in float64."""
    return [torch.randn(size, dtype=torch.float64) for size in (shape, shape[:1], shape[:1])]


def small(number=1):
    """Returns small DiracNets in float64."""
    made = [Network(*define_diracnet(10, 0.5, 'CIFAR10')).double() for _ in range(number)]
    return made if number > 1 else made[0]


def batch(n=4, dtype=torch.float64):
    return torch.randn(n, 3, 16, 16, dtype=dtype), torch.arange(n)


# ---------------------------------------------------------------- torch.func


def test_dirac_weight_derivatives_under_torch_func():
    """The references are autograd of the slow equation 3, and finite differences for jvp."""
    primals, tangents = random_params(), random_params()
    probe = torch.randn(4, 2, 3, 3, dtype=torch.float64)

    def ours(*args):
        return (dirac_weight(*args, 2).sin() * probe).sum()

    def slow(*args):
        return (slow_w_hat(*args, 2).sin() * probe).sum()

    every = (0, 1, 2)
    torch.testing.assert_close(grad(ours, every)(*primals), grad_of(slow, primals))
    step = 1e-6
    ahead, behind = (
        slow_w_hat(*(p + sign * step * t for p, t in zip(primals, tangents)), 2) for sign in (1, -1)
    )
    moved = jvp(lambda *args: dirac_weight(*args, 2), tuple(primals), tuple(tangents))[1]
    torch.testing.assert_close(moved, (ahead - behind) / (2 * step), rtol=1e-8, atol=1e-8)
    primals = tuple(primals)
    expected = torch.autograd.functional.jacobian(lambda *args: slow_w_hat(*args, 2), primals)
    for jacobian in (jacrev, jacfwd):
        found = jacobian(lambda *args: dirac_weight(*args, 2), every)(*primals)
        torch.testing.assert_close(found, expected)
    expected = torch.autograd.functional.hessian(slow, primals)
    torch.testing.assert_close(hessian(ours, every)(*primals), expected)
    torch.testing.assert_close(jacrev(jacrev(ours, every), every)(*primals), expected)


def grad_of(function, primals):
    leaves = [p.clone().requires_grad_() for p in primals]
    return torch.autograd.grad(function(*leaves), leaves)


@pytest.mark.parametrize('batched', [(0, 0, 0), (None, 0, None), (None, None, 0), (1, None, 1)])
def test_dirac_weight_under_vmap(batched):
    many = [torch.stack([p, p.flip(0), -p], dim or 0) if dim is not None else p
            for p, dim in zip(random_params(), batched)]
    found = vmap(lambda *args: dirac_weight(*args, 2), batched)(*many)
    for i in range(3):
        one = [p if dim is None else p.select(dim, i) for p, dim in zip(many, batched)]
        torch.testing.assert_close(found[i], slow_w_hat(*one, 2))


def test_dirac_weight_forward_over_reverse_equals_double_backward():
    primals, tangents = random_params(), random_params()
    leaves = [p.clone().requires_grad_() for p in primals]
    loss = dirac_weight(*leaves, 2).pow(3).sum()
    slopes = torch.autograd.grad(loss, leaves, create_graph=True)
    along = sum((s * t).sum() for s, t in zip(slopes, tangents))
    expected = torch.autograd.grad(along, leaves)
    with fwd.dual_level():
        duals = [fwd.make_dual(p.detach().requires_grad_(), t) for p, t in zip(leaves, tangents)]
        value = dirac_weight(*duals, 2).pow(3).sum()
        torch.testing.assert_close(fwd.unpack_dual(value).tangent, along)
        found = [fwd.unpack_dual(s).tangent for s in torch.autograd.grad(value, duals)]
    torch.testing.assert_close(found, list(expected))


def test_dirac_weight_second_derivatives_are_finite_when_filter_is_zero():
    primals = random_params()
    primals[0][1] = 0

    def loss(*args):
        return dirac_weight(*args, 2).pow(2).sum()

    for second in (hessian(loss, (0, 1, 2)), jacrev(jacrev(loss, (0, 1, 2)), (0, 1, 2))):
        assert all(block.isfinite().all() for row in second(*primals) for block in row)


def test_network_per_sample_gradients_equal_backward():
    network, (inputs, labels) = small().eval(), batch()
    params = {name: p.detach() for name, p in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def loss(params, image, label):
        logits = functional_call(network, (params, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    found = vmap(grad(loss), (None, 0, 0))(params, inputs, labels)
    for i in range(len(inputs)):
        network.zero_grad()
        F.cross_entropy(network(inputs[i : i + 1]), labels[i : i + 1]).backward()
        for name, p in network.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad)


@pytest.mark.parametrize('training', [True, False])
def test_network_ensemble_equals_each_network(training):
    networks, (inputs, _) = [network.train(training) for network in small(3)], batch()
    stacked = torch.func.stack_module_state(networks)
    base = copy.deepcopy(networks[0]).to('meta')
    found = vmap(lambda *state: functional_call(base, state, (inputs,)))(*stacked)
    for network, logits in zip(networks, found):
        torch.testing.assert_close(logits, network(inputs))
    for name, buffer in networks[1].named_buffers():
        torch.testing.assert_close(stacked[1][name][1], buffer)


# ---------------------------------------------------------------- export


def dirac_of(conv):
    parametrize.register_parametrization(conv, 'weight', DiracParametrization(conv))
    return conv


UNFOLDED = {
    '1d': (lambda: DiracConv1d(4, 6, 3, padding=1), (2, 4, 9)),
    '2d': (lambda: DiracConv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
    '3d': (lambda: DiracConv3d(6, 4, 3), (2, 6, 5, 5, 5)),
    'parametrized': (lambda: dirac_of(nn.Conv2d(4, 4, 3)), (2, 4, 8, 8)),
    'network': (lambda: small().float(), (2, 3, 16, 16)),
}
CLOSE = {'rtol': 1e-4, 'atol': 1e-5}


def forms(kind):
    """Returns a module, inputs, and the outputs of the folded module."""
    make, shape = UNFOLDED[kind]
    module, inputs = make().eval(), torch.randn(shape)
    with torch.no_grad():
        return module, inputs, fold(module)(inputs)


@pytest.mark.parametrize(
    ('kind', 'strict'), [*((kind, False) for kind in UNFOLDED), ('2d', True)]
)
def test_torch_export_equals_folded_module(kind, strict):
    module, inputs, expected = forms(kind)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (inputs,), strict=strict), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(inputs), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize('kind', UNFOLDED)
def test_onnx_export_equals_folded_module(kind):
    module, inputs, expected = forms(kind)
    program = torch.onnx.export(module, (inputs,), dynamo=True, verbose=False, input_names=['x'])
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {'x': inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, **CLOSE)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('kind', UNFOLDED)
def test_traced_module_equals_folded_module_when_loaded(kind):
    module, inputs, expected = forms(kind)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (inputs,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(inputs), expected, **CLOSE)


def test_symbolic_trace_keeps_dirac_weight_as_leaf():
    traced = torch.fx.symbolic_trace(DiracConv2d(4, 4, 3))
    calls = [node.target for node in traced.graph.nodes if node.op == 'call_function']
    assert calls == [diracconv.dirac_weight, torch.conv2d]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make', [
    lambda: nn.Sequential(DiracConv2d(3, 4, 3, padding=1), nn.ReLU(), DiracConv2d(4, 4, 3)),
    lambda: fold(small().float()),
], ids=['layers', 'folded network'])
def test_quantization_aware_training_quantizes_w_hat(make):
    """W_hat is fake-quantized in training, and stored in 8 bits per channel afterwards."""
    network, (inputs, _) = make().train(), batch(dtype=torch.float32)
    expected = network(inputs).detach()
    prepared = prepare_qat_fx(network, get_default_qat_qconfig_mapping('x86'), (inputs,))
    prepared(inputs).pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in prepared.parameters())
    int8 = convert_fx(prepared.eval())
    assert 'dirac_weight' not in int8.code
    assert 'quantize_per_tensor' in int8.code
    assert (int8(inputs) - expected).abs().max() < 0.1 * expected.abs().max()
