"""What a training does when it is asked to end: it finishes the step, is saved, and ends."""

import signal

from training.distributed import world_size
from training.loader import iterate_batches


class StoppedError(Exception):
    """A signal asked the run to end."""


class Signals:
    """Remembers a SIGTERM, SIGHUP or Ctrl-C until the step is done; a second Ctrl-C stops at once.

    While a batch is waited for, which a stalled worker may never give, one process ends as well.
    """

    def __enter__(self):
        self.number, self.waiting = 0, False
        asked = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                 if signal.getsignal(n) != signal.SIG_IGN]  # as nohup has it
        self.before = {n: signal.signal(n, self.take) for n in asked}
        return self

    def take(self, number, frame):
        self.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.waiting and world_size() == 1:
            self.waiting = False
            raise StoppedError(number)

    def batches(self, loader):
        """Yields the batches of a loader, as `iterate_batches` does."""
        batches, batch = iterate_batches(loader), True
        while batch:
            self.waiting = True
            batch = next(batches, None)
            self.waiting = False
            if batch:
                yield batch

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)
