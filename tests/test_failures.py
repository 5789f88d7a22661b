"""Robustness: runs that fail, dying workers, a full disk, and malicious or corrupt files."""

import contextlib
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import export
import predict
import train
from diracnets.checkpoint import load_dict, load_dict_file
from diracnets.image_files import DataError
from diracnets.preprocessing import read_test_image
from fault_injection import children_of
from pages import ROOT
from runs import (
    assert_same_run,
    on_ranks,
    params_of,
    refused,
    run,
    started,
    stats_of,
    wait_until,
    write_sets,
)
from training import augmentation, checkpoint
from training.interruption import SignalHandler
from training.loader import WorkerError, iterate_batches
from training.log import append_log, read_log, truncate_log


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp('images'), 20, 4)


@pytest.fixture(scope='module')
def large_images(tmp_path_factory):
    """Images that DataLoader workers decode during training."""
    return write_sets(tmp_path_factory.mktemp('large'), 16, 2, (70, 70))


def is_finite(path):
    saved = torch.load(path, weights_only=True)
    momenta = [state['momentum_buffer'] for state in saved['optimizer']['state'].values()]
    return all(tensor.isfinite().all() for tensor in [*saved['params'].values(), *momenta])


# ---------------------------------------------------------------- lost or corrupt work


def test_divergence_keeps_finite_checkpoints(images, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path, '--lr', 1e5, '--epochs', 3, '--save_every', 1e-7, '--dtype', 'float')
    assert stopped.value.code == 3
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert 'the last checkpoint is kept' in error
    for name in ('model.pt7', 'previous.pt7'):
        assert is_finite(tmp_path / name)


def test_divergence_in_the_first_epoch_writes_nothing(images, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path, '--lr', 1e30, '--epochs', 1, '--batch_size', 2000)
    assert stopped.value.code == 3
    error = capsys.readouterr().err
    assert 'test_loss is nan after step 1 of epoch 1' in error
    assert 'checkpoint' not in error  # there is none
    assert not list(tmp_path.iterdir())


def allocate():
    torch.empty(2**60, dtype=torch.uint8)


def raise_cuda_error():
    raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0')


def raise_memory_error():
    raise MemoryError


@pytest.mark.parametrize(('fail', 'reason'), [
    (raise_cuda_error, 'CUDA out of memory'), (raise_memory_error, 'out of memory'),
    (allocate, f"can't allocate memory: you tried to allocate {2**60} bytes"),
])
@pytest.mark.parametrize('function', ['train_one_epoch', 'prepare'])
def test_out_of_memory_is_one_line(
    images, tmp_path, capsys, monkeypatch, fail, reason, function
):
    def train_one_epoch(*arguments):
        fail()

    monkeypatch.setattr(train, function, train_one_epoch)
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path)
    assert stopped.value.code == 1
    fix = ('use a smaller --batch_size' if function == 'train_one_epoch' else
           'use fewer images, or a smaller --image_size or model')
    assert capsys.readouterr().err == f'train.py: {reason}; {fix}\n'


def test_log_error_names_the_file(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, 'fsync', fsync)
    for write in (append_log, truncate_log):
        (tmp_path / 'log.txt').write_text('json_stats: {"epoch": 2}\n')
        with pytest.raises(OSError, match=r'log.txt: .*No space left'):
            write(tmp_path, {'epoch': 3} if write is append_log else 1)
    assert read_log(tmp_path / 'log.txt') == [{'epoch': 2}]  # it was not cut


def test_truncate_log_does_not_follow_a_symlink(tmp_path):
    (tmp_path / 'victim').write_text('mine')
    (tmp_path / 'log.txt.tmp').symlink_to(tmp_path / 'victim')
    append_log(tmp_path, {'epoch': 1})
    truncate_log(tmp_path, 0)
    assert (tmp_path / 'victim').read_text() == 'mine'
    assert (tmp_path / 'log.txt').read_text() == ''


def test_lock_refuses_a_second_run_in_the_same_folder(images, tmp_path, capsys):
    with checkpoint.Lock(tmp_path) as lock:
        lock.acquire()
        error = refused(capsys, '--dataset', 'Folder', '--dataroot', images, '--depth', 10,
                        '--save', tmp_path, '--resume', 'auto')
    assert error.startswith(f'train.py: {tmp_path}: another run ')
    run(images, tmp_path, '--epochs', 1)  # the lock is released


@pytest.mark.parametrize('name', ['log.txt', 'model.pt7', 'best.pt7', 'model.pt7.tmp'])
@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo])
def test_train_refuses_a_folder_whose_files_are_not_regular(images, tmp_path, capsys, name, make):
    path = tmp_path / 'run' / name
    path.parent.mkdir()
    make(path)
    for resume in ([], ['--resume', 'auto']):
        error = refused(capsys, '--dataset', 'Folder', '--dataroot', images, '--depth', 10,
                        '--save', path.parent, *resume)
        assert error.startswith(f'train.py: {path}: not a regular file; ')
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('replaced', [False, True])
def test_run_ends_when_its_folder_is_removed(images, tmp_path, capsys, monkeypatch, replaced):
    folder, original, epochs = tmp_path / 'run', train.train_one_epoch, []

    def removing(*arguments):
        epochs.append(1)
        if len(epochs) == 2:
            shutil.rmtree(folder)
            if replaced:
                run(images, folder, '--epochs', 1, '--seed', 2)  # another run
        return original(*arguments)

    monkeypatch.setattr(train, 'train_one_epoch', removing)
    with pytest.raises(SystemExit) as stopped:
        run(images, folder)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert error.startswith(f'train.py: {folder}: was removed or replaced')
    if replaced:
        assert [stats['seed'] for stats in stats_of(folder)] == [2]
        assert torch.load(folder / 'model.pt7', weights_only=True)['args']['seed'] == 2
    else:
        assert not folder.exists()


def test_lock_warns_when_the_file_system_has_no_locks(images, tmp_path, capsys, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(checkpoint.fcntl, 'flock', flock)
    run(images, tmp_path, '--epochs', 1)
    assert 'cannot be locked (No locks available)' in capsys.readouterr().err
    assert len(stats_of(tmp_path)) == 1


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_corrupt_checkpoint_never_replaces_a_complete_one(
    images, whole, tmp_path, capsys, monkeypatch
):
    run(images, tmp_path, '--epochs', 2)
    corrupt(tmp_path / 'model.pt7')
    replace = os.replace

    def checked(source, target):
        replace(source, target)
        load_dict(str(tmp_path))  # at each moment there is a checkpoint that loads

    monkeypatch.setattr(os, 'replace', checked)
    run(images, tmp_path, '--epochs', 3, '--resume', 'auto')
    assert f'using {tmp_path}/previous.pt7' in capsys.readouterr().err
    monkeypatch.undo()
    assert_same_run(tmp_path, whole)
    assert load_dict_file(str(tmp_path / 'previous.pt7'))
    with pytest.raises(ValueError, match='damaged'):
        load_dict_file(str(tmp_path / 'damaged.pt7'))


def small_run(images, save, *more):
    """The command line of a run of two epochs."""
    return [sys.executable, 'train.py', '--dataset', 'Folder', '--dataroot', str(images), '--depth',
            '10', '--batch_size', '12', '--epochs', '2', '--epoch_step', '[2]', '--save', str(save),
            *map(str, more)]


@pytest.mark.slow
@pytest.mark.parametrize('where', ['| head -1', '> /dev/full'])
def test_a_closed_stdout_does_not_stop_training(images, tmp_path, where):
    line = f'{" ".join(small_run(images, tmp_path / "run"))} {where}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith('stdout: ')
    assert done.stderr.count('\n') == 1
    run(images, tmp_path / 'shown')
    assert_same_run(tmp_path / 'run', tmp_path / 'shown')


def test_failing_tensorboard_writes_do_not_stop_training(images, tmp_path, capsys, monkeypatch):
    import torch.utils.tensorboard

    def full(folder, **options):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(torch.utils.tensorboard, 'SummaryWriter', full)
    run(images, tmp_path, '--tensorboard')
    assert capsys.readouterr().err.count('[Errno 28] No space') == 2
    assert torch.load(tmp_path / 'model.pt7', weights_only=True)['epoch'] == 2


@contextlib.contextmanager
def run_with_workers(images, save):
    """Starts a run with two DataLoader workers: (process, worker pids) after a checkpoint."""
    with started(sys.executable, 'train.py', '--dataset', 'Folder', '--dataroot', images,
                 '--image_size', 70, '--depth', 18, '--width', 0.125, '--nthread', 2,
                 '--batch_size', 4, '--epochs', 1000, '--save', save) as process:
        wait_until(lambda: process.poll() is not None or (save / 'model.pt7').exists())
        workers = [child for child in children_of(process.pid)
                   if b'train.py' in Path(f'/proc/{child}/cmdline').read_bytes()]
        try:
            yield process, workers
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGCONT)  # a stopped process never ends


@pytest.mark.slow
def test_the_checkpoint_stays_when_a_worker_is_killed(large_images, tmp_path):
    with run_with_workers(large_images, tmp_path / 'run') as (process, workers):
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'died (DataLoader worker' in errors
    assert errors.count('\n') == 1
    saved = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    assert saved['epoch'] >= 1


@pytest.mark.parametrize('error', [EOFError(), ConnectionResetError(104, 'reset by peer')])
def test_iterate_batches_raises_worker_error_when_a_worker_dies_during_a_transfer(error):
    class Loader:
        num_workers = 2

        def __iter__(self):
            yield 'a batch'
            raise error

    loader = Loader()
    batches = iterate_batches(loader)
    assert next(batches) == 'a batch'
    with pytest.raises(WorkerError, match=rf'died \(DataLoader worker: {type(error).__name__}\)'):
        next(batches)
    loader.num_workers = 0  # the error is of the dataset itself
    with pytest.raises(type(error)) as raised:
        list(iterate_batches(loader))
    assert raised.value is error


@pytest.mark.slow
def test_iterate_batches_raises_worker_error_when_workers_are_killed(large_images):
    # in a new process, where torch has not handled SIGCHLD yet
    script = f'''
import multiprocessing, time
from diracnets.preprocessing import Preprocessing
from training import data
from training.loader import WorkerError, make_loader, iterate_batches

preprocess = Preprocessing.for_dataset('Folder', image_size=70)
sets = data.load_splits('Folder', {str(large_images)!r}, preprocess=preprocess)
batches = iterate_batches(make_loader(sets.train, 1, nthread=2, seed=1))
next(batches)
workers = multiprocessing.active_children()
for worker in workers:
    worker.kill()
while any(worker.is_alive() for worker in workers):  # SIGCHLD arrives
    time.sleep(0.01)
print(len(workers), 'dead')
try:
    list(batches)
except WorkerError as error:
    print(error)
'''
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dead, error = done.stdout.splitlines()
    assert dead == '2 dead'
    assert 'died (DataLoader worker' in error


@pytest.mark.slow
def test_sigterm_saves_when_workers_are_stalled(large_images, tmp_path):
    with run_with_workers(large_images, tmp_path / 'run') as (process, workers):
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        time.sleep(2)  # the run waits for a batch then
        model = tmp_path / 'run' / 'model.pt7'
        before = model.stat().st_mtime_ns
        process.terminate()
        # for a moment there is none: it was renamed to previous.pt7
        wait_until(lambda: model.exists() and model.stat().st_mtime_ns > before, 30)
        for worker in workers:  # so that they can end with it
            os.kill(worker, signal.SIGCONT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert 'interrupted by SIGTERM in epoch' in printed


@pytest.mark.slow
def test_a_killed_run_releases_its_lock(large_images, tmp_path):
    with run_with_workers(large_images, tmp_path / 'run') as (process, workers):
        def opened(pid):  # realpath: no error for files closed meanwhile
            return [os.path.realpath(link) for link in Path(f'/proc/{pid}/fd').iterdir()]

        assert str(tmp_path / 'run') in opened(process.pid)
        assert len(workers) >= 2
        for worker in workers:  # they end later
            assert str(tmp_path / 'run') not in opened(worker)
        process.kill()
        process.wait()
        with checkpoint.Lock(tmp_path / 'run') as lock:
            lock.acquire()
        process.communicate(timeout=60)  # the workers have ended then


def test_sighup_saves_and_resume_continues(images, whole, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def closing(*arguments, **more):
        if not (tmp_path / 'model.pt7').exists():
            os.kill(os.getpid(), signal.SIGHUP)
        return evaluate(*arguments, **more)

    monkeypatch.setattr(train, 'evaluate', closing)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
    try:
        with pytest.raises(SystemExit) as stopped:
            run(images, tmp_path, '--epochs', 3)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stopped.value.code == 128 + signal.SIGHUP
    run(images, tmp_path, '--epochs', 3, '--resume', 'auto')
    assert_same_run(tmp_path, whole)


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.number == 0
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize(('ranks', 'options'), [
    (2, ['--batch_size', 64, '--val', 1]), (2, ['--batch_size', 1, '--val', 1]),
    (3, ['--batch_size', 2]),
])
def test_ranks_without_images_in_a_batch(images, tmp_path, ranks, options):
    on_ranks(tmp_path, ranks, run, images, tmp_path / 'run', '--epochs', 1, *options)
    (stats,) = stats_of(tmp_path / 'run')
    assert all(math.isfinite(value) for value in stats.values() if isinstance(value, float))


def test_save_every_does_not_change_the_result(images, whole, tmp_path):
    run(images, tmp_path, '--epochs', 3, '--save_every', 1e-9)
    assert_same_run(tmp_path, whole)


# ---------------------------------------------------------------- malicious and corrupt files


@pytest.mark.parametrize('ending', ['.png', '.jpg', '.bmp', '.webp', '.tiff', '.ppm'])
def test_corrupt_images_give_pixels_or_a_data_error(ending, tmp_path, request):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    good = cv2.imencode(ending, cv2.resize(pixels, (90, 80)))[1].tobytes()
    path = str(tmp_path / f'image{ending}')

    @settings(max_examples=request.config.getoption('--fuzz') // 6 + 1, deadline=60_000,
              database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.integers(0, len(good) - 1) | st.integers(0, 40),
                              st.integers(1, 255)), max_size=4),
           st.just(0) | st.integers(0, len(good)))
    def flip_and_cut(flips, cut):
        content = bytearray(good)
        for position, change in flips:
            content[position] ^= change
        Path(path).write_bytes(content[: len(content) - cut])
        for read in (read_test_image, augmentation.read_random_crop):
            message, shape = f'{path}: ', (70, 70, 3)
            try:
                shape = read(path, 70).shape
            except DataError as error:
                message = str(error)
            assert shape == (70, 70, 3)
            assert message.startswith(f'{path}: ')
            assert '\n' not in message

    flip_and_cut()


def nested(depth):
    """A list with shared elements: small in a file, 8**depth when traversed."""
    inner = ['a']
    for _ in range(depth):
        inner = [inner] * 8
    return inner


def deep(depth):
    inner = []
    for _ in range(depth):
        inner = [inner]
    return inner


INVALID = {  # refused by every command: (change of a checkpoint, error)
    'nested lists': ({'args': {'depth': nested(40)}}, 'more than 1000000 values'),
    'deep lists': ({'classes': deep(100)}, 'nested deeper than 20'),
    'long text': ({'classes': ['a' * 100_000, 'b']}, 'a text of 100000 characters'),
    'negative step': ({'step': -1}, 'step is -1'),
    'negative epoch': ({'epoch': -1}, 'epoch is -1'),
    'epoch in words': ({'epoch': 'two'}, "epoch is 'two'"),
    'best': ({'best': 1e9}, 'best is 1000000000.0'),
    'best in words': ({'best': 'good'}, "best is 'good'"),
    'totals': ({'totals': ['a'] * 4}, 'totals is .*: expected four or five non-negative'),
    'negative totals': ({'step': 1, 'totals': [1.0, -1.0, 12, 2]}, r'totals is .*-1\.0'),
    'half of the momenta': (
        {'optimizer': {'state': {0: {'momentum_buffer': torch.ones(3)}, 1: {}},
                       'param_groups': [{'params': [0]}, {'params': [1]}]}},
        'optimizer has the momenta of 1 of 2 parameters'),
    'momenta of none': (
        {'optimizer': {'state': {0: {'momentum_buffer': None},
                                 1: {'momentum_buffer': torch.ones(3)}},
                       'param_groups': [{'params': [0, 1]}]}},
        'optimizer has the momenta of 1 of 2 parameters'),
    'random states': ({'rng': 3}, 'rng is 3: expected a dict'),
    'options': ({'args': {'depth': {}}}, 'args is .*: expected a dict of plain options'),
    'classes': ({'classes': [1, 2]}, r'classes is \[1, 2\]: expected a list of names'),
    'statistics': ({'stats': [1]}, r'stats is \[1\]: expected a dict'),
}
PARAMS = {  # (change of a parameter, error)
    'integers': (lambda t: t.int(), 'conv is of torch.int32: expected floating-point numbers'),
    'not a number': (lambda t: t * math.nan, 'conv contains non-finite'),
    'no tensor': (lambda t: t.tolist(), "'conv' is a list"),
    'sparse': (lambda t: t.to_sparse(), "'conv' is sparse"),
    'compressed rows': (lambda t: t.flatten(1).to_sparse_csr(), "'conv' is sparse"),
    'without numbers': (lambda t: t.to('meta'), "'conv' is on the device meta"),
    'nested': (lambda t: torch.nested.nested_tensor([t[0], t[1]]),  # torch 2.15 refuses the file
               "'conv' is nested|would call torch._utils._rebuild_nested_tensor"),
    '8 bits': (lambda t: t.to(torch.float8_e4m3fn), "'conv' is of torch.float8_e4m3fn"),
    'complex': (lambda t: t.to(torch.complex64), "'conv' is of torch.complex64"),
    'expanded': (lambda t: torch.ones(1).expand(100_000, 100_000), "'conv' is expanded"),
}
INVALID_TO_RESUME = {  # refused by --resume only
    'step beyond the end': ({'step': 5, 'totals': [1.0, 1.0, 40, 2]}, 'step 5 of an epoch: expect'),
    'too many totals': ({'step': 2, 'totals': [1.0, 1.0, 24, 2, 1]}, '5 totals: expected 4'),
    'no momentum': ({'optimizer': {'state': {}, 'param_groups': []}}, 'no momentum'),
    'another optimizer': (
        {'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}, 'param_groups': []}},
        "not a checkpoint of this run: KeyError: 'momentum_buffer'"),
    'momentum of another shape': (
        {'optimizer': {'state': {0: {'momentum_buffer': torch.ones(3)}}, 'param_groups': []}},
        r'a momentum is \(3,\), expected \(16, 3, 3, 3\)'),
    'python state': ({'rng': {'python': 1}}, 'not a checkpoint of this run: TypeError'),
}


def refuse_to_resume(images, whole, tmp_path, capsys, change, message):
    saved = torch.load(whole / 'model.pt7', weights_only=True)
    torch.save({**saved, **change}, tmp_path / 'model.pt7')
    error = refused(
        capsys, '--dataset', 'Folder', '--dataroot', images, '--depth', 10, '--batch_size', 12,
        '--epochs', 4, '--epoch_step', '[2]', '--save', tmp_path, '--resume', 'auto',
    )
    assert re.search(message, error), error
    assert len(error) < 500


@pytest.mark.parametrize('case', [*INVALID, *INVALID_TO_RESUME])
def test_resume_fails_when_a_checkpoint_has_invalid_values(images, whole, tmp_path, capsys, case):
    refuse_to_resume(images, whole, tmp_path, capsys, *{**INVALID, **INVALID_TO_RESUME}[case])


@pytest.mark.parametrize('case', PARAMS)
def test_resume_fails_when_parameters_are_invalid(images, whole, tmp_path, capsys, case):
    change, message = PARAMS[case]
    params = params_of(whole)
    changed = {'params': {**params, 'conv': change(params['conv'])}}
    refuse_to_resume(images, whole, tmp_path, capsys, changed, message)


def every_command_refuses(path, tmp_path, capsys, message):
    new = str(tmp_path / 'new')
    for main, arguments in (
        (export.main, [path, '--to', str(tmp_path / 'x.pth')]),
        (predict.main, ['x.png', '--model', path]),
        (train.main, ['--evaluate', '--resume', path, '--dataset', 'Digits']),
        (train.main, ['--pretrained', path, '--dataset', 'Digits', '--depth', '10', '--save', new]),
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.count('\n') == 1


@pytest.mark.parametrize('case', ['nested lists', 'negative step', 'classes', 'options',
                                  'negative totals', 'half of the momenta'])
def test_every_command_refuses_invalid_checkpoints(images, whole, tmp_path, capsys, case):
    change, message = INVALID[case]
    path = str(tmp_path / 'model.pt7')
    torch.save({**torch.load(whole / 'model.pt7', weights_only=True), **change}, path)
    every_command_refuses(path, tmp_path, capsys, message)


@pytest.mark.parametrize('case', PARAMS)
def test_every_command_refuses_invalid_parameters(images, whole, tmp_path, capsys, case):
    change, message = PARAMS[case]
    params = params_of(whole)
    path = str(tmp_path / 'model.pt7')
    torch.save({'params': {**params, 'conv': change(params['conv'])}}, path)
    every_command_refuses(path, tmp_path, capsys, message)


def test_every_command_refuses_negative_variances(images, whole, tmp_path, capsys):
    params, path = params_of(whole), str(tmp_path / 'model.pt7')
    torch.save({'params': {**params, 'bn.running_var': -params['bn.running_var']}}, path)
    every_command_refuses(path, tmp_path, capsys, 'bn.running_var contains negative values')


def test_resume_fails_when_a_momentum_is_expanded(images, whole, tmp_path, capsys):
    optimizer = torch.load(whole / 'model.pt7', weights_only=True)['optimizer']
    optimizer['state'][0]['momentum_buffer'] = torch.ones(1).expand(100_000, 100_000)
    refuse_to_resume(images, whole, tmp_path, capsys, {'optimizer': optimizer},
                     "'momentum_buffer' is expanded")


def test_save_does_not_follow_a_symlink(images, tmp_path):
    target = tmp_path / 'precious'
    target.write_text('mine')
    (tmp_path / 'run').mkdir()
    for name in ('model.pt7.tmp', 'best.pt7.tmp'):
        (tmp_path / 'run' / name).symlink_to(target)
    run(images, tmp_path / 'run', '--epochs', 1)
    assert target.read_text() == 'mine'
    assert is_finite(tmp_path / 'run' / 'model.pt7')
    assert not (tmp_path / 'run' / 'model.pt7').is_symlink()


def test_read_log_skips_invalid_records(images, tmp_path):
    run(images, tmp_path, '--epochs', 1)
    with open(tmp_path / 'log.txt', 'a') as log:
        for epoch in ('null', '"2"', '[1]', '{}', '1e999'):
            log.write(f'json_stats: {{"epoch": {epoch}}}\n')
        log.write('json_stats: ' + '[' * 100_000 + '\n')
    assert [stats['epoch'] for stats in read_log(tmp_path / 'log.txt')] == [1]
    shutil.copy(tmp_path / 'log.txt', tmp_path / 'copy.txt')
    run(images, tmp_path, '--epochs', 2, '--resume', 'auto')
    assert [stats['epoch'] for stats in stats_of(tmp_path)] == [1, 2]
