"""What a training is, and how it begins: afresh, from a checkpoint, or from other parameters."""

import ctypes
import functools
import math
import os
import platform
import random
import time
from argparse import Namespace
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

import diracnets
from cli import say
from diracnet import check_params
from diracnets.checkpoint import BEST_FILE, MODEL_FILE
from diracnets.deploy import native_bfloat16
from diracnets.loading import check_classes
from diracnets.models.registry import ARCHITECTURES
from diracnets.preprocessing import Preprocessing, normalize
from training import checkpoint, data, distributed, options, pretrained
from training.checkpoint import DivergedError
from training.distributed import rank, world_size
from training.log import LOG_FILE, append_log, read_log, truncate_log
from training.meters import Meters, topk
from training.optimizers import check_state, make_optimizer
from training.tensorboard import TensorBoardWriter
from training.whitening import PIXELS, whiten


@dataclass
class Run:
    """One training: its network and optimizer, and how far it has come."""

    opt: Namespace  # what was asked
    preprocess: Preprocessing
    dtype: str  # 'float', 'bfloat16' or 'double', also where --dtype is auto
    sets: data.DataSplits
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # finished ones
    step: int = 0  # finished ones of the next epoch
    totals: list = None  # of the meters in these steps, where another run did them
    meters: Meters = None  # of the training in this epoch
    best: float = 0.0  # the best accuracy yet, in per cent, on the first of `tested`
    resumed_from: str = ''  # the checkpoint that it goes on from, or its folder
    board: TensorBoardWriter = None  # for TensorBoard
    saved: float = field(default_factory=time.monotonic)  # when, in seconds

    @property
    def args(self):
        """The options, and what they came to, as checkpoints and the log have them."""
        return {**vars(self.opt), 'dtype': self.dtype, 'mean': list(self.preprocess.mean),
                'std': list(self.preprocess.std)}

    @property
    def tested(self):
        """The sets that each epoch ends with; best.pt7 is chosen by the accuracy on the first."""
        return ('val', 'test') if self.opt.val else ('test',)

    @property
    def done(self):
        return self.epoch >= self.opt.epochs

    def outcome(self):
        """What the training came to, in a line."""
        best = f'best {self.tested[0]}_acc {self.best:.2f}'
        if self.meters:
            return f'{best}; log and checkpoints in {self.opt.save}'
        return (f'nothing was left to train, and nothing was written: {self.resumed_from} has '
                f'{self.epoch} epochs, --epochs is {self.opt.epochs}; {best}')

    def contents(self):
        """What a checkpoint of this moment holds: see training/checkpoint.py."""
        return {
            'params': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'epoch': self.epoch, 'step': self.step, 'best': self.best,
            'rng': checkpoint.rng_state(), 'classes': self.sets.classes, 'args': self.args,
            'versions': checkpoint.versions(), 'launcher': os.getppid(),
        }

    def save(self, name=MODEL_FILE):
        """Writes a checkpoint into opt.save: the first process does, once all have called this.

        Raises DivergedError, and writes nothing, if the loss or what was learnt is no number any
        more.
        """
        totals = self.meters.totals() if self.step else None
        self.saved = time.monotonic()
        if rank() == 0:
            checkpoint.save(self.opt.save, {**self.contents(), 'totals': totals}, name)

    def end_epoch(self, stats):
        """Writes what an epoch left: its line in the log, then the checkpoints; prints that it did.

        stats: that line. Raises DivergedError as `save` does, and for a figure of testing that is
        no number.
        """
        for name, value in stats.items():
            if name.endswith('_loss') and not math.isfinite(value):
                raise DivergedError(f'{name} is {value} after step {self.step}')
        if rank() == 0:
            checkpoint.check_finite(self.contents())
            append_log(self.opt.save, stats)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, None
        if self.opt.keep_every and self.epoch % self.opt.keep_every == 0:
            self.save(f'epoch-{self.epoch}.pt7')
        accuracies = {f'{split}_acc': stats[f'{split}_acc'] for split in self.tested}
        judged, *_ = accuracies.values()
        improved = judged >= self.best
        self.best = max(self.best, judged)
        if improved:
            self.save(BEST_FILE)
        self.save()
        if rank() == 0:
            figures = ', '.join(f'{name}: {value:.2f}' for name, value in accuracies.items())
            say(f'==> id: {self.opt.save} ({self.epoch}/{self.opt.epochs}), {figures}')
            if self.board:
                self.board.write(stats, self.model)

    def restore(self, loaded, path):
        """Takes over what a checkpoint holds. Raises ValueError if it cannot be this run's."""
        names, known = self.sets.classes, loaded.get('classes')
        check_classes(path, len(known or names), known, names)
        try:
            self._take(loaded)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:  # what an odd optimizer or random state may raise
            reason = f'{type(error).__name__}: {error}'.split('\n')[0]
            raise ValueError(f'{path}: not a checkpoint of this run: {reason}') from error

    def _take(self, loaded):
        check_params(loaded['params'], self.model.state_dict())
        self.model.load_state_dict(loaded['params'])
        # of the optimizer only the momentum: its settings are the options'
        groups = self.optimizer.state_dict()['param_groups']
        self.optimizer.load_state_dict({**loaded['optimizer'], 'param_groups': groups})
        self.epoch, self.step = loaded['epoch'], loaded.get('step', 0)
        self.best = loaded.get('best', 0.0)
        self._check(loaded.get('totals'))
        if rank() == 0:  # what all processes did together counts once; the state is of the first
            self.totals = loaded.get('totals')
            if 'rng' in loaded:
                checkpoint.set_rng_state(loaded['rng'])

    def _check(self, totals):
        """Raises ValueError if what was taken over would go wrong later, or silently."""
        if self.epoch or self.step or self.optimizer.state:
            check_state(self.optimizer)
        steps = -(-len(self.sets.train) // self.opt.batch_size)  # of an epoch
        if self.step > steps:
            raise ValueError(f'step {self.step} of an epoch: expected at most {steps}')
        figures = 3 + len(topk(len(self.sets.classes)))  # seconds, loss, images, errors
        if totals and len(totals) != figures:
            raise ValueError(f'{len(totals)} totals: expected {figures}')


def find_checkpoint(opt):
    """Returns the path of the checkpoint, or its folder, to go on from: '' to start afresh.

    Raises ValueError for a run that would be overwritten.
    """
    own, log = checkpoint.exists(opt.save), os.path.join(opt.save, LOG_FILE)
    epochs = len(read_log(log)) if os.path.exists(log) else 0
    path = opt.resume
    # torchrun starts all processes again when one died: they go on with what they began
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0 and own
    if restarted and checkpoint.load(opt.save).get('launcher') == os.getppid():
        path = opt.save
    if path == 'auto':
        path = opt.save if own else ''
        epochs = max(0, epochs - 1)  # a crash may come between the first line and the checkpoint
    source = path if os.path.isdir(path) else os.path.dirname(path) or '.'
    goes_on = bool(path) and os.path.realpath(source) == os.path.realpath(opt.save)
    if (own or epochs) and not goes_on:
        raise ValueError(f'{opt.save} holds a run: expected --resume auto, or another --save')
    return path


def prepare_folder(run, lock):
    """Makes --save, and makes it ready to be written to by this training alone.

    Raises ValueError if another one came first.
    """
    folder = run.opt.save
    os.makedirs(folder, exist_ok=True)
    lock.acquire()
    if not run.epoch and not run.step:
        find_checkpoint(run.opt)  # another may have come and gone while this one was made ready
    checkpoint.quarantine(folder)
    truncate_log(folder, run.epoch)


def check_options(path, now, before):
    """Raises ValueError if a checkpoint was made with other options, now and before."""
    differences = options.changed_options(now, before)
    if differences:
        raise ValueError(f'{path}: {"; ".join(differences)}: expected the same, or --force')


def choose_dtype(asked, device, args):
    """What --dtype stands for: that of the run with these args, or the hardware's, where auto."""
    if asked != 'auto':
        return asked
    native, why = native_bfloat16(device)
    dtype, why = 'bfloat16' if native else 'float', f'{device.type}: {why}'
    if args.get('dtype', 'auto') != 'auto':
        dtype, why = args['dtype'], 'as the checkpoint'
    if rank() == 0:
        say(f'--dtype auto: {dtype} ({why})')
    return dtype


def compile_model(network, device):
    """Returns the network as a compiled function, which compiles once for each size of batch.

    On CUDA each is one graph of kernels: a step of a deep, narrow network is some hundreds of small
    ones, which Python launches more slowly than a GPU runs them.
    """
    if device.type != 'cuda':
        return torch.compile(network, dynamic=False)
    graph = torch.compile(network, dynamic=False, mode='reduce-overhead')

    def run(inputs):
        torch.compiler.cudagraph_mark_step_begin()  # what the last step made may be overwritten
        return graph(inputs).clone()  # as the meters keep it for longer

    return run


def param_dtype(dtype):
    """The torch dtype of parameters: bfloat16 is autocast from float32."""
    return torch.float64 if dtype == 'double' else torch.float32


def load_sets(opt, name, inputs, training=True, **augmentation):
    """Loads a data set by name; what one process downloads, the others read."""
    load = functools.partial(
        data.load_splits, name, opt.dataroot, inputs, opt.nthread, training, **augmentation
    )
    return distributed.rank_zero_first(load) if name.startswith('CIFAR') else load()


def resolve_normalization(inputs, opt, images, before):
    """The Preprocessing that --normalise makes of these: as asked, or as the training images have them.

    before: the options of the run that goes on, which has measured them. Raises ValueError for
    other channels than those of the images.
    """
    known = before.get('normalise') == 'measured' and {'mean', 'std'} <= before.keys()
    if opt.normalise == 'measured' and known:
        mean, std = before['mean'], before['std']
    elif opt.normalise == 'measured':
        mean, std = data.measure_normalization(images, opt.nthread)
    elif opt.normalise:
        mean, std = options.mean_and_std(opt.normalise)
    else:
        mean, std = inputs.mean, inputs.std
    inputs = Preprocessing.for_dataset(opt.dataset, opt.image_size, mean, std)
    if inputs.channels != images.shape[-1]:
        raise ValueError(f'--normalise of {inputs.channels} channels: expected '
                         f'{images.shape[-1]}, of the images')
    return inputs


def keep_freed_memory():
    """Has glibc keep what a step frees for the next one: given back, it comes page by page again.

    Settings of malloc in the environment (MALLOC_...) stand; other C libraries are left alone.
    """
    given = any(name.startswith('MALLOC_') for name in os.environ)
    if platform.libc_ver()[0] == 'glibc' and not given:
        trim_threshold, mmap_max = -1, -4  # the numbers of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # blocks that are mapped one by one go back when they are freed


def check_ranks_agree(run):
    """Raises ValueError where processes begin at different steps, as of different checkpoints."""
    first, last = (distributed.all_reduce([run.epoch, run.step], op)
                   for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if first != last:
        raise ValueError(f'{run.opt.save}: here {run.epoch} epochs and {run.step} steps are done, '
                         'in another process not as many: expected one --save that all share')


def prepare(opt, device, lock, sets=None):
    """Begins a training, or goes on with the one in a checkpoint: a Run.

    lock: of --save, taken before anything there is read; sets: the Data to train on, in place of
    those that --dataset names. Raises ValueError or OSError.
    """
    inputs = Preprocessing.for_dataset(opt.dataset, opt.image_size)
    build = functools.partial(diracnets.create_model, opt.model, inputs.kind, **options.model_options(opt))
    try:
        with torch.device('meta'):
            build()  # depth, width and the like are checked before anything is read
    except ValueError as error:
        which = f'image_size {inputs.size}: {options.NETWORKS_BY_SIZE}'
        raise ValueError(f'{error} ({which})') from error
    if rank() == 0 and os.path.isdir(opt.save):
        lock.acquire()
    path = find_checkpoint(opt)
    loaded = checkpoint.load(path) if path else {'args': {}}
    dtype = choose_dtype(opt.dtype, device, loaded['args'])
    if not opt.force:
        check_options(path, {**vars(opt), 'dtype': dtype}, loaded['args'])
    augmentation = {'crop': opt.augment and opt.crop, 'pad': opt.randomcrop_pad,
                    'flip': opt.flip if opt.augment else 'none', 'cutout': opt.cutout,
                    'reflect': ARCHITECTURES[opt.model].crop_padding == 'reflect'}
    sets = (sets.augmented(**augmentation) if sets
            else load_sets(opt, opt.dataset, inputs, **augmentation))
    if opt.val:
        sets.train, sets.val = data.hold_out(sets.train, opt.val)
    inputs = resolve_normalization(inputs, opt, sets.train, loaded['args'])
    sets = sets.to(device)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(opt.seed)
    try:
        network = build(len(sets.classes), inputs.channels).to(device, param_dtype(dtype))
    except RuntimeError as error:  # of memory
        raise ValueError(f'the network cannot be made: {str(error).splitlines()[0]}') from error
    torch.manual_seed(opt.seed + rank())  # the same network, but dropout of its own
    if opt.whiten:
        n = min(len(sets.train), max(1, PIXELS // inputs.size**2))
        whiten(network, normalize(data.sample_evenly(sets.train, n).cpu(), inputs))
    if opt.pretrained and not path:
        pretrained.load_pretrained(network, opt, inputs, sets.classes)
    run = Run(opt, inputs, dtype, sets, network, make_optimizer(network, opt), resumed_from=path)
    if opt.tensorboard:
        run.board = TensorBoardWriter(opt.save, run.args)
    if path:
        run.restore(loaded, path)
    check_ranks_agree(run)
    if rank() == 0 and not run.done:
        prepare_folder(run, lock)
    return run


def load_for_evaluation(opt, sets=None):
    """Loads the network of --resume and the test set it is asked for: (Trained, Data).

    sets: the Data to test on, if they are given. Raises ValueError or OSError for what the user can
    mend.
    """
    names = ('model', 'dataset', 'image_size', *options.MODEL_OPTIONS)
    stated = {name: value for name, value in vars(opt).items() if name in names}
    if opt.normalise:
        stated |= zip(('mean', 'std'), options.mean_and_std(opt.normalise))
    trained = diracnets.load(opt.save if opt.resume == 'auto' else opt.resume, stated)
    name = stated.get('dataset') or trained.args.get('dataset', 'CIFAR10')
    sets = sets or load_sets(opt, name, trained.preprocess, training=False)
    expected = (trained.preprocess.size, trained.preprocess.size, trained.preprocess.channels)
    if sets.test.shape != expected:
        raise ValueError(f'test images are {sets.test.shape}: expected {expected}, as those of '
                         f'{trained.path}')
    known = None if opt.force else trained.classes
    check_classes(trained.path, trained.num_classes, known, sets.classes)
    return trained, sets


def warm_up(run, train_steps, test_step):
    """Compiles what these steps do, for every size of batch: returns the seconds it took.

    Leaves the network, the optimizer and the random numbers as they were.
    """
    start = time.perf_counter()
    before = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    device = next(run.model.parameters()).device
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        steps = [(run.sets.train, step) for step in train_steps]
        steps += [(getattr(run.sets, split), test_step) for split in run.tested]
        for images, step in steps:
            training = step is not test_step
            run.model.train(training)
            for size in {min(run.opt.batch_size, len(images)), len(images) % run.opt.batch_size}:
                share = torch.arange(size).tensor_split(world_size())[rank()]
                if size == 0:
                    continue
                with torch.set_grad_enabled(training):
                    loss, _ = step(images[torch.arange(size), None, share])
                if training:
                    loss.backward()
    run.optimizer.zero_grad()
    run.model.load_state_dict(before, strict=False)
    return time.perf_counter() - start
