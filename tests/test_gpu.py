"""python -m experiments.gpu, on a CPU: timing, results, and the time limit."""

import time

import pytest
import torch

from experiments import gpu, gpu_runs
from experiments.gpu import Comparison, Variant
from experiments.results import read_csv
from training.compute import Forward
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
    assert 'large skipped: RuntimeError: CUDA out of memory' in capsys.readouterr().out
    assert [len(variant.seconds) > 0 for variant in variants] == [False, True]


def test_results_are_rates_and_ratios():
    variants = [Variant('long', None, (), 10, 0, seconds=[0.02] * 6),
                Variant('short', None, (), 10, 5e8, seconds=[0.01, 0.01, 0.01, 0.01, 0.02, 0.005]),
                Variant('too few', None, (), 10, 5e8, seconds=[1] * 5)]
    long, short = gpu.comparison_records(Comparison('naps', variants), 2.0, gpu.environment_of(CPU))
    assert (long['n'], long['ratio'], long['images_per_second']) == (6, 1, 500)
    assert (short['ratio'], short['images_per_second'], short['milliseconds']) == (2, 1000, 10)
    # two operations per multiply-add, 5e8 of them per image: 1e12 per second, of a peak of 2e12
    assert (short['tflop_per_second'], short['percent_of_product']) == (1, 50)
    assert long['device'] == 'CPU'


def test_baseline_of_standard_convolutions_is_the_diracnet_in_the_same_form():
    names = 'train.py', 'train.py --compile', 'standard convolutions, train.py --compile', 'resnet'
    variants = [Variant(name, None, (), 10, seconds=[seconds] * 6)
                for name, seconds in zip(names, (0.6, 0.2, 0.16, 0.3))]
    results = gpu.comparison_records(Comparison('training', variants), 2.0, gpu.environment_of(CPU))
    assert [(record['ratio'], record['ratio_to']) for record in results] == [
        (1, 'train.py'), (3, 'train.py'), (1.25, 'train.py --compile'), (2, 'train.py')]


def test_nothing_is_measured_when_the_time_is_over(capsys, tmp_path):
    comparison = Comparison('late', [Variant('variant', lambda: pytest.fail('started'), (), 1)])
    gpu.time_in_order([comparison], 1.0, CPU, tmp_path / 'rates.csv', {}, time.monotonic() - 1)
    assert 'late: skipped' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_comparisons_that_the_same_commit_measured_are_skipped(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'MIN_SECONDS', 0)
    table, calls = tmp_path / 'rates.csv', []

    def measure(commit, work):
        comparison = Comparison('two', [Variant('variant', lambda: work, (), 1)])
        columns = {'device': 'CPU', 'torch': '2', 'commit': commit}
        gpu.time_in_order([comparison], 1.0, CPU, table, columns, time.monotonic() + 600)
        return capsys.readouterr().out

    def fail_later():
        calls.append(1)
        if len(calls) > 10:
            raise ValueError('overwritten')

    measure('a', lambda: None)
    assert f'two: skipped, already in {table}' in measure('a', pytest.fail)
    assert 'two: failed: ValueError: overwritten' in measure('b', fail_later)
    measure('b', lambda: None)
    assert [record['commit'] for record in read_csv(table)] == ['a', 'b']
    variants = [Variant(name, lambda: lambda: None, (), 1) for name in ('variant', 'new')]
    columns = {'device': 'CPU', 'torch': '2', 'commit': 'a'}
    gpu.time_in_order([Comparison('two', variants)], 1.0, CPU, table, columns,
                      time.monotonic() + 600)
    assert [record['what'] for record in read_csv(table)] == ['variant'] * 3 + ['new']


def test_no_checks_and_no_compile_leave_these_out(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, 'run_checks', lambda: pytest.fail('checked'))
    compared, peaks = [], []

    def record(comparisons, peak, **_):
        compared.extend(comparisons)
        peaks.append(peak)

    monkeypatch.setattr(gpu, 'time_in_order', record)
    monkeypatch.setattr(gpu, 'matmul_gflops', lambda *arguments: 7000)
    gpu.main(['--device', 'cpu', '--logs', str(tmp_path), '--no-checks', '--no-compile'])
    assert peaks == [7]  # TFLOP/s
    names = [variant.name for comparison in compared for variant in comparison.variants]
    assert 'train.py' in names
    assert not any('--compile' in name for name in names)


@pytest.mark.parametrize(('kernel', 'kind'), [
    ('_forward_kernel', 'W_hat'),
    ('triton_per_fused_mul_sum_3', 'fused by the compiler'),
    ('void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true>', 'batch norm'),
    ('sm90_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64',
     'convolution and matmul'),
    ('void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>', 'layout conversion'),
    ('void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 1, 128, 1>',
     'concatenation'),
    ('void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>', 'fill'),
    ('void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>',
     'elementwise and other'),
])
def test_kernels_are_grouped_by_name(kernel, kind):
    assert gpu_runs.kind_of(kernel) == kind


def test_profile_counts_operators_of_each_step():
    a = torch.randn(64, 64)
    kinds = gpu_runs.profile_step(lambda: (torch.cat([a, a]), a @ a, a @ a), CPU, steps=3)
    milliseconds, launches = kinds['concatenation']
    assert launches == 1
    assert milliseconds > 0
    assert not kinds.keys() & {'W_hat', 'pooling'}
    records = gpu_runs.profile_records('step', {'a': (1.0, 2), 'b': (3.0, 4)})
    assert [(r['kernels'], r['percent'], r['launches']) for r in records] == [
        ('b', 75, 4), ('a', 25, 2)]


@pytest.mark.slow
def test_measured_run_states_its_command_and_minutes(tmp_path, monkeypatch):
    # CPUs without bfloat16 emulate it slowly
    monkeypatch.setattr(gpu, 'Forward', lambda preprocess, dtype, device: Forward(
        preprocess, 'float', device))
    gpu.measure_runs(CPU, tmp_path, {'device': 'CPU'}, time.monotonic() + 600)
    cost, = read_csv(tmp_path / 'runs.csv')
    assert cost['command'] == 'python train.py --depth 10 --width 1'
    seconds, rate = float(cost['seconds_per_epoch']), float(cost['images_per_second'])
    assert float(cost['minutes']) == pytest.approx(200 * seconds / 60, abs=0.1)
    assert seconds > 256 / rate > 0  # training, then testing
    steps = read_csv(tmp_path / 'profile.csv')
    assert {step['step'] for step in steps} == {'10-1, batch 128, train.py'}
    assert sum(float(step['percent']) for step in steps) == pytest.approx(100, abs=1)


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
