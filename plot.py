"""Plots losses, accuracies and learning rates of one or more runs in one figure.

    python plot.py logs/diracnet-16-1 logs/diracnet-28-2 --save comparison.png
    python plot.py logs/diracnet-28-2 --save diracnet.pdf

Each run has a color. Dashed lines show the training set, dotted lines the validation set (train.py
--val), solid lines the test set. Needs matplotlib. In Python, `plot_filters` plots the filters of a
convolution.
"""

import math
from pathlib import Path

from cli import ArgumentParser, exit_on_ctrl_c, exit_on_error, require_packages, say


def make_parser():
    parser = ArgumentParser.of_script('plot.py', __doc__)
    parser.add_argument('logs', nargs='+', metavar='LOG',
                        help='log.txt of a run, or the folder of the run')
    parser.add_argument('--save', default='training.png', metavar='FILE',
                        help='figure to write; the extension is the format, such as .png, .pdf or '
                             '.svg (default: %(default)s)')
    return parser


if __name__ == '__main__':  # --help and errors come before the slow imports
    exit_on_ctrl_c()
    make_parser().parse_args()
    require_packages('plot.py', 'plot', 'matplotlib')

from matplotlib import colormaps
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from training.log import LOG_PREFIX, read_log

FORMATS = sorted(FigureCanvasBase.filetypes)  # file extensions
STYLES = {'train': {'linestyle': '--', 'linewidth': 1.1, 'alpha': 0.75},
          'val': {'linestyle': ':', 'linewidth': 1.9},
          'test': {'linestyle': '-', 'linewidth': 1.9}}
MARKERS = {'--': '^', ':': 's', '-': 'o'}  # of runs of one epoch, by line style
STEPS = {'linestyle': '-', 'linewidth': 1.9, 'drawstyle': 'steps-mid'}  # one value per epoch
PANELS = [  # label of the y axis, and the line style of each log key
    ('cross-entropy loss (nats)', {f'{split}_loss': style for split, style in STYLES.items()}),
    ('top-1 accuracy (%)', {f'{split}_acc': style for split, style in STYLES.items()}),
    ('learning rate at the start of the epoch', {'epoch_lr': STEPS}),
]


def log_file(path):
    """Returns the path of a log: `path` itself, or log.txt in that folder."""
    path = Path(path)
    return path / 'log.txt' if path.is_dir() else path


def read_logs(files):
    """Reads the plotted numbers of log.txt files: {short name: records}.

    Raises ValueError for a log without any.
    """
    keys = {key for _, styles in PANELS for key in styles}
    logs = {}
    for name, path in zip(short_names(files), files):
        logs[name] = [{key: value for key, value in stats.items()
                       if key == 'epoch' or key in keys and isinstance(value, (int, float))}
                      for stats in read_log(path)]
        if not any(len(stats) > 1 for stats in logs[name]):
            raise ValueError(f'{path}: no epochs; expected lines that start with {LOG_PREFIX}{{')
    return logs


def short_names(paths):
    """Returns the names of the logs' folders, or the full paths if names repeat."""
    short = [path.parent.name if path.name == 'log.txt' else path.stem for path in paths]
    unique = len(set(short)) == len(short) and all(short)
    return short if unique else [str(path) for path in paths]


def plot_logs(logs):
    """Plots {name: records of `read_log`}; returns a matplotlib Figure."""
    figure = Figure(figsize=(13, 4.4), dpi=150, layout='constrained')
    colors = colormaps['tab10' if len(logs) <= 10 else 'tab20'].colors
    figure.get_layout_engine().set(w_pad=0.12)
    panels, plotted = figure.subplots(1, len(PANELS)), set()
    for (label, styles), axes in zip(PANELS, panels):
        for i, records in enumerate(logs.values()):
            epochs = [stats['epoch'] for stats in records]
            for key, style in styles.items():
                if not any(key in stats for stats in records):  # such as val_acc without --val
                    continue
                plotted.add(key)
                axes.plot(
                    epochs, [stats.get(key, math.nan) for stats in records],
                    color=colors[i % len(colors)],
                    marker=MARKERS[style['linestyle']] if len(epochs) == 1 else None,
                    **style,
                )
        axes.set_xlabel('epoch')
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
    panels[-1].set_yscale('symlog', linthresh=1e-4)  # a cosine schedule ends at 0
    panels[-1].set_ylim(bottom=0)

    one_epoch = any(len(records) == 1 for records in logs.values())
    handles = [Line2D([], [], color='0.3', label=split,
                      marker=MARKERS[style['linestyle']] if one_epoch else None, **style)
               for split, style in STYLES.items() if plotted & {f'{split}_loss', f'{split}_acc'}]
    for i, (name, records) in enumerate(logs.items()):
        tested = [stats for stats in records if 'test_acc' in stats]
        last = ' ({test_acc:.2f} % at epoch {epoch})'.format(**tested[-1]) if tested else ''
        label = (name + last).replace('$', r'\$')  # not a formula
        handles.append(Line2D([], [], color=colors[i % len(colors)], label=label))
    figure.legend(handles=handles, loc='outside lower center', ncols=min(len(handles), 4),
                  frameon=False)
    return figure


def plot_filters(weight, title):
    """Plots filters (out, in, height, width) as a grid of height x width matrices (out x in).

    All matrices share one color scale, dark for negative, gray for 0 and light for positive
    weights, so that signs are readable in black and white. It is clipped at the 98th percentile of
    the magnitudes: with the large diagonal of a Dirac term all other weights would be gray.
    Returns a matplotlib Figure.
    """
    from matplotlib import pyplot as plt  # slow to import; displays the figure in a notebook

    weight = weight.detach().cpu().float()
    rows, columns = weight.shape[2:]
    clipped = max(1, int(0.98 * weight.numel()))
    limit = weight.abs().flatten().kthvalue(clipped).values.item()
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns + 0.8, 2.4 * rows), sharex=True, sharey=True,
        squeeze=False, layout='constrained',
    )
    for row in range(rows):
        for column in range(columns):
            axis = axes[row, column]
            image = axis.imshow(
                weight[:, :, row, column], cmap='cividis', vmin=-limit, vmax=limit,
                interpolation='nearest',
            )
            axis.set_title(f'tap ({row}, {column})', fontsize=9)
            if row == rows - 1:
                axis.set_xlabel('input channel')
            if column == 0:
                axis.set_ylabel('output channel')
    figure.colorbar(image, ax=axes, label='weight', extend='both', shrink=0.8)
    figure.suptitle(title)
    return figure


def main(argv=None):
    parser = make_parser()
    opt = parser.parse_args(argv)
    extension = Path(opt.save).suffix.lower().removeprefix('.')
    if extension not in FORMATS:
        parser.error(f'--save {opt.save}: unknown format; use one of .{", .".join(FORMATS)}')
    with exit_on_error('plot.py'):
        logs = read_logs([log_file(log) for log in opt.logs])
        plot_logs(logs).savefig(opt.save, format=extension)
    say(f'{len(logs)} run{"s" * (len(logs) > 1)} plotted in {opt.save}')


if __name__ == '__main__':
    main()
