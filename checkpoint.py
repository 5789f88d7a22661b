"""What a run is on disk: checkpoints that survive a crash at any moment, and a log of whole lines.

A checkpoint is a plain dict that loads with weights only: `params` (flat name -> tensor, running
statistics included), `optimizer`, `epoch` (finished ones), `step` (finished ones of the next
epoch), `totals` (of the meters in these steps), `rng`, `best`, `classes`, `args` and `versions`.
"""

import json
import os
import platform
import random
import sys
import zipfile

import numpy as np
import torch

MODEL, PREVIOUS, BEST, LOG = 'model.pt7', 'previous.pt7', 'best.pt7', 'log.txt'
MARK = 'json_stats: '  # before each record of the log
REQUIRED = {'params': dict, 'optimizer': dict, 'epoch': int, 'args': dict}


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of train.py, or not of this network."""


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


def _read(path):
    with open(path, 'rb') as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch.load takes altered numbers for good ones
            if damaged:
                raise CheckpointError(f'{damaged} is damaged')
            file.seek(0)
            checkpoint = torch.load(file, map_location='cpu', weights_only=True)
            for key, kind in REQUIRED.items():
                if not isinstance(checkpoint[key], kind):
                    raise CheckpointError(f'{key} is no {kind.__name__}')
        except Exception as error:  # damaged bytes make both readers raise almost anything
            reason = f'{type(error).__name__}: {error}'.split('\n')[0]
            raise CheckpointError(f'{path}: not a checkpoint of train.py ({reason})') from error
    return checkpoint


def load(path):
    """Reads a checkpoint file, or the newest good one of a run's folder, onto the CPU.

    Where model.pt7 is damaged or missing, the one before it serves, and stderr says so. Raises
    CheckpointError, or OSError where there is none.
    """
    path = os.path.join(path, MODEL) if os.path.isdir(path) else path
    try:
        return _read(path)
    except (CheckpointError, FileNotFoundError) as error:
        previous = os.path.join(os.path.dirname(path), PREVIOUS)
        if os.path.basename(path) != MODEL or not os.path.exists(previous):
            raise
        checkpoint = _read(previous)
        print(f'{error}; taking {previous}', file=sys.stderr)
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
