"""What a run is on disk: checkpoints that survive a crash at any moment, and a log of whole lines.

A checkpoint is a plain dict that loads with weights only: `params` (flat name -> tensor, running
statistics included), `optimizer`, `epoch` (finished ones), `step` (finished ones of the next
epoch), `totals` (of the meters in these steps), `rng`, `best`, `classes`, `args` and `versions`.
"""

import fcntl
import io
import os
import platform
import random
import sys

import numpy as np
import torch

from diracnets.checkpoint import MODEL_FILE, PREVIOUS_FILE, load_dict, load_dict_file
from training.files import write_beside
from training.optimizers import moments

QUARANTINED_FILE = 'damaged.pt7'  # a model.pt7 in whose place the one before it served
REQUIRED = ('params', 'optimizer', 'epoch', 'args')


class DivergedError(Exception):
    """The loss, or what was learnt, is no number any more."""

    status = 3  # with which the command ends


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


def check_finite(checkpoint):
    """Raises DivergedError for parameters, running statistics or momenta that are no numbers."""
    momenta = {
        f'the {name} of parameter {number}': moment
        for number, state in checkpoint['optimizer']['state'].items()
        for name, moment in moments(state).items()
    }
    for name, tensor in {**checkpoint['params'], **momenta}.items():
        if tensor is not None and not tensor.isfinite().all():
            raise DivergedError(f'{name} is not finite after step {checkpoint["step"]}')


def save(folder, checkpoint, names=(MODEL_FILE,)):
    """Writes a checkpoint under several names."""
    for name in names:
        _save(folder, checkpoint, name)


def _save(folder, checkpoint, name):
    """Writes a checkpoint: when this returns it is on the disk, and until then the last one is.

    Raises DivergedError, and writes nothing, if it holds numbers that are not finite; OSError if it
    cannot be written: the last checkpoint is whole then.
    """
    check_finite(checkpoint)
    path, written = os.path.join(folder, name), io.BytesIO()
    torch.save(checkpoint, written)  # into memory: of a full disk torch would say something else
    write_beside(path, written.getbuffer())
    if name == MODEL_FILE and os.path.exists(path):
        os.replace(path, os.path.join(folder, PREVIOUS_FILE))
    os.replace(path + '.tmp', path)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)  # of the folder: the new names are on the disk too
    os.close(descriptor)


def quarantine(folder):
    """Renames a model.pt7 that cannot be read, so that no later save puts it in previous.pt7."""
    path = os.path.join(folder, MODEL_FILE)
    try:
        if os.path.exists(path):
            load_dict_file(path, REQUIRED)
    except ValueError:
        os.replace(path, os.path.join(folder, QUARANTINED_FILE))


class Lock:
    """The right to write into a folder: one training has it at a time, no longer than it lives.

    A context manager that gives it back. Where the file system has no locks, stderr says so, and
    there is none.
    """

    def __init__(self, folder):
        self.folder, self.descriptor = folder, None

    def acquire(self):
        """Raises ValueError if another process has it."""
        if self.descriptor is not None:
            return
        self.descriptor = os.open(self.folder, os.O_RDONLY)
        os.register_at_fork(after_in_child=self.release)  # a reading process does not keep it
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f'{self.folder}: another training writes there: expected another --save'
            ) from error
        except OSError as error:
            print(f'{self.folder} cannot be locked ({error.strerror}): a second training there '
                  'would not be noticed', file=sys.stderr)

    def release(self):
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()


def load(path):
    """Loads what a training goes on from: path and errors are those of `load_dict`."""
    return load_dict(path, REQUIRED)


def exists(folder):
    return any(os.path.exists(os.path.join(folder, name)) for name in (MODEL_FILE, PREVIOUS_FILE))
