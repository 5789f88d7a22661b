"""The GPU's command, as far as a CPU can try it: its checks, its turns and its rows."""

import csv
import math
import time
from types import SimpleNamespace

import pytest
import torch

from experiments import gpu, gpu_checks
from experiments.gpu import Comparison, Variant
from training.loader import make_loader

CPU = torch.device('cpu')


@pytest.mark.parametrize('check', ['augmentation', 'arithmetic'])
def test_checks_hold_on_the_cpu(check):
    rows = gpu_checks.CHECKS[check](CPU)
    assert all(0 <= off <= at_most for _, off, at_most in rows)
    if check == 'arithmetic':  # float32 is not float64
        assert all(off > 0 for _, off, _ in rows)


def test_a_check_that_does_not_hold_is_a_row(monkeypatch, tmp_path, capsys):
    def broken(device):
        raise RuntimeError('no such kernel')

    monkeypatch.setattr(gpu_checks, 'CHECKS', {
        'wrong': lambda device: [('logits', 0.5, 0.1), ('statistics', 0.05, 0.1)],
        'nan': lambda device: [('logits', float('nan'), 0.1)], 'broken': broken})
    monkeypatch.setattr(gpu_checks, 'CHECKS_OF_PROCESSES', {})
    assert not gpu.check(CPU, tmp_path / 'checks.csv', gpu.here(CPU))
    with open(tmp_path / 'checks.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['holds'] for row in rows] == ['no', 'yes', 'no', 'failed']
    assert rows[3]['what'] == 'RuntimeError: no such kernel'
    assert rows[0]['device'] == 'CPU'


def test_a_nan_is_never_the_smaller_difference():
    ones, nan = torch.ones(2), torch.tensor([1.0, float('nan')])
    assert gpu_checks.most_off({'a': ones, 'b': ones}, {'a': 2 * ones, 'b': ones}) == 0.5
    assert math.isnan(gpu_checks.most_off({'a': ones, 'b': nan}, {'a': 2 * ones, 'b': ones}))


def test_what_ended_before_it_was_killed_is_no_check(tmp_path, monkeypatch):
    # an epoch is in the log before the process begins, which ends at once
    (tmp_path / 'log.txt').write_text('json_stats: {"epoch": 1}\n')
    monkeypatch.setattr(gpu_checks.time, 'sleep', lambda _: None)
    ended = SimpleNamespace(poll=lambda: 0, kill=lambda: None, wait=lambda: 0)
    monkeypatch.setattr(gpu_checks.subprocess, 'Popen', lambda *_, **__: ended)
    with pytest.raises(RuntimeError, match='ended before it was killed'):
        gpu_checks.killed_and_resumed(tmp_path)


@pytest.mark.slow
def test_resuming_is_the_same_bits(tmp_path):
    assert gpu_checks.resuming(CPU, tmp_path, 2) == [
        ('tensors that differ after SIGKILL and resuming', 0, 0)]


def test_sides_work_in_turns(monkeypatch):
    monkeypatch.setattr(gpu, 'TURN', 0)
    done = []
    sides = [Variant(name, lambda name: lambda: done.append(name), (name,), 10) for name in 'ab']
    gpu.measure(Comparison('two', sides), CPU, time.monotonic() + 600)
    assert ''.join(done[-2 * gpu.MOST:]) == 'ab' * gpu.MOST
    assert all(len(side.seconds) == gpu.MOST for side in sides)


def test_rates_and_ratios():
    sides = [Variant('long', None, (), 10, 0, seconds=[0.02] * 5),
             Variant('short', None, (), 10, 5e8, seconds=[0.01, 0.01, 0.01, 0.02, 0.005]),
             Variant('too few', None, (), 10, 5e8, seconds=[1] * 4)]
    long, short = gpu.rows_of(Comparison('naps', sides), 2.0, gpu.here(CPU))
    assert (long['n'], long['ratio'], long['images_per_second']) == (5, 1, 500)
    assert (short['ratio'], short['images_per_second'], short['milliseconds']) == (2, 1000, 10)
    # two operations for each of 5e8 multiply-adds of an image: 1e12 a second, of a product's 2e12
    assert (short['tflop_per_second'], short['percent_of_product']) == (1, 50)


def test_w_hat_is_told_from_ordinary_convolutions_in_the_same_form():
    names = 'train.py', 'train.py --compile', 'ordinary convolutions, train.py --compile', 'resnet'
    sides = [Variant(name, None, (), 10, seconds=[seconds] * 5)
             for name, seconds in zip(names, (0.6, 0.2, 0.16, 0.3))]
    rows = gpu.rows_of(Comparison('training', sides), 2.0, gpu.here(CPU))
    assert [(row['ratio'], row['ratio_to']) for row in rows] == [
        (1, 'train.py'), (3, 'train.py'), (1.25, 'train.py --compile'), (2, 'train.py')]


def test_nothing_new_is_begun_when_the_time_is_over(capsys, tmp_path):
    comparison = Comparison('late', [Variant('side', lambda: pytest.fail('begun'), (), 1)])
    gpu.time_in_order([comparison], 1.0, CPU, tmp_path / 'rates.csv', {}, time.monotonic() - 1)
    assert 'left out, as the time is over: late' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_is_compiled_can_be_left_out():
    names = 'train.py', 'resnet, train.py --compile', 'eager'
    sides = [Variant(name, None, (), 10) for name in names]
    comparison, = gpu.without_compile([Comparison('two', sides, 'fast')])
    assert [side.name for side in comparison.sides] == ['train.py', 'eager']
    assert (comparison.title, comparison.target) == ('two', 'fast')


def test_rates_alone_come_soonest(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, 'check', lambda *_: pytest.fail('checked'))
    compared = []
    monkeypatch.setattr(gpu, 'time_in_order', lambda given, *_: compared.extend(given))
    gpu.main(['--device', 'cpu', '--logs', str(tmp_path), '--no-checks', '--no-compile'])
    names = [side.name for comparison in compared for side in comparison.sides]
    assert 'train.py' in names
    assert not any('--compile' in name for name in names)


def test_jpeg_files_are_read(tmp_path):
    gpu.write_jpegs(tmp_path, 8)
    images, labels, whole = next(iter(make_loader(
        gpu.data.ImageFiles(*gpu.data.list_images(tmp_path)[:2], 224).augmented(), 8, 0, 0)))
    assert images.shape == (8, 3, 224, 224)
    assert whole == 8
    assert images.float().std() > 10


def test_without_a_gpu_one_line_says_so(capsys):
    with pytest.raises(SystemExit) as ending:
        gpu.main([])
    assert ending.value.code == 2
    assert capsys.readouterr().err == (
        'experiments.gpu: no CUDA GPU here: expected one, or --device cpu to try the command\n')
