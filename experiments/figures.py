"""Draws what the experiments left, from logs/NAME/*.csv and logs/trainings/ alone.

    python -m experiments.figures             # all that have rows
    python -m experiments.figures depth       # logs/depth/depth.png

Points are means over seeds, grey circles single trainings, bars one standard deviation; n is the
number of seeds. All is told by markers and dashes too, as colours do not print.
"""

import itertools
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from cli import ArgumentParser, exit_on_error
from experiments.definitions import EXPERIMENTS
from experiments.interleaved import ROOT, read_rows
from experiments.layers import SHOWN
from training.log import read_log

STYLES = [  # of the series of a figure, in order; hollow markers show what is under them
    {'color': color, 'marker': marker, 'linestyle': line, 'capsize': 3,
     'fillstyle': fill, 'markersize': size}
    for color, marker, line, fill, size in (
        ('C0', 'o', '-', 'full', 6), ('C3', 's', '--', 'full', 6), ('C2', '^', '-.', 'none', 9),
        ('C1', 'D', ':', 'none', 9), ('C4', 'v', '-', 'full', 6), ('C5', 'x', '--', 'full', 6),
        ('C7', 'P', '-.', 'none', 9), ('C8', '*', ':', 'none', 9), ('C9', '<', '-', 'full', 6),
    )
]
AT_THE_END = {'fmt': 'o-', 'color': 'black', 'markersize': 3, 'capsize': 2}
ACCURACY = 'test accuracy (%)'


def styles():
    """The styles of series in order, over and over where there are many."""
    return itertools.cycle(STYLES)


# ---------------------------------------------------------------- rows


def read(table):
    """The rows of a CSV file, numbers as such: none where there is no file."""
    return [{name: _number(value) for name, value in row.items()} for row in read_rows(table)]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text


def whole(rows):
    """The rows of trainings that came to their end."""
    return [row for row in rows if row['ended'] == 'whole']


def grouped(rows, *names):
    """Returns {values of the columns `names`: rows}, in the order of the rows."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def mean_and_deviation(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def counts(rows):
    """Says how many seeds the points of a figure have, such as 'n = 3' or 'n = 1 to 3'."""
    sizes = sorted({len(group) for group in grouped(rows, 'series', 'x').values()})
    return f'n = {sizes[0]}' + (f' to {sizes[-1]}' if len(sizes) > 1 else '')


# ---------------------------------------------------------------- axes


def log_scale(axes):
    """Makes the x axis logarithmic, with numbers at its ticks in place of powers of ten."""
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def lines(axes, rows, value, xlabel, ylabel, log=False):
    """Draws the mean of a column over x, a line a series, with bars of one deviation."""
    for style, ((series,), of_series) in zip(styles(), grouped(rows, 'series').items()):
        over_x = sorted(grouped(of_series, 'x').items())
        means = [mean_and_deviation([row[value] for row in group]) for _, group in over_x]
        axes.errorbar([x for (x,), _ in over_x], [m for m, _ in means], [d for _, d in means],
                      label=series, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        log_scale(axes)
        axes.set_xticks(sorted({row['x'] for row in rows}))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def points(axes, rows, value, xlabel):
    """Draws each training of a column as a circle, above mean and deviation of its series."""
    groups = grouped(rows, 'series')
    for y, group in enumerate(groups.values()):
        values = [row[value] for row in group]
        mean, deviation = mean_and_deviation(values)
        axes.plot(values, [y - 0.15] * len(values), 'o', mfc='none', color='0.5', markersize=5)
        axes.errorbar(mean, y + 0.1, xerr=deviation, fmt='s', color='black', capsize=3)
        shown = f'{round(mean, 2) + 0:.2f}'  # never -0.00
        axes.annotate(shown, (mean, y + 0.2), ha='center', va='top', fontsize=8)
    axes.set_yticks(range(len(groups)), [series for series, in groups], fontsize=8)
    axes.set(xlabel=xlabel, ylim=(len(groups) - 0.3, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(alpha=0.25, axis='x')


def curves(axes, rows, logs, value, ylabel):
    """Draws a figure of the logs over epochs: a line a series, the mean of its seeds."""
    for style, ((series,), group) in zip(styles(), grouped(rows, 'series').items()):
        runs = [read_log(logs / row['log']) for row in group]
        epochs = [stats['epoch'] for stats in runs[0]]
        means = [mean_and_deviation([run[i][value] for run in runs]) for i in range(len(epochs))]
        axes.errorbar(epochs, [m for m, _ in means], [d for _, d in means], label=series, **style)
    axes.set(xlabel='epoch', ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


# ---------------------------------------------------------------- figures


def depth(figure, rows, measured, logs):
    test, train = figure.subplots(1, 2)
    lines(test, rows, 'test_acc_percent', 'depth (layers)', ACCURACY, log=True)
    lines(train, rows, 'train_loss', 'depth (layers)', 'training loss, last epoch', log=True)


def width(figure, rows, measured, logs):
    by_width, by_parameters = figure.subplots(1, 2)
    lines(by_width, rows, 'test_acc_percent', 'width (factor on channels)', ACCURACY, log=True)
    by_size = [{**row, 'x': row['parameters'] / 1e6} for row in rows]
    lines(by_parameters, by_size, 'test_acc_percent', 'parameters (millions)', ACCURACY)
    log_scale(by_parameters)
    by_parameters.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def init(figure, rows, measured, logs):
    test, train = figure.subplots(1, 2)
    for axes, value, label in ((test, 'test_acc_percent', ACCURACY),
                               (train, 'train_loss', 'training loss, last epoch')):
        lines(axes, rows, value, "filters' first deviation (times Kaiming's)", label, log=True)


def over_layers(axes, rows, value, ylabel, **style):
    """Draws a value of the rows of one epoch over the layers: means and deviations over seeds."""
    layers = sorted(grouped(rows, 'layer').items())
    means, deviations = zip(*(mean_and_deviation([value(row) for row in seeds])
                              for _, seeds in layers))
    axes.errorbar([layer for (layer,), _ in layers], means, deviations, **style)
    axes.set(xlabel='layer', ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


def shade(epoch, last):
    """The style of an epoch: the darker the later; bars are of the last one alone."""
    if epoch == last:
        return AT_THE_END
    if epoch == 0:
        return {'fmt': ':', 'color': 'black', 'elinewidth': 0}
    return {'fmt': '-', 'color': f'{0.9 * (1 - epoch / last):.2f}', 'elinewidth': 0}


def alpha_beta(figure, rows, measured, logs):
    groups = grouped(measured, 'series')
    panels = figure.subplots(len(groups), len(SHOWN), squeeze=False)
    for row_of_axes, ((series,), group) in zip(panels, groups.items()):
        epochs = grouped(group, 'epoch')
        for axes, (label, value) in zip(row_of_axes, SHOWN.items()):
            for (epoch,), at in sorted(epochs.items()):
                over_layers(axes, at, value, label, label=f'epoch {epoch:.0f}',
                            **shade(epoch, max(epochs)[0]))
            axes.set_title(series)
        row_of_axes[0].legend(fontsize=8)


def at_one_depth(figure, rows, measured, logs):
    test, train = figure.subplots(1, 2)
    points(test, rows, 'test_acc_percent', ACCURACY)
    points(train, rows, 'train_loss', 'training loss, last epoch')


def versions(figure, rows, measured, logs):
    (test, loss, *_), histograms = figure.subplots(2, 3)
    points(test, rows, 'test_acc_percent', ACCURACY)
    curves(loss, rows, logs, 'train_loss', 'training loss')
    figure.delaxes(figure.axes[2])
    first = [row for row in measured if row['seed'] == 1]
    series = grouped(first, 'series')
    for style, ((name,), group) in zip(styles(), series.items()):
        for axes, ((layer,), bins) in zip(histograms, sorted(grouped(group, 'layer').items())):
            axes.stairs([row['share'] for row in bins],
                        [row['from_deviations'] for row in bins]
                        + [2 * bins[-1]['from_deviations'] - bins[-2]['from_deviations']],
                        label=f'{name}, layer {layer:.0f}', color=style['color'],
                        linestyle=style['linestyle'])
            axes.set(xlabel='activation (its deviations)', ylabel='share', yscale='log')
            axes.legend(fontsize=7)


def cost(figure, rows, measured, logs):
    panels = figure.subplots(1, 2)
    for axes, ((title,), group) in zip(panels, grouped(measured, 'compared').items()):
        for y, row in enumerate(group):
            slower = [1 / row[name] for name in ('ratio', 'ratio_high', 'ratio_low')]
            axes.barh(y, slower[0], color='0.7', edgecolor='black')
            axes.errorbar(slower[0], y, xerr=[[slower[0] - slower[1]], [slower[2] - slower[0]]],
                          color='black', capsize=3)
            axes.annotate(f'{slower[0]:.2f}', (0.02, y), va='center', fontsize=9)
        axes.set_yticks(range(len(group)), [row['what'] for row in group])
        axes.invert_yaxis()
        axes.set(xlabel=f'time over that of the first (median, 95 %, n = {group[0]["n"]:.0f} '
                        'turns)', title=f'{title}, 128 images')


def int8(figure, rows, measured, logs):
    accuracies, drops = figure.subplots(1, 2)
    points(accuracies, measured, 'float32_test_acc_percent', f'{ACCURACY}, float32')
    lost = [
        {'series': row['series'] + said, 'lost': row['float32_test_acc_percent']
                                                 - row[f'{form}_test_acc_percent']}
        for said, form in (('', 'int8'), (', equalised', 'equalised_int8')) for row in measured]
    points(drops, lost, 'lost', 'accuracy lost in int8 (points)')
    drops.axvline(0, color='black', linewidth=0.8)


def speedrun(figure, rows, measured, logs):
    few, over_work = figure.subplots(1, 2, width_ratios=(3, 2))
    epochs = min(row['x'] for row in measured)
    points(few, [row for row in measured if row['x'] == epochs], 'test_acc_percent', ACCURACY)
    few.set_title(f'{epochs:.0f} epochs')
    places = grouped(measured, 'series', 'x')
    for style, ((series, x), group) in zip(styles(), places.items()):
        work, accuracy = (mean_and_deviation([row[name] for row in group])
                          for name in ('machine_tflop', 'test_acc_percent'))
        over_work.errorbar(work[0], accuracy[0], accuracy[1], work[1],
                           label=f'{series}, {x:.0f} epochs', **style)
    over_work.set(xlabel="machine's TFLOP", ylabel=ACCURACY)
    over_work.margins(y=0.3)  # for the legend
    over_work.grid(alpha=0.25)
    over_work.legend(fontsize=7)


def thousand(figure, rows, measured, logs):
    accuracy, *panels = figure.subplots(1, 3)
    curves(accuracy, rows, logs, 'test_acc', f'{ACCURACY}, digits')
    for axes, ((series,), of_series) in zip(panels, grouped(measured, 'series').items()):
        for style, ((x,), layers) in zip(styles(), sorted(grouped(of_series, 'x').items())):
            axes.plot([row['layer'] / len(layers) for row in layers],
                      [row['relative_gradient'] for row in layers], color=style['color'],
                      linestyle=style['linestyle'], linewidth=1, label=f'{x:.0f} layers')
        axes.set(title=f'{series}, not trained', xlabel='layer / layers', yscale='log',
                 ylabel='norm of the gradient of the filters\nover that of the filters')
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)


FIGURES = {
    'depth': depth, 'width': width, 'init': init, 'alpha-beta': alpha_beta, 'delta': at_one_depth,
    'versions': versions, 'large': at_one_depth, 'cost': cost, 'int8': int8, 'thousand': thousand,
    'speedrun': speedrun,
}
TALL = {'versions', 'alpha-beta'}
OF_MEASURED = {'alpha-beta', 'cost', 'int8', 'speedrun'}  # drawn from measured.csv alone


def draw(experiment, logs):
    """Draws an experiment from its files under `logs`; raises ValueError if there are none."""
    folder = logs / experiment
    rows, measured = whole(read(folder / 'results.csv')), read(folder / 'measured.csv')
    if not rows and not measured:
        raise ValueError(f'{folder}: no results: expected those of python -m experiments.run '
                         f'{experiment}')
    if experiment in OF_MEASURED and not measured:
        raise ValueError(f'{folder}: nothing measured yet: expected rows in measured.csv')
    figure = Figure((11, 7.4 if experiment in TALL else 4.2), dpi=110, layout='constrained')
    FIGURES[experiment](figure, rows, measured, logs)
    diverged = len(read(folder / 'results.csv')) - len(rows)
    figure.suptitle(
        EXPERIMENTS[experiment].__doc__ + (f' ({counts(rows)})' if rows else '')
        + (f' ({diverged} diverged: left out)' if diverged else ''))
    return figure


def save(experiment, logs):
    """Draws an experiment into its folder: the path of the PNG."""
    path = logs / experiment / f'{experiment}.png'
    draw(experiment, logs).savefig(path)
    return path


def main(argv=None):
    parser = ArgumentParser(prog='experiments.figures', description=__doc__.splitlines()[0])
    parser.add_argument('experiments', nargs='*', help='which ones (default: all with results)')
    parser.add_argument('--logs', default=ROOT / 'logs', type=Path,
                        help='folder of the tables (default: logs)')
    opt = parser.parse_args(argv)
    there = [name for name in EXPERIMENTS if list((opt.logs / name).glob('*.csv'))]
    with exit_on_error('experiments.figures'):
        for name in opt.experiments or there:
            print(save(name, opt.logs))


if __name__ == '__main__':
    main()
