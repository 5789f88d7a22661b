"""python -m experiments.gpu, on a CPU: timing, results, and the time limit."""

import time

import pytest
import torch

from experiments import gpu
from experiments.gpu import Comparison, Variant
from training.loader import make_loader

CPU = torch.device('cpu')


def test_time_variants_interleaves_variants(monkeypatch):
    monkeypatch.setattr(gpu, 'MIN_SECONDS', 0)
    calls = []
    variants = [Variant(name, lambda name: lambda: calls.append(name), (name,), 10)
                for name in 'ab']
    gpu.time_variants(Comparison('two', variants), CPU, time.monotonic() + 600)
    assert ''.join(calls[-2 * gpu.MAX_REPETITIONS:]) == 'ab' * gpu.MAX_REPETITIONS
    assert all(len(variant.seconds) == gpu.MAX_REPETITIONS for variant in variants)


def test_time_variants_leaves_out_a_variant_that_fails(capsys):
    def fail():
        raise RuntimeError('CUDA out of memory')

    variants = [Variant('large', fail, (), 10), Variant('small', lambda: lambda: None, (), 10)]
    gpu.time_variants(Comparison('two', variants), CPU, time.monotonic() - 1 + 600)
    assert 'large skipped: CUDA out of memory' in capsys.readouterr().out
    assert [len(variant.seconds) > 0 for variant in variants] == [False, True]


def test_results_are_rates_and_ratios():
    variants = [Variant('long', None, (), 10, 0, seconds=[0.02] * 5),
                Variant('short', None, (), 10, 5e8, seconds=[0.01, 0.01, 0.01, 0.02, 0.005]),
                Variant('too few', None, (), 10, 5e8, seconds=[1] * 4)]
    long, short = gpu.comparison_records(Comparison('naps', variants), 2.0, gpu.environment_of(CPU))
    assert (long['n'], long['ratio'], long['images_per_second']) == (5, 1, 500)
    assert (short['ratio'], short['images_per_second'], short['milliseconds']) == (2, 1000, 10)
    # two operations per multiply-add, 5e8 of them per image: 1e12 per second, of a peak of 2e12
    assert (short['tflop_per_second'], short['percent_of_product']) == (1, 50)
    assert long['device'] == 'CPU'


def test_baseline_of_standard_convolutions_is_the_diracnet_in_the_same_form():
    names = 'train.py', 'train.py --compile', 'ordinary convolutions, train.py --compile', 'resnet'
    variants = [Variant(name, None, (), 10, seconds=[seconds] * 5)
                for name, seconds in zip(names, (0.6, 0.2, 0.16, 0.3))]
    results = gpu.comparison_records(Comparison('training', variants), 2.0, gpu.environment_of(CPU))
    assert [(record['ratio'], record['ratio_to']) for record in results] == [
        (1, 'train.py'), (3, 'train.py'), (1.25, 'train.py --compile'), (2, 'train.py')]


def test_nothing_is_measured_when_the_time_is_over(capsys, tmp_path):
    comparison = Comparison('late', [Variant('variant', lambda: pytest.fail('started'), (), 1)])
    gpu.time_in_order([comparison], 1.0, CPU, tmp_path / 'rates.csv', {}, time.monotonic() - 1)
    assert 'late: skipped' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_no_checks_and_no_compile_leave_these_out(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, 'run_checks', lambda: pytest.fail('checked'))
    compared = []
    monkeypatch.setattr(gpu, 'time_in_order', lambda comparisons, *_: compared.extend(comparisons))
    gpu.main(['--device', 'cpu', '--logs', str(tmp_path), '--no-checks', '--no-compile'])
    names = [variant.name for comparison in compared for variant in comparison.variants]
    assert 'train.py' in names
    assert not any('--compile' in name for name in names)


def test_written_jpeg_files_are_loaded(tmp_path):
    gpu.write_jpegs(tmp_path, 8)
    images, labels, global_batch_size = next(iter(make_loader(
        gpu.folders.ImageFiles(*gpu.folders.list_images(tmp_path)[:2], 224).augmented(), 8, 0, 0)))
    assert images.shape == (8, 3, 224, 224)
    assert global_batch_size == 8
    assert images.float().std() > 10


def test_command_exits_with_one_line_when_there_is_no_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('experiments.gpu: no CUDA GPU')
    assert error.count('\n') == 1
