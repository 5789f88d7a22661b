"""Parts of the speed-run recipe: Muon, whitening, progressive resizing, diracnet-fast."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diracnets
import train
from diracnets.folding import fold
from diracnets.models import diracnet_fast
from diracnets.models.registry import count_multiply_adds
from diracnets.preprocessing import Preprocessing
from experiments import speedrun_search as search
from experiments.results import read_results
from runs import params_of, refused, run, write_sets
from training import data, options
from training.augmentation import progressive_sizes
from training.compute import Forward
from training.data import load_splits
from training.loader import BatchSampler
from training.optimizers import make_optimizer
from training.whitening import whiten, whitening_filters

MUON = ['--optimizer', 'muon']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp('images'), 12, 4)


def small_layer():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.Flatten(), nn.Linear(6, 2))
    with torch.no_grad():  # rows of norm 1 on average, as muon keeps them
        layer[0].weight.mul_((6 / layer[0].weight.square().sum()).sqrt())
    return layer


def learn(layer, optimizer, steps):
    for step in range(steps):
        inputs = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layer(inputs).square().mean().backward()
        optimizer.step()


# ---------------------------------------------------------------- Muon


def test_muon_step_is_nearly_orthogonal():
    layer = small_layer()
    optimizer = make_optimizer(layer, options.parse_options([*MUON, '--lr', '0.5']))
    before, gradient = layer[0].weight.detach().clone(), torch.randn(6, 4, 3, 3)
    layer[0].weight.grad = gradient
    optimizer.step()
    moved = (layer[0].weight.detach() - before).double().flatten(1)  # (6, 36)
    left, _, right = torch.linalg.svd(gradient.double().flatten(1), full_matrices=False)
    exact = -0.5 * left @ right  # all singular values are 0.5
    cosine = (moved * exact).sum() / moved.norm() / exact.norm()
    assert cosine > 0.97
    assert 0.25 < torch.linalg.svdvals(moved).min() <= torch.linalg.svdvals(moved).max() < 0.75


def test_muon_uses_adamw_for_other_parameters():
    layer = small_layer()
    alone = copy.deepcopy(layer)
    learn(layer, make_optimizer(layer, options.parse_options(
        [*MUON, '--lr', '0', '--adam_lr', '0.02'])), 3)
    adam = torch.optim.AdamW(alone[2].parameters(), 0.02, (0.85, 0.95), weight_decay=0)
    learn(alone, adam, 3)
    torch.testing.assert_close(layer[0].weight, alone[0].weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer[2].weight, alone[2].weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer[2].bias, alone[2].bias, rtol=1e-5, atol=1e-7)


def test_muon_is_invariant_to_the_norm_of_filters():
    gradient, turned = torch.randn(6, 4, 3, 3), []
    for norm in (1e-3, 1, 1e3):
        layer = small_layer()
        optimizer = make_optimizer(layer, options.parse_options([*MUON, '--lr', '0.1']))
        before = layer[0].weight.detach().clone()
        with torch.no_grad():
            layer[0].weight.mul_(norm)
        layer[0].weight.grad = gradient.clone()
        optimizer.step()
        turned.append(layer[0].weight.detach() - before)
        assert 0.05 < turned[-1].norm() / before.norm() < 0.15
    torch.testing.assert_close(turned[0], turned[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(turned[2], turned[1], rtol=1e-4, atol=1e-6)


def test_muon_keeps_all_zero_filters_finite():
    layer = small_layer()
    with torch.no_grad():
        layer[0].weight.zero_()
    learn(layer, make_optimizer(layer, options.parse_options(MUON)), 2)
    assert layer[0].weight.isfinite().all()


def test_muon_state_dict_round_trip():
    whole = small_layer()
    learn(whole, make_optimizer(whole, options.parse_options(MUON)), 4)
    layer = small_layer()
    optimizer = make_optimizer(layer, options.parse_options(MUON))
    learn(layer, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    assert sorted(saved['state']) == [0, 1, 2]
    again = make_optimizer(layer, options.parse_options(MUON))
    again.load_state_dict(saved)
    for step in (2, 3):
        again.zero_grad()
        inputs = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
        layer(inputs).square().mean().backward()
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), whole.parameters()))


# ---------------------------------------------------------------- whitening


def test_whitening_makes_patches_uncorrelated():
    torch.manual_seed(0)
    inputs = F.avg_pool2d(torch.randn(200, 3, 20, 20), 3, stride=1) * 3  # neighbors are correlated
    filters = whitening_filters(inputs, 2)
    assert filters.shape == (12, 3, 2, 2)
    outputs = F.conv2d(inputs.double(), filters).transpose(0, 1).flatten(1)
    products = outputs @ outputs.T / outputs.shape[1]
    variances = torch.linalg.eigvalsh(torch.stack([
        patch.double() for patch in inputs.unfold(2, 2, 1).unfold(3, 2, 1).permute(
            0, 2, 3, 1, 4, 5).reshape(-1, 12)]).T.cov(correction=0)).flip(0)
    expected = torch.diag(variances / (variances + 5e-4))
    torch.testing.assert_close(products, expected, rtol=0.02, atol=0.02)


def test_whitened_convolution_has_both_signs_and_is_frozen(images, tmp_path):
    sets = data.load_splits('Folder', images)
    network = diracnets.create_model('diracnet-fast', 'CIFAR10', 2, width=0.25)
    inputs = torch.randn(20, 3, 32, 32)
    whiten(network, inputs)
    first = network.features.conv
    torch.testing.assert_close(first.weight[::2], whitening_filters(inputs, 2).float())
    assert torch.equal(first.weight[1::2], -first.weight[::2])
    assert not first.weight.requires_grad
    spread = sets.train.images[[0, 7, 15, 23]].permute(0, 3, 1, 2)  # of 24
    assert torch.equal(data.sample_evenly(sets.train, 4), spread)

    train.main(['--dataset', 'Folder', '--dataroot', str(images), '--model', 'diracnet-fast',
                '--width', '0.25', '--epochs', '1', '--whiten', *MUON, '--save',
                str(tmp_path / 'run')])
    filters = params_of(tmp_path / 'run')['features.conv.weight']
    assert torch.equal(filters[1::2], -filters[::2])


@pytest.mark.parametrize('block', ['acb', 'dbb', 'repvgg'])
def test_whiten_rejects_a_block_of_branches(tmp_path, capsys, block):
    error = refused(capsys, '--dataset', 'Digits', '--model', 'plain', '--depth', 10, '--block',
                    block, '--whiten', '--save', tmp_path / 'run')
    assert '--whiten: the first convolution trains as several branches; use --block' in error


def test_whiten_rejects_too_many_filters(images, tmp_path, capsys):
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', images, '--depth', 10, '--width',
                    4, '--whiten', '--save', tmp_path / 'run')
    assert 'the first convolution has 64 filters: expected at most 54' in error


# ---------------------------------------------------------------- progressive resizing


def test_progressive_sizes_share_the_epochs():
    assert progressive_sizes(32, [20, 24, 28, 32], 8) == [20, 20, 24, 24, 28, 28, 32, 32]
    assert progressive_sizes(32, [], 3) == [32, 32, 32]
    assert progressive_sizes(32, [20, 24, 32], 2) == [24, 32]
    assert progressive_sizes(32, [20, 24], 5) == [20, 20, 24, 24, 24]
    assert progressive_sizes(32, [20, 24, 28, 32], 1) == [32]


def test_progressive_resizing_trains_and_resumes(images, tmp_path):
    growing = '--grow', '[16,32]', '--epochs', 3
    run(images, tmp_path / 'whole', *growing, '--keep_every', 1)
    run(images, tmp_path / 'run', *growing, '--resume', tmp_path / 'whole' / 'epoch-1.pt7')
    whole, resumed = params_of(tmp_path / 'whole'), params_of(tmp_path / 'run')
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    run(images, tmp_path / 'large', '--epochs', 3)
    assert any(not torch.equal(p, whole[n]) for n, p in params_of(tmp_path / 'large').items())


def test_resume_rejects_more_epochs_with_progressive_resizing(images, tmp_path, capsys):
    run(images, tmp_path, '--grow', '[16]', '--epochs', 1)
    with pytest.raises(SystemExit):
        run(images, tmp_path, '--grow', '[16]', '--epochs', 2, '--resume', 'auto')
    assert 'epochs changed from 1 to 2; ' in capsys.readouterr().err


@pytest.mark.parametrize('sizes', ['[7,32]', '[33]', '20', '[20.5]', '['])
def test_grow_rejects_invalid_sizes(sizes, capsys):
    assert '--grow' in refused(capsys, '--grow', sizes)


# ---------------------------------------------------------------- the network


def test_fold_moves_batch_norm_through_max_pool_when_scales_are_positive():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8)).double()
    nn.init.uniform_(layers[2].running_var, 0.5, 2)
    nn.init.normal_(layers[2].running_mean)
    inputs = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    for scales, expected in (([1.0] * 8, nn.Identity), ([1.0] * 7 + [-1.0], nn.BatchNorm2d)):
        with torch.no_grad():
            layers[2].weight.copy_(torch.tensor(scales))
        folded = fold(layers, torch.float64)
        assert type(folded[2]) is expected
        with torch.no_grad():
            torch.testing.assert_close(
                folded(inputs), layers.eval()(inputs), rtol=1e-10, atol=1e-10)


def test_diracnet_fast_initialization():
    network = diracnets.create_model('diracnet-fast', 'CIFAR10', width=0.25)
    for layer in network.modules():
        if hasattr(layer, 'alpha'):
            assert torch.equal(layer.alpha, torch.full_like(layer.alpha, 0.2))
            assert torch.equal(layer.beta, torch.ones_like(layer.beta))
            x = torch.randn(1, layer.in_channels, 6, 6)
            passed = F.conv2d(x, layer.weight, padding=1)[:, : layer.in_channels]
            assert torch.equal(passed, x[:, : layer.out_channels])
        if isinstance(layer, nn.BatchNorm2d):
            assert not layer.weight.requires_grad
    assert network.fc.weight.std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize('activation', ['gelu', 'relu', 'silu', 'hardswish'])
def test_diracnet_fast_agrees_with_a_functional_definition(activation):
    network = diracnets.create_model('diracnet-fast', 'CIFAR10', width=0.125, block='base',
                             activation=activation).double().eval()
    state = network.state_dict()
    for name, tensor in state.items():
        if 'running' in name or name.endswith('bn.bias'):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    act = {'gelu': lambda x: F.gelu(x, approximate='tanh'), 'relu': F.relu, 'silu': F.silu,
           'hardswish': lambda x: x * (x / 6 + 0.5).clamp(0, 1)}[activation]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    x = act(F.conv2d(images, state['features.conv.weight']))
    for g in range(3):
        for b in range(2):
            prefix = f'features.group{g}.block{b}'
            x = F.conv2d(x, state[f'{prefix}.conv.weight'], padding=1)
            x = F.max_pool2d(x, 2) if b == 0 else x
            mean, var, bias = (state[f'{prefix}.bn.{name}'].view(-1, 1, 1)
                               for name in ('running_mean', 'running_var', 'bias'))
            x = act((x - mean) / (var + 1e-5).sqrt() + bias)
    expected = x.amax((2, 3)) @ state['fc.weight'].T / 32
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


def test_diracnet_fast_has_the_size_of_airbench():
    network = diracnets.create_model('diracnet-fast', 'CIFAR10')
    # 24 to 64 at 31 x 31; 64 to 64 to 256 at 15 x 15; 256 to 256 twice at 7 x 7, once at 3 x 3
    convolutions = 9 * (24 * 64 * 31**2 + (64 * 64 + 64 * 256) * 15**2 + 256**2 * (2 * 7**2 + 9))
    assert count_multiply_adds(network, 32) == convolutions + 12 * 24 * 31**2 + 2560
    with_w_hat = [layer for layer in network.modules() if hasattr(layer, 'alpha')]
    assert [layer.out_channels for layer in with_w_hat] == [64, 64, 256, 256, 256, 256]
    assert not [layer for layer in fold(network).modules() if hasattr(layer, 'alpha')
                or isinstance(layer, nn.BatchNorm2d)]


# ---------------------------------------------------------------- the search


SMALL = ['--recipe', 'speedrun', '--dataset', 'Folder', '--batch_size', '10', '--epochs', '4',
         '--grow', '[24,32]', '--width', '0.25', '--dtype', 'float']


def searched(images, change, *more):
    """Trains a small model with a change; returns (model, record)."""
    preprocess = Preprocessing.for_dataset('Folder')
    splits = load_splits('Folder', str(images), preprocess, 1).augmented(pad=2, flip='alternating')
    opt = options.parse_options([*SMALL, *more])
    return search.train(opt, change, splits, Forward(preprocess, 'float', torch.device('cpu')))


def test_search_without_a_change_equals_train_py(images, tmp_path):
    model, record = searched(images, search.CHANGES['recipe'], '--seed', '3', '--ema', '0.5')
    train.main([*SMALL, '--seed', '3', '--ema', '0.5', '--dataroot', str(images),
                '--save', str(tmp_path)])
    expected = torch.load(tmp_path / 'model.pt7')['ema']
    assert len(expected) > 20
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
    per_image = sum(count_multiply_adds(model, size) for size in (24, 24, 32, 32))
    assert record['multiply_adds'] == 3 * 24 * per_image


def test_hard_epochs_have_the_images_with_the_largest_loss():
    sampler, losses = BatchSampler(10, 3, seed=1), torch.tensor([3., 9, 1, 7, 5, 0, 8, 2, 6, 4])
    change = search.Change(hard_epochs=(2,))
    order = torch.cat([indices for indices, _ in search.batches_of(sampler, 1, losses, change)])
    assert sorted(order.tolist()) == [*range(10)]
    batches = search.batches_of(sampler, 2, losses, change)
    assert [len(indices) for indices, _ in batches] == [3, 2]
    assert {*torch.cat([indices for indices, _ in batches]).tolist()} == {1, 3, 4, 6, 8}


def test_search_freezes_the_first_group(images):
    model, _ = searched(images, search.Change(freeze_from=0.0))
    for g, trained in ((0, False), (1, True)):
        block = model.features[2 + g].block0  # after the stem and its activation
        assert bool(block.bn.bias.any()) == trained
        assert bool((block.conv.alpha - diracnet_fast.FAST_ALPHA_INIT).any()) == trained


def test_learning_rate_of_changes():
    opt = options.parse_options(['--recipe', 'speedrun', '--epochs', '10'])
    for final, done, expected in (
            (0, 1, 0.5), (0, 6, 0.5), (0, 10, 0), (0.2, 1, 0.5), (0.2, 6, 0.6), (0.2, 10, 0.2)):
        change = search.Change(final_lr=final)
        assert search.learning_rate(opt, change, done) == pytest.approx(expected)


def test_search_keeps_fixed_parameters(images):
    model, _ = searched(images, search.Change(fixed=('alpha',)))
    for layer in model.modules():
        if hasattr(layer, 'alpha'):
            assert bool((layer.alpha == diracnet_fast.FAST_ALPHA_INIT).all())
            assert not bool((layer.beta == diracnet_fast.FAST_BETA_INIT).all())


def test_search_recalibrates_batch_norm():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.float64),
                           nn.BatchNorm2d(4, dtype=torch.float64))
    batches = torch.randn(3, 8, 3, 6, 6, dtype=torch.float64)
    layers(10 + batches[0])  # statistics of training
    search.recalibrate(layers, batches, lambda model, images, size: model(images), 6)
    outputs = [layers[0](images).detach() for images in batches]
    for name, statistics in (('mean', [x.mean((0, 2, 3)) for x in outputs]),
                             ('var', [x.var((0, 2, 3)) for x in outputs])):
        torch.testing.assert_close(getattr(layers[1], f'running_{name}'),
                                   torch.stack(statistics).mean(0), rtol=1e-10, atol=1e-12)


def test_search_trains_with_the_label_smoothing_and_recalibration_of_a_change(images):
    (recipe, _), (smoothed, _), (recalibrated, _) = (searched(images, change) for change in (
        search.Change(), search.Change(final_smoothing=0.0),
        search.Change(recalibration_batches=2)))
    parameters = [[*model.parameters()] for model in (recipe, smoothed, recalibrated)]
    assert any(not torch.equal(*pair) for pair in zip(parameters[0], parameters[1]))
    assert all(torch.equal(*pair) for pair in zip(parameters[0], parameters[2]))
    assert any(not torch.equal(*pair) for pair in zip(recipe.buffers(), recalibrated.buffers()))


def test_label_smoothing_of_a_change():
    opt = options.parse_options(['--recipe', 'speedrun', '--epochs', '10'])
    for final, done, expected in ((None, 10, 0.2), (0.0, 0, 0.2), (0.0, 5, 0.1), (0.4, 10, 0.4)):
        change = search.Change(final_smoothing=final)
        assert search.label_smoothing(opt, change, done) == pytest.approx(expected)


def test_channels_and_convolutions_of_a_change(images):
    change = search.Change(channels=(8, 16, 32), convolutions=(2, 3, 1))
    model, _ = searched(images, change, '--width', '1')
    sizes = [len(p) for name, p in model.named_parameters() if name.endswith('conv.weight')]
    assert sizes == [24, 8, 8, 16, 16, 16, 32]
    assert diracnets.create_model('diracnet-fast').features.group2.block1.conv.out_channels == 256


@pytest.mark.slow
def test_search_records_each_run_once(images, tmp_path, capsys, monkeypatch):
    # CPUs without bfloat16, in which muon computes too, emulate it slowly
    monkeypatch.setattr(search, 'Forward', lambda preprocess, dtype, device: Forward(
        preprocess, 'float', device))
    monkeypatch.setitem(search.PROXY, 'optimizer', 'sgd')
    results = tmp_path / 'search.csv'
    arguments = ['--dataroot', str(images), '--seeds', '1', '--results', str(results)]
    for only, expected in ((['recipe'], 1), (['recipe', 'hard half*', 'groups*'], 3)):
        search.main([*arguments, '--only', *only])
        assert len(read_results(results)) == expected
    recipe, *others = read_results(results)
    assert (recipe['change'], recipe['epochs'], recipe['seed']) == ('recipe', 4, 1)
    costs = {record['change']: record['multiply_adds'] / recipe['multiply_adds']
             for record in others}
    sizes = [(size / 32)**2 for size in (20, 24, 28, 32)]  # about proportional to multiply-adds
    hard = costs.pop('hard half in epoch 4')
    assert hard == pytest.approx(1 - 0.5 * sizes[3] / sum(sizes), abs=0.02)
    assert costs == {'groups of 2, 3, 3 convolutions, 64, 192, 256 channels': pytest.approx(
        0.95, abs=0.01)}
    assert capsys.readouterr().out.count('recipe, seed 1: ') == 1
    with pytest.raises(SystemExit):
        search.main([*arguments, '--only', 'Recipe'])
    assert '--only Recipe: no change matches; use one of recipe; ' in capsys.readouterr().err
