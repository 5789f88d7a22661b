"""Options of the test run, and fixtures shared by several test modules.

Tests run on the CPU, except those with the marker `gpu`: `python test.py -m gpu`.
"""

import os
import signal

import pytest
import torch
import torch.nn.functional as F

from diracnet import define_diracnet
from diracnets.network import Network
from diracnets.preprocessing import Preprocessing, normalize
from runs import run
from training import data


def pytest_configure(config):
    if config.option.markexpr != 'gpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # read at the first use of CUDA, also in processes
    # tests send signals to processes, which inherit what nohup and background jobs ignore, but not
    # a handler
    for number, handler in ((signal.SIGINT, signal.default_int_handler),
                            (signal.SIGHUP, lambda number, frame: None)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_addoption(parser):
    parser.addoption(
        '--fuzz', type=int, default=60, help='examples of each fuzz test (default: 60; all: 500)'
    )


def _train_a_little(depth, width, dataset, num_classes, batches):
    """Trains one step on each batch (inputs, labels); returns (f, params)."""
    torch.manual_seed(0)
    f, params = define_diracnet(depth, width, dataset, num_classes)
    network = Network(f, params).to(batches[0][0].dtype)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, len(batches))
    for inputs, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
        schedule.step()
    return f, network.state_dict()


@pytest.fixture(scope='session')
def train_a_little():
    return _train_a_little


@pytest.fixture(scope='session')
def digits():
    """All 1,797 digits as inputs (N, 3, 32, 32), and their labels."""
    splits = data.load_splits('Digits')
    images = torch.cat([splits.train.images, splits.test.images]).permute(0, 3, 1, 2)
    labels = torch.cat([splits.train.labels, splits.test.labels])
    return normalize(images, Preprocessing.for_dataset('CIFAR10')), labels


@pytest.fixture(scope='session')
def trained(digits):
    """(f, params) of a small DiracNet after 120 steps on digits."""
    inputs, labels = digits
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    batches = [(inputs[i], labels[i]) for i in order[:1280].split(64)]
    return _train_a_little(10, 0.5, 'CIFAR10', 10, batches * 6)


@pytest.fixture(scope='session')
def run_folder(trained, tmp_path_factory):
    """A run folder that contains model.pt7 with the parameters of `trained`."""
    folder = tmp_path_factory.mktemp('run')
    args = {'depth': 10, 'width': 0.5, 'dataset': 'Digits', 'image_size': 32}
    torch.save(
        {'params': trained[1], 'optimizer': {}, 'epoch': 2, 'best': 0.0, 'args': args,
         'classes': [f'digit {i}' for i in range(10)]},
        folder / 'model.pt7',
    )
    return folder


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    """The folder of an uninterrupted run of three epochs on the `images` of the test module."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    run(images, folder, '--epochs', 3)
    return folder
