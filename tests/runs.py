"""Small images, and small runs of train.py on them, here and in processes of their own."""

import contextlib
import json
import os
import signal
import subprocess
import time

import cv2
import numpy as np
import pytest
import torch

import train
from fault_injection import children_of, compare
from pages import ROOT


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


def wait_until(condition, seconds=120):
    """Waits for a condition; fails where it does not come true in so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'waited {seconds} s in vain'
        time.sleep(0.01)


def environment():
    """One thread each, torch's C++ warnings left out; scripts in tests/ find the project."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_CPP_LOG_LEVEL': 'ERROR',
            'PYTHONPATH': str(ROOT)}


@contextlib.contextmanager
def started(*command):
    """A process of the project's, its output piped, that does not outlive the block."""
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, env=environment(),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=90)  # torchrun gives its workers 30 s
        if process.poll() is None:
            for pid in (*children_of(process.pid), process.pid):  # each may lead a group
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        process.stderr.close()


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
