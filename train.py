"""Trains or evaluates a DiracNet, or another architecture of diracnets.list_models().

CIFAR-10, the paper's recipe:
    python train.py --depth 34 --width 2 --save runs/diracnet-34-2

ImageNet, with train/ and val/ under --dataroot:
    python train.py --dataroot ~/ILSVRC2012/ --dataset ImageNet --depth 18 \
        --save runs/diracnet-18 --batchSize 256 --epoch_step '[30,60,90]' \
        --epochs 100 --weightDecay 0.0001 --lr_decay_ratio 0.1

Your own small images, in train/CLASS/ and test/CLASS/ under --dataroot; on several GPUs:
    python train.py --dataset Folder --dataroot ~/images --save runs/mine
    torchrun --nproc_per_node=8 train.py --dataset Folder --dataroot ~/images --save runs/mine

Another architecture, and the settings of a paper:
    python train.py --model resnet --depth 28 --name resnet-28-1
    python train.py --recipe densenet --name densenet

Resume an interrupted run (with its other options), and evaluate it:
    python train.py --save runs/mine --resume auto ...
    python train.py --evaluate --resume runs/mine --dataset Folder --dataroot ~/images
"""

import os
import shlex
import sys
import time

from cli import exit_on_ctrl_c, exit_on_error, say
from training import options

if __name__ == '__main__':  # --help and errors come before the imports that take seconds
    exit_on_ctrl_c()
    options.parse_options(sys.argv[1:])

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from diracnets.image_files import DataError
from training import checkpoint, distributed
from training.augmentation import progressive_sizes
from training.checkpoint import DivergedError
from training.compilation import compile_models
from training.compute import cross_entropy, keep_freed_memory
from training.distributed import rank, world_size
from training.interruption import interruptible, out_of_memory_as_os_error
from training.loader import iterate_batches, make_loader
from training.meters import Meters
from training.optimizers import lr_factor
from training.run import print_settings
from training.setup import load_for_evaluation, prepare


def train_one_epoch(run, model, loader, size, title, signals):
    """Trains on the remaining batches of an epoch; returns its log entries.

    model: run.model, or its compiled or distributed form; size: image size in pixels; title: title
    of the progress bar; signals: a SignalHandler.
    """
    opt, optimizer = run.opt, run.optimizer
    loader.sampler.set_epoch(run.epoch + 1, run.step)
    run.set_learning_rate(len(loader))
    run.train()
    run.meters = Meters(len(run.splits.classes), len(run.splits.train), title, run.totals, run.step)
    with run.meters.bar:
        for images, labels, global_batch_size in signals.batches(loader):
            logits = run.forward(model, images, size)  # (n, num_classes)
            loss = cross_entropy(logits, labels, global_batch_size, opt.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            if opt.clip_grad:
                clip_grad_norm_(run.model.parameters(), opt.clip_grad)
            optimizer.step()
            run.meters.update(loss, logits, labels, global_batch_size)
            run.end_step(len(loader), signals)
    summary = run.meters.summary('train')
    return {'epoch': run.epoch + 1, 'epoch_lr': opt.lr * lr_factor(opt, run.epoch), **summary,
            'images_per_second': len(run.splits.train) / summary['train_time']}


@torch.no_grad()
def evaluate(model, forward, images, meters, opt, signals=None):
    """Evaluates a model, in evaluation mode, on images; adds up the results in `meters`.

    model: an nn.Module or a compiled one. Raises StoppedError if `signals` received a signal.
    """
    loader = make_loader(images, opt.batch_size, opt.nthread, rank=rank(), world_size=world_size())
    batches = signals.batches(loader) if signals else iterate_batches(loader)
    with meters.bar:
        for step, (batch, labels, global_batch_size) in enumerate(batches, 1):
            logits = forward(model, batch)
            loss = cross_entropy(logits, labels, global_batch_size)
            meters.update(loss, logits, labels, global_batch_size)
            if signals:
                signals.agree(step == len(loader))


def train(run, resume_command):
    """Trains the remaining epochs of a run; writes the log and checkpoints into opt.save."""
    opt, splits = run.opt, run.splits
    train_model = DistributedDataParallel(run.model) if world_size() > 1 else run.model
    eval_model = run.eval_model
    size = run.forward.preprocess.size
    sizes = progressive_sizes(size, opt.grow, opt.epochs)  # of each epoch, in pixels
    constants = {'num_classes': len(splits.classes),
                 'n_parameters': sum(p.numel() for p in run.model.parameters())}
    loader = make_loader(splits.train, opt.batch_size, opt.nthread, opt.seed, rank(), world_size(),
                         opt.balance)
    with interruptible(run, resume_command) as signals:
        if opt.compile and not run.done:
            train_model, eval_model, entry = compile_models(
                run, train_model, set(sizes[run.epoch:]))
            constants |= entry
        first, start = run.epoch, time.monotonic()
        while not run.done:
            title = f'epoch {run.epoch + 1}/{opt.epochs}'
            if run.epoch > first:
                done, left = (sum(size**2 for size in part)
                              for part in (sizes[first:run.epoch], sizes[run.epoch:]))
                title += f' (run: {(time.monotonic() - start) * left / done / 60:.0f} min left)'
            stats = {**run.args, **train_one_epoch(
                run, train_model, loader, sizes[run.epoch], title, signals)}
            run.eval()
            for split in run.eval_splits:
                images = getattr(splits, split)
                meters = Meters(len(splits.classes), len(images), f'{title}, {split}')
                evaluate(eval_model, run.forward, images, meters, opt, signals)
                stats.update(meters.summary(split))
            run.end_epoch({**stats, **constants})
    if rank() == 0:
        say(run.summary())


def test(opt, loaded, forward, splits):
    """Prints and returns the loss and accuracies of a loaded model on the test images."""
    settings = {'file': loaded.path, 'model': loaded.title, 'image_size': loaded.preprocess.size,
                'batch_size': opt.batch_size, 'nthread': opt.nthread}
    print_settings(settings, loaded.model, splits, forward)
    meters = Meters(loaded.num_classes, len(splits.test), 'test')
    evaluate(loaded.model, forward, splits.test, meters, opt)
    summary = meters.summary('test')
    if rank() == 0:
        say(*(f'{name}: {value:.{4 if name == "test_loss" else 2}f}'
              for name, value in summary.items() if name != 'test_time'))
    return summary


def main(argv=None, splits=None, on_epoch=None):
    """Runs the command line in `argv`; exits with a one-line message and status on an error.

    splits: DataSplits to train or evaluate on, in place of --dataset: see
    `training.data.DataSplits.from_arrays`. on_epoch: called on rank 0 with the log record (a dict)
    of each epoch, when its checkpoint is on disk. Returns the RunResult, or with --evaluate a dict
    with test_loss, test_acc, for 100 classes or more test_acc5, and test_time.
    """
    argv = sys.argv[1:] if argv is None else argv
    opt = options.parse_options(argv, splits)
    resume_argv = argv if opt.resume == 'auto' else [*argv, '--resume', 'auto']
    with checkpoint.Lock(opt.save) as lock:
        with (exit_on_error('train.py', (ValueError, OSError)),
              out_of_memory_as_os_error('use fewer images, or a smaller --image_size or model')):
            if opt.gpu_id:
                os.environ['CUDA_VISIBLE_DEVICES'] = opt.gpu_id  # read when CUDA is first used
            device = distributed.init(opt.deterministic)
            if opt.gpu_id and device.type != 'cuda':
                raise ValueError(f'--gpu_id {opt.gpu_id}: no such CUDA device; use another number, '
                                 'or omit the option to train on the CPU')
            if device.type == 'cpu':
                keep_freed_memory()
            if opt.evaluate:
                loaded, forward, splits = load_for_evaluation(opt, device, splits)
            else:
                run = prepare(opt, device, lock, splits)
                run.on_epoch = on_epoch
        try:
            # from here on other errors are bugs, and keep their traceback
            with (exit_on_error('train.py', (DataError, DivergedError, OSError)),
                  out_of_memory_as_os_error('use a smaller --batch_size')):
                if opt.evaluate:
                    return test(opt, loaded, forward, splits)
                print_settings(run.args, run.model, run.splits, run.forward)
                command = 'python' if distributed.world_size() == 1 else 'torchrun ...'
                train(run, f'train.main({resume_argv!r}, splits)' if splits else
                      f'{command} train.py {shlex.join(resume_argv)}')
                return run.result()
        finally:
            distributed.shutdown()


if __name__ == '__main__':
    main()
