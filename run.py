"""What a training is, and how it begins: afresh, from a checkpoint, or from other parameters."""

import ctypes
import functools
import os
import platform
import random
import time
from argparse import Namespace
from dataclasses import dataclass, field

import numpy as np
import torch

import baselines
import checkpoint
import data
import options
import ranks
from diracdeploy import native_bfloat16
from diracfold import check_fit, fold, pretrained_params, read
from meters import Meters
from ranks import rank, world


@dataclass
class Run:
    """One training: its network and optimizer, and how far it has come."""

    opt: Namespace
    sets: data.Data
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # finished ones
    step: int = 0  # finished ones of the next epoch
    totals: list = None  # of the meters in these steps, where another run did them
    meters: Meters = None  # of the training in this epoch
    best: float = 0.0  # test (or, with --val, validation) accuracy in per cent
    saved: float = field(default_factory=time.monotonic)  # when, in seconds

    def save(self, name=checkpoint.MODEL):
        """Writes a checkpoint into opt.save: the first process does, once all have called this.

        Raises DivergedError, and writes nothing, if the loss is no number any more.
        """
        totals = self.meters.totals() if self.step else None
        self.saved = time.monotonic()
        if rank() > 0:
            return
        checkpoint.save(self.opt.save, {
            'params': self.network.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'epoch': self.epoch, 'step': self.step, 'totals': totals, 'best': self.best,
            'rng': checkpoint.rng_state(), 'classes': self.sets.classes,
            'args': vars(self.opt), 'versions': checkpoint.versions(), 'launcher': os.getppid(),
        }, name)  # fmt: skip

    def restore(self, loaded):
        """Takes over what a checkpoint holds. Raises CheckpointError if it cannot be this run's."""
        if loaded.get('classes', self.sets.classes) != self.sets.classes:
            raise checkpoint.CheckpointError(
                'the checkpoint is of other classes: expected those of the data set'
            )
        try:
            self._take(loaded)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = f'{type(error).__name__}: {error}'
            raise checkpoint.CheckpointError(f'not a checkpoint of this run: {reason}') from error

    def _take(self, loaded):
        check_fit(loaded['params'], self.network.state_dict())
        self.network.load_state_dict(loaded['params'])
        # of the optimizer only the momentum: its settings are the options'
        groups = self.optimizer.state_dict()['param_groups']
        self.optimizer.load_state_dict({**loaded['optimizer'], 'param_groups': groups})
        self.epoch, self.step = loaded['epoch'], int(loaded.get('step', 0))
        self.best = loaded.get('best', 0.0)
        if rank() == 0:  # what all processes did together counts once; the state is of the first
            self.totals = loaded.get('totals')
            if 'rng' in loaded:
                checkpoint.set_rng_state(loaded['rng'])


def make_optimizer(network, opt):
    """SGD; the decay leaves one-dimensional tensors (alpha, beta, biases, batch norm) alone.

    Except in the families whose papers decay them all.
    """
    params = list(network.parameters())
    decayed = [p.dim() > 1 or baselines.FAMILIES[opt.model].decay_all for p in params]
    groups = [
        {'params': [p for p, d in zip(params, decayed) if d], 'weight_decay': opt.weight_decay},
        {'params': [p for p, d in zip(params, decayed) if not d], 'weight_decay': 0.0},
    ]
    return torch.optim.SGD(groups, lr=opt.lr, momentum=0.9, nesterov=opt.nesterov)


def find_checkpoint(opt):
    """Loads what --resume asks for: a checkpoint, or None to start afresh.

    Raises ValueError for a run that would be overwritten, or that other options began.
    """
    own, log = checkpoint.exists(opt.save), os.path.join(opt.save, checkpoint.LOG)
    epochs = len(checkpoint.read_log(log)) if os.path.exists(log) else 0
    # torchrun starts all processes again when one died: they go on with what they began
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0 and own
    if restarted and checkpoint.load(opt.save).get('launcher') == os.getppid():
        opt.resume = opt.save
    if opt.resume == 'auto':
        opt.resume = opt.save if own else ''
        epochs = max(0, epochs - 1)  # a crash may come between the first line and the checkpoint
    source = opt.resume if os.path.isdir(opt.resume) else os.path.dirname(opt.resume) or '.'
    goes_on = bool(opt.resume) and os.path.realpath(source) == os.path.realpath(opt.save)
    if (own or epochs) and not goes_on:
        raise ValueError(f'{opt.save} holds a run: expected --resume auto, or another --save')
    return checkpoint.load(opt.resume) if opt.resume else None


def check_options(opt, before):
    """Raises ValueError if a checkpoint was made with other options, unless --force is given."""
    differences = options.differences(opt, before)
    if differences and not opt.force:
        raise ValueError(f'{opt.resume}: {"; ".join(differences)}: expected the same, or --force')


def automatic_dtype(device, loaded):
    """What --dtype auto stands for, and why: that of the run that goes on or is tested, if any."""
    if loaded and loaded['args'].get('dtype', 'auto') != 'auto':
        return loaded['args']['dtype'], 'as the checkpoint'
    native, shown = native_bfloat16(device)
    return 'bfloat16' if native else 'float', f'{device.type}: {shown}'


def load_to_test(network, params):
    """Returns the network with the parameters, or their folded form if that is what they are."""
    if params.keys() != network.state_dict().keys():
        folded = fold(network, next(network.parameters()).dtype)
        if params.keys() == folded.state_dict().keys():
            network = folded
    check_fit(params, network.state_dict())
    network.load_state_dict(params)
    return network


def take_pretrained(opt, network, num_classes):
    """Starts the network from --pretrained, with a new last layer for another number of classes.

    Raises ValueError for parameters that do not fit otherwise or, published, cannot be had.
    """
    try:
        published = opt.pretrained in ('18', '34')
        params = pretrained_params(int(opt.pretrained)) if published else read(opt.pretrained)[
            'params']
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    expected = network.state_dict()
    if 'fc.bias' in params and len(params['fc.bias']) != num_classes:
        if rank() == 0:
            print(f'{opt.pretrained}: the last layer, of {len(params["fc.bias"])} classes, is '
                  f'replaced by a new one of {num_classes}')
        params = {**params, **{name: expected[name] for name in ('fc.weight', 'fc.bias')}}
    check_fit(params, expected)
    network.load_state_dict(params)


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


def prepare(opt, device):
    """Loads the data and makes the network: a Run, that of the checkpoint where there is one.

    Raises ValueError or OSError for what the user can mend.
    """
    if device.type == 'cpu':
        keep_freed_memory()
    topology = data.topology(opt.dataset, opt.image_size)
    build = functools.partial(baselines.build, opt.model, topology, **options.of_model(opt))
    with torch.device('meta'):
        build()  # depth, width and the like are checked before anything is read
    if opt.evaluate and opt.resume == 'auto':
        opt.resume = opt.save
    loaded = read(opt.resume) if opt.evaluate else find_checkpoint(opt)
    if opt.dtype == 'auto':
        opt.dtype, why = automatic_dtype(device, loaded)
        if rank() == 0:
            print(f'--dtype auto: {opt.dtype} ({why})')
    if loaded:
        check_options(opt, loaded['args'])
    reflect = baselines.FAMILIES[opt.model].crop_padding == 'reflect'
    load = functools.partial(
        data.load, opt.dataset, opt.dataroot, opt.image_size, opt.nthread, not opt.evaluate,
        pad=opt.randomcrop_pad, reflect=reflect,
    )
    # what one process downloads, the others read
    sets = ranks.first_before_others(load) if opt.dataset.startswith('CIFAR') else load()
    if opt.val and not opt.evaluate:
        sets.train, sets.val = data.hold_out(sets.train, opt.val)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(opt.seed % 2**32)
    try:
        network = build(len(sets.classes))
        network.to(device, torch.float64 if opt.dtype == 'double' else torch.float32)
    except RuntimeError as error:  # of memory
        raise ValueError(f'the network cannot be made: {str(error).splitlines()[0]}') from error
    torch.manual_seed(opt.seed + rank())  # the same network, but dropout of its own
    if opt.evaluate:
        if loaded['classes'] not in (None, sets.classes) and not opt.force:
            raise ValueError(f'{opt.resume}: of other classes than the data set: expected the '
                             'same, or --force')  # fmt: skip
        network = load_to_test(network, loaded['params'])
        return Run(opt, sets, network.to(device), make_optimizer(network, opt))
    if opt.pretrained and not loaded:
        take_pretrained(opt, network, len(sets.classes))
    run = Run(opt, sets, network, make_optimizer(network, opt))
    if loaded:
        run.restore(loaded)
    return run


def warm_up(run, train_process, test_process):
    """Compiles what the two do, for every size of batch: returns the seconds it took.

    Leaves the network, the optimizer and the random numbers as they were.
    """
    start = time.perf_counter()
    before = {name: buffer.clone() for name, buffer in run.network.named_buffers()}
    with torch.random.fork_rng():
        for images, process in ((run.sets.train, train_process), (run.sets.test, test_process)):
            run.network.train(process is train_process)
            for size in {min(run.opt.batch_size, len(images)), len(images) % run.opt.batch_size}:
                share = torch.arange(size).tensor_split(world())[rank()]
                if size == 0:
                    continue
                with torch.set_grad_enabled(process is train_process):
                    loss, _ = process(images[torch.arange(size), None, share])
                if process is train_process:
                    loss.backward()
    run.optimizer.zero_grad()
    run.network.load_state_dict(before, strict=False)
    return time.perf_counter() - start
