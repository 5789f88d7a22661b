"""Trains a DiracNet, or a network it is compared with, or tests a trained one.

CIFAR-10, the paper's recipe:
    python train.py --save ./logs/diracnets_$RANDOM$RANDOM --depth 34 --width 2

ImageNet, with train/ and val/ under --dataroot:
    python train.py --dataroot ~/ILSVRC2012/ --dataset ImageNet --depth 18 \
        --save ./logs/diracnet_$RANDOM$RANDOM --batchSize 256 --epoch_step '[30,60,90]' \
        --epochs 100 --weightDecay 0.0001 --lr_decay_ratio 0.1

Your own small images, in train/CLASS/ and test/CLASS/ under --dataroot; many GPUs:
    python train.py --dataset Folder --dataroot ~/images --save ./logs/mine
    torchrun --nproc_per_node=8 train.py --dataset Folder --dataroot ~/images --save ./logs/mine

A network that DiracNets are compared with, and a paper's settings (python train.py --help):
    python train.py --model resnet --depth 28 --name resnet-28-1
    python train.py --recipe densenet --name densenet

Going on where a run stopped (with the run's other options), and testing it:
    python train.py --save ./logs/mine --resume auto ...
    python train.py --evaluate --resume ./logs/mine --dataset Folder --dataroot ~/images
"""

import itertools
import os
import shlex
import signal
import sys
import time

if __name__ == '__main__':  # before what takes seconds to import
    from cli import exit_on_ctrl_c

    exit_on_ctrl_c()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchnet.engine import Engine

from cli import exit_on_error, say
from diracnets.preprocessing import DataError, normalize
from training import checkpoint, distributed, options
from training.augmentation import progressive_sizes
from training.checkpoint import DivergedError
from training.datasets import IGNORED
from training.distributed import rank, world_size
from training.loader import WorkerError, iterate_batches, make_loader
from training.meters import STEPS_PER_READING, Meters
from training.optimizers import lr_factor, set_learning_rate
from training.run import (
    choose_dtype,
    compile_model,
    keep_freed_memory,
    load_for_evaluation,
    param_dtype,
    prepare,
    warm_up,
)
from training.signals import Signals, StoppedError


def make_step(network, inputs, dtype, device, label_smoothing=0.0, size=None):
    """Returns what torchnet's engine calls with each batch: a batch to (loss, logits).

    network: inputs (n, 3, S, S), as the Inputs say, to logits; dtype: 'float', 'double', or
    'bfloat16', autocast; size: pixels that the images are shrunk to, if they are. The loss is the
    share of this process in the mean over the whole batch, times the number of processes, as
    DistributedDataParallel takes the mean of their gradients.
    """
    precision = param_dtype(dtype)

    def step(batch):
        images, labels, whole = batch
        images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
        pixels = normalize(images, inputs, precision)
        if size not in (None, inputs.size):
            pixels = F.interpolate(pixels, (size, size), mode='bilinear', antialias=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16'):
            logits = network(pixels)
        logits = logits.to(precision)
        loss = F.cross_entropy(logits, labels, reduction='sum', ignore_index=IGNORED,
                               label_smoothing=label_smoothing)
        return loss * (world_size() / whole), logits

    return step


def run_epoch(step, batches, meters, on_step, optimizer=None):
    """Trains with an optimizer, tests without; on_step() is called after each step."""

    def on_forward(state):
        meters.on_forward(state)
        if not optimizer:
            on_step()

    engine = Engine()
    engine.hooks = {'on_forward': on_forward, 'on_update': lambda state: on_step()}
    with meters.bar, torch.set_grad_enabled(optimizer is not None):
        if optimizer:
            engine.train(step, batches, 1, optimizer)
        else:
            engine.test(step, batches)


def print_beginning(what, network, sets, device, dtype):
    """Prints what is done, the network's parameters, the data and the hardware."""
    if rank() > 0:
        return
    params = dict(network.named_parameters())
    training = f'{len(sets.train)} training and ' if sets.train else ''
    say(
        *[f'  {name:<16}{value}' for name, value in what.items()],
        f'\n  {"parameter":<40}{"shape":<20}{"size":>12}',
        *[f'  {name:<40}{str(tuple(tensor.shape)):<20}{tensor.numel():>12,}'
          for name, tensor in params.items()],
        f'  {"total":<60}{sum(p.numel() for p in params.values()):>12,}\n',
        f'{sets.name or "given"}: {training}{len(sets.test)} test images, {len(sets.classes)} '
        f'classes; computing on {world_size()} x {device.type} in {dtype}',
    )


def train_epoch(run, step, loader, title, on_step, signals):
    """Trains the steps of the next epoch that are not done yet: returns its figures."""
    loader.sampler.set_epoch(run.epoch + 1, run.step)
    run.model.train()
    run.meters = Meters(len(run.sets.classes), len(run.sets.train), title, run.totals, run.step)
    run_epoch(step, signals.batches(loader), run.meters, on_step, run.optimizer)
    figures = run.meters.figures('train')
    rate = len(run.sets.train) / figures['train_time']
    lr = run.opt.lr * lr_factor(run.opt, run.epoch)  # that of its first step
    return {'epoch': run.epoch + 1, 'epoch_lr': lr, **figures, 'images_per_second': rate}


def evaluate(network, step, images, meters, opt, on_step=lambda: None, batches=iterate_batches):
    """Tests the network on images; `meters` has the figures then."""
    if world_size() > 1:  # each has batch statistics of its own: those of the first are saved
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    network.eval()
    loader = make_loader(images, opt.batch_size, opt.nthread, rank=rank(), world_size=world_size())
    run_epoch(step, batches(loader), meters, on_step)


def train(run, device, signals):
    """Runs the epochs that are left; writes log.txt and checkpoints into opt.save."""
    opt, sets = run.opt, run.sets
    wrapped = DistributedDataParallel(run.model) if world_size() > 1 else run.model
    tested = run.model
    if opt.compile:
        wrapped, tested = (compile_model(n, device) for n in (wrapped, tested))
    sizes = progressive_sizes(run.preprocess.size, opt.grow, opt.epochs)
    train_steps = {size: make_step(wrapped, run.preprocess, run.dtype, device, opt.label_smoothing,
                                   size) for size in set(sizes[run.epoch:])}
    test_step = make_step(tested, run.preprocess, run.dtype, device)
    loader = make_loader(sets.train, opt.batch_size, opt.nthread, opt.seed, rank(), world_size())

    def set_rate():
        set_learning_rate(run.optimizer, lr_factor(opt, run.epoch + run.step / len(loader)))

    def on_train_step():
        run.step += 1
        set_rate()
        if world_size() > 1 and run.step % STEPS_PER_READING and run.step < len(loader):
            return  # several processes agree, which takes time, once in so many steps
        due = opt.save_every and time.monotonic() - run.saved >= 60 * opt.save_every
        number, due = distributed.all_reduce([signals.number, bool(due)], dist.ReduceOp.MAX)
        if number:
            raise StoppedError(int(number))
        if due:
            run.save()

    test_steps = itertools.count(1)

    def on_test_step():
        if world_size() > 1 and next(test_steps) % STEPS_PER_READING:
            return
        number, = distributed.all_reduce([signals.number], dist.ReduceOp.MAX)
        if number:
            raise StoppedError(int(number))

    if opt.compile:
        compile_time = warm_up(run, train_steps.values(), test_step)
    first, start = run.epoch, time.monotonic()
    while run.epoch < opt.epochs:
        title = f'epoch {run.epoch + 1}/{opt.epochs}'
        if run.epoch > first:
            done, left = (sum(s**2 for s in part)
                          for part in (sizes[first : run.epoch], sizes[run.epoch :]))
            title += f', {(time.monotonic() - start) * left / done / 60:.0f} min left'
        set_rate()
        stats = {**run.args, **train_epoch(
            run, train_steps[sizes[run.epoch]], loader, title, on_train_step, signals
        )}
        for split in run.tested:
            images = getattr(sets, split)
            meters = Meters(len(sets.classes), len(images), f'{title}, {split}')
            evaluate(run.model, test_step, images, meters, opt, on_test_step, signals.batches)
            stats.update(meters.figures(split))
        if opt.compile:
            stats['compile_time'] = compile_time
        stats['num_classes'] = len(sets.classes)
        stats['n_parameters'] = sum(p.numel() for p in run.model.parameters())

        run.end_epoch(stats)
    if rank() == 0:
        say(run.outcome())


def train_or_stop(run, device, command):
    """Trains; where a signal, an image or a reading process ends it, what is done is saved.

    command: the words by which this training goes on, to say them.
    """
    try:
        with Signals() as signals:
            train(run, device, signals)
    except (DataError, WorkerError):  # an image that is read only now, and cannot be
        if run.meters and world_size() == 1:
            run.save()
        raise
    except DivergedError as error:
        raise DivergedError(
            f'{error} of epoch {run.epoch + 1}, learning rate '
            f'{run.optimizer.param_groups[0]["lr"]:g}'
            + '; the last checkpoint stays' * checkpoint.exists(run.opt.save)
        ) from error
    except StoppedError as stopped:
        run.save()
        number = signal.Signals(stopped.args[0])
        if rank() == 0:
            launcher = 'python' if world_size() == 1 else 'torchrun ...'
            say(f'stopped by {number.name} in epoch {run.epoch + 1} after {run.step} steps, and '
                f'saved; go on with: {launcher} {command}')
        sys.exit(128 + number)


def test(opt, device, trained, sets):
    """Prints the loss and accuracy of a trained network on a test set."""
    dtype = choose_dtype(opt.dtype, device, trained.args)
    network = trained.model.to(device, param_dtype(dtype))
    tested = {'file': trained.path, 'network': trained.title, 'image_size': trained.preprocess.size,
              'batch_size': opt.batch_size, 'nthread': opt.nthread}
    print_beginning(tested, network, sets, device, dtype)
    step = make_step(network, trained.preprocess, dtype, device)
    meters = Meters(trained.num_classes, len(sets.test), 'test')
    evaluate(network, step, sets.test, meters, opt)
    figures = meters.figures('test')
    if rank() == 0:
        print(f'test_loss: {figures["test_loss"]:.4f}')
        print(f'test_acc: {figures["test_acc"]:.2f}')


def train_or_test(opt, begun, device, command):
    """Does what `begun` is ready for: see `prepare` and `load_for_evaluation`."""
    try:
        if opt.evaluate:
            test(opt, device, *begun)
        else:
            print_beginning(begun.args, begun.model, begun.sets, device, begun.dtype)
            train_or_stop(begun, device, command)
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).split('. ')[0]
        raise OSError(f'{reason}: expected a smaller --batch_size') from error


def main(argv=None, sets=None):
    """Does what the options say, by default those of the command line, and ends as a command does.

    sets: the Data to train or test on, in place of --dataset: see `training.data.Data.of`.
    """
    argv = sys.argv[1:] if argv is None else argv
    opt = options.parse_options(argv, sets)
    going_on = argv if opt.resume == 'auto' else [*argv, '--resume', 'auto']
    command = f'{"SCRIPT, its options" if sets else "train.py"} {shlex.join(going_on)}'
    with checkpoint.Lock(opt.save) as lock:
        with exit_on_error('train.py', (ValueError, OSError)):
            if opt.gpu_id:
                os.environ['CUDA_VISIBLE_DEVICES'] = opt.gpu_id  # read at the first use of CUDA
            device = distributed.start(opt.deterministic)
            if opt.gpu_id and device.type != 'cuda':
                raise ValueError(f'--gpu_id {opt.gpu_id}: CUDA has none of this number here: '
                                 'expected another one, or none to train on the CPU')
            if device.type == 'cpu':
                keep_freed_memory()
            begun = load_for_evaluation(opt, sets) if opt.evaluate else prepare(opt, device, lock, sets)
        try:
            # from here on other errors are faults of the program, and keep their traceback
            with exit_on_error('train.py', (DataError, DivergedError, OSError)):
                train_or_test(opt, begun, device, command)
        finally:
            distributed.end()


if __name__ == '__main__':
    main()
