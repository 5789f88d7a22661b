"""Interleaved timing, in which slow drift of the machine affects all variants equally."""

import statistics
import time

import torch

from training.progress import Progress

REPETITIONS = 10


def synchronize(device):
    """Waits until an accelerator has finished its queued work; a CPU has no queue."""
    if torch.device(device).type != 'cpu':
        torch.accelerator.synchronize(device)


def seconds_per_call(work, calls=1, device='cpu'):
    """Calls `work` `calls` times and returns the mean seconds of one call."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def interleave(timers, repetitions, title, out_of_time=lambda repetition: False):
    """Calls each timer once per repetition, in order: A B C, A B C, ...

    A timer is a function without arguments that returns seconds. `out_of_time(repetition)` may end
    the measurement early. Returns one list of seconds per timer.
    """
    seconds = [[] for _ in timers]
    for repetition in Progress(range(repetitions), title, unit='repetition'):
        if out_of_time(repetition):
            break
        for timer, values in zip(timers, seconds):
            values.append(timer())
    return seconds


def median_interval(values):
    """Returns (median, low, high): the median and its interval from order statistics.

    The interval covers 95 % or more if there are 6 values or more; it is the range of fewer.
    """
    ordered, n = sorted(values), len(values)
    low = max(0, round(n / 2 - 0.98 * n**0.5) - 1)
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def paired_ratio(baseline, seconds):
    """Returns (median, low, high) of the speedup over the baseline, paired by repetition."""
    return median_interval([a / b for a, b in zip(baseline, seconds)])


def matmul_gflops(dtype, device='cpu', size=4096):
    """Returns the matmul peak in GFLOP/s: the fastest of 30 products of square matrices."""
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    synchronize(device)
    best = min(seconds_per_call(lambda: a @ b, device=device) for _ in range(30))
    return 2 * size**3 / 1e9 / best


def images_per_second(models, inputs):
    """Returns the median images per second of each model on a batch of inputs (N, C, H, W)."""
    timers = [lambda model=model: seconds_per_call(lambda: model(inputs)) for model in models]
    for timer in timers:  # warm-up
        timer()
    return [len(inputs) / statistics.median(values)
            for values in interleave(timers, REPETITIONS, 'measuring')]
