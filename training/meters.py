"""What is measured in an epoch: torchnet's meters, read seldom and added up over all processes."""

import time

import torch
from torchnet.meter import AverageValueMeter, ClassErrorMeter
from tqdm import tqdm

from training.checkpoint import DivergedError
from training.datasets import IGNORED
from training.distributed import all_reduce, rank, world_size

STEPS_PER_READING = 20  # meters are read, which waits for a GPU, once in so many steps
SECONDS_PER_READING = 1  # or after so long: a bar of few, long steps shows its loss too


def topk(num_classes):
    """The k of the accuracies that are measured: top-5 beside top-1 where classes are many."""
    return [1, 5] if num_classes >= 100 else [1]


class Meters:
    """Loss and top-k accuracies of one epoch, summed over all processes, and shown in a `bar`.

    totals: of the first `steps` of this epoch, which another run did. In testing steps is None, and
    a loss that is no number is a figure like others. Who feeds them ends the bar, as a context,
    before another line is printed.
    """

    def __init__(self, num_classes, length, description, totals=None, steps=None):
        self.topk = topk(num_classes)
        self.loss = AverageValueMeter()
        self.accuracy = ClassErrorMeter(topk=self.topk, accuracy=True)
        self.unread, self.steps = [], steps
        hidden = True if rank() > 0 else None  # None: where stderr is no terminal
        self.bar = tqdm(total=length, desc=description, unit='img', disable=hidden, leave=False)
        self.start = self.last_reading = time.perf_counter()
        if totals:
            seconds, *sums = totals
            self.start -= seconds
            self._set_sums(sums)
            self.bar.update(self.loss.n)

    def _sums(self):
        return [self.loss.sum, self.loss.n, *(int(self.accuracy.sum[k]) for k in self.topk)]

    def _set_sums(self, sums):
        loss, n, *errors = sums
        self.loss.reset()
        self.loss.add(loss, int(n))
        self.accuracy.n, self.accuracy.sum = int(n), dict(zip(self.topk, map(int, errors)))

    def on_forward(self, state):
        _, labels, whole = state['sample']
        loss = state['loss'].detach() * (whole / world_size())  # the sum over this process' images
        self.unread.append((loss, state['output'].detach(), labels))
        waited = time.perf_counter() - self.last_reading
        if len(self.unread) >= STEPS_PER_READING or waited >= SECONDS_PER_READING:
            self.read()
        self.bar.update(whole)

    def read(self):
        """Takes in the steps since the last reading; raises DivergedError in training."""
        if not self.unread:
            return
        losses, logits, labels = zip(*self.unread)
        self.unread, self.last_reading = [], time.perf_counter()
        losses = torch.stack(losses).cpu()
        if self.steps is not None:
            self._check(losses)
        sizes = list(map(len, labels))
        labels = torch.cat(labels).cpu()
        counted = labels != IGNORED
        for loss, given in zip(losses.tolist(), counted.split(sizes)):
            # step by step: sums of steps would depend on when they were read, as after a stop
            self.loss.add(loss, int(given.sum()))
        if not counted.any():  # this process had no share of these batches
            return
        self.accuracy.add(torch.cat(logits).cpu()[counted], labels[counted])
        self.bar.set_postfix_str(
            f'loss {self.loss.sum / self.loss.n:.3f}, acc {self.accuracy.value(1):.2f} %',
            refresh=False,
        )

    def _check(self, losses):
        lost = (~losses.isfinite()).nonzero().flatten().tolist()
        if lost:
            step = self.steps + lost[0] + 1
            raise DivergedError(f'the loss is {losses[lost[0]].item()} in step {step}')
        self.steps += len(losses)

    def totals(self):
        self.read()
        return [time.perf_counter() - self.start, *all_reduce(self._sums())]

    def figures(self, prefix):
        """Returns the figures of the epoch, accuracies in per cent and time in seconds."""
        seconds, *sums = self.totals()
        of_this_process = self._sums()
        self._set_sums(sums)
        figures = {f'{prefix}_loss': self.loss.value()[0]}
        for k in self.topk:
            figures[f'{prefix}_acc' + str(k) * (k > 1)] = self.accuracy.value(k)
        figures[f'{prefix}_time'] = seconds
        self._set_sums(of_this_process)  # to be added up again, where a signal comes in testing
        return figures
