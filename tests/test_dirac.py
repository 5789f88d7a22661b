"""dirac(): W_hat in any model, against equation 3, trained and folded."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from diracconv import (
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    DiracParametrization,
    dirac,
)
from diracnets.folding import fold
from reference import slow_w_hat

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _chain(conv, norm, pool):
    return nn.Sequential(
        conv(2, 6, 3, padding=1), norm(6), nn.ReLU(), conv(6, 6, 3, padding='same', groups=3),
        nn.ReLU(), conv(6, 4, (2,) * int(conv.__name__[-2]), stride=2, padding_mode='zeros'),
        norm(4), pool(1), nn.Flatten(), nn.Linear(4, 5),
    )


def _vgg11_bn():
    network = torchvision.models.vgg11_bn(num_classes=5, init_weights=False)
    network.classifier = nn.Linear(512 * 7 * 7, 5)  # its own has a hundred million parameters
    return network


NETWORKS = {  # name: (network, shape of its inputs)
    'vgg11_bn': (_vgg11_bn, (2, 3, 32, 32)),
    'resnet18': (lambda: torchvision.models.resnet18(num_classes=5), (2, 3, 40, 40)),
    'mobilenet_v2': (lambda: torchvision.models.mobilenet_v2(num_classes=5), (2, 3, 40, 40)),
    'Conv1d': (lambda: _chain(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d), (4, 2, 11)),
    'Conv3d': (lambda: _chain(nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d), (4, 2, 5, 6, 7)),
}


def convolutions(network):
    return {name: m for name, m in network.named_modules() if isinstance(m, CONVS)}


def perturb(network):
    """Randomizes alpha, beta and running statistics, so that each affects the outputs."""
    for name, tensor in network.state_dict().items():
        if name.endswith(('alpha', 'beta', 'running_mean')):
            nn.init.uniform_(tensor, 0.1, 0.6)
        elif name.endswith('running_var'):
            nn.init.uniform_(tensor, 0.5, 2)
    return network


def with_slow_w_hat(plain, network):
    """Returns a float64 copy of the plain model with the filters of equation 3."""
    plain = copy.deepcopy(plain).double()
    state = {name: tensor for name, tensor in network.state_dict().items()
             if not name.endswith(('alpha', 'beta'))}
    plain.load_state_dict(state)
    for name, conv in convolutions(plain).items():
        layer = network.get_submodule(name)
        conv.weight.data = slow_w_hat(layer.weight, layer.alpha, layer.beta, layer.groups)
    return plain


@pytest.mark.parametrize('name', NETWORKS)
def test_dirac_equals_equation_3_trains_and_folds(name):
    build, shape = NETWORKS[name]
    plain = build()
    network = dirac(copy.deepcopy(plain))
    outs = sum(conv.out_channels for conv in convolutions(plain).values())
    assert outs == {'vgg11_bn': 2752, 'resnet18': 4800, 'mobilenet_v2': 17056}.get(name, 16)
    assert sum(p.numel() for p in network.parameters()) == 2 * outs + sum(
        p.numel() for p in plain.parameters())
    layers = convolutions(network)
    assert layers.keys() == convolutions(plain).keys()
    assert {type(m) for m in layers.values()} <= {DiracConv1d, DiracConv2d, DiracConv3d}
    for key, tensor in plain.state_dict().items():
        assert torch.equal(network.state_dict()[key], tensor)
    assert all((m.alpha == 1).all() and (m.beta == 0.1).all() for m in layers.values())

    inputs, labels = torch.randn(shape), torch.arange(shape[0]) % 5
    loss = F.cross_entropy(network(inputs), labels)
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    for layer in layers.values():
        assert (layer.alpha != 1).any()
        assert (layer.beta != 0.1).any()

    network, inputs = perturb(network).double().eval(), inputs.double()
    with torch.no_grad():
        logits = network(inputs)
        expected = with_slow_w_hat(plain, network).eval()(inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        folded = fold(network, torch.float64)
        torch.testing.assert_close(folded(inputs), logits, rtol=1e-9, atol=1e-9)
        difference = folded.float()(inputs.float()) - logits
        assert difference.abs().max() < 1e-4 * logits.abs().max()
    assert {type(m) for m in convolutions(folded).values()} <= set(CONVS)
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())


class Padded(nn.Conv2d):
    """A subclass that overrides forward to pad on one side."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (2, 0, 2, 0)), self.weight, self.bias)


def test_dirac_keeps_forward_when_conv_is_subclass():
    network = nn.Sequential(Padded(3, 4, 3, dtype=torch.float64), nn.ReLU()).eval()
    weight = network[0].weight.detach().clone()
    inputs = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    dirac(network)
    assert isinstance(network[0], Padded)
    w_hat = slow_w_hat(weight, torch.ones(4), torch.full((4,), 0.1).double(), 1)
    expected = F.relu(F.conv2d(F.pad(inputs, (2, 0, 2, 0)), w_hat, network[0].bias))
    torch.testing.assert_close(network(inputs), expected)
    folded = fold(network, torch.float64)
    assert set(folded.state_dict()) == {'0.weight', '0.bias'}
    torch.testing.assert_close(folded(inputs), expected)


def test_dirac_keeps_forward_when_it_was_replaced_in_the_layer():
    conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    replaced = functools.partial(nn.Conv2d.forward, conv)
    conv.forward = lambda x: 2 * replaced(x)
    weight, inputs = conv.weight.detach().clone(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    w_hat = slow_w_hat(weight, torch.ones(4), torch.full((4,), 0.1).double(), 1)
    expected = 2 * F.conv2d(inputs, w_hat, conv.bias)
    torch.testing.assert_close(dirac(conv)(inputs), expected)


def test_dirac_keeps_hooks_and_references():
    shared, calls = nn.Conv2d(4, 4, 3, padding=1), []
    network = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({'again': shared})['again'])
    weight, beside = shared.weight, [shared]
    handle = shared.register_forward_hook(lambda *_: calls.append(1))
    assert dirac(network) is network
    assert network[0] is network[2] is shared is beside[0]
    assert type(shared) is DiracConv2d
    assert shared.weight is weight  # which an optimizer may know
    assert len(list(network.parameters())) == 4
    network(torch.randn(1, 4, 5, 5))
    assert len(calls) == 2
    handle.remove()
    assert type(pickle.loads(pickle.dumps(network))[2]) is DiracConv2d


def test_dirac_converts_model_when_it_is_one_convolution():
    conv = nn.Conv1d(2, 3, 5)
    assert dirac(conv) is conv
    assert type(conv) is DiracConv1d
    assert type(fold(conv)) is nn.Conv1d


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dirac_parameters_have_dtype_and_requires_grad_of_weight(dtype):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Padded(4, 4, 3), nn.Conv2d(4, 4, 1)).to(dtype)
    network[0].requires_grad_(False)
    network[1].weight.requires_grad_(False)
    assert not any(module.training for module in dirac(network.eval()).modules())
    assert {p.dtype for p in network.parameters()} == {dtype}
    learn = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learn == {'1.bias', '2.weight', '2.bias', '2.alpha', '2.beta'}
    assert dirac(nn.Conv2d(3, 4, 3, device='meta')).alpha.device.type == 'meta'


def test_dirac_converts_selected_convolutions_once():
    network = nn.Sequential(nn.Conv2d(3, 4, 7), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3),
                            DiracConv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    parametrize.register_parametrization(network[4], 'weight', DiracParametrization(network[4]))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    names = []
    dirac(network, lambda name, conv: names.append(name) or conv.kernel_size == (3, 3))
    assert names == ['0', '1', '3', '4']
    assert [type(m) for m in network[:4]] == [nn.Conv2d, DiracConv2d, nn.ConvTranspose2d,
                                             DiracConv2d]
    after = network.state_dict()
    assert after.keys() - before.keys() == {'1.alpha', '1.beta'}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    dirac(network, lambda name, conv: name != '0')  # once more changes nothing
    assert network.state_dict().keys() == after.keys()


@pytest.mark.filterwarnings('ignore:.*weight_norm. is deprecated')
@pytest.mark.parametrize('norm', [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_dirac_equals_equation_3_when_weight_is_parametrized(norm):
    conv = norm(nn.Conv2d(3, 4, 3).double())
    w_hat = slow_w_hat(conv.weight, torch.ones(4), torch.full((4,), 0.1).double(), 1)
    inputs = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(dirac(conv)(inputs), F.conv2d(inputs, w_hat, conv.bias))


def test_dirac_keeps_outputs_when_alpha_is_0_and_beta_is_norm():
    network = _chain(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d).double().eval()
    inputs = torch.randn(4, 2, 11, dtype=torch.float64)
    expected = network(inputs)
    for layer in convolutions(dirac(network)).values():
        layer.alpha.data.zero_()
        layer.beta.data.copy_(layer.weight.flatten(1).norm(dim=1))
    torch.testing.assert_close(network(inputs), expected)


@pytest.mark.parametrize(('network', 'which', 'message'), [
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3)), None,
     'LazyConv2d .* Conv1d, Conv2d or Conv3d'),
    (nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose2d(3, 4, 3)), None,
     'Sequential: .* no Conv1d, Conv2d or Conv3d'),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), lambda name, conv: conv.groups > 1,
     'Sequential: .* `which` .* no Conv1d, Conv2d or Conv3d'),
])
def test_dirac_raises_and_changes_nothing_when_no_conv_is_convertible(network, which, message):
    with pytest.raises(ValueError, match=message):
        dirac(network, which)
    assert not any(isinstance(m, DiracConv2d) for m in network.modules())
