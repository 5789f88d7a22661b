"""The command-line options of train.py, checked before torch is imported and data are read."""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

from cli import ArgumentParser
from diracnets.architectures import ACTIVATIONS, ARCHITECTURES, BLOCKS
from diracnets.preprocessing import DATASETS, MAX_SMALL, Preprocessing
from training.choices import FLIPS, MIN_PIXELS, OPTIMIZERS, SCHEDULES, available_cores

MAX_SIZE = 10_000  # of depth, width and the like: larger models would exhaust the memory
MAX_IMAGE_SIZE = 4096  # pixels per side: one input takes 200 MB
DTYPES = ('auto', 'float', 'bfloat16', 'double')
MAX_WORKERS = 8  # default limit: more workers hardly read faster
METAVARS = {'int': 'N', 'float': 'X', 'list': 'LIST'}  # by type
RECIPE_FOLDER = Path(__file__).parent.parent / 'recipes'
RECIPES = sorted(file.stem for file in RECIPE_FOLDER.glob('*.txt'))
NETWORKS_BY_SIZE = (f'images of up to {MAX_SMALL} pixels use the CIFAR networks, larger ones the '
                    'ImageNet networks')
MODEL_OPTIONS = sorted({name for row in ARCHITECTURES.values() for name in row.options})


# ---------------------------------------------------------------- types of values


def at_least(minimum, kind, maximum=2**31):
    """Returns an argparse type: a number of this kind (int or float) within the limits."""
    def parse(text):
        number = kind(text)
        if not minimum <= number <= maximum:
            limit = f' and at most {maximum}' * (number > maximum)
            raise argparse.ArgumentTypeError(
                f'{text!r}: expected a number of at least {minimum}{limit}')
        return number

    parse.__name__ = kind.__name__  # argparse names the type in its own messages
    return parse


def list_of(items, example, minimum):
    """Returns an argparse type: a JSON list of integers; `items` names them in error messages."""
    def parse(text):
        with contextlib.suppress(ValueError, RecursionError):
            numbers = json.loads(text)
            if isinstance(numbers, list) and all(type(n) is int and n >= minimum for n in numbers):
                return numbers
        raise argparse.ArgumentTypeError(f'{text!r}: expected a list of {items}, such as {example}')

    parse.__name__ = 'list'
    return parse


epoch_list = list_of('epochs', '[60,120,160]', 1)
size_list = list_of('sizes in pixels', '[20,24,28,32]', MIN_PIXELS)


def normalization(text):
    """Parses --normalize, as an argparse type: '', 'measured', or a list of means and stds."""
    if text in ('', 'measured'):
        return text
    with contextlib.suppress(ValueError, RecursionError):
        numbers = json.loads(text)
        if isinstance(numbers, list) and Preprocessing.for_dataset(
                'Folder', None, *mean_and_std(numbers)):
            return numbers
    raise argparse.ArgumentTypeError(
        f'{text!r}: expected measured, or a list with the mean, then the std of each channel, such '
        'as [0.5,0.5,0.5,0.2,0.2,0.2]'
    )


def mean_and_std(numbers):
    """Splits a list of --normalize into means and stds."""
    middle = len(numbers) // 2
    return numbers[:middle], numbers[middle:]


def default_flip(dataset):
    """Returns the default of --flip for a dataset."""
    return DATASETS.get(dataset, DATASETS['Folder']).flip


# ---------------------------------------------------------------- the parser


def make_parser():
    parser = ArgumentParser(
        prog='train.py', usage='%(prog)s [--dataset NAME] [--save FOLDER] [options]',
        description='Trains an image classifier, or evaluates a trained one (--evaluate). Writes '
                    'log.txt and checkpoints to the folder of --save.',
        epilog='For examples see the top of train.py and docs/training.md.',
    )
    _add_model_options(parser.add_argument_group('model'))
    _add_data_options(parser.add_argument_group('data and augmentation'))
    _add_training_options(parser.add_argument_group('training'))
    _add_run_options(parser.add_argument_group('run'))
    return parser


def _add(group, *names, default, help, **kwargs):
    """Adds an option, with its default at the end of its help unless it is empty or False."""
    if 'type' in kwargs:
        kwargs.setdefault('metavar', METAVARS.get(kwargs['type'].__name__))
    shown = '' if default in ('', None, argparse.SUPPRESS) or default is False else (
        ' (default: %(default)s)')
    help = help if help == argparse.SUPPRESS else help + shown
    # Python 3.10 adds defaults to the help of BooleanOptionalAction, too: set the help afterwards
    group.add_argument(*names, default=default, **kwargs).help = help


def _add_model_options(group):
    def add(name, help, **kwargs):  # without a default: each architecture has its own
        by_value = {}
        for architecture, row in ARCHITECTURES.items():
            if name in row.options:
                by_value.setdefault(str(row.options[name]), []).append(architecture)
        shown = '; '.join(f'{value} for {", ".join(names)}' for value, names in by_value.items())
        _add(group, f'--{name}', default=argparse.SUPPRESS, help=f'{help} (default: {shown})',
             **kwargs)

    both = [name for name, row in ARCHITECTURES.items() if len(row.datasets) == 3]
    small, large = ([name for name, row in ARCHITECTURES.items()
                     if name not in both and ('ImageNet' in row.datasets) == is_large]
                    for is_large in (False, True))
    _add(group, '--recipe', default='', choices=RECIPES,
         help='use the settings of recipes/NAME.txt; other options override them')
    _add(group, '--model', default=None, choices=ARCHITECTURES, metavar='NAME',
         help=f'architecture: {", ".join(both)}; only for images of up to {MAX_SMALL} pixels: '
              f'{", ".join(small)}; only for larger images: {", ".join(large)} (default: diracnet)')
    add('depth', f'depth as in the papers: 6n + 4, or 18 or 34 for images above {MAX_SMALL} pixels',
        type=at_least(1, int, MAX_SIZE))
    add('width', 'factor on the number of channels', type=at_least(0, float, MAX_SIZE))
    add('block', 'convolution in training: base (standard), or a block that folds into a standard '
                 'one: dbb (diverse branches), acb (asymmetric convolutions), repvgg (3x3, 1x1 and '
                 'identity), dirac',
        choices=BLOCKS)
    add('activation', 'activation function', choices=ACTIVATIONS)
    add('layers', 'number of layers', type=at_least(1, int, MAX_SIZE))
    add('growth', 'growth rate: channels that each layer adds', type=at_least(1, int, MAX_SIZE))
    add('reduce', 'compression: fraction of the channels that a transition layer keeps',
        type=at_least(0, float, 1))
    add('bottleneck', 'add a 1x1 convolution before each 3x3',
        action=argparse.BooleanOptionalAction)
    add('droprate', 'dropout probability, below 1', type=at_least(0, float, 1))
    add('checkpointing', 'recompute activations in the backward pass to save memory',
        action=argparse.BooleanOptionalAction)


def _add_data_options(group):
    add = functools.partial(_add, group)
    add('--dataset', default=None, choices=DATASETS,
        help='dataset; with --evaluate, by default that of the run (default: CIFAR10)')
    add('--dataroot', '--imagenetpath', default='.', metavar='PATH',
        help='folder of the dataset; ImageNet: with train/CLASS/ and val/CLASS/, Folder: with '
             'train/CLASS/ and test/CLASS/ or val/CLASS/; if both exist, val/ selects best.pt7')
    add('--image_size', default=None, type=at_least(MIN_PIXELS, int, MAX_IMAGE_SIZE),
        help='height and width of the inputs of a Folder, in pixels (default: 32); '
             f'{NETWORKS_BY_SIZE}')
    add('--crop', default=True, action=argparse.BooleanOptionalAction,
        help='random crops: of image files with --image_size above '
             f'{MAX_SMALL}, 8 to 100 %% of the area; of other images, after padding')
    add('--randomcrop_pad', default=4, type=at_least(0, int),
        help='padding before random crops, in pixels; not for image files with --image_size '
             f'above {MAX_SMALL}')
    add('--flip', default=None, choices=FLIPS,
        help='random flips: none, as for letters; horizontal; alternating: horizontal, each image '
             'in every second epoch; all: flips and rotations by 90 degrees, as for aerial images; '
             'none is the default of Digits (default: horizontal)')
    add('--cutout', default=0, type=at_least(0, int),
        help='side of the gray square that Cutout draws at a random position of each training '
             f'image, in pixels; 0: none; not for image files with --image_size above {MAX_SMALL}')
    add('--augment', default=True, action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    add('--grow', default='[]', type=size_list,
        help='progressive resizing: sizes of the training images, in pixels, such as '
             '[20,24,28,32], each for an equal part of the epochs')
    add('--normalize', '--normalise', default='', type=normalization, metavar='LIST',
        dest='normalise',  # in logs and checkpoints
        help='mean and std of the channels of images in [0, 1], [MEAN,...,STD,...], or measured: '
             'those of the training images (default: those of CIFAR-10, or of ImageNet above '
             f'{MAX_SMALL} pixels)')
    add('--whiten', default=False, action=argparse.BooleanOptionalAction,
        help='initialize the first convolution with whitening filters of the training patches and '
             'their negatives, and freeze it; with --pretrained only freeze the loaded filters')
    add('--balance', default=False, action=argparse.BooleanOptionalAction,
        help='sample the training images of each class equally often, with replacement: for class '
             'folders of different sizes')
    add('--val', default=0, type=at_least(0, int),
        help='number of training images to hold out for validation, whose accuracy, not that of '
             'the test set, then selects best.pt7')
    add('--check', default=True, action=argparse.BooleanOptionalAction,
        help=f'with --image_size above {MAX_SMALL}, check header and end of image files before '
             'training; smaller images are read into memory anyway')
    add('--skip_corrupt', default=False, action='store_true',
        help='skip corrupt image files; without this option the command lists them and exits')
    add('--nthread', default=min(available_cores(), MAX_WORKERS), type=at_least(0, int),
        help='number of DataLoader workers, and of threads that read or check image files')


def _add_training_options(group):
    add = functools.partial(_add, group)
    add('--epochs', default=200, type=at_least(1, int),
        help='total number of epochs, including those before a resume')
    add('--batch_size', '--batchSize', default=128, type=at_least(1, int),
        help='images per step, over all processes')
    add('--optimizer', default='sgd', choices=OPTIMIZERS,
        help='sgd, with momentum 0.9, or muon: Muon on the filters, AdamW on all other parameters')
    add('--lr', default=0.1, type=at_least(0, float, 1e38),
        help='maximum learning rate; with muon, that of the filters')
    add('--adam_lr', default=0.01, type=at_least(0, float, 1e38),
        help='maximum learning rate of AdamW, with muon')
    add('--lr_schedule', default='step', choices=SCHEDULES,
        help='learning rate over time: step: drops at the epochs of --epoch_step; cosine: falls to '
             '0 as a half cosine; onecycle: rises for 30 %% of the epochs, then falls, in half '
             'cosines; linear: rises for 20 %% of the epochs, then falls to 0')
    add('--epoch_step', default='[60,120,160]', type=epoch_list,
        help='epochs, counted from 1, at whose start the step schedule drops the learning rate')
    add('--lr_decay_ratio', default=0.2, type=at_least(0, float, 1),
        help='factor on the learning rate at each drop of the step schedule')
    add('--nesterov', default=False, action=argparse.BooleanOptionalAction,
        help='use Nesterov momentum in sgd (muon always does)')
    add('--weight_decay', '--weightDecay', default=5e-4, type=at_least(0, float),
        help='weight decay of sgd, on filters and matrices (diracnet-v1: on all parameters)')
    add('--label_smoothing', default=0, type=at_least(0, float), help='label smoothing, below 1')
    add('--clip_grad', default=0, type=at_least(0, float),
        help='maximum norm of the gradient of all parameters; 0: no limit')
    add('--ema', default=0, type=at_least(0, float, 1), metavar='DECAY',
        help='decay of an exponential moving average (EMA) of the weights, such as 0.999; the '
             'average is evaluated and exported, and a resumed run continues from the weights; '
             '0: no average')
    add('--freeze', default='none', choices=('none', 'stem', 'features'),
        help='freeze parameters and running statistics: stem: the first convolution and its batch '
             'norm; features: all layers but the last')
    add('--dtype', default='auto', choices=DTYPES,
        help='precision; bfloat16: autocast, with float32 parameters; auto: bfloat16 where the '
             'hardware supports it, else float')
    add('--deterministic', default=False, action='store_true',
        help='use deterministic CUDA kernels where they exist; the CPU is always deterministic')
    add('--compile', default='auto', nargs='?', const=True, choices=('auto',), metavar='auto',
        help='compile the model with torch.compile; auto: on a CUDA GPU, in one process')
    add('--no-compile', default=argparse.SUPPRESS, dest='compile', action='store_const',
        const=False, help='do not compile the model')
    add('--seed', default=1, type=at_least(0, int),
        help='seed of the parameters, the order of the images and the augmentation')


def _add_run_options(group):
    add = functools.partial(_add, group)
    add('--save', default='checkpoints', metavar='PATH', help='folder of checkpoints and log')
    add('--name', default='', metavar='NAME', help='short for --save runs/NAME')
    add('--save_every', default=0, type=at_least(0, float),
        help='minutes between checkpoints within an epoch; 0: only at the end of each epoch')
    add('--keep_every', default=0, type=at_least(0, int),
        help='epochs between permanent checkpoints, epoch-N.pt7; 0: none')
    add('--resume', default='', metavar='PATH',
        help='checkpoint, or its folder, to resume; auto: that of --save if it exists')
    add('--pretrained', default='', metavar='PATH',
        help='parameters to start from: a file, the folder of a run, or 18 or 34 for the weights '
             'that the authors published; a new last layer is initialized if the classes differ')
    add('--force', default=False, action='store_true',
        help='resume although options that change the result differ, or evaluate although class '
             'names differ, which are then matched by position')
    add('--evaluate', default=False, action='store_true',
        help='evaluate the model of --resume on the test set and write nothing; the checkpoint '
             'defines the architecture')
    add('--tensorboard', default=False, action='store_true',
        help='also write TensorBoard events to --save')
    add('--gpu_id', default='', metavar='LIST',
        help='indices of the visible CUDA devices, such as 0,1; a process uses one of them, so '
             'several need torchrun (default: all)')
    add('--ngpu', default=1, type=at_least(1, int), help=argparse.SUPPRESS)


def parse_options(argv, splits=None):
    """Parses a list of command-line arguments into a namespace of plain values.

    The namespace has the model options of the selected architecture only. splits: the DataSplits
    from Python to train on, if any. Any error exits with one line on stderr and status 2.
    """
    parser = make_parser()
    opt = parser.parse_args(argv)
    if opt.recipe:
        opt = _parse_with_recipe(parser, argv, opt.recipe, splits)
    if opt.evaluate and not opt.resume:
        parser.error('--evaluate: no model; use --resume with a checkpoint to evaluate')
    for name in ('pretrained', 'val'):
        if opt.evaluate and getattr(opt, name):
            parser.error(f'--{name} is for training; omit it, or --evaluate')
    if opt.skip_corrupt and not opt.check:
        parser.error('--no-check and --skip_corrupt contradict each other; use one of them')
    if opt.label_smoothing >= 1:
        parser.error(f'--label_smoothing {opt.label_smoothing}: expected less than 1')
    if opt.ema >= 1:
        parser.error(f'--ema {opt.ema}: expected less than 1')
    if opt.tensorboard and not importlib.util.find_spec('tensorboard'):
        parser.error('--tensorboard: the package is missing; pip install tensorboard')
    if not re.fullmatch(r'(\d+(,\d+)*)?', opt.gpu_id):
        parser.error(f'--gpu_id {opt.gpu_id!r}: expected device indices, such as 0 or 0,1')
    if opt.ngpu > 1 and 'LOCAL_RANK' not in os.environ:
        parser.error(f'--ngpu {opt.ngpu}: each GPU needs a process; use torchrun '
                     f'--nproc_per_node={opt.ngpu} train.py {shlex.join(argv)}')
    if opt.name and opt.save != parser.get_default('save'):
        parser.error('--name and --save both given; use one of them')
    if opt.name:
        opt.save = os.path.join('runs', opt.name)
    if not opt.save or not opt.evaluate and not _is_writable(opt.save):
        parser.error(f'--save {opt.save!r}: expected a writable folder')
    return _resolve_defaults(parser, opt, splits)


def _parse_with_recipe(parser, argv, recipe, splits):
    """Parses the options of a recipe, then `argv`, which overrides them.

    The dataset of the recipe is ignored if there are splits from Python.
    """
    words = shlex.split((RECIPE_FOLDER / f'{recipe}.txt').read_text(), comments=True)
    recipe_opt, argv_opt = parser.parse_args(words), parser.parse_args(argv)
    if splits:
        recipe_opt.dataset, recipe_opt.image_size = argv_opt.dataset, argv_opt.image_size
    opt = parser.parse_args(argv, argparse.Namespace(**vars(recipe_opt)))
    if opt.model != recipe_opt.model:  # depth and the like are those of the recipe's architecture
        sizes = ARCHITECTURES[recipe_opt.model].options.keys() - (
            {'block'} & ARCHITECTURES[opt.model].options.keys())
        for name in sizes & vars(opt).keys():
            if name not in argv_opt:
                delattr(opt, name)
    return opt


def _resolve_defaults(parser, opt, splits):
    """Checks options against each other and fills in the defaults of the architecture and data.

    With --evaluate these are in the checkpoint, and the namespace has the given ones only.
    """
    if splits and (opt.dataset or opt.image_size):
        parser.error('--dataset or --image_size, and data from Python; use one of them')
    if splits and not splits.train and not opt.evaluate:
        parser.error('no training images; add some, or use --evaluate')
    if opt.evaluate and opt.normalise == 'measured':
        parser.error('--normalize measured: not possible with --evaluate; use a list of numbers')
    if opt.evaluate:
        given = {name: value for name, value in vars(opt).items() if value is not None}
        return argparse.Namespace(**given)
    model = opt.model or 'diracnet'
    defaults = ARCHITECTURES[model].options
    unknown = [f'--{name}' for name in MODEL_OPTIONS if name in opt and name not in defaults]
    if unknown:
        allowed = ', '.join(f'--{name}' for name in defaults)
        parser.error(f'--model {model} has no {", ".join(unknown)}; its options are {allowed}')
    name = 'Folder' if splits else opt.dataset or 'CIFAR10'
    try:
        preprocess = Preprocessing.for_dataset(
            name, splits.test.shape[0] if splits else opt.image_size)
    except ValueError as error:
        parser.error(f'--{error}')
    _check_augmentation(parser, opt, preprocess.size, from_python=bool(splits))
    resolved = {**defaults, **vars(opt), 'model': model, 'dataset': name,
                'image_size': preprocess.size, 'flip': opt.flip or default_flip(name)}
    if splits:  # identifies the data when a run is resumed
        resolved['given'] = str(splits)
        if splits.test.shape[-1] != 3:
            resolved['normalise'] = opt.normalise or 'measured'
    return argparse.Namespace(**resolved)


def _check_augmentation(parser, opt, size, from_python):
    """Checks the augmentation of images whose inputs have `size` pixels per side."""
    if max(opt.grow, default=0) > size:
        parser.error(f'--grow {opt.grow}: expected at most the size of the images, {size}')
    if not opt.augment and opt.flip not in (None, 'none'):
        parser.error(f'--no-augment and --flip {opt.flip} contradict each other; use one of them')
    if opt.cutout and not opt.augment:
        parser.error(f'--no-augment and --cutout {opt.cutout} contradict each other; use one of '
                     'them')
    if opt.cutout and not from_python and size > MAX_SMALL:
        parser.error(f'--cutout {opt.cutout}: expected --image_size of at most '
                     f'{MAX_SMALL}, or images from Python')
    if opt.cutout >= size:
        parser.error(f'--cutout {opt.cutout}: expected less than the image, {size}')
    pads = opt.augment and opt.crop and (from_python or size <= MAX_SMALL)
    if pads and opt.randomcrop_pad >= size:
        parser.error(f'--randomcrop_pad {opt.randomcrop_pad}: expected less than the image, {size}')


def _is_writable(path):
    """Returns whether a path is a writable folder, or one can be created there."""
    path = Path(path).absolute()
    try:
        existing = next(p for p in (path, *path.parents) if p.exists())
        for part in (path, *path.parts):  # the file system may refuse the names to be created
            with contextlib.suppress(FileNotFoundError):
                os.lstat(existing / part)
    except (OSError, ValueError):
        return False
    return existing.is_dir() and os.access(existing, os.W_OK)


def model_options(opt):
    """Returns the options of the architecture; with --evaluate, the given ones."""
    return {name: value for name, value in vars(opt).items() if name in MODEL_OPTIONS}
