"""What the paper and others claim, and the rule by which the rows of an experiment answer it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from experiments import gpu_results
from experiments.figures import grouped, mean_and_deviation

SAME = 1.0  # points of accuracy that count as no difference
CHANCE = 10.0  # per cent, of ten classes: what a training that diverged counts as


@dataclass(frozen=True)
class Claim:
    experiment: str
    text: str
    source: str
    answer: Callable  # (rows, measured) to (what was found, 'yes', 'partly' or 'no')


def accuracies(rows):
    """Returns {series: {x: mean test accuracy over seeds, those that diverged at chance}}."""
    found = {}
    for (series, x), group in grouped(rows, 'series', 'x').items():
        values = [row['test_acc_percent'] if row['ended'] == 'whole' else CHANCE for row in group]
        found.setdefault(series, {})[x] = mean_and_deviation(values)[0]
    return found


def _said(*holds):
    return 'yes' if all(holds) else 'partly' if any(holds) else 'no'


def _depth(rows, measured):
    means = accuracies(rows)
    deepest = max(means['plain'].keys() & means['diracnet'].keys())  # of both
    lost = {series: max(means[series].values()) - means[series][deepest]
            for series in ('plain', 'diracnet')}
    found = ', '.join(f'{series} loses {points:.1f} points from its best depth to '
                      f'{deepest:.0f} layers' for series, points in lost.items())
    return found, _said(lost['plain'] > SAME, lost['diracnet'] <= SAME)


def _width(rows, measured):
    means = accuracies(rows)
    by_width = all(sorted(of.items()) == sorted(of.items(), key=lambda item: item[1])
                   for of in means.values())
    depths = sorted(means, key=lambda series: float(series.split()[1]))
    by_depth = all(means[a][x] <= means[b][x] for a, b in zip(depths, depths[1:])
                   for x in means[a].keys() & means[b].keys())
    found = (f'accuracy {"rises" if by_width else "does not always rise"} with width, '
             f'{"rises" if by_depth else "does not always rise"} with depth')
    return found, _said(by_width, by_depth)


def _init(rows, measured):
    means = accuracies(rows)
    lost = {series: means[series][1] - min(means[series].values())
            for series in ('diracnet', 'plain')}
    found = ', '.join(f"{series} loses {points:.1f} points from Kaiming's start to its worst"
                      for series, points in lost.items())
    return found, _said(lost['diracnet'] <= SAME)


def _identity(rows, measured):
    layers, epochs = (sorted({row[name] for row in measured}) for name in ('layer', 'epoch'))
    third = len(layers) // 3

    def ratio(epoch, part):
        return mean_and_deviation([row['dirac_norm'] / row['free_norm'] for row in measured
                                   if row['epoch'] == epoch and row['layer'] in part])[0]

    # W_hat starts as ten parts Dirac to one: what is asked is how much of this stays
    (first, first_left), (last, last_left) = (
        [ratio(epoch, part) for epoch in (epochs[0], epochs[-1])]
        for part in (layers[:third], layers[-third:]))
    found = (f'norm of the Dirac part over the free part: from {first:.1f} to {first_left:.1f} in '
             f'the first third of the layers, from {last:.1f} to {last_left:.1f} in the last')
    return found, _said(last_left > 1, last_left > first_left)


def _alpha_drifts(rows, measured):
    last = max(row['epoch'] for row in measured)
    drift, _ = mean_and_deviation([math.hypot(row['alpha_mean'] - 1, row['alpha_deviation'])
                                   for row in measured if row['epoch'] == last])
    return (f'alpha is {drift:.2f} away from its start at 1 (root mean square of a layer)',
            _said(drift > 0.1))


def _large(rows, measured):
    means = {series: of[max(of)] for series, of in accuracies(rows).items()}
    ahead = means['diracnet'] - means['resnet']
    return f'DiracNet is {ahead:+.1f} points from the ResNet', _said(ahead < -SAME)


def _versions(rows, measured):
    means = {series: of[max(of)] for series, of in accuracies(rows).items()}
    lag = means['diracnet-v1'] - means['diracnet']
    return f'v1 is {lag:+.1f} points from v2', _said(lag <= SAME)


def _more(measured, compared, what):
    """How much more time one side took than the first, in per cent: said, and (median, low, high).

    low and high: of its 95 % interval.
    """
    row = next(row for row in measured
               if row['compared'].startswith(compared) and row['what'] == what)
    more = [100 * (1 / row[name] - 1) for name in ('ratio', 'ratio_high', 'ratio_low')]
    return ('{:+.1f} % ({:+.1f} to {:+.1f}; '.format(*more)
            + f'{row["dtype"]}, {row["n"]:.0f} turns)', more)


def _training_cost(rows, measured):
    found, (more, _, _) = _more(measured, 'a training step', 'diracnet')
    return f'time of a step {found}', _said(more < 5)


def _training_cost_on_a_gpu(rows, measured):
    trainings = gpu_results.trainings(measured).values()
    eager, compiled = ([gpu_results.more_for_w_hat(sides, form)[0] for sides in trainings]
                       for form in gpu_results.FORMS)
    said = [f'{min(of):+.1f} to {max(of):+.1f} %' for of in (eager, compiled)]
    device = next(row['device'] for sides in trainings for row in sides.values())
    found = (f'time of a step {said[0]}, with --compile {said[1]} (bfloat16, {len(trainings)} '
             f'comparisons, {device})')
    return found, _said(*(more < 5 for more in eager + compiled))


def _inference_cost(rows, measured):
    found, (more, low, high) = _more(measured, 'inference', 'diracnet, folded')
    return f'time of inference {found}', _said(low <= 0 <= high or more < 1)


PAPER = 'DiracNets, arXiv 1706.00388'
CLAIMS = [
    Claim('depth', 'plain networks get worse with depth, DiracNets do not', PAPER, _depth),
    Claim('width', 'both depth and width raise the accuracy', PAPER, _width),
    Claim('init', 'careful initialisation is mostly not needed', PAPER, _init),
    Claim('alpha-beta', 'deep layers stay near the identity', PAPER, _identity),
    Claim('alpha-beta', 'alpha drifts from the identity', 'Oyedotun et al.', _alpha_drifts),
    Claim('large', 'DiracNets lag behind ResNets where networks are large', 'Oyedotun et al.',
          _large),
    Claim('versions', 'ReLU with alpha and beta for each channel is no worse than NCReLU', PAPER,
          _versions),
    Claim('cost', 'W_hat is a minor cost in training', PAPER, _training_cost),
    Claim('gpu', 'W_hat is a minor cost in training', PAPER, _training_cost_on_a_gpu),
    Claim('cost', 'folded, there is no cost at inference', PAPER, _inference_cost),
]
