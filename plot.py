"""Draws the losses, accuracies and learning rates of one or more trainings as one picture.

    python plot.py logs/diracnet-16-1 logs/diracnet-28-2 --save comparison.png
    python plot.py logs/diracnet-28-2 --save diracnet.pdf

One colour is one training; dashed is training, dotted validation where images were held out for it
(train.py --val), and a full line the test. Needs matplotlib. In Python, `plot_filters` draws the
filters of a convolution.
"""

import argparse
import math
from pathlib import Path

if __name__ == '__main__':  # before what takes seconds to import
    from cli import exit_on_ctrl_c, require_packages

    exit_on_ctrl_c()
    require_packages('plot.py', 'plot', 'matplotlib')

from matplotlib import colormaps
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cli import ArgumentParser, exit_on_error
from training.log import LOG_PREFIX, read_log

FORMATS = sorted(FigureCanvasBase.filetypes)  # by the ending of a file
STYLES = {'train': {'linestyle': '--', 'linewidth': 1.1, 'alpha': 0.75},
          'val': {'linestyle': ':', 'linewidth': 1.9},
          'test': {'linestyle': '-', 'linewidth': 1.9}}
STEPS = {'linestyle': '-', 'linewidth': 1.9, 'drawstyle': 'steps-mid'}  # one rate per epoch
PANELS = [  # what stands in each: its axis, and the lines by their key in the log
    ('cross-entropy loss (nats)', {f'{split}_loss': style for split, style in STYLES.items()}),
    ('top-1 accuracy (%)', {f'{split}_acc': style for split, style in STYLES.items()}),
    ("learning rate at the epoch's start", {'epoch_lr': STEPS}),
]


def log_file(path):
    """The log of a training: the path, or the log.txt in that folder."""
    path = Path(path)
    return path / 'log.txt' if path.is_dir() else path


def read_logs(files):
    """Reads log.txt files: {short name: epochs}. Raises ValueError for one without an epoch."""
    logs = dict(zip(names(files), map(read_log, files)))
    for path, epochs in zip(files, logs.values()):
        if not epochs:
            raise ValueError(f'{path}: no epochs, expected lines of {LOG_PREFIX}{{...}}')
    return logs


def names(paths):
    """Short names of logs: their folders', or the whole paths where those would be the same."""
    short = [path.parent.name if path.name == 'log.txt' else path.stem for path in paths]
    unique = len(set(short)) == len(short) and all(short)
    return short if unique else [str(path) for path in paths]


def draw(logs):
    """Draws {name: epochs of `read_log`}; returns a matplotlib Figure."""
    figure = Figure(figsize=(13, 4.4), dpi=150, layout='constrained')
    palette = colormaps['tab10' if len(logs) <= 10 else 'tab20'].colors
    figure.get_layout_engine().set(w_pad=0.12)
    panels, drawn = figure.subplots(1, len(PANELS)), set()
    for (title, keys), axes in zip(PANELS, panels):
        for i, epochs in enumerate(logs.values()):
            numbers = [stats['epoch'] for stats in epochs]
            for key, style in keys.items():
                values = [stats.get(key, math.nan) for stats in epochs]
                if not any(key in stats for stats in epochs):  # as without --val
                    continue
                drawn.add(key)
                axes.plot(
                    numbers, values, color=palette[i % len(palette)], **style,
                    marker='o' if len(numbers) == 1 else None,
                )
        axes.set_xlabel('epoch')
        axes.set_ylabel(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
    panels[-1].set_yscale('symlog', linthresh=1e-4)  # a cosine ends at zero
    panels[-1].set_ylim(bottom=0)

    lines = [Line2D([], [], color='0.3', label=split, **style) for split, style in STYLES.items()
             if drawn & {f'{split}_loss', f'{split}_acc'}]
    for i, (name, epochs) in enumerate(logs.items()):
        accuracies = [stats['test_acc'] for stats in epochs if 'test_acc' in stats]
        last = f' ({accuracies[-1]:.2f} % at epoch {epochs[-1]["epoch"]})' if accuracies else ''
        lines.append(Line2D([], [], color=palette[i % len(palette)], label=name + last))
    figure.legend(handles=lines, loc='outside lower center', ncols=min(len(lines), 4),
                  frameon=False)
    return figure


def plot_filters(weight, title):
    """Draws filters (out, in, height, width) as a grid of height x width matrices (out x in).

    All share one scale of colours, from dark (negative) over grey (zero) to light, so that signs
    are told in print too; it ends where 98 % of the weights do, or the diagonal that a Dirac term
    makes in the middle would leave everything else grey. Returns the matplotlib Figure.
    """
    from matplotlib import pyplot as plt  # slow to import, and shows in a notebook what it draws

    weight = weight.detach().cpu()
    rows, columns = weight.shape[2:]
    limit = weight.abs().flatten().kthvalue(int(0.98 * weight.numel())).values.item()
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns + 0.8, 2.4 * rows), sharex=True, sharey=True,
        squeeze=False, layout='constrained',
    )
    for row in range(rows):
        for column in range(columns):
            axis = axes[row, column]
            picture = axis.imshow(
                weight[:, :, row, column], cmap='cividis', vmin=-limit, vmax=limit,
                interpolation='nearest',
            )
            axis.set_title(f'tap ({row}, {column})', fontsize=9)
            if row == rows - 1:
                axis.set_xlabel('input channel')
            if column == 0:
                axis.set_ylabel('output channel')
    figure.colorbar(picture, ax=axes, label='weight', extend='both', shrink=0.8)
    figure.suptitle(title)
    return figure


def main(argv=None):
    parser = ArgumentParser(prog='plot.py', description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('logs', nargs='+', metavar='LOG',
                        help='log.txt of a training, or the folder of its run')
    parser.add_argument('--save', default='training.png', metavar='FILE',
                        help='picture to write, in the format of its ending, such as .png, .pdf or '
                             '.svg (default: %(default)s)')
    opt = parser.parse_args(argv)
    ending = Path(opt.save).suffix.lower().removeprefix('.')
    if ending not in FORMATS:
        parser.error(f'--save {opt.save}: expected a name that ends in .{", .".join(FORMATS)}')
    with exit_on_error('plot.py'):
        logs = read_logs([log_file(log) for log in opt.logs])
        draw(logs).savefig(opt.save, format=ending)
    print(f'{len(logs)} training{"s" * (len(logs) > 1)} drawn in {opt.save}')


if __name__ == '__main__':
    main()
