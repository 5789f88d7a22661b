"""Trains what a claim of the paper rests on, and draws what came out.

    python -m experiments.run depth --dataroot ../cifar10-jpeg
    python -m experiments.run depth --only 'plain*'        # as another machine does the others
    python -m experiments.run --list                       # what there is, and its hours

The experiments are those of experiments/definitions.py. A row of each training goes to
logs/NAME/results.csv, its log to logs/trainings/. What has a row is not trained again, what was
stopped goes on where it was, and what another process trains is left to it.
"""

import argparse
import fnmatch
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import diracnets
import train
from cli import ArgumentParser, exit_on_error, print_table, say
from diracnets.checkpoint import MODEL_FILE
from experiments import figures, measures
from experiments.cost_estimate import hours_of, seconds, work
from experiments.definitions import BUDGETS, EXPERIMENTS, words_of
from experiments.init import started
from experiments.interleaved import ROOT, append, device_name, environment, read_rows
from experiments.release import write_log
from training.checkpoint import DivergedError, Lock
from training.log import LOG_FILE, read_log
from training.options import DATASETS, expand_path


@dataclass(frozen=True)
class Paths:
    """Where trainings find their images, and leave what they make."""

    logs: Path  # tables, logs and figures, which git keeps
    runs: Path  # checkpoints
    dataset: str
    dataroot: str

    def dataset_of(self, training):
        return training.options.get('dataset', self.dataset)

    def expand_path(self, training):
        """Where the run of a training is, or will be."""
        return self.runs / self.dataset_of(training) / training.run

    def table(self, experiment):
        return self.logs / experiment / 'results.csv'

    def row(self, training, experiment):
        """The row of a training in the table of an experiment, or None."""
        rows = read_rows(self.table(experiment))
        key = training.run, self.dataset_of(training)
        return next((row for row in rows if (row['run'], row['dataset']) == key), None)

    def row_of_any(self, training):
        """The row of a training in the first table that has it, or None."""
        return next(filter(None, (self.row(training, name) for name in EXPERIMENTS)), None)


# ---------------------------------------------------------------- one training


def write_start(training, path):
    """Writes the parameters that a training starts from: those of its seed, then changed."""
    torch.manual_seed(training.seed)
    sizes = {name: training.options[name] for name in ('depth', 'width')}
    network = diracnets.create_model(training.options['model'], 'CIFAR10', **sizes)
    torch.save(started(network, training.start).state_dict(), path)


def train_one(training, place):
    """Trains, or goes on; returns how it ended: 'whole', or 'diverged'."""
    words = words_of({
        'dataset': place.dataset, 'dataroot': place.dataroot, **training.options,
        'seed': training.seed, 'save': place.folder(training), 'resume': 'auto'})
    if training.start:
        start = place.folder(training).with_name(f'{training.run}.start.pth')
        write_start(training, start)
        words += ['--pretrained', str(start)]
    try:
        train.main(words)
    except SystemExit as ending:
        if ending.code != DivergedError.status:
            raise
        return 'diverged'
    return 'whole'


def device():
    """What trains: the name of the GPU, or 'CPU'."""
    return device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))


def keep_log(training, place):
    """Copies the log of a training to where git keeps it: (its epochs, its path under logs/).

    Those of a GPU have a folder of their own, as the same training may have been done on a CPU.
    """
    log = place.folder(training) / LOG_FILE
    gpu = [] if device() == 'CPU' else [device().replace(' ', '-')]
    kept = Path('trainings', place.dataset_of(training), *gpu, f'{training.run}.txt')
    if not log.exists():  # it diverged in its first epoch
        return [], ''
    epochs = read_log(log)
    write_log(epochs, place.logs / kept)
    return epochs, str(kept)


def row_of(training, place, ended):
    """The row of a training that has ended: what it was, its figures, and where it was made."""
    epochs, log = keep_log(training, place)
    last = epochs[-1] if epochs else {}
    return {
        'series': training.series, 'x': training.x, 'seed': training.seed, 'ended': ended,
        'test_acc_percent': last.get('test_acc', ''), 'test_loss': last.get('test_loss', ''),
        'train_acc_percent': last.get('train_acc', ''), 'train_loss': last.get('train_loss', ''),
        'epochs': len(epochs),
        'train_seconds': round(sum(stats['train_time'] for stats in epochs)),
        'parameters': last.get('n_parameters', ''),
        'multiply_adds': work(training, place.dataset_of(training)),
        'dataset': place.dataset_of(training), 'run': training.run, 'log': log,
        'device': device(), **environment(), 'dtype': last.get('dtype', ''),
    }


def is_done(training, experiment, place):
    """Whether nothing is left of a training: its row is there, and what is measured of it."""
    row = place.row(training, experiment)
    if not row or row['ended'] != 'whole' or experiment not in measures.OF_PARAMETERS:
        return bool(row)
    return training.run in measures.measured(experiment, place.logs)


def is_to_train(training, experiment, place):
    """Whether a training has no row in any table, or lacks parameters that are to be measured."""
    row = place.row_of_any(training)
    if not row:
        return True
    kept = (place.folder(training) / MODEL_FILE).exists()
    return row['ended'] == 'whole' and experiment in measures.OF_PARAMETERS and not kept


def expect_its_parameters(training, row, place):
    """Raises ValueError if the run of a training is another one than that of its row.

    What was trained again, as its parameters were gone, may be: on another machine, for one.
    """
    log = place.folder(training) / LOG_FILE
    epochs = read_log(log) if log.exists() else []
    there = [str(len(epochs)), *(str(stats['test_acc']) for stats in epochs[-1:])]
    if there != [row['epochs'], row['test_acc_percent']]:
        raise ValueError(
            f'{log.parent}: epochs and accuracy {", ".join(there)}: expected '
            f'{row["epochs"]}, {row["test_acc_percent"]}, as its row has; another --logs begins '
            'anew')


def finish(training, experiment, place):
    """Sees to it that a training has its row and, where they are measured, its parameters.

    Returns whether anything was trained.
    """
    row, to_train = place.row_of_any(training), is_to_train(training, experiment, place)
    ended = train_one(training, place) if to_train else ''
    if not row:
        row = row_of(training, place, ended)
    elif experiment in measures.OF_PARAMETERS and row['ended'] == 'whole':
        expect_its_parameters(training, row, place)
    if not place.row(training, experiment):
        where = {'series': training.series, 'x': training.x, 'seed': training.seed}
        append([{**row, **where}], place.table(experiment))
    return to_train


# ---------------------------------------------------------------- the command


def train_all(trainings, experiment, place):
    """Trains and measures one after the other; a line before each says how far all are, and the
    time left.

    What another process trains now is left to it.
    """
    counted = [seconds(training, place.dataset_of(training))
               if is_to_train(training, experiment, place) else 0 for training in trainings]
    done, took = 0, 0
    for i, training in enumerate(trainings):
        pace = took / done if done else 1
        say(f'\n{experiment}: training {i + 1} of {len(trainings)}: {training.name}; '
            f'{pace * sum(counted[i:]) / 3600:.1f} h left')
        begun = time.monotonic()
        folder = place.folder(training)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock_file = folder.with_name(f'{training.run}.lock')
        lock_file.touch()
        with Lock(lock_file) as lock:
            try:
                lock.acquire()
            except ValueError:
                say('left out: another process trains it')
                continue
            trained = finish(training, experiment, place)
            measures.measure(experiment, training, place)
            if trained:
                done, took = done + counted[i], took + time.monotonic() - begun


def run(experiment, trainings, place):
    """Trains and measures what is left, and draws the figure from all that is there.

    Raises ValueError for a table of another data set, and for one that cannot be measured.
    """
    if experiment == 'int8' and place.dataset != 'Folder':
        raise ValueError(f'int8 with {place.dataset}: expected --dataset Folder, on whose training '
                         'images it is calibrated')
    others = {row['dataset'] for row in read_rows(place.table(experiment))} - {
        place.dataset_of(training) for training in trainings}
    if trainings and others:
        raise ValueError(f'{place.table(experiment)} has rows of {", ".join(others)}: expected '
                         'another --logs')
    begun = time.monotonic()
    left = [training for training in trainings if not is_done(training, experiment, place)]
    train_all(left, experiment, place)
    if experiment in measures.OF_UNTRAINED:
        measures.OF_UNTRAINED[experiment](trainings, place)
    path = figures.save(experiment, place.logs)
    done = sum(is_done(training, experiment, place) for training in trainings)
    hours = (time.monotonic() - begun) / 3600
    say(f'{experiment}: {done} of {len(trainings)} trainings done, drawn in {path}; this command '
        f'took {hours:.2f} h')


def show_list(budget):
    """Prints what there is, with the hours that it takes."""
    rows = []
    for name, define in EXPERIMENTS.items():
        trainings = define(budget)
        hours = hours_of(name, budget, trainings)
        rows.append([name, str(len(trainings)), f'{hours:.1f}', define.__doc__])
    print_table(['experiment', 'trainings', 'hours', 'asks'], rows, left=['asks'])
    print('\nhours: of 2 CPU cores in bfloat16 that do nothing else, at most')


def parse_options(argv):
    parser = ArgumentParser(prog='experiments.run', description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('experiment', nargs='?', choices=EXPERIMENTS, help='which one')
    add('--list', action='store_true', help='print all of them, and end')
    add('--budget', default='small', choices=BUDGETS,
        help="small: 4 epochs, 3 seeds; paper: the paper's 200 epochs, 5 seeds; tiny: a test of "
             'the code (default: %(default)s)')
    add('--only', default='*', metavar='PATTERN',
        help="of the trainings, such as 'plain*' or '*seed 1' (default: all)")
    add('--dataset', choices=DATASETS, help="data set (default: Folder; tiny's is Digits)")
    add('--dataroot', default='.', type=expand_path,
        help='folder of its files: train/CLASS and test/CLASS of a Folder (default: .)')
    add('--logs', type=Path,
        help='folder of the tables (default: logs, logs/paper for that budget)')
    add('--runs', default=ROOT / 'runs', type=Path,
        help='folder of the checkpoints, which may be deleted after (default: runs)')
    opt = parser.parse_args(argv)
    if not opt.experiment and not opt.list:
        parser.error(f'no experiment: expected one of {", ".join(EXPERIMENTS)}, or --list')
    return opt


def main(argv=None):
    opt = parse_options(argv)
    budget = BUDGETS[opt.budget]
    if opt.list:
        show_list(budget)
        return
    trainings = [training for training in EXPERIMENTS[opt.experiment](budget)
                 if fnmatch.fnmatch(training.name, opt.only)]
    logs = opt.logs or ROOT / 'logs' / ('' if opt.budget == 'small' else opt.budget)
    place = Paths(logs, opt.runs, opt.dataset or budget.dataset, opt.dataroot)
    with exit_on_error('experiments.run'):
        if not trainings and opt.only != '*':
            raise ValueError(f'--only {opt.only}: no training of {opt.experiment} is called so: '
                             "expected a pattern such as '*, seed 1'")
        run(opt.experiment, trainings, place)


if __name__ == '__main__':
    main()
