"""Prints the sizes of the networks as a table in Markdown, without training or data.

    python -m experiments.sizes
"""

import torch

from cli import ArgumentParser, print_table
from diracnet import DiracNet
from diracnets.fold import fold
from diracnets.models.registry import count_multiply_adds, create_model
from diracnets.preprocessing import Preprocessing
from experiments.definitions import words_of
from training.options import RECIPE_FOLDER

NETWORKS = [  # model, dataset, options, recipe
    ('diracnet', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('diracnet', 'CIFAR10', {'depth': 28, 'width': 10}, 'diracnet-cifar'),
    ('diracnet-v1', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('diracnet-repeated', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('diracnet-fast', 'CIFAR10', {}, 'speedrun'),
    ('plain', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('plain', 'CIFAR10', {'depth': 28, 'width': 1, 'block': 'dbb'}, 'diracnet-cifar'),
    ('plain', 'CIFAR10', {'depth': 28, 'width': 1, 'block': 'acb'}, 'diracnet-cifar'),
    ('dirac-init', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('resnet', 'CIFAR10', {'depth': 28, 'width': 1}, 'diracnet-cifar'),
    ('wide-resnet', 'CIFAR10', {'depth': 16, 'width': 4}, 'wide-resnet'),
    ('wide-resnet', 'CIFAR10', {'depth': 28, 'width': 10}, 'wide-resnet'),
    ('densenet', 'CIFAR10', {'layers': 40, 'reduce': 1.0, 'bottleneck': False}, 'densenet'),
    ('densenet', 'CIFAR10', {'layers': 100, 'growth': 12}, 'densenet'),
    ('densenet', 'CIFAR10', {'layers': 190, 'growth': 40}, 'densenet'),
    ('diracnet', 'ImageNet', {'depth': 18}, 'diracnet-imagenet'),
    ('diracnet', 'ImageNet', {'depth': 34}, 'diracnet-imagenet'),
    ('diracnet-v1', 'ImageNet', {'depth': 18, 'width': 0.75}, 'diracnet-imagenet'),
    ('plain', 'ImageNet', {'depth': 18}, 'diracnet-imagenet'),
    ('resnet34', 'ImageNet', {}, 'diracnet-imagenet'),
    ('densenet121', 'ImageNet', {}, 'diracnet-imagenet'),
    ('resnet18', 'ImageNet', {'block': 'base'}, 'dbb'),
    ('resnet18', 'ImageNet', {'block': 'dbb'}, 'dbb'),
    ('resnet18', 'ImageNet', {'block': 'acb'}, 'dbb'),
    ('resnet50', 'ImageNet', {'block': 'base'}, 'dbb'),
    ('resnet50', 'ImageNet', {'block': 'dbb'}, 'dbb'),
    ('mobilenet', 'ImageNet', {'block': 'base'}, 'dbb'),
    ('mobilenet', 'ImageNet', {'block': 'dbb'}, 'dbb'),
    ('alexnet', 'ImageNet', {'block': 'base'}, 'dbb'),
    ('alexnet', 'ImageNet', {'block': 'dbb'}, 'dbb'),
]


def command(name, options, recipe):
    """The training command of a network."""
    return ' '.join(['python train.py', *words_of({'recipe': recipe, 'model': name, **options})])


def source(recipe):
    """What the first line of a recipe's file says behind its subject."""
    first_line, _, _ = (RECIPE_FOLDER / f'{recipe}.txt').read_text().partition('\n')
    return first_line.partition(': ')[2]


def row(name, dataset, options, recipe):
    """One network's cells: sizes in training and deployed, source of its recipe, command."""
    with torch.device('meta'):
        network = create_model(name, dataset, **options)
        # the functional form folds into this; the others are networks of modules
        deployed = DiracNet(dataset=dataset, **options) if name == 'diracnet' else fold(network)
    parameters, deployed_parameters = (
        f'{sum(p.numel() for p in form.parameters()):,}' for form in (network, deployed)
    )
    multiplications, deployed_multiplications = (
        f'{count_multiply_adds(form, Preprocessing.for_dataset(dataset).size) / 1e6:,.1f}' for form in (network, deployed)
    )
    title = ', '.join([name, *(f'{option} {value}' for option, value in options.items())])
    return (title, dataset, parameters, multiplications, deployed_parameters,
            deployed_multiplications, source(recipe), f'`{command(name, options, recipe)}`')


def main():
    ArgumentParser(prog='experiments.sizes', description=__doc__.splitlines()[0]).parse_args()
    head = ['model', 'images', 'parameters', 'multiply-adds (M)', 'parameters deployed',
            'multiply-adds deployed (M)', 'source of the recipe', 'command']
    left = {'images', 'source of the recipe', 'command'}
    print_table(head, [row(*network) for network in NETWORKS], left)


if __name__ == '__main__':
    main()
