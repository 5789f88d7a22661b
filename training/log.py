"""The log of a run, log.txt: one `json_stats: {...}` line per epoch."""

import json
import operator
import os

from training.files import write_beside

LOG_FILE = 'log.txt'
LOG_PREFIX = 'json_stats: '  # before each record of the log


def append_log(folder, stats):
    """Adds a line to the log: when this returns it is on the disk. Raises OSError."""
    path = os.path.join(folder, LOG_FILE)
    try:
        with open(path, 'a') as log:
            log.write(f'{LOG_PREFIX}{json.dumps(stats)}\n')  # one write: a line is whole or missing
            log.flush()
            os.fsync(log.fileno())
    except OSError as error:
        raise OSError(f'{path} cannot be written ({error.strerror})') from error


def read_log(path):
    """Reads a log.txt: a list of dicts, one for each epoch, in order.

    An epoch that ran again counts as it was last. A record that a crash cut short is left out, also
    where a later one follows it in the same line. `epoch_lr` is the learning rate of an epoch's
    first step; older logs call it `lr`, which is the option --lr now.
    """
    epochs = {}
    with open(path, encoding='utf-8', errors='replace') as log:
        records = log.read().split(LOG_PREFIX)[1:]
    for record in records:
        try:
            stats, _ = json.JSONDecoder().raw_decode(record)
            number = operator.index(stats['epoch'])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if 'lr' in stats:
            stats.setdefault('epoch_lr', stats['lr'])
        epochs[number] = stats
    return [epochs[epoch] for epoch in sorted(epochs)]


def truncate_log(folder, epoch):
    """Leaves the epochs up to `epoch` in the log: those after it are about to run again."""
    path = os.path.join(folder, LOG_FILE)
    if not os.path.exists(path):
        return
    kept = [stats for stats in read_log(path) if stats['epoch'] <= epoch]
    lines = ''.join(f'{LOG_PREFIX}{json.dumps(stats)}\n' for stats in kept)
    write_beside(path, lines.encode())
    os.replace(path + '.tmp', path)
