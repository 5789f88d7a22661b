"""Setup from the options: a new or resumed Run, or a model and its test images."""

import functools
import os
import random

import numpy as np
import torch
import torch.distributed as dist

import diracnets
from cli import say
from diracnets.architectures import ARCHITECTURES
from diracnets.class_names import match_classes
from diracnets.preprocessing import DATASETS, Preprocessing, normalize
from training import checkpoint, data, distributed, options
from training.compilation import choose_compile
from training.compute import Forward, choose_dtype, param_dtype
from training.distributed import all_reduce, rank, world_size
from training.freezing import freeze
from training.log import truncate_log
from training.optimizers import make_average, make_optimizer
from training.pretrained import load_pretrained
from training.resuming import check_files, check_options, find_checkpoint, match_saved_classes
from training.run import Run
from training.tensorboard import TensorBoardWriter
from training.whitening import PIXELS, whiten


def prepare_folder(run):
    """Creates, locks and prepares --save; raises ValueError if another run uses it."""
    folder = run.opt.save
    os.makedirs(folder, exist_ok=True)
    run.lock.acquire()
    run.lock.check()
    if not run.epoch and not run.step:
        find_checkpoint(run.opt)  # another run may have written there in the meantime
    checkpoint.quarantine(folder)
    truncate_log(folder, run.epoch)


def check_ranks_agree(run):
    """Raises ValueError if ranks start at different steps, as from different checkpoints."""
    first, last = (all_reduce([run.epoch, run.step], op)
                   for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if first != last:
        raise ValueError(f'{run.opt.save}: this rank has finished {run.epoch} epochs and {run.step}'
                         ' steps, another rank a different number; use one --save that all share')


def load_named_splits(opt, name, preprocess, **more):
    """Loads a dataset by name; one rank of each machine downloads it before the others read it."""
    load = functools.partial(data.load_splits, name, opt.dataroot, preprocess, opt.nthread,
                             check=opt.check, skip_corrupt=opt.skip_corrupt, **more)
    return distributed.rank_zero_first(load) if name.startswith('CIFAR') else load()


def load_training_splits(opt, splits, preprocess):
    """Loads the splits that the options name, or takes those from Python, with augmentation."""
    augmentation = {
        'crop': opt.augment and opt.crop, 'pad': opt.randomcrop_pad,
        'flip': opt.flip if opt.augment else 'none', 'cutout': opt.cutout,
        'reflect': ARCHITECTURES[opt.model].crop_padding == 'reflect',
    }
    splits = (splits.augmented(**augmentation) if splits
              else load_named_splits(opt, opt.dataset, preprocess, use_val=not opt.val,
                                     **augmentation))
    if opt.val:
        splits.train, splits.val = data.hold_out(splits.train, opt.val)
    return splits


def resolve_normalization(preprocess, opt, images, saved_args):
    """Returns the Preprocessing with the mean and std of --normalize, given or measured.

    saved_args: the options of a resumed run, with the measured values. Raises ValueError if the
    number of channels is not that of the images.
    """
    measured = saved_args.get('normalise') == 'measured' and {'mean', 'std'} <= saved_args.keys()
    if opt.normalise == 'measured' and measured:
        mean, std = saved_args['mean'], saved_args['std']
    elif opt.normalise == 'measured':
        mean, std = data.measure_normalization(images, opt.nthread)
    elif opt.normalise:
        mean, std = options.mean_and_std(opt.normalise)
    else:
        mean, std = preprocess.mean, preprocess.std
    preprocess = Preprocessing.for_dataset(opt.dataset, opt.image_size, mean, std)
    if preprocess.channels != images.shape[-1]:
        raise ValueError(f'--normalize of {preprocess.channels} channels: expected '
                         f'{images.shape[-1]}, as the images have')
    return preprocess


def _smallest_image_and_model(opt, preprocess):
    """Returns the smallest training image and the model, both on the meta device."""
    size = min([preprocess.size, *opt.grow])
    with torch.device('meta'):
        model = diracnets.create_model(opt.model, preprocess.kind, **options.model_options(opt))
        return torch.empty(1, 3, size, size), model


def check_model_options(opt, preprocess):
    """Raises ValueError for sizes that the architecture does not have, before data are read."""
    try:
        image, model = _smallest_image_and_model(opt, preprocess)
    except ValueError as error:
        if opt.dataset != 'Folder' and preprocess.kind in ARCHITECTURES[opt.model].datasets:
            raise  # the size of the images is not the reason
        context = f'image_size {preprocess.size}: {options.NETWORKS_BY_SIZE}'
        raise ValueError(f'{error} ({context})') from error
    size = image.shape[-1]
    if size >= DATASETS[preprocess.kind].size:
        return
    try:
        model.eval()(image)
    except RuntimeError as error:
        raise ValueError(f'images of {size} pixels are too small for {opt.model}; use larger ones '
                         f'({str(error).splitlines()[0]})') from error


def check_batches_of_one(opt, preprocess, n):
    """Raises ValueError if a batch of one of n images leaves batch norm one value per channel.

    The last batch may have a single image, and its feature maps in the last layers a single pixel.
    """
    batches = {min(opt.batch_size, n), n % opt.batch_size} - {0}
    parts = [part for batch in batches for part in torch.arange(batch).tensor_split(world_size())]
    if all(len(part) != 1 for part in parts):
        return
    image, model = _smallest_image_and_model(opt, preprocess)
    try:
        model.train()(image)
    except ValueError as error:
        raise ValueError(f'--batch_size {opt.batch_size}: leaves a batch of one of the {n} images, '
                         f'too few for batch norm at {image.shape[-1]} pixels; use another batch '
                         'size') from error


def build_model(opt, splits, forward):
    """Creates the model on its device, initialized by --seed and --whiten."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(opt.seed)
    preprocess = forward.preprocess
    try:
        model = diracnets.create_model(
            opt.model, preprocess.kind, len(splits.classes), preprocess.channels,
            **options.model_options(opt),
        ).to(forward.device, param_dtype(forward.dtype))
    except RuntimeError as error:  # out of memory
        raise ValueError(f'the model cannot be built: {str(error).splitlines()[0]}') from error
    torch.manual_seed(opt.seed + rank())  # same parameters, different dropout on each rank
    if opt.whiten:
        n = min(len(splits.train), max(1, PIXELS // preprocess.size**2))
        whiten(model, normalize(data.sample_evenly(splits.train, n).cpu(), preprocess))
    return model


def prepare(opt, device, lock, splits=None):
    """Starts a run, or resumes the one in a checkpoint; returns a Run.

    lock: lock of --save, acquired before its files are read; splits: DataSplits from Python, in
    place of --dataset. Raises ValueError or OSError.
    """
    preprocess = Preprocessing.for_dataset(opt.dataset, opt.image_size)
    check_model_options(opt, preprocess)
    if rank() == 0 and os.path.isdir(opt.save):
        lock.acquire()
    path = find_checkpoint(opt)
    state = checkpoint.load(path) if path else {'args': {}}
    dtype = choose_dtype(opt.dtype, device, state['args'])
    opt.compile = choose_compile(opt.compile, device, opt.deterministic)
    if path:
        check_options(opt, dtype, state['args'], path)
    if rank() == 0 and opt.lr_schedule == 'step' and min(opt.epoch_step, default=0) > opt.epochs:
        say(f'--epoch_step {opt.epoch_step}: no drop in {opt.epochs} epochs, the learning rate '
            f'stays {opt.lr:g}; use earlier epochs, or --lr_schedule cosine')
    splits = load_training_splits(opt, splits, preprocess)
    if splits.files:  # of class folders
        check_files(splits.files, opt, state['args'], path)
        opt.files = splits.files
    splits = match_saved_classes(splits, state.get('classes') or [])
    preprocess = resolve_normalization(preprocess, opt, splits.train, state['args'])
    check_batches_of_one(opt, preprocess, len(splits.train))
    forward = Forward(preprocess, dtype, device)
    splits = splits.to(device)
    model = build_model(opt, splits, forward)
    if opt.pretrained and not path:
        load_pretrained(model, opt, preprocess, splits.classes)
    elif opt.freeze != 'none' and not path and rank() == 0:
        say(f'--freeze {opt.freeze}: without --pretrained, layers keep their initial values')
    frozen = freeze(model, opt.freeze)
    run = Run(opt, forward, splits, model, make_optimizer(model, opt), lock, frozen,
              make_average(model, opt.ema), resumed_from=path)
    if opt.tensorboard:
        run.board = TensorBoardWriter(opt.save, run.args)
    if path:
        run.restore(state, path)
    check_ranks_agree(run)
    if rank() == 0 and not run.done:
        prepare_folder(run)
    return run


def match_splits(splits, loaded, force=False):
    """Returns test images with the labels of a LoadedModel, by class names: see `match_classes`."""
    names = splits.classes
    positions = match_classes(loaded.path, loaded.num_classes, loaded.classes, names, force)
    if not loaded.classes:
        return splits
    matched = [loaded.classes[position] for position in positions]
    if rank() == 0 and matched != names:
        pairs = ', '.join(f'{name} is {other}' for name, other in zip(names[:3], matched))
        say(f'--force: classes are matched by position: {pairs}' + ', ...' * (len(names) > 3))
    elif rank() == 0 and len(names) < loaded.num_classes:
        say(f'classes are matched by name: {len(names)} of {loaded.num_classes}')
    return splits.with_classes(loaded.classes, positions)


def load_test_splits(loaded, name, dataroot):
    """Loads the test images of a dataset by name, with the labels of a LoadedModel."""
    splits = data.load_splits(name, dataroot, loaded.preprocess, training=False,
                              classes=loaded.classes or ())
    return match_splits(splits, loaded)


def load_for_evaluation(opt, device, splits=None):
    """Loads --resume and test images; returns (LoadedModel, Forward, DataSplits).

    splits: DataSplits from Python, in place of --dataset. Raises ValueError or OSError.
    """
    names = ('model', 'dataset', 'image_size', *options.MODEL_OPTIONS)
    overrides = {name: value for name, value in vars(opt).items() if name in names}
    if opt.normalise:
        overrides |= zip(('mean', 'std'), options.mean_and_std(opt.normalise))
    loaded = diracnets.load(opt.save if opt.resume == 'auto' else opt.resume, overrides)
    name = overrides.get('dataset') or loaded.args.get('dataset', 'CIFAR10')
    splits = splits or load_named_splits(opt, name, loaded.preprocess, training=False,
                                         classes=loaded.classes or ())
    expected = (loaded.preprocess.size, loaded.preprocess.size, loaded.preprocess.channels)
    if splits.test.shape != expected:
        raise ValueError(f'test images are {splits.test.shape}: expected {expected}, as the model '
                         f'of {loaded.path} has')
    splits = match_splits(splits, loaded, opt.force)
    dtype = choose_dtype(opt.dtype, device, loaded.args)
    loaded.model.to(device, param_dtype(dtype))
    return loaded, Forward(loaded.preprocess, dtype, device), splits
