"""Draws the figures of the experiments from logs/NAME/*.csv and logs/trainings/.

    python -m experiments.figures             # all that have results
    python -m experiments.figures depth       # logs/depth/depth.png

Points are means over all runs of a configuration, replications included, gray circles single runs,
error bars one std; n is the number of runs. `replication` compares first runs and replications.
Markers and dashes identify the series too, for printing in black and white.
"""

import operator
import re
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from cli import ArgumentParser, exit_on_error
from experiments.axes import (
    ACCURACY,
    LAST_EPOCH,
    LAYER_STATISTICS,
    LOSS,
    STYLES,
    draw_curves,
    draw_lines,
    draw_over_layers,
    draw_points,
    finish,
    log_scale,
    styled,
)
from experiments.definitions import COMPARED_BLOCKS, COMPARED_MODELS, EXPERIMENTS
from experiments.results import (
    ROOT,
    budget_epochs,
    budget_folders,
    column,
    completed,
    configuration,
    dtypes_of,
    grouped,
    grouped_by,
    int8_drop,
    mean_std,
    read_both,
    read_pooled,
    relative_time,
    run_counts,
    span,
    speedrun_runs,
    step_times,
)

LAST_EPOCH_METRICS = (('test_acc_percent', ACCURACY), ('train_loss', LOSS))


def by_model(runs):
    """Returns runs in the order of COMPARED_MODELS, and the styles of these models."""
    def index(record):
        return COMPARED_MODELS.index(record['series'])

    runs = sorted(runs, key=index)
    return runs, [STYLES[i] for i in dict.fromkeys(map(index, runs))]


def depth(figure, results, measured, logs):
    """Draws all budgets over depth, or runs of one or two depths over their epochs."""
    depths = sorted(grouped(results, 'x').items())
    if len(depths) > 2:
        over_depth(figure, logs)
    else:
        over_epochs(figure, depths, logs)


def over_depth(figure, logs):
    """Draws all budgets in the same axes, those longer than that of `logs` with thick lines."""
    panels = figure.subplots(1, 2)
    for folder in budget_folders(logs):
        runs, styles = by_model(completed(read_pooled('depth', folder)))
        epochs = budget_epochs(runs)
        named = [{**record, 'series': f'{record["series"]}, {epochs} epochs'} for record in runs]
        styles = [{**style, 'linewidth': 1.5 if folder == logs else 3} for style in styles]
        for axes, (metric, ylabel) in zip(panels, LAST_EPOCH_METRICS):
            if named:
                draw_lines(axes, named, metric, 'depth (layers)', ylabel, log=True, styles=styles)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc='outside right upper')
    for axes in panels:
        axes.get_legend().remove()


def over_epochs(figure, depths, logs):
    figure.set_size_inches(11, 4.2 * len(depths))
    rows = figure.subplots(len(depths), 2, squeeze=False)
    for (test, train), ((layers,), results) in zip(rows, depths):
        runs, styles = by_model(results)
        draw_curves(test, runs, logs, 'test_acc', f'{ACCURACY}, mean ± std', styles)
        draw_curves(train, runs, logs, 'train_loss', 'training loss, mean ± std', styles)
        test.set_title(f'{layers:.0f} layers (n = {run_counts(runs)})')


def init(figure, results, measured, logs):
    for axes, (metric, ylabel) in zip(figure.subplots(1, 2), LAST_EPOCH_METRICS):
        draw_lines(axes, results, metric, "initial std of the filters / Kaiming's std", ylabel,
                   log=True)


def width(figure, results, measured, logs):
    by_width, by_parameters = figure.subplots(1, 2)
    draw_lines(by_width, results, 'test_acc_percent', 'width (channel factor)', ACCURACY, log=True)
    by_size = [{**record, 'x': record['parameters'] / 1e6} for record in results]
    draw_lines(by_parameters, by_size, 'test_acc_percent', 'parameters (millions)', ACCURACY)
    log_scale(by_parameters)


def epoch_style(epoch, last):
    """Returns the style of an epoch: later is darker; only the last one has error bars."""
    if epoch == last:
        return LAST_EPOCH
    if epoch == 0:
        return {'fmt': ':', 'color': 'black', 'elinewidth': 0}
    return {'fmt': '-', 'color': f'{0.9 * (1 - epoch / last):.2f}', 'elinewidth': 0}


def alpha_beta(figure, results, measured, logs):
    groups = grouped(measured, 'series')
    panels = figure.subplots(len(groups), len(LAYER_STATISTICS), squeeze=False)
    for row, ((series,), group) in zip(panels, groups.items()):
        epochs = grouped(group, 'epoch')
        for axes, (ylabel, value) in zip(row, LAYER_STATISTICS.items()):
            for (epoch,), records in sorted(epochs.items()):
                draw_over_layers(axes, records, value, ylabel, label=f'epoch {epoch:.0f}',
                                 **epoch_style(epoch, max(epochs)[0]))
            axes.set_title(series)
        row[0].legend(fontsize=8)


def one_depth(figure, results, measured, logs):
    test, train = figure.subplots(1, 2)
    draw_points(test, results, 'test_acc_percent', ACCURACY)
    draw_points(train, results, 'train_loss', LOSS)


def versions(figure, results, measured, logs):
    (test, loss, unused), histograms = figure.subplots(2, 3)
    draw_points(test, results, 'test_acc_percent', ACCURACY)
    draw_curves(loss, results, logs, 'train_loss', 'training loss')
    figure.delaxes(unused)
    first_seed = [record for record in measured if record['seed'] == 1]
    for style, (series,), group in styled(grouped(first_seed, 'series')):
        for axes, ((layer,), bins) in zip(histograms, sorted(grouped(group, 'layer').items())):
            edges = [record['from_deviations'] for record in bins]
            axes.stairs([record['share'] for record in bins], [*edges, 2 * edges[-1] - edges[-2]],
                        label=f'{series}, layer {layer:.0f}', color=style['color'],
                        linestyle=style['linestyle'])
            axes.set(xlabel='activation / std', ylabel='fraction', yscale='log')
            axes.legend(fontsize=7)


def cost(figure, results, measured, logs):
    """Draws both measurements of the times: the first one above, the replication below."""
    panels = figure.subplots(1, 2)
    sets = dict(zip(('first', 'replication'), read_both('cost', 'measured.csv', logs)))
    for axes, ((title,), group) in zip(panels, grouped(measured, 'compared').items()):
        names = [*dict.fromkeys(record['what'] for record in group)]
        for i, (style, name, records) in enumerate(styled(sets)):
            records = [record for record in records if record['compared'] == title]
            if not records:
                continue
            times, low, high = zip(*map(relative_time, records))
            below, above = map(operator.sub, times, low), map(operator.sub, high, times)
            axes.errorbar(times, [names.index(record['what']) + 0.2 * i for record in records],
                          xerr=[[*below], [*above]], label=f'{name}, {dtypes_of(records)}',
                          **{**style, 'linestyle': 'none'})
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.axvline(1, color='black', linewidth=0.8)
        axes.grid(alpha=0.25, axis='x')
        axes.legend(fontsize=8)
        axes.set(xlabel=f'time / baseline (median, 95 % CI, n = {group[0]["n"]:.0f})',
                 title=f'{title}, 128 images')


def int8(figure, results, measured, logs):
    accuracies, drops = figure.subplots(1, 2)
    draw_points(accuracies, measured, 'float32_test_acc_percent', f'{ACCURACY}, float32')
    lost = [
        {'series': record['series'] + suffix, 'lost': int8_drop(record, form)}
        for suffix, form in (('', 'int8'), (', equalized', 'equalised_int8'))
        for record in measured]
    draw_points(drops, lost, 'lost', 'accuracy drop of int8 (pp)')
    drops.axvline(0, color='black', linewidth=0.8)


def blocks(figure, results, measured, logs):
    """One panel per depth; the runs of longer budgets are further points."""
    times = step_times(logs)
    if not times:
        raise ValueError(f'{logs / "blocks"}: no steps.csv; run python -m experiments.run blocks')
    *longer, _ = budget_folders(logs)
    results = results + [record for folder in longer
                         for record in completed(read_pooled('blocks', folder))]
    timed = [record for record in results if record['series'] in times]
    depths = sorted(grouped(timed, 'x').items())
    panels = figure.subplots(1, len(depths), sharex=True, sharey=True, squeeze=False)[0]
    for axes, ((layers,), of_depth) in zip(panels, depths):
        groups = grouped(of_depth, 'series')
        for style, block in zip(STYLES, COMPARED_BLOCKS):
            if (block,) in groups:
                draw_over_cost(axes, groups[block,], times[block], label=block, **style)
        ns = run_counts([{**record, 'x': record['epochs']} for record in of_depth])
        axes.set_title(f'{layers:.0f} layers, n = {ns}')
        axes.margins(x=0.2)
        finish(axes, 'training time in epochs of base (95 % CI)', f'{ACCURACY}, mean ± std')
        log_scale(axes)


def draw_over_cost(axes, records, times, **style):
    """Draws accuracies over epochs x relative step time: mean ± std, and 95 % CI of the time."""
    points = sorted(grouped(records, 'epochs').items())
    means, stds = zip(*(mean_std([record['test_acc_percent'] for record in group])
                        for _, group in points))
    median, low, high = ([epochs * time for (epochs,), _ in points] for time in times)
    ends = [[a - b for a, b in zip(*ends)] for ends in ((median, low), (high, median))]
    axes.errorbar(median, means, stds, ends, **style)


def speedrun(figure, results, measured, logs):
    accuracies, over_compute = figure.subplots(1, 2, width_ratios=(3, 2))
    epochs = measured[0]['x']  # those of the recipe
    draw_points(accuracies, [record for record in measured if record['x'] == epochs],
                'test_acc_percent', ACCURACY)
    accuracies.set_title(f'{epochs:.0f} epochs')
    runs = {key: point for key, point in speedrun_runs(logs).items() if point[1]}
    for style, series, keys in styled(grouped_by(lambda key: key[0], runs)):
        tflop, tflop_std = zip(*(mean_std(runs[key][1]) for key in keys))
        accuracy, std = zip(*(mean_std(column(runs[key][0], 'test_acc_percent')) for key in keys))
        listed = ', '.join(f'{epochs:.0f}' for _, epochs in keys)
        over_compute.errorbar(tflop, accuracy, std, tflop_std,
                              label=f'{series}, {listed} epochs', **style)
    over_compute.margins(y=0.3)  # for the legend
    finish(over_compute, 'matmul-equivalent compute (TFLOP)', ACCURACY)


def thousand(figure, results, measured, logs):
    accuracy, *panels = figure.subplots(1, 3)
    draw_curves(accuracy, results, logs, 'test_acc', f'{ACCURACY}, digits')
    for axes, ((series,), of_series) in zip(panels, grouped(measured, 'series').items()):
        depths = dict(sorted(grouped(of_series, 'x').items()))
        for style, (x,), layers in styled(depths):
            axes.plot([record['layer'] / len(layers) for record in layers],
                      [record['relative_gradient'] for record in layers], color=style['color'],
                      linestyle=style['linestyle'], linewidth=1, label=f'{x:.0f} layers')
        axes.set(title=f'{series}, at initialization', yscale='log')
        finish(axes, 'layer / layers', 'gradient norm / norm, of the filters')


def replication_pairs(logs):
    """Returns {configuration: [first runs, replication]} where both have the same seeds.

    There are two seeds or more. Runs are {seed: accuracy}.
    """
    pairs = {}
    for experiment in sorted(path.parent.name for path in logs.glob('again/*/results.csv')):
        first, again = (grouped_by(configuration, completed(
            [record for record in records if record['dataset'] == 'Folder']))
            for records in read_both(experiment, 'results.csv', logs))
        for key in (key for key in again if key in first):
            pair = [{record['seed']: record['test_acc_percent'] for record in of[key]}
                    for of in (first, again)]
            if pair[0].keys() == pair[1].keys() and len(pair[0]) > 1:
                pairs.setdefault(key, pair)  # experiments share runs
    return pairs


def replication(figure, logs):
    """Draws the replication over the first runs: means, and deviations of the runs of one seed."""
    means, deviations = figure.subplots(1, 2)
    by_depth = {}
    for (_, run), pair in replication_pairs(logs).items():
        if layers := re.search(r'-(\d+)-', run):  # diracnet-fast has no depth
            by_depth.setdefault(int(layers[1]), []).append(pair)
    if not by_depth:
        raise ValueError(f'{logs / "again"}: no configuration with the seeds of its first runs')
    shallow_first = grouped_by(lambda depth: depth >= 28, sorted(by_depth))
    for style, depths in zip(STYLES, shallow_first.values()):
        name = f'{" and ".join(map(str, depths))} layers'
        pairs = [pair for depth in depths for pair in by_depth[depth]]
        style = {**style, 'linestyle': 'none', 'markersize': 5}
        (x, xerr), (y, yerr) = (zip(*(mean_std([*pair[i].values()]) for pair in pairs))
                                for i in (0, 1))
        means.errorbar(x, y, yerr, xerr, label=f'{name}, configurations: {len(pairs)}',
                       **{**style, 'capsize': 0})
        first, second = ([pair[i][seed] - mean_std([*pair[i].values()])[0]
                          for pair in pairs for seed in sorted(pair[0])] for i in (0, 1))
        style.pop('capsize')
        deviations.plot(first, second,
                        label=f'{name}: r = {statistics.correlation(first, second):.2f}', **style)
    for axes in (means, deviations):
        low, high = axes.get_xlim()
        axes.plot((low, high), (low, high), color='0.5', linewidth=0.8)
    finish(means, f'{ACCURACY}, first runs', f'{ACCURACY}, replication')
    finish(deviations, 'run of a seed - mean over seeds (pp), first runs',
           'run of a seed - mean over seeds (pp), replication')
    seeds = span([len(first) for pairs in by_depth.values() for first, _ in pairs])
    figure.suptitle(f'Does the replication reproduce the first runs? (n = {seeds} seeds each)')


FIGURES = {
    'depth': depth, 'init': init, 'width': width, 'alpha-beta': alpha_beta, 'delta': one_depth,
    'versions': versions, 'large': one_depth, 'reference': one_depth, 'cost': cost, 'int8': int8,
    'thousand': thousand, 'blocks': blocks, 'speedrun': speedrun,
}
TWO_ROWS = {'versions', 'alpha-beta'}
FROM_MEASURED = {'alpha-beta', 'cost', 'int8', 'speedrun'}  # drawn from measured.csv alone
FROM_FIRST_RUNS = {'versions', 'thousand'}  # histograms, gradients: those of the first runs
REPLICATION = 'replication'  # a figure of two experiments or more, in logs/again/


def draw(experiment, logs):
    """Draws an experiment from its files under `logs`; raises ValueError if there are none."""
    def recorded(name):
        first, again = read_both(experiment, name, logs)
        return first if experiment in FROM_FIRST_RUNS else first + again

    folder, measured = logs / experiment, recorded('measured.csv')
    if experiment in FROM_MEASURED and not measured:
        raise ValueError(f'{folder}: nothing in measured.csv yet; run python -m experiments.run '
                         f'{experiment}')
    if experiment in FROM_MEASURED or experiment == 'thousand':  # n is the number of runs drawn
        results = recorded('results.csv')
    else:
        results = read_pooled(experiment, logs)
    runs = completed(results)
    if not runs and not measured:
        raise ValueError(f'{folder}: no results; run python -m experiments.run {experiment}')
    figure = Figure((11, 7.4 if experiment in TWO_ROWS else 4.2), dpi=110, layout='constrained')
    FIGURES[experiment](figure, runs, measured, logs)
    diverged = len(results) - len(runs)
    figure.suptitle(
        EXPERIMENTS[experiment].__doc__ + (f' (n = {run_counts(runs)})' if runs else '')
        + (f' ({diverged} diverged, left out)' if diverged else ''))
    return figure


def save(experiment, logs):
    """Draws an experiment into its folder; returns the path of the PNG."""
    if experiment == REPLICATION:
        path = logs / 'again' / 'replication.png'
        figure = Figure((11, 4.6), dpi=110, layout='constrained')
        replication(figure, logs)
    else:
        path = logs / experiment / f'{experiment}.png'
        figure = draw(experiment, logs)
    figure.savefig(path)
    return path


def main(argv=None):
    parser = ArgumentParser(prog='experiments.figures', description=__doc__.splitlines()[0])
    parser.add_argument('experiments', nargs='*', help='experiments (default: all with results)')
    parser.add_argument('--logs', default=ROOT / 'logs', type=Path,
                        help='folder of the results (default: logs)')
    opt = parser.parse_args(argv)
    for name in {*opt.experiments} - {*FIGURES, REPLICATION}:
        parser.error(f'{name}: no figure; use one of {", ".join((*FIGURES, REPLICATION))}')
    with exit_on_error('experiments.figures'):
        with_results = [name for name in EXPERIMENTS if list((opt.logs / name).glob('*.csv'))]
        with_results += [REPLICATION] * bool(replication_pairs(opt.logs))
        for name in opt.experiments or with_results:
            print(save(name, opt.logs))


if __name__ == '__main__':
    main()
