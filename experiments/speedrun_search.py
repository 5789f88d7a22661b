"""Trains changes of the speed-run recipe and of its model, each with the same seeds.

    python -m experiments.speedrun_search --dataroot ../cifar10-jpeg
    python -m experiments.speedrun_search --dataroot ../cifar10-jpeg --only recipe ReLU --seeds 1 2

A run is a proxy for the recipe: four epochs, with images of 20 to 32 pixels, which take 37 % of the
multiply-adds. Results are appended to logs/speedrun/search.csv, finished runs skipped.
Without a change, the loop gives the same parameters as train.py. It is separate because train.py
has no options for changes that did not help.
"""

import argparse
import fnmatch
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from cli import ArgumentParser, exit_on_error, say
from diracnets.models import diracnet_fast
from diracnets.models.registry import count_multiply_adds
from diracnets.preprocessing import Preprocessing
from experiments.definitions import command_line
from experiments.results import ROOT, append_results, environment, read_csv
from training.augmentation import progressive_sizes
from training.compute import Forward, cross_entropy, keep_freed_memory
from training.data import load_splits
from training.evaluation import compute_logits
from training.loader import BatchSampler
from training.optimizers import WARM_UP, lr_factor, make_average, make_optimizer, set_learning_rate
from training.options import parse_options
from training.setup import build_model

PROXY = {'epochs': 4, 'grow': '[20,24,28,32]'}


@dataclass(frozen=True)
class Change:
    """Options of train.py, and changes that train.py has no options for."""

    options: dict = field(default_factory=dict)
    final_lr: float = 0.0  # fraction of the maximum learning rate
    channels: tuple = diracnet_fast.CHANNELS
    convolutions: tuple = diracnet_fast.CONVOLUTIONS
    fixed: tuple = ()  # parameters of DiracConv2d that keep their initial value: alpha, beta
    final_smoothing: float | None = None  # at the end, linear over the epochs; None: constant
    recalibration_batches: int = 0  # that set the statistics of batch norm after training
    hard_epochs: tuple = ()  # train on the half of the images with the largest last loss
    freeze_from: float = 1.0  # fraction of the epochs after which the first group is frozen


CHANGES = {
    'recipe': Change(),
    'Dirac initialization only': Change({'block': 'base'}),
    'fixed alpha and beta': Change(fixed=('alpha', 'beta')),
    'ReLU': Change({'activation': 'relu'}),
    'hardswish': Change({'activation': 'hardswish'}),
    'groups of 2, 3, 3 convolutions, 64, 192, 256 channels': Change(
        channels=(64, 192, 256), convolutions=(2, 3, 3)),
    '20 to 28 pixels': Change({'grow': '[20,24,28,28]'}),
    'shifts of 4 pixels, EMA 0.95': Change({'randomcrop_pad': 4, 'ema': 0.95}),
    'hard half in epoch 4': Change(hard_epochs=(4,)),
    'first group frozen in the last quarter': Change(freeze_from=0.75),
    'final learning rate 7 %, EMA 0.95': Change({'ema': 0.95}, final_lr=0.07),
    'final learning rate 15 %, EMA 0.97': Change({'ema': 0.97}, final_lr=0.15),
    'cosine schedule': Change({'lr_schedule': 'cosine'}),
    'label smoothing 0.2 to 0': Change(final_smoothing=0.0),
    'batch norm recalibrated on 50 batches': Change(recalibration_batches=50),
}


def learning_rate(opt, change, done):
    """Returns the learning rate as a fraction of its maximum after `done` epochs, a float."""
    factor = lr_factor(opt, done)
    rising = done < WARM_UP * opt.epochs
    return factor if rising else change.final_lr + (1 - change.final_lr) * factor


def label_smoothing(opt, change, done):
    """Returns the label smoothing after `done` epochs."""
    if change.final_smoothing is None:
        return opt.label_smoothing
    return opt.label_smoothing + (change.final_smoothing - opt.label_smoothing) * done / opt.epochs


def batches_of(sampler, epoch, losses, change):
    """Returns [(indices, seed)] of the batches of an epoch; losses: the last one of each image."""
    sampler.set_epoch(epoch)
    indices, seeds, _ = zip(*sampler)
    if epoch not in change.hard_epochs:
        return [*zip(map(torch.from_numpy, indices), seeds)]
    order, hard = torch.cat([*map(torch.from_numpy, indices)]), losses > losses.median()
    return [*zip(order[hard[order]].split(sampler.batch_size), seeds)]


def make_model(opt, change, splits, forward):
    """Returns the model of the recipe with the architecture and fixed parameters of a change."""
    with mock.patch.multiple(
            diracnet_fast, CHANNELS=change.channels, CONVOLUTIONS=change.convolutions):
        model = build_model(opt, splits, forward)
    for name, parameter in model.named_parameters():
        if name.rpartition('.')[2] in change.fixed:
            parameter.requires_grad_(False)
    return model


@torch.no_grad()
def recalibrate(model, batches, forward, size):
    """Sets the running statistics of batch norm to the means of those of uint8 batches."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
    model.train()
    for images in batches:
        forward(model, images, size)


def train(opt, change, splits, forward):
    """Trains the model of one seed; returns (model, record)."""
    model = make_model(opt, change, splits, forward)
    optimizer, average = make_optimizer(model, opt), make_average(model, opt.ema)
    sampler = BatchSampler(len(splits.train), opt.batch_size, opt.seed)
    losses = torch.zeros(len(splits.train))
    sizes = progressive_sizes(forward.preprocess.size, opt.grow, opt.epochs)
    seconds = multiply_adds = 0
    for epoch, size in enumerate(sizes, 1):
        start, images_seen, correct = time.process_time(), 0, 0
        batches = batches_of(sampler, epoch, losses, change)
        model.train()  # counting multiply-adds sets evaluation mode
        for step, (indices, seed) in enumerate(batches):
            done = epoch - 1 + step / len(batches)
            if done >= change.freeze_from * opt.epochs:
                model.features.group0.requires_grad_(False)
            set_learning_rate(optimizer, learning_rate(opt, change, done))
            images, labels, n = splits.train[indices, seed, range(len(indices))]
            logits = forward(model, images, size)
            optimizer.zero_grad()
            cross_entropy(logits, labels, n, label_smoothing(opt, change, done)).backward()
            optimizer.step()
            if average:
                average.update_parameters(model)
            losses[indices] = F.cross_entropy(logits.detach(), labels, reduction='none')
            correct += (logits.argmax(1) == labels).sum().item()
            images_seen += n
        seconds += time.process_time() - start
        multiply_adds += 3 * images_seen * count_multiply_adds(model, size)
    model = average.module if average else model
    if change.recalibration_batches:
        last = batches[:change.recalibration_batches]
        recalibrate(model, (splits.train[indices, seed, range(len(indices))][0]
                            for indices, seed in last), forward, size)
    return model, {'train_acc_percent': round(100 * correct / images_seen, 2),
                   'multiply_adds': multiply_adds, 'train_cpu_seconds': round(seconds, 1)}


def test(model, forward, images):
    """Returns the accuracy and the loss on a test set."""
    with torch.autocast('cpu', torch.bfloat16, enabled=forward.dtype == 'bfloat16'):
        logits, labels = compute_logits(model.eval(), images, forward.preprocess, 'test', 500)
    accuracy = (logits.argmax(1) == labels).double().mean()
    return {'test_acc_percent': round(100 * accuracy.item(), 2),
            'test_loss': round(F.cross_entropy(logits.float(), labels).item(), 5)}


def main(argv=None):
    parser = ArgumentParser(prog='experiments.speedrun_search', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--dataroot', default='.', help='folder of the images: train/CLASS and test/CLASS')
    add('--only', default=['*'], nargs='+', metavar='PATTERN', help='train only these changes')
    add('--seeds', default=[1, 2, 3, 4, 5], type=int, nargs='+', help='seeds of each change')
    add('--results', default=ROOT / 'logs/speedrun/search.csv', type=Path, help='CSV file')
    args = parser.parse_args(argv)
    changes = {name: change for name, change in CHANGES.items()
               if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.only)}
    if not changes:
        parser.error(f'--only {" ".join(args.only)}: no change matches; use one of '
                     + '; '.join(CHANGES))
    keep_freed_memory()
    with exit_on_error('experiments.speedrun_search'):
        forward = Forward(Preprocessing.for_dataset('Folder'), 'bfloat16', torch.device('cpu'))
        splits = load_splits('Folder', args.dataroot, forward.preprocess, nthread=2)
        for seed in args.seeds:
            for name, change in changes.items():
                done = {(record['change'], record['seed']) for record in read_csv(args.results)}
                if (name, str(seed)) in done:
                    continue
                opt = parse_options(['--recipe', 'speedrun', '--seed', f'{seed}',
                                     *command_line({**PROXY, **change.options})])
                augmented = splits.augmented(pad=opt.randomcrop_pad, flip=opt.flip,
                                             cutout=opt.cutout)
                model, record = train(opt, change, augmented, forward)
                record = {'change': name, 'seed': seed, 'epochs': opt.epochs,
                          **test(model, forward, splits.test), **record, **environment()}
                append_results([record], args.results)
                say(f'{name}, seed {seed}: {record["test_acc_percent"]:.2f} %')


if __name__ == '__main__':
    main()
