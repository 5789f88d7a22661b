"""DataLoaders over datasets whose items are batches: order, seeds and workers.

`training.datasets` defines a batch. The order and the seeds of all batches follow from one seed.
"""

import contextlib
import os
import resource
import signal
import sys
import threading

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, Subset

from diracnets.image_files import DataError
from training.datasets import MemoryImages


class BatchSampler(Sampler):
    """Yields (indices, seed, local_indices) for each batch, including the last, partial one.

    `BatchDataset` describes the items. seed: with a seed, the order and the seeds of the batches
    follow from it and from the epoch, which `set_epoch` sets; with None, images come in order and
    are not augmented. The parts of a batch of the `world_size` ranks differ by at most one image.
    labels: with labels (N,), each image is sampled with replacement, and each class equally often.
    """

    def __init__(self, length, batch_size, seed=None, rank=0, world_size=1, labels=None):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.weights = None if labels is None else 1 / labels.bincount().double()[labels]
        self.set_epoch(1)

    def set_epoch(self, epoch, step=0):
        """Sets the epoch and the number of its steps to skip."""
        self.epoch, self.step = epoch, step

    def __len__(self):
        return -(-self.length // self.batch_size)

    def __iter__(self):
        order, seeds = torch.arange(self.length), [None] * len(self)
        if self.seed is not None:
            mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(mixed[0] >> np.uint64(1)))
            if self.weights is None:
                order = torch.randperm(self.length, generator=generator)
            else:
                order = self.weights.multinomial(self.length, True, generator=generator)
            seeds = torch.randint(2**61, (len(self),), generator=generator)
            seeds = (2 * seeds + self.epoch % 2).tolist()  # odd in odd epochs: alternating_flip
        batches = list(zip(order.split(self.batch_size), seeds))
        for indices, seed in batches[self.step :]:
            positions = np.arange(len(indices))
            local_indices = np.array_split(positions, self.world_size)[self.rank]
            yield indices.numpy(), seed, local_indices  # a tensor would open a file for each worker


class WorkerError(OSError):
    """A DataLoader worker died."""


def iterate_batches(loader):
    """Starts the workers of a loader and returns an iterator over its batches.

    The iterator raises WorkerError when it waits for a dead worker. torch would raise from its
    SIGCHLD handler at once, in the middle of a training step, and an incomplete step must not be
    saved.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    with _worker_errors(loader):
        batches = iter(loader)  # starts the workers, and sets torch's SIGCHLD handler
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return _iterate(loader, batches)


def _iterate(loader, batches):
    with _worker_errors(loader):
        yield from batches


@contextlib.contextmanager
def _worker_errors(loader):
    """Turns errors of a dead worker into WorkerError; errors of the dataset pass."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        if 'DataLoader worker (pid' in str(error):
            reason = str(error).splitlines()[0]
        elif (isinstance(error, RuntimeError) or str(error).startswith('Caught ')
              or not loader.num_workers):
            raise  # an error of the dataset
        else:  # the worker died while it sent a batch, before torch noticed
            reason = f'DataLoader worker: {type(error).__name__}'
        raise WorkerError(f'a worker process died ({reason}); free memory, or lower '
                          '--nthread') from error


def _init_worker(_):
    cv2.setNumThreads(0)  # one thread, as the workers run in parallel
    os.setpgid(0, 0)  # the training process handles Ctrl-C and SIGTERM sent to the group
    sys.excepthook = _report_exception


def _report_exception(kind, error, traceback):
    """Prints an exception of a worker's thread, unless the training process has ended.

    The thread sends the file descriptors of batches. Errors of the dataset reach the training
    process through the loader.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _check_open_files(workers, loaders):
    """Raises DataError if the workers may exceed the limit on open files, and block forever.

    Measured with 1 to 16 workers: queues, processes and tensors in transit, which torch passes as
    file descriptors, take at most 6 open files for each worker and 8 more for each loader.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or not os.path.isdir('/dev/fd'):
        return
    needed = len(os.listdir('/dev/fd')) + loaders * (6 * workers + 8)
    if needed > limit:
        raise DataError(f'{workers} DataLoader workers need {needed} open files, the limit is '
                        f'{limit}; raise ulimit -n, or lower --nthread')


def _labels_of(dataset):
    """Returns the labels (N,) of a BatchDataset without loading its images; raises DataError."""
    if hasattr(dataset, 'labels'):
        return dataset.labels.cpu()
    items, indices = dataset.items, torch.arange(len(dataset))
    while isinstance(items, Subset):
        items, indices = items.dataset, torch.as_tensor(items.indices)[indices]
    if not hasattr(items, 'targets'):
        raise DataError('--balance: the Dataset has no `targets`; add its labels as this attribute')
    try:
        labels = torch.as_tensor(items.targets)[indices]
        labels.bincount()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise DataError('--balance: invalid `targets` of the Dataset: expected one non-negative '
                        'integer for each item') from error
    return labels


def make_loader(dataset, batch_size, nthread=4, seed=None, rank=0, world_size=1, balance=False):
    """Returns a DataLoader over a BatchDataset.

    nthread: number of workers, for images that are not in memory; seed, rank, world_size: those of
    the BatchSampler, the loader's `sampler`; balance: sample each class equally often. Raises
    DataError if the workers need more open files than the limit.
    """
    in_memory = isinstance(dataset, MemoryImages)
    on_gpu = in_memory and dataset.images.device.type != 'cpu'
    workers = 0 if in_memory else nthread
    if workers:
        _check_open_files(workers, 1 if seed is None else 2)  # training also has a test loader
    return DataLoader(
        dataset,
        batch_size=None,  # the sampler makes the batches
        sampler=BatchSampler(len(dataset), batch_size, seed, rank, world_size,
                             _labels_of(dataset) if balance else None),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available() and not on_gpu,
        generator=torch.Generator(),  # the loader samples from this one, not from the global one
    )
