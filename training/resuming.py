"""Resuming a run: its checkpoint, and the options and data that must not change."""

import os

from diracnets.checkpoint import BEST_FILE, MODEL_FILE, PREVIOUS_FILE
from diracnets.class_names import class_positions
from diracnets.preprocessing import Preprocessing
from training import checkpoint, distributed
from training.log import LOG_FILE, read_log
from training.options import default_flip

# may differ when a run is resumed; every other option changes its result
FREE_ON_RESUME = {
    'check', 'checkpointing', 'compile', 'dataroot', 'deterministic', 'epochs', 'evaluate', 'force',
    'gpu_id', 'keep_every', 'name', 'ngpu', 'nthread', 'pretrained', 'recipe', 'resume', 'save',
    'save_every', 'skip_corrupt', 'tensorboard',
}


def find_checkpoint(opt):
    """Returns the checkpoint to resume from, or its folder; '' to start a new run.

    Raises ValueError if --save contains a run that would be overwritten, or a file of a run that is
    not a regular file.
    """
    check_file_types(opt.save)
    saved, log = checkpoint.exists(opt.save), os.path.join(opt.save, LOG_FILE)
    epochs = len(read_log(log)) if os.path.exists(log) else 0
    path = opt.resume
    # torchrun restarts all processes when one dies: they resume the run that they started
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0 and saved
    if restarted and checkpoint.load(opt.save).get('launcher') == distributed.launcher():
        path = opt.save
    if path == 'auto':
        path = opt.save if saved else ''
        epochs = max(0, epochs - 1)  # a crash may come between the first log line and checkpoint
    # an older checkpoint, such as epoch-N.pt7, would replace the newest one and the log
    is_newest = os.path.isdir(path) or os.path.basename(path) in (MODEL_FILE, PREVIOUS_FILE)
    source = path if os.path.isdir(path) else os.path.dirname(path) or '.'
    resumes_here = is_newest and os.path.realpath(source) == os.path.realpath(opt.save)
    has_best = opt.resume != 'auto' and os.path.exists(os.path.join(opt.save, BEST_FILE))
    if (saved or epochs or has_best) and not resumes_here:
        fix = 'add --resume auto, or use' if saved else 'it has no checkpoint to resume; use'
        raise ValueError(f'--save {opt.save}: contains a run; {fix} another --save')
    return path


def check_file_types(folder):
    """Raises ValueError if a file of a run is a folder, or a FIFO, which would block its reader."""
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        is_of_run = entry.name.endswith(('.pt7', '.pt7.tmp', LOG_FILE, f'{LOG_FILE}.tmp'))
        if is_of_run and os.path.exists(entry.path) and not entry.is_file():
            raise ValueError(f'{entry.path}: not a regular file; remove it, or use another --save')


def changed_options(now, before):
    """Lists the options that change the result of a run and differ between two `args`.

    now, before: the `args` of the checkpoint to write and of the one to resume.
    """
    free = set(FREE_ON_RESUME)
    if now['lr_schedule'] != 'step' or now['grow']:
        free -= {'epochs'}  # other schedules and progressive resizing stretch over all epochs
    if 'dataset' in before:  # fill in what older checkpoints lack
        older = {'crop': True, 'flip': default_flip(before['dataset']), 'normalise': '',
                 'optimizer': 'sgd', 'grow': [], 'whiten': False, 'cutout': 0,
                 'balance': False, 'clip_grad': 0, 'ema': 0, 'freeze': 'none'}
        before = {**older, **before, 'image_size': Preprocessing.from_args(before).size}
        # data from Python differ from a named dataset, where `given` is missing
        now, before = ({**args, 'given': args.get('given')} for args in (now, before))
    return [
        f'{name} changed from {before[name] or repr(before[name])} to {value or repr(value)}'
        for name, value in now.items()
        if name not in free and name in before and before[name] != value
    ]


def check_options(opt, dtype, saved_args, path):
    """Raises ValueError for options that change the result of the run to resume, without --force.

    dtype: resolved --dtype; saved_args: the `args` of the checkpoint at `path`.
    """
    changed = changed_options({**vars(opt), 'dtype': dtype}, saved_args)
    if changed and not opt.force:
        raise ValueError(f'{path}: {"; ".join(changed)}; use the same options, or --force')
    optimizer = saved_args.get('optimizer', 'sgd')
    if optimizer != opt.optimizer:  # its state does not fit, also with --force
        raise ValueError(f'{path}: optimizer changed from {optimizer} to {opt.optimizer}; use the '
                         'same optimizer, or start from the checkpoint with --pretrained')


def check_files(files, opt, saved_args, path):
    """Raises ValueError if the images of the run to resume were others, without --force.

    files: fingerprint of the class folders, as in DataSplits.
    """
    saved = saved_args.get('files', files)
    if files != saved and not opt.force:
        raise ValueError(f'{path}: the images changed from {saved} to {files}; use the same '
                         'images, or --force')


def match_saved_classes(splits, saved):
    """Returns splits with the order of the class names in the checkpoint to resume, if any."""
    positions = class_positions(splits.classes, saved)
    if not positions or len(saved) != len(positions):
        return splits  # Run.restore raises for other classes
    return splits.with_classes(saved, positions)
