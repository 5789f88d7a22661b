"""The log of a run, log.txt: one `json_stats: {...}` line per epoch."""

import json
import operator
import os

from training.files import atomic_write

LOG_FILE = 'log.txt'
LOG_PREFIX = 'json_stats: '  # starts each record


def append_log(folder, stats):
    """Appends a record to the log and syncs it to disk. Raises OSError."""
    path = os.path.join(folder, LOG_FILE)
    try:
        with open(path, 'a') as log:
            log.write(_record(stats))  # a single write: the line is complete or missing
            log.flush()
            os.fsync(log.fileno())
    except OSError as error:
        raise OSError(f'{path}: cannot be written ({error.strerror})') from error


def read_log(path):
    """Reads a log.txt: a list of dicts, one per epoch, in order of epochs.

    Of repeated epochs the last record counts. Records that a crash truncated are skipped, also
    where the next record follows on the same line.
    """
    epochs = {}
    with open(path, encoding='utf-8', errors='replace') as log:
        records = log.read().split(LOG_PREFIX)[1:]
    for record in records:
        try:
            stats, _ = json.JSONDecoder().raw_decode(record)
            epochs[operator.index(stats['epoch'])] = stats
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return [epochs[epoch] for epoch in sorted(epochs)]


def truncate_log(folder, epoch):
    """Removes the records of the epochs after `epoch`, which are about to run again."""
    path = os.path.join(folder, LOG_FILE)
    if os.path.exists(path):
        records = [_record(stats) for stats in read_log(path) if stats['epoch'] <= epoch]
        atomic_write(path, ''.join(records).encode())


def _record(stats):
    return f'{LOG_PREFIX}{json.dumps(stats)}\n'
