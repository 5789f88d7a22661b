"""What may be asked of train.py, checked before anything is read."""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

from cli import ArgumentParser
from diracnets.models.blocks import BLOCKS
from diracnets.models.diracnet_fast import ACTIVATIONS
from diracnets.models.registry import ARCHITECTURES
from diracnets.preprocessing import DATASETS, MAX_SMALL, Preprocessing
from training import data, distributed
from training.augmentation import FLIPS
from training.optimizers import OPTIMIZERS, SCHEDULES

MAX_SIZE = 10_000  # of what makes a network: an error is better than a machine that swaps
MAX_PIXELS_PER_SIDE = 4096  # of a side of the inputs: one image of 200 MB
DTYPES = ('auto', 'float', 'bfloat16', 'double')
MAX_WORKERS = 8  # by default; of more, each has little to do
METAVARS = {'int': 'N', 'float': 'X', 'expand_path': 'PATH', 'list': 'LIST'}  # by type, in --help
RECIPE_FOLDER = Path(__file__).parent.parent / 'recipes'
RECIPES = sorted(file.stem for file in RECIPE_FOLDER.glob('*.txt'))
NETWORKS_BY_SIZE = (f'images of up to {MAX_SMALL} pixels take the CIFAR networks, larger ones the '
                    'ImageNet networks')
MODEL_OPTIONS = sorted({name for row in ARCHITECTURES.values() for name in row.options})
# what may differ when a run goes on; every other option changes its result
FREE_ON_RESUME = {
    'checkpointing', 'dataroot', 'deterministic', 'epochs', 'evaluate', 'force', 'gpu_id',
    'keep_every', 'name', 'ngpu', 'nthread', 'pretrained', 'recipe', 'resume', 'save',
    'save_every', 'tensorboard',
}


def at_least(least, kind, most=2**31):
    def read(text):
        number = kind(text)
        if not least <= number <= most:
            expected = f'a number of at least {least}' + f' and at most {most}' * (number > most)
            raise argparse.ArgumentTypeError(f'{text!r}: expected {expected}')
        return number

    read.__name__ = kind.__name__  # for argparse's own message
    return read


def list_of(what, example, least):
    def read(text):
        with contextlib.suppress(ValueError, RecursionError):
            numbers = json.loads(text)
            if isinstance(numbers, list) and all(type(n) is int and n >= least for n in numbers):
                return numbers
        raise argparse.ArgumentTypeError(f'{text!r}: expected a list of {what}, such as {example}')

    read.__name__ = 'list'
    return read


epoch_list = list_of('epochs', '[60,120,160]', 1)
size_list = list_of('sizes in pixels', '[20,24,28,32]', data.MIN_PIXELS)


def normalization(text):
    if text in ('', 'measured'):
        return text
    with contextlib.suppress(ValueError, RecursionError):
        numbers = json.loads(text)
        if isinstance(numbers, list) and Preprocessing.for_dataset('Folder', None, *mean_and_std(numbers)):
            return numbers
    raise argparse.ArgumentTypeError(
        f'{text!r}: expected measured, or a list of the mean of each channel, then the deviation '
        'of each, such as [0.5,0.5,0.5,0.2,0.2,0.2]'
    )


def mean_and_std(numbers):
    """The two halves of a list of --normalise."""
    middle = len(numbers) // 2
    return numbers[:middle], numbers[middle:]


def expand_path(text):
    return os.path.expanduser(text)


def _families():
    small, large = ([name for name, row in ARCHITECTURES.items()
                     if ('ImageNet' in row.datasets) == large and len(row.datasets) < 3]
                    for large in (False, True))
    every = [name for name, row in ARCHITECTURES.items() if name not in small + large]
    return (f'family of networks: {", ".join(every)}; for images of up to {MAX_SMALL} pixels alone '
            f'{", ".join(small)}; above, {", ".join(large)} (default: diracnet)')


def make_parser():
    parser = ArgumentParser(
        prog='train.py', usage='%(prog)s [--dataset NAME] [--save FOLDER] [options]',
        description='Trains a network, or tests a trained one, with the figures of each epoch in '
                    'log.txt and its checkpoints in the folder of --save.',
        epilog='Examples stand at the top of train.py, and in docs/training.md.',
    )
    group = parser

    def add(*names, default, help, **kwargs):
        if 'type' in kwargs:
            kwargs.setdefault('metavar', METAVARS.get(kwargs['type'].__name__))
        silent = default in ('', None, argparse.SUPPRESS) or default is False
        shown = '' if silent else ' (default: %(default)s)'
        group.add_argument(*names, default=default, help=help + shown, **kwargs)

    def add_model(name, help, **kwargs):  # without a default: each family has its own
        families = {}
        for family, row in ARCHITECTURES.items():
            if name in row.options:
                families.setdefault(str(row.options[name]), []).append(family)
        own = '; '.join(f'{value} for {", ".join(names)}' for value, names in families.items())
        add(f'--{name}', default=argparse.SUPPRESS, help=f'{help} (default: {own})', **kwargs)

    group = parser.add_argument_group('the network')
    add('--recipe', default='', choices=RECIPES, help="a paper's settings; other flags given win")
    add('--model', default=None, choices=ARCHITECTURES, metavar='NAME', help=_families())
    add_model('depth', f'layers: 6n + 4 or, for images above {MAX_SMALL} pixels, 18 or 34',
              type=at_least(1, int, MAX_SIZE))
    add_model('width', 'factor on the numbers of channels', type=at_least(0, float, MAX_SIZE))
    add_model('block', 'what a convolution is in training: itself, or a diverse branch block or an '
                       'asymmetric one, which fold into it', choices=list(BLOCKS))
    add_model('activation', 'behind each convolution', choices=list(ACTIVATIONS))
    add_model('layers', 'of a DenseNet', type=at_least(1, int, MAX_SIZE))
    add_model('growth', 'channels that each layer of a DenseNet adds',
              type=at_least(1, int, MAX_SIZE))
    add_model('reduce', 'share of the channels that pass a transition', type=at_least(0, float, 1))
    add_model('bottleneck', 'a 1x1 convolution before each 3x3 of a DenseNet',
              action=argparse.BooleanOptionalAction)
    add_model('droprate', 'share of the activations that dropout zeroes, below 1',
              type=at_least(0, float, 1))
    add_model('checkpointing', 'compute layers again in the backward pass, to save memory',
              action=argparse.BooleanOptionalAction)

    group = parser.add_argument_group('the images')
    add('--dataset', default=None, choices=DATASETS,
        help='what to train on (default: CIFAR10) or, as that of the run, to test on')
    add('--dataroot', '--imagenetpath', default='.', type=expand_path,
        help='folder of its files; of ImageNet with train/ and val/, of a Folder with train/CLASS/ '
             'and test/CLASS/ or val/CLASS/')
    add('--image_size', default=None, type=at_least(data.MIN_PIXELS, int, MAX_PIXELS_PER_SIDE),
        help=f'pixels of a side, of a Folder (default: 32): {NETWORKS_BY_SIZE}')
    add('--randomcrop_pad', default=4, type=at_least(0, int), help='pixels, for small images')
    add('--grow', default='[]', type=size_list,
        help='sizes that the training images are shrunk to, each for an equal share of the epochs, '
             'such as [20,24,28,32]; []: whole')
    add('--whiten', default=False, action=argparse.BooleanOptionalAction,
        help='start the filters of the first convolution as those that whiten patches of the '
             'training images, with both signs, and keep them; with --pretrained keep the '
             "file's")
    add('--augment', default=True, action=argparse.BooleanOptionalAction,
        help='crop and flip the training images at random, as the next two say')
    add('--crop', default=True, action=argparse.BooleanOptionalAction,
        help='cut small images after padding by --randomcrop_pad, larger ones to 8 to 100 %% of '
             'their area')
    add('--flip', default=None, choices=FLIPS,
        help='none for what has a right side, as letters; all, upside down and by quarter turns '
             'too, for images from above; alternating: each image in every second epoch, for few '
             'epochs; of Digits none (default: horizontal)')
    add('--cutout', default=0, type=at_least(0, int),
        help='pixels of a side of the square that is made grey in each training image, at a random '
             'place; 0: none; not for files above 64')
    add('--normalise', default='', type=normalization,
        help='mean and deviation of the channels in [0, 1]: measured, of the training images, or a '
             'list [MEAN,...,STD,...] (default: of CIFAR-10 or, above 64 pixels, of ImageNet)')
    add('--val', default=0, type=at_least(0, int),
        help='training images to hold out; best.pt7 is then chosen by them, not by the test set')
    add('--nthread', default=min(distributed.available_cores(), MAX_WORKERS), type=at_least(0, int),
        help='threads or processes that read images')

    group = parser.add_argument_group('computing and learning')
    add('--dtype', default='auto', choices=DTYPES,
        help='bfloat16 is autocast from float; auto: bfloat16 where the hardware computes in it')
    add('--deterministic', default=False, action='store_true',
        help='have a GPU add in the same order each time, where it can; the CPU always does')
    add('--compile', default=False, action='store_true', help='run torch.compile on the network')
    add('--batch_size', '--batchSize', default=128, type=at_least(1, int),
        help='images in a step, of all processes together')
    add('--epochs', default=200, type=at_least(1, int), help='epochs in all, resumed ones counted')
    add('--optimizer', default='sgd', choices=OPTIMIZERS,
        help='muon: of the filters, whose step is made orthogonal, and which are scaled, so for '
             'those of W_hat or before a batch norm; AdamW has the rest')
    add('--lr', default=0.1, type=at_least(0, float, 1e38),
        help='learning rate, the highest; of muon that of the filters')
    add('--adam_lr', default=0.01, type=at_least(0, float, 1e38),
        help='that of the rest, with muon')
    add('--lr_schedule', default='step', choices=SCHEDULES,
        help='how it changes: in steps, to 0 as half a cosine, or up in 30 %% of the epochs and '
             'down after them, or up in 20 %% and down to 0 in straight lines')
    add('--epoch_step', default='[60,120,160]', type=epoch_list,
        help='epochs, counted from 1, at whose start the learning rate drops, in steps')
    add('--lr_decay_ratio', default=0.2, type=at_least(0, float, 1), help='factor of such a drop')
    add('--nesterov', default=False, action=argparse.BooleanOptionalAction,
        help="Nesterov's momentum")
    add('--weight_decay', '--weightDecay', default=5e-4, type=at_least(0, float),
        help='with sgd, of tensors of two or more dimensions; of all in families that decay all')
    add('--label_smoothing', default=0, type=at_least(0, float),
        help='share of each label that is spread over all classes in training, below 1')
    add('--seed', default=1, type=at_least(0, int), help='of parameters, order and augmentation')

    group = parser.add_argument_group('the run')
    add('--save', default='checkpoints', type=expand_path, help='folder for checkpoints and log')
    add('--name', default='', metavar='NAME', help='short for --save runs/NAME')
    add('--save_every', default=0, type=at_least(0, float),
        help='minutes between checkpoints within an epoch; 0: at its end only')
    add('--keep_every', default=0, type=at_least(0, int),
        help='epochs between checkpoints that stay, as epoch-N.pt7; 0: none')
    add('--resume', default='', type=expand_path,
        help='checkpoint, or its folder, to go on from; auto: that of --save, if there is one')
    add('--pretrained', default='', type=expand_path,
        help='parameters to start from: a file, a run, or 18 or 34 for the published ones; where '
             'the classes are others the last layer is a new one')
    add('--force', default=False, action='store_true',
        help='go on though options differ that change the result, or test on other class names')
    add('--evaluate', default=False, action='store_true',
        help='test the network of --resume, whose sizes its file knows, and write nothing')
    add('--tensorboard', default=False, action='store_true',
        help='write the figures for TensorBoard into --save too')
    add('--gpu_id', default='', metavar='LIST',
        help='CUDA devices to use, such as 0; all if not given')
    add('--ngpu', default=1, type=at_least(1, int), help='number of GPUs; torchrun starts them')
    return parser


def _with_recipe(parser, argv, recipe):
    """Parses the flags of a recipe, then those given, which win."""
    flags = shlex.split((RECIPE_FOLDER / f'{recipe}.txt').read_text(), comments=True)
    of_recipe, given = parser.parse_args(flags), parser.parse_args(argv)
    opt = parser.parse_args(argv, argparse.Namespace(**vars(of_recipe)))
    if opt.model != of_recipe.model:  # the sizes are those of the recipe's own network
        other = ARCHITECTURES[of_recipe.model or 'diracnet'].options.keys() - (
            {'block'} & ARCHITECTURES[opt.model].options.keys())
        for name in other & vars(opt).keys():
            if name not in given:
                delattr(opt, name)
    return opt


def _with_sizes(parser, opt, sets):
    """Fills in what is not given of the network and its inputs, by the `sets` if there are some.

    With --evaluate they are the file's to tell: what is not given stays unsaid.
    """
    if sets and (opt.dataset or opt.image_size):
        parser.error('--dataset or --image_size, and data from Python: expected one of them')
    if sets and not sets.train and not opt.evaluate:
        parser.error('no training images: expected some, or --evaluate')
    if opt.evaluate and opt.normalise == 'measured':
        parser.error('--normalise measured with --evaluate: expected its numbers, or none')
    if opt.evaluate:
        given = {name: value for name, value in vars(opt).items() if value is not None}
        return argparse.Namespace(**given)
    model = opt.model or 'diracnet'
    family = ARCHITECTURES[model].options
    unknown = [f'--{name}' for name in MODEL_OPTIONS if name in opt and name not in family]
    if unknown:
        taken = ', '.join(f'--{name}' for name in family)
        parser.error(f'--model {model} takes no {", ".join(unknown)}: expected of {taken}')
    name = 'Folder' if sets else opt.dataset or 'CIFAR10'
    try:
        inputs = Preprocessing.for_dataset(name, sets.test.shape[0] if sets else opt.image_size)
    except ValueError as error:
        parser.error(f'--{error}')
    if max(opt.grow, default=0) > inputs.size:
        parser.error(f'--grow {opt.grow}: expected at most the whole size, {inputs.size}')
    if not opt.augment and opt.flip not in (None, 'none'):
        parser.error(f'--no-augment and --flip {opt.flip} both given: expected one of them')
    if opt.cutout and (not sets and inputs.size > MAX_SMALL or not opt.augment):
        parser.error(f'--cutout {opt.cutout}: expected files of up to {MAX_SMALL} pixels, or '
                     'images from Python, augmented')
    if opt.cutout >= inputs.size:
        parser.error(f'--cutout {opt.cutout}: expected less than the image, {inputs.size}')
    if inputs.size <= MAX_SMALL and opt.randomcrop_pad >= inputs.size:
        parser.error(f'--randomcrop_pad {opt.randomcrop_pad}: expected less than the image, '
                     f'{inputs.size}')
    filled_in = {**family, **vars(opt), 'model': model, 'dataset': name, 'image_size': inputs.size,
                 'flip': opt.flip or data.default_flip(name)}
    if sets:  # what a run that goes on can know them by
        filled_in['given'] = str(sets)
        if sets.test.shape[-1] != 3:
            filled_in['normalise'] = opt.normalise or 'measured'
    return argparse.Namespace(**filled_in)


def parse_options(argv, sets=None):
    """Parses a list of flags: a namespace of plain values, with those of the model's family only.

    sets: the Data that are given beside them, if they are. Anything wrong ends the process with one
    line on stderr and status 2.
    """
    parser = make_parser()
    opt = parser.parse_args(argv)
    if opt.recipe:
        opt = _with_recipe(parser, argv, opt.recipe)
    if opt.evaluate and not opt.resume:
        parser.error('--evaluate: expected --resume with a checkpoint to test')
    if opt.label_smoothing >= 1:
        parser.error(f'--label_smoothing {opt.label_smoothing}: expected less than 1')
    if opt.tensorboard and not importlib.util.find_spec('tensorboard'):
        parser.error('--tensorboard: expected the package: pip install tensorboard')
    if not re.fullmatch(r'(\d+(,\d+)*)?', opt.gpu_id):
        parser.error(f'--gpu_id {opt.gpu_id!r}: expected numbers of devices, such as 0 or 0,1')
    if opt.ngpu > 1 and 'LOCAL_RANK' not in os.environ:
        parser.error(f'--ngpu {opt.ngpu}: start it as: torchrun --nproc_per_node={opt.ngpu} '
                     f'train.py {shlex.join(argv)}')
    if opt.name and opt.save != parser.get_default('save'):
        parser.error('--name and --save both given: expected one of them')
    if opt.name:
        opt.save = os.path.join('runs', opt.name)
    if not opt.save or not opt.evaluate and not _can_be_made(opt.save):
        parser.error(f'--save {opt.save!r}: expected a folder that can be written')
    return _with_sizes(parser, opt, sets)


def _can_be_made(path):
    path = Path(path).absolute()
    try:
        there = next(p for p in (path, *path.parents) if p.exists())
        for part in (path, *path.parts):  # does the file system take the names of those to come?
            with contextlib.suppress(FileNotFoundError):
                os.lstat(there / part)
    except (OSError, ValueError):
        return False
    return there.is_dir() and os.access(there, os.W_OK)


def model_options(opt):
    """The options that size the network, of its family; with --evaluate, those that are given."""
    return {name: value for name, value in vars(opt).items() if name in MODEL_OPTIONS}


def changed_options(now, before):
    """Lists the options that change a run's result and are not those it began with.

    now, before: what a checkpoint of either has as `args`.
    """
    free = set(FREE_ON_RESUME)
    if now['lr_schedule'] != 'step' or now['grow']:
        free -= {'epochs'}  # the other schedules, and images that grow, stretch over all of them
    if 'dataset' in before:  # what older ones do not say, or say otherwise
        older = {'crop': True, 'flip': data.default_flip(before['dataset']), 'normalise': '',
                 'optimizer': 'sgd', 'grow': [], 'whiten': False, 'cutout': 0}
        before = {**older, **before, 'image_size': Preprocessing.from_args(before).size}
        # data from Python is told by one side alone where the other has a data set by name
        now, before = ({**args, 'given': args.get('given')} for args in (now, before))
    return [
        f'{name} was {before[name]}, is {value}'
        for name, value in now.items()
        if name not in free and name in before and before[name] != value
    ]
