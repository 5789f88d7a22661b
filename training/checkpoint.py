"""Checkpoints of a run: atomic writing, random states, and a lock on the folder of the run.

A checkpoint is a plain dict that loads with `weights_only=True`: `params` (flat name to tensor,
running statistics included), `ema` (with --ema, their average, which `diracnets.load` reads in
place of `params`), `optimizer`, `epoch` (finished epochs), `step` (finished steps of the epoch in
progress), `totals` (sums of the meters over these steps), `rng`, `best`, `classes`, `args`,
`versions` and `launcher` (see `distributed.launcher`; it identifies restarts by torchrun).
"""

import fcntl
import io
import os
import platform
import random

import numpy as np
import torch

from cli import warn
from diracnet import find_nonfinite
from diracnets.checkpoint import MODEL_FILE, PREVIOUS_FILE, load_dict, load_dict_file
from training.files import link_or_copy, replacement, sync_folder, write_synced
from training.optimizers import moments

QUARANTINED_FILE = 'damaged.pt7'  # a corrupt model.pt7, which previous.pt7 replaced
REQUIRED = ('params', 'optimizer', 'epoch', 'args')


class DivergedError(Exception):
    """The loss, a parameter or a momentum is NaN or Inf."""

    status = 3  # exit status of the command


def versions():
    return {'python': platform.python_version(), 'torch': str(torch.__version__)}


def rng_state():
    """Returns the states of the global random number generators as plain types."""
    name, keys, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (name, keys.tolist(), *rest),
        'torch': torch.get_rng_state(),
        **{device: [module.get_rng_state()] for device, module in _accelerators()},
    }


def set_rng_state(state):
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'])
    for device, module in _accelerators():
        for saved in state.get(device, [])[:1]:  # older checkpoints have the states of all GPUs
            module.set_rng_state(saved)


def _accelerators():
    """Returns [(device type, torch module)] of the accelerator, or [] if there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return [(device.type, torch.get_device_module(device))] if device else []


def check_finite(state):
    """Raises DivergedError if a parameter, running statistic or momentum is NaN or Inf."""
    momenta = {
        f'the {name} of parameter {number}': moment
        for number, buffers in state['optimizer']['state'].items()
        for name, moment in moments(buffers).items() if moment is not None
    }
    name = find_nonfinite({**state['params'], **momenta})
    if name:
        raise DivergedError(f'{name} is not finite after step {state["step"]}')


def save(folder, state, names=(MODEL_FILE,)):
    """Writes a checkpoint once and links it under each of the names, synced to disk on return.

    names: such as ['epoch-3.pt7', 'best.pt7', 'model.pt7'], replaced atomically in this order; an
    existing model.pt7 becomes previous.pt7.

    Raises DivergedError and writes nothing if a tensor is not finite; raises OSError if the file
    cannot be written. After an error or a crash the last checkpoint is complete.
    """
    check_finite(state)
    serialized = io.BytesIO()  # torch.save to a file hides the reason of an OSError
    torch.save(state, serialized)
    *copies, last = (os.path.join(folder, name) for name in names)
    with replacement(last) as temporary:
        write_synced(temporary, serialized.getbuffer())
        for path in copies:
            with replacement(path) as link:
                link_or_copy(temporary, link)
        if names[-1] == MODEL_FILE and os.path.exists(last):
            os.replace(last, os.path.join(folder, PREVIOUS_FILE))
    sync_folder(folder)


def quarantine(folder):
    """Renames a corrupt model.pt7, so that the next save does not keep it as previous.pt7."""
    path = os.path.join(folder, MODEL_FILE)
    try:
        if os.path.exists(path):
            load_dict_file(path, REQUIRED)
    except ValueError:
        os.replace(path, os.path.join(folder, QUARANTINED_FILE))


class Lock:
    """An exclusive lock on the folder of a run, held by one process at a time.

    A context manager that releases the lock. The system releases it when the process dies. On a
    file system without locks `acquire` prints a warning, and nothing is locked.
    """

    def __init__(self, folder):
        self.folder, self.descriptor = folder, None

    def acquire(self):
        """Locks the folder unless this object holds the lock. Raises ValueError if another does."""
        if self.descriptor is not None:
            return
        self.descriptor = os.open(self.folder, os.O_RDONLY)
        os.register_at_fork(after_in_child=self.release)  # DataLoader workers do not hold the lock
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f'{self.folder}: another run writes to this folder; use another --save'
            ) from error
        except OSError as error:
            warn(f'{self.folder}: cannot be locked ({error.strerror}); do not start a second run '
                 'with this --save')

    def check(self):
        """Raises OSError if the locked folder is no longer the one at its path."""
        try:
            same = os.path.samestat(os.fstat(self.descriptor), os.stat(self.folder))
        except FileNotFoundError:
            same = False
        if not same:
            raise OSError(f'{self.folder}: was removed or replaced during the run; nothing more is '
                          'written there')

    def release(self):
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()


def load(path):
    """Loads a checkpoint to resume from; `path` and errors are those of `load_dict`."""
    return load_dict(path, REQUIRED)


def exists(folder):
    return any(os.path.exists(os.path.join(folder, name)) for name in (MODEL_FILE, PREVIOUS_FILE))
