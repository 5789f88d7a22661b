"""Copies a trained model for release: parameters without optimizer state, and the log.

    python -m experiments.release runs/diracnet-16-1 --to logs/diracnet-16-1

It prints the SHA-256 of the checkpoint: add it to TRAINED in hubconf.py, and the file to the
exceptions in .gitignore. Paths in the options are stored without their folders.
"""

import argparse
import json
from pathlib import Path

import torch

from cli import ArgumentParser, exit_on_error
from diracnet import sha256
from diracnets.checkpoint import MODEL_FILE, load_dict, parse_checkpoint
from diracnets.metadata import strip_folders
from training.log import LOG_FILE, LOG_PREFIX, read_log

KEYS = ('params', 'epoch', 'classes', 'versions')  # of the checkpoint, besides args


def write_log(epochs, path):
    """Writes the epochs of a log, a list of dicts, without folder names."""
    lines = ({name: strip_folders(value) for name, value in stats.items()} for stats in epochs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'{LOG_PREFIX}{json.dumps(line)}\n' for line in lines))


def release(run, folder):
    """Writes the checkpoint and log of a run into a folder; returns the checkpoint's path.

    The checkpoint is that of the last epoch, as best.pt7 was selected on test images; with --ema,
    its parameters are the average, whose accuracy is in the log. Raises ValueError for an
    incomplete run or the same folder, OSError for a run that cannot be read.
    """
    if run.resolve() == folder.resolve():
        raise ValueError(f'--to {folder}: is the run itself; use another folder')
    checkpoint = load_dict(run, required=(*KEYS, 'args'))
    log, epochs = read_log(run / LOG_FILE), checkpoint['args'].get('epochs')
    if checkpoint.get('step') or not checkpoint['epoch'] == len(log) == epochs:
        raise ValueError(f'{run}: {checkpoint["epoch"]} epochs in its checkpoint, {len(log)} in '
                         f'its log, of {epochs}; finish the run first')
    args = {name: strip_folders(value) for name, value in checkpoint['args'].items()}
    write_log(log, folder / LOG_FILE)
    params = parse_checkpoint(checkpoint, run).params
    torch.save({**{key: checkpoint[key] for key in KEYS}, 'params': params, 'args': args},
               folder / MODEL_FILE)
    return folder / MODEL_FILE


def main(argv=None):
    parser = ArgumentParser(prog='experiments.release', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='folder of the run')
    parser.add_argument('--to', type=Path, required=True, help='folder to write')
    opt = parser.parse_args(argv)
    with exit_on_error('experiments.release'):
        path = release(opt.run, opt.to)
    print(f'{path}: SHA-256 {sha256(path)}')


if __name__ == '__main__':
    main()
