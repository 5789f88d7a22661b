"""Measures things in turn, A B A B, as the speed of a machine drifts: medians and ratios.

Each side of a comparison is a process of its own, so that its peak memory is its own too.
"""

import contextlib
import csv
import fcntl
import functools
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from cli import print_table

ROOT = Path(__file__).parent.parent
TURNS = 10  # of one process: how memory happens to lie in it moves its speed by a per cent or two


@dataclass
class Variant:
    """One side of a comparison: `prepare(*arguments)` returns a function that does the work."""

    name: str
    prepare: object
    arguments: tuple
    images: int  # in one call
    multiply_adds: float = 0  # of one image, in that work
    dtype: str = 'float32'
    seconds: list = field(default_factory=list)
    memory: float = 0  # peak, resident, MB


def serve(pipe, side):
    """What the process of a side does: its work, once for each word that comes."""
    torch.manual_seed(0)
    work = side.prepare(*side.arguments)
    work()
    work()
    pipe.send('ready')
    with contextlib.suppress(EOFError):  # the pipe is closed: no turn is left
        while pipe.recv():
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
            pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


@contextlib.contextmanager
def process_of(side):
    """Keeps a process for a side: yields a function that has it work once, once it is ready.

    The function returns (seconds, peak memory in MB), and raises RuntimeError if the process ended.
    """
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, side))
    process.start()
    theirs.close()

    def turn(word=''):
        try:
            if word:
                ours.send(word)
            return ours.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise RuntimeError(f'{side.name}: its process ended with {process.exitcode}: expected '
                               'the time of its work') from None

    with ours:
        turn()  # one at a time: what they compile and load is not measured
        yield functools.partial(turn, 'work')


def measure(sides, pairs, title):
    """Lets the sides work in turns; fills their seconds and memory."""
    with tqdm(total=pairs, desc=title, disable=None, leave=False) as progress:
        for first in range(0, pairs, TURNS):
            with contextlib.ExitStack() as processes:
                turns = [processes.enter_context(process_of(side)) for side in sides]
                for _ in range(min(TURNS, pairs - first)):
                    for side, turn in zip(sides, turns):
                        seconds, memory = turn()
                        side.seconds.append(seconds)
                        side.memory = max(side.memory, memory)
                    progress.update()


def median_interval(values):
    """Returns (median, low, high): the 95 % interval of the median, by the order of the values."""
    ordered, n = sorted(values), len(values)
    low = max(0, round(n / 2 - 0.98 * n**0.5) - 1)
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def ratio_to(first, seconds):
    """The columns that say how many times as fast a side is as the first, from both's seconds."""
    of_turns = [a / b for a, b in zip(first, seconds)]
    names = 'ratio', 'ratio_low', 'ratio_high'
    return {name: round(ratio, 3) for name, ratio in zip(names, median_interval(of_turns))}


def shown_ratio(row):
    return f'{row["ratio"]:.2f} ({row["ratio_low"]:.2f} to {row["ratio_high"]:.2f})'


def wait(device):
    """Waits for the work of a device; that of the CPU has no queue."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def product_rate(dtype, device='cpu', size=4096):
    """The GFLOP/s of a product of two square matrices: the best of thirty, as speed drifts."""
    device = torch.device(device)
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    rates = []
    for _ in range(30):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        rates.append(2 * size**3 / 1e9 / (time.perf_counter() - start))
    return max(rates)


product_peak = functools.cache(product_rate)  # measured once in a process


def commit():
    """The short name of the commit that is checked out: '' for a copy without git."""
    if not (shutil.which('git') and (ROOT / '.git').exists()):
        return ''
    return subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True,
                          text=True).stdout.strip()


COMMIT = commit()  # whose code this is: what is committed while it runs is other code


def device_name(device):
    """What the `device` column of a table says: the name of the GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'


def environment():
    cpus = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    names = [line.split(':')[1].strip() for line in cpus.splitlines() if 'model name' in line]
    return {'cpu': names[0] if names else platform.processor(), 'cores': os.cpu_count(),
            'threads': torch.get_num_threads(), 'torch': torch.__version__, 'commit': COMMIT}


def compare(title, sides, pairs, table, target=''):
    """Measures the sides, prints them, appends their rows to a CSV file: returns the rows.

    Ratios are to the first side; target: the ratio that is hoped for, of the second.
    """
    peaks = {side.dtype: product_peak(side.dtype) for side in sides if side.multiply_adds}
    measure(sides, pairs, title)
    rows, here = [], environment()
    for side in sides:
        rates = [side.images / s for s in side.seconds]
        quartiles = statistics.quantiles(rates, n=4)
        gflops = 2e-9 * side.multiply_adds * statistics.median(rates)
        rows.append({
            'compared': title, 'what': side.name, 'n': pairs,
            'images_per_second': round(statistics.median(rates), 2),
            'first_quartile': round(quartiles[0], 2), 'third_quartile': round(quartiles[2], 2),
            'milliseconds': round(1000 * statistics.median(side.seconds), 2),
            **ratio_to(sides[0].seconds, side.seconds),
            'gflop_per_second': round(gflops, 1),
            'percent_of_product_peak':
                round(100 * gflops / peaks[side.dtype], 1) if side.multiply_adds else '',
            'target': target if side is sides[1 % len(sides)] else '',
            'peak_memory_mb': round(side.memory), 'dtype': side.dtype, 'seed': 0,
            **here,
        })
    append(rows, table)
    show(rows)
    return rows


def read_rows(table):
    """The rows of a CSV file: none where there is no file."""
    if not table.exists():
        return []
    with open(table, newline='') as file:
        return list(csv.DictReader(file))


def append(rows, table):
    """Adds rows, dicts, to a CSV file; processes that do so at once wait for each other.

    Raises ValueError if the file has other columns.
    """
    table = Path(table)
    table.parent.mkdir(parents=True, exist_ok=True)
    with open(table, 'a+', newline='') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.seek(0)
        columns = next(csv.reader(file), [])
        if columns and set(columns) != set(rows[0]):
            raise ValueError(f'{table}: columns {", ".join(columns)}: expected '
                             f'{", ".join(rows[0])}')
        writer = csv.DictWriter(file, columns or rows[0])
        if not columns:
            writer.writeheader()
        writer.writerows(rows)


def show(rows):
    """Prints the rows of one comparison as a table."""
    target = rows[1 % len(rows)]['target']
    print(f'\n{rows[0]["compared"]}: {rows[0]["n"]} turns'
          + (f', target {target} times' if target else ''))
    head = ['', 'images/s (quartiles)', 'ms', 'ratio (95 %)', 'GFLOP/s', 'of the product peak',
            'MB']
    print_table(head, [[
        row['what'],
        f'{row["images_per_second"]:,.0f} ({row["first_quartile"]:,.0f} to '
        f'{row["third_quartile"]:,.0f})',
        f'{row["milliseconds"]:,.1f}',
        shown_ratio(row),
        str(row['gflop_per_second'] or ''),
        f'{row["percent_of_product_peak"]} %' if row['percent_of_product_peak'] else '',
        f'{row["peak_memory_mb"]:,}',
    ] for row in rows])


def of_last_time(rows):
    """Returns {comparison: its rows when it was last measured}, those of the first side first."""
    last = {}
    for row in rows:
        if float(row['ratio_low']) == float(row['ratio_high']):  # the first side, to itself
            last[row['compared']] = []
        last[row['compared']].append(row)
    return last


def against_the_first(rows):
    """Yields (row of the first side, row of another) of each comparison, of the last time.

    Those over depth are left out: they are a line, and no ratios.
    """
    for title, (first, *others) in of_last_time(rows).items():
        for row in others if not title.startswith('depth') else ():
            yield first, row


def draw(table):
    """Draws the last rows of each comparison in a CSV file; returns a matplotlib Figure."""
    from matplotlib.figure import Figure

    rows = read_rows(table)
    depths = [row for title, sides in of_last_time(rows).items() if title.startswith('depth,')
              for row in sides]
    ratios = [row for _, row in against_the_first(rows)]
    figure = Figure((12, 0.28 * len(ratios) + 1.5), dpi=110, layout='constrained')
    bars, line = figure.subplots(1, 2, width_ratios=(3, 2))
    for y, row in enumerate(ratios):
        ratio, low, high = (float(row[name]) for name in ('ratio', 'ratio_low', 'ratio_high'))
        bars.barh(y, ratio, color='C0')
        bars.errorbar(ratio, y, xerr=[[ratio - low], [high - ratio]], color='black', capsize=2)
        if row['target']:
            bars.plot([float(row['target'])] * 2, [y - 0.45, y + 0.45], color='C3', linewidth=2)
    bars.set_yticks(range(len(ratios)), [f'{row["compared"]}: {row["what"]} (n = {row["n"]})'
                                         for row in ratios], fontsize=7)
    bars.invert_yaxis()
    bars.axvline(1, color='grey', linewidth=1)
    bars.set_xlabel('times as fast as the other (median, 95 % interval); red: the target')
    numbers = [int(row['what'].split('-')[1]) for row in depths]
    for name, mark in (('milliseconds', 'o-'), ('peak_memory_mb', 's-')):
        line.plot(numbers, [float(row[name]) for row in depths], mark,
                  label=f'{name} (n = {depths[0]["n"]})' if depths else name)
    line.set(xlabel='depth (width 1, 128 images)', ylabel='a step of training', xlim=(0, None),
             ylim=(0, None))
    line.legend()
    return figure
