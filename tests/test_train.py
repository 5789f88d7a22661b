"""train.py: options, schedules, log, checkpoints, resuming and evaluation."""

import shlex
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import diracnets
import train
import training.run
from diracnet import define_diracnet
from diracnets.architectures import ARCHITECTURES
from diracnets.folding import fold
from diracnets.formats import to_pth
from diracnets.network import Network
from runs import params_of, refused, run, stats_of, write_images, write_sets
from training import checkpoint, options
from training.meters import Meters
from training.optimizers import lr_factor, make_optimizer, set_learning_rate
from training.run import Run
from training.setup import prepare

ROOT = Path(train.__file__).parent


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """32 training and 10 test images of two classes."""
    return write_sets(tmp_path_factory.mktemp('images'), 16, 5)


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'made' / 'parents'
    run(images, folder)
    return folder


def test_options_have_the_papers_defaults():
    opt = vars(options.parse_options([]))
    assert opt == {
        'model': 'diracnet', 'depth': 16, 'width': 1, 'dataset': 'CIFAR10', 'dataroot': '.',
        'image_size': 32, 'randomcrop_pad': 4, 'dtype': 'auto', 'batch_size': 128,
        'nthread': opt['nthread'], 'lr': 0.1, 'epochs': 200, 'weight_decay': 5e-4,
        'epoch_step': [60, 120, 160],
        'lr_decay_ratio': 0.2, 'resume': '', 'evaluate': False, 'seed': 1, 'save': 'checkpoints',
        'gpu_id': '', 'ngpu': 1, 'force': False, 'save_every': 0, 'recipe': '', 'augment': True,
        'keep_every': 0, 'deterministic': False, 'val': 0, 'lr_schedule': 'step',
        'nesterov': False, 'label_smoothing': 0, 'name': '',
        'tensorboard': False, 'pretrained': '', 'compile': 'auto', 'checkpointing': False,
        'crop': True, 'flip': 'horizontal', 'normalise': '', 'optimizer': 'sgd', 'adam_lr': 0.01,
        'grow': [], 'whiten': False, 'cutout': 0, 'check': True, 'skip_corrupt': False,
        'balance': False, 'clip_grad': 0, 'ema': 0, 'freeze': 'none',
    }


@pytest.mark.parametrize(('line', 'expected'), [
    ('--save ./logs/diracnets_12 --depth 34 --width 2', {'depth': 34, 'width': 2}),
    ('--dataroot ~/ILSVRC2012/ --dataset ImageNet --depth 18 --save ./logs/diracnet_12 '
     '--batchSize 256 --epoch_step [30,60,90] --epochs 100 --weightDecay 0.0001 '
     '--lr_decay_ratio 0.1',
     {'dataset': 'ImageNet', 'depth': 18, 'batch_size': 256, 'epoch_step': [30, 60, 90],
      'epochs': 100, 'weight_decay': 1e-4, 'lr_decay_ratio': 0.1,
      'dataroot': str(Path.home() / 'ILSVRC2012') + '/'}),
    ('--imagenetpath /data', {'dataroot': '/data'}),
    ('--normalize measured --no-augment --ngpu 1',
     {'normalise': 'measured', 'augment': False, 'ngpu': 1}),
])
def test_options_accept_the_papers_command_lines(line, expected):
    opt = vars(options.parse_options(shlex.split(line)))
    assert {name: opt[name] for name in expected} == expected


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        options.parse_options(['--help'])
    printed = ' '.join(capsys.readouterr().out.split())
    for name, value in vars(options.parse_options([])).items():
        if name in ('augment', 'ngpu'):  # only for old command lines
            assert f'--{name}' not in printed
            continue
        assert f'--{name}' in printed
        if value != '' and value is not False and name not in ('depth', 'width'):
            assert f'(default: {str(value).replace(", ", ",")})' in printed


def test_log_has_one_line_per_epoch(trained, images):
    stats = stats_of(trained)
    assert [s['epoch'] for s in stats] == [1, 2]
    assert [s['epoch_lr'] for s in stats] == pytest.approx([0.1, 0.02])
    assert [s['lr'] for s in stats] == [0.1, 0.1]  # the option
    assert set(vars(options.parse_options([]))) <= set(stats[0])
    for figure in ('train_loss', 'train_acc', 'train_time', 'test_loss', 'test_acc', 'test_time',
                   'images_per_second'):
        assert all(isinstance(s[figure], float) for s in stats)
    assert stats[0]['images_per_second'] == pytest.approx(32 / stats[0]['train_time'])
    assert (stats[0]['num_classes'], stats[0]['dataroot']) == (2, str(images))
    f, params = define_diracnet(10, 1, 'CIFAR10', num_classes=2)
    trainable = sum(p.numel() for p in params.values() if p.requires_grad)
    assert stats[0]['n_parameters'] == trainable
    assert stats[0]['test_acc'] * 10 / 100 == pytest.approx(round(stats[0]['test_acc'] / 10))
    assert 'test_acc5' not in stats[0]


def test_log_agrees_with_the_checkpoint(trained, images):
    f, _ = define_diracnet(10, 1, 'CIFAR10', num_classes=2)
    correct, loss, n = 0, 0.0, 0
    for label, name in enumerate(['cat', 'dog']):
        for path in (images / 'test' / name).iterdir():
            pixels = torch.from_numpy(cv2.imread(str(path))[:, :, ::-1].copy()).double()
            mean, std = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])
            inputs = ((pixels - mean) / std).permute(2, 0, 1)[None]
            params = {name: tensor.double() for name, tensor in params_of(trained).items()}
            logits = f(inputs, params, False)[0]
            correct += int(logits.argmax()) == label
            loss -= logits.log_softmax(0)[label].item()
            n += 1
    last = stats_of(trained)[-1]
    assert n == 10
    assert last['test_acc'] == pytest.approx(100 * correct / n)
    assert last['test_loss'] == pytest.approx(loss / n, rel=1e-4)


def test_checkpoints_have_the_documented_contents(trained):
    checkpoint = torch.load(trained / 'model.pt7', weights_only=True)
    assert {'params', 'optimizer', 'epoch', 'args', 'best'} <= set(checkpoint)
    assert (checkpoint['epoch'], checkpoint['args']['depth']) == (2, 10)
    _, params = define_diracnet(10, 1, 'CIFAR10', num_classes=2)
    assert {name: p.shape for name, p in checkpoint['params'].items()} == {
        name: p.shape for name, p in params.items()
    }
    best = torch.load(trained / 'best.pt7', weights_only=True)
    accuracies = [s['test_acc'] for s in stats_of(trained)]
    assert accuracies[best['epoch'] - 1] == checkpoint['best'] == max(accuracies)
    assert sorted(file.name for file in trained.iterdir()) == [
        'best.pt7', 'log.txt', 'model.pt7', 'previous.pt7']


def test_run_is_reproducible_with_the_same_seed(trained, images, tmp_path):
    run(images, tmp_path / 'again')
    run(images, tmp_path / 'other', '--seed', 2)
    expected = params_of(trained)
    assert all(torch.equal(p, expected[k]) for k, p in params_of(tmp_path / 'again').items())
    assert not torch.equal(expected['conv'], params_of(tmp_path / 'other')['conv'])


@pytest.mark.parametrize('resume', ['', 'model.pt7'])
def test_resumed_run_equals_the_uninterrupted_run(trained, images, tmp_path, resume):
    run(images, tmp_path / 'whole', '--epochs', 3)
    run(images, tmp_path / 'rest', '--epochs', 3, '--resume', trained / resume)
    expected = params_of(tmp_path / 'whole')
    assert all(torch.equal(p, expected[k]) for k, p in params_of(tmp_path / 'rest').items())
    rest, whole = stats_of(tmp_path / 'rest'), stats_of(tmp_path / 'whole')
    assert [(s['epoch'], s['epoch_lr']) for s in rest] == [(3, whole[2]['epoch_lr'])]
    assert rest[0]['train_loss'] == whole[2]['train_loss']


def test_order_differs_between_epochs(images, tmp_path):
    run(images, tmp_path, '--lr', 0)  # only the order of images changes the loss
    first, second = stats_of(tmp_path)
    assert first['train_loss'] != second['train_loss']
    _, fresh = define_diracnet(10, 1, 'CIFAR10', num_classes=2)
    assert params_of(tmp_path)['group0.block0.alpha'].tolist() == fresh[
        'group0.block0.alpha'].tolist()


def test_console_output(images, tmp_path, capsys):
    run(images, tmp_path / 'run')
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ['depth', '10'] for line in lines)
    assert any(line.split() == ['group1.block0.conv.weight', '(32,', '16,', '3,', '3)', '4,608']
               for line in lines)
    accuracies = [s['test_acc'] for s in stats_of(tmp_path / 'run')]
    for epoch, accuracy in enumerate(accuracies, start=1):
        assert f'==> id: {tmp_path / "run"} ({epoch}/2), test_acc: {accuracy:.2f}' in lines
    assert lines[-1].endswith(str(tmp_path / 'run'))


@pytest.mark.parametrize('dtype', ['float', 'bfloat16', 'double'])
def test_evaluate_writes_nothing(trained, images, tmp_path, capsys, dtype, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in trained.iterdir()}
    train.main(['--evaluate', '--resume', str(trained), '--dataset', 'Folder',
                '--dataroot', str(images), '--dtype', dtype])
    last = capsys.readouterr().out.splitlines()[-1]
    if dtype == 'float':
        assert last == f'test_acc: {stats_of(trained)[-1]["test_acc"]:.2f}'
    assert last.startswith('test_acc: ')
    assert {file: file.read_bytes() for file in trained.iterdir()} == before
    assert not list(tmp_path.iterdir())


def test_evaluate_checks_classes_and_needs_no_training_images(trained, tmp_path, capsys):
    write_images(tmp_path / 'same' / 'test', n=5, seed=1)  # as in the fixture
    options = ['--evaluate', '--resume', str(trained), '--dataset', 'Folder']
    train.main([*options, '--dataroot', str(tmp_path / 'same'), '--dtype', 'float'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f'test_acc: {stats_of(trained)[-1]["test_acc"]:.2f}'
    assert 'Folder: 10 test images, 2 classes; computing on 1 x cpu in float' in lines
    write_images(tmp_path / 'other' / 'test', ('cat', 'eel'))
    options += ['--dataroot', str(tmp_path / 'other')]
    assert 'classes differ' in refused(capsys, *options)
    train.main([*options, '--force'])


@pytest.mark.parametrize('dtype', ['bfloat16', 'double'])
def test_dtype_option_sets_the_parameters_dtype(images, tmp_path, dtype):
    run(images, tmp_path, '--dtype', dtype, '--epochs', 1)
    assert stats_of(tmp_path)[0]['dtype'] == dtype
    stored = torch.float64 if dtype == 'double' else torch.float32
    assert {p.dtype for p in params_of(tmp_path).values()} == {stored}


def test_log_has_top5_for_100_classes(tmp_path):
    names = [f'class{i:03d}' for i in range(100)]
    write_images(tmp_path / 'images' / 'train', names, n=1)
    write_images(tmp_path / 'images' / 'val', names, n=1)
    run(tmp_path / 'images', tmp_path / 'run', '--epochs', 1)
    stats = stats_of(tmp_path / 'run')[0]
    assert stats['test_acc5'] >= stats['test_acc']
    assert {'train_acc5', 'test_acc5'} <= set(stats)


def test_large_images_use_the_imagenet_topology(tmp_path):
    write_images(tmp_path / 'images' / 'train', n=3, size=(90, 80))
    write_images(tmp_path / 'images' / 'test', n=1, size=(80, 90))
    run(tmp_path / 'images', tmp_path / 'run', '--image_size', 70, '--depth', 18, '--width', 0.125,
        '--epochs', 1, '--nthread', 1)
    assert params_of(tmp_path / 'run')['conv'].shape == (8, 3, 7, 7)


def test_momentum_is_kept_when_the_learning_rate_drops():
    opt = options.parse_options(['--epoch_step', '[2,4]', '--lr', '0.5', '--lr_decay_ratio', '0.1'])
    weight = torch.nn.Parameter(torch.ones(2, 2))
    layer = torch.nn.Module()
    layer.weight = weight
    optimizer = make_optimizer(layer, opt)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    momentum = optimizer.state[weight]['momentum_buffer'].clone()
    shares = [lr_factor(opt, done) for done in (0, 0.9, 1, 2.9, 3, 4)]
    assert shares == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    set_learning_rate(optimizer, shares[-1])
    assert {group['lr'] for group in optimizer.param_groups} == {0.5 * shares[-1]}
    assert torch.equal(optimizer.state[weight]['momentum_buffer'], momentum)


def test_schedules_equal_those_of_torch():
    for name in ('cosine', 'onecycle'):
        opt = options.parse_options(['--lr_schedule', name, '--lr', '0.5', '--epochs', '10'])
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        if name == 'cosine':
            of_torch = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        else:
            of_torch = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.5, total_steps=101, pct_start=31 / 101, cycle_momentum=False
            )
        for step in range(100):
            rate = 0.5 * lr_factor(opt, step / 10)
            assert rate == pytest.approx(optimizer.param_groups[0]['lr'], abs=1e-9), (name, step)
            optimizer.step()
            of_torch.step()


def test_linear_schedule_warms_up_and_decays():
    opt = options.parse_options(['--lr_schedule', 'linear', '--epochs', '10'])
    shares = [lr_factor(opt, done) for done in (0, 1, 2, 6, 9.9, 10)]
    assert shares == pytest.approx([0, 0.5, 1, 0.5, 0.0125, 0])


def test_learning_rate_changes_within_an_epoch(images, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]['lr']))
    try:
        run(images, tmp_path, '--lr_schedule', 'linear', '--lr', 0.5)
    finally:
        hook.remove()
    # two epochs of three steps: up to a fifth of them, then down to 0
    assert rates == pytest.approx([0, 5 / 12, 5 / 12, 5 / 16, 5 / 24, 5 / 48])


def test_save_every_counts_minutes(images, tmp_path, monkeypatch):
    clock, steps, saved = [time.monotonic()], [], []
    save = Run.save

    def pass_time(optimizer, *_):
        steps.append(1)
        clock[0] += 2500

    def counted(run, *names, **kwargs):
        saved.append((len(steps), *names))
        save(run, *names, **kwargs)

    monkeypatch.setattr(Run, 'save', counted)
    monkeypatch.setattr(training.run, 'time', SimpleNamespace(monotonic=lambda: clock[0]))
    hook = register_optimizer_step_pre_hook(pass_time)
    try:
        run(images, tmp_path, '--save_every', 100, '--batch_size', 4, '--epochs', 1)
    finally:
        hook.remove()
    assert saved == [(3,), (6,), (8, ['best.pt7', 'model.pt7'])]  # steps of 2500 s; 8 per epoch


def test_architecture_and_optimizer_options_take_effect(images, tmp_path):
    words = ['--dataset', 'Folder', '--dataroot', str(images), '--save', str(tmp_path / 'run')]
    for more, reflect, nesterov in (
        (['--model', 'densenet', '--layers', '10', '--nesterov'], False, True),
        (['--depth', '10'], True, False),
    ):
        opt = options.parse_options([*words, *more])
        with checkpoint.Lock(opt.save) as lock:
            prepared = prepare(opt, torch.device('cpu'), lock)
        assert prepared.splits.train.augmentation.reflect is reflect
        assert {group['nesterov'] for group in prepared.optimizer.param_groups} == {nesterov}


def test_recipe_options_can_be_overridden():
    opt = options.parse_options(['--recipe', 'densenet', '--growth', '24', '--name', 'wide'])
    assert (opt.model, opt.layers, opt.growth, opt.epochs) == ('densenet', 100, 24, 300)
    assert (opt.nesterov, opt.save, opt.bottleneck) == (True, 'runs/wide', True)
    assert 'depth' not in opt
    opt = options.parse_options(['--recipe', 'diracnet-imagenet', '--model', 'resnet34'])
    assert (opt.model, opt.dataset, opt.block, opt.batch_size) == (
        'resnet34', 'ImageNet', 'base', 256)
    assert 'depth' not in opt
    opt = options.parse_options(['--recipe', 'diracnet-cifar', '--model', 'wide-resnet'])
    assert (opt.depth, opt.width) == (28, 10)
    opt = options.parse_options(['--recipe', 'dbb', '--model', 'resnet50'])
    assert (opt.block, opt.epochs) == ('dbb', 120)
    for recipe in options.RECIPES:
        assert options.parse_options(['--recipe', recipe]).recipe == recipe
    assert options.parse_options(['--model', 'wide-resnet']).depth == 28
    assert not options.parse_options(['--model', 'densenet', '--no-bottleneck']).bottleneck
    assert not options.parse_options(['--recipe', 'densenet', '--no-nesterov']).nesterov


def test_validation_split_selects_the_best_checkpoint(images, tmp_path):
    run(images, tmp_path, '--val', 8, '--epochs', 3)
    stats = stats_of(tmp_path)
    accuracies = [s['val_acc'] for s in stats]
    assert all(a in (0, 12.5, 25, 37.5, 50, 62.5, 75, 87.5, 100) for a in accuracies)
    best = torch.load(tmp_path / 'best.pt7', weights_only=True)
    assert accuracies[best['epoch'] - 1] == best['best'] == max(accuracies)
    assert stats[0]['images_per_second'] == pytest.approx(24 / stats[0]['train_time'])


def test_best_checkpoint_is_that_of_the_highest_accuracy(images, tmp_path, monkeypatch):
    accuracies = iter([50.0, 75.0, 25.0])

    def summary(meters, prefix, original=Meters.summary):
        return {**original(meters, prefix),
                **({'test_acc': next(accuracies)} if prefix == 'test' else {})}

    monkeypatch.setattr(Meters, 'summary', summary)
    run(images, tmp_path, '--epochs', 3)
    best, last = (torch.load(tmp_path / name, weights_only=True)
                  for name in ('best.pt7', 'model.pt7'))
    assert (best['epoch'], best['best']) == (2, 75)
    assert (last['epoch'], last['best']) == (3, 75)


def test_label_smoothing_applies_to_training_only(images, tmp_path):
    run(images, tmp_path / 'hard', '--lr', 0, '--epochs', 1)
    run(images, tmp_path / 'soft', '--lr', 0, '--epochs', 1, '--label_smoothing', 0.9)
    (hard,), (soft,) = stats_of(tmp_path / 'hard'), stats_of(tmp_path / 'soft')
    assert hard['test_loss'] == soft['test_loss']
    assert hard['train_loss'] != soft['train_loss']
    assert hard['train_acc'] == soft['train_acc']


def test_tensorboard_events(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run(images, tmp_path, '--tensorboard')
    assert len(list(tmp_path.glob('**/events.*'))) == 1
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars('epoch_lr')] == pytest.approx([0.1, 0.02])
    logged = [s['test_acc'] for s in stats_of(tmp_path)]
    assert [e.value for e in events.Scalars('test_acc')] == pytest.approx(logged)
    alpha = params_of(tmp_path)['group1.block0.alpha'].mean().item()
    assert events.Scalars('mean/group1.block0.alpha')[-1].value == pytest.approx(alpha)
    assert len([tag for tag in events.Tags()['scalars'] if tag.startswith('mean/')]) == 12

    def said(part):
        content = events.SummaryMetadata(f'_hparams_/{part}').plugin_data.content
        return getattr(HParamsPluginData.FromString(content), part)

    options = said('session_start_info').hparams
    assert (options['lr'].number_value, options['epoch_step'].string_value) == (0.1, '[2]')
    assert 'test_acc' in [metric.name.tag for metric in said('experiment').metric_infos]
    assert said('session_end_info').status == Status.STATUS_SUCCESS

    run(images, tmp_path, '--tensorboard', '--epochs', 4, '--resume', 'auto')
    assert len(list(tmp_path.glob('**/events.*'))) == 2  # one file per start
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars('test_acc')] == [1, 2, 3, 4]


IMAGENET = ['--image_size', 72, '--nthread', 0]
SMALLEST = {  # the smallest model of each
    'diracnet': ['--depth', 10],
    'diracnet, ImageNet': [*IMAGENET, '--depth', 18, '--width', 0.25],
    'diracnet-v1': ['--depth', 10],
    'diracnet-repeated': ['--depth', 10],
    'diracnet-v1, ImageNet': [*IMAGENET, '--depth', 18, '--width', 0.25],
    'diracnet-fast': ['--width', 0.25, '--whiten', '--optimizer', 'muon'],
    'plain': ['--depth', 10],
    'plain, dbb': ['--depth', 10, '--block', 'dbb'],
    'plain, repvgg': ['--depth', 10, '--block', 'repvgg'],
    'plain, dirac': ['--depth', 10, '--block', 'dirac'],
    'plain, ImageNet': [*IMAGENET, '--depth', 18, '--width', 0.25],
    'dirac-init': ['--depth', 10],
    'default-init': ['--depth', 10],
    'resnet': ['--depth', 10],
    'wide-resnet': ['--depth', 10, '--width', 1, '--droprate', 0.1],
    'densenet': ['--layers', 10, '--growth', 4, '--droprate', 0.1],
    'densenet121': IMAGENET,
    'resnet18': [*IMAGENET, '--block', 'acb'],
    'resnet34': IMAGENET,
    'resnet50': IMAGENET,
    'alexnet': [*IMAGENET, '--batch_size', 16],
    'mobilenet': [*IMAGENET, '--block', 'dbb'],
}
NOT_RESUMED = 'resnet34', 'resnet50'  # the same code as resnet18, but larger


def resume_after_one_epoch(go, whole, folder):
    """Resumes the run in `whole` after its first epoch, in another folder."""
    folder.mkdir()
    shutil.copy(whole / 'epoch-1.pt7', folder / 'model.pt7')
    (folder / 'log.txt').write_text((whole / 'log.txt').read_text().splitlines()[0] + '\n')
    go(folder.name, '--epochs', 2, '--keep_every', 1, '--resume', 'auto')


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow if '--image_size' in options else ())
    for name, options in SMALLEST.items()
])
def test_every_architecture_trains_resumes_and_folds(name, tmp_path):
    size = (72, 72) if '--image_size' in SMALLEST[name] else (32, 32)
    write_sets(tmp_path / 'images', 8, 2, size)
    common = ['--dataset', 'Folder', '--dataroot', tmp_path / 'images', '--batch_size', 8,
              '--lr', 0.01, '--model', name.split(',')[0], *SMALLEST[name]]

    def go(folder, *more):
        train.main([str(option) for option in (*common, '--save', tmp_path / folder, *more)])

    if name in NOT_RESUMED:
        go('run', '--epochs', 1)
    else:
        go('whole', '--epochs', 2, '--keep_every', 1)
        resume_after_one_epoch(go, tmp_path / 'whole', tmp_path / 'run')
        whole, resumed = params_of(tmp_path / 'whole'), params_of(tmp_path / 'run')
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
        assert [s['epoch'] for s in stats_of(tmp_path / 'run')] == [1, 2]

    trained = diracnets.load(tmp_path / 'run')
    network, folded = trained.model.double(), fold(trained.model, torch.float64)
    inputs = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits = network(inputs)
        assert (folded(inputs) - logits).abs().max() <= 1e-9 * logits.abs().max()
        # a folded file names its architecture: keys and shapes of a resnet are those of a DiracNet
        (tmp_path / 'folded.pth').write_bytes(to_pth(folded, None, trained.metadata()))
        again = diracnets.load(tmp_path / 'folded.pth')
        assert torch.equal(again.model(inputs), folded(inputs))
    assert (again.title, again.preprocess, again.classes) == (
        trained.title, trained.preprocess, trained.classes)


def test_every_architecture_is_tested():
    assert {name.split(',')[0] for name in SMALLEST} == set(ARCHITECTURES)


def test_resume_does_not_overwrite_another_run(trained, images, tmp_path, capsys):
    run(images, tmp_path / 'other', '--epochs', 1)
    before = (tmp_path / 'other' / 'log.txt').read_text()
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', images, '--depth', 10,
                    '--resume', trained, '--save', tmp_path / 'other')
    assert 'other: contains a run; ' in error
    for name in ('model.pt7', 'best.pt7', 'previous.pt7'):  # as in a clone: the log alone
        (tmp_path / 'other' / name).unlink(missing_ok=True)
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', images,
                    '--save', tmp_path / 'other')
    assert 'contains a run' in error
    assert (tmp_path / 'other' / 'log.txt').read_text() == before


def test_older_checkpoint_of_a_run_does_not_replace_the_newest_one(images, tmp_path, capsys):
    run(images, tmp_path / 'run', '--epochs', 2, '--keep_every', 1)
    before = {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    older = ['--resume', tmp_path / 'run' / 'epoch-1.pt7', '--epochs', 2, '--keep_every', 1]
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', images, '--depth', 10, '--save',
                    tmp_path / 'run', *older)
    assert 'run: contains a run; add --resume auto, or use another --save' in error
    assert {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()} == before
    run(images, tmp_path / 'other', *older)
    assert len(stats_of(tmp_path / 'other')) == 1  # of the second epoch


def test_evaluate_rejects_another_architecture(images, tmp_path, capsys):
    run(images, tmp_path, '--model', 'resnet', '--epochs', 1)
    common = ['--dataset', 'Folder', '--dataroot', images, '--depth', 10, '--evaluate',
              '--resume', tmp_path]
    error = refused(capsys, *common, '--model', 'plain')
    assert 'model is resnet, not plain' in error


def test_evaluate_uses_the_settings_in_the_file(tmp_path, capsys):
    write_sets(tmp_path, 8, 8, (24, 24))
    folder = ['--dataset', 'Folder', '--dataroot', str(tmp_path)]
    sizes = ['--image_size', '24', '--model', 'plain', '--depth', '10', '--width', '0.5']
    train.main([*folder, *sizes, '--block', 'acb', '--epochs', '1', '--dtype', 'float', '--save',
                str(tmp_path / 'run')])
    evaluate = [*folder, '--evaluate', '--resume', str(tmp_path / 'run')]
    capsys.readouterr()
    train.main(evaluate)
    loss, accuracy = capsys.readouterr().out.splitlines()[-2:]
    logged = stats_of(tmp_path / 'run')[0]
    assert float(loss.removeprefix('test_loss: ')) == pytest.approx(logged['test_loss'], abs=5e-5)
    assert accuracy == f'test_acc: {logged["test_acc"]:.2f}'
    for flags, message in (
        (['--image_size', 32], 'image_size is 24, not 32'),
        (['--depth', 16, '--block', 'dbb'], 'depth is 10, not 16; block is acb, not dbb'),
        (['--layers', 40], 'plain has no option --layers'),
        (['--dataset', 'Digits'], 'Digits has images of 32 pixels: expected 24'),
    ):
        assert message in refused(capsys, *evaluate, *flags)


def test_evaluate_refuses_options_that_would_select_another_model_or_other_images(capsys):
    for option in (['--pretrained', 'model.pt7'], ['--val', '50']):
        error = refused(capsys, '--evaluate', '--resume', 'run', *option)
        assert f'{option[0]} is for training; omit it' in error


def test_evaluate_uses_the_command_line_for_a_bare_state_dict(images, tmp_path, capsys):
    run(images, tmp_path, '--model', 'wide-resnet', '--width', 1, '--epochs', 1, '--dtype', 'float')
    torch.save(params_of(tmp_path), tmp_path / 'bare.pth')
    evaluate = ['--evaluate', '--resume', tmp_path / 'bare.pth', '--dataset', 'Folder',
                '--dataroot', images, '--dtype', 'float']
    train.main([str(word) for word in (*evaluate, '--model', 'wide-resnet', '--depth', 10,
                                       '--width', 1)])
    accuracy = capsys.readouterr().out.splitlines()[-1]
    assert accuracy == f'test_acc: {stats_of(tmp_path)[0]["test_acc"]:.2f}'
    assert 'bare.pth: ' in refused(capsys, *evaluate, '--model', 'resnet', '--depth', 10)
    assert 'fc.weight' not in refused(capsys, *evaluate)


def test_evaluate_rejects_images_of_another_size(images, tmp_path, capsys):
    run(images, tmp_path, '--epochs', 1)
    torch.save(params_of(tmp_path), tmp_path / 'bare.pth')
    error = refused(capsys, '--evaluate', '--resume', tmp_path / 'bare.pth', '--dataset', 'Folder',
                    '--dataroot', images, '--image_size', 128)
    assert 'image_size 128' in error
    assert '64 pixels' in error


def test_resume_falls_back_to_previous_checkpoint_when_a_key_is_missing(images, tmp_path, capsys):
    run(images, tmp_path, '--epochs', 2)
    saved = torch.load(tmp_path / 'model.pt7', weights_only=True)
    del saved['optimizer']
    torch.save(saved, tmp_path / 'model.pt7')
    run(images, tmp_path, '--epochs', 3, '--resume', 'auto')
    assert 'model.pt7: optimizer is missing' in capsys.readouterr().err
    assert [s['epoch'] for s in stats_of(tmp_path)] == [1, 2, 3]


def test_evaluate_uses_the_dataset_of_the_run(tmp_path, capsys):
    save = str(tmp_path)
    train.main(['--dataset', 'Digits', '--depth', '10', '--epochs', '1', '--save', save])
    logged = stats_of(tmp_path)[0]['test_acc']
    capsys.readouterr()
    train.main(['--evaluate', '--resume', save])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f'test_acc: {logged:.2f}'
    assert ['model', 'DiracNet-10-1'] in [line.split() for line in lines]


def test_resume_accepts_older_checkpoints_of_imagenet(tmp_path):
    """Older ones contain image_size 32 for ImageNet, which was not used."""
    write_images(tmp_path / 'train', n=2, size=(40, 40))
    write_images(tmp_path / 'val', n=1, size=(40, 40))
    line = ['--dataset', 'ImageNet', '--dataroot', str(tmp_path), '--depth', '18', '--width',
            '0.0625', '--batch_size', '4', '--nthread', '0', '--save', str(tmp_path / 'run')]
    train.main([*line, '--epochs', '1'])
    saved = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    assert saved['args']['image_size'] == 224
    saved['args']['image_size'] = 32
    torch.save(saved, tmp_path / 'run' / 'model.pt7')
    assert diracnets.load(tmp_path / 'run').preprocess.size == 224
    train.main([*line, '--epochs', '2', '--resume', 'auto'])
    assert [s['epoch'] for s in stats_of(tmp_path / 'run')] == [1, 2]


def test_evaluate_reads_other_file_formats(images, tmp_path, capsys):
    """DDP prefixes, dense deltas of the original, and folded models give the same accuracy."""
    common = ['--epochs', 1, '--dtype', 'float']
    run(images, tmp_path / 'run', '--model', 'plain', '--block', 'dbb', *common)
    run(images, tmp_path / 'dirac', *common)
    for folder, options_ in [('run', ['--model', 'plain', '--block', 'dbb']), ('dirac', [])]:
        loaded = torch.load(tmp_path / folder / 'model.pt7', weights_only=True)
        params = loaded['params']
        files = {
            'ddp.pt7': {**loaded, 'params': {f'module.{k}': v for k, v in params.items()}},
            'folded.pth': fold(diracnets.load(tmp_path / folder).model).state_dict(),
        }
        if folder == 'dirac':
            eye = torch.eye(16).view(16, 16, 1, 1)
            files['original.pt7'] = {'params': {**params, 'eye16_16_3_3': eye}, 'epoch': 1}
        for name, contents in files.items():
            torch.save(contents, tmp_path / folder / name)
            train.main(['--evaluate', '--resume', str(tmp_path / folder / name), '--dataset',
                        'Folder', '--dataroot', str(images), '--depth', '10', '--dtype', 'float',
                        *options_])
            loss = float(capsys.readouterr().out.splitlines()[-2].removeprefix('test_loss: '))
            logged = stats_of(tmp_path / folder)[-1]['test_loss']
            assert loss == pytest.approx(logged, abs=1e-3), name


def test_resume_rejects_other_classes(trained, tmp_path, capsys):
    write_images(tmp_path / 'train', ('owl', 'yak'), n=2)
    write_images(tmp_path / 'test', ('owl', 'yak'), n=2)
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', tmp_path, '--depth', 10,
                    '--resume', trained, '--save', tmp_path / 'run', '--force')
    assert 'classes differ' in error


@pytest.mark.parametrize('change', [
    {'optimizer': {}}, {'rng': {}}, {'params': {'conv': 3}}, {'step': 'one'},
])
def test_resume_rejects_malformed_checkpoints(trained, images, tmp_path, capsys, change):
    loaded = torch.load(trained / 'model.pt7', weights_only=True)
    torch.save({**loaded, **change}, tmp_path / 'odd.pt7')
    refused(capsys, '--dataset', 'Folder', '--dataroot', images, '--depth', 10, '--force',
            '--resume', tmp_path / 'odd.pt7', '--save', tmp_path / 'run')


def test_resume_rejects_more_epochs_with_a_cosine_schedule(images, tmp_path, capsys):
    run(images, tmp_path, '--lr_schedule', 'cosine', '--epochs', 1)
    with pytest.raises(SystemExit):
        run(images, tmp_path, '--lr_schedule', 'cosine', '--epochs', 2, '--resume', 'auto')
    assert 'epochs changed from 1 to 2; ' in capsys.readouterr().err


def test_weight_decay_applies_to_all_tensors_of_v1():
    for model in ('diracnet', 'diracnet-v1'):
        opt = options.parse_options(['--model', model])
        groups = make_optimizer(torch.nn.BatchNorm2d(3), opt).param_groups
        decayed = [len(g['params']) for g in groups if g['weight_decay']]
        assert decayed == ([2] if model == 'diracnet-v1' else [0])


def test_weight_decay_skips_vectors():
    network = Network(*define_diracnet(10, 1, 'CIFAR10'))
    optimizer = make_optimizer(network, options.parse_options(['--weight_decay', '0.25']))
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    for name, parameter in network.named_parameters():
        matrix = name.endswith('conv.weight') or name == 'fc.weight'
        assert decay[id(parameter)] == (0.25 if matrix else 0), name
    assert {group['momentum'] for group in optimizer.param_groups} == {0.9}


def test_meters_weight_every_image_equally():
    meters = Meters(100, 5, '')
    logits = torch.zeros(5, 100)
    logits[:, :6] = torch.tensor([6.0, 5, 4, 3, 2, 1])
    labels = torch.tensor([0, 1, 5, 4, 0])
    for part, loss in [(slice(0, 4), 1.0), (slice(4, 5), 6.0)]:
        meters.update(torch.tensor(loss), logits[part], labels[part], len(labels[part]))
    summary = meters.summary('test')
    assert summary.pop('test_time') > 0
    assert summary == pytest.approx({'test_loss': 2.0, 'test_acc': 40.0, 'test_acc5': 80.0})


@pytest.mark.parametrize(('options', 'message'), [
    (['--depth', '17', '--dataset', 'Digits'], 'the nearest are 16 and 22'),
    (['--depth', 'deep'], 'deep'),
    (['--epoch_step', '[60,120'], r"'[60,120': expected a list of epochs, such as [60,120,160]"),
    (['--epoch_step', '60'], 'expected a list of epochs'),
    (['--epoch_step', '[0.5]'], 'expected a list of epochs'),
    (['--batch_size', '0'], "'0': expected a number of at least 1"),
    (['--lr', '-1'], "'-1': expected a number of at least 0"),
    (['--lr', 'inf'], 'at most 1e+38'),
    (['--lr', 'nan'], "'nan': expected a number of at least 0"),
    (['--width', '0', '--dataset', 'Digits'],
     'width 0.0: expected at least 0.0625, for one channel\n'),
    (['--dataset', 'MNIST'], 'MNIST'),
    (['--dataset', 'Folder', '--dataroot', 'nowhere'], 'nowhere/train: no such folder'),
    (['--evaluate'], 'use --resume'),
    (['--resume', 'nowhere.pt7'], 'nowhere.pt7'),
    (['--model', 'densenet', '--depth', '10'], 'densenet has no --depth; its options are --layers'),
    (['--model', 'resnet18', '--dataset', 'Digits'], "resnet18 is not for 'CIFAR10'"),
    (['--model', 'resnet18', '--dataset', 'Digits'], 'image_size 32: images of up to 64 pixels'),
    (['--dataset', 'Folder', '--image_size', '65'],
     'larger ones the ImageNet networks'),
    (['--label_smoothing', '1'], '--label_smoothing 1.0: expected less than 1'),
    (['--val', '1437', '--dataset', 'Digits'],
     '--val 1437: expected less than the number of training images, 1437'),
    (['--width', '1e300'], 'expected a number of at least 0 and at most 10000'),
    (['--batch_size', '9' * 20], 'at most 2147483648'),
    (['--epoch_step', '[' * 20_000], 'expected a list of epochs'),
    (['--epoch_step', '{}'], 'expected a list of epochs'),
    (['--lr=--'], '--lr=--: expected a value other than --'),
    (['--val=--'], '--val=--: expected a value other than --'),
    (['--save=--'], '--save=--: expected a value other than --'),
    (['--image_size', '1000000', '--dataset', 'Folder'], 'at least 8 and at most 4096'),
    (['--lr_decay_ratio', '1e9'], "'1e9': expected a number of at least 0 and at most 1"),
    (['--save', 'x' * 300], f"--save {'x' * 300!r}: expected a writable folder"),
    (['--save', f'a/{"x" * 300}/b'], 'expected a writable folder'),
    (['--save', 'x/' * 3000], 'expected a writable folder'),
    (['--save', 'a/b\0'], r"--save 'a/b\x00': expected a writable folder"),
    (['--save', '\ud800'], r"--save '\ud800': expected a writable folder"),
    (['--image_size', '48'], '--image_size 48: expected 32'),
    (['--randomcrop_pad', '32'], '--randomcrop_pad 32: expected less than the image, 32'),
    (['--gpu_id', '99'], '--gpu_id 99: no such CUDA device'),
    (['--gpu_id', 'first'], "--gpu_id 'first': expected "),
    (['--save', '/dev/null/x'], "--save '/dev/null/x': expected a writable folder"),
    (['--save', ''], "--save '': expected a writable folder"),
    (['--name', 'a', '--save', 'b'], '--name and --save both given'),
    (['--recipe', 'mine'], 'mine'),
    (['--ngpu', '2'], 'torchrun --nproc_per_node=2 train.py --ngpu 2'),
    (['--colour'], '--colour'),
    (['--model', 'diracnet-fast', '--dataset', 'Folder', '--image_size', '8'],
     'images of 8 pixels are too small for diracnet-fast'),
    (['--model', 'alexnet', '--dataset', 'ImageNet', '--grow', '[32,224]'],
     'images of 32 pixels are too small for alexnet'),
    (['--dataset', 'ImageNet', '--depth', '18', '--grow', '[24,224]'],
     'images of 24 pixels are too small for diracnet'),
])
def test_options_reject_invalid_values(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *options)
    assert not list(tmp_path.iterdir())


def test_resume_rejects_another_architecture(trained, images, capsys, tmp_path):
    options = ['--dataset', 'Folder', '--dataroot', images, '--resume', trained]
    options += ['--save', tmp_path / 'new', '--batch_size', 12]
    error = refused(capsys, *options, '--depth', 10, '--width', 2)
    assert 'width changed from 1 to 2.0; epoch_step changed from [2] to [60, 120, 160]' in error
    options.append('--force')
    error = refused(capsys, *options, '--depth', 10, '--width', 2)
    assert 'bn.bias is (16,), expected (32,)' in error
    error = refused(capsys, *options, '--depth', 16)
    assert 'group0.block2.alpha is missing' in error
    assert 'more' in error


@pytest.mark.parametrize('content', [b'', b'half a file', b'PK\x03\x04 cut'])
def test_resume_rejects_corrupt_checkpoints(content, capsys, tmp_path):
    (tmp_path / 'model.pt7').write_bytes(content)
    error = refused(capsys, '--resume', tmp_path, '--save', tmp_path / 'run')
    assert 'corrupt, or not a file that torch.load reads' in error


def test_train_does_not_overwrite_a_run(trained, images, capsys):
    before = (trained / 'model.pt7').read_bytes()
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', images, '--save', trained)
    assert f'--save {trained}: contains a run; ' in error
    assert (trained / 'model.pt7').read_bytes() == before


@pytest.mark.parametrize('nthread', [0, 2])
def test_unreadable_image_ends_training_in_one_line(tmp_path, capsys, nthread):
    write_sets(tmp_path, 2, 2, (70, 70))
    broken = tmp_path / 'train' / 'dog' / '1.png'
    broken.write_bytes(b'nothing')
    error = refused(
        capsys, '--dataset', 'Folder', '--dataroot', tmp_path, '--image_size', 70, '--depth', 18,
        '--width', 0.125, '--save', tmp_path / 'run', '--nthread', nthread,
    )
    assert f'{broken}: not a readable image' in error


def test_make_train_command_parses():
    makefile = (ROOT / 'Makefile').read_text().replace('\\\n', ' ')
    line = next(line for line in makefile.splitlines() if 'train.py --dataset Digits' in line)
    opt = options.parse_options(shlex.split(line)[2:-1])
    assert (opt.dataset, opt.epochs) == ('Digits', 20)
    assert 'runs/' in (ROOT / '.gitignore').read_text().splitlines()
