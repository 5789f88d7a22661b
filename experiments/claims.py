"""The claims of the paper and of other papers, and the results in logs/ that decide them.

The verdict on an accuracy depends on the 95 % Welch interval of a difference of means, not on the
difference alone. All runs of a configuration count, see `results.read_pooled`; runs of one seed are
averaged first. Where logs/ has results of several budgets, the longest budget comes first.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from diracnets.checkpoint import MODEL_FILE, load_params
from experiments import gpu_results
from experiments.intervals import Estimate, verdict_above, verdict_at_most, welch
from experiments.measures import layer_statistics
from experiments.results import (
    budget_epochs,
    budget_folders,
    grouped,
    read_pooled,
    read_results,
    relative_time,
    run_counts,
    seed_means,
    span,
)
from hubconf import TRAINED
from training.log import LOG_FILE, read_log

MARGIN = 1.0  # pp of accuracy that count as no difference
TIME_MARGIN = 5.0  # per cent of time that count as minor
ALPHA_MARGIN = 0.1  # of the root mean square of alpha - 1
CHANCE = 10.0  # accuracy in per cent of a diverged run, with ten classes
MAX_DEPTH = 100  # deeper networks were trained with one seed
BEST_DEPTH = 28  # up to which depth is claimed to raise the accuracy


@dataclass(frozen=True)
class Answer:
    """The evidence on a claim: one estimate per comparison."""

    epochs: str
    quantity: str
    estimates: list[Estimate]
    replication: list[Estimate]  # the same comparisons, of the replication alone
    n: str
    verdict: str
    form: str = '+.1f'  # format spec of the estimates


@dataclass(frozen=True)
class Claim:
    text: str
    source: str
    section: str  # of docs/results.md
    answers: Callable  # folder of logs -> list of Answers


def show(estimates, form='+.1f'):
    """Returns an estimate with its interval, or the ranges of several, as text.

    Estimates of a single seed have no interval.
    """
    def text(*values):
        values = [value if float(f'{value:{form}}') else 0.0 for value in values]  # never -0.0
        return ' to '.join(dict.fromkeys(f'{value:{form}}' for value in values))

    if not estimates:
        return ''
    values = [e.value for e in estimates]
    bounded = [e for e in estimates if math.isfinite(e.high)]
    interval = ''
    if any(e.low != e.high for e in bounded):
        without = f'; {len(estimates) - len(bounded)} without' * (len(bounded) < len(estimates))
        interval = f' ({text(min(e.low for e in bounded), max(e.high for e in bounded))}{without})'
    return text(min(values), max(values)) + interval


# ---------------------------------------------------------------- accuracy


def accuracies(results):
    """Returns {(series, x): accuracies, one per seed}; diverged runs count as CHANCE."""
    def accuracy(record):
        return record['test_acc_percent'] if record['ended'] == 'complete' else CHANCE
    return {key: seed_means(runs, accuracy)
            for key, runs in grouped(results, 'series', 'x').items()}


def estimated(points, comparisons):
    """Returns the Estimate of each comparison, a list of (weight, (series, x)); [] if some lack."""
    if not {key for terms in comparisons for _, key in terms} <= points.keys():
        return []
    return [welch(*((weight, points[key]) for weight, key in terms)) for terms in comparisons]


def by_accuracy(experiment, compare, decide):
    """Returns the answers to a claim on accuracies, one for each budget with results.

    compare(points) returns a description and its comparisons, [] if results are missing.
    """
    def answers(logs):
        found = []
        for folder in budget_folders(logs):
            results = read_pooled(experiment, folder)
            points = accuracies(results)
            quantity, comparisons = compare(points)
            estimates = estimated(points, comparisons)
            if estimates:
                again = read_results(folder / 'again' / experiment / 'results.csv')
                keys = {key for terms in comparisons for _, key in terms}
                found.append(Answer(
                    budget_epochs(results), f'{quantity}, pp', estimates,
                    estimated(accuracies(again), comparisons), run_counts(results, keys),
                    decide(estimates, MARGIN)))
        return found
    return answers


def difference(first, second):
    return [(1, first), (-1, second)]


def values_of_x(points, *series):
    """Returns the values of x that all series have, in order."""
    return sorted(set.intersection(*({x for name, x in points if name == one} for one in series)))


def lost_with_depth(points, series, minus=None):
    """Compares the best depth of a series with the deepest, and with the loss of another one."""
    both = [name for name in (series, minus) if name]
    depths = [x for x in values_of_x(points, *both) if x <= MAX_DEPTH]
    if len(depths) < 2:
        return '', []
    *shallower, deepest = depths
    terms, best = [], {}
    for name, sign in zip(both, (1, -1)):
        best[name] = max(shallower, key=lambda x, name=name: statistics.mean(points[name, x]))
        terms += [(sign, (name, best[name])), (-sign, (name, deepest))]
    if minus:
        return f'loss to {deepest:.0f} layers, {series} - {minus}', [terms]
    return f'loss from {best[series]:.0f} to {deepest:.0f} layers', [terms]


def resnet_minus_diracnet(points):
    depths = [x for x in values_of_x(points, 'resnet', 'diracnet') if x <= MAX_DEPTH]
    if not depths:
        return '', []
    return f'resnet - diracnet, {span(depths)} layers', [
        difference(('resnet', x), ('diracnet', x)) for x in depths]


def doubled_width(points):
    pairs = [((series, a), (series, b)) for series in dict.fromkeys(s for s, _ in points)
             for a, b in itertools.pairwise(values_of_x(points, series)) if b == 2 * a]
    return f'gain of each of {len(pairs)} doublings', [difference(b, a) for a, b in pairs]


def more_layers(points):
    depth_of = {series: float(series.split()[1]) for series, _ in points}
    depths = sorted((s for s in depth_of if depth_of[s] <= BEST_DEPTH), key=depth_of.get)
    if len(depths) < 2:
        return '', []
    steps = [((a, x), (b, x)) for a, b in itertools.pairwise(depths)
             for x in values_of_x(points, a, b)]
    return f'gain of each of {len(steps)} steps from {depths[0]} to {depths[-1]}', [
        difference(b, a) for a, b in steps]


def scaled_init(points, series, scales):
    known = [scale for scale in scales if (series, scale) in points]
    return (f"loss from Kaiming's std to {' and '.join(f'{scale:g}' for scale in known)} of it",
            [difference((series, 1), (series, scale)) for scale in known])


def two_models(points, first, second):
    """Compares two models of an experiment that trains each model at one depth."""
    keys = {series: (series, x) for series, x in points}
    if not {first, second} <= keys.keys():
        return '', []
    return f'{first} - {second}', [difference(keys[first], keys[second])]


# ---------------------------------------------------------------- alpha and beta


def alpha_drift(layers):
    """Returns the mean over the layers of the root mean square of alpha - 1."""
    return statistics.mean(math.hypot(layer['alpha_mean'] - 1, layer['alpha_deviation'])
                           for layer in layers)


def third_of(layers, i):
    """Returns the first, middle or last third of the layers: i is 0, 1 or 2."""
    size = len(layers) // 3
    return (layers[:size], layers[size:-size], layers[-size:])[i]


def norm_ratio(layers):
    """Returns the mean over the layers of the norm of the Dirac term over the learned term's."""
    return statistics.mean(layer['dirac_norm'] / layer['free_norm'] for layer in layers)


def last_ratio(layers):
    return norm_ratio(third_of(layers, 2))


def rise_of_ratio(layers):
    return last_ratio(layers) - norm_ratio(third_of(layers, 0))


def pretrained_layers(logs):
    """Returns {name: (epochs, layers)} of the released checkpoints, the longest run first."""
    found = {name: (read_log(logs / name / LOG_FILE)[-1]['epoch'],
                    layer_statistics(load_params(logs / name / MODEL_FILE)))
             for name in TRAINED if (logs / name / MODEL_FILE).exists()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def layers_of_runs(*folders):
    """Returns the layers of the runs of alpha-beta after their last epoch.

    Each record has the series, the seed, the epochs, and the records of the layers as `layers`.
    """
    runs = []
    for folder in folders:
        records = read_results(folder / 'alpha-beta' / 'measured.csv')
        last = max((record['epoch'] for record in records), default=0)
        runs += [{'series': series, 'seed': seed, 'epochs': last, 'layers': [*layers]}
                 for (series, seed), layers in grouped(
                     [r for r in records if r['epoch'] == last], 'series', 'seed').items()]
    return runs


def by_layers(quantity, value, margin, form):
    """Returns the answers on the layers: the released checkpoints first, then the short runs.

    A checkpoint is a single run without interval, whose value alone decides.
    """
    def over_seeds(runs):
        return [welch((1, seed_means(group, lambda run: value(run['layers']))))
                for group in grouped(runs, 'series').values()]

    def answers(logs):
        found = []
        pretrained = pretrained_layers(logs)
        if pretrained:
            estimates = [Estimate(*[value(layers)] * 3) for _, layers in pretrained.values()]
            verdicts = {verdict_above([estimate], margin) for estimate in estimates}
            found.append(Answer(
                ' and '.join(f'{epochs}' for epochs, _ in pretrained.values()), quantity,
                estimates, [], ' and '.join('1' * len(pretrained)),
                verdicts.pop() if len(verdicts) == 1 else 'inconclusive', form))
        for folder in budget_folders(logs):
            runs = layers_of_runs(folder, folder / 'again')
            if runs:
                estimates = over_seeds(runs)
                found.append(Answer(
                    f'{runs[0]["epochs"]:.0f}', quantity, estimates,
                    over_seeds(layers_of_runs(folder / 'again')),
                    span([len(group) for group in grouped(runs, 'series').values()]),
                    verdict_above(estimates, margin), form))
        return found
    return answers


# ---------------------------------------------------------------- time


def extra_time(record):
    """Returns the extra time over the baseline, in per cent, of a record of a timing."""
    return Estimate(*(100 * (time - 1) for time in relative_time(record)))


def time_answer(quantity, estimates, replication=()):
    return [Answer('', f'{quantity}, %', estimates, [*replication], f'{len(estimates)}',
                   verdict_at_most(estimates, TIME_MARGIN))] if estimates else []


def cost_records(logs, compared, name):
    return [extra_time(record) for record in read_results(logs / 'cost' / 'measured.csv')
            if record['compared'].startswith(compared) and record['what'] == name]


def training_on_a_cpu(logs, name):
    """Returns all measurements of W_hat on a CPU: of `cost`, its replication, and the benchmark."""
    estimates = []
    again = []
    if name == 'W_hat':
        again = cost_records(logs / 'again', 'training step', 'diracnet')
        estimates = cost_records(logs, 'training step', 'diracnet') + again
    estimates += [extra_time(record) for record in read_results(logs / 'bench.csv')
                  if record['compared'].startswith('W_hat') and record['what'] == name]
    return time_answer('extra time of a step, CPU', estimates, again)


def training_on_a_gpu(logs, forms, imagenet):
    """Returns the measurements of W_hat on the GPU, for ImageNet (batches of 256) or CIFAR."""
    comparisons = gpu_results.training_comparisons(read_results(logs / 'gpu' / 'rates.csv'))
    chosen = [variants for settings, variants in comparisons.items()
              if settings.endswith('batch 256') == imagenet]
    estimates = [Estimate(*gpu_results.overhead_of_w_hat(variants, form))
                 for variants in chosen for form in forms]
    devices = {record['device'].removeprefix('NVIDIA ').partition(' ')[0]
               for variants in chosen for record in variants.values()}
    return time_answer(f'extra time of a step, {", ".join(sorted(devices))}', estimates)


def inference_on_a_cpu(logs):
    first, again = (cost_records(folder, 'inference', 'diracnet, folded')
                    for folder in (logs, logs / 'again'))
    return time_answer('extra time, CPU', first + again, again)


# ---------------------------------------------------------------- all


PAPER, OTHER = 'section 4', 'Oyedotun et al.'  # the paper is DiracNets, arXiv 1706.00388
DEPTH, WIDTH, INIT = 'Depth', 'Width and large networks', 'Initialization scale'
ALPHA, ABLATIONS, COST = 'Alpha and beta', 'Ablations', 'Cost'
EASY_INIT = 'DiracNets need no careful initialization: std / '
MINOR = 'W_hat is a minor cost in training: '
CLAIMS = [
    Claim('plain networks degrade with depth', PAPER, DEPTH, by_accuracy(
        'depth', partial(lost_with_depth, series='plain'), verdict_above)),
    Claim('DiracNets do not degrade with depth', PAPER, DEPTH, by_accuracy(
        'depth', partial(lost_with_depth, series='diracnet'), verdict_at_most)),
    Claim('DiracNets degrade less than ResNets', 'this project', DEPTH, by_accuracy(
        'depth', partial(lost_with_depth, series='resnet', minus='diracnet'), verdict_above)),
    Claim('DiracNets of width 1 are nearly as accurate as ResNets', 'abstract', DEPTH, by_accuracy(
        'depth', resnet_minus_diracnet, verdict_at_most)),
    Claim('large DiracNets are less accurate than ResNets', OTHER, WIDTH, by_accuracy(
        'large', partial(two_models, first='resnet', second='diracnet'), verdict_above)),
    Claim('width raises the accuracy', PAPER, WIDTH, by_accuracy(
        'width', doubled_width, verdict_above)),
    Claim(f'depth raises the accuracy, up to {BEST_DEPTH} layers', PAPER, WIDTH, by_accuracy(
        'width', more_layers, verdict_above)),
    Claim(EASY_INIT + '10', 'abstract', INIT, by_accuracy(
        'init', partial(scaled_init, series='diracnet', scales=(0.1,)), verdict_at_most)),
    Claim(EASY_INIT + '100', 'abstract', INIT, by_accuracy(
        'init', partial(scaled_init, series='diracnet', scales=(0.01,)), verdict_at_most)),
    Claim('plain networks need careful initialization', 'abstract', INIT, by_accuracy(
        'init', partial(scaled_init, series='plain', scales=(0.1, 0.01)), verdict_above)),
    Claim('alpha drifts away from 1', OTHER, ALPHA, by_layers(
        'root mean square of alpha - 1', alpha_drift, ALPHA_MARGIN, '.2f')),
    Claim('the identity dominates in deep layers', PAPER, ALPHA, by_layers(
        'Dirac / learned term, last third', last_ratio, 1, '.2f')),
    Claim('deep layers stay nearer to the identity than shallow ones', PAPER, ALPHA, by_layers(
        'Dirac / learned term, last - first third', rise_of_ratio, 0, '+.2f')),
    Claim('ReLU with alpha and beta per channel is no worse than NCReLU', 'version 2', ABLATIONS,
          by_accuracy('versions', partial(two_models, first='diracnet-v1', second='diracnet'),
                      verdict_at_most)),
    *(Claim(MINOR + text, 'abstract', COST, partial(training_on_a_cpu, name=name))
      for text, name in (('CPU', 'W_hat'), ('CPU, layer by layer', 'W_hat, layer by layer'))),
    *(Claim(MINOR + text, 'abstract', COST, partial(
        training_on_a_gpu, forms=forms, imagenet=imagenet)) for text, forms, imagenet in (
            ('GPU, CIFAR networks, --no-compile', [gpu_results.UNCOMPILED], False),
            ('GPU, CIFAR networks, compiled', [gpu_results.COMPILED], False),
            ('GPU, 224 pixels, compiled or not', gpu_results.FORMS, True))),
    Claim('a folded DiracNet has no extra cost at inference', 'abstract', COST,
          inference_on_a_cpu),
]


def claims(logs):
    """The claims, one line per budget that answers them."""
    lines = []
    for claim in CLAIMS:
        anchor = claim.section.lower().replace(' ', '-')  # as GitHub makes it
        link = f'[{claim.section}](#{anchor})'
        for answer in claim.answers(logs):
            lines.append([
                claim.text, claim.source, answer.quantity, answer.epochs,
                *(show(estimates, answer.form)
                  for estimates in (answer.estimates, answer.replication)),
                answer.n, f'**{answer.verdict}**', link])
    return ['claim', 'source', 'quantity', 'epochs', 'all runs (95 % CI)', 'replication alone', 'n',
            'verdict', 'section'], lines
