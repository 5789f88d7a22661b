"""Draws predictions and layers of a model: confusions, mistakes, filters, statistics.

    python -m experiments.visualize logs/diracnet-28-2 --dataset Folder \\
        --dataroot ../cifar10-jpeg --save logs/diracnet-28-2/seen

It writes into the folder of --save: predictions.csv, one record per test image; confusion.png;
mistakes.png, the most confident mistakes; filters.png, of the folded model's middle convolution;
and layers.png, for an unfolded DiracNet: how close its layers are to the identity.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import diracnets
from cli import ArgumentParser, exit_on_error
from diracnets.folding import fold
from experiments.axes import LAST_EPOCH, LAYER_STATISTICS, draw_over_layers
from experiments.measures import layer_statistics
from experiments.results import append_results
from plot import plot_filters
from training.evaluation import compute_logits
from training.options import DATASETS
from training.setup import load_test_splits

ROWS, COLUMNS = 4, 8  # of the sheet of mistakes


def predict(model, preprocess, images, classes):
    """Returns one record per image: its number, its class, the predicted class and probability."""
    logits, labels = compute_logits(model, images, preprocess, 'predicting', batch=500)
    probabilities, predicted = logits.softmax(1).max(1)
    return [
        {'image': i, 'class': classes[label], 'labelled': classes[prediction],
         'probability_percent': round(100 * p, 3)}
        for i, (label, prediction, p) in enumerate(
            zip(labels.tolist(), predicted.tolist(), probabilities.tolist()))
    ]


def confusion_matrix(records, classes):
    """Counts the images per (class, predicted class), int64 (C, C)."""
    index = {name: i for i, name in enumerate(classes)}
    counts = torch.zeros(len(classes), len(classes), dtype=torch.long)
    for record in records:
        counts[index[record['class']], index[record['labelled']]] += 1
    return counts


def draw_confusion(records, classes, title):
    """Draws the confusion matrix in per cent of each class."""
    counts = confusion_matrix(records, classes)
    percents = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    size = 2.5 + 0.55 * len(classes)
    figure = Figure(figsize=(size, size), dpi=120, layout='constrained')
    axes = figure.subplots()
    mistakes = percents.masked_fill(torch.eye(len(classes), dtype=torch.bool), 0)
    axes.imshow(mistakes.numpy(), cmap='Greys', vmin=0, vmax=max(2 * mistakes.max().item(), 1))
    for row, line in enumerate(percents.tolist()):
        for column, percent in enumerate(line):
            if percent:
                axes.text(column, row, f'{percent:.1f}', ha='center', va='center', fontsize=8,
                          weight='bold' if row == column else 'normal')
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha='right')
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel('predicted class')
    axes.set_ylabel('class')
    accuracy = 100 * counts.trace().item() / len(records)
    axes.set_title(f'{title}: predictions in % of each class\n'
                   f'top-1 accuracy {accuracy:.2f} % of {len(records):,} test images', fontsize=10)
    return figure


def draw_mistakes(records, images, title):
    """Draws the misclassified images, the most confident first."""
    mistakes = sorted((record for record in records if record['class'] != record['labelled']),
                      key=lambda record: -record['probability_percent'])[:ROWS * COLUMNS]
    figure = Figure(figsize=(1.5 * COLUMNS, 1.9 * ROWS), dpi=120, layout='constrained')
    panels = [*figure.subplots(ROWS, COLUMNS).flat]
    for axes in panels:
        axes.axis('off')
    for axes, record in zip(panels, mistakes):
        index = torch.tensor([record['image']])
        pixels, _, _ = images[index, None, torch.tensor([0])]  # (1, C, S, S)
        axes.imshow(pixels[0].permute(1, 2, 0).numpy(), cmap='gray', interpolation='nearest')
        axes.set_title(f'"{record["labelled"]}", {record["probability_percent"]:.1f} %\n'
                       f'is: {record["class"]}', fontsize=8)
    figure.suptitle(f'{title}: most confident mistakes, predicted and true class')
    return figure


def draw_layers(records, title):
    """Draws alpha, beta and the ratio of the norms of W_hat's terms over the Dirac layers."""
    figure = Figure((11, 3.6), dpi=120, layout='constrained')
    panels = figure.subplots(1, len(LAYER_STATISTICS))
    for axes, (ylabel, value) in zip(panels, LAYER_STATISTICS.items()):
        draw_over_layers(axes, records, value, ylabel, **LAST_EPOCH)
    figure.suptitle(f'{title}: the identity in its layers')
    return figure


def parse_options(argv):
    parser = ArgumentParser(prog='experiments.visualize', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='folder of a run, checkpoint, .onnx, .safetensors or .pth '
                        'file')
    parser.add_argument('--dataset', choices=DATASETS, default='Folder',
                        help='dataset of the test images (default: %(default)s)')
    parser.add_argument('--dataroot', default='.', help='folder of its files (default: .)')
    parser.add_argument('--save', required=True, metavar='FOLDER', help='folder to write')
    return parser.parse_args(argv)


def main(argv=None):
    opt = parse_options(argv)
    with exit_on_error('experiments.visualize'):
        loaded = diracnets.load(opt.model)
        splits = load_test_splits(loaded, opt.dataset, opt.dataroot)
        model, save, title = fold(loaded.model), Path(opt.save), loaded.title
        records = predict(model, loaded.preprocess, splits.test, splits.classes)
        table = save / 'predictions.csv'
        new = table.with_suffix('.tmp')
        new.unlink(missing_ok=True)  # of a command that was killed
        append_results(records, new)
        new.replace(table)
        draw_confusion(records, splits.classes, title).savefig(save / 'confusion.png')
        draw_mistakes(records, splits.test, title).savefig(save / 'mistakes.png')
        convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        if convolutions:  # an ONNX file has none
            middle = len(convolutions) // 2
            plot_filters(convolutions[middle].weight, f'{title}, folded: convolution {middle + 1}'
                         ).savefig(save / 'filters.png', dpi=120)
        layers = layer_statistics(loaded.model.state_dict())
        if layers:
            draw_layers(layers, title).savefig(save / 'layers.png')
    print(f'{len(records):,} images predicted; figures in {save}')


if __name__ == '__main__':
    main()
