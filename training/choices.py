"""Choices, limits and defaults of options that other modules need too. Does not import torch."""

import os

FLIPS = {  # name: number of kinds of flip, each applied with probability 1/2
    'none': 0,  # digits, letters
    'horizontal': 1,  # photographs
    'alternating': 1,  # photographs, flipped in every second epoch (arXiv 2404.00498, section 3.6)
    'all': 3,  # horizontal, vertical, transposition: all eight symmetries of a square
}
MIN_PIXELS = 8  # height and width of an image
OPTIMIZERS = ('sgd', 'muon')
SCHEDULES = ('step', 'cosine', 'onecycle', 'linear')


def available_cores():
    """Returns the number of CPU cores per process of this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, allowed // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
