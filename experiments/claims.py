"""The claims of the paper and of other papers, and the rules that decide them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from experiments import gpu
from experiments.results import grouped, mean_std

TIE_MARGIN = 1.0  # pp of accuracy that count as no difference
CHANCE = 10.0  # accuracy in per cent of a diverged run, with ten classes


@dataclass(frozen=True)
class Claim:
    experiment: str
    text: str
    source: str
    answer: Callable  # (results, measured) -> (finding, 'yes', 'partly' or 'no')


def mean_accuracies(results):
    """Returns {series: {x: mean test accuracy over seeds}}; diverged runs count as CHANCE."""
    means = {}
    for (series, x), seeds in grouped(results, 'series', 'x').items():
        values = [record['test_acc_percent'] if record['ended'] == 'whole' else CHANCE
                  for record in seeds]
        means.setdefault(series, {})[x] = mean_std(values)[0]
    return means


def verdict(*holds):
    return 'yes' if all(holds) else 'partly' if any(holds) else 'no'


def _depth(results, measured):
    means = mean_accuracies(results)
    deepest = max(means['plain'].keys() & means['diracnet'].keys())
    drops = {series: max(means[series].values()) - means[series][deepest]
             for series in ('plain', 'diracnet')}
    finding = ', '.join(f'{series} loses {drop:.1f} pp from its best depth to {deepest:.0f} layers'
                        for series, drop in drops.items())
    return finding, verdict(drops['plain'] > TIE_MARGIN, drops['diracnet'] <= TIE_MARGIN)


def _width(results, measured):
    means = mean_accuracies(results)
    by_width = all(sorted(of.items()) == sorted(of.items(), key=lambda item: item[1])
                   for of in means.values())
    depths = sorted(means, key=lambda series: float(series.split()[1]))
    by_depth = all(means[a][x] <= means[b][x] for a, b in zip(depths, depths[1:])
                   for x in means[a].keys() & means[b].keys())
    finding = (f'accuracy {"rises" if by_width else "does not always rise"} with width, '
               f'{"rises" if by_depth else "does not always rise"} with depth')
    return finding, verdict(by_width, by_depth)


def _init(results, measured):
    means = mean_accuracies(results)
    drops = {series: means[series][1] - min(means[series].values())
             for series in ('diracnet', 'plain')}
    finding = ', '.join(f"{series} loses {drop:.1f} pp from Kaiming's initialization to its worst"
                        for series, drop in drops.items())
    return finding, verdict(drops['diracnet'] <= TIE_MARGIN)


def _identity(results, measured):
    layers, epochs = (sorted({record[name] for record in measured}) for name in ('layer', 'epoch'))
    third = len(layers) // 3

    def ratio(epoch, part):
        return mean_std([record['dirac_norm'] / record['free_norm'] for record in measured
                         if record['epoch'] == epoch and record['layer'] in part])[0]

    # at initialization alpha is ten times beta: the question is how much of that remains
    (first, first_after), (last, last_after) = (
        [ratio(epoch, part) for epoch in (epochs[0], epochs[-1])]
        for part in (layers[:third], layers[-third:]))
    finding = (f'ratio of the norms of the Dirac and the learned term: from {first:.1f} to '
               f'{first_after:.1f} in the first third of the layers, from {last:.1f} to '
               f'{last_after:.1f} in the last')
    return finding, verdict(last_after > 1, last_after > first_after)


def _alpha_drifts(results, measured):
    last = max(record['epoch'] for record in measured)
    drift, _ = mean_std([math.hypot(record['alpha_mean'] - 1, record['alpha_deviation'])
                         for record in measured if record['epoch'] == last])
    return (f'alpha differs from its initial value 1 by {drift:.2f} (root mean square of a layer)',
            verdict(drift > 0.1))


def _difference(results, series, other):
    means = {name: of[max(of)] for name, of in mean_accuracies(results).items()}
    return means[series] - means[other]


def _large(results, measured):
    lead = _difference(results, 'diracnet', 'resnet')
    return f'DiracNet minus ResNet: {lead:+.1f} pp', verdict(lead < -TIE_MARGIN)


def _versions(results, measured):
    lead = _difference(results, 'diracnet-v1', 'diracnet')
    return f'v1 minus v2: {lead:+.1f} pp', verdict(lead <= TIE_MARGIN)


def _extra_time(measured, compared, name):
    """Returns the extra time of a variant over the baseline as text and as (median, low, high)."""
    record = next(record for record in measured
                  if record['compared'].startswith(compared) and record['what'] == name)
    extra = [100 * (1 / record[column] - 1) for column in ('ratio', 'ratio_high', 'ratio_low')]
    return ('{:+.1f} % (95 % CI {:+.1f} to {:+.1f}; '.format(*extra)
            + f'{record["dtype"]}, n = {record["n"]:.0f})', extra)


def _training_cost(results, measured):
    finding, (extra, _, _) = _extra_time(measured, 'a training step', 'diracnet')
    return f'time of a step {finding}', verdict(extra < 5)


def _training_cost_on_a_gpu(results, measured):
    comparisons = gpu.training_comparisons(measured).values()
    default, compiled = ([gpu.overhead_of_w_hat(variants, form)[0]
                          for variants in comparisons] for form in gpu.FORMS)
    ranges = [f'{min(extra):+.1f} to {max(extra):+.1f} %' for extra in (default, compiled)]
    device = next(record['device'] for variants in comparisons for record in variants.values())
    finding = (f'time of a step {ranges[0]}, with --compile {ranges[1]} (bfloat16, '
               f'{len(comparisons)} comparisons, {device})')
    return finding, verdict(*(extra < 5 for extra in default + compiled))


def _inference_cost(results, measured):
    finding, (extra, low, high) = _extra_time(measured, 'inference', 'diracnet, folded')
    return f'time of inference {finding}', verdict(low <= 0 <= high or extra < 1)


PAPER = 'DiracNets, arXiv 1706.00388'
CLAIMS = [
    Claim('depth', 'plain networks get worse with depth, DiracNets do not', PAPER, _depth),
    Claim('width', 'both depth and width raise the accuracy', PAPER, _width),
    Claim('init', 'careful initialization is mostly not needed', PAPER, _init),
    Claim('alpha-beta', 'deep layers stay near the identity', PAPER, _identity),
    Claim('alpha-beta', 'alpha drifts away from the identity', 'Oyedotun et al.', _alpha_drifts),
    Claim('large', 'large DiracNets are less accurate than ResNets', 'Oyedotun et al.', _large),
    Claim('versions', 'ReLU with alpha and beta per channel is no worse than NCReLU', PAPER,
          _versions),
    Claim('cost', 'W_hat is a minor cost in training', PAPER, _training_cost),
    Claim('gpu', 'W_hat is a minor cost in training', PAPER, _training_cost_on_a_gpu),
    Claim('cost', 'a folded DiracNet has no extra cost at inference', PAPER, _inference_cost),
]
