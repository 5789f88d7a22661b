"""The Triton kernels of diracnets/fused_weights.py in Triton's interpreter, on the CPU.

tests/test_fused_weights.py runs this file in a process with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diracconv import dirac_weight
from diracnet import define_diracnet
from diracnets import fused_weights
from diracnets.network import Network, flat_name

SHAPES, GROUPS = [(8, 5, 3, 3), (4, 8, 3, 3), (6, 2, 3, 3)], (1, 1, 2)
VIEWS = {'view', 'split_with_sizes', 'permute', 'detach', 'alias', 'empty', 'empty_like'}


def make_params():
    """Returns weights, alphas and betas of three layers; one filter is zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, *2 * [(out_channels,) for out_channels, *_ in SHAPES]]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    params[0][3] = 0
    return [p.requires_grad_() for p in params]


def layer_by_layer(params):
    return [dirac_weight(params[i], params[3 + i], params[6 + i], GROUPS[i]) for i in range(3)]


@pytest.mark.parametrize('channels_last', [False, True])
def test_fused_weights_equal_those_of_each_layer_in_float64(channels_last):
    params, generator = make_params(), torch.Generator().manual_seed(1)
    exact = [p.detach().double().requires_grad_() for p in params]
    w_hats, expected = (fused_weights.FusedWeights.apply(GROUPS, None, channels_last, *params),
                        layer_by_layer(exact))
    grads = [torch.randn(w_hat.shape, generator=generator) for w_hat in w_hats]
    results = (*w_hats, *torch.autograd.grad(w_hats, params, grads))
    expected = (*expected, *torch.autograd.grad(expected, exact, [g.double() for g in grads]))
    for tensor, value in zip(results, expected):
        torch.testing.assert_close(tensor.double(), value, rtol=1e-6, atol=1e-6)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert all(w_hat.is_contiguous(memory_format=memory_format) for w_hat in w_hats)


def test_second_gradients_of_fused_weights_equal_those_of_each_layer():
    params = make_params()
    needed = [*params[:4], *params[5:]]  # one alpha is frozen
    params[4].requires_grad_(False)
    results = []
    for w_hats in (fused_weights.FusedWeights.apply(GROUPS, None, True, *params),
                   layer_by_layer(params)):
        first = torch.autograd.grad(sum((w**3).sum() for w in w_hats), needed, create_graph=True)
        results.append(torch.autograd.grad(sum((g[:1] ** 2).sum() for g in first), needed))
    for tensor, value in zip(*results):
        torch.testing.assert_close(tensor, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_network_with_fused_weights_equals_the_function(monkeypatch, memory_format, checkpointing):
    """The first call also compares the kernels with the arithmetic, inside checkpoints too."""
    def are_fusible(convs):
        return fused_weights._kernels_work(convs[0].weight.device)

    torch.manual_seed(0)
    fused_weights._kernels_work.cache_clear()
    f, params = define_diracnet(10, 0.5, 'CIFAR10')
    network, inputs = Network(f, params, checkpointing), torch.randn(4, 3, 8, 8)
    monkeypatch.setattr(fused_weights, '_are_fusible', are_fusible)
    launched, launch = [], fused_weights._launch
    monkeypatch.setattr(fused_weights, '_launch',
                        lambda *given: (launched.append(given[0]), launch(*given)))
    logits = network(inputs.contiguous(memory_format=memory_format))
    expected = f(inputs, params, True)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, params[flat_name(name)].grad,
                                   rtol=1e-4, atol=1e-4)
    assert launched.count(fused_weights._backward_kernel) == 1 + (6 if checkpointing else 1)


def test_transforms_of_fused_weights_equal_those_of_each_layer(monkeypatch):
    torch.manual_seed(0)
    network, inputs = Network(*define_diracnet(10, 0.5, 'CIFAR10')), torch.randn(2, 3, 8, 8)
    network.eval()
    weight = network.group0.block0.conv.weight

    def results():
        logits = network(inputs)
        basis = torch.eye(logits.numel()).view(-1, *logits.shape)[:3]
        return (*torch.autograd.grad(logits, weight, basis, is_grads_batched=True),
                torch.func.jacrev(lambda x: network(x).sum(0))(inputs),
                torch.func.vmap(lambda x: network(x[None]))(inputs))

    expected = results()
    are_fusible = fused_weights._are_fusible
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    assert fused_weights._kernels_work(torch.device('cpu'))
    for tensor, value in zip(results(), expected):
        torch.testing.assert_close(tensor, value, rtol=1e-4, atol=1e-4)
    assert are_fusible([network.group0.block0.conv])


class Operators(TorchDispatchMode):
    """Records the names of the operators that are called, except views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.__name__.split('.')[0]
        if name not in VIEWS:
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


def test_fused_weights_launch_few_kernels(monkeypatch):
    """A kernel and three concatenations in each pass, whatever the number of layers."""
    launched = []
    monkeypatch.setattr(fused_weights, '_launch', lambda kernel, *others: launched.append(kernel))
    params = [p for shape in ((8, 8, 3, 3), (8,), (8,)) for p in
              (torch.randn(shape, requires_grad=True) for _ in range(24))]
    with Operators() as operators:
        w_hats = fused_weights.FusedWeights.apply((1,) * 24, torch.bfloat16, True, *params)
        grads = [torch.empty_like(w_hat) for w_hat in w_hats]
        torch.autograd.backward(w_hats, grads)
    assert launched == [fused_weights._forward_kernel, fused_weights._backward_kernel]
    assert operators.names == 6 * ['cat']  # eight launches


@pytest.mark.parametrize('fault', ['error', 'result'])
def test_kernels_that_fail_are_not_used(monkeypatch, fault):
    def launch(kernel, groups, channels_last, weights, *tensors):
        if fault == 'error':
            raise RuntimeError('no C compiler')
        tensors[0].zero_()

    fused_weights._kernels_work.cache_clear()
    assert fused_weights._kernels_work(torch.device('cpu'))
    fused_weights._kernels_work.cache_clear()
    monkeypatch.setattr(fused_weights, '_launch', launch)
    reason = {'error': 'RuntimeError: no C compiler', 'result': 'AssertionError: '}[fault]
    with pytest.warns(UserWarning, match=f'without Triton, which is slower .{reason}'):
        assert not fused_weights._kernels_work(torch.device('cpu'))
    fused_weights._kernels_work.cache_clear()
