"""CSV results of the experiments: reading, appending, grouping, and environment columns."""

import csv
import fcntl
import os
import platform
import shutil
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CPU = 'CPU'  # in the `device` column; a GPU has its name there
LABELS = {  # shown instead of names that are stored in CSV files
    'ordinary convolutions': 'standard convolutions',
    'a training step, 28-1': 'training step, 28-1',
    'plain, of modules': 'plain, module-based',
    'resnet, of modules': 'resnet, module-based',
    'W_hat, in modules': 'W_hat, layer by layer',
    'diracnet, not folded': 'diracnet, unfolded',
    'the recipe': 'full recipe',
    'filters start at the identity alone': 'Dirac initialization only',
    'flips at random': 'random flips',
    'whole images from the beginning': 'no progressive resizing',
    'a first convolution that learns': 'trainable first convolution',
    'SGD for all': 'SGD for all parameters',
    'labels not smoothed': 'no label smoothing',
    'a cosine from the beginning': 'cosine schedule',
    'batches of 250': 'batch size 250',
    'PIL, one at a time, 4 workers': 'PIL, 4 workers',
    'a gather for each batch': 'one gather per batch',
    'float32, NCHW, images by PIL': 'float32, NCHW, PIL',
    'kept, as train.py does': 'kept (train.py)',
    'given back': 'returned to the system',
}


def label(name):
    """Returns the text to show for a stored name."""
    return LABELS.get(name, name)


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


# ---------------------------------------------------------------- groups and statistics


def completed(results):
    """Returns the results of runs that did not diverge."""
    return [record for record in results if record['ended'] == 'whole']


def grouped(records, *columns):
    """Returns {values of the columns: records}, in the order of the records."""
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in columns)].append(record)
    return groups


def mean_std(values):
    """Returns the mean and the sample standard deviation, which is 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def step_times(logs):
    """Returns {block: (median, low, high)} of a step over one of `base`, as `blocks` measured."""
    return {record['what']: [1 / record[name] for name in ('ratio', 'ratio_high', 'ratio_low')]
            for record in read_results(logs / 'blocks' / 'steps.csv')}


def seed_counts(results):
    """Returns the number of seeds per point as text, such as 'n = 3' or 'n = 1 to 3'."""
    sizes = sorted({len(group) for group in grouped(results, 'series', 'x').values()})
    return f'n = {sizes[0]}' + (f' to {sizes[-1]}' if len(sizes) > 1 else '')


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
