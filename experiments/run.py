"""Trains the runs of an experiment, measures them and draws the results.

    python -m experiments.run depth --dataroot ../cifar10-jpeg
    python -m experiments.run depth --only 'plain*'        # another machine trains the others
    python -m experiments.run ranks                        # a script: commands, one by one
    python -m experiments.run --list                       # all of them, with estimated hours

experiments/definitions.py defines the experiments and scripts. The result of a run is appended to
logs/NAME/results.csv, its log is copied to logs/trainings/. Finished runs are skipped, interrupted
runs are resumed, and runs that another process trains are skipped.
"""

import argparse
import fnmatch
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import diracnets
import train
from cli import ArgumentParser, exit_on_error, print_table, say
from diracnets.checkpoint import MODEL_FILE
from experiments import figures, measures
from experiments.definitions import (
    BUDGETS,
    EXPERIMENTS,
    SCRIPTS,
    command_line,
    estimated_hours,
    estimated_seconds,
    training_multiply_adds,
)
from experiments.release import write_log
from experiments.results import CPU, ROOT, append_results, device_name, environment, read_csv
from training.checkpoint import DivergedError, Lock
from training.compilation import free_compiled_models
from training.folders import class_folders, files_of
from training.log import LOG_FILE, read_log
from training.options import DATASETS


@dataclass(frozen=True)
class Paths:
    """The folders that runs read from and write to."""

    logs: Path  # CSV files, logs and figures, tracked by git
    runs: Path  # checkpoints
    dataset: str
    dataroot: str

    def dataset_of(self, run):
        return run.options.get('dataset', self.dataset)

    def run_folder(self, run):
        return self.runs / self.dataset_of(run) / run.run_name

    def results(self, experiment):
        return self.logs / experiment / 'results.csv'

    def result(self, run, experiment):
        """Returns the record of a run in the results of an experiment, or None."""
        key = run.run_name, self.dataset_of(run)
        return next((record for record in read_csv(self.results(experiment))
                     if (record['run'], record['dataset']) == key), None)

    def result_of_any(self, run):
        """Returns the first record of a run in the results of all experiments, or None."""
        return next(filter(None, (self.result(run, name) for name in EXPERIMENTS)), None)


# ---------------------------------------------------------------- one run


@torch.no_grad()
def change_init(model, init):
    """Changes the initialization of all filters except 1x1 ones; returns the model.

    `init` is 'scaled-0.1', which multiplies the filters by 0.1, or 'delta-orthogonal': an
    orthogonal matrix in the kernel's center, zeros around it (Xiao et al., arXiv 1806.05393,
    algorithm 1). Raises ValueError for another name.
    """
    for parameter in model.parameters():
        if parameter.dim() != 4 or parameter.shape[-1] == 1:
            continue
        if init == 'delta-orthogonal':
            center = parameter.shape[-1] // 2
            parameter.zero_()
            nn.init.orthogonal_(parameter[:, :, center, center])
        elif init.startswith('scaled-'):
            parameter.mul_(float(init.removeprefix('scaled-')))
        else:
            raise ValueError(f'init {init!r}: unknown; use delta-orthogonal or scaled-NUMBER')
    return model


def write_init(run, path):
    """Writes the initial parameters of a run: those of its seed, then changed."""
    torch.manual_seed(run.seed)
    sizes = {name: run.options[name] for name in ('depth', 'width')}
    model = diracnets.create_model(run.options['model'], 'CIFAR10', **sizes)
    torch.save(change_init(model, run.init).state_dict(), path)


def train_one(run, paths):
    """Trains or resumes a run; returns 'complete' if it finished, or 'diverged'."""
    arguments = command_line({
        'dataset': paths.dataset, 'dataroot': paths.dataroot, **run.options,
        'seed': run.seed, 'save': paths.run_folder(run), 'resume': 'auto'})
    if run.init:
        params = paths.run_folder(run).with_name(f'{run.run_name}.start.pth')
        write_init(run, params)
        arguments += ['--pretrained', str(params)]
    try:
        train.main(arguments)
    except SystemExit as stopped:
        if stopped.code != DivergedError.status:
            raise
        return 'diverged'
    finally:
        if torch.cuda.is_available():
            free_compiled_models()
    return 'complete'


def training_device():
    """Returns the name of the device that train.py uses."""
    return device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))


def copy_log(run, paths):
    """Copies the log of a run into the tracked logs; returns (epochs, path relative to logs/).

    Logs of a GPU have a folder of their own, as a CPU may have trained the same run.
    """
    log = paths.run_folder(run) / LOG_FILE
    gpu = [] if training_device() == CPU else [training_device().replace(' ', '-')]
    copy = Path('trainings', paths.dataset_of(run), *gpu, f'{run.run_name}.txt')
    if not log.exists():  # it diverged in its first epoch
        return [], ''
    epochs = read_log(log)
    write_log(epochs, paths.logs / copy)
    return epochs, str(copy)


def make_result(run, paths, ended):
    """Returns the record of a run that has ended: settings, metrics and environment."""
    epochs, log = copy_log(run, paths)
    last = epochs[-1] if epochs else {}
    return {
        'series': run.series, 'x': run.x, 'seed': run.seed, 'ended': ended,
        'test_acc_percent': last.get('test_acc', ''), 'test_loss': last.get('test_loss', ''),
        'train_acc_percent': last.get('train_acc', ''), 'train_loss': last.get('train_loss', ''),
        'epochs': len(epochs),
        'train_seconds': round(sum(stats['train_time'] for stats in epochs)),
        'parameters': last.get('n_parameters', ''),
        'multiply_adds': training_multiply_adds(run, paths.dataset_of(run)),
        'dataset': paths.dataset_of(run), 'run': run.run_name, 'log': log,
        'device': training_device(), **environment(), 'dtype': last.get('dtype', ''),
    }


def is_done(run, experiment, paths):
    """Returns whether a run has its result and, if the experiment has measurements, those."""
    result = paths.result(run, experiment)
    if not result or result['ended'] != 'complete' or experiment not in measures.RUN_MEASURES:
        return bool(result)
    return run.run_name in measures.measured_runs(experiment, paths.logs)


def needs_training(run, experiment, paths):
    """Returns whether a run has no result anywhere, or lacks the checkpoint to measure."""
    result = paths.result_of_any(run)
    if not result:
        return True
    has_checkpoint = (paths.run_folder(run) / MODEL_FILE).exists()
    is_measured = result['ended'] == 'complete' and experiment in measures.RUN_MEASURES
    return is_measured and not has_checkpoint


def check_same_run(run, result, paths):
    """Raises ValueError if a checkpoint is not of the run that gave the result.

    A replication of a run whose checkpoint was deleted may differ, for example on another machine.
    """
    in_log = measures.epochs_and_accuracy(run, paths)
    if in_log != [result['epochs'], result['test_acc_percent']]:
        raise ValueError(
            f'{paths.run_folder(run)}: epochs and accuracy {", ".join(in_log)}: expected '
            f'{result["epochs"]}, {result["test_acc_percent"]} as in its result; use another '
            '--logs to start from scratch')


def finish(run, experiment, paths):
    """Trains a run if needed and adds its result to the experiment; returns whether it trained."""
    result, to_train = paths.result_of_any(run), needs_training(run, experiment, paths)
    ended = train_one(run, paths) if to_train else ''
    if not result:
        result = make_result(run, paths, ended)
    elif experiment in measures.RUN_MEASURES and result['ended'] == 'complete':
        check_same_run(run, result, paths)
    if not paths.result(run, experiment):
        point = {'series': run.series, 'x': run.x, 'seed': run.seed}
        append_results([{**result, **point}], paths.results(experiment))
    return to_train


# ---------------------------------------------------------------- the command


def train_all(runs, experiment, paths):
    """Trains and measures the runs; prints the progress and the time left before each.

    Runs that another process trains are skipped.
    """
    estimates = [estimated_seconds(run, paths.dataset_of(run))
                 if needs_training(run, experiment, paths) else 0 for run in runs]
    estimated, measured = 0, 0  # seconds of the runs that are done
    for i, run in enumerate(runs):
        pace = measured / estimated if estimated else 1
        say('', f'{experiment}: run {i + 1} of {len(runs)}: {run.title}; '
            f'{pace * sum(estimates[i:]) / 3600:.1f} h left')
        start = time.monotonic()
        folder = paths.run_folder(run)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock_file = folder.with_name(f'{run.run_name}.lock')
        lock_file.touch()
        with Lock(lock_file) as lock:
            try:
                lock.acquire()
            except ValueError:
                say('skipped: another process trains it')
                continue
            trained = finish(run, experiment, paths)
            measures.measure_run(experiment, run, paths)
            if trained:
                estimated, measured = estimated + estimates[i], measured + time.monotonic() - start


def check_same_images(paths):
    """Raises ValueError if the first log that lists its image files was of others than --dataroot.

    Without class folders in --dataroot nothing is checked, and finished runs can be drawn.
    """
    if not class_folders(os.path.join(paths.dataroot, 'train')):
        return
    logs = (paths.logs / record['log'] for experiment in EXPERIMENTS
            for record in read_csv(paths.results(experiment))
            if record['dataset'] == 'Folder' and record['log'])
    logged = next((stats['files'] for log in logs if log.exists()
                   for stats in read_log(log)[:1] if 'files' in stats), None)
    files = files_of(paths.dataroot, DATASETS['Folder'].test_folders)
    if logged not in (None, files):
        raise ValueError(f'{paths.dataroot}: {files}; the results in {paths.logs} are of {logged}; '
                         'use another --logs')


def run_experiment(experiment, runs, paths):
    """Trains and measures the unfinished runs, and draws the figure of all results.

    Raises ValueError if the results are of other images, or cannot be measured.
    """
    if experiment == 'int8' and paths.dataset != 'Folder':
        raise ValueError(f'int8 with {paths.dataset}: it calibrates on image files; use --dataset '
                         'Folder')
    others = {record['dataset'] for record in read_csv(paths.results(experiment))} - {
        paths.dataset_of(run) for run in runs}
    if runs and others:
        raise ValueError(f'{paths.results(experiment)}: has results of {", ".join(others)}; use '
                         'another --logs')
    if any(paths.dataset_of(run) == 'Folder' for run in runs):
        check_same_images(paths)
    start = time.monotonic()
    train_all([run for run in runs if not is_done(run, experiment, paths)], experiment, paths)
    if experiment in measures.EXPERIMENT_MEASURES:
        measures.EXPERIMENT_MEASURES[experiment](runs, paths)
    path = figures.save(experiment, paths.logs)
    done = sum(is_done(run, experiment, paths) for run in runs)
    hours = (time.monotonic() - start) / 3600
    say(f'{experiment}: {done} of {len(runs)} runs done, figure in {path}; this command took '
        f'{hours:.2f} h')


def run_script(commands):
    """Runs Python commands in order; raises RuntimeError if one fails."""
    for arguments, variables in commands:
        say('', 'python ' + ' '.join(arguments))
        status = subprocess.run([sys.executable, *arguments], cwd=ROOT,
                                env={**os.environ, **variables}).returncode
        if status:
            raise RuntimeError(f'python {" ".join(arguments)}: failed with exit status {status}')


def show_list(budget):
    """Prints the experiments with their estimated hours, and the scripts."""
    lines = []
    for name, define in EXPERIMENTS.items():
        runs = define(budget)
        hours = f'{estimated_hours(name, budget, runs):.1f}'
        lines.append([name, str(len(runs)), hours, define.__doc__])
    lines += [[name, '', '', define.__doc__.splitlines()[0]] for name, define in SCRIPTS.items()]
    print_table(['name', 'runs', 'hours', 'question'], lines, left=['question'])
    print('\nhours: upper bound, on 2 idle CPU cores in bfloat16')


def parse_options(argv):
    parser = ArgumentParser(prog='experiments.run', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('experiment', nargs='?', choices=[*EXPERIMENTS, *SCRIPTS], help='experiment or script')
    add('--list', action='store_true', help='print all of them and exit')
    add('--budget', default='small', choices=BUDGETS,
        help="small: 4 epochs, 3 seeds; medium: 30 epochs, 3 seeds; paper: the paper's 200 epochs, "
             '5 seeds; tiny: a test of the code (default: %(default)s)')
    add('--only', default='*', metavar='PATTERN',
        help="train only these runs, such as 'plain*' or '*seed 1' (default: all)")
    add('--dataset', choices=('Folder', 'CIFAR10', 'Digits'),
        help='dataset; a Folder contains CIFAR-10 (default: Folder; Digits for budget tiny)')
    add('--dataroot', default='.',
        help='folder of its files: train/CLASS and test/CLASS of a Folder (default: .)')
    add('--logs', type=Path,
        help='folder of the results (default: logs, or logs/BUDGET for other budgets than small)')
    add('--runs', default=ROOT / 'runs', type=Path,
        help='folder of the checkpoints, which may be deleted afterwards (default: runs)')
    opt = parser.parse_args(argv)
    if not opt.experiment and not opt.list:
        parser.error(f'no experiment: use one of {", ".join((*EXPERIMENTS, *SCRIPTS))}, or --list')
    ignored = [name for name in ('budget', 'only', 'dataset', 'logs', 'runs')
               if getattr(opt, name) != parser.get_default(name)]
    if opt.experiment in SCRIPTS and ignored:
        parser.error(f'--{ignored[0]}: not for the script {opt.experiment}')
    return opt


def main(argv=None):
    opt = parse_options(argv)
    budget = BUDGETS[opt.budget]
    with exit_on_error('experiments.run'):
        if opt.list:
            show_list(budget)
        elif opt.experiment in SCRIPTS:
            run_script(SCRIPTS[opt.experiment](os.path.abspath(opt.dataroot)))
        else:
            logs = opt.logs or ROOT / 'logs' / ('' if opt.budget == 'small' else opt.budget)
            paths = Paths(logs, opt.runs, opt.dataset or budget.dataset, opt.dataroot)
            runs = [run for run in EXPERIMENTS[opt.experiment](budget)
                    if fnmatch.fnmatch(run.title, opt.only)]
            if not runs and opt.only != '*':
                raise ValueError(f'--only {opt.only}: no run of {opt.experiment} matches; use a '
                                 "pattern such as '*, seed 1'")
            run_experiment(opt.experiment, runs, paths)


if __name__ == '__main__':
    main()
