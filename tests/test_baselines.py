"""The networks DiracNets are measured against: published sizes, and sums done another way."""

import itertools
import math
import shlex

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import diracnets
from diracconv import DiracConv2d
from diracnet import DiracNet, define_diracnet
from diracnets.fold import fold
from diracnets.models import densenet, diracnet_v1, diverse_branch
from diracnets.models.blocks import BLOCKS
from diracnets.models.diverse_branch import ACBlock, DiverseBranchBlock
from diracnets.models.plain import PlainNet
from diracnets.models.registry import ARCHITECTURES, count_multiply_adds
from experiments.sizes import NETWORKS, row
from pages import text_of
from training.options import RECIPE_FOLDER

PLAIN_DENSE = {'bottleneck': False, 'growth': 12, 'layers': 40}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build_on_meta(name, dataset, **options):
    with torch.device('meta'):
        return diracnets.create_model(name, dataset, **options)


def count(network):
    return sum(p.numel() for p in network.parameters())


def perturb(network):
    """Gives every tensor a value that it has not at the start; batch norms among them."""
    for name, tensor in network.state_dict().items():
        if name.endswith('running_var'):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif tensor.is_floating_point() and tensor.dim() == 1 and 'alpha' not in name:
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return network


def batch_norm(x, state, prefix):
    """Batch norm in evaluation, from the definition."""
    mean, var, weight, bias = (
        state[f'{prefix}.{name}'].view(-1, 1, 1)
        for name in ('running_mean', 'running_var', 'weight', 'bias')
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


# ---------------------------------------------------------------- published sizes


@pytest.mark.parametrize(('name', 'dataset', 'options', 'parameters'), [
    ('wide-resnet', 'CIFAR10', {}, 36_479_194),  # table 5 of arXiv 1605.07146: 36.5M
    ('wide-resnet', 'CIFAR10', {'depth': 16, 'width': 4}, 2_748_890),  # 2.8M there
    ('densenet', 'CIFAR10', {}, 769_162),
    ('densenet', 'CIFAR100', {}, 800_032),
    ('densenet', 'CIFAR10', {**PLAIN_DENSE, 'reduce': 1}, 1_059_298),
    ('densenet', 'CIFAR10', {**PLAIN_DENSE, 'reduce': 0.5}, 599_050),
    ('densenet', 'CIFAR10', {'layers': 190, 'growth': 40}, 25_624_430),
    ('densenet121', 'ImageNet', {}, 7_978_856),
    ('resnet34', 'ImageNet', {}, 21_797_672),
    ('alexnet', 'ImageNet', {}, 61_100_840),
    ('diracnet', 'CIFAR10', {'depth': 28, 'width': 10}, 36_450_090),
])
def test_parameters(name, dataset, options, parameters):
    assert count(build_on_meta(name, dataset, **options)) == parameters


@pytest.mark.parametrize(('name', 'base', 'dbb', 'deployed'), [
    ('resnet18', 11_689_512, 26_288_296, 11_684_712),
    ('resnet50', 25_557_032, 40_684_456, 25_530_472),
    ('mobilenet', 4_231_976, 4_372_183, 4_221_032),
])
def test_parameters_of_diverse_branches_in_training_and_deployed(name, base, dbb, deployed):
    networks = [build_on_meta(name, 'ImageNet', block=block) for block in BLOCKS]
    assert [count(network) for network in networks[:2]] == [base, dbb]
    assert [count(fold(network)) for network in networks] == [deployed] * 4


@pytest.mark.parametrize(('name', 'filters'), [  # of 3x3 and 5x5, the stem's left out
    ('resnet18', 4 * (64 + 128 + 256 + 512)), ('alexnet', 192 + 384 + 256 + 256),
    ('mobilenet', 32 + 64 + 128 + 128 + 256 + 256 + 6 * 512 + 1024),
])
def test_parameters_with_w_hat_are_two_more_for_each_filter(name, filters):
    network = build_on_meta(name, 'ImageNet', block='dirac')
    assert count(network) == count(build_on_meta(name, 'ImageNet')) + 2 * filters
    assert sum(m.out_channels for m in network.modules() if isinstance(m, DiracConv2d)) == filters


def test_plain_with_w_hat_is_a_diracnet():
    network = perturb(diracnets.create_model('plain', 'CIFAR10', depth=10, width=0.5, block='dirac'))
    f, params = define_diracnet(10, 0.5, 'CIFAR10')
    state = {
        name.removeprefix('features.').replace('conv.weight', 'conv').replace('conv.alpha', 'alpha')
        .replace('conv.beta', 'beta'): tensor.double()
        for name, tensor in network.state_dict().items() if 'tracked' not in name
    }
    assert {name: t.shape for name, t in state.items()} == {n: p.shape for n, p in params.items()}
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for mode in (False, True):
        logits = network.double().train(mode)(images)
        torch.testing.assert_close(f(images, state, mode), logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('dataset', 'depth', 'width'), [('CIFAR10', 28, 1), ('ImageNet', 18, 1)])
def test_topology_variants_have_the_parameters_of_a_diracnet_less_alpha_and_beta(
    dataset, depth, width
):
    _, params = define_diracnet(depth, width, dataset)
    expected = sum(
        tensor.numel() for name, tensor in params.items()
        if tensor.requires_grad and not name.endswith(('alpha', 'beta'))
    )
    for name in ('plain', 'dirac-init', 'resnet'):
        network = build_on_meta(name, dataset, depth=depth, width=width)
        assert count(network) == expected, name


@pytest.mark.parametrize(('name', 'weights'), [
    ('resnet18', torchvision.models.ResNet18_Weights),
    ('alexnet', torchvision.models.AlexNet_Weights),
    ('resnet50', torchvision.models.ResNet50_Weights),
    ('densenet121', torchvision.models.DenseNet121_Weights),
])
def test_multiply_adds_are_those_that_torchvision_publishes(name, weights):
    measured = count_multiply_adds(build_on_meta(name, 'ImageNet'), 224)
    assert round(measured / 1e9, 3) == weights.DEFAULT.meta['_ops']


def test_multiply_adds_of_mobilenet_are_the_papers():
    measured = count_multiply_adds(build_on_meta('mobilenet', 'ImageNet'), 224)
    assert round(measured / 1e6) == 569  # table 4 of arXiv 1704.04861


def test_table_of_the_docs_has_a_row_for_every_family():
    assert {name for name, *_ in NETWORKS} == ARCHITECTURES.keys()
    cells = row('resnet18', 'ImageNet', {'block': 'dbb'}, 'dbb')
    assert cells[2] == '26,288,296'
    assert cells[4:6] == ('11,684,712', '1,814.1')
    assert cells[6] == 'Ding et al., arXiv 2103.13425, section 4'
    assert cells[7] == '`python train.py --recipe dbb --model resnet18 --block dbb`'


# ---------------------------------------------------------------- choosing by name


@pytest.mark.parametrize(('arguments', 'options', 'expected'), [
    (('vgg', 'CIFAR10'), {}, "unknown model 'vgg': expected one of diracnet, diracnet-v1"),
    (('resnet18', 'CIFAR10'), {}, "resnet18 is not for 'CIFAR10': expected one of ImageNet"),
    (('densenet', 'ImageNet'), {}, "densenet is not for 'ImageNet'"),
    (('plain', 'MNIST'), {}, "plain is not for 'MNIST'"),
    (('plain', 'CIFAR10'), {'growth': 12}, 'plain takes no growth: expected of depth, width, bl'),
    (('resnet', 'CIFAR10'), {'block': 'dbb'}, 'resnet takes no block'),
    (('plain', 'CIFAR10'), {'block': 'vgg'}, "unknown block 'vgg': expected one of base, dbb, acb"),
    (('plain', 'CIFAR10'), {'depth': 17}, 'the nearest are 16 and 22'),
    (('plain', 'CIFAR10', 0), {}, 'num_classes 0: expected at least 1'),
    (('densenet', 'CIFAR10'), {'layers': 101}, 'the nearest are 100 and 106'),
    (('densenet', 'CIFAR10'), {'layers': 3}, 'the nearest are 10 and 16'),
    (('densenet', 'CIFAR10'), {'layers': 41, 'bottleneck': False}, 'the nearest are 40 and 43'),
    (('densenet', 'CIFAR10'), {'growth': 0}, 'growth 0: expected at least 1'),
    (('densenet', 'CIFAR10'), {'growth': 12.0}, 'growth 12.0: expected an integer'),
    (('densenet', 'CIFAR10'), {'layers': 100.0}, 'layers 100.0: expected an integer'),
    (('plain', 'CIFAR10'), {'depth': 16.0}, 'depth 16.0: expected an integer'),
    (('resnet18', 'ImageNet', 5.0), {}, 'num_classes 5.0: expected an integer'),
    (('diracnet-fast', 'CIFAR10'), {'activation': 'tanh'},
     "unknown activation 'tanh': expected one of relu, gelu, silu"),
    (('diracnet-fast', 'CIFAR10'), {'width': math.inf}, 'width inf: expected a number of at'),
    (('diracnet-fast', 'CIFAR10'), {'block': 'dbb'}, "block 'dbb': expected base or dirac, as the"),
    (('densenet', 'CIFAR10'), {'reduce': 0}, 'reduce 0: expected more than 0 and at most 1'),
    (('densenet', 'CIFAR10'), {'droprate': 1}, 'droprate 1: expected at least 0 and less than 1'),
    (('wide-resnet', 'CIFAR10'), {'droprate': -1}, 'droprate -1: expected at least 0'),
])
def test_refuses_with_what_was_expected(arguments, options, expected):
    with pytest.raises(ValueError, match='.') as refusal:
        diracnets.create_model(*arguments, **options)
    assert expected in str(refusal.value)


def test_differences_in_training_are_in_the_table():
    assert [n for n, family in ARCHITECTURES.items() if family.decay_all] == ['diracnet-v1']
    zeros = [n for n, family in ARCHITECTURES.items() if family.crop_padding == 'constant']
    assert zeros == ['densenet']


@pytest.mark.parametrize('path', sorted(RECIPE_FOLDER.glob('*')), ids=lambda path: path.stem)
def test_every_line_of_a_recipe_is_a_flag_and_its_source(path):
    title, *lines = path.read_text().splitlines()
    assert 'arXiv ' in title
    assert all(line.startswith('--') and '  # ' in line for line in lines)
    flags = [shlex.split(line, comments=True) for line in lines]
    assert all(len(words) <= 2 for words in flags)
    assert len({words[0] for words in flags}) == len(flags)
    given = {words[0][2:]: words[1] for words in flags if len(words) > 1}
    family = ARCHITECTURES[given['model']]
    assert given['dataset'] in family.kinds
    options = {
        name: type(default)(given[name])
        for name, default in family.options.items() if name in given
    }
    assert count(build_on_meta(given['model'], given['dataset'], **options)) > 0


def test_the_recipes_are_those_of_the_papers():
    assert {path.stem for path in RECIPE_FOLDER.glob('*')} == {
        'diracnet-cifar', 'diracnet-imagenet', 'wide-resnet', 'densenet', 'dbb', 'speedrun'
    }


# ---------------------------------------------------------------- every family trains and folds

SMALLEST = [
    ('diracnet', 'CIFAR10', {'depth': 10}),
    ('diracnet-v1', 'CIFAR10', {'depth': 10}),
    ('diracnet-v1', 'ImageNet', {'depth': 18, 'width': 0.25}),
    ('plain', 'CIFAR10', {'depth': 10}),
    ('plain', 'CIFAR10', {'depth': 10, 'block': 'dbb'}),
    ('plain', 'CIFAR10', {'depth': 10, 'block': 'acb'}),
    ('plain', 'CIFAR10', {'depth': 10, 'block': 'dirac'}),
    ('plain', 'ImageNet', {'depth': 18, 'width': 0.25, 'block': 'dbb'}),
    ('dirac-init', 'CIFAR10', {'depth': 10}),
    ('resnet', 'CIFAR10', {'depth': 10}),
    ('wide-resnet', 'CIFAR10', {'depth': 10, 'width': 1, 'droprate': 0.1}),
    ('densenet', 'CIFAR10', {'layers': 10, 'growth': 8}),
    ('densenet', 'CIFAR10', {'layers': 10, 'bottleneck': False, 'droprate': 0.1}),
    ('densenet121', 'ImageNet', {}),
    *[(name, 'ImageNet', {'block': 'dbb'}) for name in ('resnet18', 'alexnet', 'mobilenet')],
    *[(name, 'ImageNet', {}) for name in ('resnet34', 'resnet50')],
]


@pytest.mark.parametrize(('name', 'dataset', 'options'), SMALLEST)
def test_trains_then_deploys_with_the_same_logits(name, dataset, options):
    network = diracnets.create_model(name, dataset, num_classes=5, **options)
    size, n = (64, 4) if dataset == 'ImageNet' else (16, 64)
    images, labels = torch.randn(n, 3, size, size), torch.randint(5, (n,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    losses = []
    for _ in range(8 if dataset != 'ImageNet' else 2):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    if dataset != 'ImageNet':
        assert losses[-1] < losses[0]

    network = network.double().eval()
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    deployed = fold(network, torch.float64)
    with torch.no_grad():
        logits = network(images[:4].double())
        difference = (deployed(images[:4].double()) - logits).abs().max()
    assert logits.shape == (4, 5)
    assert difference <= 1e-9 * logits.abs().max()
    assert not deployed.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
    again = diracnets.create_model(name, dataset, num_classes=5, **options)
    again.load_state_dict(network.state_dict())
    fold(again).load_state_dict(deployed.state_dict())


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet', 'plain', 'diracnet-v1'])
def test_deployed_chains_have_no_batch_norm_left(name):
    options = {'depth': 18} if name in ('plain', 'diracnet-v1') else {'block': 'dbb'}
    deployed = fold(build_on_meta(name, 'ImageNet', **options))
    assert not [m for m in deployed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {type(m) for m in deployed.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}


# ---------------------------------------------------------------- DiracNet v1


@pytest.mark.parametrize(('cout', 'cin'), [(4, 8), (4, 4), (8, 4), (5, 3), (3, 7)])
def test_w_hat_of_v1_is_alpha_delta_plus_beta_normalised_w(cout, cin):
    conv = diracnet_v1.DiracConv2dV1(cin, cout, 3, padding=1, bias=False).double()
    nn.init.constant_(conv.alpha, 2.0)
    nn.init.constant_(conv.beta, 0.25)
    expected = torch.zeros(cout, cin, 3, 3, dtype=torch.float64)
    smaller = min(cin, cout)
    for o, i, y, x in itertools.product(range(cout), range(cin), range(3), range(3)):
        norm = math.sqrt(sum(w * w for w in conv.weight[o].flatten().tolist()))
        expected[o, i, y, x] = 0.25 * conv.weight[o, i, y, x].item() / norm
        if y == x == 1 and o % smaller == i % smaller:
            expected[o, i, y, x] += 2.0
    torch.testing.assert_close(conv.transform_weight(), expected, rtol=0, atol=1e-14)


def test_v1_starts_as_in_2017():
    conv = diracnet_v1.DiracConv2dV1(256, 128, 3)
    assert conv.alpha.tolist() == [5.0]
    assert conv.beta.tolist() == [pytest.approx(1e-3)]
    assert conv.weight.std().item() == pytest.approx(0.1, rel=0.01)
    with pytest.raises(ValueError, match='groups 2: expected 1'):
        diracnet_v1.DiracConv2dV1(4, 4, 3, groups=2)


def test_ncrelu_is_the_positive_part_then_the_negative_part():
    x = torch.tensor([1.0, -2.0, 0.0]).view(1, 3, 1, 1)
    assert diracnet_v1.NCReLU()(x).flatten().tolist() == [1, 0, 0, 0, -2, 0]


def test_both_halves_of_ncrelu_pass_through_the_delta_of_v1():
    conv = diracnet_v1.DiracConv2dV1(12, 6, 3, padding=1, bias=False)
    nn.init.constant_(conv.alpha, 1.0)
    nn.init.zeros_(conv.beta)
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(conv(diracnet_v1.NCReLU()(x)), x)


def v1_by_definition(images, state, blocks, imagenet, mode):
    """DiracNet v1 as its scripts define it: a function of images and state dict, to logits.

    blocks: convolutions in each group; mode: whether batch norm takes the batch's statistics.
    """
    def bn(x, name):
        if not mode:
            return batch_norm(x, state, name)
        mean = x.mean((0, 2, 3), keepdim=True)
        var = (x - mean).pow(2).mean((0, 2, 3), keepdim=True)
        weight, bias = (state[f'{name}.{leaf}'].view(-1, 1, 1) for leaf in ('weight', 'bias'))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    stride, padding = (2, 3) if imagenet else (1, 1)
    x = F.conv2d(images, state['features.conv.weight'], stride=stride, padding=padding)
    x = bn(x, 'features.bn')
    x = F.max_pool2d(x, 3, 2, 1) if imagenet else x.clamp(min=0)
    for g, n in enumerate(blocks):
        x = F.max_pool2d(x, 2) if g else x
        for name in (f'features.group{g}.block{b}' for b in range(n)):
            w = state[f'{name}.conv.weight']
            w_hat = state[f'{name}.conv.beta'] * w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            for o, i in itertools.product(range(w.shape[0]), range(w.shape[1])):
                smaller = min(w.shape[:2])
                if o % smaller == i % smaller:
                    w_hat[o, i, 1, 1] += state[f'{name}.conv.alpha'].item()
            x = torch.cat([x.clamp(min=0), x.clamp(max=0)], 1)
            x = bn(F.conv2d(x, w_hat, padding=1), f'{name}.bn')
    x = x.clamp(min=0) if imagenet else x
    return x.mean((2, 3)) @ state['fc.weight'].T + state['fc.bias']


@pytest.mark.parametrize(('dataset', 'depth', 'blocks'), [
    ('CIFAR10', 10, (2, 2, 2)), ('ImageNet', 18, (4, 4, 4, 4)),
])
def test_v1_is_the_definition_of_2017(dataset, depth, blocks):
    network = diracnets.create_model('diracnet-v1', dataset, depth=depth, width=0.25)
    network = perturb(network).double()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        expected = v1_by_definition(images, state, blocks, dataset == 'ImageNet', mode)
        with torch.no_grad():
            network.load_state_dict(state)
            logits = network.train(mode)(images)
        assert (logits - expected).abs().max() <= 1e-14 * expected.abs().max()


def test_folded_v1_is_the_published_chain():
    network = build_on_meta('diracnet-v1', 'ImageNet', depth=18, width=0.75)
    chain = []
    for module in fold(network).modules():
        if isinstance(module, nn.Conv2d):
            size = (module.in_channels, module.out_channels, *module.kernel_size, *module.stride)
            chain.append(('conv', *size, module.bias is not None))
        elif isinstance(module, nn.Linear):
            chain.append(('linear', module.in_features, module.out_features))
        elif not isinstance(module, (nn.Sequential, PlainNet)):
            chain.append(type(module).__name__)

    def blocks(cout, first, others):
        for cin in [first] + [2 * cout] * others:
            yield from ('NCReLU', ('conv', cin, cout, 3, 3, 1, 1, True))

    assert chain == [
        ('conv', 3, 48, 7, 7, 2, 2, True), 'MaxPool2d', *blocks(48, 96, 3),
        'MaxPool2d', *blocks(96, 96, 3),
        'MaxPool2d', *blocks(192, 192, 3),
        'MaxPool2d', *blocks(384, 384, 3),
        'ReLU', 'AdaptiveAvgPool2d', ('linear', 384, 1000),
    ]


# ---------------------------------------------------------------- plain, dirac-init, resnet


@pytest.mark.parametrize(('dataset', 'depth'), [('CIFAR10', 16), ('ImageNet', 18)])
def test_plain_is_a_diracnet_without_the_parameterisation(dataset, depth):
    network = perturb(diracnets.create_model('plain', dataset, depth=depth, width=0.5)).double().eval()
    f, params = define_diracnet(depth, 0.5, dataset)
    state = network.state_dict()
    for name, tensor in params.items():
        if name.endswith('alpha'):
            params[name] = torch.zeros_like(tensor, dtype=torch.float64)
        elif name.endswith('beta'):  # what normalize() takes out
            conv = state['features.' + name.replace('.beta', '.conv.weight')]
            params[name] = conv.flatten(1).norm(dim=1)
        else:
            key = name if name.startswith('fc') else f'features.{name}'
            params[name] = state[key + '.weight' * name.endswith('conv')]
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        logits, expected = network(images), f(images, params, False)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('name', 'dataset', 'depth'), [
    ('plain', 'CIFAR10', 16), ('dirac-init', 'CIFAR10', 16), ('plain', 'ImageNet', 18),
])
def test_folded_plain_networks_load_into_a_diracnet(name, dataset, depth):
    network = perturb(diracnets.create_model(name, dataset, depth=depth, width=0.5)).double().eval()
    folded = DiracNet(depth, 0.5, dataset).double().eval()
    folded.load_state_dict(fold(network, torch.float64).state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), network(images), rtol=1e-9, atol=1e-9)


def test_plain_starts_with_kaiming_filters():
    network = diracnets.create_model('plain', 'CIFAR10', depth=16, width=4)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (9 * module.in_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)


def test_plain_starts_with_the_batch_norms_and_the_last_layer_of_a_diracnet():
    network = diracnets.create_model('plain', 'CIFAR10', num_classes=100, depth=28, width=4)
    drawn = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    scales = torch.cat([bn.weight for bn in drawn])
    assert scales.min() >= 0
    assert scales.max() < 1
    assert scales.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert scales.std().item() == pytest.approx(math.sqrt(1 / 12), rel=0.05)
    assert not any(bn.bias.any() for bn in drawn)
    assert network.fc.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert not network.fc.bias.any()


def test_dirac_init_starts_at_the_identity_and_leaves_new_channels_random():
    network = diracnets.create_model('dirac-init', 'CIFAR10', depth=16, width=2)
    for name, module in network.named_modules():
        if not (isinstance(module, nn.Conv2d) and 'block' in name):
            continue
        x = torch.randn(1, module.in_channels, 6, 6)
        y = module(x)
        assert torch.equal(y[:, : module.in_channels], x)
        new = module.weight[module.in_channels :]
        if len(new):
            expected = math.sqrt(2 / (9 * module.in_channels))
            assert new.std().item() == pytest.approx(expected, rel=0.06)
        assert not hasattr(module, 'alpha')


def test_resnet_adds_the_input_of_each_pair_of_blocks():
    network = perturb(diracnets.create_model('resnet', 'CIFAR10', depth=16, width=0.5)).double().eval()
    state = network.state_dict()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    x = batch_norm(F.conv2d(images, state['features.conv.weight'], padding=1), state, 'features.bn')
    for g in range(3):
        x = F.max_pool2d(x, 2) if g else x
        for pair in ((0, 1), (2, 3)):
            skip = x
            for b in pair:
                prefix = f'features.group{g}.block{b}'
                x = F.conv2d(x.relu(), state[f'{prefix}.conv.weight'], padding=1)
                x = batch_norm(x, state, f'{prefix}.bn')
            x[:, : skip.shape[1]] += skip
    expected = x.relu().mean((2, 3)) @ state['fc.weight'].T + state['fc.bias']
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- MobileNet


def test_mobilenet_layer_by_layer():
    network = perturb(diracnets.create_model('mobilenet', 'ImageNet', 5)).double().eval()
    state = network.state_dict()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    images, i = x, 0

    def layer(x, stride=1, groups=1):
        nonlocal i
        weight = state[f'features.{i}.conv.weight']
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        i += 1
        return batch_norm(x, state, f'features.{i - 1}.bn').relu()

    x = layer(x, stride=2)
    for stride in (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1):  # table 1
        x = layer(layer(x, stride, groups=x.shape[1]))
    assert x.shape == (2, 1024, 2, 2)
    expected = x.mean((2, 3)) @ state['fc.weight'].T + state['fc.bias']
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- Wide ResNet


def test_wide_resnet_is_pre_activated():
    network = perturb(diracnets.create_model('wide-resnet', 'CIFAR10', depth=16, width=1))
    network = network.double().eval()
    state = network.state_dict()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    x = F.conv2d(images, state['conv.weight'], padding=1)
    for g, b in itertools.product(range(3), range(2)):
        prefix, stride = f'features.group{g}.block{b}', 2 if g and not b else 1
        o = batch_norm(x, state, f'{prefix}.bn1').relu()
        y = F.conv2d(o, state[f'{prefix}.conv1.weight'], stride=stride, padding=1)
        y = batch_norm(y, state, f'{prefix}.bn2').relu()
        y = F.conv2d(y, state[f'{prefix}.conv2.weight'], padding=1)
        shortcut = state.get(f'{prefix}.shortcut.weight')
        x = y + (x if shortcut is None else F.conv2d(o, shortcut, stride=stride))
    x = batch_norm(x, state, 'bn').relu()
    assert x.shape == (2, 64, 4, 4)
    expected = x.mean((2, 3)) @ state['fc.weight'].T + state['fc.bias']
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


def test_wide_resnet_drops_out_between_the_convolutions_of_a_block():
    network = diracnets.create_model('wide-resnet', 'CIFAR10', depth=16, width=1, droprate=0.3)
    block = network.features.group0.block0
    with torch.no_grad():
        x = torch.randn(8, 16, 16, 16)
        for layer in (block.conv1, block.conv2):
            nn.init.dirac_(layer.weight)
        o = F.batch_norm(x, None, None, training=True).relu()
        kept = F.batch_norm(o, None, None, training=True).relu()
        passed = block.train()(x) - x
        left = passed[kept > 0.1]
        assert (left.abs() < 1e-5).double().mean().item() == pytest.approx(0.3, abs=0.02)
        whole = left.abs() >= 1e-5
        torch.testing.assert_close(left[whole], kept[kept > 0.1][whole] / 0.7, rtol=1e-3, atol=1e-3)
        assert torch.equal(block.eval()(x), block(x))


def test_wide_resnet_has_a_shortcut_only_where_the_channels_change():
    network = build_on_meta('wide-resnet', 'CIFAR10', depth=16, width=1)
    shortcuts = [name for name, _ in network.named_parameters() if 'shortcut' in name]
    assert shortcuts == [f'features.group{g}.block0.shortcut.weight' for g in (1, 2)]


# ---------------------------------------------------------------- DenseNet


@pytest.mark.parametrize(('bottleneck', 'layers'), [(True, 16), (False, 10)])
def test_densenet_concatenates(bottleneck, layers):
    network = diracnets.create_model('densenet', 'CIFAR10', layers=layers, growth=5, reduce=0.55,
                              bottleneck=bottleneck)
    network = perturb(network).double().eval()
    state = network.state_dict()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def bn_relu_conv(x, bn, conv, padding):
        return F.conv2d(batch_norm(x, state, bn).relu(), state[f'{conv}.weight'], padding=padding)

    x = F.conv2d(images, state['features.conv.weight'], padding=1)
    assert x.shape[1] == 10
    for i in range(3):
        for j in range(2):
            y, prefix = x, f'features.block{i}.{j}.layers.'
            for k, padding in enumerate([0, 1] if bottleneck else [None, 1], start=1):
                if padding is not None:
                    y = bn_relu_conv(y, f'{prefix}bn{k}', f'{prefix}conv{k}', padding)
            x = torch.cat([x, y], 1)
        if i < 2:
            prefix, channels = f'features.transition{i}', x.shape[1]
            x = F.avg_pool2d(bn_relu_conv(x, f'{prefix}.bn', f'{prefix}.conv', 0), 2)
            assert x.shape[1] == math.floor(channels * 0.55)
    x = F.avg_pool2d(batch_norm(x, state, 'features.bn').relu(), 8).flatten(1)
    expected = x @ state['fc.weight'].T + state['fc.bias']
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


def test_densenet_starts_with_variance_2_over_k_k_out():
    network = diracnets.create_model('densenet', 'CIFAR10', layers=22, growth=32)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_dropout_follows_each_convolution_but_the_first():
    network = diracnets.create_model('densenet', 'CIFAR10', layers=16, growth=4, droprate=0.2)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    dropouts = [m for m in network.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == len(convolutions) - 1
    assert all(m.p == 0.2 for m in dropouts)


@pytest.mark.parametrize('droprate', [0, 0.3])
def test_checkpointing_changes_memory_and_not_results(droprate):
    kept, results = [], []
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    options = {'layers': 22, 'growth': 8, 'droprate': droprate}
    start = diracnets.create_model('densenet', 'CIFAR10', **options).state_dict()
    for checkpointing in (False, True):
        network = diracnets.create_model('densenet', 'CIFAR10', checkpointing=checkpointing, **options)
        network.load_state_dict(start)
        torch.manual_seed(1)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        def keep_features(block, inputs, features, sizes=sizes):  # what is computed again from
            sizes.append(features.numel())

        for module in network.modules():
            if isinstance(module, densenet.DenseBlock) and checkpointing:
                module.register_forward_hook(keep_features)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = F.cross_entropy(network(images), labels)
        kept.append(sum(sizes))
        loss.backward()
        gradients = {f'{name}.grad': p.grad for name, p in network.named_parameters()}
        results.append({'loss': loss.detach(), **network.state_dict(), **gradients})
        assert {m.momentum for m in network.modules() if hasattr(m, 'running_mean')} == {0.1}
    assert kept[1] < kept[0] / 2
    for key, expected in results[0].items():
        assert torch.equal(results[1][key], expected), key


def test_densenet121_is_torchvisions():
    network = build_on_meta('densenet121', 'ImageNet', checkpointing=True, droprate=0.1)
    assert type(network) is torchvision.models.DenseNet
    layer = network.features.denseblock1.denselayer1
    assert layer.memory_efficient
    assert layer.drop_rate == 0.1
    assert densenet.densenet121(7, 0, False).classifier.out_features == 7


# ---------------------------------------------------------------- diverse branches

SHAPES = [  # in, out, groups
    (4, 6, 1), (4, 4, 1), (4, 6, 2), (6, 6, 6), (4, 8, 4), (1, 1, 1),
]
VARIANTS = list(itertools.product(SHAPES, (3, 5), (1, 2)))


def random_block(block, cin, cout, k, stride, groups, **options):
    made = block(cin, cout, k, stride, k // 2, groups=groups, **options).double()
    for name, tensor in made.state_dict().items():
        if name.endswith('running_var'):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    return made


def slow_dbb(state, x, k, stride, groups):
    """The four branches as the paper draws them, from a block's state dict, in evaluation."""

    def conv(x, key, stride=1, padding=0):
        weight = state[f'{key}.weight']
        if 'idconv1' in key:
            weight = weight.clone()
            for o in range(len(weight)):
                weight[o, o % weight.shape[1]] += 1
        return F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)

    def bn_and_pad(x, key):
        zero = batch_norm(torch.zeros(x.shape[1], 1, 1, dtype=x.dtype), state, key)
        n, c, height, width = x.shape
        p = k // 2
        padded = zero.expand(n, c, height + 2 * p, width + 2 * p).clone()
        padded[:, :, p : p + height, p : p + width] = batch_norm(x, state, key)
        return padded

    def average(x):
        patches = x.unfold(2, k, stride).unfold(3, k, stride)
        return patches.sum((-1, -2)) / k**2

    out = batch_norm(conv(x, 'dbb_origin.conv', stride, k // 2), state, 'dbb_origin.bn')
    if 'dbb_1x1.conv.weight' in state:
        out = out + batch_norm(conv(x, 'dbb_1x1.conv', stride), state, 'dbb_1x1.bn')
        padded = bn_and_pad(conv(x, 'dbb_avg.conv'), 'dbb_avg.bn.bn')
    else:
        padded = F.pad(x, [k // 2] * 4)
    out = out + batch_norm(average(padded), state, 'dbb_avg.avgbn')
    first = 'idconv1' if 'dbb_1x1_kxk.idconv1.weight' in state else 'conv1'
    padded = bn_and_pad(conv(x, f'dbb_1x1_kxk.{first}'), 'dbb_1x1_kxk.bn1.bn')
    return out + batch_norm(conv(padded, 'dbb_1x1_kxk.conv2', stride), state, 'dbb_1x1_kxk.bn2')


@pytest.mark.parametrize(('shape', 'k', 'stride'), VARIANTS)
def test_dbb_is_the_sum_of_the_papers_branches(shape, k, stride):
    cin, cout, groups = shape
    block = random_block(DiverseBranchBlock, cin, cout, k, stride, groups).eval()
    x = torch.randn(2, cin, 9, 8, dtype=torch.float64)
    expected = slow_dbb(block.state_dict(), x, k, stride, groups)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kind', [DiverseBranchBlock, ACBlock])
@pytest.mark.parametrize(('shape', 'k', 'stride'), VARIANTS)
def test_deployed_blocks_are_equivalent(kind, shape, k, stride):
    cin, cout, groups = shape
    block = random_block(kind, cin, cout, k, stride, groups, nonlinear=nn.ReLU()).eval()
    x = torch.randn(2, cin, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        kernel, bias = block.get_equivalent_kernel_bias()
        by_hand = F.conv2d(x, kernel, bias, stride, k // 2, groups=groups).relu()
        folded = block.fold()(x)
        block.switch_to_deploy()
        deployed = block(x)
    for result in (by_hand, folded, deployed):
        assert (result - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1
    assert torch.equal(block.get_equivalent_kernel_bias()[0], kernel)
    block.switch_to_deploy()  # once more changes nothing
    assert torch.equal(block(x), deployed)


def test_acb_is_the_sum_of_three_convolutions():
    block = random_block(ACBlock, 4, 6, 3, 2, 2).eval()
    state = block.state_dict()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = sum(
        batch_norm(F.conv2d(x, state[f'{name}_conv.weight'], stride=2, padding=padding, groups=2),
                   state, f'{name}_bn')
        for name, padding in (('square', (1, 1)), ('ver', (1, 0)), ('hor', (0, 1)))
    )
    assert state['ver_conv.weight'].shape[2:] == (3, 1)
    assert state['hor_conv.weight'].shape[2:] == (1, 3)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def bn_keys(prefix):
    return {f'{prefix}.{name}' for name in
            ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')}


def test_keys_are_the_published_ones():
    common = {'dbb_origin.conv.weight', 'dbb_1x1_kxk.conv2.weight'}.union(
        *map(bn_keys, ['dbb_origin.bn', 'dbb_avg.avgbn', 'dbb_1x1_kxk.bn1.bn', 'dbb_1x1_kxk.bn2'])
    )
    dense = common | {
        'dbb_1x1.conv.weight', 'dbb_avg.conv.weight', 'dbb_1x1_kxk.idconv1.weight'
    } | bn_keys('dbb_1x1.bn') | bn_keys('dbb_avg.bn.bn')
    depthwise = common | {'dbb_1x1_kxk.conv1.weight'}
    deployed = {'dbb_reparam.weight', 'dbb_reparam.bias'}
    block = DiverseBranchBlock(4, 4, 3, padding=1)
    assert block.state_dict().keys() == dense
    assert DiverseBranchBlock(4, 4, 3, padding=1, groups=4).state_dict().keys() == depthwise
    block.switch_to_deploy()
    assert block.state_dict().keys() == deployed
    built = DiverseBranchBlock(4, 4, 3, padding=1, deploy=True)
    built.load_state_dict(block.state_dict())
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(built(x), block(x))


def test_internal_width_and_the_1x1_in_front_of_kxk():
    dense = DiverseBranchBlock(4, 6, 3, padding=1)
    assert (dense.dbb_1x1_kxk.idconv1.weight == 0).all()
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(dense.dbb_1x1_kxk.idconv1(x), x)
    wide = DiverseBranchBlock(4, 6, 3, padding=1, internal_channels_1x1_3x3=5)
    assert wide.dbb_1x1_kxk.conv1.weight.shape == (5, 4, 1, 1)
    assert wide.dbb_1x1_kxk.conv1.weight.abs().min() > 0
    depthwise = DiverseBranchBlock(4, 4, 3, padding=1, groups=4)
    assert depthwise.dbb_1x1_kxk.conv2.weight.shape == (4, 2, 3, 3)


@pytest.mark.parametrize('groups', [1, 4])
def test_single_init_starts_as_the_kxk_branch(groups):
    block = DiverseBranchBlock(4, 4, 3, padding=1, groups=groups, single_init=True).eval()
    x = torch.randn(2, 4, 6, 6)
    expected = F.conv2d(x, block.dbb_origin.conv.weight, padding=1, groups=groups)
    torch.testing.assert_close(block(x), expected / math.sqrt(1 + 1e-5))


def test_padding_is_what_the_running_statistics_make_of_zero_and_passes_no_gradient():
    layer = diverse_branch.BNAndPad(1, 2).train()
    nn.init.constant_(layer.bn.weight, 3.0)
    nn.init.constant_(layer.bn.bias, 0.5)
    x = torch.randn(4, 2, 5, 5) + 1
    out = layer(x)
    zero = 0.5 - 3 * layer.bn.running_mean / (layer.bn.running_var + 1e-5).sqrt()
    for edge in (out[:, :, 0], out[:, :, -1], out[:, :, :, 0], out[:, :, :, -1]):
        torch.testing.assert_close(edge, zero.view(1, 2, 1).expand_as(edge))
    out[:, :, 0].sum().backward()
    assert layer.bn.bias.grad.tolist() == [0, 0]
    assert layer.bn.weight.grad.tolist() == [0, 0]


@pytest.mark.parametrize('kind', [DiverseBranchBlock, ACBlock])
@pytest.mark.parametrize('groups', [1, 4])
def test_gradient_of_the_equivalent_kernel_reaches_every_branch(kind, groups):
    block = random_block(kind, 4, 4, 3, 1, groups).train()
    kernel, bias = block.get_equivalent_kernel_bias()
    scale = kernel.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    (((kernel / scale).sin() ** 2).sum() + (bias**2).sum()).backward()  # pulls onto an int8 grid
    for name, parameter in block.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize('kind', [DiverseBranchBlock, ACBlock])
@pytest.mark.parametrize(('options', 'expected'), [
    ({'kernel_size': 4, 'padding': 2}, 'kernel_size 4: expected an odd one'),
    ({'kernel_size': 3, 'padding': 0}, 'padding 0: expected 1'),
    ({'kernel_size': 3, 'padding': 1, 'dilation': 2}, 'dilation 2: expected 1'),
    ({'kernel_size': 3, 'padding': 1, 'groups': 3}, 'groups 3: expected a divisor of 4 and 4'),
    ({'kernel_size': 3, 'padding': 1, 'groups': 0}, 'groups 0: expected a divisor'),
])
def test_blocks_refuse_with_what_was_expected(kind, options, expected):
    with pytest.raises(ValueError, match=expected):
        kind(4, 4, **options)


def test_dbb_refuses_an_internal_width_that_the_groups_do_not_divide():
    with pytest.raises(ValueError, match='internal_channels_1x1_3x3 5: expected a multiple of 2'):
        DiverseBranchBlock(4, 4, 3, padding=1, groups=2, internal_channels_1x1_3x3=5)


@pytest.mark.parametrize('groups', [1, 2])
def test_merged_1x1_and_kxk_are_the_two_in_turn(groups):
    first = torch.randn(6, 4 // groups, 1, 1).double(), torch.randn(6).double()
    second = torch.randn(8, 6 // groups, 3, 3).double(), torch.randn(8).double()
    kernel, bias = diverse_branch.merge_1x1_kxk(first, second, groups)
    x = torch.randn(2, 4, 7, 7).double()
    expected = F.conv2d(F.conv2d(x, *first, groups=groups), *second, groups=groups)
    torch.testing.assert_close(F.conv2d(x, kernel, bias, groups=groups), expected)


def test_concatenated_branches_are_outputs_side_by_side():
    branches = [(torch.randn(n, 4, 3, 3), torch.randn(n)) for n in (2, 5)]
    x = torch.randn(2, 4, 6, 6)
    expected = torch.cat([F.conv2d(x, *branch) for branch in branches], 1)
    torch.testing.assert_close(F.conv2d(x, *diverse_branch.concat_branches(*branches)), expected)


def test_added_branches_are_the_sum_of_outputs():
    branches = [(torch.randn(5, 4, 3, 3).double(), torch.randn(5).double()) for _ in range(3)]
    x = torch.randn(2, 4, 6, 6).double()
    expected = sum(F.conv2d(x, *branch) for branch in branches)
    torch.testing.assert_close(F.conv2d(x, *diverse_branch.add_branches(*branches)), expected)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_average_pooling_as_a_convolution(groups):
    kernel = diverse_branch.average_as_conv(4, 3, groups)
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(F.conv2d(x, kernel, groups=groups), F.avg_pool2d(x, 3, 1))


@pytest.mark.parametrize('size', [(1, 1), (3, 1), (1, 3), (3, 3), (5, 5)])
def test_padded_kernel_has_the_same_output(size):
    kernel = torch.randn(3, 4, *size)
    x = torch.randn(2, 4, 9, 9)
    expected = F.conv2d(x, kernel, padding=tuple(length // 2 for length in size))
    padded = diverse_branch.pad_kernel(kernel, 5)
    assert padded.shape == (3, 4, 5, 5)
    torch.testing.assert_close(F.conv2d(x, padded, padding=2), expected)


def test_fused_batch_norm_is_the_two_in_turn():
    bn = perturb(nn.BatchNorm2d(3)).eval()
    kernel, x = torch.randn(3, 4, 3, 3), torch.randn(2, 4, 6, 6)
    expected = bn(F.conv2d(x, kernel))
    torch.testing.assert_close(F.conv2d(x, *diverse_branch.fuse_bn(kernel, bn)), expected)


def test_blocks_replace_only_kernels_between_1_and_7():
    network = build_on_meta('alexnet', 'ImageNet', block='dbb')
    first, *others = [
        type(m) for m in network.features if isinstance(m, (nn.Sequential, DiverseBranchBlock))
    ]
    assert first is nn.Sequential  # 11 x 11: convolution and batch norm
    assert others == [DiverseBranchBlock] * 4
    network = build_on_meta('resnet50', 'ImageNet', block='acb')
    assert type(network.conv1) is nn.Conv2d
    assert type(network.bn1) is nn.BatchNorm2d
    bottleneck = network.layer1[0]
    kinds = [type(m) for m in (bottleneck.conv1, bottleneck.conv2, bottleneck.conv3)]
    assert kinds == [nn.Conv2d, ACBlock, nn.Conv2d]
    kinds = [type(m) for m in (bottleneck.bn1, bottleneck.bn2, bottleneck.bn3)]
    assert kinds == [nn.BatchNorm2d, nn.Identity, nn.BatchNorm2d]


def test_table_of_the_docs():
    lines = text_of('docs/diracnets.md').splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    for network in NETWORKS:
        assert list(row(*network)) in cells
