"""Small images, and small runs of train.py on them."""

import json

import cv2
import numpy as np
import pytest
import torch

import train
from experiments.kill import compare


def write_images(folder, classes=('cat', 'dog'), n=4, size=(32, 32), seed=0):
    """Writes n random PNG images (height, width) a class: {path: pixels (H, W, 3), RGB}."""
    rng = np.random.default_rng(seed)
    written = {}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            path = str(folder / name / f'{i}.png')
            cv2.imwrite(path, pixels[:, :, ::-1])
            written[path] = pixels
    return written


def write_sets(root, train, test, size=(32, 32)):
    """Writes so many training and test images of each of two classes: the folder of both."""
    write_images(root / 'train', n=train, size=size)
    write_images(root / 'test', n=test, size=size, seed=1)
    return root


def run(images, save, *options):
    train.main([
        '--dataset', 'Folder', '--dataroot', str(images), '--depth', '10', '--batch_size', '12',
        '--epochs', '2', '--epoch_step', '[2]', '--save', str(save), *map(str, options),
    ])


def params_of(folder, name='model.pt7'):
    return torch.load(folder / name, weights_only=True)['params']


def stats_of(folder):
    lines = (folder / 'log.txt').read_text().splitlines()
    assert all(line.startswith('json_stats: ') for line in lines)
    return [json.loads(line.removeprefix('json_stats: ')) for line in lines]


def refused(capsys, *options):
    """What train.py says on stderr as it stops with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main([str(option) for option in options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('train.py: ')
    assert error.count('\n') == 1
    return error


def assert_same_run(folder, whole):
    """Every number but times: parameters, momenta, random states and the log."""
    assert compare(whole, folder) == []
