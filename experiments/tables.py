"""Writes the tables of README.md and docs/ from the CSV files in logs/.

    python -m experiments.tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the rest of a page stays. NAME may
start with a folder of logs/: `medium/depth` is the table of `depth` in the budget `medium`. The
tables of docs/results.md are in experiments/claims.py and result_tables.py.
"""

import functools
import re
import statistics

import torch

import cli
from cli import ArgumentParser, exit_on_error
from diracnets.folding import fold
from diracnets.models.registry import count_multiply_adds, create_model
from diracnets.preprocessing import Preprocessing
from experiments import gpu_results
from experiments.claims import claims, show
from experiments.definitions import command_line
from experiments.interleaved import RATIO, pairs_with_baseline
from experiments.intervals import welch
from experiments.result_tables import RESULT_TABLES
from experiments.results import (
    ROOT,
    column,
    format_mean,
    grouped,
    read_csv,
    read_results,
    speedrun_runs,
)

PAGES = [ROOT / name for name in (
    'README.md', 'docs/networks.md', 'docs/results.md', 'docs/speed.md', 'docs/speedrun.md')]
MARKED = re.compile(r'<!-- table: ([\w/-]+) -->\n.*?<!-- end -->', re.DOTALL)


# ---------------------------------------------------------------- speed-run


AIRBENCH = 'airbench94_muon', 8  # series and epochs of the runs that the others are compared with


def speedrun(logs):
    """The speed-run and its variants, after airbench94_muon: accuracy and compute."""
    def mean_of(name, records):  # some runs of airbench have no TTA
        values = [value for value in column(records, name) if value != '']
        return format_mean(values) + f' ({len(values)})' * (0 < len(values) < len(records))

    runs = speedrun_runs(logs)
    airbench, _ = runs.get(AIRBENCH, ([], []))
    lines = [
        [series, f'{epochs:.0f}', str(len(records)),
         *(mean_of(f'{name}test_acc_percent', records) for name in ('', 'tta_')),
         show([welch(*((sign, column(group, 'test_acc_percent'))
                       for sign, group in ((1, records), (-1, airbench))))], '+.2f')
         if airbench and records is not airbench else '',
         f'{records[0]["multiply_adds"] / 1e12:.0f}', format_mean(tflop, 0)]
        for (series, epochs), (records, tflop) in runs.items()]
    return ['variant', 'epochs', 'n', 'test accuracy, %', 'with TTA, %', '- airbench, pp (95 % CI)',
            'multiply-adds, 10^12', 'matmul-equivalent compute, TFLOP'], lines


def search(logs, repeated=True):
    """Changes of the speed-run recipe: compute, accuracy, paired differences from the recipe.

    repeated: those with several seeds, which have intervals; otherwise those with one.
    Multiply-adds and CPU time are those of training, without recalibration; the multiply-adds
    include the backward pass of frozen layers.
    """
    records = read_results(logs / 'speedrun' / 'search.csv')
    recipe = {record['seed']: record for record in records if record['change'] == 'recipe'}
    lines = []
    groups = grouped([record for record in records if record['seed'] in recipe], 'change')
    for (change,), runs in sorted(
            groups.items(), key=lambda group: (group[0] != ('recipe',), -len(group[1]))):
        if (len(runs) > 1) != repeated:
            continue
        pairs = [(run, recipe[run['seed']]) for run in runs]
        costs = [statistics.mean(run[name] / base[name] for run, base in pairs)
                 for name in ('multiply_adds', 'train_cpu_seconds')]
        lines.append([
            change, f'{len(pairs)}', *(f'{cost:.2f}' for cost in costs),
            *(format_mean(column(runs, f'{name}_acc_percent')) for name in ('train', 'test')),
            *('' if change == 'recipe' else show(
                [welch((1, [run[name] - base[name] for run, base in pairs]))], form)
              for name, form in (('test_acc_percent', '+.2f'), ('test_loss', '+.3f')))])
    return ['change', 'n', 'multiply-adds / recipe', 'CPU time / recipe', 'training accuracy, %',
            'test accuracy, %', 'paired difference, pp (95 % CI)',
            'paired difference of the test loss (95 % CI)'], lines


def tried(logs):
    """Attempts for the speed-run, one seed each, entered by hand in logs/speedrun/tried.csv."""
    columns = ('epochs', 0), ('train_seconds', 0), ('train_acc_percent', 2), ('test_acc_percent', 2)
    lines = [[record['what'], record['change'], *(
        '' if record[name] == '' else f'{record[name]:.{digits}f}' for name, digits in columns)]
        for record in read_results(logs / 'speedrun' / 'tried.csv')]
    return ['variant', 'change', 'epochs', 'training time, s', 'training accuracy, %',
            'test accuracy, %'], lines


# ---------------------------------------------------------------- architectures


SIZES = [  # model, dataset, options, recipe
    ('diracnet', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('diracnet', 'CIFAR10', {'depth': 28, 'width': 10}, 'diracnet-cifar'),
    ('diracnet-v1', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('diracnet-repeated', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('diracnet-fast', 'CIFAR10', {}, 'speedrun'),
    ('plain', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('plain', 'CIFAR10', {'depth': 28, 'width': 1, 'block': 'dbb'}, 'diracnet-cifar'),
    ('plain', 'CIFAR10', {'depth': 28, 'width': 1, 'block': 'acb'}, 'diracnet-cifar'),
    ('plain', 'CIFAR10', {'depth': 28, 'width': 1, 'block': 'repvgg'}, 'diracnet-cifar'),
    ('dirac-init', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('default-init', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('resnet', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('wide-resnet', 'CIFAR10', {'depth': 16, 'width': 4}, 'wide-resnet'),
    ('wide-resnet', 'CIFAR10', {'depth': 28, 'width': 10}, 'wide-resnet'),
    ('densenet', 'CIFAR10', {'layers': 40, 'reduce': 1.0, 'bottleneck': False}, 'densenet'),
    ('densenet', 'CIFAR10', {'layers': 100, 'growth': 12}, 'densenet'),
    ('densenet', 'CIFAR10', {'layers': 190, 'growth': 40}, 'densenet'),
    ('diracnet', 'ImageNet', {'depth': 18}, 'diracnet-imagenet'),
    ('diracnet', 'ImageNet', {'depth': 34}, 'diracnet-imagenet'),
    ('diracnet-v1', 'ImageNet', {'depth': 18, 'width': 0.75}, 'diracnet-imagenet'),
    ('plain', 'ImageNet', {'depth': 18}, 'diracnet-imagenet'),
    ('resnet34', 'ImageNet', {}, 'diracnet-imagenet'),
    ('densenet121', 'ImageNet', {}, 'diracnet-imagenet'),
    ('resnet18', 'ImageNet', {'block': 'base'}, 'dbb'),
    ('resnet18', 'ImageNet', {'block': 'dbb'}, 'dbb'),
    ('resnet18', 'ImageNet', {'block': 'acb'}, 'dbb'),
    ('resnet50', 'ImageNet', {'block': 'base'}, 'dbb'),
    ('resnet50', 'ImageNet', {'block': 'dbb'}, 'dbb'),
    ('mobilenet', 'ImageNet', {'block': 'base'}, 'dbb'),
    ('mobilenet', 'ImageNet', {'block': 'dbb'}, 'dbb'),
    ('alexnet', 'ImageNet', {'block': 'base'}, 'dbb'),
    ('alexnet', 'ImageNet', {'block': 'dbb'}, 'dbb'),
]


def size_cells(name, dataset, options, recipe):
    """Returns the cells of a model: its sizes, training and deployed, and its command."""
    with torch.device('meta'):
        model = create_model(name, dataset, **options)
    pixels = Preprocessing.for_dataset(dataset).size
    sizes = []
    for form in (model, fold(model)):
        sizes += [f'{sum(p.numel() for p in form.parameters()):,}',
                  f'{count_multiply_adds(form, pixels) / 1e6:,.1f}']
    title = ', '.join([name, *(f'{option} {value}' for option, value in options.items())])
    command = ['python train.py', *command_line({'recipe': recipe, 'model': name, **options})]
    return [title, dataset, *sizes, f'`{" ".join(command)}`']


def sizes(logs):
    """The sizes of the architectures, which need neither training nor data."""
    return ['model', 'images', 'parameters', 'multiply-adds (M)', 'parameters deployed',
            'multiply-adds deployed (M)', 'command'], [
                size_cells(*model) for model in SIZES]


# ---------------------------------------------------------------- speed


def bench(logs):
    """The latest results of experiments.bench against the baselines, without those over depth."""
    lines = []
    for baseline, record in pairs_with_baseline(read_results(logs / 'bench.csv')):
        target = record['target']
        lines.append([
            f'{record["compared"]}: {record["what"]}', baseline['what'],
            f'{record["n"]:.0f}', f'{record["images_per_second"]:,.0f}',
            '{ratio:.3g} ({ratio_low:.3g} to {ratio_high:.3g})'.format(**record),
            f'{record["peak_memory_mb"]:.0f}, {baseline["peak_memory_mb"]:.0f}',
            f'{target:g}: {"met" if record["ratio"] >= target else "not met"}' if target else '',
        ])
    return ['variant', 'baseline', 'n', 'images/s', 'ratio (95 % CI)', 'peak MB, both',
            'target'], lines


def gpu_checks(logs):
    """The recorded comparison of a GPU with the CPU: difference and tolerance."""
    lines = [[record['what'], record['off'], record['at_most'], record['holds']]
             for record in read_csv(logs / 'gpu' / 'checks.csv')]
    return ['quantity', 'difference', 'tolerance', 'passed'], lines


def gpu_training(logs):
    """Rates of a training step on a GPU: eager, as train.py runs it, and compiled."""
    lines = []
    comparisons = gpu_results.training_comparisons(read_results(logs / 'gpu' / 'rates.csv'))
    for settings, variants in comparisons.items():
        compiled = variants[gpu_results.COMPILED]
        shown = [variants[gpu_results.EAGER], *map(variants.get, gpu_results.FORMS),
                 gpu_results.resnet_record(variants, gpu_results.COMPILED)]
        lines.append([
            settings, f'{compiled["n"]:.0f}',
            *(f'{rate:,.0f}' for rate in column(shown, 'images_per_second')),
            f'{compiled["percent_of_product"]:.0f}', f'{compiled["peak_memory_mb"]:,.0f}',
            *('{:+.0f} ({:+.0f} to {:+.0f})'.format(*gpu_results.overhead_of_w_hat(variants, form))
              for form in gpu_results.FORMS),
        ])
    return ['model', 'n', 'float32, NCHW', 'train.py --no-compile', 'train.py', 'ResNet',
            '% of matmul peak', 'peak MB', 'W_hat, %, --no-compile', 'W_hat, %'], lines


def gpu_runs(logs):
    """The cost of a run of 200 epochs on each GPU, as measured last."""
    latest = {(record['device'], record['model']): record
              for record in read_results(logs / 'gpu' / 'runs.csv')}
    lines = [[record['model'], record['command'], record['device'],
              f'{record["images_per_second"]:,.0f}', f'{record["seconds_per_epoch"]:.2f}',
              f'{record["compile_seconds"]:.0f}', f'{record["minutes"]:.1f}',
              f'{record["peak_memory_mb"]:,.0f}'] for record in latest.values()]
    return ['model', 'command', 'device', 'images/s', 's per epoch', 'compilation, s',
            'minutes, 200 epochs', 'peak MB'], lines


def gpu_profile(logs):
    """The kernels of a training step by kind: milliseconds and launches, one line per step."""
    steps = grouped(read_results(logs / 'gpu' / 'profile.csv'), 'device', 'step')
    kinds = list(dict.fromkeys(record['kernels'] for of in steps.values() for record in of))
    lines = []
    for (device, step), records in steps.items():
        cells = {record['kernels']: f'{record["milliseconds"]:.2f} ({record["launches"]:.0f})'
                 for record in records}  # of the last measurement
        lines.append([device, step, *(cells.get(kind, '') for kind in kinds)])
    return ['device', 'step', *(f'{kind}, ms (launches)' for kind in kinds)], lines


def gpu_inference(logs):
    """Rates of a folded DiracNet on a GPU, and of the ResNet of the same depth."""
    rates = read_results(logs / 'gpu' / 'rates.csv')
    comparisons = gpu_results.gpu_comparisons(rates, 'inference')
    lines = [[settings, record['what'], f'{record["n"]:.0f}',
              f'{record["images_per_second"]:,.0f}', RATIO.format(**record),
              f'{record["percent_of_product"]:.0f}']
             for settings, variants in comparisons.items() for record in variants.values()]
    return ['settings', 'variant', 'n', 'images/s', 'ratio (95 % CI)', '% of matmul peak'], lines


# ---------------------------------------------------------------- pages


LEFT_ALIGNED = (  # columns of text
    'variant', 'source', 'change', 'passed', 'baseline', 'images',
    'command', 'quantity', 'verdict', 'section', 'parameters, millions', 'device', 'step')
TABLES = {
    'claims': claims, 'search': search, 'search-once': functools.partial(search, repeated=False),
    'tried': tried, 'bench': bench, 'gpu-checks': gpu_checks,
    'gpu-training': gpu_training, 'gpu-inference': gpu_inference, 'gpu-runs': gpu_runs,
    'gpu-profile': gpu_profile, 'sizes': sizes, 'speedrun': speedrun, **RESULT_TABLES,
}


def table(name, logs):
    """Returns the Markdown of one of TABLES."""
    header, lines = TABLES[name](logs)
    return '\n'.join(cli.table(header, lines, left=LEFT_ALIGNED))


def fill(page, logs):
    """Fills the tables in the text of a page; raises ValueError for an unknown name."""

    def replacement(match):
        folder, _, name = match[1].rpartition('/')
        if name not in TABLES or not (logs / folder).is_dir():
            raise ValueError(f'table {match[1]}: unknown; use one of {", ".join(TABLES)}, after a '
                             f'folder of {logs} or none')
        return f'<!-- table: {match[1]} -->\n{table(name, logs / folder)}\n<!-- end -->'

    return MARKED.sub(replacement, page)


def main(argv=None):
    ArgumentParser(prog='experiments.tables', description=__doc__.splitlines()[0]).parse_args(argv)
    with exit_on_error('experiments.tables'):
        for page in PAGES:
            page.write_text(fill(page.read_text(), ROOT / 'logs'))
            print(page)


if __name__ == '__main__':
    main()
