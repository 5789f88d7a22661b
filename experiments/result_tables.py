"""The tables of docs/results.md: accuracies of all runs of a configuration, and differences.

The cells of an accuracy are the mean and std over runs, with the number of runs in parentheses.
Intervals of differences are 95 % Welch intervals over seeds, as in experiments/claims.py.
"""

import statistics

from experiments.claims import (
    accuracies,
    difference,
    estimated,
    layers_of_runs,
    lost_with_depth,
    norm_ratio,
    pretrained_layers,
    show,
    third_of,
)
from experiments.definitions import (
    BUDGETS,
    COMPARED_BLOCKS,
    COMPARED_MODELS,
    EXPERIMENTS,
    INIT_SCALES,
    estimated_hours,
)
from experiments.intervals import welch
from experiments.measures import DEPTH
from experiments.results import (
    CPU,
    LONGER_BUDGETS,
    all_runs,
    budget_epochs,
    budget_folders,
    column,
    completed,
    dtypes_of,
    format_mean,
    grouped,
    grouped_by,
    int8_drop,
    read_both,
    read_pooled,
    read_results,
    relative_time,
    run_key,
    seed_means,
    step_times,
)

CI = '(95 % CI)'


def cell(runs):
    """Returns the accuracy of the runs that did not diverge, mean ± std, and their number."""
    done = completed(runs)
    if not done:
        return f'{len(runs)} diverged' if runs else ''
    diverged = f', {len(runs) - len(done)} diverged' if len(done) < len(runs) else ''
    return f'{format_mean(column(done, "test_acc_percent"))} ({len(done)}{diverged})'


def parameter_count(runs, form, unit=1):
    """Returns the number of parameters as text, '' if all runs diverged in their first epoch."""
    return next((f'{run["parameters"] / unit:{form}}' for run in runs if run['parameters']), '')


def compared(points, first, second):
    """Returns the difference of two points with its interval as text, '' if one is missing."""
    return show(estimated(points, [difference(first, second)]))


# ---------------------------------------------------------------- depth and width


DEPTH_DIFFERENCES = [('diracnet', 'plain'), ('diracnet', 'dirac-init'), ('diracnet', 'resnet'),
                     ('dirac-init', 'plain')]


def models_of(groups):
    """Returns the models of groups {(model, depth): runs}, in the order of COMPARED_MODELS."""
    return sorted({name for name, _ in groups}, key=COMPARED_MODELS.index)


def depth(logs):
    """Accuracies over depth, the loss from the best depth to 100 layers, and differences."""
    results = read_pooled('depth', logs)
    groups, points = grouped(results, 'series', 'x'), accuracies(results)
    depths = sorted({x for _, x in groups})
    lines = [[name, *(cell(groups.get((name, x), [])) for x in depths),
              show(estimated(points, lost_with_depth(points, name)[1]))]
             for name in models_of(groups)]
    sizes = [parameter_count([run for run in results if run['x'] == x], '.2g', 1e6)
             for x in depths]
    lines.append(['parameters, millions', *sizes, ''])
    for a, b in DEPTH_DIFFERENCES:
        cells = [compared(points, (a, x), (b, x)) for x in depths]
        if any(cells):
            lines.append([f'{a} - {b}, pp {CI}', *cells, ''])
    header = ['model', *(f'{x:.0f} layers' for x in depths), f'accuracy loss, pp {CI}']
    if not any(line[-1] for line in lines):  # one depth so far
        header, lines = header[:-1], [line[:-1] for line in lines]
    return header, lines


def by_depth(logs):
    """Accuracies over depth after all budgets, the longest first."""
    budgets = [(budget_epochs(results), grouped(results, 'series', 'x'))
               for folder in budget_folders(logs) if (results := read_pooled('depth', folder))]
    depths = sorted({x for _, groups in budgets for _, x in groups})
    return ['model', 'epochs', *(f'{x:.0f} layers' for x in depths)], [
        [name, epochs, *(cell(groups.get((name, x), [])) for x in depths)]
        for epochs, groups in budgets for name in models_of(groups)]


def width(logs):
    """Accuracies over width: DiracNets of three depths, and all models that have several widths."""
    results = [{**record, 'series': f'diracnet-{record["series"].split()[1]}'}
               for record in read_pooled('width', logs)]
    budget = BUDGETS.get(logs.name, BUDGETS['small'])
    results += [{**record, 'series': f'{record["series"]}-{budget.layers}', 'x': budget.large}
                for record in read_pooled('large', logs)]
    several = {record['series'] for record in results}
    results += [{**record, 'series': name, 'x': 1} for record in read_pooled('depth', logs)
                if (name := f'{record["series"]}-{record["x"]:.0f}') in several
                and not name.startswith('diracnet')]
    groups = grouped(results, 'series', 'x')
    widths = sorted({x for _, x in groups})
    return ['model', *(f'width {x:g}' for x in widths), 'parameters, millions'], [
        [name, *(cell(groups.get((name, x), [])) for x in widths),
         ', '.join(parameter_count(groups[name, x], '.2f', 1e6) for x in widths
                   if (name, x) in groups)]
        for name in dict.fromkeys(name for name, _ in groups)]


def ablations(logs):
    """Variants of the DiracNet of one size, and their differences from it."""
    results = {run_key(record): {**record, 'x': 0}
               for name in ('versions', 'delta') for record in read_pooled(name, logs)}.values()
    points = accuracies(results)
    return ['model', 'test accuracy, %', 'training loss', f'difference, pp {CI}', 'parameters'], [
        [name, cell(runs), format_mean(column(completed(runs), 'train_loss'), 3),
         '' if name == 'diracnet' else compared(
             points, (name, 0), ('diracnet', 0)), parameter_count(runs, ',.0f')]
        for (name,), runs in grouped(results, 'series').items()]


def blocks(logs):
    """The blocks of plain networks: accuracy and loss over depth, and the costs at one depth."""
    results, times = read_pooled('blocks', logs), step_times(logs)
    groups, points = grouped(results, 'series', 'x'), accuracies(results)
    depths = sorted({x for _, x in groups})
    drops = grouped([record for name in ('int8', 'blocks')
                     for records in read_both(name, 'measured.csv', logs) for record in records],
                    'run')
    lines = []
    for block in [name for name in COMPARED_BLOCKS if any(name == key[0] for key in groups)]:
        runs = {x: completed(groups.get((block, x), [])) for x in [*depths, DEPTH]}
        lost = [int8_drop(record) for name in dict.fromkeys(column(runs[DEPTH], 'run'))
                for record in drops[name,]]
        lines.append([
            block, parameter_count(runs[DEPTH], ',.0f'),
            '{:.2f} ({:.2f} to {:.2f})'.format(*times[block]) if block in times else '',
            *(cell(groups.get((block, x), [])) for x in depths),
            compared(points, (block, DEPTH), ('base', DEPTH)) if block != 'base' else '',
            *(format_mean(column(runs[x], 'train_loss'), 3) for x in depths),
            f'{format_mean(lost)} ({len(lost)})' if lost else ''])
    return ['block', f'parameters, {DEPTH} layers', f'step time / base {CI}',
            *(f'{x:.0f} layers, % (n)' for x in depths), f'{DEPTH} layers: - base, pp {CI}',
            *(f'loss, {x:.0f} layers' for x in depths), 'int8 drop, pp (n)'], lines


PUBLISHED = {  # accuracy on the original files after 300 epochs: arXiv 1608.06993, table 2
    'DenseNet-40-12': 94.76, 'DenseNet-BC-100-12': 95.49,
}


def reference(logs):
    """Networks of other papers with the budget of the experiments, and their published results."""
    peaks = {record['run']: f'{record["peak_memory_mb"]:,.0f}'
             for record in read_results(logs / 'reference' / 'measured.csv')}
    lines = [[
        record['series'], f'{record["parameters"]:,.0f}', f'{record["epochs"]:.0f}',
        f'{record["test_acc_percent"]:.2f}', f'{record["train_seconds"] / 3600:.2f}',
        f'{record["threads"]:.0f} x {record["device"]}', peaks.get(record['run'], ''),
        f'{PUBLISHED[record["series"]]:.2f}' if record['series'] in PUBLISHED else '',
    ] for record in completed(read_results(logs / 'reference' / 'results.csv'))]
    return ['model', 'parameters', 'epochs', 'test accuracy, %', 'hours', 'threads', 'peak MB',
            'paper, 300 epochs, originals, %'], lines


# ---------------------------------------------------------------- initialization


def init(logs):
    """Accuracies over the std of the initial filters, relative to Kaiming's."""
    results = read_pooled('init', logs)
    groups, points = grouped(results, 'series', 'x'), accuracies(results)
    lines = []
    for name in dict.fromkeys(series for series, _ in groups):
        kaiming = name.partition(',')[0], INIT_SCALES[0]  # 'plain, delta-orthogonal' is plain
        lines.append([name, *(
            text for x in INIT_SCALES for text in (
                cell(groups.get((name, x), [])),
                '' if (name, x) == kaiming else compared(points, (name, x), kaiming)))])
    return ['model', *(text for scale in INIT_SCALES for text in (
        f'std × {scale:g}', f'difference, pp {CI}'))], lines


# ---------------------------------------------------------------- alpha and beta


def layers_line(name, epochs, runs):
    """Returns a line on the layers of runs: means over the runs, in each third of the layers."""
    def thirds(value):
        return ', '.join(f'{statistics.mean(value(third_of(run, i)) for run in runs):.2f}'
                         for i in range(3))

    def mean(name):
        return lambda layers: statistics.mean(column(layers, name))

    return [name, f'{epochs:.0f}', f'{len(runs)}', thirds(mean('alpha_mean')),
            thirds(mean('beta_mean')), thirds(norm_ratio)]


def alpha_beta(logs):
    """alpha, beta and the ratio of the terms: released checkpoints first, then the short runs."""
    lines = [layers_line(name, epochs, [layers])
             for name, (epochs, layers) in pretrained_layers(logs).items()]
    for folder in budget_folders(logs):
        runs = layers_of_runs(folder, folder / 'again')
        lines += [layers_line(f'diracnet-28, {series}', group[0]['epochs'],
                              column(group, 'layers'))
                  for (series,), group in grouped(runs, 'series').items()]
    return ['network', 'epochs', 'n', 'mean alpha', 'mean beta', 'Dirac / learned term'], lines


# ---------------------------------------------------------------- first runs and replication


def int8(logs):
    """Accuracies in float32 and losses in int8: first runs, replication, interval of both."""
    forms = ('int8', 'equalised_int8')
    sets = read_both('int8', 'measured.csv', logs)
    lines = []
    for name in dict.fromkeys(column(sets[0], 'series')):
        parts = [[r for r in records if r['series'] == name] for records in sets]
        line = [name, *(format_mean(column(part, 'float32_test_acc_percent')) for part in parts)]
        for form in forms:
            line += [format_mean([int8_drop(r, form) for r in part]) for part in parts]
            line.append(show([welch((1, seed_means(
                [*parts[0], *parts[1]], lambda r, form=form: int8_drop(r, form))))], '+.2f'))
        lines.append(line)
    return ['model', 'float32, %', 'replication', 'drop, pp', 'replication', f'both {CI}',
            'drop if equalized, pp', 'replication', f'both {CI}'], lines


def cost(logs):
    """Times relative to the baseline, the first variant: first measurement and replication."""
    sets = read_both('cost', 'measured.csv', logs)
    lines = []
    for record in sets[0]:
        line = [f'{record["compared"]}: {record["what"]}']
        for records in sets:
            same = [r for r in records if (r['compared'], r['what']) == (
                record['compared'], record['what'])]
            line += [text for r in same[-1:] for text in (
                f'{128_000 / r["images_per_second"]:.1f}', '' if r['ratio'] == 1 else
                '{:.3f} ({:.3f} to {:.3f})'.format(*relative_time(r)))] or [''] * 2
        lines.append(line)
    return ['128 images', *(text for records in sets for text in (
        f'{dtypes_of(records)}, ms', f'time / baseline {CI}'))], lines


def thousand(logs):
    sets = read_both('thousand', 'results.csv', logs)
    depths = sorted({record['x'] for record in sets[0]})
    lines = []
    for name, records in zip(('first', 'replication'), sets):
        of = grouped(records, 'x')
        lines.append([f'{name}, {dtypes_of(records)}', *(
            cell(of.get((x,), [])).removesuffix(' (1)') for x in depths)])
    return ['runs', *(f'{x:.0f} layers, %' for x in depths)], lines


def devices(logs):
    """The configurations of `depth` that were trained on a CPU and on a GPU, one per column."""
    columns = []
    for (series, x), runs in grouped(read_pooled('depth', logs), 'series', 'x').items():
        kinds = grouped_by(lambda r: 'CPU' if r['device'] == CPU else 'GPU', runs)
        points = {kind: accuracies(of)[series, x] for kind, of in kinds.items()}
        if len(points) == 2 and min(map(len, points.values())) > 1:
            columns.append([f'{series}-{x:.0f}-1', cell(kinds['CPU']), cell(kinds['GPU']),
                            compared(points, 'GPU', 'CPU')])
    header, *lines = zip(('%', 'CPU', 'GPU', f'GPU - CPU, pp {CI}'), *columns)
    return [*header], [[*line] for line in lines]


# ---------------------------------------------------------------- compute


def hours(logs):
    """Estimated hours and hours of training, one experiment per column: CPU cores and GPUs apart.

    A core hour is an hour of one thread. Runs that experiments share count in each of them, but
    only once in the total.
    """
    def measured(runs, on_cpu):
        on_device = [run for run in runs if (run['device'] == CPU) == on_cpu]
        used = sum(run['train_seconds'] * (run['threads'] if on_cpu else 1) for run in on_device)
        return f'{used / 3600:.2f} ({len(on_device)})' if on_device else ''

    folders = {'small': logs, **{name: logs / name for name in LONGER_BUDGETS}}
    columns = []
    for budget, folder in folders.items():
        for name, define in EXPERIMENTS.items():
            first, again = read_both(name, 'results.csv', folder)
            if first:
                first += read_results(folder / name / 'cpu.csv')  # repeated on a CPU
                runs = define(BUDGETS[budget])
                columns.append([
                    name + f', {budget}' * (folder != logs),
                    f'{estimated_hours(name, BUDGETS[budget], runs):.1f} ({len(runs)})',
                    measured(first, True), measured(again, True), measured(first, False)])
    runs = [run for folder in folders.values() for run in all_runs(folder)]
    parts = grouped_by(lambda run: run['log'].startswith('again/'), runs)
    first, again = parts[False], parts[True]
    columns.append(['all, once', '', measured(first, True), measured(again, True),
                    measured(first, False)])
    header, *lines = zip(('hours (runs)', 'estimate, 2 CPU cores', 'CPU core hours, first runs',
                          'CPU core hours, replication', 'GPU, first runs'), *columns)
    return [*header], [[*line] for line in lines]


RESULT_TABLES = {
    'depth': depth, 'by-depth': by_depth, 'width': width, 'ablations': ablations,
    'blocks': blocks, 'reference': reference, 'init': init, 'alpha-beta': alpha_beta,
    'int8': int8, 'cost': cost, 'thousand': thousand, 'devices': devices, 'hours': hours,
}
