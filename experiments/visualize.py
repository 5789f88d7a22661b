"""Draws what a trained network sees: what it confuses, its surest mistakes, filters, its layers.

    python -m experiments.seen logs/diracnet-28-2 --dataset Folder --dataroot ../cifar10-jpeg \\
        --save logs/diracnet-28-2/seen

Writes, into the folder of --save, predictions.csv with a row for each test image; from it
confusion.png, and with the images mistakes.png; filters.png, of the layer in the middle of the
folded network; and, of a DiracNet that is not folded, layers.png: how near the identity each is.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import diracnets
from cli import ArgumentParser, exit_on_error
from diracnets.fold import fold
from diracnets.preprocessing import normalize
from experiments.figures import AT_THE_END, over_layers
from experiments.interleaved import append
from experiments.layers import SHOWN, layers_of
from plot import plot_filters
from training import data
from training.loader import iterate_batches, make_loader
from training.options import DATASETS

ROWS, COLUMNS = 4, 8  # of the sheet of mistakes


@torch.inference_mode()
def predictions(network, inputs, images, classes):
    """A row for each image: its number, its class, the network's, and how sure it is of it."""
    rows = []
    for pixels, labels, _ in iterate_batches(make_loader(images, 500)):
        sure, labelled = network(normalize(pixels, inputs)).softmax(1).max(1)
        rows += [
            {'image': len(rows) + i, 'class': classes[label], 'labelled': classes[guess],
             'probability_percent': round(100 * p, 3)}
            for i, (label, guess, p) in enumerate(zip(labels.tolist(), labelled.tolist(),
                                                      sure.tolist()))
        ]
    return rows


def confusion(rows, classes):
    """Counts (class, labelled as), int64 (C, C)."""
    number = {name: i for i, name in enumerate(classes)}
    counts = torch.zeros(len(classes), len(classes), dtype=torch.long)
    for row in rows:
        counts[number[row['class']], number[row['labelled']]] += 1
    return counts


def draw_confusion(rows, classes, title):
    """The shares of each class that are labelled as each, in per cent; the number says them."""
    counts = confusion(rows, classes)
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    size = 2.5 + 0.55 * len(classes)
    figure = Figure(figsize=(size, size), dpi=120, layout='constrained')
    axes = figure.subplots()
    wrong = shares.masked_fill(torch.eye(len(classes), dtype=torch.bool), 0)
    axes.imshow(wrong.numpy(), cmap='Greys', vmin=0, vmax=max(2 * wrong.max().item(), 1))
    for row, line in enumerate(shares.tolist()):
        for column, share in enumerate(line):
            if share:
                axes.text(column, row, f'{share:.1f}', ha='center', va='center', fontsize=8,
                          weight='bold' if row == column else 'normal')
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha='right')
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel('labelled as')
    axes.set_ylabel('class')
    right = counts.trace().item()
    axes.set_title(f'{title}: % of a class labelled as each\n'
                   f'{right} of {len(rows)} test images right, {100 * right / len(rows):.2f} %',
                   fontsize=10)
    return figure


def draw_mistakes(rows, images, title):
    """The images that are labelled wrongly, the surest first."""
    wrong = sorted((row for row in rows if row['class'] != row['labelled']),
                   key=lambda row: -row['probability_percent'])[:ROWS * COLUMNS]
    figure = Figure(figsize=(1.5 * COLUMNS, 1.9 * ROWS), dpi=120, layout='constrained')
    panels = [*figure.subplots(ROWS, COLUMNS).flat]
    for axes in panels:
        axes.axis('off')
    for axes, row in zip(panels, wrong):
        number = torch.tensor([row['image']])
        pixels, _, _ = images[number, None, torch.tensor([0])]  # (1, C, S, S)
        axes.imshow(pixels[0].permute(1, 2, 0).numpy(), cmap='gray', interpolation='nearest')
        axes.set_title(f'"{row["labelled"]}", {row["probability_percent"]:.1f} %\n'
                       f'is: {row["class"]}', fontsize=8)
    figure.suptitle(f'{title}: its surest mistakes, what it takes them for and what they are')
    return figure


def middle_filters(network):
    """The number of the convolution in the middle of a folded chain, and its weight."""
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    number = len(convolutions) // 2
    return number + 1, convolutions[number].weight.detach()


def draw_layers(rows, title):
    """Alpha, beta and the ratio of the norms of W_hat's two parts over the Dirac layers."""
    figure = Figure((11, 3.6), dpi=120, layout='constrained')
    for axes, (label, value) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items()):
        over_layers(axes, rows, value, label, **AT_THE_END)
    figure.suptitle(f'{title}: the identity in its layers')
    return figure


def parse_options(argv):
    parser = ArgumentParser(prog='experiments.seen', description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='checkpoint, folder of a run, or an exported file')
    parser.add_argument('--dataset', choices=DATASETS, default='Folder',
                        help='whose test images (default: %(default)s)')
    parser.add_argument('--dataroot', default='.', help='folder of its files (default: .)')
    parser.add_argument('--save', required=True, metavar='FOLDER', help='where to write')
    return parser.parse_args(argv)


def main(argv=None):
    opt = parse_options(argv)
    with exit_on_error('experiments.seen', (ValueError, OSError)):
        trained = diracnets.load(opt.model)
        sets = data.load_splits(opt.dataset, opt.dataroot, trained.preprocess, training=False)
        folded, save = fold(trained.model), Path(opt.save)
        rows = predictions(folded, trained.preprocess, sets.test, sets.classes)
        table = save / 'predictions.csv'
        new = table.with_suffix('.tmp')
        new.unlink(missing_ok=True)  # of a command that was killed
        append(rows, new)
        new.replace(table)
        draw_confusion(rows, sets.classes, trained.title).savefig(save / 'confusion.png')
        draw_mistakes(rows, sets.test, trained.title).savefig(save / 'mistakes.png')
        number, weight = middle_filters(folded)
        title = f'{trained.title}, folded: convolution {number}'
        plot_filters(weight, title).savefig(save / 'filters.png', dpi=120)
        layers = layers_of(trained.model.state_dict())
        if layers:
            draw_layers(layers, trained.title).savefig(save / 'layers.png')
    print(f'{len(rows)} images labelled; drawn in {save}')


if __name__ == '__main__':
    main()
