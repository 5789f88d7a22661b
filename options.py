"""What may be asked of train.py, checked before anything is read."""

import argparse
import json
import os

import data

DTYPES = ('float', 'bfloat16', 'double')
# what may differ when a run goes on; every other option changes its result
FREE_ON_RESUME = {
    'dataroot', 'epochs', 'evaluate', 'force', 'gpu_id', 'ngpu', 'nthread', 'resume', 'save',
    'save_every',
}  # fmt: skip


class Options(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f'{self.prog}: {message}\n')  # one line, without the usage


def at_least(least, kind):
    def read(text):
        number = kind(text)
        if not least <= number < float('inf'):
            raise argparse.ArgumentTypeError(f'{text!r}: expected a number of at least {least}')
        return number

    read.__name__ = kind.__name__  # for argparse's own message
    return read


def epoch_list(text):
    try:
        epochs = json.loads(text)
        if all(type(epoch) is int and epoch > 0 for epoch in epochs):
            return epochs
    except (TypeError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f'{text!r}: expected a list of epochs, such as [60,120,160]')


def folder(text):
    return os.path.expanduser(text)


def parse_options(argv=None):
    parser = Options(prog='train.py', description=__doc__.splitlines()[0])

    def add(*names, default, help, **kwargs):
        shown = '' if default in ('', False) else ' (default: %(default)s)'
        parser.add_argument(*names, default=default, help=help + shown, **kwargs)

    add('--model', default='diracnet', choices=['diracnet'], help='family of networks')
    add('--depth', default=16, type=int, help='layers: 6n + 4, or 18 and 34 on ImageNet')
    add('--width', default=1, type=at_least(0, float), help='factor on the numbers of channels')
    add('--dataset', default='CIFAR10', choices=data.DATASETS, help='what to train on')
    add('--dataroot', '--imagenetpath', default='.', type=folder, help='folder of its files')
    add('--image_size', default=32, type=at_least(8, int), help='pixels, for --dataset Folder')
    add('--randomcrop_pad', default=4, type=at_least(0, int), help='pixels, for small images')
    add('--dtype', default='float', choices=DTYPES, help='bfloat16 is autocast from float')
    add('--nthread', default=4, type=at_least(0, int), help='threads or processes that read images')
    add('--batch_size', '--batchSize', default=128, type=at_least(1, int), help='images in a step')
    add('--lr', default=0.1, type=at_least(0, float), help='learning rate at the start')
    add('--epochs', default=200, type=at_least(1, int), help='epochs in all, resumed ones counted')
    add('--weight_decay', '--weightDecay', default=5e-4, type=at_least(0, float),
        help='of tensors of two or more dimensions; none on alpha, beta, biases and batch norm')
    add('--epoch_step', default='[60,120,160]', type=epoch_list,
        help='epochs, counted from 1, at whose start the learning rate drops')
    add('--lr_decay_ratio', default=0.2, type=at_least(0, float), help='factor of such a drop')
    add('--resume', default='', type=folder,
        help='checkpoint, or its folder, to go on from; auto: that of --save, if there is one')
    add('--force', default=False, action='store_true',
        help='go on though options differ that change the result')
    add('--save_every', default=0, type=at_least(0, float),
        help='minutes between checkpoints within an epoch; 0: at its end only')
    add('--evaluate', default=False, action='store_true',
        help='test the --resume checkpoint and write nothing')
    add('--seed', default=1, type=at_least(0, int), help='of parameters, order and augmentation')
    add('--save', default='checkpoints', type=folder, help='folder for checkpoints and log')
    add('--gpu_id', default='', help='CUDA devices to use, such as 0; all if not given')
    add('--ngpu', default=1, type=at_least(1, int), help='number of GPUs; torchrun starts them')
    opt = parser.parse_args(argv)
    if opt.evaluate and not opt.resume:
        parser.error('--evaluate: expected --resume with a checkpoint to test')
    return opt


def differences(opt, before):
    """Lists the options that change a run's result and are not those it began with."""
    return [
        f'{name} was {before[name]}, is {value}'
        for name, value in vars(opt).items()
        if name not in FREE_ON_RESUME and name in before and before[name] != value
    ]
