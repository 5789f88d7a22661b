"""What a run is on disk: checkpoints that survive a crash at any moment, and a log of whole lines.

A checkpoint is a plain dict that loads with weights only: `params` (flat name -> tensor, running
statistics included), `optimizer`, `epoch` (finished ones), `step` (finished ones of the next
epoch), `totals` (of the meters in these steps), `rng`, `best`, `classes`, `args` and `versions`.
"""

import json
import os
import platform
import random

import numpy as np
import torch

import diracfile
from diracfile import MODEL, PREVIOUS

LOG = 'log.txt'
MARK = 'json_stats: '  # before each record of the log
REQUIRED = {'params': dict, 'optimizer': dict, 'epoch': int, 'args': dict}


def versions():
    return {'python': platform.python_version(), 'torch': str(torch.__version__)}


def rng_state():
    """The states of the global generators, as plain types."""
    name, keys, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (name, keys.tolist(), *rest),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all(),
    }


def set_rng_state(state):
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'])
    if len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state['cuda'])


def save(folder, checkpoint, name=MODEL):
    """Writes a checkpoint: when this returns it is on the disk, and until then the last one is.

    Raises OSError if it cannot be written; the last checkpoint is whole then.
    """
    path = os.path.join(folder, name)
    try:
        with open(path + '.tmp', 'wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
        if os.path.exists(path + '.tmp'):
            os.remove(path + '.tmp')
        reason = str(error).split('\n')[0]
        raise OSError(f'{path} cannot be written ({reason}); the last one stays') from error
    if name == MODEL and os.path.exists(path):
        os.replace(path, os.path.join(folder, PREVIOUS))
    os.replace(path + '.tmp', path)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)  # of the folder: the new names are on the disk too
    os.close(descriptor)


def load(path):
    """Loads what a training goes on from: path and errors are those of `diracfile.load`.

    Raises ValueError too for a file that is no whole checkpoint of train.py.
    """
    checkpoint = diracfile.load(path)
    for key, kind in REQUIRED.items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(
                f'{path}: {key} is missing, or no {kind.__name__}: expected a checkpoint of '
                'train.py'
            )
    return checkpoint


def exists(folder):
    return any(os.path.exists(os.path.join(folder, name)) for name in (MODEL, PREVIOUS))


def append_log(folder, stats):
    with open(os.path.join(folder, LOG), 'a') as log:
        log.write(f'{MARK}{json.dumps(stats)}\n')  # one write: a line is whole or missing


def read_log(path):
    """Reads a log.txt: a list of dicts, one for each epoch, in order.

    An epoch that ran again counts as it was last. A record that a crash cut short is left out, also
    where a later one follows it in the same line.
    """
    epochs = {}
    with open(path, encoding='utf-8', errors='replace') as log:
        records = log.read().split(MARK)[1:]
    for record in records:
        try:
            stats, _ = json.JSONDecoder().raw_decode(record)
            epochs[stats['epoch']] = stats
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return [epochs[epoch] for epoch in sorted(epochs)]


def cut_log(folder, epoch):
    """Leaves the epochs up to `epoch` in the log: those after it are about to run again."""
    path = os.path.join(folder, LOG)
    if not os.path.exists(path):
        return
    kept = [stats for stats in read_log(path) if stats['epoch'] <= epoch]
    with open(path + '.tmp', 'w') as log:
        log.writelines(f'{MARK}{json.dumps(stats)}\n' for stats in kept)
    os.replace(path + '.tmp', path)
