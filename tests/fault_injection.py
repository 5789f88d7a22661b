"""Fault injection: kills runs of train.py, resumes them, and compares the results.

    python tests/fault_injection.py --kills 20     # SIGKILL at random moments
    python tests/fault_injection.py --points       # a fault at each file operation

A DiracNet-10-1 is trained on the digits without interruption. Runs with the same options get
faults: SIGKILL at random moments (every fourth time while a checkpoint is written), or at a file
operation in the folder of the run (tests/faulty_train.py) SIGKILL before it, death in the middle
of a write, or a full disk. `--resume auto` resumes them. --points also tries two runs in one folder
and the death of a DataLoader worker. The exit status is 1 if a parameter, running statistic,
momentum, random state or metric in the log differs at the end.
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

ROOT = Path(__file__).parent.parent
if __name__ == '__main__':  # run as a script: the modules of the repository are not on the path
    sys.path.insert(0, str(ROOT))

from cli import ArgumentParser, exit_on_error  # noqa: E402
from diracnets.checkpoint import MODEL_FILE  # noqa: E402
from training import checkpoint  # noqa: E402
from training.log import LOG_FILE, read_log  # noqa: E402

METRICS = ('epoch', 'epoch_lr', 'train_loss', 'train_acc', 'test_loss', 'test_acc')
TRAIN = [sys.executable, str(ROOT / 'train.py')]
QUIET = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}


def children_of(pid):
    """Returns the process ids of the children of a process."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def flat(tree, prefix=''):
    """Yields (name, tensor or number) of nested dicts and lists."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from flat(value, f'{prefix}/{key}')
    else:
        yield prefix, tree


def compare(reference, run):
    """Returns the names of everything that differs between two finished runs, times excepted."""
    states = []
    for folder in (reference, run):
        loaded = checkpoint.load(folder)
        keys = ('params', 'ema', 'optimizer', 'epoch', 'rng')
        states.append(dict(flat({key: loaded.get(key) for key in keys})))
    differences = sorted(states[0].keys() ^ states[1].keys())
    for name in states[0].keys() & states[1].keys():
        a, b = (state[name] for state in states)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            differences.append(name)
    logs = [read_log(str(folder / LOG_FILE)) for folder in (reference, run)]
    for name in METRICS:
        a, b = ([stats[name] for stats in log] for log in logs)
        if a != b:
            differences.append(f'{name} in the logs: {a} and {b}')
    return differences


# ---------------------------------------------------------------- at random moments


def start_run(save, epochs):
    options = ['--dataset', 'Digits', '--depth', '10', '--batch_size', '64', '--epoch_step', '[3]',
               '--save_every', '0.0005', '--epochs', str(epochs), '--resume', 'auto']
    return subprocess.Popen([*TRAIN, *options, '--save', str(save)], stdout=subprocess.DEVNULL)


def kill_once(process, save, rng, during_save):
    """Kills a run at a random moment after its first new checkpoint; returns whether it was alive.
    """
    newest = save / MODEL_FILE

    def modified():
        return newest.stat().st_mtime_ns if newest.exists() else 0

    before = modified()
    while process.poll() is None and modified() == before:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 1.0))
    temporary = save / (MODEL_FILE + '.tmp')
    while during_save and process.poll() is None and not temporary.exists():
        pass
    process.kill()
    return process.wait() != 0


def kill_at_random(folder, kills, epochs, seed):
    """Kills and resumes a run; returns (kills while alive, kills during a save, differences)."""
    rng = random.Random(seed)
    reference, killed = folder / 'whole', folder / 'killed'
    if start_run(reference, epochs).wait() != 0:
        raise RuntimeError('the run without faults failed')
    alive = in_save = 0
    for i in tqdm(range(kills), 'kills', disable=None):
        process = start_run(killed, epochs)
        if kill_once(process, killed, rng, during_save=i % 4 == 3):
            alive += 1
            in_save += (killed / (MODEL_FILE + '.tmp')).exists()
    if start_run(killed, epochs).wait() != 0:
        raise RuntimeError('the killed run could not be resumed')
    return alive, in_save, compare(reference, killed)


# ---------------------------------------------------------------- at file operations


OPTIONS = ['--dataset', 'Digits', '--depth', '10', '--dtype', 'float', '--epochs', '2']
STATUSES = {'kill': {-signal.SIGKILL}, 'half': {-signal.SIGXFSZ, 0}, 'full': {1, 0}}


def run_with_fault(save, point, fault, *options):
    """Runs train.py with a fault at a file operation; returns (exit status, lines on stderr)."""
    command = [sys.executable, str(ROOT / 'tests' / 'faulty_train.py'), str(save), str(point),
               fault, *OPTIONS, *options]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    return done.returncode, done.stderr.strip().splitlines()


def inject_faults(folder, points=None, *options):
    """Injects each fault at the given file operations, or at all; returns (count, problems).

    options: additional options of train.py.
    """
    reference = folder / 'whole'
    status, errors = run_with_fault(reference, 0, 'kill', *options)
    if status != 0:
        raise RuntimeError(f'the run without faults ended with {status}: {errors[-1:]}')
    cases = [(p, fault) for p in points or range(1, int(errors[-1]) + 1) for fault in STATUSES]
    problems = []
    for point, fault in tqdm(cases, 'faults', disable=None):
        save = folder / f'{point}-{fault}'
        status, errors = run_with_fault(save, point, fault, *options)
        if status not in STATUSES[fault] or len(errors) > 1:
            problems.append(f'operation {point}, {fault}: status {status}, {errors[-2:]}')
        resumed = subprocess.run(
            [*TRAIN, *OPTIONS, *options, '--save', str(save), '--resume', 'auto'],
            capture_output=True, text=True)
        differences = [resumed.stderr] if resumed.returncode else compare(reference, save)
        problems += [f'operation {point}, {fault}: {name}' for name in differences]
        shutil.rmtree(save)
    return len(cases), problems


def run_two_in_one_folder(folder):
    """Starts two runs in one folder; returns problems unless exactly one is refused."""
    command = [*TRAIN, *OPTIONS, '--save', str(folder / 'together'), '--resume', 'auto']
    both = [subprocess.Popen(command, **QUIET) for _ in range(2)]
    statuses = sorted(process.wait() for process in both)
    differences = compare(folder / 'whole', folder / 'together')
    return differences if statuses == [0, 2] else [f'two runs ended with {statuses}', *differences]


def kill_loader_worker(folder):
    """Kills a DataLoader worker and resumes the run; returns the problems."""
    rng = np.random.default_rng(0)
    for name in ('train/a', 'train/b', 'test/a', 'test/b'):
        (folder / 'images' / name).mkdir(parents=True)
        for i in range(12):
            image = rng.integers(0, 256, (70, 70, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / 'images' / name / f'{i}.png'), image)
    command = [*TRAIN, '--dataset', 'Folder', '--dataroot', str(folder / 'images'),
               '--image_size', '70', '--depth', '18', '--width', '0.125', '--batch_size', '4',
               '--nthread', '2', '--dtype', 'float', '--epochs', '20', '--resume', 'auto', '--save']
    reference, killed = folder / 'whole-reader', folder / 'killed-reader'
    subprocess.run([*command, str(reference)], stdout=subprocess.DEVNULL, check=True)
    run = subprocess.Popen([*command, str(killed)], **QUIET)
    while run.poll() is None and not (killed / MODEL_FILE).exists():
        time.sleep(0.01)
    os.kill(children_of(run.pid)[-1], signal.SIGKILL)
    status = run.wait()
    subprocess.run([*command, str(killed)], stdout=subprocess.DEVNULL, check=True)
    differences = compare(reference, killed)
    return differences if status == 1 else [f'without a worker: status {status}', *differences]


def main(argv=None):
    parser = ArgumentParser(prog='fault_injection.py', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20,
                        help='number of kills at random moments (default: 20)')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments (default: 0)')
    parser.add_argument('--points', action='store_true',
                        help='inject faults at every file operation instead')
    args = parser.parse_args(argv)
    with exit_on_error('fault_injection.py'), tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        if args.points:
            count, problems = inject_faults(folder)
            problems += run_two_in_one_folder(folder) + kill_loader_worker(folder)
            print(f'{count} faults at file operations, two runs in one folder, and a killed '
                  'DataLoader worker')
        else:
            epochs = 2 + args.kills
            alive, in_save, problems = kill_at_random(folder, args.kills, epochs, args.seed)
            print(f'{alive} kills in {epochs} epochs, {in_save} of them during a save')
        if problems:
            raise RuntimeError('the runs differ: ' + '; '.join(problems[:5]))
    print('parameters, running statistics, momenta, random states and logs are bit-identical')


if __name__ == '__main__':
    main()
