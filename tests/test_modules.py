"""Network as a chain of modules: results, hooks, state dicts, tools, and folding."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim import swa_utils
from torchvision.models.feature_extraction import create_feature_extractor

from diracconv import DiracConv1d, DiracConv2d, DiracConv3d
from diracnet import DiracNet, define_diracnet
from diracnets.folding import fold
from diracnets.network import Network


@pytest.fixture
def params():
    """Parameters of a small DiracNet in float64."""
    torch.manual_seed(0)
    return {name: p.detach().double() for name, p in
            define_diracnet(10, 0.5, 'CIFAR10')[1].items()}


@pytest.mark.parametrize(('arguments', 'size'), [
    ((10, 0.5, 'CIFAR10'), 16), ((18, 0.125, 'ImageNet', 5), 32),
])
@pytest.mark.parametrize('kind', ['batched', 'layer by layer', 'checkpointing', 'traced'])
def test_network_trains_with_same_bits_as_function(arguments, size, kind):
    torch.manual_seed(0)
    f, params = define_diracnet(*arguments)
    network = Network(f, {name: p.clone() for name, p in params.items()}, kind == 'checkpointing')
    model = torch.fx.symbolic_trace(network) if kind == 'traced' else network
    if kind == 'layer by layer':
        network.group0.register_forward_hook(lambda *_: None)
    assert list(network.state_dict()) == list(params)
    inputs, labels = torch.randn(4, 3, size, size), torch.arange(4)
    learned = [p for p in params.values() if p.requires_grad]
    steps = {model: torch.optim.SGD(network.parameters(), 0.1),
             lambda x: f(x, params, True): torch.optim.SGD(learned, 0.1)}
    for _ in range(2):
        for forward, optimizer in steps.items():
            optimizer.zero_grad()
            F.cross_entropy(forward(inputs), labels).backward()
            optimizer.step()
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in params.items())
    assert params['fc.bias'].abs().min() > 0
    assert torch.equal(network.eval()(inputs), f(inputs, params, False))


def test_network_raises_when_function_or_params_are_of_another_model(params):
    f, _ = define_diracnet(10, 0.5, 'CIFAR10')
    with pytest.raises(ValueError, match='expected the function that define_diracnet returned'):
        Network(lambda inputs, params, mode: inputs, params)
    with pytest.raises(ValueError, match='conv is .8, 3, 3, 3., expected .16, 3, 3, 3.'):
        Network(define_diracnet(10, 1, 'CIFAR10')[0], params)
    incomplete = {name: p for name, p in params.items() if name != 'group0.block0.alpha'}
    for make in (Network.from_params, lambda params: Network(f, params)):
        with pytest.raises(ValueError, match='group0.block0.alpha is missing'):
            make(incomplete)
    with pytest.raises(RuntimeError, match='group0.block0.conv.weight'):
        Network(f, params).load_state_dict({n: t for n, t in params.items()
                                            if n != 'group0.block0.conv'})


def test_network_shares_params_and_loads_state_dicts_of_wrappers(params):
    network = Network.from_params(params)
    assert network.group0.block0.conv.weight.data_ptr() == params['group0.block0.conv'].data_ptr()
    assert all(p.requires_grad for p in network.parameters())
    other = Network(*define_diracnet(10, 0.5, 'CIFAR10'))
    file = io.BytesIO()
    torch.save(nn.DataParallel(other).state_dict(), file)
    file.seek(0)
    nn.DataParallel(network).load_state_dict(torch.load(file))
    state = network.state_dict()
    assert all(torch.equal(state[name], t.double()) for name, t in other.state_dict().items())
    assert type(fold(swa_utils.AveragedModel(network))) is DiracNet


def test_network_calls_hooks_of_every_module_with_values_of_the_function(params):
    """Also where the next layer works in place when there are no hooks."""
    network = Network.from_params(params).eval()
    inputs = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    outputs, gradients = {}, {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out}))
        module.register_full_backward_hook(lambda m, i, o, name=name: gradients.update({name: o}))
    network(inputs).sum().backward()
    assert outputs.keys() == gradients.keys() == {name for name, _ in network.named_modules()}
    x = F.conv2d(inputs, params['conv'], padding=1)
    torch.testing.assert_close(outputs['conv'], x)
    x = F.batch_norm(x, params['bn.running_mean'], params['bn.running_var'],
                     params['bn.weight'], params['bn.bias'])
    torch.testing.assert_close(outputs['bn'], x)
    torch.testing.assert_close(outputs['group0.block0.relu'], x.clamp(min=0))
    expected = params['fc.weight'].sum(0) / 16
    torch.testing.assert_close(gradients['avg_pool'][0][0].flatten(), expected * 16)
    network.zero_grad()


def test_network_calls_hooks_of_groups_when_checkpointing(params):
    network = Network.from_params(params, checkpointing=True)
    seen = []
    network.group1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    network(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    assert seen == [(4, 16, 8, 8)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_network_equals_its_layers_when_autocast(params, dtype):
    network = Network.from_params(params).to(dtype).eval()
    inputs = torch.randn(4, 3, 16, 16, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(network(inputs), nn.Sequential.forward(network, inputs))


class Cast(nn.Module):
    """Casts its input."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, inputs):
        return inputs.to(self.dtype)


def test_network_equals_its_layers_when_dtypes_differ(params):
    network = Network.from_params(params).eval()
    network.group0 = nn.Sequential(Cast(torch.bfloat16), network.group0.bfloat16(),
                                   Cast(torch.float64))
    inputs = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(network(inputs), nn.Sequential.forward(network, inputs))


def test_network_state_dict_round_trips_when_head_has_names_of_blocks(params):
    network = Network.from_params(params)
    network.fc = nn.Sequential(OrderedDict(conv=DiracConv2d(32, 5, 1)))
    state = {f'net.{name}': t for name, t in network.state_dict().items()}
    assert 'net.fc.conv.alpha' in state
    assert 'net.group0.block0.alpha' in state
    around = nn.ModuleDict({'net': copy.deepcopy(network)})
    nn.init.zeros_(around.net.fc.conv.alpha)
    assert list(around.state_dict()) == list(state)
    around.load_state_dict(state)
    assert torch.equal(around.net.fc.conv.alpha, network.fc.conv.alpha)


def test_network_keeps_tensors_that_a_subclass_of_batch_norm_returns(params):
    class Same(nn.BatchNorm2d):
        def forward(self, inputs):
            return inputs

    network = Network.from_params(params).eval()
    network.conv, network.bn = nn.Identity(), Same(8)
    inputs = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    original = inputs.clone()
    network(inputs)
    assert torch.equal(inputs, original)


@pytest.mark.parametrize('name', ['bn', 'group1.block0.bn'])
def test_network_keeps_statistics_of_batch_norm_in_evaluation_mode(params, name):
    network = Network.from_params({name: p.clone() for name, p in params.items()}).train()
    network.get_submodule(name).eval()
    network(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    same = {key for key, t in network.state_dict().items() if torch.equal(t, params[key])}
    assert same == {key for key in params if 'running' not in key or key.startswith(f'{name}.run')}


def test_network_uses_replaced_parametrized_and_shared_layers(params):
    """Modules that W_hat of the whole model does not include are called as they are."""
    network = Network.from_params(params).eval()
    inputs = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    network.group0.block1 = network.group0.block0
    network.group1.block1.conv.padding_mode = 'circular'
    network.group1.block1.conv._reversed_padding_repeated_twice = [1] * 4
    network.group2.block0.conv = nn.Conv2d(16, 32, 3, padding=1, groups=2).double()
    parametrize.register_parametrization(network.group2.block1.conv, 'weight', Negative())
    network.group2.block1.relu = nn.Identity()
    expected = nn.Sequential.forward(network, inputs)
    with torch.no_grad():
        torch.testing.assert_close(network(inputs), expected)
    assert network[:3](inputs).shape == (2, 8, 16, 16)
    assert network[-1] is network.fc
    before = inputs.clone()
    network.conv = network.bn = nn.Identity()
    network.group0.block0.conv = nn.Conv2d(3, 8, 3, padding=1).double()
    network.group0.block1 = nn.Identity()
    network(inputs)
    assert torch.equal(inputs, before)


class Negative(nn.Module):
    """A parametrization that changes the sign."""

    def forward(self, weight):
        return -weight


def test_network_supports_pruning_and_sync_batch_norm(params):
    network = Network.from_params({name: p.clone() for name, p in params.items()}).eval()
    inputs = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    convs = {n: m for n, m in network.named_modules() if isinstance(m, DiracConv2d)}
    assert len(convs) == 6
    expected = network(inputs)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synchronized.modules()) == 7
    assert list(synchronized.state_dict()) == list(params)
    torch.testing.assert_close(synchronized(inputs), expected)
    assert type(fold(synchronized)) is DiracNet
    f, _ = define_diracnet(10, 0.5, 'CIFAR10')
    for conv in convs.values():
        prune.l1_unstructured(conv, 'weight', 0.5)
    masked = network(inputs)
    for conv in convs.values():
        prune.remove(conv, 'weight')
    pruned = network.state_dict()
    for name in convs:
        weight, kept = params[name], pruned[name] != 0
        assert kept.sum() == weight.numel() // 2
        assert torch.equal(kept, weight.abs() > weight.abs().median())
        params[name] = pruned[name]
    torch.testing.assert_close(network(inputs), f(inputs, params, False))
    torch.testing.assert_close(masked, network(inputs))


def test_network_supports_update_bn_when_averaged(params):
    network = Network.from_params(params)
    inputs = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    averaged = swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    swa_utils.update_bn([inputs[:4], inputs[4:]], averaged)
    stem = F.conv2d(inputs, params['conv'], padding=1)
    mean = averaged.module.state_dict()['bn.running_mean']
    torch.testing.assert_close(mean, stem.mean((0, 2, 3)))
    assert network.bn.running_mean.abs().sum() == 0


# ---------------------------------------------------------------- folding


@pytest.fixture
def network():
    """A small Network in float64 with running statistics of some batches."""
    torch.manual_seed(0)
    network = Network(*define_diracnet(10, 0.5, 'CIFAR10')).double()
    for name, parameter in network.named_parameters():
        if name.endswith('bn.weight'):
            nn.init.uniform_(parameter, 0.5, 1.5)
    for _ in range(20):
        network(torch.rand(8, 3, 16, 16, dtype=torch.float64))
    return network.eval()


def check_folds(module, inputs):
    """Returns the folded module, whose outputs are those of the module and its layer by layer."""
    expected = module(inputs)
    folded = fold(module, torch.float64)
    outputs = folded(inputs)
    for output, value in zip(outputs.values(), expected.values(), strict=True) if isinstance(
            expected, dict) else [(outputs, expected)]:
        assert value.std() > 0
        torch.testing.assert_close(output, value, rtol=1e-9, atol=1e-9)
    return folded


def count(module, kind):
    return sum(isinstance(layer, kind) for layer in module.modules())


def _square(module, args, output):
    return output**2


def set_padding_mode(net):
    conv = net.group1.block1.conv
    net.group1.block1.conv = DiracConv2d(16, 16, 3, padding=1, bias=False, padding_mode='reflect')
    net.group1.block1.conv.double().load_state_dict(conv.state_dict())


class Halved(Network):
    """A network that overrides forward."""

    def forward(self, inputs):
        return super().forward(inputs) / 2


class Residual(nn.Sequential):
    """A group with a skip connection."""

    def forward(self, inputs):
        return inputs + super().forward(inputs)


class Linear(nn.Linear):
    """A layer with the name and the arguments of another one."""

    def forward(self, inputs):
        return 3 * super().forward(inputs)


CHANGES = {  # name: (change in place, number of batch norms that stay)
    'eps': (lambda net: setattr(net.group1.block0.bn, 'eps', 1e-2), 0),
    'eps of the stem': (lambda net: setattr(net.bn, 'eps', 1e-2), 0),
    'dilation': (lambda net: vars(net.group0.block0.conv).update(dilation=(2, 2), padding=(2, 2)),
                 0),
    'stride': (lambda net: setattr(net.group0.block0.conv, 'stride', (2, 2)), 0),
    'padding_mode': (set_padding_mode, 0),
    'pooling': (lambda net: setattr(net, 'group1_pool', nn.AvgPool2d(2)), 0),
    'pooling size': (lambda net: setattr(net.group2_pool, 'kernel_size', 3), 0),
    'head': (lambda net: setattr(net, 'fc', nn.Identity()), 0),
    'head of layers': (lambda net: setattr(net, 'fc', nn.Sequential(
        nn.Dropout(), nn.Linear(32, 5).double())), 0),
    'activation': (lambda net: setattr(net.group0.block1, 'relu', nn.GELU()), 0),
    'one layer more': (lambda net: net.add_module('last', nn.Softmax(1)), 0),
    'one layer less': (lambda net: delattr(net, 'group1_pool'), 0),
    'shared block': (lambda net: setattr(net.group0, 'block1', net.group0.block0), 0),
    'a layer of a subclass': (
        lambda net: setattr(net.group0.block0.conv, '__class__', type('Mine', (DiracConv2d,), {})),
        0),
    'another forward': (lambda net: setattr(net, '__class__', Halved), 0),
    'container with another forward': (
        lambda net: setattr(net, 'group0', Residual(OrderedDict(net.group0.named_children()))), 0),
    'layer with the same name': (lambda net: setattr(net.fc, '__class__', Linear), 0),
    'hook': (lambda net: net.group1.block0.conv.register_forward_hook(_square), 1),
    'hook before': (lambda net: net.fc.register_forward_pre_hook(
        lambda module, args: (args[0] ** 2,)), 0),
}


@pytest.mark.parametrize('case', CHANGES)
def test_fold_equals_network_when_modules_changed(network, case):
    change, norms = CHANGES[case]
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    original = network(images)
    change(network)
    folded = check_folds(network.eval(), images)
    same = original.shape == folded(images).shape and torch.allclose(folded(images), original)
    assert same == (case == 'a layer of a subclass')
    assert count(folded, nn.BatchNorm2d) == norms
    assert count(folded, DiracConv2d) == 0
    assert count(check_folds(nn.Sequential(network), images), nn.BatchNorm2d) == norms


def test_fold_network_returns_diracnet_or_same_names_inside_another_module(network):
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    network.register_forward_hook(_square)
    folded = check_folds(network, images)
    assert type(folded) is DiracNet
    inside = check_folds(nn.ModuleDict({'net': network})['net'], images)
    assert type(inside) is DiracNet
    around = check_folds(nn.Sequential(OrderedDict(net=network, softmax=nn.Softmax(1))), images)
    assert torch.equal(around.net.group1.block0.conv.weight,
                       folded.features.group1.block0.conv.weight)
    assert around.net.group1.block0.conv.bias is not None
    head = check_folds(network[:-2], images)
    assert list(dict(head.named_children())) == list(dict(network[:-2].named_children()))


class Segmentation(nn.Module):
    """A decoder on the features of an encoder whose children it calls."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head = net, nn.Conv2d(16, 2, 1).double()

    def forward(self, images):
        net = self.net
        x = net.group0(net.bn(net.conv(images)))
        y = net.group1(net.group1_pool(x))
        return self.head(F.interpolate(y, scale_factor=2.0)) + x.mean(1, keepdim=True)


def test_fold_folds_encoder_whose_children_are_called(network):
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    folded = check_folds(Segmentation(network), images)
    used = [folded.net.group0, folded.net.group1]
    assert sum(count(group, nn.BatchNorm2d) for group in used) == count(folded.net.bn,
                                                                        nn.BatchNorm2d) == 0


@pytest.mark.parametrize('options', [{}, {'tracer_kwargs': {'leaf_modules': [DiracConv2d]}}])
def test_fold_folds_feature_extractor(network, options):
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    network.group1.block0.conv = DiracConv2d(8, 16, 3, 2, padding=1, groups=4).double()
    nodes = {'group0': 'fine', 'group2.block0.bn': 'coarse'}
    extractor = create_feature_extractor(network, nodes, **options).eval()
    for module in (extractor, nn.ModuleDict({'body': extractor})['body']):
        folded = check_folds(module, images)
        assert count(folded, nn.Conv2d) == 6
        assert count(folded, DiracConv2d) == count(folded, nn.BatchNorm2d) == 0
    assert count(extractor, nn.BatchNorm2d) == 6
    around = create_feature_extractor(fold(network[:-1], torch.float64), ['group1'])
    torch.testing.assert_close(around(images)['group1'], network[:5](images), rtol=1e-9, atol=1e-9)


def test_fold_folds_symbolic_trace_of_shared_layer():
    conv = DiracConv2d(4, 4, 3, padding=1).double()
    module = nn.Sequential(conv, nn.ReLU(), conv, nn.BatchNorm2d(4).double()).eval()
    check_folds(torch.fx.symbolic_trace(module), torch.randn(2, 4, 8, 8, dtype=torch.float64))


def test_fold_folds_symbolic_traces_of_layers_with_padding_mode_and_bias():
    layers = nn.Sequential(DiracConv1d(4, 6, 3, padding=1, padding_mode='circular'),
                           nn.BatchNorm1d(6), DiracConv1d(6, 6, 1, bias=False)).double().eval()
    inputs = torch.randn(2, 4, 9, dtype=torch.float64)
    folded = check_folds(torch.fx.symbolic_trace(layers), inputs)
    assert count(folded, nn.BatchNorm1d) == 0
    assert count(folded, nn.Conv1d) == 2


@pytest.mark.parametrize('layer', [
    DiracConv1d(4, 6, 3, groups=2), DiracConv2d(4, 6, 3, padding=1),
    DiracConv3d(4, 6, (1, 2, 3), padding=1, padding_mode='circular'),
])
def test_dirac_conv_equals_scripted_layer(layer):
    inputs = torch.randn(2, 4, *[8] * (layer.weight.dim() - 2))
    scripted = torch.jit.script(layer)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for other in (scripted, torch.jit.load(file)):
        torch.testing.assert_close(other(inputs), layer(inputs))
    half = copy.deepcopy(layer).to(torch.float16)
    assert torch.equal(torch.jit.script(half).transform_weight(), half.transform_weight())
