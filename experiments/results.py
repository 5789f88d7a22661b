"""CSV results of the experiments: reading, appending, grouping, and environment columns."""

import csv
import fcntl
import operator
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
LONGER_BUDGETS = ('paper', 'medium')  # subfolders of logs/, the longest first
CPU = 'CPU'  # in the `device` column; a GPU has its name there

# ---------------------------------------------------------------- CSV files


def read_csv(path):
    """Reads the records of a CSV file as dicts of text; returns [] if there is no file."""
    if not path.exists():
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def read_results(path):
    """Reads the records of a CSV file with numbers as floats; returns [] if there is no file."""
    return [{name: _number(value) for name, value in record.items()} for record in read_csv(path)]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text


def append_results(records, path):
    """Appends dicts to a CSV file; concurrent processes wait for each other.

    Raises ValueError if the file has other columns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a+', newline='') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        columns = next(csv.reader(file), [])
        if columns and set(columns) != set(records[0]):
            raise ValueError(f'{path}: columns {", ".join(columns)}: expected '
                             f'{", ".join(records[0])}')
        writer = csv.DictWriter(file, columns or records[0])
        if not columns:
            writer.writeheader()
        writer.writerows(records)


# ---------------------------------------------------------------- all runs of a configuration


def configuration(record):
    """Returns the dataset and the options of a run: all but its seed."""
    return record['dataset'], re.sub(r'-s\d+$', '', record['run'])


def run_key(record):
    """Returns the key of a run: its configuration and seed, and its result.

    Experiments share runs, and a repetition may be bit-identical: results of one seed with equal
    accuracy and loss are one run.
    """
    identical = record['test_acc_percent'], record['train_loss']
    if record['ended'] == 'diverged':
        identical = record['device'], record['threads'], record['torch']
    return record['dataset'], record['run'], *identical


def all_runs(logs):
    """Returns the result of each run once: first runs, replications, and those on other devices."""
    again = logs / 'again'
    runs = {}
    for path in (*sorted(logs.glob('*/results.csv')), *sorted(logs.glob('*/cpu.csv')),
                 *sorted(again.glob('*/results.csv'))):
        for record in read_results(path):
            if again in path.parents:
                record['log'] = f'again/{record["log"]}'
            runs.setdefault(run_key(record), record)
    return [*runs.values()]


def read_pooled(experiment, logs):
    """Returns all runs of the configurations of an experiment, with its `series` and `x`."""
    first = read_results(logs / experiment / 'results.csv')
    points = {configuration(record): {name: record[name] for name in ('series', 'x')}
              for record in first}
    runs = grouped_by(configuration, all_runs(logs)) if points else {}
    return [{**record, **point} for key, point in points.items()
            for record in sorted(runs[key], key=operator.itemgetter('seed'))]


def budget_folders(logs):
    """Returns the folders of the results of all budgets, the longest first."""
    return [*(logs / name for name in LONGER_BUDGETS), logs]


def read_both(experiment, name, logs):
    """Returns [first runs, replication]: the records of one file of an experiment.

    name: `results.csv` or `measured.csv`.
    """
    return [read_results(folder / experiment / name) for folder in (logs, logs / 'again')]


# ---------------------------------------------------------------- groups and statistics


def completed(results):
    """Returns the results of runs that did not diverge."""
    return [record for record in results if record['ended'] == 'complete']


def grouped_by(key, records):
    """Returns {key of a record: records}, in the order of the records."""
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def grouped(records, *columns):
    """Returns {values of the columns: records}, in the order of the records."""
    return grouped_by(lambda record: tuple(record[name] for name in columns), records)


def seed_means(records, value):
    """Returns the mean of `value(record)` over the runs of each seed.

    Runs of one seed have the same initial parameters and are not independent samples: their
    accuracies are correlated (docs/results.md, Replication).
    """
    return [statistics.mean(map(value, runs)) for runs in grouped(records, 'seed').values()]


def mean_std(values):
    """Returns the mean and the sample standard deviation, which is 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def relative_time(record):
    """Returns [median, low, high] of the time over that of the baseline, of a timing's record."""
    return [1 / record[name] for name in ('ratio', 'ratio_high', 'ratio_low')]


def step_times(logs):
    """Returns {block: [median, low, high]} of a step over one of `base`, as `blocks` measured."""
    return {record['what']: relative_time(record)
            for record in read_results(logs / 'blocks' / 'steps.csv')}


def speedrun_runs(logs):
    """Returns {(series, epochs): (records, matmul-equivalent TFLOP)}, airbench first.

    TFLOP measured on other CPUs than airbench's are not comparable, as some have AMX. Runs there
    get those of the series on airbench's CPU, times the ratio of multiply-adds.
    """
    airbench, measured, results = (read_results(logs / 'speedrun' / f'{name}.csv')
                                   for name in ('airbench', 'measured', 'results'))
    result_of = {record['run']: record for record in results}
    measured = [{**result_of[record['run']], **record} for record in measured]
    records = [*airbench, *sorted(measured, key=operator.itemgetter('x'))]
    timed = grouped([record for record in records if record['cpu'] == records[0]['cpu']
                     and record['matmul_equivalent_tflop'] != ''], 'series')
    runs = {}
    for (series, epochs), group in grouped(records, 'series', 'x').items():
        own = [record for record in timed[series,] if record['x'] == epochs]
        runs[series, epochs] = group, [
            record['matmul_equivalent_tflop'] * group[0]['multiply_adds'] / record['multiply_adds']
            for record in own or timed[series,]]
    return runs


def int8_drop(record, form='int8'):
    """Returns the accuracy that a quantized form loses, in pp, of a record of `int8`."""
    return record['float32_test_acc_percent'] - record[f'{form}_test_acc_percent']


def column(records, name):
    return [record[name] for record in records]


def dtypes_of(records):
    """Returns the dtypes of records as text, such as 'float32, bfloat16'."""
    names = dict.fromkeys(column(records, 'dtype'))
    return ', '.join('float32' if name == 'float' else name for name in names if name)


def format_mean(values, digits=2):
    """Returns the mean of values, and their std if there are several, as text; '' for none."""
    if not values:
        return ''
    mean, std = mean_std(values)
    mean = round(mean, digits) + 0.0  # never -0.00
    return f'{mean:.{digits}f}' + (f' ± {std:.{digits}f}' if len(values) > 1 else '')


def budget_epochs(results):
    """Returns the epochs of the runs of one budget as text; a diverged run has fewer."""
    return f'{max((record["epochs"] for record in completed(results)), default=0):.0f}'


def span(values):
    """Returns the smallest and the largest of integers as text, such as '3' or '3 to 9'."""
    return ' to '.join(dict.fromkeys(f'{value:.0f}' for value in (min(values), max(values))))


def run_counts(results, keys=None):
    """Returns the number of runs per point, '3' or '1 to 3': of all (series, x), or of `keys`."""
    groups = grouped(results, 'series', 'x')
    return span([len(groups[key]) for key in keys or groups])


# ---------------------------------------------------------------- environment


def commit():
    """Returns the short hash of the checked-out commit, or '' for a copy without git."""
    if not (shutil.which('git') and (ROOT / '.git').exists()):
        return ''
    return subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True,
                          text=True).stdout.strip()


COMMIT = commit()  # at the start: later commits are not the code that runs


def device_name(device):
    """Returns the value of the `device` column: the name of the GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else CPU


def environment():
    """Returns the columns that describe the machine and the software."""
    cpus = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    names = [line.split(':')[1].strip() for line in cpus.splitlines() if 'model name' in line]
    return {'cpu': names[0] if names else platform.processor(), 'cores': os.cpu_count(),
            'threads': torch.get_num_threads(), 'torch': torch.__version__, 'commit': COMMIT}
