"""Options that change a run: --freeze, --clip_grad, --balance and --ema."""

import signal

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Subset

import diracnets
import train
from diracnets.architectures import ARCHITECTURES
from diracnets.image_files import DataError
from runs import (
    assert_same_run,
    on_ranks,
    params_of,
    refused,
    run,
    send_signal,
    stats_of,
    write_images,
)
from training.data import DataSplits
from training.freezing import freeze, last_layer_params, stem
from training.loader import BatchSampler, make_loader
from training.run import Run
from training.tensorboard import TensorBoardWriter

ALL = ['--model', 'plain', '--freeze', 'stem', '--clip_grad', 0.5, '--balance', '--ema', 0.9]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """24 training images of class cat and 8 of class dog, and 10 test images."""
    root = tmp_path_factory.mktemp('images')
    write_images(root / 'train', n=24)
    for i in range(8, 24):
        (root / 'train' / 'dog' / f'{i}.png').unlink()
    write_images(root / 'test', n=5, seed=1)
    return root


@pytest.fixture(scope='module')
def before(images, tmp_path_factory):
    """The folders of runs of one epoch, by model."""
    folders = {}

    def folder(model):
        if model not in folders:
            folders[model] = tmp_path_factory.mktemp('before')
            run(images, folders[model], '--epochs', 1, *SIZES[model])
        return folders[model]

    return folder


# ---------------------------------------------------------------- --freeze


SIZES = {  # the options of a small model
    'diracnet': [], 'plain': ['--model', 'plain'],
    'plain-dbb': ['--model', 'plain', '--block', 'dbb'],
    'wide-resnet': ['--model', 'wide-resnet', '--width', 1],
}
STEMS = {  # the names in the state dict that start with one of these
    'diracnet': ('conv', 'bn.'), 'plain': ('features.conv.', 'features.bn.'),
    'plain-dbb': ('features.conv.',), 'wide-resnet': ('conv.',),
}


@pytest.mark.parametrize('model', SIZES)
@pytest.mark.parametrize('part', ['stem', 'features'])
def test_freeze_keeps_parameters_and_running_statistics(images, before, tmp_path, model, part):
    run(images, tmp_path, '--epochs', 1, *SIZES[model], '--pretrained', before(model), '--freeze',
        part, '--weight_decay', 0.1)
    old, new = params_of(before(model)), params_of(tmp_path)
    for name in old:
        frozen = name.startswith(STEMS[model]) if part == 'stem' else not name.startswith('fc.')
        if frozen or not name.endswith('num_batches_tracked'):
            assert torch.equal(old[name], new[name]) == frozen, name


@pytest.mark.parametrize(('name', 'block'), [
    *((name, None) for name in ARCHITECTURES), ('plain', 'dbb'), ('alexnet', 'acb'),
    ('plain', 'repvgg'), ('mobilenet', 'dirac'),
])
def test_freeze_finds_the_first_convolution_and_the_last_layer(name, block):
    with torch.device('meta'):
        model = diracnets.create_model(name, **({'block': block} if block else {}))
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert any(module is first for root in stem(model) for module in root.modules())
    assert not any(isinstance(module, nn.Linear) for root in stem(model) for module in
                   root.modules())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    norms = freeze(model, 'features')
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert list(map(id, trained)) == list(map(id, linear.parameters()))
    assert len(last_layer_params(model)) == len(trained)
    assert len(norms) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_freeze_without_pretrained_parameters_is_named(images, before, tmp_path, capsys):
    line = '--freeze stem: without --pretrained, layers keep their initial values\n'
    run(images, tmp_path / 'new', '--epochs', 1, '--freeze', 'stem')
    assert line in capsys.readouterr().out
    run(images, tmp_path / 'tuned', '--epochs', 1, '--freeze', 'stem', '--pretrained',
        before('diracnet'))
    assert line not in capsys.readouterr().out


def test_freeze_features_is_rejected_with_muon(images, tmp_path, capsys):
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', images, '--model', 'plain',
                    '--depth', 10, '--freeze', 'features', '--optimizer', 'muon', '--save',
                    tmp_path / 'run')
    assert 'all filters are frozen' in error


# ---------------------------------------------------------------- --clip_grad


def gradients_of(images, folder, *options):
    """Trains one epoch; returns the gradient of each step as one vector."""
    gradients = []

    def read(optimizer, *_):
        gradients.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups
                                    for p in group['params']]))

    hook = register_optimizer_step_pre_hook(read)
    try:
        run(images, folder, '--model', 'plain', '--epochs', 1, '--dtype', 'double', *options)
    finally:
        hook.remove()
    return gradients


def test_clip_grad_limits_the_norm_of_each_step(images, tmp_path):
    free = gradients_of(images, tmp_path / 'free')
    limit = free[0].norm().item() / 4
    clipped = gradients_of(images, tmp_path / 'clipped', '--clip_grad', limit)
    torch.testing.assert_close(clipped[0], free[0] / 4, rtol=1e-5, atol=1e-9)
    assert all(gradient.norm() <= limit * (1 + 1e-9) for gradient in clipped)
    unlimited = gradients_of(images, tmp_path / 'high', '--clip_grad', 1e6)
    assert all(map(torch.equal, free, unlimited))


# ---------------------------------------------------------------- --balance


def indices_of(sampler, epoch=1, step=0):
    """Returns the image indices of each batch on this rank."""
    sampler.set_epoch(epoch, step)
    return [indices[local].tolist() for indices, _, local in sampler]


def test_balance_samples_classes_equally_often():
    labels = torch.tensor([0] * 900 + [1] * 80 + [2] * 20)[torch.randperm(1000)]
    sampler = BatchSampler(1000, 64, seed=1, labels=labels)
    counts = torch.zeros(1000)
    for epoch in range(1, 31):
        counts += torch.tensor(sum(indices_of(sampler, epoch), [])).bincount(minlength=1000)
    by_class = torch.zeros(3).scatter_add(0, labels, counts)
    std = (30_000 * 1 / 3 * 2 / 3) ** 0.5  # of a binomial distribution
    assert (by_class - 10_000).abs().max() < 4 * std
    for label in range(3):  # each image of a class equally often
        images = counts[labels == label]
        expected = 10_000 / len(images)
        assert (images - expected).abs().max() < 5 * expected**0.5, label


def test_balance_does_not_depend_on_ranks_and_resumes_within_an_epoch():
    labels = torch.tensor([0] * 40 + [1] * 10)
    whole = indices_of(BatchSampler(50, 16, seed=1, labels=labels), 3)
    ranks = [indices_of(BatchSampler(50, 16, 1, rank, 3, labels), 3) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks)] == whole
    assert indices_of(BatchSampler(50, 16, seed=1, labels=labels), 3, step=2) == whole[2:]
    assert whole not in (indices_of(BatchSampler(50, 16, seed=1, labels=labels), 4),
                         indices_of(BatchSampler(50, 16, seed=2, labels=labels), 3))


class Items(torch.utils.data.Dataset):
    """Images of 8 x 8 pixels and their labels, 16 times 0 and twice 1; `loaded` counts them."""

    classes = ['a', 'b']

    def __init__(self):
        self.targets, self.loaded = [0] * 16 + [1] * 2, 0

    def __len__(self):
        return 18

    def __getitem__(self, i):
        self.loaded += 1
        return torch.full((3, 8, 8), i / 255), self.targets[i]


def test_balance_uses_the_targets_of_a_dataset():
    items = Items()
    subset = Subset(items, [17, 16, 0, 1, 2, 3, 4, 5])
    subset.classes = items.classes
    dataset = DataSplits.from_arrays(subset, items).train.subset(torch.tensor([1, 3, 4, 5]))
    items.loaded = 0
    loader = make_loader(dataset, 400, 0, seed=1, balance=True)
    assert items.loaded == 0
    expected = torch.tensor([1, 1 / 3, 1 / 3, 1 / 3]).double()
    torch.testing.assert_close(loader.sampler.weights, expected)
    for targets in (['a', 'b'] * 9, [0, 1], [-1, 1] * 9, [0.5] * 18):
        items.targets = targets
        with pytest.raises(DataError, match='--balance: invalid `targets` of the Dataset'):
            make_loader(dataset, 400, 0, seed=1, balance=True)
    del items.targets
    with pytest.raises(DataError, match='has no `targets`'):
        make_loader(dataset, 400, 0, seed=1, balance=True)


# ---------------------------------------------------------------- --ema


def test_ema_is_the_average_of_parameters_and_running_statistics(
    images, tmp_path, monkeypatch, capsys
):
    states, end_step = [], Run.end_step

    def recording(run, *arguments):
        states.append({name: t.double() for name, t in run.model.state_dict().items()})
        end_step(run, *arguments)

    monkeypatch.setattr(Run, 'end_step', recording)
    flags = ['--model', 'plain', '--dtype', 'float']
    run(images, tmp_path / 'run', *flags, '--ema', 0.75)
    average = states[0]
    for state in states[1:]:
        average = {name: 0.75 * average[name] + 0.25 * state[name] for name in state}
    saved = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    loaded = diracnets.load(tmp_path / 'run').model.state_dict()
    for name, expected in average.items():
        if not name.endswith('num_batches_tracked'):
            torch.testing.assert_close(saved['ema'][name].double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(loaded[name], saved['ema'][name])
            assert torch.equal(saved['params'][name].double(), states[-1][name])
    result = train.main(['--evaluate', '--resume', str(tmp_path / 'run'), '--dataset', 'Folder',
                         '--dataroot', str(images), '--dtype', 'float'])
    last = stats_of(tmp_path / 'run')[-1]
    assert result['test_loss'] == pytest.approx(last['test_loss'], rel=1e-5)
    run(images, tmp_path / 'tuned', *flags, '--pretrained', tmp_path / 'run', '--lr', 0,
        '--epochs', 1)
    assert torch.equal(params_of(tmp_path / 'tuned')['fc.weight'], saved['ema']['fc.weight'])


def test_tensorboard_shows_the_average_of_ema(images, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(TensorBoardWriter, 'write',
                        lambda self, stats, model: shown.append(model.state_dict()))
    run(images, tmp_path, '--ema', 0.75, '--tensorboard', '--epochs', 1)
    average = torch.load(tmp_path / 'model.pt7', weights_only=True)['ema']
    assert all(torch.equal(tensor, average[name]) for name, tensor in shown[0].items())


def test_ema_does_not_change_the_weights(images, tmp_path):
    run(images, tmp_path / 'with', '--model', 'plain', '--ema', 0.5)
    run(images, tmp_path / 'without', '--model', 'plain')
    with_ema, without = (params_of(tmp_path / name) for name in ('with', 'without'))
    assert all(torch.equal(with_ema[name], tensor) for name, tensor in without.items())
    assert 'ema' not in torch.load(tmp_path / 'without' / 'model.pt7', weights_only=True)


def test_ema_rejects_a_decay_of_1(capsys):
    assert '--ema 1.0: expected less than 1' in refused(capsys, '--ema', '1')


# ---------------------------------------------------------------- all together


@pytest.mark.parametrize('epoch', [1, 2])
def test_resume_within_an_epoch_equals_the_uninterrupted_run(
    images, before, tmp_path, monkeypatch, epoch
):
    options = [*ALL, '--pretrained', before('plain')]
    run(images, tmp_path / 'whole', *options)
    with monkeypatch.context() as patch:
        send_signal(patch, signal.SIGTERM, epoch=epoch)
        with pytest.raises(SystemExit):
            run(images, tmp_path / 'run', *options)
    assert torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)['step'] == 1
    run(images, tmp_path / 'run', *options, '--resume', 'auto')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_resume_of_an_older_checkpoint_has_the_options_off(images, before, tmp_path, capsys):
    saved = torch.load(before('plain') / 'model.pt7', weights_only=True)
    for name in ('freeze', 'clip_grad', 'balance', 'ema'):
        del saved['args'][name]
    torch.save(saved, tmp_path / 'older.pt7')
    flags = ['--dataset', 'Folder', '--dataroot', images, '--depth', 10, '--batch_size', 12,
             '--epoch_step', '[2]', '--resume', tmp_path / 'older.pt7', '--save', tmp_path / 'run']
    error = refused(capsys, *flags, *ALL)
    for change in ('freeze changed from none to stem', 'clip_grad changed from 0 to 0.5',
                   'ema changed from 0 to 0.9', 'balance changed from False to True'):
        assert change in error
    run(images, tmp_path / 'run', '--model', 'plain', '--resume', tmp_path / 'older.pt7')


def test_force_does_not_resume_with_another_optimizer(images, before, tmp_path, capsys):
    options = ['--dataset', 'Folder', '--dataroot', images, '--depth', 10, '--batch_size', 12,
               '--epoch_step', '[2]', '--model', 'plain', '--resume', before('plain'), '--force']
    error = refused(capsys, *options, '--optimizer', 'muon', '--save', tmp_path / 'run')
    assert 'optimizer changed from sgd to muon; use the same optimizer, or start' in error


def test_force_selects_the_best_epoch_anew_on_other_images(images, tmp_path, capsys):
    run(images, tmp_path / 'run')
    saved = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    torch.save({**saved, 'best': 100.0}, tmp_path / 'run' / 'model.pt7')
    run(images, tmp_path / 'run', '--resume', 'auto', '--epochs', 3)
    assert torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)['best'] == 100
    assert 'replaces best.pt7' not in capsys.readouterr().out
    run(images, tmp_path / 'run', '--resume', 'auto', '--epochs', 4, '--val', 6, '--force')
    assert 'the next epoch replaces best.pt7' in capsys.readouterr().out
    last = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    assert last['best'] == stats_of(tmp_path / 'run')[-1]['val_acc']


@pytest.mark.slow
def test_compile_does_not_change_the_run(images, before, tmp_path):
    options = [*ALL, '--model', 'diracnet', '--pretrained', before('diracnet'), '--dtype', 'double']
    run(images, tmp_path / 'eager', *options)
    run(images, tmp_path / 'compiled', *options, '--compile')
    eager, compiled = (torch.load(tmp_path / name / 'model.pt7', weights_only=True)
                       for name in ('eager', 'compiled'))
    for kind in ('params', 'ema'):
        assert eager[kind].keys() == compiled[kind].keys()
        for name, tensor in eager[kind].items():
            torch.testing.assert_close(compiled[kind][name], tensor, rtol=1e-6, atol=1e-9)
            if name.startswith(STEMS['diracnet']):
                kept = params_of(before('diracnet'))[name].double()
                assert torch.equal(compiled['params'][name], kept)
    assert not any('compile_time' in stats for stats in stats_of(tmp_path / 'eager'))
    assert all(stats['compile_time'] > 0 for stats in stats_of(tmp_path / 'compiled'))


@pytest.mark.slow
def test_result_does_not_depend_on_the_number_of_ranks(images, before, tmp_path):
    """With frozen batch norms, whose statistics would depend on it; in float64."""
    argv = ['--dataset', 'Folder', '--dataroot', images, '--depth', 10, '--batch_size', 12,
            '--epochs', 2, *ALL, '--freeze', 'features', '--pretrained', before('plain'), '--dtype',
            'double', '--clip_grad', 0.05, '--save']
    for count in (1, 2):
        on_ranks(tmp_path, count, train.main, [*map(str, argv), str(tmp_path / f'{count}')])
    one, two = (torch.load(tmp_path / name / 'model.pt7', weights_only=True) for name in '12')
    for kind in ('params', 'ema'):
        for name, tensor in one[kind].items():
            torch.testing.assert_close(two[kind][name], tensor, rtol=1e-9, atol=1e-12)
    assert not torch.equal(one['params']['fc.weight'], one['ema']['fc.weight'])
    for metric in ('train_loss', 'test_loss'):
        first, second = (stats_of(tmp_path / name)[-1][metric] for name in '12')
        assert first == pytest.approx(second, rel=1e-9)
