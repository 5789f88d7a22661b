"""Early end of a run: signals, unreadable images, dead workers and non-finite losses."""

import contextlib
import signal
import sys
import threading
import time
import weakref

import torch
import torch.distributed as dist

from cli import say
from diracnets.image_files import DataError
from training import checkpoint
from training.checkpoint import DivergedError
from training.distributed import all_reduce, rank, world_size
from training.loader import WorkerError, iterate_batches

SECONDS_PER_AGREEMENT, MAX_STEPS_PER_AGREEMENT = 2, 20  # between exchanges of signals


class StoppedError(Exception):
    """A signal asked the run to end."""


class SignalHandler:
    """Stores SIGTERM, SIGHUP or Ctrl-C until the end of the step.

    A second Ctrl-C exits immediately. A single process also ends while it waits for a batch,
    because a stalled DataLoader worker may never deliver it. `number` is the signal, or 0.
    """

    def __enter__(self):
        self.number, self.waiting = 0, False
        self.started = weakref.WeakSet()  # loaders whose workers run
        self.steps, self.interval, self.agreed = 0, 1, time.monotonic()  # see `agree`
        handled = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                   if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores SIGHUP
        if threading.current_thread() is not threading.main_thread():
            handled = []  # Python sets handlers in the main thread only
        self.previous = {n: signal.signal(n, self.handle) for n in handled}
        return self

    def handle(self, number, frame):
        self.number = self.number or number
        if signal.SIGINT in self.previous:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._stop_waiting()

    def _stop_waiting(self):
        if self.number and self.waiting and world_size() == 1:
            self.waiting = False
            raise StoppedError(self.number)

    def batches(self, loader):
        """Yields the batches of a loader, as `iterate_batches` does."""
        self.waiting = loader in self.started  # no StoppedError while workers start
        self._stop_waiting()
        batches, batch = iterate_batches(loader), True
        self.started.add(loader)
        while batch:
            self.waiting = True
            self._stop_waiting()  # a signal may have come during the step
            batch = next(batches, None)
            self.waiting = False
            if batch:
                yield batch

    def agree(self, is_last: bool, due: bool = False) -> bool:
        """Exchanges signals with the other ranks, if it is time; call it after each step.

        The exchange takes time: several ranks do it about every SECONDS_PER_AGREEMENT, because
        torchrun waits only 30 s after SIGTERM, and after the last step of an epoch. Returns whether
        `due` is true on any rank. Raises StoppedError if a rank received a signal.
        """
        self.steps += 1
        if not is_last and self.steps < self.interval:
            return False
        seconds = time.monotonic() - self.agreed
        number, due, seconds = all_reduce([self.number, bool(due), seconds], dist.ReduceOp.MAX)
        if world_size() > 1:
            steps = int(self.steps * SECONDS_PER_AGREEMENT / max(seconds, 1e-9))
            self.interval = min(max(1, steps), MAX_STEPS_PER_AGREEMENT)
        self.steps, self.agreed = 0, time.monotonic()
        if number:
            raise StoppedError(int(number))
        return bool(due)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible(run, resume_command: str):
    """Yields a SignalHandler, and saves the run if a signal, an image or a dead worker ends it.

    resume_command: the command that resumes the run, for the message. After a signal the process
    exits with status 128 + its number.
    """
    with SignalHandler() as signals, _save_on_stop(run, resume_command):
        yield signals


@contextlib.contextmanager
def _save_on_stop(run, resume_command):
    try:
        yield
    except (DataError, WorkerError) as error:  # image files are read during training
        if run.meters and world_size() == 1:
            run.save()
            unreadable = isinstance(error, DataError)
            say(f'stopped in epoch {run.epoch + 1} after {run.step} steps; checkpoint saved; '
                f'resume with: {resume_command}'
                + ' (if you remove the image below, add --force)' * unreadable)
        raise
    except DivergedError as error:
        raise DivergedError(
            f'{error} of epoch {run.epoch + 1}, learning rate '
            f'{run.optimizer.param_groups[0]["lr"]:g}'
            + '; the last checkpoint is kept' * checkpoint.exists(run.opt.save)
        ) from error
    except StoppedError as stopped:
        run.save()
        number = signal.Signals(stopped.args[0])
        if rank() == 0:
            say(f'interrupted by {number.name} in epoch {run.epoch + 1} after {run.step} steps; '
                f'checkpoint saved; resume with: {resume_command}')
        sys.exit(128 + number)


@contextlib.contextmanager
def out_of_memory_as_os_error(fix: str):
    """Turns an out-of-memory error into an OSError that suggests a fix."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_full and "can't allocate memory" not in str(error):  # torch's message on the CPU
            raise
        reason = str(error).split('DefaultCPUAllocator: ')[-1].split('. ')[0] or 'out of memory'
        raise OSError(f'{reason}; {fix}') from error
