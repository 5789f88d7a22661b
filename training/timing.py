"""Timing of functions in interleaved repetitions, so that a drifting machine affects all alike."""

import statistics
import time

from tqdm import tqdm

ROUNDS = 10


def rates(networks, inputs):
    """Measures images per second of each network, in turns: the median of ROUNDS."""
    seconds = [[] for _ in networks]
    bar = tqdm(range(1 + ROUNDS), 'measuring', unit='round', disable=None, leave=False)
    for i in bar:
        for network, times in zip(networks, seconds):
            start = time.perf_counter()
            network(inputs)
            if i > 0:  # the first round warms up
                times.append(time.perf_counter() - start)
    return [len(inputs) / statistics.median(times) for times in seconds]
