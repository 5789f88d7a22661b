"""Loss and accuracy of an epoch, with torchnet's meters, summed over all ranks."""

import time

import torch
from torchnet.meter import AverageValueMeter, ClassErrorMeter

from training.checkpoint import DivergedError
from training.datasets import IGNORED
from training.distributed import all_reduce, world_size
from training.progress import Progress

STEPS_PER_READING = 20  # steps between updates of the meters, which wait for the GPU
SECONDS_PER_READING = 1  # or this time, so that long steps show their loss too


def topk(num_classes):
    """Returns the k of the top-k accuracies: top-5 too for 100 classes or more."""
    return [1, 5] if num_classes >= 100 else [1]


class Meters:
    """Loss and top-k accuracies of one epoch, summed over all ranks, with a progress `bar`.

    totals: sums over the first `steps` steps of this epoch, from a resumed checkpoint. In
    evaluation steps is None, and a non-finite loss raises no error. Use `bar` as a context manager,
    so that it is closed before another line is printed.
    """

    def __init__(self, num_classes, length, description, totals=None, steps=None):
        self.topk = topk(num_classes)
        self.loss = AverageValueMeter()
        self.accuracy = ClassErrorMeter(topk=self.topk, accuracy=True)
        self.pending, self.steps = [], steps
        self.start = self.last_reading = time.perf_counter()
        self.end = None  # of training or evaluation: a later save does not count
        if totals:
            seconds, loss, n, *errors = totals
            self.start -= seconds
            self.loss.add(loss, int(n))
            self.accuracy.n, self.accuracy.sum = int(n), dict(zip(self.topk, map(int, errors)))
        self.bar = Progress(None, description, length, 'img', self.loss.n)

    def update(self, loss, logits, labels, global_batch_size):
        """Adds a batch: its loss (of compute.cross_entropy), its logits and labels on this rank."""
        # the sum over the images of this rank
        loss_sum = loss.detach() * (global_batch_size / world_size())
        self.pending.append((loss_sum, logits.detach(), labels))
        waited = time.perf_counter() - self.last_reading
        if len(self.pending) >= STEPS_PER_READING or waited >= SECONDS_PER_READING:
            self.read()
        self.bar.update(global_batch_size)

    def read(self):
        """Adds the pending batches; raises DivergedError for a non-finite training loss."""
        if not self.pending:
            return
        losses, logits, labels = zip(*self.pending)
        self.pending, self.last_reading = [], time.perf_counter()
        losses = torch.stack(losses).cpu()
        if self.steps is not None:
            self._check(losses)
        sizes = list(map(len, labels))
        labels = torch.cat(labels).cpu()
        counted = labels != IGNORED
        for loss, mask in zip(losses.tolist(), counted.split(sizes)):
            # one step at a time: the rounding of the sum must not depend on when it is read
            self.loss.add(loss, int(mask.sum()))
        if not counted.any():  # these batches had no image for this rank
            return
        self.accuracy.add(torch.cat(logits).cpu()[counted], labels[counted])
        self.bar.set_postfix_str(
            f'loss {self.loss.sum / self.loss.n:.3f}, acc {self.accuracy.value(1):.2f} %',
            refresh=False,
        )

    def _check(self, losses):
        nonfinite = (~losses.isfinite()).nonzero().flatten().tolist()
        if nonfinite:
            step = self.steps + nonfinite[0] + 1
            raise DivergedError(f'the loss is {losses[nonfinite[0]].item()} in step {step}')
        self.steps += len(losses)

    def totals(self):
        """Returns [seconds, sum of losses, images, errors at each k], summed over all ranks."""
        self.read()
        sums = [self.loss.sum, self.loss.n, *(int(self.accuracy.sum[k]) for k in self.topk)]
        return [(self.end or time.perf_counter()) - self.start, *all_reduce(sums)]

    def summary(self, prefix):
        """Stops the clock; returns loss, accuracies in per cent and seconds, by log key."""
        self.read()
        self.end = time.perf_counter()
        seconds, loss, n, *errors = self.totals()
        accuracies = {f'{prefix}_acc' + str(k) * (k > 1): 100 * (n - wrong) / n
                      for k, wrong in zip(self.topk, errors)}
        return {f'{prefix}_loss': loss / n, **accuracies, f'{prefix}_time': seconds}
