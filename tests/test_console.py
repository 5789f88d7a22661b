"""Console output of a run: the progress bar, the line of each epoch, the last line."""

import fcntl
import io
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch

import plot
import train
from runs import run, stats_of, write_sets
from training import meters, progress
from training.data import DataSplits
from training.log import read_log

ROOT = Path(train.__file__).parent


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """24 training and 4 test images of two classes."""
    return write_sets(tmp_path_factory.mktemp('images'), 12, 2)


def in_terminal(*words):
    """Runs a command in a terminal; returns (exit status, output)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 100, 0, 0))
    process = subprocess.Popen(words, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b''
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # EIO: the process closed the terminal
            part = b''
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(), shown.decode()


@pytest.mark.slow
def test_progress_bar_is_cleared_before_an_error_message(images, tmp_path):
    status, shown = in_terminal(
        sys.executable, 'train.py', '--dataset', 'Folder', '--dataroot', str(images), '--depth',
        '10', '--batch_size', '4', '--lr', '1e30', '--dtype', 'float', '--save', str(tmp_path))
    assert status == 3
    assert re.search(r'epoch 1/200: .*0/24', shown)
    *_, bar, ended, error = re.split(r'\r(?!\n)', shown)
    assert 'img/s' in bar
    assert ended.strip() == ''
    assert error.startswith('train.py: the loss is')


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_advances_with_each_step(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    seen = meters.Meters(10, 12, 'short')
    with seen.bar:
        for done in (4, 8, 12):
            seen.update(torch.tensor(1.0), torch.zeros(4, 10), torch.zeros(4).long(), 4)
            assert seen.bar.n == done
        assert seen.loss.n == 0  # fewer steps than are read at once
    assert seen.summary('train')['train_loss'] == 1.0


def test_progress_prints_a_line_each_minute_when_stderr_is_no_terminal(capsys, monkeypatch):
    clock = [100.0]  # seconds
    monkeypatch.setattr('tqdm.std.time', lambda: clock[0])
    totals = [5.0, 8.0, 4, 1]  # 4 of 24 images before the resume: loss 2, one error
    seen = meters.Meters(10, 24, 'epoch 2/9', totals, steps=1)
    with seen.bar:
        for _ in range(4):
            clock[0] += 25
            seen.last_reading = 0.0  # the loss is read in each step
            seen.update(torch.tensor(1.0), torch.eye(10)[[0] * 4], torch.zeros(4).long(), 4)
    # 25, 50, 75 (a line), 100 s: 12 images in 75 s; losses (4 * 2 + 12 * 1) / 16
    assert capsys.readouterr().err.splitlines() == [
        'epoch 2/9: 67 %, loss 1.250, acc 93.75 %, 0.2 img/s, 00:50 left']


def test_progress_prints_nothing_within_a_minute_or_on_other_ranks(capsys, monkeypatch):
    clock = itertools.count(0, 59)
    monkeypatch.setattr('tqdm.std.time', lambda: next(clock))
    assert list(progress.Progress(range(1), 'short')) == [0]
    monkeypatch.setattr(progress, 'rank', lambda: 1)
    assert list(progress.Progress(range(9), 'other rank')) == list(range(9))
    assert capsys.readouterr() == ('', '')
    monkeypatch.setattr(progress, 'rank', lambda: 0)
    assert list(progress.Progress(range(9), 'long')) == list(range(9))
    first, *_ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r'long: \d+ %, \d\d:\d\d left', first)


def test_run_prints_progress_of_training_and_evaluation(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, 'SECONDS_PER_LINE', 0)
    run(images, tmp_path / 'run', '--val', 4)
    errors = capsys.readouterr().err
    assert '\r' not in errors
    lines = errors.splitlines()
    number = r'[\d.,]+'
    for title, percents in (
        (r'epoch 1/2', '60 100'), (r'epoch 1/2, val', '100'), (r'epoch 1/2, test', '100'),
        (r'epoch 2/2 \(run: \d+ min left\)', '60 100'),
    ):
        pattern = (f'{title}: (\\d+) %, (?:loss {number}, acc {number} %, )?{number} img/s, '
                   r'\d\d:\d\d left')
        found = [match[1] for match in (re.fullmatch(pattern, line) for line in lines) if match]
        assert ' '.join(found) == percents, (title, lines)


def test_meters_read_the_loss_of_each_step_when_steps_are_long(monkeypatch):
    clock = iter(range(0, 1000, 2))  # seconds
    monkeypatch.setattr(meters.time, 'perf_counter', lambda: next(clock))
    seen = meters.Meters(10, 8, 'slow')
    seen.update(torch.tensor(1.0), torch.zeros(4, 10), torch.zeros(4).long(), 4)
    assert seen.loss.n == 4


def test_meters_stop_the_clock_with_the_summary(monkeypatch):
    clock = iter(range(0, 1000, 10))  # seconds
    monkeypatch.setattr(meters.time, 'perf_counter', lambda: next(clock))
    seen = meters.Meters(10, 8, 'training')
    seen.update(torch.tensor(1.0), torch.eye(10)[:4], torch.arange(4), 4)
    summary = seen.summary('train')
    saved = seen.totals()  # after a signal in evaluation
    assert saved[0] == summary['train_time'] > 0
    resumed = meters.Meters(10, 8, 'training', saved)
    again = resumed.summary('train')
    assert [again[f'train_{name}'] for name in ('loss', 'acc')] == [1, 100]
    assert again['train_time'] > summary['train_time']


def test_epoch_line_shows_validation_and_test_accuracy(images, tmp_path, capsys):
    run(images, tmp_path / 'run', '--val', 8)
    lines = capsys.readouterr().out.splitlines()
    for stats in stats_of(tmp_path / 'run'):
        assert (f'==> id: {tmp_path / "run"} ({stats["epoch"]}/2), val_acc: '
                f'{stats["val_acc"]:.2f}, test_acc: {stats["test_acc"]:.2f}') in lines
    epochs = read_log(tmp_path / 'run' / 'log.txt')
    _, accuracy, _ = plot.plot_logs({'run': epochs}).axes
    assert [list(line.get_ydata()) for line in accuracy.lines] == [
        [stats[f'{split}_acc'] for stats in epochs] for split in ('train', 'val', 'test')]


def test_top_5_accuracy_is_printed_with_100_classes(tmp_path, capsys):
    images, labels = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), np.uint8), range(100)
    splits = DataSplits.from_arrays((images[:100], [*labels]), (images[100:], [*labels]))
    options = ['--depth', '10', '--width', '0.25', '--randomcrop_pad', '1']
    result = train.main([*options, '--epochs', '1', '--save', str(tmp_path)], splits)
    stats, = result.history
    assert 0 <= stats['test_acc'] < stats['test_acc5'] < 100
    shown = [f'test_acc: {stats["test_acc"]:.2f}', f'test_acc5: {stats["test_acc5"]:.2f}']
    assert f'(1/1), {", ".join(shown)}\n' in capsys.readouterr().out
    summary = train.main(['--evaluate', '--resume', str(tmp_path)], splits)
    loss, *accuracies = capsys.readouterr().out.splitlines()[-3:]
    assert (loss, accuracies) == (f'test_loss: {summary["test_loss"]:.4f}', shown)


@pytest.mark.parametrize(('epochs', 'schedule', 'printed'), [
    (1, ['--epoch_step', '[2,3]'], True), (2, ['--epoch_step', '[2,3]'], False),
    (1, ['--epoch_step', '[]'], False), (1, ['--lr_schedule', 'cosine'], False)])
def test_run_names_a_step_schedule_without_a_drop(
        images, tmp_path, capsys, epochs, schedule, printed):
    run(images, tmp_path / 'run', '--epochs', epochs, *schedule)
    line = '--epoch_step [2, 3]: no drop in 1 epochs, the learning rate stays 0.1; '
    assert (line in capsys.readouterr().out) == printed


def test_run_prints_a_folder_with_backslashes_when_stdout_is_ascii(images, tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), 'ascii', errors='strict')
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', output)
        run(images, tmp_path / 'r\xe9sum\xe9', '--epochs', 1)
    assert (tmp_path / 'r\xe9sum\xe9' / 'model.pt7').exists()
    output.seek(0)
    assert f'log and checkpoints in {tmp_path}/r\\xe9sum\\xe9' in output.read()


@pytest.mark.parametrize('elsewhere', [True, False])
def test_resume_of_a_finished_run_writes_nothing(images, tmp_path, capsys, elsewhere):
    first, save = tmp_path / 'run', tmp_path / ('other' if elsewhere else 'run')
    run(images, first)
    before = {path: path.read_bytes() for path in first.iterdir()}
    capsys.readouterr()
    run(images, save, '--resume', first)
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f'already finished, nothing was written: {first} is at epoch 2 of 2; '
                           'best test_acc ')
    assert sorted(tmp_path.iterdir()) == [first]
    assert {path: path.read_bytes() for path in first.iterdir()} == before
