"""The networks that train.py trains by name: the DiracNet and those it is measured against.

    network = baselines.build('plain', 'CIFAR10', depth=28, width=1, block='dbb')
    logits = network(inputs)                        # (N, 3, H, W) to (N, num_classes)
    trained = baselines.load('logs/compare-plain')  # the network of a checkpoint
    deployed = diracfold.fold(trained.network)      # plain convolutions

`python -m baselines` prints their sizes, the table of the README.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import diracfold
from baselines import densenet, diracnet_v1, mobilenet, plain, wide_resnet
from baselines.replace import with_block
from diracnet import CLASSES, Network, define_diracnet, forward, topology

__all__ = ['FAMILIES', 'Family', 'Trained', 'build', 'load', 'multiply_adds', 'with_block']


@dataclass(frozen=True)
class Family:
    """One row of FAMILIES."""

    build: Callable  # (dataset, num_classes, **options) to an nn.Module
    options: dict  # the flags of train.py that size it, and their defaults
    datasets: tuple = tuple(CLASSES)  # whose images it is for
    decay_all: bool = False  # weight decay on one-dimensional tensors too
    crop_padding: str = 'reflect'  # or 'constant': around small images, before the random crop


def _diracnet(dataset, num_classes, depth, width, checkpointing):
    return Network(*define_diracnet(depth, width, dataset, num_classes, checkpointing))


def _from_torchvision(name):
    def from_torchvision(dataset, num_classes, block):
        return with_block(torchvision.models.get_model(name, num_classes=num_classes), block)

    return from_torchvision


CIFAR, IMAGENET = ('CIFAR10', 'CIFAR100'), ('ImageNet',)
SIZE = {'depth': 16, 'width': 1}
BLOCK = {'block': 'base'}
DENSENET = {'layers': 100, 'growth': 12, 'reduce': 0.5, 'bottleneck': True, 'droprate': 0.0,
            'checkpointing': False}

FAMILIES = {
    'diracnet': Family(_diracnet, {**SIZE, 'checkpointing': False}),
    'diracnet-v1': Family(diracnet_v1.diracnet_v1, SIZE, decay_all=True),
    'plain': Family(plain.plain, {**SIZE, **BLOCK}),
    'dirac-init': Family(plain.dirac_init, SIZE),
    'resnet': Family(plain.resnet, SIZE),
    'wide-resnet': Family(
        wide_resnet.wide_resnet, {'depth': 28, 'width': 10, 'droprate': 0.0}, CIFAR
    ),
    'densenet': Family(densenet.densenet, DENSENET, CIFAR, crop_padding='constant'),
    'densenet121': Family(
        densenet.densenet121, {'droprate': 0.0, 'checkpointing': False}, IMAGENET
    ),
    'resnet18': Family(_from_torchvision('resnet18'), BLOCK, IMAGENET),
    'resnet34': Family(_from_torchvision('resnet34'), BLOCK, IMAGENET),
    'resnet50': Family(_from_torchvision('resnet50'), BLOCK, IMAGENET),
    'alexnet': Family(_from_torchvision('alexnet'), BLOCK, IMAGENET),
    'mobilenet': Family(mobilenet.mobilenet, BLOCK, IMAGENET),
}


def build(name, dataset, num_classes=None, **options):
    """Builds a network of FAMILIES, newly drawn: (N, 3, H, W) to logits (N, num_classes).

    dataset: 'CIFAR10', 'CIFAR100' or 'ImageNet', the kind of the images; num_classes: in place of
    the dataset's own; options: those of the family's row, which holds what is not given. Raises
    ValueError for an unknown name, images or an option that the family does not take, and what
    the family itself refuses.
    """
    if name not in FAMILIES:
        raise ValueError(f'unknown model {name!r}: expected one of {", ".join(FAMILIES)}')
    family = FAMILIES[name]
    if dataset not in family.datasets:
        raise ValueError(
            f'{name} is not for {dataset!r}: expected one of {", ".join(family.datasets)}'
        )
    refused = sorted(options.keys() - family.options.keys())
    if refused:
        raise ValueError(
            f'{name} takes no {", ".join(refused)}: expected of {", ".join(family.options)}'
        )
    num_classes = CLASSES[dataset] if num_classes is None else num_classes
    if num_classes < 1:
        raise ValueError(f'num_classes {num_classes}: expected at least 1')
    options = {**family.options, **options}
    if not 0 <= options.get('droprate', 0) < 1:
        raise ValueError(f'droprate {options["droprate"]}: expected at least 0 and less than 1')
    return family.build(dataset, num_classes, **options)


@dataclass(frozen=True)
class Trained:
    """The network of a checkpoint, as it was trained, and what its inputs and outputs are."""

    network: nn.Module  # in evaluation mode
    title: str
    dataset: str  # the kind of the images: 'CIFAR10', 'CIFAR100' or 'ImageNet'
    image_size: int  # pixels
    num_classes: int
    classes: list  # their names, or None


def load(path):
    """Loads the network of a checkpoint, of any family: a Trained.

    path and errors are those of `diracfold.read`; a file without the options of its training holds
    a DiracNet. Raises ValueError too for parameters that do not fit the options.
    """
    contents = diracfold.read(path)
    params, args = contents['params'], contents['args']
    name = args.get('model', 'diracnet')
    if name == 'diracnet':
        found = diracfold.describe(contents, path)
        options, size = found['options'], found['image_size']
        dataset, num_classes = options['dataset'], options['num_classes']
        network = Network(functools.partial(forward, topology(**options)), params)
        title = f'DiracNet-{options["depth"]}-{options["width"]:g}'
    else:
        dataset = data.topology(args['dataset'], args['image_size'])
        size, num_classes = diracfold.image_size(args, dataset), len(contents['classes'])
        options = {option: args[option] for option in FAMILIES[name].options}
        network = build(name, dataset, num_classes, **options)
        diracfold.check_fit(params, network.state_dict())
        network.load_state_dict(params)
        title = ', '.join([name, *(f'{option} {value}' for option, value in options.items())])
    return Trained(network.eval(), title, dataset, size, num_classes, contents['classes'])


def multiply_adds(network, size):
    """Counts the multiply-adds of the convolutions and linear layers for one image.

    size: its height and width. Works on the meta device; leaves the network in evaluation mode.
    """
    image = torch.empty(1, 3, size, size, device=next(network.parameters()).device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network.eval()(image)
    return counter.get_total_flops() // 2
