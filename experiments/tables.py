"""Writes the tables of docs/results.md from the CSV files of the experiments.

    python -m experiments.tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the rest of the page is left.
"""

import re
from pathlib import Path

import command
from command import Options, errors_in_one_line
from experiments.claims import CLAIMS
from experiments.definitions import EXPERIMENTS
from experiments.figures import grouped, mean_and_deviation, read, whole
from experiments.turns import ROOT

PAGE = ROOT / 'docs' / 'results.md'
MARKED = re.compile(r'<!-- table: ([\w-]+) -->\n.*?<!-- end -->', re.DOTALL)


def shown(values, digits=2):
    mean, deviation = mean_and_deviation(values)
    return f'{mean:.{digits}f}' + (f' ± {deviation:.{digits}f}' if len(values) > 1 else '')


def results(rows, measured):
    """One line a point: its accuracy and loss, mean ± deviation over seeds."""
    lines = []
    for (series, x), group in sorted(grouped(rows, 'series', 'x').items()):
        lines.append([
            series, f'{x:g}', str(len(group)), shown([row['test_acc_percent'] for row in group]),
            shown([row['train_loss'] for row in group], 3), f'{group[0]["parameters"]:,.0f}',
        ])
    return ['series', 'x', 'n', 'test accuracy, %', 'training loss', 'parameters'], lines


def int8(rows, measured):
    lines = []
    for (series,), group in grouped(measured, 'series').items():
        both = [[row[f'{name}_test_acc_percent'] for row in group] for name in ('float32', 'int8')]
        lines.append([series, str(len(group)), *map(shown, both),
                      shown([a - b for a, b in zip(*both)])])
    return ['network', 'n', 'float32, %', 'int8, %', 'lost, points'], lines


def cost(rows, measured):
    lines = [[
        row['compared'], row['what'], f'{row["n"]:.0f}', f'{row["milliseconds"]:.1f}',
        f'{1 / row["ratio"]:.3f} ({1 / row["ratio_high"]:.3f} to {1 / row["ratio_low"]:.3f})',
    ] for row in measured]
    return ['of 128 images', 'network', 'n', 'ms', 'time over the first (95 %)'], lines


def claims(logs):
    """What was claimed and what was found, of the experiments that have rows."""
    lines = []
    for claim in CLAIMS:
        rows, measured = rows_of(claim.experiment, logs)
        if not rows and not measured:
            lines.append([claim.text, claim.source, 'not run yet', '', claim.experiment])
            continue
        found, answer = claim.answer(rows, measured)
        n = min(map(len, grouped(rows, 'series', 'x').values()), default='')
        said = f'{answer} (n = {n})' if n else answer
        lines.append([claim.text, claim.source, found, said, claim.experiment])
    return ['claim', 'whose', 'here', 'reproduced?', 'experiment'], lines


def rows_of(experiment, logs):
    """The rows of an experiment that came to their end, and what was measured beside them."""
    folder = logs / experiment
    return whole(read(folder / 'results.csv')), read(folder / 'measured.csv')


def table(name, logs):
    """The Markdown of a table: 'claims', or an experiment's."""
    if name == 'claims':
        head, lines = claims(logs)
    else:
        head, lines = {'int8': int8, 'cost': cost}.get(name, results)(*rows_of(name, logs))
    return '\n'.join(command.table(head, lines, left=('here', 'network', 'whose')))


def filled(page, logs):
    """Fills the tables between their marks in a text; raises ValueError for an unknown name."""

    def fill(match):
        name = match[1]
        if name != 'claims' and name not in EXPERIMENTS:
            raise ValueError(f'table: {name}: expected claims or one of {", ".join(EXPERIMENTS)}')
        return f'<!-- table: {name} -->\n\n{table(name, logs)}\n\n<!-- end -->'

    return MARKED.sub(fill, page)


def main(argv=None):
    parser = Options(prog='experiments.tables', description=__doc__.splitlines()[0])
    parser.add_argument('--logs', default=ROOT / 'logs', type=Path,
                        help='folder of the CSV files (default: logs)')
    opt = parser.parse_args(argv)
    with errors_in_one_line('experiments.tables'):
        PAGE.write_text(filled(PAGE.read_text(), opt.logs))
    print(PAGE)


if __name__ == '__main__':
    main()
