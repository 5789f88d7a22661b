"""Batches of a data set: which images each has, and the processes that read them.

What a batch is training/images.py says; the order and the seeds of all follow from one seed.
"""

import os
import resource
import signal
import sys
import threading

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from diracnets.preprocessing import DataError
from training.datasets import MemoryImages


class BatchSampler(Sampler):
    """Yields (indices, seed, share) for each batch, the last partial one included: see Images.

    seed: with one, the order and the seeds of the batches follow from it and the epoch, which
    `set_epoch` sets; without, images come in order and are not augmented. Of each batch, process
    `rank` of `world_size` takes its share; shares differ by one image at most.
    """

    def __init__(self, length, batch_size, seed=None, rank=0, world_size=1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.set_epoch(1)

    def set_epoch(self, epoch, step=0):
        """Sets the epoch, and the steps of it that are done already."""
        self.epoch, self.step = epoch, step

    def __len__(self):
        return -(-self.length // self.batch_size)

    def __iter__(self):
        order, seeds = torch.arange(self.length), [None] * len(self)
        if self.seed is not None:
            mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(mixed[0] >> np.uint64(1)))
            order = torch.randperm(self.length, generator=generator)
            drawn = torch.randint(2**61, (len(self),), generator=generator)
            seeds = (2 * drawn + self.epoch % 2).tolist()  # odd in odd epochs: augment.in_turn
        batches = list(zip(order.split(self.batch_size), seeds))
        for indices, seed in batches[self.step :]:
            share = np.array_split(np.arange(len(indices)), self.world_size)[self.rank]
            yield indices.numpy(), seed, share  # a tensor would open a file for each worker


class WorkerError(OSError):
    """A process that reads images died."""


def iterate_batches(loader):
    """Yields the batches of a loader. Raises WorkerError where a process that reads them died.

    It does so where a batch is waited for. torch would raise at once, out of SIGCHLD, in the middle
    of a step, and half of one must not be saved.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        reading = iter(loader)  # this starts the workers, and sets torch's answer to the signal
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
        yield from reading
    except (RuntimeError, EOFError, ConnectionError) as error:
        if 'DataLoader worker (pid' in str(error):
            reason = str(error).splitlines()[0]
        elif (isinstance(error, RuntimeError) or str(error).startswith('Caught ')
              or not loader.num_workers):
            raise  # of the data set itself
        else:  # it died while it handed a batch over, before torch saw that it is dead
            reason = f'DataLoader worker: {type(error).__name__}'
        raise WorkerError(f'a process that reads images died ({reason}): expected enough memory, '
                          'or fewer --nthread') from error


def _start_worker(_):
    cv2.setNumThreads(0)  # the workers are the parallelism
    os.setpgid(0, 0)  # Ctrl-C and SIGTERM to the group are the training's to answer
    sys.excepthook = _report


def _report(kind, error, traceback):
    """Prints what a thread of a worker raised, but that a training which ends fetches no batch.

    The thread is the one that hands over the open files of batches; what goes wrong in reading
    reaches the training through the loader.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _check_open_files(workers, loaders):
    """Raises DataError where so many workers may not open their files: they would wait for ever.

    Queues, processes and the tensors on their way (torch passes each as an open file) were counted
    with 1 to 16 workers: at most 6 open files for each and 8 beside, in each of the loaders.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or not os.path.isdir('/dev/fd'):
        return
    needed = len(os.listdir('/dev/fd')) + loaders * (6 * workers + 8)
    if needed > allowed:
        raise DataError(f'{workers} worker processes need {needed} open files, {allowed} are '
                        'allowed: expected a higher ulimit -n, or a lower nthread')


def make_loader(dataset, batch_size, nthread=4, seed=None, rank=0, world_size=1):
    """Returns a DataLoader over a data set of `load`: see Images for what a batch is.

    nthread: worker processes, for images that are not in memory; the others: see BatchSampler,
    which is the loader's `sampler`. Raises DataError for more workers than may open their files.
    """
    in_memory = isinstance(dataset, MemoryImages)
    on_gpu = in_memory and dataset.images.is_cuda
    workers = 0 if in_memory else nthread
    if workers:
        _check_open_files(workers, 1 if seed is None else 2)  # training has the test's beside it
    return DataLoader(
        dataset,
        batch_size=None,  # the sampler makes the batches
        sampler=BatchSampler(len(dataset), batch_size, seed, rank, world_size),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available() and not on_gpu,
        generator=torch.Generator(),  # the loader draws from it, and not from the global one
    )
