"""Keeps a trained network in git: its parameters, without the momentum, and its log.

    python -m experiments.keep runs/diracnet-16-1 --to logs/diracnet-16-1

Prints the SHA-256 of the file, by which TRAINED in hubconf.py knows it; .gitignore has to except it
too. Of paths in the options the last part stays: the rest is of one machine.
"""

import argparse
import json
from pathlib import Path

import torch

from cli import ArgumentParser, exit_on_error
from diracnet import sha256
from diracnets.checkpoint import MODEL_FILE, load_dict
from diracnets.metadata import strip_folders
from training.log import LOG_FILE, LOG_PREFIX, read_log

KEPT = ('params', 'epoch', 'classes', 'versions')  # and the options


def write_log(epochs, to):
    """Writes the epochs of a log, a list of dicts, without their folders."""
    lines = ({name: strip_folders(value) for name, value in stats.items()} for stats in epochs)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(''.join(f'{LOG_PREFIX}{json.dumps(line)}\n' for line in lines))


def keep(run, to):
    """Writes what git keeps of the run in a folder into another: returns the path of its network.

    It is that of the last epoch: the best one would be chosen by the images that it is tested on.
    Raises ValueError for a run that is not whole, or is in that folder, OSError for one that cannot
    be read.
    """
    if run.resolve() == to.resolve():
        raise ValueError(f'--to {to} is the run itself: expected another folder')
    contents = load_dict(run, required=(*KEPT, 'args'))
    log, epochs = read_log(run / LOG_FILE), contents['args'].get('epochs')
    if contents.get('step') or not contents['epoch'] == len(log) == epochs:
        raise ValueError(f'{run}: {contents["epoch"]} epochs in its checkpoint, {len(log)} in its '
                         f'log: expected all {epochs}, of a run that has ended')
    args = {name: strip_folders(value) for name, value in contents['args'].items()}
    write_log(log, to / LOG_FILE)
    torch.save({**{name: contents[name] for name in KEPT}, 'args': args}, to / MODEL_FILE)
    return to / MODEL_FILE


def main(argv=None):
    parser = ArgumentParser(prog='experiments.keep', description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='folder of the run')
    parser.add_argument('--to', type=Path, required=True, help='folder that git keeps')
    opt = parser.parse_args(argv)
    with exit_on_error('experiments.keep'):
        path = keep(opt.run, opt.to)
    print(f'{path}: SHA-256 {sha256(path)}')


if __name__ == '__main__':
    main()
