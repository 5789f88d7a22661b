"""Welch's interval, the verdicts by a margin, and the runs that are pooled."""

import math

import pytest
import torch
from scipy import stats

from experiments.intervals import Estimate, verdict_above, verdict_at_most, welch
from experiments.results import all_runs, read_pooled, seed_means
from records import run_records, write_csv


def test_welch_interval_by_hand():
    # variances 1 and 1, so sqrt(2/3) is the standard error, with 4 degrees of freedom: t = 2.776445
    same = welch((1, (1, 2, 3)), (-1, (2, 3, 4)))
    assert same.value == -1
    half = 2.776445105 * math.sqrt(2 / 3)
    assert (same.low, same.high) == pytest.approx((-1 - half, -1 + half), abs=1e-8)
    # variances 50 and 1, of 2 and 3 values: (25 + 1/3)^2 / (25^2 / 1 + (1/3)^2 / 2) degrees
    freedom = (25 + 1 / 3) ** 2 / (625 + 1 / 18)
    unequal = welch((1, (0, 10)), (-1, (1, 2, 3)))
    assert unequal.high - 3 == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(25 + 1 / 3))


def test_welch_interval_equals_that_of_scipy():
    first, second = (70.1, 71.4, 69.2, 70.3, 72.0), (74.5, 74.9, 74.2)
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    estimate = welch((1, first), (-1, second))
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    one = stats.ttest_1samp(first, 0).confidence_interval(0.95)
    assert (welch((1, first)).low, welch((1, first)).high) == pytest.approx((one.low, one.high))


def test_welch_interval_of_a_difference_of_differences():
    groups = [(1, (1, 2, 3)), (-1, (4, 5, 6)), (-1, (7, 8, 9)), (1, (0, 1, 2))]
    estimate = welch(*groups)  # four groups of equal variance: 8 degrees of freedom, t = 2.306004
    assert estimate.value == 2 - 5 - 8 + 1
    assert estimate.high - estimate.value == pytest.approx(2.306004135 * math.sqrt(4 / 3))


def test_welch_interval_covers_the_difference_in_95_percent_of_samples():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2000, 6, generator=generator, dtype=torch.double)
    samples[:, 3:] = 5 + 4 * samples[:, 3:]
    covered = sum(e.low < 5 < e.high for e in (
        welch((1, row[3:]), (-1, row[:3])) for row in samples.tolist()))
    assert 0.93 < covered / 2000 < 0.98


def test_welch_interval_is_infinite_for_a_single_value():
    alone = welch((1, (70, 71)), (-1, (60,)))
    assert alone == Estimate(10.5, -math.inf, math.inf)
    assert verdict_above([alone], 1) == verdict_at_most([alone], 1) == 'inconclusive'
    assert welch((1, (2, 2)), (-1, (1, 1))) == Estimate(1, 1, 1)


@pytest.mark.parametrize(('intervals', 'more', 'at_most'), [
    ([(1.1, 3)], 'yes', 'no'),
    ([(0.9, 3)], 'inconclusive', 'inconclusive'),
    ([(-3, 0.9)], 'no', 'yes'),
    ([(1.1, 3), (0.9, 3)], 'inconclusive', 'no'),
    ([(1.1, 3), (-3, 0.9)], 'no', 'no'),
    ([(-3, 0.9), (0, 2)], 'no', 'inconclusive'),
])
def test_verdicts_by_intervals_and_margin(intervals, more, at_most):
    estimates = [Estimate((low + high) / 2, low, high) for low, high in intervals]
    assert (verdict_above(estimates, 1), verdict_at_most(estimates, 1)) == (more, at_most)


# ---------------------------------------------------------------- pooled runs


def test_pooled_results_contain_each_run_once(tmp_path):
    first = run_records({('diracnet', 28): (70, 71)})
    write_csv(tmp_path / 'depth' / 'results.csv', first + run_records({('plain', 28): (60,)}))
    # a copy in another experiment, a repetition, runs on a CPU, and another configuration
    write_csv(tmp_path / 'init' / 'results.csv', [{**r, 'series': 'x', 'x': 1} for r in first])
    again = [{**r, 'test_acc_percent': r['test_acc_percent'] + 2} for r in first]
    write_csv(tmp_path / 'again' / 'width' / 'results.csv', again + first[:1])
    write_csv(tmp_path / 'depth' / 'cpu.csv', [{**first[1], 'test_acc_percent': 75}])
    write_csv(tmp_path / 'large' / 'results.csv', run_records({('diracnet', 52): (50,)}))
    pooled = read_pooled('depth', tmp_path)
    assert [(r['series'], r['x'], r['seed'], r['test_acc_percent']) for r in pooled] == [
        ('diracnet', 28, 1, 70), ('diracnet', 28, 1, 72), ('diracnet', 28, 2, 71),
        ('diracnet', 28, 2, 75), ('diracnet', 28, 2, 73), ('plain', 28, 1, 60)]
    assert pooled[1]['log'] == 'again/log.txt'
    assert len(all_runs(tmp_path)) == 7
    assert seed_means(pooled[:5], lambda r: r['test_acc_percent']) == [71, 73]
    assert read_pooled('delta', tmp_path) == []
