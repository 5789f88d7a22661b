"""Drawing on the axes of figures: styles, means with error bars, curves, single runs."""

import itertools
import math
import operator

from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from experiments.results import column, grouped, mean_std
from training.log import read_log

STYLES = [  # of the series of a figure, in order; hollow markers keep other points visible
    {'color': color, 'marker': marker, 'linestyle': line, 'capsize': 3,
     'fillstyle': fill, 'markersize': size}
    for color, marker, line, fill, size in (
        ('C0', 'o', '-', 'full', 6), ('C3', 's', '--', 'full', 6), ('C2', '^', '-.', 'none', 9),
        ('C1', 'D', ':', 'none', 9), ('C4', 'v', '-', 'full', 6), ('C5', 'x', '--', 'full', 6),
        ('C7', 'P', '-.', 'none', 9), ('C8', '*', ':', 'none', 9), ('C9', '<', '-', 'full', 6),
    )
]
LAST_EPOCH = {'fmt': 'o-', 'color': 'black', 'markersize': 3, 'capsize': 2}
ACCURACY, LOSS = 'test accuracy (%)', 'training loss, last epoch'
LAYER_STATISTICS = {  # axis label: value of a record of measures.layer_statistics
    'mean of alpha': lambda record: record['alpha_mean'],
    'root mean square of beta':
        lambda record: math.hypot(record['beta_mean'], record['beta_deviation']),
    'norm of the Dirac term /\nnorm of the learned term':
        lambda record: record['dirac_norm'] / record['free_norm'],
}


def styled(groups, styles=STYLES):
    """Yields (style, key, records) of each group; styles repeat where there are many groups."""
    for style, (key, records) in zip(itertools.cycle(styles), groups.items()):
        yield style, key, records


def log_scale(axes):
    """Makes the x axis logarithmic with plain numbers as tick labels."""
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def finish(axes, xlabel, ylabel):
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def draw_means(axes, records, x, value, **style):
    """Draws the mean of a value of the records over the column x, with error bars of one std."""
    points = sorted(grouped(records, x).items())
    means, stds = zip(*(mean_std([value(record) for record in group]) for _, group in points))
    axes.errorbar([key for (key,), _ in points], means, stds, **style)


def draw_lines(axes, results, metric, xlabel, ylabel, log=False, styles=STYLES):
    """Draws the mean of a metric over x with error bars of one std, one line per series."""
    for style, (series,), records in styled(grouped(results, 'series'), styles):
        draw_means(axes, records, 'x', operator.itemgetter(metric), label=series, **style)
    finish(axes, xlabel, f'{ylabel}, mean ± std')
    if log:
        log_scale(axes)
        axes.set_xticks(sorted({record['x'] for record in results}))


def draw_points(axes, results, metric, xlabel):
    """Draws each run as a circle, with the mean and std of its series below."""
    groups = grouped(results, 'series')
    for y, records in enumerate(groups.values()):
        values = column(records, metric)
        mean, std = mean_std(values)
        axes.plot(values, [y - 0.15] * len(values), 'o', mfc='none', color='0.5', markersize=5)
        axes.errorbar(mean, y + 0.1, xerr=std, fmt='s', color='black', capsize=3)
        text = f'{round(mean, 2) + 0:.2f}'  # never -0.00
        axes.annotate(text, (mean, y + 0.2), ha='center', va='top', fontsize=8)
    axes.set_yticks(range(len(groups)), [series for series, in groups], fontsize=8)
    axes.set(xlabel=xlabel, ylim=(len(groups) - 0.3, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(alpha=0.25, axis='x')


def draw_curves(axes, results, logs, metric, ylabel, styles=STYLES):
    """Draws a metric of the logs over epochs: mean ± std over runs, one line per series."""
    for style, (series,), records in styled(grouped(results, 'series'), styles):
        epochs = [stats for record in records for stats in read_log(logs / record['log'])]
        draw_means(axes, epochs, 'epoch', operator.itemgetter(metric), label=series, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(axes, 'epoch', ylabel)


def draw_over_layers(axes, records, value, ylabel, **style):
    """Draws a value over the layers: mean and std over the records (seeds) of a layer."""
    draw_means(axes, records, 'layer', value, **style)
    axes.set(xlabel='layer', ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
