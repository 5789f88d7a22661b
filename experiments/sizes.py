"""Prints the sizes of the models as a Markdown table, without training or data.

    python -m experiments.sizes
"""

import torch

from cli import ArgumentParser, print_table
from diracnet import DiracNet
from diracnets.fold import fold
from diracnets.models.registry import create_model
from diracnets.preprocessing import Preprocessing
from experiments.definitions import command_line
from experiments.variants import multiply_adds
from training.options import RECIPE_FOLDER

MODELS = [  # model, dataset, options, recipe
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
    """Returns the training command of a model."""
    arguments = command_line({'recipe': recipe, 'model': name, **options})
    return ' '.join(['python train.py', *arguments])


def source(recipe):
    """Returns the source that the first line of a recipe names after its subject."""
    first_line, _, _ = (RECIPE_FOLDER / f'{recipe}.txt').read_text().partition('\n')
    return first_line.partition(': ')[2]


def row(name, dataset, options, recipe):
    """Returns the cells of a model: its sizes, training and deployed, and its recipe."""
    with torch.device('meta'):
        model = create_model(name, dataset, **options)
        # the functional form folds into DiracNet, module-based models into themselves
        deployed = DiracNet(dataset=dataset, **options) if name == 'diracnet' else fold(model)
    pixels = Preprocessing.for_dataset(dataset).size
    sizes = []
    for form in (model, deployed):
        sizes += [f'{sum(p.numel() for p in form.parameters()):,}',
                  f'{multiply_adds(lambda form=form: form, pixels=pixels) / 1e6:,.1f}']
    title = ', '.join([name, *(f'{option} {value}' for option, value in options.items())])
    return title, dataset, *sizes, source(recipe), f'`{command(name, options, recipe)}`'


def main():
    ArgumentParser(prog='experiments.sizes', description=__doc__.splitlines()[0]).parse_args()
    head = ['model', 'images', 'parameters', 'multiply-adds (M)', 'parameters deployed',
            'multiply-adds deployed (M)', 'source of the recipe', 'command']
    left = {'images', 'source of the recipe', 'command'}
    print_table(head, [row(*model) for model in MODELS], left)


if __name__ == '__main__':
    main()
