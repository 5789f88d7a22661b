"""Small images, and small runs of train.py on them, in this process and in child processes.

A new `python train.py` imports packages for seconds. `in_child` and `on_ranks` fork their processes
from a server that has imported them. They stand for a command wherever the start of the interpreter
or the launcher is not under test. `use_forkserver` does the same for the processes of timings.
"""

import contextlib
import json
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import train
from experiments import interleaved
from fault_injection import children_of, compare
from pages import ROOT


def write_images(folder, classes=('cat', 'dog'), n=4, size=(32, 32), seed=0):
    """Writes n random PNG images of each class: {path: pixels (H, W, 3), RGB}."""
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
    """Writes `train` training and `test` test images of each of two classes; returns root."""
    write_images(root / 'train', n=train, size=size)
    write_images(root / 'test', n=test, size=size, seed=1)
    return root


def run(images, save, *options):
    """Trains a DiracNet-10-1 for two epochs in this process, unless the options differ."""
    train.main([
        '--dataset', 'Folder', '--dataroot', str(images), '--depth', '10', '--batch_size', '12',
        '--epochs', '2', '--epoch_step', '[2]', '--save', str(save), *map(str, options),
    ])


def send_signal(patch, number, where='train_one_epoch', epoch=1):
    """Sends this process a signal in the first step of a function of train.py, in that epoch."""
    calls, original, cross_entropy = [], getattr(train, where), train.cross_entropy

    def sending(*arguments):
        patch.setattr(train, 'cross_entropy', cross_entropy)
        os.kill(os.getpid(), number)
        return cross_entropy(*arguments)

    def counting(*arguments):
        calls.append(1)
        if len(calls) == epoch:
            patch.setattr(train, 'cross_entropy', sending)
        return original(*arguments)

    patch.setattr(train, where, counting)


def wait_until(condition, seconds=120):
    """Waits until condition() is true; fails after a timeout."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'condition still false after {seconds} s'
        time.sleep(0.01)


def environment():
    """The environment of child processes: one thread, the project on the path, no C++ warnings."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_CPP_LOG_LEVEL': 'ERROR',
            'PYTHONPATH': str(ROOT)}


@contextlib.contextmanager
def started(*command):
    """Starts a command with piped output; ends it and its children with the block."""
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


# ---------------------------------------------------------------- forked processes


def _child(output, variables, function, arguments):
    """Runs function(*arguments) with stdout and stderr in files, and exits as a script does."""
    os.environ.update(variables)
    # otherwise DataLoader workers of this process come from another server, which imports
    # everything again, and outlives this process with them if it is killed
    multiprocessing.set_start_method(None, force=True)
    for number, stream in ((1, 'stdout'), (2, 'stderr')):
        file = os.open(output / stream, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    status = 0
    try:
        function(*arguments)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.exit(status)


def _forkserver():
    """Returns the context of processes that a server forks; the first call starts the server."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['train', 'export'])
    before = dict(os.environ)
    os.environ.update(environment())  # of the server
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _start_child(output, variables, function, arguments):
    output.mkdir(parents=True)
    process = _forkserver().Process(
        target=_child, args=(output, variables, function, arguments))
    process.start()
    return process


def use_forkserver(patch):
    """Lets experiments/interleaved.py fork its processes from a server instead of spawning them."""
    def get_context(method):
        assert method == 'spawn'
        return _forkserver()

    patch.setattr(interleaved, 'multiprocessing', SimpleNamespace(get_context=get_context))


def _end_children(processes, seconds):
    """Waits for processes, kills them at the timeout, and returns their exit codes."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def in_child(folder, function, *arguments, seconds=120):
    """Calls function(*arguments) in a forked process: (exit code, stdout, stderr).

    The two streams are files in `folder`. The exit code is negative after a signal and None after a
    timeout.
    """
    output = Path(folder) / 'child'
    codes = _end_children([_start_child(output, {}, function, arguments)], seconds)
    return codes[0], (output / 'stdout').read_text(), (output / 'stderr').read_text()


def on_ranks(folder, world_size, function, *arguments, seconds=300):
    """Calls function(*arguments) on each rank of one machine: the stdout of rank 0.

    Each rank has the environment variables that torchrun sets. Fails if a rank does.
    """
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    shared = {'WORLD_SIZE': str(world_size), 'LOCAL_WORLD_SIZE': str(world_size),
              'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    outputs = [Path(folder) / f'rank{rank}-of-{world_size}' for rank in range(world_size)]
    processes = [
        _start_child(output, {**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}, function,
                     arguments)
        for rank, output in enumerate(outputs)
    ]
    codes = _end_children(processes, seconds)
    errors = [(output / 'stderr').read_text() for output in outputs]
    assert codes == [0] * world_size, errors
    return (outputs[0] / 'stdout').read_text()


# ---------------------------------------------------------------- results


def params_of(folder, name='model.pt7'):
    return torch.load(folder / name, weights_only=True)['params']


def stats_of(folder):
    """Returns the records of log.txt, of which every line must be one."""
    lines = (folder / 'log.txt').read_text().splitlines()
    assert all(line.startswith('json_stats: ') for line in lines)
    return [json.loads(line.removeprefix('json_stats: ')) for line in lines]


def refused(capsys, *options):
    """Returns the one line on stderr with which train.py exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train.main([str(option) for option in options])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('train.py: ')
    assert error.count('\n') == 1
    return error


def assert_same_run(folder, whole):
    """Compares everything except times: parameters, momenta, random states and the log."""
    assert compare(whole, folder) == []
