"""Writes the tables of the README and of docs/ from CSV files in logs/.

    python -m experiments.tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the rest of a page is left. NAME
may have a folder of logs/ before it: `again/int8` is int8's table of what was trained again.
"""

import functools
import itertools
import re
from pathlib import Path

import cli
from cli import ArgumentParser, exit_on_error
from diracnets.checkpoint import MODEL_FILE
from experiments import gpu_results
from experiments.claims import CLAIMS
from experiments.cost_estimate import hours_of
from experiments.definitions import BUDGETS, EXPERIMENTS
from experiments.figures import counts, grouped, mean_and_deviation, read, whole
from experiments.interleaved import ROOT, against_the_first, read_rows, shown_ratio
from experiments.measures import OF_PARAMETERS
from hubconf import TRAINED
from training.log import LOG_FILE, read_log

PAGES = [ROOT / name for name in (
    'README.md', 'docs/results.md', 'docs/speed.md', 'docs/speedrun.md')]
MARKED = re.compile(r'<!-- table: ([\w/-]+) -->\n.*?<!-- end -->', re.DOTALL)


def shown(values, digits=2):
    mean, deviation = mean_and_deviation(values)
    mean = round(mean, digits) + 0.0  # never -0.00
    return f'{mean:.{digits}f}' + (f' ± {deviation:.{digits}f}' if len(values) > 1 else '')


def results(rows, measured, x=''):
    """One line a point: its accuracy and loss, mean ± deviation over seeds that did not diverge.

    x: what the points of a series differ by; without it a series is one point, and x their order.
    """
    lines = []
    points = sorted(grouped(rows, 'series', 'x').items(), key=lambda at: at[0] if x else at[0][1])
    for (series, value), seeds in points:
        group, point = whole(seeds), [series, f'{value:g}'] if x else [series]
        diverged = f', {len(seeds) - len(group)} diverged' * (len(seeds) > len(group))
        lines.append([*point, f'{len(group)}{diverged}', *([
            shown([row['test_acc_percent'] for row in group]),
            shown([row['train_loss'] for row in group], 3), f'{group[0]["parameters"]:,.0f}',
        ] if group else [''] * 3)])
    return ['network', *([x] if x else []), 'n', 'test accuracy, %', 'training loss',
            'parameters'], lines


def int8(rows, measured):
    lines = []
    for (series,), group in grouped(measured, 'series').items():
        whole, int8, equalised = (
            [row[f'{name}_test_acc_percent'] for row in group]
            for name in ('float32', 'int8', 'equalised_int8'))
        lines.append([series, str(len(group)), *map(shown, (whole, int8)), *(
            shown([a - b for a, b in zip(whole, of)]) for of in (int8, equalised))])
    return ['network', 'n', 'float32, %', 'int8, %', 'lost, points', 'lost, equalised'], lines


def speedrun(rows, measured):
    columns = ('test_acc_percent', 2), ('six_views_test_acc_percent', 2), ('train_seconds', 0), (
        'product_gflop_per_second', 0), ('machine_tflop', 0)
    lines = [
        [series, f'{epochs:.0f}', str(len(group)),
         *(shown([row[name] for row in group], digits) for name, digits in columns)]
        for (series, epochs), group in grouped(measured, 'series', 'x').items()]
    return ['what', 'epochs', 'n', 'test accuracy, %', 'with six views, %', 'seconds of training',
            'product, GFLOP/s', "machine's TFLOP"], lines


def tried(logs):
    """What was tried for the speed-run, one seed each: logs/speedrun/tried.csv, by hand."""
    columns = 'epochs', 'train_seconds', 'train_acc_percent', 'test_acc_percent'
    digits = 0, 0, 2, 2
    lines = [[row['what'], row['change'], *(
        '' if row[name] == '' else f'{row[name]:.{d}f}' for name, d in zip(columns, digits))]
        for row in read(logs / 'speedrun' / 'tried.csv')]
    return ['what', 'change', 'epochs', 'seconds of training', 'training accuracy, %',
            'test accuracy, %'], lines


def kept(logs):
    """The trained networks that git keeps: from their logs, and what they label in float32.

    Beside log.txt may be the logs of other seeds: the last column, as they were tested in training.
    """
    lines = []
    for name in TRAINED:
        epochs = read_log(logs / name / LOG_FILE)
        last, size = epochs[-1], (logs / name / MODEL_FILE).stat().st_size
        seeds = [read_log(log)[-1]['test_acc'] for log in sorted((logs / name).glob('*log.txt'))]
        images = read_rows(logs / name / 'seen' / 'predictions.csv')
        right = sum(image['class'] == image['labelled'] for image in images)
        lines.append([
            f'[{name}](../logs/{name}/README.md)', f'{last["n_parameters"]:,}',
            f'{size / 1e6:.1f}', f'{last["epoch"]}',
            f'{sum(stats["train_time"] for stats in epochs) / 3600:.1f}',
            f'{100 * right / len(images):.2f}', f'{len(seeds)}', shown(seeds),
        ])
    return ['network', 'parameters', 'file, MB', 'epochs', 'hours', 'test accuracy, %', 'seeds',
            'of all seeds, bfloat16'], lines


def cost(rows, measured):
    lines = [[
        row['compared'], row['what'], row['dtype'], f'{row["n"]:.0f}',
        f'{128_000 / row["images_per_second"]:.1f}',
        f'{1 / row["ratio"]:.3f} ({1 / row["ratio_high"]:.3f} to {1 / row["ratio_low"]:.3f})',
    ] for row in measured]
    return ['of 128 images', 'network', 'dtype', 'n', 'ms', 'time over the first (95 %)'], lines


def by_depth(logs):
    """The accuracies of `depth`, a line a network and a column a depth."""
    rows, _ = rows_of('depth', logs)
    groups = grouped(whole(rows), 'series', 'x')
    names, depths = ([*dict.fromkeys(key[i] for key in groups)] for i in (0, 1))
    lines = [[name, *(
        shown([row['test_acc_percent'] for row in groups[name, layers]])
        if (name, layers) in groups else '' for layers in sorted(depths))] for name in names]
    return ['network', *(f'{layers:.0f} layers' for layers in sorted(depths))], lines


def compared(first, second):
    """The points that both of two tables have: yields (series, x) and what both came to."""
    columns = [grouped(whole(rows), 'series', 'x') for rows in (first, second)]
    for key in [key for key in columns[0] if key in columns[1]]:
        cells = [[row['test_acc_percent'] for row in groups[key]] for groups in columns]
        means = [mean_and_deviation(values)[0] for values in cells]
        yield key, [' and '.join(str(len(values)) for values in cells), *map(shown, cells),
                    f'{round(means[1] - means[0], 2) + 0:+.2f}']


def devices(logs):
    """What the same trainings of `depth` came to on a GPU, and before on a CPU (cpu.csv)."""
    cpu, gpu = ([row for row in read(logs / 'depth' / name) if (row['device'] == 'CPU') == on_cpu]
                for name, on_cpu in (('cpu.csv', True), ('results.csv', False)))
    lines = [[f'{series}-{depth:.0f}-1', *cells] for (series, depth), cells in compared(cpu, gpu)]
    return ['network', 'n', 'CPU, %', 'GPU, %', 'GPU - CPU'], lines


def both_times(experiment, logs):
    """The rows of an experiment's trainings: the first ones, and those done again (logs/again/)."""
    return (read(folder / experiment / 'results.csv') for folder in (logs, logs / 'again'))


def again(logs):
    """What was trained a second time, from nothing (logs/again/), and what it had come to."""
    lines = []
    for name in EXPERIMENTS:
        first, second = both_times(name, logs)
        points = grouped(second, 'series', 'x')
        for (series, x), cells in compared(first, second):
            minutes = sum(row['train_seconds'] for row in points[series, x]) / 60
            lines.append([name, series, f'{x:g}', *cells, f'{minutes:.0f}'])
    return ['experiment', 'network', 'at', 'n', 'first, %', 'again, %', 'again - first',
            'minutes'], lines


def hours(logs):
    """The hours that are counted for an experiment on a CPU, and those that its trainings took.

    On a CPU those of logs/again/, on a GPU the first ones: of training alone, and of how many.
    """
    lines, budget = [], BUDGETS['small']
    for name, define in EXPERIMENTS.items():
        trainings = define(budget)
        first, second = both_times(name, logs)
        on_cpu = [row for row in second if row['device'] == 'CPU']
        on_gpu = [row for row in first if row['device'] != 'CPU']
        lines.append([name, f'{len(trainings)}', f'{hours_of(name, budget, trainings):.1f}', *(
            f'{sum(row["train_seconds"] for row in rows) / 3600:.2f} of {len(rows)}' if rows else ''
            for rows in (on_cpu, on_gpu))])
    return ['experiment', 'trainings', 'hours, counted', 'hours, CPU', 'hours, GPU'], lines


def bench(logs):
    """What experiments.bench measured the last time, against the first side of each comparison.

    Time and memory over depth are told beside it, as a line through them.
    """
    lines = []
    for first, row in against_the_first(read(logs / 'bench.csv')):
        target, share = row['target'], row['percent_of_product_peak']
        lines.append([
            f'{row["compared"]}: {row["what"]}', first['what'], f'{row["n"]:.0f}',
            f'{row["images_per_second"]:,.0f}',
            '{ratio:.3g} ({ratio_low:.3g} to {ratio_high:.3g})'.format(**row),
            f'{share:.1f} %' if share else '',
            f'{row["peak_memory_mb"]:.0f}, {first["peak_memory_mb"]:.0f}',
            f'{target:g}: {"met" if row["ratio"] >= target else "not met"}' if target else '',
        ])
    return ['what', 'compared with', 'turns', 'images/s', 'ratio (95 %)', 'of the product peak',
            'peak MB, both', 'target'], lines


def gpu_checks(logs):
    """What was compared on a GPU, the last time: how far off it was, and what was allowed."""
    rows = [row for row in read_rows(logs / 'gpu' / 'checks.csv') if row['device'] != 'CPU']
    last = {check: [*of] for check, of in itertools.groupby(rows, lambda row: row['check'])}
    columns = 'what', 'off', 'at_most', 'holds'
    lines = [[row[name] for name in columns] for of in last.values() for row in of]
    return ['what', 'off by', 'at most', 'holds'], lines


def gpu_training(logs):
    """Rates of a training step on a GPU: as train.py runs it, and compiled."""
    lines = []
    for of, sides in gpu_results.trainings(rows_of('gpu', logs)[1]).items():
        compiled = sides[gpu_results.COMPILED]
        shown_rates = [sides[gpu_results.EAGER], *map(sides.get, gpu_results.FORMS),
                       gpu_results.resnet(sides, gpu_results.COMPILED)]
        lines.append([
            of, f'{compiled["n"]:.0f}',
            *(f'{row["images_per_second"]:,.0f}' for row in shown_rates),
            f'{compiled["percent_of_product"]:.0f} %', f'{compiled["peak_memory_mb"]:,.0f}',
            *('{:+.0f} ({:+.0f} to {:+.0f})'.format(*gpu_results.more_for_w_hat(sides, form))
              for form in gpu_results.FORMS),
        ])
    return ['network', 'n', 'float32, NCHW', *gpu_results.FORMS, 'ResNet, --compile', 'of a product',
            'peak MB', 'W_hat, %', 'W_hat, --compile, %'], lines


def gpu_inference(logs):
    """Rates of a folded DiracNet on a GPU, and of the ResNet of its depth treated alike."""
    lines = [[of, row['what'], f'{row["n"]:.0f}', f'{row["images_per_second"]:,.0f}',
              shown_ratio(row), f'{row["percent_of_product"]:.0f} %']
             for of, sides in gpu_results.of_last_gpu(rows_of('gpu', logs)[1], 'inference').items()
             for row in sides.values()]
    return ['network', 'what', 'n', 'images/s', 'ratio (95 %)', 'of a product'], lines


def claims(logs):
    """What was claimed and what was found, of the experiments that are finished."""
    lines = []
    for claim in CLAIMS:
        rows, measured = rows_of(claim.experiment, logs)
        left = unfinished(claim.experiment, rows, measured)
        if left:
            lines.append([claim.text, claim.source, left, '', claim.experiment])
            continue
        found, answer = claim.answer(rows, measured)
        said = f'{answer} ({counts(rows)})' if rows else answer
        lines.append([claim.text, claim.source, found, said, claim.experiment])
    return ['claim', 'whose', 'here', 'reproduced?', 'experiment'], lines


def unfinished(experiment, rows, measured):
    """Says what is missing of an experiment of the small budget: nothing where it is finished."""
    if experiment == 'gpu':
        return '' if gpu_results.trainings(measured) else 'not run yet'
    trainings = EXPERIMENTS[experiment](BUDGETS['small'])
    done = {(row['series'], row['x'], row['seed']) for row in rows}
    there = sum((t.series, t.x, t.seed) in done for t in trainings)
    if not rows and not measured:
        return 'not run yet'
    if there < len(trainings):
        return f'{there} of {len(trainings)} trainings done'
    if experiment == 'cost' and len({row['compared'] for row in measured}) < 2:
        return 'one of two comparisons done'
    runs = {row['run'] for row in rows if row['ended'] == 'whole'}
    if experiment in OF_PARAMETERS and runs - {row['run'] for row in measured}:
        return 'trained, not measured yet'
    return ''


def rows_of(experiment, logs):
    """The rows of an experiment, or of `gpu`, and what was measured beside them."""
    measured = 'gpu_results.csv' if experiment == 'gpu' else 'measured.csv'
    return read(logs / experiment / 'results.csv'), read(logs / experiment / measured)


TABLES = {  # of the others: results
    'depth': functools.partial(results, x='depth'), 'width': functools.partial(results, x='width'),
    'init': functools.partial(results, x="times Kaiming's deviation"),
    'int8': int8, 'cost': cost, 'speedrun': speedrun,
}
WORDS = (  # titles of columns of text
    'here', 'experiment', 'network', 'dtype', 'what', 'whose', 'change', 'holds', 'compared with')
OTHERS = {  # not one line a point of an experiment
    'claims': claims, 'tried': tried, 'kept': kept, 'by-depth': by_depth, 'devices': devices,
    'again': again, 'hours': hours, 'bench': bench, 'gpu-checks': gpu_checks,
    'gpu-training': gpu_training, 'gpu-inference': gpu_inference,
}


def table(name, logs):
    """The Markdown of a table: one of OTHERS, or an experiment's."""
    if name in OTHERS:
        head, lines = OTHERS[name](logs)
    else:
        head, lines = TABLES.get(name, results)(*rows_of(name, logs))
    return '\n'.join(cli.table(head, lines, left=WORDS))


def filled(page, logs):
    """Fills the tables between their marks in a text; raises ValueError for an unknown name."""

    def fill(match):
        folder, _, name = match[1].rpartition('/')
        known = [*OTHERS, *EXPERIMENTS]
        if name not in known or not (logs / folder).is_dir():
            raise ValueError(f'table: {match[1]}: expected one of {", ".join(known)}, behind a '
                             f'folder of {logs} or none')
        return f'<!-- table: {match[1]} -->\n\n{table(name, logs / folder)}\n\n<!-- end -->'

    return MARKED.sub(fill, page)


def main(argv=None):
    parser = ArgumentParser(prog='experiments.tables', description=__doc__.splitlines()[0])
    parser.add_argument('--logs', default=ROOT / 'logs', type=Path,
                        help='folder of the CSV files (default: logs)')
    opt = parser.parse_args(argv)
    with exit_on_error('experiments.tables'):
        for page in PAGES:
            page.write_text(filled(page.read_text(), opt.logs))
            print(page)


if __name__ == '__main__':
    main()
