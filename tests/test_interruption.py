"""Runs that are interrupted, killed or given invalid input, and runs on several processes."""

import contextlib
import errno
import io
import itertools
import multiprocessing
import operator
import os
import re
import resource
import shlex
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from corruption import png_of
from diracnets.checkpoint import load_dict_file
from fault_injection import children_of, flat, inject_faults, kill_at_random
from gradients import write_gradients
from pages import text_of
from runs import (
    assert_same_run,
    in_child,
    on_ranks,
    params_of,
    refused,
    run,
    send_signal,
    started,
    stats_of,
    wait_until,
    write_images,
)
from training import checkpoint, distributed, interruption, meters, options
from training.interruption import SignalHandler, StoppedError
from training.log import read_log
from training.optimizers import lr_factor
from training.setup import check_ranks_agree

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
SMALL = ['--dataset', 'Folder', '--depth', '10', '--width', '1', '--batch_size', '13']


def docs_command(start):
    """Returns the words of the command in docs/training.md that starts with `start`."""
    (line,) = re.findall(rf'^    ({re.escape(start)}.*)$', text_of('docs/training.md'), re.M)
    return shlex.split(line, comments=True)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """40 training and 7 test images: uneven over ranks, with a last batch of 1 image (of 13)."""
    root = tmp_path_factory.mktemp('images')
    write_images(root / 'train', n=20)
    write_images(root / 'test', n=4, seed=1)
    (root / 'test' / 'dog' / '3.png').unlink()
    return root


def small_state(epoch):
    """The contents of a checkpoint as train.py writes it, of a small model."""
    return {
        'params': {'conv': torch.randn(4, 3, 3, 3), 'fc.bias': torch.zeros(2)},
        'optimizer': {'state': {0: {'momentum_buffer': torch.randn(4, 3, 3, 3)}}},
        'epoch': epoch, 'step': 0, 'args': {'depth': 10, 'width': 0.25, 'save': 'logs/a'},
        'rng': checkpoint.rng_state(), 'versions': checkpoint.versions(),
    }


def exit_at_file_operation(point, folder):
    """Ends this process before its n-th file operation in a folder."""
    operations = itertools.count(1)

    def hook(event, arguments):
        if (event in ('open', 'os.link', 'os.remove', 'os.rename')
                and str(arguments[0]).startswith(folder) and next(operations) == point):
            os._exit(1)

    sys.addaudithook(hook)


# ---------------------------------------------------------------- interrupted and killed


@pytest.mark.slow
def test_resume_after_a_fault_at_a_file_operation(tmp_path):
    """One of them; `python tests/fault_injection.py --points` tests all."""
    count, problems = inject_faults(tmp_path, [9], '--width', '0.25')
    assert (count, problems) == (3, [])


@pytest.mark.slow
def test_resume_after_kills_gives_the_uninterrupted_run(tmp_path):
    alive, _, differences = kill_at_random(tmp_path, kills=2, epochs=5, seed=1)
    assert differences == []
    assert alive == 2


@pytest.mark.parametrize('has_links', [True, False])
def test_save_leaves_complete_checkpoints_when_killed_at_any_file_operation(
    tmp_path, monkeypatch, has_links
):
    """A forked process saves epoch 2 and dies before its first, second, ... file operation."""
    def no_link(source, target):
        raise OSError(errno.EPERM, 'Operation not permitted')

    if not has_links:
        monkeypatch.setattr(os, 'link', no_link)
    names = ['epoch-N.pt7', 'best.pt7', 'model.pt7']
    for point in itertools.count(1):
        folder = tmp_path / str(point)
        folder.mkdir()
        checkpoint.save(folder, small_state(1), ['best.pt7', 'model.pt7'])
        pid = os.fork()
        if pid == 0:
            exit_at_file_operation(point, str(folder))
            checkpoint.save(folder, small_state(2), names)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        epochs = {path.name: load_dict_file(str(path))['epoch'] for path in folder.glob('*.pt7')}
        assert checkpoint.load(folder)['epoch'] == epochs.get('model.pt7', 1)
        assert epochs['best.pt7'] >= epochs.get('model.pt7', 1)
        checkpoint.save(folder, small_state(3), names)
        assert not list(folder.glob('*.tmp'))
        assert {load_dict_file(str(folder / name))['epoch'] for name in names} == {3}
        assert load_dict_file(str(folder / 'previous.pt7'))['epoch'] == epochs.get('model.pt7', 1)
        inodes = {(folder / name).stat().st_ino for name in names}
        assert len(inodes) == (1 if has_links else 3)
        if status == 0:
            break
    assert point > 8


@pytest.mark.parametrize(('number', 'where'), [
    (signal.SIGTERM, 'train_one_epoch'), (signal.SIGINT, 'train_one_epoch'),
    (signal.SIGTERM, 'evaluate'),
])
def test_signal_saves_and_the_printed_command_resumes(
    images, whole, tmp_path, capsys, monkeypatch, number, where
):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        send_signal(patch, number, where, epoch=2)
        with pytest.raises(SystemExit) as stopped:
            run(images, tmp_path, '--epochs', 3)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(signal.SIGINT) is before
    last = capsys.readouterr().out.splitlines()[-1]
    steps = 1 if where == 'train_one_epoch' else 4
    assert f'interrupted by {number.name} in epoch 2 after {steps} steps; checkpoint saved' in last
    saved = torch.load(tmp_path / 'model.pt7', weights_only=True)
    assert (saved['epoch'], saved['step']) == (1, steps)
    command = last.split('resume with: python train.py ')[1]
    train.main(shlex.split(command))
    assert_same_run(tmp_path, whole)


COMBINATIONS = {
    'defaults': [],
    'bfloat16, cosine': ['--dtype', 'bfloat16', '--lr_schedule', 'cosine'],
    'muon': ['--optimizer', 'muon', '--lr', 0.02, '--lr_schedule', 'linear'],
    'augmentation, save_every': ['--flip', 'all', '--cutout', 8, '--save_every', 1e-5],
    'dropout': ['--model', 'wide-resnet', '--width', 1, '--droprate', 0.3],
    'average': ['--ema', 0.9, '--freeze', 'stem'],
    'balanced, clipped': ['--balance', '--clip_grad', 1],
    'progressive resizing': ['--grow', '[16,24,32]', '--label_smoothing', 0.1],
    'checkpointing, float64': ['--checkpointing', '--dtype', 'double'],
    'files and workers': ['--image_size', 70, '--depth', 18, '--width', 0.125, '--nthread', 2],
}


def train_until(split, epoch, arguments):
    """Trains; ends as with SIGKILL in the first step on a split, 'train' or an evaluated one."""
    meters = train.Meters

    def make_meters(classes, length, title, *others):
        in_split = title.endswith(f', {split}') if split != 'train' else ', ' not in title
        if title.startswith(f'epoch {epoch}/') and in_split:
            train.cross_entropy = lambda *_: os._exit(1)
        return meters(classes, length, title, *others)

    train.Meters = make_meters
    run(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize('case', COMBINATIONS)
def test_resume_equals_the_uninterrupted_run(images, tmp_path, monkeypatch, case):
    """Killed in training and in testing, and interrupted in training and in validation."""
    options = ['--epochs', 3, '--val', 6, '--batch_size', 6, *COMBINATIONS[case]]
    run(images, tmp_path / 'whole', *options)
    folder, resume = tmp_path / 'stopped', [*options, '--resume', 'auto']
    for epoch, split in ((2, 'train'), (2, 'test')):
        code, *_ = in_child(tmp_path / split, train_until, split, epoch, (images, folder, *resume))
        assert code == 1
        assert len(stats_of(folder)) == epoch - 1
    for where in ('train_one_epoch', 'evaluate'):
        with monkeypatch.context() as patch:
            send_signal(patch, signal.SIGTERM, where)
            with pytest.raises(SystemExit):
                run(images, folder, *resume)
        state = checkpoint.load(folder)
        assert state['epoch'] == 1
        assert state['step'] in ((1, 6) if where == 'train_one_epoch' else (6,))  # of 6
    run(images, folder, *resume)
    assert_same_run(folder, tmp_path / 'whole')


@pytest.mark.slow
def test_sigterm_to_the_process_group_saves_with_workers(tmp_path):
    write_images(tmp_path / 'train', n=8, size=(70, 70))
    write_images(tmp_path / 'test', n=2, size=(70, 70))
    command = ['train.py', '--dataset', 'Folder', '--dataroot', tmp_path, '--image_size', 70,
               '--depth', 18, '--width', 0.125, '--nthread', 2, '--batch_size', 4,
               '--save', tmp_path / 'run']
    model = tmp_path / 'run' / 'model.pt7'
    with started(sys.executable, *command) as training:
        wait_until(lambda: training.poll() is not None or model.exists())
        os.killpg(training.pid, signal.SIGTERM)
        printed, errors = training.communicate(timeout=120)
    assert training.returncode == 128 + signal.SIGTERM, errors
    assert 'interrupted by SIGTERM' in printed
    assert torch.load(model, weights_only=True)['epoch'] >= 1


def test_second_ctrl_c_exits_at_once():
    with SignalHandler() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_resume_auto_starts_and_resumes_a_run(images, whole, tmp_path):
    python, script, *line = docs_command('python train.py --depth 34 --width 2 --save')
    assert (python, script) == ('python', 'train.py')
    small = [*SMALL, '--dataroot', images, '--batch_size', 12, '--save', tmp_path]
    for epochs in (2, 3):
        train.main([*line, *map(str, small), '--epochs', str(epochs), '--epoch_step', '[2]'])
    assert_same_run(tmp_path, whole)


def test_resume_repairs_a_truncated_log(images, whole, tmp_path):
    run(images, tmp_path, '--epochs', 2)
    log = tmp_path / 'log.txt'
    text = log.read_text()
    log.write_text(text[:-40])
    assert [s['epoch'] for s in read_log(str(log))] == [1]
    log.write_text(text + text.splitlines()[1].replace('"epoch": 2', '"epoch": 3')[:-50])
    run(images, tmp_path, '--epochs', 3, '--resume', 'auto')
    assert_same_run(tmp_path, whole)


def test_full_disk_keeps_the_last_checkpoint(images, whole, tmp_path, capsys):
    run(images, tmp_path, '--epochs', 1)
    before = params_of(tmp_path)
    size = (tmp_path / 'model.pt7').stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            run(images, tmp_path, '--epochs', 3, '--resume', 'auto')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith('train.py: ')
    assert 'cannot be written' in error
    assert error.count('\n') == 1
    after = params_of(tmp_path)
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert not list(tmp_path.glob('*.tmp'))
    run(images, tmp_path, '--epochs', 3, '--resume', 'auto')
    assert_same_run(tmp_path, whole)


def test_divergence_keeps_the_last_checkpoint(images, tmp_path, capsys):
    run(images, tmp_path, '--epochs', 1)
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path, '--epochs', 3, '--resume', 'auto', '--force', '--lr', '1e30')
    assert stopped.value.code == 3
    error = capsys.readouterr().err
    assert re.fullmatch(r'train.py: the loss is (nan|inf) in step [2-4] of epoch 2, '
                        r'learning rate 2e\+29; the last checkpoint is kept\n', error)
    saved = torch.load(tmp_path / 'model.pt7', weights_only=True)
    assert saved['epoch'] == 1
    assert all(tensor.isfinite().all() for tensor in saved['params'].values())


def test_save_every_writes_no_checkpoint_when_the_loss_is_nan(images, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path, '--lr', '1e30', '--save_every', '1e-9')
    assert stopped.value.code == 3
    saved = torch.load(tmp_path / 'model.pt7', weights_only=True)
    assert saved['epoch'] == 0
    assert saved['totals'][1] == pytest.approx(saved['totals'][1])  # no NaN


@pytest.mark.parametrize(('content', 'message'), [
    (b'nothing', 'not a readable image'), (png_of(100_000, 100_000), '100000 x 100000 pixels'),
], ids=['no image', 'huge'])
def test_unreadable_image_saves_before_the_error(tmp_path, capsys, content, message):
    def options_(save):
        return ['--dataset', 'Folder', '--dataroot', tmp_path, '--image_size', 70, '--depth', 18,
                '--width', 0.125, '--save', tmp_path / save, '--nthread', 0, '--epochs', 1,
                '--batch_size', 2, '--resume', 'auto', '--no-check']

    write_images(tmp_path / 'train', n=4, size=(70, 70))
    write_images(tmp_path / 'test', n=2, size=(70, 70))
    train.main([str(option) for option in options_('whole')])
    broken = tmp_path / 'train' / 'dog' / '1.png'
    good = broken.read_bytes()
    broken.write_bytes(content)
    with pytest.raises(SystemExit):
        train.main([str(option) for option in options_('run')])
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(f'train.py: {broken}: {message}')
    assert re.search(r'stopped in epoch 1 after \d steps; checkpoint saved; resume with: python '
                     r'train.py .* --resume auto .*\(if you remove the image below, add --force\)',
                     printed.out.splitlines()[-1])
    saved = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    assert 0 <= saved['step'] < 4
    broken.write_bytes(good)
    train.main([str(option) for option in options_('run')])
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def main_with_open_files(argv, max_open_files):
    if max_open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_open_files, max_open_files))
    train.main(list(map(str, argv)))


def ended(command, folder, max_open_files=None):
    """Runs train.py in a child process; returns (exit code, stderr)."""
    status, _, errors = in_child(folder, main_with_open_files, command, max_open_files)
    return status, errors


@pytest.mark.slow
def test_unreadable_image_exits_while_threads_decode_others(tmp_path):
    write_images(tmp_path / 'train', n=1)
    write_images(tmp_path / 'test', n=1)
    flat_image = tmp_path / 'flat.png'  # large, so that other threads are still decoding
    cv2.imwrite(str(flat_image), np.zeros((2000, 2000, 3), np.uint8))
    for i in range(130):
        (tmp_path / 'train' / 'dog' / f'{i + 1}.png').symlink_to(flat_image)
    broken = tmp_path / 'train' / 'cat' / '0.png'
    broken.write_bytes(b'nothing')
    command = [*SMALL, '--dataroot', tmp_path, '--nthread', 4, '--save', tmp_path / 'run']
    assert ended(command, tmp_path) == (2, f'train.py: {broken}: not a readable image\n')


@pytest.mark.slow
def test_run_fails_when_workers_need_more_open_files(tmp_path):
    write_images(tmp_path / 'train', n=4, size=(70, 70))
    write_images(tmp_path / 'test', n=2, size=(70, 70))
    command = ['--dataset', 'Folder', '--dataroot', tmp_path, '--image_size', 70, '--depth', 18,
               '--width', 0.125, '--nthread', 2, '--batch_size', 4, '--epochs', 1, '--save',
               tmp_path / 'run']
    status, errors = ended(command, tmp_path / 'refused', 24)
    assert status == 2
    needed = re.fullmatch('train.py: 2 DataLoader workers need ([0-9]+) open files, .* 24; .*\n',
                          errors)
    assert needed
    assert ended(command, tmp_path / 'enough', int(needed[1])) == (0, '')


# ---------------------------------------------------------------- invalid input


@pytest.fixture(scope='module')
def small_checkpoint(tmp_path_factory):
    """The bytes of a checkpoint as train.py writes it, of a small network."""
    folder = tmp_path_factory.mktemp('small')
    checkpoint.save(folder, small_state(3))
    return (folder / 'model.pt7').read_bytes()


def test_corrupt_checkpoint_gives_an_error_or_its_contents(small_checkpoint, tmp_path, request):
    good = dict(flat(torch.load(io.BytesIO(small_checkpoint), weights_only=True)))
    path = tmp_path / 'best.pt7'

    @settings(max_examples=request.config.getoption('--fuzz'), deadline=None, database=None,
              derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.integers(0, len(small_checkpoint) - 1), st.integers(1, 255)),
                    max_size=3),
           st.integers(0, 200) | st.integers(0, len(small_checkpoint)), st.booleans())
    def flip_and_cut(flips, cut, from_end):
        content = bytearray(small_checkpoint)
        for position, change in flips:
            content[position] ^= change
        if from_end:
            del content[len(content) - cut :]
        path.write_bytes(content)
        loaded, message = None, None
        try:
            loaded = checkpoint.load(str(path))
        except ValueError as error:
            message = str(error)
        if message:
            assert '\n' not in message
            assert message.startswith(f'{path}: ')
            return
        loaded = dict(flat(loaded))
        assert loaded.keys() == good.keys()
        for name, value in good.items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(value, loaded[name]), name

    flip_and_cut()


def test_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    class Touch:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'code ran'),))

    torch.save({'params': Touch(), 'optimizer': {}, 'epoch': 1, 'args': {}}, tmp_path / 'a.pt7')
    error = refused(capsys, '--resume', tmp_path / 'a.pt7', '--save', tmp_path / 'run')
    assert 'refused' in error
    assert 'mkdir' in error
    assert not (tmp_path / 'code ran').exists()


def test_invalid_options_give_one_line(request, capsys):
    names = sorted('--' + name for name in vars(options.parse_options([])))
    text = st.text(st.characters(codec='utf-8'), max_size=12) | st.just('--') | st.just('a' * 300)
    number = st.integers() | st.floats() | st.lists(st.integers(-5, 500) | st.floats(), max_size=3)

    @settings(max_examples=request.config.getoption('--fuzz'), deadline=None, database=None,
              derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(names), text | number.map(str)), min_size=1,
                    max_size=3))
    def parse(pairs):
        capsys.readouterr()
        opt, status = None, None
        try:
            opt = options.parse_options([f'{name}={value}' for name, value in pairs])
        except SystemExit as stopped:
            status = stopped.code
        if status is not None:
            assert status == 2
            assert re.fullmatch('train.py: [^\n]+\n', capsys.readouterr().err)
            return
        assert opt.batch_size >= 1
        rates = [opt.lr * lr_factor(opt, part * opt.epochs) for part in (0, 0.5, 1)]
        assert all(0 <= rate < float('inf') for rate in rates)
        assert all(isinstance(epoch, int) for epoch in opt.epoch_step)

    parse()


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_number_of_ranks(tmp_path):
    """Three ranks, of which two have no image in the last batch."""
    one, many = tmp_path / 'one.pt', tmp_path / 'many.pt'
    write_gradients(one)
    on_ranks(tmp_path, 3, write_gradients, many)
    one, many = torch.load(one), torch.load(many)
    assert len(one) == len(many) == 4
    for alone, shared in zip(one, many):
        for name, gradient in alone.items():
            error = (gradient - shared[name]).abs().max() / gradient.abs().max().clamp_min(1e-6)
            assert error < 1e-10, name


@pytest.mark.parametrize(('rank', 'local', 'expected'), [
    (0, 0, 'a||||'), (1, 1, '||||a'), (2, 0, '||a||'), (3, 1, '||||a'),
])
def test_rank_zero_first_loads_on_one_machine_after_the_other(monkeypatch, rank, local, expected):
    """Four processes on two machines; a: load() is called; |: a barrier."""
    done = []
    monkeypatch.setenv('LOCAL_RANK', str(local))
    monkeypatch.setattr(distributed, 'rank', lambda: rank)
    monkeypatch.setattr(distributed, 'world_size', lambda: 4)
    monkeypatch.setattr(distributed.dist, 'barrier', lambda: done.append('|'))
    assert distributed.rank_zero_first(lambda: done.append('a') or 'read') == 'read'
    assert ''.join(done) == expected


def test_check_ranks_agree_fails_when_steps_differ(monkeypatch):
    run = SimpleNamespace(epoch=2, step=7, opt=SimpleNamespace(save='run'))
    check_ranks_agree(run)
    monkeypatch.setattr('training.setup.all_reduce', lambda numbers, op: (
        [0, 0] if op == torch.distributed.ReduceOp.MIN else numbers))
    with pytest.raises(ValueError, match='run: .* 2 epochs and 7 steps'):
        check_ranks_agree(run)


def test_launcher_has_the_start_time_of_the_parent_process():
    pid, ticks, _ = distributed.launcher().split()
    assert int(pid) == os.getppid()
    (boot,) = re.findall(r'^btime (\d+)$', Path('/proc/stat').read_text(), re.M)
    started = int(boot) + int(ticks) / os.sysconf('SC_CLK_TCK')
    assert int(boot) < started <= time.time() + 1


@pytest.mark.parametrize('other', [
    lambda launcher: re.sub(r' \d+ ', ' 1 ', launcher),  # process 1 of an earlier container
    lambda launcher: re.sub(r'^\d+', '1', launcher), lambda launcher: os.getppid(),
])
def test_restart_resumes_only_the_run_of_its_own_launcher(
    images, whole, tmp_path, capsys, monkeypatch, other
):
    run(images, tmp_path, '--epochs', 2)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    path = tmp_path / 'model.pt7'
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, 'launcher': other(saved['launcher'])}, path)
    error = refused(capsys, *SMALL, '--dataroot', images, '--save', tmp_path)
    assert f'--save {tmp_path}: contains a run' in error
    torch.save(saved, path)
    run(images, tmp_path, '--epochs', 3)
    assert_same_run(tmp_path, whole)


def test_init_fails_when_a_process_has_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'current_accelerator',
                        lambda check_available: torch.device('cuda'))
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 4)
    monkeypatch.setenv('LOCAL_RANK', '4')
    with pytest.raises(ValueError, match='process 4 of this machine has no GPU.* 4 or less'):
        distributed.init()


@pytest.mark.parametrize('kind', ['cuda', 'xpu', 'mps'])
def test_init_selects_the_accelerator_of_torch(monkeypatch, kind):
    monkeypatch.setattr(torch.accelerator, 'current_accelerator',
                        lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    assert distributed.init() == torch.device(kind)
    assert torch.backends.cudnn.benchmark == (kind == 'cuda')


def test_rng_state_of_an_accelerator_is_restored(monkeypatch):
    """Of this device only; older checkpoints have the states of all CUDA devices."""
    device = SimpleNamespace(states=[torch.tensor([5])])
    device.get_rng_state = lambda: device.states[-1]
    device.set_rng_state = device.states.append
    monkeypatch.setattr(torch.accelerator, 'current_accelerator',
                        lambda check_available: torch.device('cuda'))
    monkeypatch.setattr(torch, 'get_device_module', lambda kind: device)
    state = checkpoint.rng_state()
    assert state['cuda'] == [torch.tensor([5])]
    checkpoint.set_rng_state({**state, 'cuda': [torch.tensor([7]), torch.tensor([8])]})
    assert device.states == [torch.tensor([5]), torch.tensor([7])]
    for other in ({'mps': [torch.tensor([9])]}, {'cuda': []}):  # of another device, of the CPU
        checkpoint.set_rng_state({**{k: v for k, v in state.items() if k != 'cuda'}, **other})
    assert len(device.states) == 2


def test_meters_can_be_reduced_twice(monkeypatch):
    """As for two processes with equal batches, and a signal after the training metrics."""
    monkeypatch.setattr(meters, 'all_reduce', lambda numbers: [2 * number for number in numbers])
    measured = meters.Meters(10, 3, '', steps=0)
    measured.update(torch.tensor(0.5), torch.eye(10)[[1, 2, 4]], torch.tensor([1, 2, 3]), 3)
    summary = measured.summary('train')
    assert summary['train_loss'] == pytest.approx(0.5)
    assert summary['train_acc'] == pytest.approx(200 / 3)
    _, loss, n, right = measured.totals()
    assert (loss, n) == (pytest.approx(3), 6)
    assert right in (2, 4)  # two of three are wrong, or one, in each process


@contextlib.contextmanager
def agents_of(machines, images, folder, *options):
    """Runs the torchrun command of the docs with two processes, on one or two "machines"."""
    line = docs_command(f'torchrun --n{"proc" if machines == 1 else "nodes"}')
    with socket.create_server(('127.0.0.1', 0)) as free:
        address = f'127.0.0.1:{free.getsockname()[1]}'
    line = [word.replace('HOST:29500', address) for word in line[1:]]
    line[line.index('--nproc_per_node=8')] = f'--nproc_per_node={2 // machines}'
    line = [*TORCHRUN, '--max_restarts=3', '--monitor_interval=0.1', *line, *SMALL,
            '--dataroot', images, '--save', folder, *options]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(started(*line)) for _ in range(machines)]


def wait_for_epochs(agents, folder, epochs):
    log = folder / 'log.txt'
    wait_until(lambda: agents[0].poll() is not None or (
        log.exists() and len(read_log(str(log))) >= epochs))


@pytest.mark.slow
def test_evaluate_does_not_depend_on_the_number_of_ranks(images, tmp_path):
    folder = tmp_path / 'run'
    command = list(map(str, [*SMALL, '--dataroot', images, '--save', folder]))
    printed = on_ranks(tmp_path / 'training', 2, train.main, [*command, '--epochs', '2'])
    assert printed.count('==> id: ') == 2
    assert (tmp_path / 'training' / 'rank1-of-2' / 'stdout').read_text() == ''
    assert 'computing on 2 x cpu' in printed
    assert [s['epoch'] for s in stats_of(folder)] == [1, 2]

    command += ['--evaluate', '--resume', str(folder)]
    lines = [
        on_ranks(tmp_path, count, train.main, command).splitlines()[-2:]
        for count in (1, 2, 3)
    ]
    assert lines[0] == lines[1] == lines[2]
    loss = float(lines[0][0].removeprefix('test_loss: '))
    assert loss == pytest.approx(stats_of(folder)[-1]['test_loss'], abs=1e-4)
    accuracy = float(lines[0][1].removeprefix('test_acc: '))
    assert accuracy == pytest.approx(stats_of(folder)[-1]['test_acc'], abs=0.005)
    assert accuracy * 7 / 100 == pytest.approx(round(accuracy * 7 / 100), abs=0.001)


@pytest.mark.slow
@pytest.mark.parametrize('machines', [1, 2])
def test_torchrun_restarts_and_resumes_when_a_process_is_killed(images, tmp_path, machines):
    folder = tmp_path / 'run'
    # without --resume, only a single launcher recognizes its own restart
    resume = ['--resume', 'auto'] * (machines == 2)
    options = ['--epochs', 6, '--batch_size', 8, *resume]
    with agents_of(machines, images, folder, *options) as agents:
        wait_for_epochs(agents, folder, 2)
        victim = agents[-1].pid
        os.kill(children_of(victim)[-1], signal.SIGKILL)
        outputs = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * machines, outputs
    assert [s['epoch'] for s in stats_of(folder)] == list(range(1, 7))
    printed = ''.join(out for out, _ in outputs)
    assert printed.count('computing on 2 x cpu') == 2  # before and after the restart


@pytest.mark.slow
def test_sigterm_to_several_processes_saves_at_the_end_of_short_epochs(images, tmp_path):
    folder = tmp_path / 'run'
    with agents_of(1, images, folder, '--epochs', 10_000, '--batch_size', 8) as agents:
        wait_for_epochs(agents, folder, 2)
        agents[0].terminate()  # torchrun forwards it to the processes and waits for them
        printed, _ = agents[0].communicate(timeout=120)
    assert 'interrupted by SIGTERM in epoch' in printed
    saved = torch.load(folder / 'model.pt7', weights_only=True)
    assert saved['epoch'] >= 2
    assert 1 <= saved['step'] <= 5  # at the end of the epoch at the latest


@pytest.mark.parametrize(('seconds', 'interval'), [(0.001, 20), (0.3, 6), (0.5, 4), (7, 1)])
def test_ranks_exchange_signals_by_time(monkeypatch, seconds, interval):
    """seconds: of a step on this rank; the other rank has got no signal."""
    clock, exchanged = [100.0], []

    def all_reduce(numbers, op):
        exchanged.append(step)
        return numbers

    monkeypatch.setattr(interruption, 'time', SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(interruption, 'world_size', lambda: 2)
    monkeypatch.setattr(interruption, 'all_reduce', all_reduce)
    with SignalHandler() as signals:
        for step in range(1, 51):
            clock[0] += seconds
            assert signals.agree(step == 50, due=step > 40) == (exchanged[-1] == step > 40)
        assert exchanged == sorted({*range(1, 50, interval), 50})
        step = 51
        signals.number = signal.SIGTERM
        clock[0] += seconds
        with pytest.raises(StoppedError, match=str(int(signal.SIGTERM))):
            signals.agree(True)


def test_ranks_use_the_step_time_of_the_slowest(monkeypatch):
    """The other rank measured 10 s for the first step."""
    monkeypatch.setattr(interruption, 'time', SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(interruption, 'world_size', lambda: 2)
    monkeypatch.setattr(interruption, 'all_reduce', lambda numbers, op: [0, True, 10.0])
    with SignalHandler() as signals:
        assert signals.agree(False)
        assert signals.interval == 1


def test_second_signal_does_not_interrupt_the_save(images, tmp_path, capsys, monkeypatch):
    write, received = checkpoint.write_synced, []

    def sending(path, content):
        os.kill(os.getpid(), signal.SIGTERM)
        write(path, content)

    send_signal(monkeypatch, signal.SIGTERM)
    monkeypatch.setattr(checkpoint, 'write_synced', sending)
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        with pytest.raises(SystemExit) as stopped:
            run(images, tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert received == []  # the second signal came to the handler of the run
    assert torch.load(tmp_path / 'model.pt7', weights_only=True)['step'] == 1


def test_signal_while_workers_are_forked_does_not_raise_there(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / 'train', n=4, size=(70, 70))
    write_images(tmp_path / 'test', n=2, size=(70, 70))
    started, start = [], multiprocessing.Process.start

    def sending(process):
        start(process)
        os.kill(os.getpid(), signal.SIGTERM)
        started.append(process)

    monkeypatch.setattr(multiprocessing.Process, 'start', sending)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, tmp_path / 'run', '--image_size', 70, '--depth', 18, '--width', 0.125,
            '--nthread', 2)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(started) == 2
    assert torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)['step'] == 0
