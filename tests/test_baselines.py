"""Architectures: published sizes, and outputs against independent implementations."""

import itertools
import math
import shlex
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from diracconv import DiracConv2d
from diracnet import DiracNet, define_diracnet
from diracnets import create_model, fold
from diracnets.architectures import ACTIVATIONS, ARCHITECTURES, BLOCKS
from diracnets.models import densenet, diracnet_v1
from diracnets.models.blocks import REPLACEMENTS
from diracnets.models.diracnet_fast import ACTIVATION_LAYERS
from diracnets.models.plain import PlainNet
from diracnets.models.registry import count_multiply_adds
from experiments.tables import SIZES
from reference import batch_norm
from training.options import RECIPE_FOLDER

PLAIN_DENSE = {'bottleneck': False, 'growth': 12, 'layers': 40}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build_on_meta(name, dataset, **options):
    with torch.device('meta'):
        return create_model(name, dataset, **options)


def count(model):
    return sum(p.numel() for p in model.parameters())


def perturb(model):
    """Changes running variances and one-dimensional tensors but alpha from their initial values."""
    for name, tensor in model.state_dict().items():
        if name.endswith('running_var'):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif tensor.is_floating_point() and tensor.dim() == 1 and 'alpha' not in name:
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def random_model(*arguments, **options):
    return perturb(create_model(*arguments, **options)).double().eval()


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
def test_create_model_has_published_number_of_parameters(name, dataset, options, parameters):
    assert count(build_on_meta(name, dataset, **options)) == parameters


@pytest.mark.parametrize(('name', 'base', 'dbb', 'deployed'), [
    ('resnet18', 11_689_512, 26_288_296, 11_684_712),
    ('resnet50', 25_557_032, 40_684_456, 25_530_472),
    ('mobilenet', 4_231_976, 4_372_183, 4_221_032),
])
def test_with_block_has_published_number_of_parameters(name, base, dbb, deployed):
    models = [build_on_meta(name, 'ImageNet', block=block) for block in BLOCKS]
    assert [count(model) for model in models[:2]] == [base, dbb]
    assert [count(fold(model)) for model in models] == [deployed] * len(BLOCKS)


@pytest.mark.parametrize(('name', 'filters'), [  # 3x3 and 5x5 filters after the stem
    ('resnet18', 4 * (64 + 128 + 256 + 512)), ('alexnet', 192 + 384 + 256 + 256),
    ('mobilenet', 32 + 64 + 128 + 128 + 256 + 256 + 6 * 512 + 1024),
])
def test_with_block_dirac_adds_two_parameters_per_filter(name, filters):
    model = build_on_meta(name, 'ImageNet', block='dirac')
    assert count(model) == count(build_on_meta(name, 'ImageNet')) + 2 * filters
    assert sum(m.out_channels for m in model.modules() if isinstance(m, DiracConv2d)) == filters


def test_blocks_and_activations_of_the_options_are_those_that_models_have():
    assert tuple(REPLACEMENTS) == BLOCKS
    assert tuple(ACTIVATION_LAYERS) == ACTIVATIONS


def test_plain_equals_diracnet_when_block_is_dirac():
    model = perturb(create_model('plain', 'CIFAR10', depth=10, width=0.5, block='dirac'))
    f, params = define_diracnet(10, 0.5, 'CIFAR10')
    state = {
        name.removeprefix('features.').replace('conv.weight', 'conv').replace('conv.alpha', 'alpha')
        .replace('conv.beta', 'beta'): tensor.double()
        for name, tensor in model.state_dict().items() if 'tracked' not in name
    }
    assert {name: t.shape for name, t in state.items()} == {n: p.shape for n, p in params.items()}
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for mode in (False, True):
        logits = model.double().train(mode)(images)
        torch.testing.assert_close(f(images, state, mode), logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('dataset', 'depth', 'width'), [('CIFAR10', 28, 1), ('ImageNet', 18, 1)])
def test_networks_of_the_same_topology_have_parameters_of_diracnet_without_alpha_and_beta(
    dataset, depth, width
):
    _, params = define_diracnet(depth, width, dataset)
    expected = sum(
        tensor.numel() for name, tensor in params.items()
        if tensor.requires_grad and not name.endswith(('alpha', 'beta'))
    )
    for name in ('plain', 'dirac-init', 'default-init', 'resnet'):
        model = build_on_meta(name, dataset, depth=depth, width=width)
        assert count(model) == expected, name


@pytest.mark.parametrize(('name', 'weights'), [
    ('resnet18', torchvision.models.ResNet18_Weights),
    ('alexnet', torchvision.models.AlexNet_Weights),
    ('resnet50', torchvision.models.ResNet50_Weights),
    ('densenet121', torchvision.models.DenseNet121_Weights),
])
def test_count_multiply_adds_equals_torchvision(name, weights):
    measured = count_multiply_adds(build_on_meta(name, 'ImageNet'), 224)
    assert round(measured / 1e9, 3) == weights.DEFAULT.meta['_ops']


def test_count_multiply_adds_equals_paper_for_mobilenet():
    measured = count_multiply_adds(build_on_meta('mobilenet', 'ImageNet'), 224)
    assert round(measured / 1e6) == 569  # table 4 of arXiv 1704.04861


def test_count_multiply_adds_counts_folded_blocks():
    folded = fold(build_on_meta('resnet18', 'ImageNet', block='dbb'))
    assert round(count_multiply_adds(folded, 224) / 1e6, 1) == 1814.1


# ---------------------------------------------------------------- create_model


@pytest.mark.parametrize(('arguments', 'options', 'expected'), [
    (('vgg', 'CIFAR10'), {}, r"model 'vgg'.* diracnet, diracnet-v1"),
    (('resnet18', 'CIFAR10'), {}, "resnet18 .*'CIFAR10'.* ImageNet"),
    (('densenet', 'ImageNet'), {}, "densenet .*'ImageNet'.* CIFAR10, CIFAR100"),
    (('plain', 'MNIST'), {}, "plain .*'MNIST'"),
    (('plain', 'CIFAR10'), {'growth': 12}, 'plain .*growth.* depth, width, block'),
    (('resnet', 'CIFAR10'), {'block': 'dbb'}, 'resnet .*block.* depth, width'),
    (('plain', 'CIFAR10'), {'block': 'vgg'}, "block 'vgg'.* base, dbb, acb, repvgg, dirac"),
    (('plain', 'CIFAR10'), {'depth': 17}, 'depth 17.* 16 and 22'),
    (('plain', 'CIFAR10', 0), {}, 'num_classes 0'),
    (('densenet', 'CIFAR10', None, 1), {}, 'densenet.* 3 .*1'),
    (('densenet', 'CIFAR10'), {'layers': 101}, 'layers 101.* 100 and 106'),
    (('densenet', 'CIFAR10'), {'layers': 3}, 'layers 3.* 10 and 16'),
    (('densenet', 'CIFAR10'), {'layers': 41, 'bottleneck': False}, 'layers 41.* 40 and 43'),
    (('densenet', 'CIFAR10'), {'growth': 0}, 'growth 0'),
    (('densenet', 'CIFAR10'), {'growth': 12.0}, 'growth 12.0.* integer'),
    (('densenet', 'CIFAR10'), {'layers': 100.0}, 'layers 100.0.* integer'),
    (('plain', 'CIFAR10'), {'depth': 16.0}, 'depth 16.0.* integer'),
    (('resnet18', 'ImageNet', 5.0), {}, 'num_classes 5.0.* integer'),
    (('diracnet-fast', 'CIFAR10'), {'activation': 'tanh'}, "activation 'tanh'.* relu, gelu, silu"),
    (('diracnet-fast', 'CIFAR10'), {'width': math.inf}, 'width inf'),
    (('diracnet-fast', 'CIFAR10'), {'block': 'dbb'}, "block 'dbb'.* base or dirac"),
    (('densenet', 'CIFAR10'), {'reduce': 0}, 'reduce 0'),
    (('densenet', 'CIFAR10'), {'growth': 4, 'reduce': 0.001}, 'reduce 0.001.* no channels'),
    (('densenet', 'CIFAR10'), {'droprate': 1}, 'droprate 1'),
    (('wide-resnet', 'CIFAR10'), {'droprate': -1}, 'droprate -1'),
])
def test_create_model_raises_for_invalid_arguments(arguments, options, expected):
    with pytest.raises(ValueError, match=expected):
        create_model(*arguments, **options)


@pytest.mark.parametrize(('name', 'classes'), [('plain', 10), ('mobilenet', 1000)])
def test_create_model_uses_first_supported_dataset_when_dataset_is_none(name, classes):
    with torch.device('meta'):
        model = create_model(name)
    assert model.fc.out_features == classes


@pytest.mark.parametrize('name', ['resnet18', 'densenet121'])
def test_create_model_names_torchvision_when_it_is_missing(monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'torchvision.models', None)
    with pytest.raises(ValueError, match=f'^{name}: .*pip install torchvision$'):
        create_model(name)


def test_registry_training_settings_equal_the_original_scripts():
    assert [n for n, row in ARCHITECTURES.items() if row.decay_all] == ['diracnet-v1']
    constant = [n for n, row in ARCHITECTURES.items() if row.crop_padding == 'constant']
    assert constant == ['densenet']


@pytest.mark.parametrize('path', sorted(RECIPE_FOLDER.glob('*')), ids=lambda path: path.stem)
def test_recipe_lines_have_an_option_with_source_and_build_a_model(path):
    title, *lines = path.read_text().splitlines()
    assert 'arXiv ' in title
    assert all(line.startswith('--') and '  # ' in line for line in lines)
    words = [shlex.split(line, comments=True) for line in lines]
    values = {option: value for option, *value in words}
    assert len(values) == len(lines)
    (name,), (dataset,) = values['--model'], values['--dataset']
    options = {
        option: type(default)(values[f'--{option}'][0])
        for option, default in ARCHITECTURES[name].options.items() if values.get(f'--{option}')
    }
    assert count(build_on_meta(name, dataset, **options)) > 0


# ---------------------------------------------------------------- training and folding

SMALLEST = [
    ('diracnet', 'CIFAR10', {'depth': 10}),
    ('diracnet-v1', 'CIFAR10', {'depth': 10}),
    ('diracnet-v1', 'ImageNet', {'depth': 18, 'width': 0.25}),
    ('plain', 'CIFAR10', {'depth': 10}),
    ('plain', 'CIFAR10', {'depth': 10, 'block': 'dbb'}),
    ('plain', 'CIFAR10', {'depth': 10, 'block': 'acb'}),
    ('plain', 'CIFAR10', {'depth': 10, 'block': 'repvgg'}),
    ('plain', 'CIFAR10', {'depth': 10, 'block': 'dirac'}),
    ('plain', 'ImageNet', {'depth': 18, 'width': 0.25, 'block': 'dbb'}),
    ('dirac-init', 'CIFAR10', {'depth': 10}),
    ('default-init', 'CIFAR10', {'depth': 10}),
    ('resnet', 'CIFAR10', {'depth': 10}),
    ('wide-resnet', 'CIFAR10', {'depth': 10, 'width': 1, 'droprate': 0.1}),
    ('densenet', 'CIFAR10', {'layers': 10, 'growth': 8}),
    ('densenet', 'CIFAR10', {'layers': 10, 'bottleneck': False, 'droprate': 0.1}),
    ('densenet121', 'ImageNet', {}),
    *[(name, 'ImageNet', {'block': 'dbb'}) for name in ('resnet18', 'alexnet', 'mobilenet')],
    *[(name, 'ImageNet', {'block': 'repvgg'}) for name in ('alexnet', 'mobilenet')],
    *[(name, 'ImageNet', {}) for name in ('resnet34', 'resnet50')],
]


@pytest.mark.parametrize(('name', 'dataset', 'options'), [
    pytest.param(*row, marks=pytest.mark.slow if row[1] == 'ImageNet' else ()) for row in SMALLEST
])
def test_model_trains_and_folds_with_equal_logits(name, dataset, options):
    model = create_model(name, dataset, num_classes=5, **options)
    size, n = (64, 4) if dataset == 'ImageNet' else (16, 64)
    images, labels = torch.randn(n, 3, size, size), torch.randint(5, (n,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(8 if dataset != 'ImageNet' else 2):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    if dataset != 'ImageNet':
        assert losses[-1] < losses[0]

    model = model.double().eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    deployed = fold(model, torch.float64)
    with torch.no_grad():
        logits = model(images[:4].double())
        difference = (deployed(images[:4].double()) - logits).abs().max()
    assert logits.shape == (4, 5)
    assert difference <= 1e-9 * logits.abs().max()
    assert not deployed.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    again = create_model(name, dataset, num_classes=5, **options)
    again.load_state_dict(model.state_dict())
    fold(again).load_state_dict(deployed.state_dict())


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet', 'plain', 'diracnet-v1'])
def test_fold_removes_all_batch_norms_of_chains(name):
    options = {'depth': 18} if name in ('plain', 'diracnet-v1') else {'block': 'dbb'}
    deployed = fold(build_on_meta(name, 'ImageNet', **options))
    assert not [m for m in deployed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {type(m) for m in deployed.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}


# ---------------------------------------------------------------- DiracNet v1


@pytest.mark.parametrize(('cout', 'cin'), [(4, 8), (4, 4), (8, 4), (5, 3), (3, 7)])
def test_v1_transform_weight_matches_formula(cout, cin):
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


def test_v1_convolution_has_initialization_of_2017():
    conv = diracnet_v1.DiracConv2dV1(256, 128, 3)
    assert conv.alpha.tolist() == [5.0]
    assert conv.beta.tolist() == [pytest.approx(1e-3)]
    assert conv.weight.std().item() == pytest.approx(0.1, rel=0.01)
    with pytest.raises(ValueError, match='groups 2'):
        diracnet_v1.DiracConv2dV1(4, 4, 3, groups=2)


def test_ncrelu_concatenates_positive_and_negative_part():
    x = torch.tensor([1.0, -2.0, 0.0]).view(1, 3, 1, 1)
    assert diracnet_v1.NCReLU()(x).flatten().tolist() == [1, 0, 0, 0, -2, 0]


def test_v1_delta_passes_both_halves_of_ncrelu():
    conv = diracnet_v1.DiracConv2dV1(12, 6, 3, padding=1, bias=False)
    nn.init.constant_(conv.alpha, 1.0)
    nn.init.zeros_(conv.beta)
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(conv(diracnet_v1.NCReLU()(x)), x)


def v1_by_definition(images, state, blocks, imagenet, mode):
    """Computes the logits of DiracNet v1 as its original scripts define it.

    blocks has the number of convolutions in each group. mode selects batch statistics.
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
def test_v1_matches_definition_of_2017(dataset, depth, blocks):
    model = create_model('diracnet-v1', dataset, depth=depth, width=0.25)
    model = perturb(model).double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        expected = v1_by_definition(images, state, blocks, dataset == 'ImageNet', mode)
        with torch.no_grad():
            model.load_state_dict(state)
            logits = model.train(mode)(images)
        assert (logits - expected).abs().max() <= 1e-14 * expected.abs().max()


def test_fold_v1_gives_published_layers():
    model = build_on_meta('diracnet-v1', 'ImageNet', depth=18, width=0.75)
    chain = []
    for module in fold(model).modules():
        if isinstance(module, nn.Conv2d):
            size = (module.in_channels, module.out_channels, *module.kernel_size, *module.stride)
            chain.append(('conv', *size, module.bias is not None))
        elif isinstance(module, nn.Linear):
            chain.append(('linear', module.in_features, module.out_features))
        elif not isinstance(module, (nn.Sequential, nn.Identity, PlainNet)):
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


# ---------------------------------------------------------------- models of plain.py


@pytest.mark.parametrize(('dataset', 'depth'), [('CIFAR10', 16), ('ImageNet', 18)])
def test_plain_equals_diracnet_with_alpha_zero_and_beta_norm(dataset, depth):
    model = random_model('plain', dataset, depth=depth, width=0.5)
    f, params = define_diracnet(depth, 0.5, dataset)
    state = model.state_dict()
    for name, tensor in params.items():
        if name.endswith('alpha'):
            params[name] = torch.zeros_like(tensor, dtype=torch.float64)
        elif name.endswith('beta'):  # cancels normalize()
            conv = state['features.' + name.replace('.beta', '.conv.weight')]
            params[name] = conv.flatten(1).norm(dim=1)
        else:
            key = name if name.startswith('fc') else f'features.{name}'
            params[name] = state[key + '.weight' * name.endswith('conv')]
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        logits, expected = model(images), f(images, params, False)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('name', 'dataset', 'depth'), [
    ('plain', 'CIFAR10', 16), ('dirac-init', 'CIFAR10', 16), ('default-init', 'CIFAR10', 16),
    ('plain', 'ImageNet', 18),
])
def test_diracnet_loads_folded_networks_without_skips(name, dataset, depth):
    model = random_model(name, dataset, depth=depth, width=0.5)
    folded = DiracNet(depth, 0.5, dataset).double().eval()
    folded.load_state_dict(fold(model, torch.float64).state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-9, atol=1e-9)


def test_plain_has_kaiming_initialization():
    model = create_model('plain', 'CIFAR10', depth=16, width=4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (9 * module.in_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)


def test_plain_initializes_batch_norms_and_linear_layer_like_diracnet():
    model = create_model('plain', 'CIFAR10', num_classes=100, depth=28, width=4)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    scales = torch.cat([bn.weight for bn in norms])
    assert scales.min() >= 0
    assert scales.max() < 1
    assert scales.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert scales.std().item() == pytest.approx(math.sqrt(1 / 12), rel=0.05)
    assert not any(bn.bias.any() for bn in norms)
    assert model.fc.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert not model.fc.bias.any()


@pytest.mark.parametrize(('name', 'options'), [
    ('default-init', {}), *[('plain', {'block': block}) for block in ('acb', 'dbb', 'repvgg')]])
def test_default_init_and_branches_have_the_initialization_of_torch(name, options):
    model = create_model(name, 'CIFAR10', depth=16, width=4, **options)
    weights = [module.weight for module in model.features.modules() if type(module) is nn.Conv2d]
    assert len(weights) >= 13
    for weight in weights:  # uniform within 1 / sqrt(inputs of a filter)
        bound = 1 / math.sqrt(weight[0].numel())
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.03)
        assert weight.abs().max().item() <= bound + 1e-7
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for module in model.features.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.all(module.weight == 1)
            assert not module.bias.any()


def test_dirac_init_passes_input_and_randomizes_new_channels():
    model = create_model('dirac-init', 'CIFAR10', depth=16, width=2)
    for name, module in model.named_modules():
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


def test_resnet_matches_layer_by_layer_computation():
    model = random_model('resnet', 'CIFAR10', depth=16, width=0.5)
    state = model.state_dict()
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
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- MobileNet


def test_mobilenet_matches_layer_by_layer_computation():
    model = random_model('mobilenet', 'ImageNet', 5)
    state = model.state_dict()
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
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- Wide ResNet


def test_wide_resnet_matches_layer_by_layer_computation():
    model = random_model('wide-resnet', 'CIFAR10', depth=16, width=1)
    state = model.state_dict()
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
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_wide_resnet_applies_dropout_between_convolutions_of_block():
    model = create_model('wide-resnet', 'CIFAR10', depth=16, width=1, droprate=0.3)
    block = model.features.group0.block0
    with torch.no_grad():
        x = torch.randn(8, 16, 16, 16)
        for layer in (block.conv1, block.conv2):
            nn.init.dirac_(layer.weight)
        o = F.batch_norm(x, None, None, training=True).relu()
        activated = F.batch_norm(o, None, None, training=True).relu()
        out = block.train()(x) - x
        values = out[activated > 0.1]
        assert (values.abs() < 1e-5).double().mean().item() == pytest.approx(0.3, abs=0.02)
        survives = values.abs() >= 1e-5
        expected = activated[activated > 0.1][survives] / 0.7
        torch.testing.assert_close(values[survives], expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(block.eval()(x), block(x))


def test_wide_resnet_has_shortcut_convolution_only_when_channels_change():
    model = build_on_meta('wide-resnet', 'CIFAR10', depth=16, width=1)
    shortcuts = [name for name, _ in model.named_parameters() if 'shortcut' in name]
    assert shortcuts == [f'features.group{g}.block0.shortcut.weight' for g in (1, 2)]


# ---------------------------------------------------------------- DenseNet


@pytest.mark.parametrize(('bottleneck', 'layers'), [(True, 16), (False, 10)])
def test_densenet_matches_layer_by_layer_computation(bottleneck, layers):
    model = random_model(
        'densenet', 'CIFAR10', layers=layers, growth=5, reduce=0.55, bottleneck=bottleneck)
    state = model.state_dict()
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
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_densenet_has_fan_out_initialization():
    model = create_model('densenet', 'CIFAR10', layers=22, growth=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_densenet_applies_dropout_after_each_convolution_but_the_first():
    model = create_model('densenet', 'CIFAR10', layers=16, growth=4, droprate=0.2)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == len(convolutions) - 1
    assert all(m.p == 0.2 for m in dropouts)


@pytest.mark.parametrize('droprate', [0, 0.3])
def test_densenet_checkpointing_saves_memory_with_equal_results(droprate):
    stored, results = [], []
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    options = {'layers': 22, 'growth': 8, 'droprate': droprate}
    initial = create_model('densenet', 'CIFAR10', **options).state_dict()
    for checkpointing in (False, True):
        model = create_model('densenet', 'CIFAR10', checkpointing=checkpointing, **options)
        model.load_state_dict(initial)
        torch.manual_seed(1)
        sizes = []

        def count_values(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        def count_features(block, inputs, features, sizes=sizes):  # the inputs of the recomputation
            sizes.append(features.numel())

        for module in model.modules():
            if isinstance(module, densenet.DenseBlock) and checkpointing:
                module.register_forward_hook(count_features)
        with torch.autograd.graph.saved_tensors_hooks(count_values, lambda tensor: tensor):
            loss = F.cross_entropy(model(images), labels)
        stored.append(sum(sizes))
        loss.backward()
        gradients = {f'{name}.grad': p.grad for name, p in model.named_parameters()}
        results.append({'loss': loss.detach(), **model.state_dict(), **gradients})
        assert {m.momentum for m in model.modules() if hasattr(m, 'running_mean')} == {0.1}
    assert stored[1] < stored[0] / 2
    for key, expected in results[0].items():
        assert torch.equal(results[1][key], expected), key


def test_densenet121_is_the_torchvision_model():
    model = build_on_meta('densenet121', 'ImageNet', checkpointing=True, droprate=0.1)
    assert type(model) is torchvision.models.DenseNet
    layer = model.features.denseblock1.denselayer1
    assert layer.memory_efficient
    assert layer.drop_rate == 0.1
    assert create_model('densenet121', num_classes=7).classifier.out_features == 7


def test_docs_table_has_all_architectures():
    assert {name for name, *_ in SIZES} == ARCHITECTURES.keys()
