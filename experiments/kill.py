"""Attacks trainings, lets them go on, and compares their end with one that was left alone.

    python -m experiments.kill --kills 20     # at random moments
    python -m experiments.kill --points       # at each point where it touches the disk

A DiracNet-10-1 is trained on the digits without a stop. Others with the same options are killed
with SIGKILL at random moments, every fourth time while a checkpoint is written, or at each point of
the disk (experiments/touch.py): before it, in the middle of writing, or by a full disk. They are
started again with `--resume auto`. With --points two trainings in one folder and the death of a
process that reads images are tried too. Exit status 1 if a parameter, a running statistic, a
momentum, a random state or a figure in the log differs at the end.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from cli import ArgumentParser, exit_on_error
from diracnets.checkpoint import MODEL_FILE
from experiments.interleaved import ROOT
from training import checkpoint
from training.log import LOG_FILE, read_log

OPTIONS = ['--dataset', 'Digits', '--depth', '10', '--batch_size', '64', '--epoch_step', '[3]',
           '--save_every', '0.0005']


def start(save, epochs):
    command = [sys.executable, str(ROOT / 'train.py'), *OPTIONS, '--epochs', str(epochs)]
    return subprocess.Popen(
        [*command, '--save', str(save), '--resume', 'auto'], stdout=subprocess.DEVNULL
    )


def kill_once(process, save, rng, during_save):
    """Kills the process at a random moment after its first new checkpoint: True if it was alive."""
    newest = save / MODEL_FILE

    def written():
        return newest.stat().st_mtime_ns if newest.exists() else 0

    before = written()
    while process.poll() is None and written() == before:
        time.sleep(0.001)
    delay = rng.uniform(0, 1.0)
    time.sleep(delay)
    temporary = save / (MODEL_FILE + '.tmp')
    while during_save and process.poll() is None and not temporary.exists():
        pass
    process.kill()
    return process.wait() != 0


def flat(tree, prefix=''):
    """Yields (name, tensor or number) of nested dicts and lists."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from flat(value, f'{prefix}/{key}')
    else:
        yield prefix, tree


def compare(whole, killed):
    """Lists what differs between two finished runs."""
    ends = []
    for folder in (whole, killed):
        end = checkpoint.load(folder)
        ends.append(dict(flat({key: end[key] for key in ('params', 'optimizer', 'epoch', 'rng')})))
    differ = sorted(ends[0].keys() ^ ends[1].keys())
    for name in ends[0].keys() & ends[1].keys():
        one, other = (end[name] for end in ends)
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        differ += [] if same else [name]
    logs = [read_log(str(folder / LOG_FILE)) for folder in (whole, killed)]
    for name in ('epoch', 'epoch_lr', 'train_loss', 'train_acc', 'test_loss', 'test_acc'):
        one, other = ([stats[name] for stats in log] for log in logs)
        differ += [] if one == other else [f'{name} in the logs: {one} and {other}']
    return differ


def survive(folder, kills, epochs, seed):
    """Runs the experiment: returns (kills while it ran, kills during a save, what differs)."""
    rng = random.Random(seed)
    whole, killed = folder / 'whole', folder / 'killed'
    if start(whole, epochs).wait() != 0:
        raise RuntimeError('the training that is not killed failed')
    alive = in_save = 0
    for i in tqdm(range(kills), 'kills', disable=None):
        process = start(killed, epochs)
        if kill_once(process, killed, rng, during_save=i % 4 == 3):
            alive += 1
            in_save += (killed / (MODEL_FILE + '.tmp')).exists()
    if start(killed, epochs).wait() != 0:
        raise RuntimeError('the training did not go on after it was killed')
    return alive, in_save, compare(whole, killed)


# ---------------------------------------------------------------- at each point of the disk

POINT_OPTIONS = ['--dataset', 'Digits', '--depth', '10', '--dtype', 'float', '--epochs', '2']
EXPECTED = {'kill': {-signal.SIGKILL}, 'half': {-signal.SIGXFSZ, 0}, 'full': {1, 0}}


def touch(save, point, how):
    """Runs a training that is attacked at a point: (exit status, what it said)."""
    command = [sys.executable, '-m', 'experiments.inject_fault', str(save), str(point), how]
    done = subprocess.run([*command, *POINT_OPTIONS], cwd=ROOT, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr.strip().splitlines()


def train_on(save, *options):
    command = [sys.executable, str(ROOT / 'train.py'), *POINT_OPTIONS, '--save', str(save)]
    return subprocess.run([*command, *options], capture_output=True, text=True)


def attack_points(folder, points=None):
    """Attacks at the points given, or at each: returns (number of attacks, what went wrong)."""
    whole = folder / 'whole'
    status, said = touch(whole, 0, 'kill')
    if status != 0:
        raise RuntimeError(f'the training that is not attacked ended with {status}: {said[-1:]}')
    cases = [(p, how) for p in points or range(1, int(said[-1]) + 1) for how in EXPECTED]
    wrong = []
    for point, how in tqdm(cases, 'points', disable=None):
        save = folder / f'{point}-{how}'
        status, said = touch(save, point, how)
        if status not in EXPECTED[how] or len(said) > 1:
            wrong.append(f'point {point}, {how}: status {status}, {said[-2:]}')
        again = train_on(save, '--resume', 'auto')
        differ = [again.stderr] if again.returncode else compare(whole, save)
        wrong += [f'point {point}, {how}: {name}' for name in differ]
        shutil.rmtree(save)
    return len(cases), wrong


def attack_together(folder):
    """Starts two trainings on one folder: what went wrong, if not one alone was refused."""
    command = [sys.executable, str(ROOT / 'train.py'), *POINT_OPTIONS, '--save',
               str(folder / 'together'), '--resume', 'auto']
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(2)]
    statuses = sorted(process.wait() for process in both)
    differ = compare(folder / 'whole', folder / 'together')
    return differ if statuses == [0, 2] else [f'two trainings ended with {statuses}', *differ]


def children_of(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def attack_reader(folder):
    """Kills a process that reads images, and lets the training go on: lists what went wrong."""
    rng = np.random.default_rng(0)
    for name in ('train/a', 'train/b', 'test/a', 'test/b'):
        (folder / 'images' / name).mkdir(parents=True)
        for i in range(12):
            image = rng.integers(0, 256, (70, 70, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / 'images' / name / f'{i}.png'), image)
    command = [sys.executable, str(ROOT / 'train.py'), '--dataset', 'Folder', '--dataroot',
               str(folder / 'images'), '--image_size', '70', '--depth', '18', '--width', '0.125',
               '--batch_size', '4', '--nthread', '2', '--dtype', 'float', '--epochs', '20',
               '--resume', 'auto', '--save']
    whole, killed = folder / 'whole-reader', folder / 'killed-reader'
    subprocess.run([*command, str(whole)], stdout=subprocess.DEVNULL, check=True)
    training = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
    while training.poll() is None and not (killed / MODEL_FILE).exists():
        time.sleep(0.01)
    os.kill(children_of(training.pid)[-1], signal.SIGKILL)
    status = training.wait()
    subprocess.run([*command, str(killed)], stdout=subprocess.DEVNULL, check=True)
    differ = compare(whole, killed)
    return differ if status == 1 else [f'without a reading process: status {status}', *differ]


def main():
    parser = ArgumentParser(prog='experiments.kill', description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20,
                        help='how often a training is killed (default: 20)')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments (default: 0)')
    parser.add_argument('--points', action='store_true',
                        help='attack at each point of the disk, not at random moments')
    args = parser.parse_args()
    with exit_on_error('experiments.kill'), tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        if args.points:
            count, differ = attack_points(folder)
            differ += attack_together(folder) + attack_reader(folder)
            print(f'{count} attacks at the points of the disk, two trainings in one folder, and a '
                  'reading process that was killed')
        else:
            epochs = 2 + args.kills
            alive, in_save, differ = survive(folder, args.kills, epochs, args.seed)
            print(f'{alive} kills in {epochs} epochs, {in_save} of them while a checkpoint was '
                  'written')
        if differ:
            raise RuntimeError('the end differs: ' + '; '.join(differ[:5]))
    print('every parameter, running statistic, momentum and figure is the same, bit by bit')


if __name__ == '__main__':
    main()
