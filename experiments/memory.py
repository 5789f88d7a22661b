"""Prints what --checkpointing saves: the peak memory of two steps of DenseNet-BC-100-12.

    python -m experiments.memory
"""

import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import diracnets
from cli import ArgumentParser

BATCH = 64  # images of 32 x 32, float32


def measure(checkpointing):
    """Trains two steps: peak resident memory of this process in MB, seconds a step."""
    network = diracnets.create_model('densenet', 'CIFAR10', checkpointing=checkpointing)
    inputs, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    start = time.perf_counter()
    for _ in range(2):
        F.cross_entropy(network(inputs), labels).backward()
    seconds = (time.perf_counter() - start) / 2
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds


def main():
    parser = ArgumentParser(prog='experiments.memory', description=__doc__.splitlines()[0])
    parser.add_argument('form', nargs='?', choices=('without', 'with'),
                        help='measure this one, in this process (default: both, in one each)')
    form = parser.parse_args().form
    if form:
        print('{:,.0f} MB, {:.1f} s a step'.format(*measure(form == 'with')))
        return
    for form in ('without', 'with'):  # a process for each: a peak never falls
        print(f'{form} checkpointing: ', end='', flush=True)
        subprocess.run([sys.executable, '-m', 'experiments.memory', form], check=True)


if __name__ == '__main__':
    main()
