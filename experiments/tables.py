"""Writes the tables of README.md and docs/ from the CSV files in logs/.

    python -m experiments.tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the rest of a page stays. NAME may
start with a folder of logs/: `again/int8` is the table of int8's replication.
"""

import functools
import itertools
import re
from pathlib import Path

import torch

import cli
from cli import ArgumentParser, exit_on_error
from diracnet import DiracNet
from diracnets.checkpoint import MODEL_FILE
from diracnets.fold import fold
from diracnets.models.registry import create_model
from diracnets.preprocessing import Preprocessing
from experiments import gpu
from experiments.claims import CLAIMS
from experiments.definitions import (
    BUDGETS,
    COMPARED_BLOCKS,
    EXPERIMENTS,
    command_line,
    estimated_hours,
)
from experiments.interleaved import RATIO, pairs_with_baseline
from experiments.measures import DEPTH, RUN_MEASURES
from experiments.results import (
    CPU,
    ROOT,
    completed,
    grouped,
    label,
    mean_std,
    read_csv,
    read_results,
    seed_counts,
    step_times,
)
from experiments.variants import multiply_adds
from hubconf import TRAINED
from training.log import LOG_FILE, read_log
from training.options import RECIPE_FOLDER

PAGES = [ROOT / name for name in (
    'README.md', 'docs/networks.md', 'docs/results.md', 'docs/speed.md', 'docs/speedrun.md')]
MARKED = re.compile(r'<!-- table: ([\w/-]+) -->\n.*?<!-- end -->', re.DOTALL)


def format_mean(values, digits=2):
    mean, std = mean_std(values)
    mean = round(mean, digits) + 0.0  # never -0.00
    return f'{mean:.{digits}f}' + (f' ± {std:.{digits}f}' if len(values) > 1 else '')


def column(records, name):
    return [record[name] for record in records]


# ---------------------------------------------------------------- one experiment


def accuracy_table(results, measured, x=''):
    """One line per point: accuracy and loss, mean ± std over the seeds that did not diverge.

    `x` names what the points of a series differ in. Without it, a series is one point, and x is
    its order.
    """
    lines = []
    points = sorted(grouped(results, 'series', 'x').items(),
                    key=lambda item: item[0] if x else item[0][1])
    for (series, value), seeds in points:
        runs, point = completed(seeds), [label(series), f'{value:g}'] if x else [label(series)]
        diverged = f', {len(seeds) - len(runs)} diverged' * (len(seeds) > len(runs))
        lines.append([*point, f'{len(runs)}{diverged}', *([
            format_mean(column(runs, 'test_acc_percent')),
            format_mean(column(runs, 'train_loss'), 3), f'{runs[0]["parameters"]:,.0f}',
        ] if runs else [''] * 3)])
    return ['model', *([x] if x else []), 'n', 'test accuracy, %', 'training loss',
            'parameters'], lines


def int8(results, measured):
    lines = []
    for (series,), runs in grouped(measured, 'series').items():
        float32, int8, equalized = (column(runs, f'{name}_test_acc_percent')
                                    for name in ('float32', 'int8', 'equalised_int8'))
        lines.append([series, str(len(runs)), *map(format_mean, (float32, int8)), *(
            format_mean([a - b for a, b in zip(float32, form)]) for form in (int8, equalized))])
    return ['model', 'n', 'float32, %', 'int8, %', 'drop, pp', 'drop if equalized, pp'], lines


def speedrun(results, measured):
    columns = ('test_acc_percent', 2), ('six_views_test_acc_percent', 2), ('train_seconds', 0), (
        'product_gflop_per_second', 0), ('machine_tflop', 0)
    lines = [
        [label(series), f'{epochs:.0f}', str(len(runs)),
         *(format_mean(column(runs, name), digits) for name, digits in columns)]
        for (series, epochs), runs in grouped(measured, 'series', 'x').items()]
    return ['variant', 'epochs', 'n', 'test accuracy, %', 'with TTA, %', 'training time, s',
            'matmul rate, GFLOP/s', 'matmul-equivalent compute, TFLOP'], lines


def cost(results, measured):
    lines = [[
        label(record['compared']), label(record['what']), record['dtype'], f'{record["n"]:.0f}',
        f'{128_000 / record["images_per_second"]:.1f}',
        '{:.3f} ({:.3f} to {:.3f})'.format(
            *(1 / record[name] for name in ('ratio', 'ratio_high', 'ratio_low'))),
    ] for record in measured]
    return ['of 128 images', 'model', 'dtype', 'n', 'ms', 'time / first (95 % CI)'], lines


EXPERIMENT_TABLES = {  # accuracy_table for the others
    'depth': functools.partial(accuracy_table, x='depth'),
    'width': functools.partial(accuracy_table, x='width'),
    'init': functools.partial(accuracy_table, x="std / Kaiming's"),
    'int8': int8, 'cost': cost, 'speedrun': speedrun,
}


# ---------------------------------------------------------------- several experiments


def tried(logs):
    """Attempts for the speed-run, one seed each, entered by hand in logs/speedrun/tried.csv."""
    columns = ('epochs', 0), ('train_seconds', 0), ('train_acc_percent', 2), ('test_acc_percent', 2)
    lines = [[label(record['what']), record['change'], *(
        '' if record[name] == '' else f'{record[name]:.{digits}f}' for name, digits in columns)]
        for record in read_results(logs / 'speedrun' / 'tried.csv')]
    return ['variant', 'change', 'epochs', 'training time, s', 'training accuracy, %',
            'test accuracy, %'], lines


def pretrained(logs):
    """The released checkpoints: from their logs, and their accuracy in float32.

    A folder may contain the logs of other seeds: the last column, as measured in training.
    """
    lines = []
    for name in TRAINED:
        epochs = read_log(logs / name / LOG_FILE)
        last, size = epochs[-1], (logs / name / MODEL_FILE).stat().st_size
        seeds = [read_log(log)[-1]['test_acc'] for log in sorted((logs / name).glob('*log.txt'))]
        images = read_csv(logs / name / 'seen' / 'predictions.csv')
        correct = sum(image['class'] == image['labelled'] for image in images)
        lines.append([
            f'[{name}](../logs/{name}/README.md)', f'{last["n_parameters"]:,}',
            f'{size / 1e6:.1f}', f'{last["epoch"]}',
            f'{sum(column(epochs, "train_time")) / 3600:.1f}',
            f'{100 * correct / len(images):.2f}', f'{len(seeds)}', format_mean(seeds),
        ])
    return ['model', 'parameters', 'file, MB', 'epochs', 'hours', 'test accuracy, %', 'seeds',
            'all seeds, bfloat16, %'], lines


def by_depth(logs):
    """The accuracies of `depth`: one line per model, one column per depth."""
    groups = grouped(completed(read_experiment('depth', logs)[0]), 'series', 'x')
    names, depths = ([*dict.fromkeys(key[i] for key in groups)] for i in (0, 1))
    lines = [[name, *(
        format_mean(column(groups[name, layers], 'test_acc_percent'))
        if (name, layers) in groups else '' for layers in sorted(depths))] for name in names]
    return ['model', *(f'{layers:.0f} layers' for layers in sorted(depths))], lines


def blocks(logs):
    """The blocks of plain networks: accuracy and loss at each depth, and the costs at one."""
    groups = grouped(read_experiment('blocks', logs)[0], 'series', 'x')
    depths, times = sorted({layers for _, layers in groups}), step_times(logs)
    drops = {
        record['run']: record['float32_test_acc_percent'] - record['int8_test_acc_percent']
        for name in ('int8', 'blocks') for record in read_experiment(name, logs)[1]}

    def with_n(values, diverged=0):
        counts = [f'{len(values)}', *[f'{diverged} diverged'] * (diverged > 0)]
        mean = [format_mean(values)] if values else []
        return ' '.join([*mean, f'({", ".join(counts)})']) if values or diverged else ''

    lines = []
    for block in [name for name in COMPARED_BLOCKS if any(name == key[0] for key in groups)]:
        seeds = {layers: groups.get((block, layers), []) for layers in [*depths, DEPTH]}
        runs = {layers: completed(records) for layers, records in seeds.items()}
        lines.append([
            block, f'{runs[DEPTH][0]["parameters"]:,.0f}' if runs[DEPTH] else '',
            '{:.2f} ({:.2f} to {:.2f})'.format(*times[block]) if block in times else '',
            *(with_n(column(runs[n], 'test_acc_percent'), len(seeds[n]) - len(runs[n]))
              for n in depths),
            *(format_mean(column(runs[n], 'train_loss'), 3) if runs[n] else '' for n in depths),
            with_n([drops[record['run']] for record in runs[DEPTH] if record['run'] in drops]),
        ])
    return ['block', f'parameters, {DEPTH} layers', 'step time / base (95 % CI)',
            *(f'{n:.0f} layers, % (n)' for n in depths), *(f'loss, {n:.0f} layers' for n in depths),
            'int8 drop, pp (n)'], lines


def common_points(first, second):
    """Yields (series, x) and the cells of the points that two lists of results share."""
    groups = [grouped(completed(results), 'series', 'x') for results in (first, second)]
    for key in [key for key in groups[0] if key in groups[1]]:
        accuracies = [column(group[key], 'test_acc_percent') for group in groups]
        means = [mean_std(values)[0] for values in accuracies]
        yield key, [' and '.join(str(len(values)) for values in accuracies),
                    *map(format_mean, accuracies), f'{round(means[1] - means[0], 2) + 0:+.2f}']


def devices(logs):
    """The runs of `depth` on a GPU, and the same on a CPU (cpu.csv)."""
    cpu, gpu = ([record for record in read_results(logs / 'depth' / name)
                 if (record['device'] == CPU) == on_cpu]
                for name, on_cpu in (('cpu.csv', True), ('results.csv', False)))
    lines = [[f'{series}-{depth:.0f}-1', *cells]
             for (series, depth), cells in common_points(cpu, gpu)]
    return ['model', 'n', 'CPU, %', 'GPU, %', 'GPU - CPU, pp'], lines


def with_replication(experiment, logs):
    """Returns the results of an experiment, and those of its replication in logs/again/."""
    return [read_results(folder / experiment / 'results.csv')
            for folder in (logs, logs / 'again')]


def again(logs):
    """The replication from scratch (logs/again/), next to the first runs."""
    lines = []
    for name in EXPERIMENTS:
        first, second = with_replication(name, logs)
        points = grouped(second, 'series', 'x')
        for (series, x), cells in common_points(first, second):
            minutes = sum(column(points[series, x], 'train_seconds')) / 60
            lines.append([name, label(series), f'{x:g}', *cells, f'{minutes:.0f}'])
    return ['experiment', 'series', 'x', 'n', 'first, %', 'replication, %', 'difference, pp',
            'minutes'], lines


def hours(logs):
    """The estimated hours of an experiment on a CPU, and the measured hours of training alone.

    Those on a CPU are of the replication, those on a GPU of the first runs; both with their number.
    """
    lines, budget = [], BUDGETS['small']
    for name, define in EXPERIMENTS.items():
        runs = define(budget)
        first, second = with_replication(name, logs)
        on_cpu = [record for record in second if record['device'] == CPU]
        on_gpu = [record for record in first if record['device'] != CPU]
        lines.append([name, f'{len(runs)}', f'{estimated_hours(name, budget, runs):.1f}', *(
            f'{sum(column(results, "train_seconds")) / 3600:.2f} of {len(results)}'
            if results else '' for results in (on_cpu, on_gpu))])
    return ['experiment', 'runs', 'hours, estimated', 'hours, CPU', 'hours, GPU'], lines


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


def recipe_source(recipe):
    """Returns the source that the first line of a recipe names after its subject."""
    first_line, _, _ = (RECIPE_FOLDER / f'{recipe}.txt').read_text().partition('\n')
    return first_line.partition(': ')[2]


def size_cells(name, dataset, options, recipe):
    """Returns the cells of a model: its sizes, training and deployed, and its recipe."""
    with torch.device('meta'):
        model = create_model(name, dataset, **options)
        # the functional form folds into DiracNet, module-based models into themselves
        deployed = DiracNet(dataset=dataset, **options) if name == 'diracnet' else fold(model)
    pixels = Preprocessing.for_dataset(dataset).size
    sizes = []
    for form in (model, deployed):
        sizes += [f'{sum(p.numel() for p in form.parameters()):,}',
                  f'{multiply_adds(lambda form=form: form, pixels=pixels) / 1e6:,.1f}']
    title = ', '.join([name, *(f'{option} {value}' for option, value in options.items())])
    command = ['python train.py', *command_line({'recipe': recipe, 'model': name, **options})]
    return [title, dataset, *sizes, recipe_source(recipe), f'`{" ".join(command)}`']


def sizes(logs):
    """The sizes of the architectures, which need neither training nor data."""
    return ['model', 'images', 'parameters', 'multiply-adds (M)', 'parameters deployed',
            'multiply-adds deployed (M)', 'source of the recipe', 'command'], [
                size_cells(*model) for model in SIZES]


# ---------------------------------------------------------------- speed


def bench(logs):
    """The latest results of experiments.bench against the baselines, without those over depth."""
    lines = []
    for baseline, record in pairs_with_baseline(read_results(logs / 'bench.csv')):
        target, percent = record['target'], record['percent_of_product_peak']
        lines.append([
            f'{record["compared"]}: {label(record["what"])}', label(baseline['what']),
            f'{record["n"]:.0f}', f'{record["images_per_second"]:,.0f}',
            '{ratio:.3g} ({ratio_low:.3g} to {ratio_high:.3g})'.format(**record),
            f'{percent:.1f}' if percent else '',
            f'{record["peak_memory_mb"]:.0f}, {baseline["peak_memory_mb"]:.0f}',
            f'{target:g}: {"met" if record["ratio"] >= target else "not met"}' if target else '',
        ])
    return ['variant', 'baseline', 'n', 'images/s', 'ratio (95 % CI)', '% of matmul peak',
            'peak MB, both', 'target'], lines


def gpu_checks(logs):
    """The last recorded comparison of a GPU with the CPU: difference and tolerance."""
    records = [record for record in read_csv(logs / 'gpu' / 'checks.csv')
               if record['device'] != CPU]
    latest = {check: [*of] for check, of in itertools.groupby(records, lambda r: r['check'])}
    lines = [[record['what'].replace('points between', 'pp between'), record['off'],
              record['at_most'], record['holds']] for of in latest.values() for record in of]
    return ['quantity', 'difference', 'tolerance', 'passed'], lines


def gpu_training(logs):
    """Rates of a training step on a GPU: eager, as train.py runs it, and compiled."""
    lines = []
    comparisons = gpu.training_comparisons(read_experiment('gpu', logs)[1])
    for settings, variants in comparisons.items():
        compiled = variants[gpu.COMPILED]
        shown = [variants[gpu.EAGER], *map(variants.get, gpu.FORMS),
                 gpu.resnet_record(variants, gpu.COMPILED)]
        lines.append([
            settings, f'{compiled["n"]:.0f}',
            *(f'{rate:,.0f}' for rate in column(shown, 'images_per_second')),
            f'{compiled["percent_of_product"]:.0f}', f'{compiled["peak_memory_mb"]:,.0f}',
            *('{:+.0f} ({:+.0f} to {:+.0f})'.format(*gpu.overhead_of_w_hat(variants, form))
              for form in gpu.FORMS),
        ])
    return ['model', 'n', 'float32, NCHW', *gpu.FORMS, 'ResNet, --compile',
            '% of matmul peak', 'peak MB', 'W_hat, %', 'W_hat, --compile, %'], lines


def gpu_inference(logs):
    """Rates of a folded DiracNet on a GPU, and of the ResNet of the same depth."""
    comparisons = gpu.latest_gpu_comparisons(read_experiment('gpu', logs)[1], 'inference')
    lines = [[settings, record['what'], f'{record["n"]:.0f}',
              f'{record["images_per_second"]:,.0f}', RATIO.format(**record),
              f'{record["percent_of_product"]:.0f}']
             for settings, variants in comparisons.items() for record in variants.values()]
    return ['settings', 'variant', 'n', 'images/s', 'ratio (95 % CI)', '% of matmul peak'], lines


# ---------------------------------------------------------------- claims


def claims(logs):
    """The claims, and the answers of the experiments that are finished."""
    lines = []
    for claim in CLAIMS:
        results, measured = read_experiment(claim.experiment, logs)
        missing = missing_results(claim.experiment, results, measured)
        if missing:
            lines.append([claim.text, claim.source, missing, '', claim.experiment])
            continue
        finding, answer = claim.answer(results, measured)
        answer += f' ({seed_counts(results)})' if results else ''
        lines.append([claim.text, claim.source, finding, answer, claim.experiment])
    return ['claim', 'source', 'finding', 'reproduced?', 'experiment'], lines


def missing_results(experiment, results, measured):
    """Returns what an experiment of the small budget still lacks, or '' if it is finished."""
    if experiment == 'gpu':
        return '' if gpu.training_comparisons(measured) else 'not run yet'
    runs = EXPERIMENTS[experiment](BUDGETS['small'])
    done = {(record['series'], record['x'], record['seed']) for record in results}
    count = sum((run.series, run.x, run.seed) in done for run in runs)
    if not results and not measured:
        return 'not run yet'
    if count < len(runs):
        return f'{count} of {len(runs)} runs done'
    if experiment == 'cost' and len(set(column(measured, 'compared'))) < 2:
        return 'one of two comparisons done'
    if experiment in RUN_MEASURES and (
            set(column(completed(results), 'run')) - set(column(measured, 'run'))):
        return 'trained, not measured yet'
    return ''


# ---------------------------------------------------------------- pages


def read_experiment(experiment, logs):
    """Returns the results of an experiment, or of `gpu`, and the records of what it measured."""
    measured = 'rates.csv' if experiment == 'gpu' else 'measured.csv'
    return (read_results(logs / experiment / 'results.csv'),
            read_results(logs / experiment / measured))


LEFT_ALIGNED = (  # columns of text
    'finding', 'experiment', 'model', 'series', 'dtype', 'variant', 'source', 'change', 'passed',
    'baseline', 'images', 'source of the recipe', 'command', 'block')
OTHER_TABLES = {
    'claims': claims, 'tried': tried, 'kept': pretrained, 'by-depth': by_depth, 'blocks': blocks,
    'devices': devices, 'again': again, 'hours': hours, 'bench': bench, 'gpu-checks': gpu_checks,
    'gpu-training': gpu_training, 'gpu-inference': gpu_inference, 'sizes': sizes,
}


def table(name, logs):
    """Returns the Markdown of a table: one of OTHER_TABLES, or of an experiment."""
    if name in OTHER_TABLES:
        header, lines = OTHER_TABLES[name](logs)
    else:
        header, lines = EXPERIMENT_TABLES.get(name, accuracy_table)(*read_experiment(name, logs))
    return '\n'.join(cli.table(header, lines, left=LEFT_ALIGNED))


def fill(page, logs):
    """Fills the tables in the text of a page; raises ValueError for an unknown name."""

    def replacement(match):
        folder, _, name = match[1].rpartition('/')
        names = [*OTHER_TABLES, *EXPERIMENTS]
        if name not in names or not (logs / folder).is_dir():
            raise ValueError(f'table {match[1]}: unknown; use one of {", ".join(names)}, after a '
                             f'folder of {logs} or none')
        return f'<!-- table: {match[1]} -->\n\n{table(name, logs / folder)}\n\n<!-- end -->'

    return MARKED.sub(replacement, page)


def main(argv=None):
    parser = ArgumentParser(prog='experiments.tables', description=__doc__.splitlines()[0])
    parser.add_argument('--logs', default=ROOT / 'logs', type=Path,
                        help='folder of the CSV files (default: logs)')
    opt = parser.parse_args(argv)
    with exit_on_error('experiments.tables'):
        for page in PAGES:
            page.write_text(fill(page.read_text(), opt.logs))
            print(page)


if __name__ == '__main__':
    main()
