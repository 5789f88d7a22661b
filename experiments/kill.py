"""Kills a training at random moments, lets it go on, and compares its end, bit by bit.

    python -m experiments.kill --kills 20

One DiracNet-10-1 is trained on the digits without a stop. A second training with the same options
is killed with SIGKILL, every fourth time while it writes a checkpoint, and started again with
`--resume auto`. Exit status 1 if a parameter, a running statistic or a momentum differs at the end,
or an epoch's line in the log.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

import diracfile
from command import Options, errors_in_one_line
from training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ['--dataset', 'Digits', '--depth', '10', '--batch_size', '64', '--epoch_step', '[3]',
           '--save_every', '0.0005']


def start(save, epochs):
    command = [sys.executable, str(ROOT / 'train.py'), *OPTIONS, '--epochs', str(epochs)]
    return subprocess.Popen(
        [*command, '--save', str(save), '--resume', 'auto'], stdout=subprocess.DEVNULL
    )


def kill_once(process, save, rng, during_save):
    """Kills the process at a random moment after its first new checkpoint: True if it was alive."""
    newest = save / diracfile.MODEL

    def written():
        return newest.stat().st_mtime_ns if newest.exists() else 0

    before = written()
    while process.poll() is None and written() == before:
        time.sleep(0.001)
    delay = rng.uniform(0, 1.0)
    time.sleep(delay)
    temporary = save / (diracfile.MODEL + '.tmp')
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
    logs = [checkpoint.read_log(str(folder / checkpoint.LOG)) for folder in (whole, killed)]
    epochs = [[stats['epoch'] for stats in log] for log in logs]
    if epochs[0] != epochs[1]:
        differ.append(f'epochs in the logs: {epochs}')
    accuracies = [[stats['test_acc'] for stats in log] for log in logs]
    if accuracies[0] != accuracies[1]:
        differ.append(f'test_acc in the logs: {accuracies}')
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
            in_save += (killed / (diracfile.MODEL + '.tmp')).exists()
    if start(killed, epochs).wait() != 0:
        raise RuntimeError('the training did not go on after it was killed')
    return alive, in_save, compare(whole, killed)


def main():
    parser = Options(prog='experiments.kill', description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20, help='how often (default: 20)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: 0)')
    args = parser.parse_args()
    with errors_in_one_line('experiments.kill'), tempfile.TemporaryDirectory() as folder:
        epochs = 2 + args.kills
        alive, in_save, differ = survive(Path(folder), args.kills, epochs, args.seed)
        print(f'{alive} kills in {epochs} epochs, {in_save} of them while a checkpoint was written')
        if differ:
            raise RuntimeError('the end differs in ' + ', '.join(differ[:5]))
    print('every parameter, running statistic and momentum is the same, bit by bit')


if __name__ == '__main__':
    main()
