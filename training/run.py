"""The state of a training run: model, optimizer, data, progress and checkpoints."""

import math
import os
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel

from cli import say
from diracnet import check_params
from diracnets.checkpoint import BEST_FILE, MODEL_FILE
from diracnets.class_names import check_classes
from training import checkpoint
from training.checkpoint import DivergedError
from training.compute import Forward
from training.data import DataSplits
from training.distributed import launcher, rank, world_size
from training.interruption import SignalHandler
from training.log import LOG_FILE, append_log, read_log
from training.meters import Meters, topk
from training.optimizers import check_state, lr_factor, set_learning_rate
from training.tensorboard import TensorBoardWriter


@dataclass(frozen=True)
class RunResult:
    """The result of a run: its best accuracy and the records of its epochs."""

    folder: str  # of the log and the checkpoints
    best_acc: float  # that of best.pt7, in per cent, on the validation set if there is one
    history: list[dict]  # the records of log.txt, one per epoch


@dataclass
class Run:
    """A training run: its model, optimizer and data, and its progress."""

    opt: Namespace  # the command line's options
    forward: Forward
    splits: DataSplits
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lock: checkpoint.Lock  # of the folder, held by rank 0
    frozen: list[torch.nn.Module]  # batch norms that stay in evaluation mode
    average: AveragedModel | None  # EMA of the weights, with --ema
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the epoch in progress
    totals: list = None  # of the meters in these steps, if a checkpoint was resumed within an epoch
    meters: Meters = None  # of training in the current epoch
    best: float = 0.0  # best accuracy so far, in per cent, on the first of `eval_splits`
    resumed_from: str = ''  # the checkpoint, or its folder
    board: TensorBoardWriter = None
    on_epoch: Callable[[dict], None] | None = None  # called on rank 0 after each epoch
    last_save: float = field(default_factory=time.monotonic)  # time in seconds

    @property
    def args(self):
        """The options and their resolved values, as checkpoints and the log contain them."""
        preprocess = self.forward.preprocess
        return {**vars(self.opt), 'dtype': self.forward.dtype, 'mean': list(preprocess.mean),
                'std': list(preprocess.std)}

    @property
    def eval_splits(self):
        """The splits that are evaluated after each epoch; the first one selects best.pt7."""
        return ('test',) if self.splits.val is None else ('val', 'test')

    @property
    def done(self):
        return self.epoch >= self.opt.epochs

    def summary(self):
        """Returns one line on the result of the run."""
        best = f'best {self.eval_splits[0]}_acc {self.best:.2f}'
        if self.meters:
            return f'{best}; log and checkpoints in {self.opt.save}'
        return (f'already finished, nothing was written: {self.resumed_from} is at epoch '
                f'{self.epoch} of {self.opt.epochs}; {best}')

    def result(self):
        log = os.path.join(self.opt.save, LOG_FILE)
        history = read_log(log) if os.path.exists(log) else []
        return RunResult(self.opt.save, self.best, history)

    def set_learning_rate(self, steps_per_epoch):
        """Sets the learning rate of the next step."""
        progress = self.epoch + self.step / steps_per_epoch
        set_learning_rate(self.optimizer, lr_factor(self.opt, progress))

    @property
    def eval_model(self):
        """The model that is evaluated: the average of --ema if there is one."""
        return self.average.module if self.average else self.model

    def train(self):
        """Sets training mode, except for frozen batch norms."""
        self.model.train()
        for norm in self.frozen:
            norm.eval()

    def eval(self):
        """Sets evaluation mode, with the running statistics of rank 0 on all ranks."""
        for model in dict.fromkeys([self.model, self.eval_model]):
            if world_size() > 1:
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            model.eval()

    def end_step(self, steps_per_epoch: int, signals: SignalHandler):
        """Counts a training step; saves if it is time; raises StoppedError after a signal."""
        self.step += 1
        if self.average:
            self.average.update_parameters(self.model)
        self.set_learning_rate(steps_per_epoch)
        due = self.opt.save_every and time.monotonic() - self.last_save >= 60 * self.opt.save_every
        if signals.agree(self.step == steps_per_epoch, due):
            self.save()

    def end_epoch(self, stats):
        """Writes the log line and the checkpoints of an epoch, and prints its accuracies.

        Raises DivergedError, and writes nothing, for a non-finite loss or parameter.
        """
        for name, value in stats.items():
            if name.endswith('_loss') and not math.isfinite(value):
                raise DivergedError(f'{name} is {value} after step {self.step}')
        if rank() == 0:
            checkpoint.check_finite(self.state())
            self.lock.check()
            append_log(self.opt.save, stats)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, None
        accuracies = {f'{split}_acc': stats[f'{split}_acc'] for split in self.eval_splits}
        accuracy, *_ = accuracies.values()
        improved = accuracy >= self.best
        self.best = max(self.best, accuracy)
        keep = self.opt.keep_every and self.epoch % self.opt.keep_every == 0
        names = [f'epoch-{self.epoch}.pt7'] * keep + [BEST_FILE] * improved + [MODEL_FILE]
        self.save(names)
        if rank() == 0:
            shown = ', '.join(f'{name}: {value:.2f}' for name, value in stats.items()
                              if name.startswith(tuple(accuracies)))  # top-5 too
            say(f'==> id: {self.opt.save} ({self.epoch}/{self.opt.epochs}), {shown}')
            if self.board:
                self.board.write(stats, self.eval_model)
            if self.on_epoch:
                self.on_epoch(stats)

    def state(self):
        """Returns the contents of a checkpoint: see training/checkpoint.py."""
        ema = {'ema': self.average.module.state_dict()} if self.average else {}
        return {
            'params': self.model.state_dict(), **ema, 'optimizer': self.optimizer.state_dict(),
            'epoch': self.epoch, 'step': self.step, 'best': self.best,
            'rng': checkpoint.rng_state(), 'classes': self.splits.classes, 'args': self.args,
            'versions': checkpoint.versions(), 'launcher': launcher(),
        }

    def save(self, names=(MODEL_FILE,)):
        """Writes a checkpoint into the folder, under one or several names; all ranks call this.

        Raises DivergedError, and writes nothing, for a non-finite parameter, running statistic or
        momentum.
        """
        totals = self.meters.totals() if self.step else None
        self.last_save = time.monotonic()
        if rank() == 0:
            self.lock.check()
            checkpoint.save(self.opt.save, {**self.state(), 'totals': totals}, names)

    def restore(self, state, path):
        """Restores the state from a checkpoint; raises ValueError if it is not of this run."""
        names, saved_names = self.splits.classes, state.get('classes')
        check_classes(path, len(saved_names or names), saved_names, names)
        try:
            self._restore(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:  # a malformed optimizer or random state raises any of these
            reason = f'{type(error).__name__}: {error}'.split('\n')[0]
            raise ValueError(f'{path}: not a checkpoint of this run: {reason}') from error

    def _restore(self, state):
        check_params(state['params'], self.model.state_dict())
        self.model.load_state_dict(state['params'])
        # only the momentum: the settings of the optimizer are options
        groups = self.optimizer.state_dict()['param_groups']
        self.optimizer.load_state_dict({**state['optimizer'], 'param_groups': groups})
        self.epoch, self.step = state['epoch'], state.get('step', 0)
        has_best = os.path.exists(os.path.join(self.opt.save, BEST_FILE))  # not in another --save
        same_images = all(state['args'].get(name, now) == now
                          for name, now in vars(self.opt).items() if name in ('val', 'files'))
        if has_best and not same_images and rank() == 0:  # with --force
            say('--force: the images differ, so the best accuracy starts at 0, and the next epoch '
                'replaces best.pt7')
        self.best = state.get('best', 0.0) if has_best and same_images or self.done else 0.0
        if self.average and 'ema' in state:
            check_params(state['ema'], self.average.module.state_dict())
            self.average.module.load_state_dict(state['ema'])
            self.average.n_averaged.fill_(bool(self.epoch or self.step))  # 0: not started
        self._check_progress(state.get('totals'))
        if rank() == 0:  # totals are sums over all ranks; the random state is that of rank 0
            self.totals = state.get('totals')
            if 'rng' in state:
                checkpoint.set_rng_state(state['rng'])

    def _check_progress(self, totals):
        """Raises ValueError for a state that would fail later, or change results silently."""
        if self.epoch or self.step or self.optimizer.state:
            check_state(self.optimizer)
        steps = -(-len(self.splits.train) // self.opt.batch_size)  # of an epoch
        if self.step > steps:
            raise ValueError(f'step {self.step} of an epoch: expected at most {steps}')
        length = 3 + len(topk(len(self.splits.classes)))  # see Meters.totals
        if totals and len(totals) != length:
            raise ValueError(f'{len(totals)} totals: expected {length}')


def print_settings(settings, model, splits, forward):
    """Prints the settings, the parameters of the model, the data and the hardware."""
    if rank() > 0:
        return
    params = dict(model.named_parameters())
    training = f'{len(splits.train)} training and ' if splits.train else ''
    width = max([38, *map(len, params)]) + 2  # an ONNX model has no parameters
    say(
        *[f'  {name:<16}{value}' for name, value in settings.items()],
        '', f'  {"parameter":<{width}}{"shape":<20}{"size":>12}',
        *[f'  {name:<{width}}{str(tuple(param.shape)):<20}{param.numel():>12,}'
          for name, param in params.items()],
        f'  {"total":<{width + 20}}{sum(p.numel() for p in params.values()):>12,}', '',
        f'{splits.name or "data from Python"}: {training}{len(splits.test)} test images, '
        f'{len(splits.classes)} classes; computing on {world_size()} x '
        f'{forward.device.type} in {forward.dtype}',
    )
