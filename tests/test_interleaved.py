"""Interleaved timing: worker processes, statistics, results, and the figure of the benchmarks."""

import csv
import fcntl
import multiprocessing
import os
import re
import subprocess
import threading

import matplotlib.image
import pytest
import torch

from diracnets import network
from experiments import bench, interleaved, results, variants
from experiments.interleaved import Variant
from runs import use_forkserver
from training import timing


def test_median_interval_is_of_order_statistics():
    # of ten values the second and the ninth: 1 - 2 (1 + 10) / 2**10 = 97.9 %
    assert timing.median_interval([7, 1, 2, 3, 4, 5, 6, 8, 9, 10]) == (5.5, 2, 9)
    # of forty the fourteenth and the twenty-seventh: 96.2 %
    assert timing.median_interval(list(range(1, 41))) == (20.5, 14, 27)
    assert timing.median_interval([3.0] * 12) == (3, 3, 3)


def test_images_per_second_interleaves_models():
    calls = []
    rates = timing.images_per_second([lambda _: calls.append('a'), lambda _: calls.append('b')],
                                     torch.zeros(4, 1))
    assert ''.join(calls) == 'ab' * (1 + timing.REPETITIONS)
    assert all(rate > 0 for rate in rates)


def test_matmul_gflops_is_that_of_the_fastest_product(monkeypatch):
    seconds, products = iter([0.02, *28 * [0.01], 0.005]), []

    def timed(work, device):
        products.append(work())
        return next(seconds)

    monkeypatch.setattr(timing, 'seconds_per_call', timed)
    # 100^3 multiply-adds, two operations each, in 0.005 s
    assert timing.matmul_gflops('bfloat16', size=100) == pytest.approx(0.4)
    assert {(product.shape, product.dtype) for product in products} == {
        ((100, 100), torch.bfloat16)}
    assert next(seconds, None) is None


@pytest.mark.slow
def test_time_in_processes_interleaves_variants_each_in_its_own_process(
    tmp_path, monkeypatch
):
    use_forkserver(monkeypatch)
    path = tmp_path / 'calls.txt'
    variants = [Variant(name, writing, (str(path), name), 1) for name in 'ab']
    interleaved.time_in_processes(variants, 13, 'letters')
    calls = [line.split() for line in path.read_text().splitlines()]
    # two warm-up calls each, and again after ten repetitions, in new processes
    assert ''.join(name for name, _ in calls) == 'aabb' + 10 * 'ab' + 'aabb' + 3 * 'ab'
    assert len({process for _, process in calls}) == 4
    assert [len(variant.seconds) for variant in variants] == [13, 13]
    assert all(variant.memory > 10 for variant in variants)


@pytest.mark.slow
def test_peak_memory_is_that_of_the_worker_process():
    filled = torch.ones(10**8)  # 400 MB, in this process
    variant = Variant('lasting', lasting, (), 1)
    with interleaved.worker(variant) as timer:
        timer()
    assert interleaved.peak_resident_memory() - variant.memory > filled.nbytes / 1e6 / 2


def writing(path, name):
    import os

    def work():
        with open(path, 'a') as file:
            file.write(f'{name} {os.getpid()}\n')

    return work


@pytest.mark.slow
def test_time_in_processes_raises_and_ends_the_other_processes_when_one_dies(monkeypatch):
    use_forkserver(monkeypatch)
    variants = [Variant('lasting', lasting, (), 1), Variant('dying', dying, (3,), 1)]
    with pytest.raises(RuntimeError, match='^dying: .* 9$'):
        interleaved.time_in_processes(variants, 5, 'deaths')
    for child in multiprocessing.active_children():
        child.join(60)
    assert not multiprocessing.active_children()


def lasting():
    return lambda: None


def dying(calls):
    import os

    left = [None] * calls  # two of them are warm-up

    def work():
        if not left:
            os._exit(9)
        left.pop()

    return work


def test_append_results_refuses_other_columns(tmp_path):
    table = tmp_path / 'table.csv'
    results.append_results([{'who': 'first', 'n': 1}], table)
    results.append_results([{'n': 2, 'who': 'second'}], table)  # in the order of the file
    with pytest.raises(ValueError, match='columns who, n: expected who, m'):
        results.append_results([{'who': 'third', 'm': 3}], table)
    assert table.read_text().split() == ['who,n', 'first,1', 'second,2']


def test_append_results_waits_for_another_process(tmp_path):
    """Of two that find no file, the second sees the header that the first one writes."""
    table = tmp_path / 'table.csv'
    with open(table, 'a') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        late = threading.Thread(target=results.append_results, args=([{'who': 'late'}], table))
        late.start()
        late.join(0.3)
        assert table.read_text() == ''
        other.write('who\nfirst\n')
    late.join()
    assert table.read_text().split() == ['who', 'first', 'late']


def test_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """It is empty for a copy inside another repository, and without git."""
    for name in [name for name in os.environ if name.startswith('GIT_')]:  # as hooks of git have
        monkeypatch.delenv(name)
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=b', '-c', 'commit.gpgsign=false', '-C',
           str(tmp_path)]
    for words in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'c']):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(results, 'ROOT', tmp_path)
    assert re.fullmatch('[0-9a-f]{7,}', results.commit())
    (tmp_path / 'copy').mkdir()
    monkeypatch.setattr(results, 'ROOT', tmp_path / 'copy')
    assert results.commit() == ''
    monkeypatch.setattr(results, 'ROOT', tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert results.commit() == ''


def test_compare_appends_results_that_bench_draws(tmp_path, capsys, monkeypatch):
    def measured(variants, repetitions, title):
        for variant, seconds in zip(variants, ([2.0, 4.0, 4.0, 8.0] * 3, [1.0, 1.0, 2.0, 2.0] * 3)):
            variant.seconds, variant.memory = seconds, 512.4

    monkeypatch.setattr(interleaved, 'time_in_processes', measured)
    monkeypatch.setattr(interleaved, 'matmul_peak', lambda dtype: 100.0)
    table = tmp_path / 'bench.csv'
    variants = [Variant(name, None, (), 100, 1e9) for name in ('slow', 'fast')]
    interleaved.compare('two', variants, 12, table, target=3)
    for variant in variants:
        variant.multiply_adds = 0
    interleaved.compare('two', variants, 12, table)
    with open(table, newline='') as file:
        records = list(csv.DictReader(file))
    assert [record['what'] for record in records] == ['slow', 'fast'] * 2
    slow, fast, *_ = records
    assert float(slow['images_per_second']) == 25  # 100 in 4 seconds, at the median
    assert float(slow['gflop_per_second']) == 50  # 25 times a billion multiply-adds
    assert float(slow['percent_of_product_peak']) == 50
    assert float(fast['ratio']) == 3  # of 2, 4, 2 and 4: paired, not of the medians
    assert (float(fast['ratio_low']), float(fast['ratio_high'])) == (2, 4)
    assert (fast['target'], slow['target'], records[3]['target']) == ('3', '', '')
    assert (fast['torch'], fast['n'], fast['peak_memory_mb']) == (torch.__version__, '12', '512')
    assert '3.00 (2.00 to 4.00)' in capsys.readouterr().out

    interleaved.compare('depth, a step', [Variant('DiracNet-28-1', None, (), 1)], 12, table)
    bench.draw_speedups(table).savefig(tmp_path / 'bench.png')
    assert matplotlib.image.imread(tmp_path / 'bench.png').std() > 0.05


def test_latest_comparisons_start_with_the_baseline_when_another_ratio_is_rounded_to_one():
    def records(comparison, *variants):
        return [{'compared': comparison, 'what': what, 'ratio': ratio, 'ratio_low': ratio,
                 'ratio_high': ratio} for what, ratio in variants]

    first = records('a', ('2 workers', 1.0), ('fast', 2.0))
    other = records('b', ('one', 1.0))
    again = records('a', ('4 workers', 1.0), ('fast', 1.0), ('faster', 3.0))
    expected = {'a': again, 'b': other}
    assert interleaved.latest_comparisons(first + other + again) == expected
    assert interleaved.latest_comparisons(first + other + again + other) == expected
    assert interleaved.latest_comparisons(other + again + again) == expected
    assert list(interleaved.pairs_with_baseline(first + other + again)) == [
        (again[0], again[1]), (again[0], again[2])]


@pytest.mark.parametrize('arguments', [['speed'], ['train', '--repetitions', '2'], ['deploy']])
def test_bench_exits_with_one_line_when_arguments_are_wrong(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_layer_by_layer_computes_the_weights_of_one_layer_at_a_time(monkeypatch):
    torch.manual_seed(0)
    model = variants.diracnet(10, 0.5).double().eval()
    layered = variants.layer_by_layer(10, 0.5).double().eval()
    layered.load_state_dict(model.state_dict())
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(inputs)
    monkeypatch.setattr(network, 'dirac_weights', lambda *_: pytest.fail('computed at once'))
    torch.testing.assert_close(layered(inputs), expected, rtol=1e-9, atol=1e-9)
