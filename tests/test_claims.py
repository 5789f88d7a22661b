"""The claims: accuracies per seed, and the verdicts."""

import csv
import math
import statistics

import pytest
import torch
from scipy import stats

from experiments import claims
from experiments.intervals import Estimate
from experiments.results import ROOT
from records import around, run_records, write_csv


def answers(text, logs):
    claim, = (claim for claim in claims.CLAIMS if claim.text == text)
    return claim.answers(logs)


def test_show_gives_the_ranges_of_values_and_intervals():
    assert claims.show([Estimate(2.34, -1, 5.06)]) == '+2.3 (-1.0 to +5.1)'
    assert claims.show([Estimate(2, 1, 3), Estimate(-1, -2, 4)]) == '-1.0 to +2.0 (-2.0 to +4.0)'
    assert claims.show([Estimate(0.031, 0.031, 0.031)], '.2f') == '0.03'
    one_seed = Estimate(10.5, -math.inf, math.inf)
    assert claims.show([one_seed]) == '+10.5'
    assert claims.show([one_seed, Estimate(2, 1, 3)]) == '+2.0 to +10.5 (+1.0 to +3.0; 1 without)'
    assert claims.show([Estimate(1, -0.04, 3)]) == '+1.0 (+0.0 to +3.0)'
    assert claims.show([]) == ''


def test_accuracies_are_one_per_seed_and_count_diverged_runs_as_chance():
    records = run_records({('plain', 1): (70, None)}) + run_records({('plain', 1): (74,)})
    assert claims.accuracies(records) == {('plain', 1): [72, claims.CHANCE]}


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(('plain', 'diracnet', 'expected'), [
    (60, 80.5, ('yes', 'yes')), (60, 70, ('yes', 'no')), (81, 70, ('no', 'no')),
])
def test_claims_on_depth(tmp_path, plain, diracnet, expected):
    write_csv(tmp_path / 'depth' / 'results.csv', run_records({
        ('plain', 10): around(80), ('plain', 16): around(70), ('plain', 100): around(plain),
        ('diracnet', 10): around(75), ('diracnet', 16): around(80),
        ('diracnet', 100): around(diracnet), ('diracnet', 202): (30,)}))
    degrades, = answers('plain networks degrade with depth', tmp_path)
    stays, = answers('DiracNets do not degrade with depth', tmp_path)
    assert (degrades.verdict, stays.verdict) == expected
    assert degrades.quantity == 'loss from 10 to 100 layers, pp'
    assert (degrades.epochs, degrades.n) == ('4', '3')
    assert stays.estimates[0].value == pytest.approx(80 - diracnet)
    # the interval of two groups of variance 0.01
    assert stays.estimates[0].high - stays.estimates[0].value == pytest.approx(
        2.776445105 * math.sqrt(2 * 0.01 / 3))


def test_longer_budget_comes_first_and_only_with_results_at_two_depths(tmp_path):
    write_csv(tmp_path / 'depth' / 'results.csv', run_records({
        ('plain', 28): around(60), ('plain', 52): around(40)}))
    longer = {('plain', 28): (85, 86), ('diracnet', 28): (87,)}
    write_csv(tmp_path / 'medium' / 'depth' / 'results.csv', run_records(longer, 30))
    text = 'plain networks degrade with depth'
    assert [answer.epochs for answer in answers(text, tmp_path)] == ['4']
    longer['plain', 52] = (79,)
    write_csv(tmp_path / 'medium' / 'depth' / 'results.csv', run_records(longer, 30))
    medium, short = answers(text, tmp_path)
    assert (medium.epochs, medium.n, medium.verdict) == ('30', '1 to 2', 'inconclusive')
    assert medium.estimates[0].value == 6.5
    assert (short.epochs, short.verdict) == ('4', 'yes')


def test_claims_compare_diracnets_and_resnets(tmp_path):
    write_csv(tmp_path / 'depth' / 'results.csv', run_records({
        ('resnet', 10): around(80), ('resnet', 100): around(70),
        ('diracnet', 10): around(80), ('diracnet', 100): around(78)}))
    less, = answers('DiracNets degrade less than ResNets', tmp_path)
    assert less.estimates[0].value == pytest.approx((80 - 70) - (80 - 78))
    assert less.verdict == 'yes'
    near, = answers('DiracNets of width 1 are nearly as accurate as ResNets', tmp_path)
    assert [e.value for e in near.estimates] == pytest.approx([0, -8])
    assert (near.verdict, near.quantity) == ('yes', 'resnet - diracnet, 10 to 100 layers, pp')
    noisy = {('resnet', 2): (80, 76, 79), ('diracnet', 1): around(80)}
    write_csv(tmp_path / 'large' / 'results.csv', run_records(noisy))
    large, = answers('large DiracNets are less accurate than ResNets', tmp_path)
    assert large.verdict == 'inconclusive'


def test_claims_on_width(tmp_path):
    rising = {('depth 10', 0.5): 60, ('depth 10', 1): 70, ('depth 16', 0.5): 65,
              ('depth 16', 1): 75}
    texts = 'width raises the accuracy', 'depth raises the accuracy, up to 28 layers'
    middle = {('depth 13', width): 61 + 10 * width for width in (0.5, 1)}  # 66 and 71
    beyond = {('depth 52', 1): 70, ('depth 10', 2.5): 50}  # no claim, no doubling
    for changed, expected in (({}, ('yes', 'yes')), ({('depth 16', 1): 65}, ('no', 'no')),
                              ({('depth 16', 1): 70}, ('yes', 'no')), (middle, ('yes', 'no')),
                              (beyond, ('yes', 'yes'))):
        write_csv(tmp_path / 'width' / 'results.csv', run_records(
            {key: around(mean) for key, mean in {**rising, **changed}.items()}))
        assert tuple(answers(text, tmp_path)[0].verdict for text in texts) == expected


def test_claims_on_init_pool_the_replication(tmp_path):
    write_csv(tmp_path / 'init' / 'results.csv', run_records({
        ('diracnet', 1): around(70), ('diracnet', 0.1): around(75), ('diracnet', 0.01): around(60),
        ('plain', 1): around(70), ('plain', 0.1): around(64)}))
    write_csv(tmp_path / 'again' / 'init' / 'results.csv', run_records({
        ('diracnet', 1): around(72), ('diracnet', 0.1): around(73)}))
    tenth, = answers('DiracNets need no careful initialization: std / 10', tmp_path)
    assert tenth.estimates[0].value == pytest.approx((70 + 72) / 2 - (75 + 73) / 2)
    assert tenth.replication[0].value == pytest.approx(72 - 73)
    assert (tenth.n, tenth.verdict) == ('6', 'yes')  # a gain is no loss
    hundredth, = answers('DiracNets need no careful initialization: std / 100', tmp_path)
    assert (hundredth.replication, hundredth.n, hundredth.verdict) == ([], '3 to 6', 'no')
    plain, = answers('plain networks need careful initialization', tmp_path)
    assert [e.value for e in plain.estimates] == pytest.approx([6])
    assert plain.verdict == 'yes'
    write_csv(tmp_path / 'init' / 'results.csv', run_records({('plain', 0.1): around(64)}))
    assert answers('plain networks need careful initialization', tmp_path) == []  # no baseline


def measured(ratios, alpha, std=0.0, seeds=(1, 2)):
    return [{'series': 'width 1', 'seed': seed, 'epoch': epoch, 'layer': layer,
             'dirac_norm': 2 * (ratio + seed / 100) if epoch else 20.0, 'free_norm': 2.0,
             'alpha_mean': alpha if epoch else 1, 'alpha_deviation': std}
            for seed in seeds for epoch in (0, 4) for layer, ratio in enumerate(ratios, 1)]


def test_claims_on_alpha_and_beta(tmp_path):
    texts = ('the identity dominates in deep layers',
             'deep layers stay nearer to the identity than shallow ones')
    for ratios, expected in (((0.5, 1, 3), ('yes', 'yes')), ((3, 1, 0.5), ('no', 'no')),
                             ((3, 1, 2), ('yes', 'no'))):
        write_csv(tmp_path / 'alpha-beta' / 'measured.csv', measured(ratios, 1.02))
        assert tuple(answers(text, tmp_path)[0].verdict for text in texts) == expected
        last, = answers(texts[0], tmp_path)
        # seeds differ by 0.01: standard error 0.005, one degree of freedom, t = 12.7062
        assert last.estimates[0].value == pytest.approx(ratios[2] + 0.015)
        assert last.estimates[0].high - last.estimates[0].value == pytest.approx(
            12.7062047 * 0.005, rel=1e-6)
    for alpha, std, expected in ((1.02, 0.05, 'no'), (0.7, 0.0, 'yes'), (1.0, 0.2, 'yes')):
        write_csv(tmp_path / 'alpha-beta' / 'measured.csv', measured((1, 1, 1), alpha, std))
        drift, = answers('alpha drifts away from 1', tmp_path)
        assert drift.verdict == expected
        assert drift.estimates[0].value == pytest.approx(math.hypot(alpha - 1, std))
        assert (drift.epochs, drift.n) == ('4', '2')


def test_claims_on_layers_show_the_longest_run_first():
    logs = ROOT / 'logs'
    long, medium, short = answers('alpha drifts away from 1', logs)
    assert (long.epochs, long.n, long.verdict) == ('100 and 40', '1 and 1', 'yes')
    assert (medium.epochs, short.epochs) == ('30', '4')
    params = torch.load(logs / 'diracnet-28-2' / 'model.pt7', weights_only=True)['params']
    names = [name.removesuffix('alpha') for name in params if name.endswith('.alpha')]
    assert len(names) == 24
    used = [params[f'{name}alpha'][:params[f'{name}conv'].shape[1]].double() for name in names]
    expected = statistics.mean((a - 1).square().mean().sqrt().item() for a in used)
    assert long.estimates[0].value == pytest.approx(expected, rel=1e-5)


def timings(compared, what, ratio, low, high):
    return {'compared': compared, 'what': what, 'ratio': ratio, 'ratio_low': low,
            'ratio_high': high}


def test_claims_on_the_cost_of_w_hat_on_a_cpu(tmp_path):
    text = 'W_hat is a minor cost in training: CPU'
    assert answers(text, tmp_path) == []
    write_csv(tmp_path / 'cost' / 'measured.csv', [
        timings('training step, 28-1', 'diracnet', 1.25, 1, 2),
        timings('inference, 28-1', 'diracnet, folded', 0.5, 0.4, 0.8)])
    write_csv(tmp_path / 'again' / 'cost' / 'measured.csv', [
        timings('training step, 28-1', 'diracnet', 0.98, 0.9, 1)])
    write_csv(tmp_path / 'bench.csv', [
        timings('W_hat 28-1', 'standard convolutions', 1, 1, 1),
        timings('W_hat 28-1', 'W_hat', 0.96, 0.955, 0.97),
        timings('W_hat 28-1', 'W_hat, layer by layer', 0.9, 0.8, 0.94)])
    whole, = answers(text, tmp_path)
    values = [100 * (1 / ratio - 1) for ratio in (1.25, 0.98, 0.96)]
    assert [e.value for e in whole.estimates] == pytest.approx(values)
    assert whole.estimates[0].low == -50
    assert whole.replication == whole.estimates[1:2]
    assert (whole.n, whole.verdict) == ('3', 'inconclusive')  # the medians straddle the margin
    layerwise, = answers(f'{text}, layer by layer', tmp_path)
    assert (layerwise.n, layerwise.verdict) == ('1', 'no')
    inference, = answers('a folded DiracNet has no extra cost at inference', tmp_path)
    assert (inference.estimates[0].value, inference.verdict) == (100, 'no')


@pytest.mark.parametrize(('experiment', 'first', 'second', 'line'), [
    ('large', ('resnet', 2), ('diracnet', 1), 'large DiracNets are less accurate than ResNets'),
    ('depth', ('diracnet', 52), ('plain', 52), 'diracnet - plain, pp (95 % CI)'),
    ('depth', ('diracnet', 100), ('resnet', 100), 'diracnet - resnet, pp (95 % CI)'),
])
def test_differences_on_the_page_equal_those_of_scipy(experiment, first, second, line):
    # configurations without replication: one run of each seed
    with open(ROOT / 'logs' / experiment / 'results.csv', newline='') as file:
        records = [*csv.DictReader(file)]
    a, b = ([float(record['test_acc_percent']) for record in records
             if record['series'] == series and float(record['x']) == x]
            for series, x in (first, second))
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    expected = f'{statistics.mean(a) - statistics.mean(b):+.1f} ({low:+.1f} to {high:+.1f})'
    page = (ROOT / 'docs' / 'results.md').read_text().splitlines()
    assert expected in next(text for text in page if text.startswith(f'| {line} '))


def test_claims_table_links_to_sections_of_the_page():
    page = (ROOT / 'docs' / 'results.md').read_text().splitlines()
    for claim in claims.CLAIMS:
        assert any(line in (f'## {claim.section}', f'### {claim.section}') for line in page)
    header, lines = claims.claims(ROOT / 'logs')
    assert {len(line) for line in lines} == {len(header)}
    assert len({line[0] for line in lines}) == len(claims.CLAIMS)  # each has an answer
