"""Measures training and inference rates on a CUDA GPU, in order of importance.

    python -m experiments.gpu                 # starts no measurement after 8 minutes
    python -m experiments.gpu --minutes 20
    python -m experiments.gpu --no-checks --no-compile --minutes 2   # the shortest run
    python -m experiments.gpu --device cpu    # a dry run with small models, saved in runs/gpu

It first runs the tests of tests/test_cuda.py, which compare the GPU with the CPU; if one fails, the
exit status is 1. It needs no network and no files: images are random. Results are appended to files
in logs/gpu: rates.csv (images per second), runs.csv (cost of a run of 200 epochs) and profile.csv
(kernels of a step). Call it again to continue: what the same device and commit have measured is
skipped.
"""

import argparse
import functools
import gc
import itertools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from tqdm import tqdm

import diracnets
from cli import ArgumentParser, exit_on_error, print_table, say
from diracnet import DiracNet
from diracnets.preprocessing import Preprocessing
from experiments.gpu_results import (
    BASELINES,
    COMPILED,
    EAGER,
    FORMS,
    UNCOMPILED,
    standard_convolutions,
)
from experiments.gpu_runs import profile_records, profile_step, run_cost
from experiments.interleaved import Variant, print_records, timing_columns
from experiments.results import ROOT, append_results, device_name, environment, read_csv
from experiments.variants import (
    diracnet,
    folded_resnet,
    inference,
    jpegs_for_gpu,
    make_sgd,
    multiply_adds,
    standard,
    train_step,
)
from training import folders
from training.choices import available_cores
from training.compilation import compile_model, error_line, free_compiled_models
from training.compute import Forward
from training.options import at_least
from training.timing import interleave, matmul_gflops, seconds_per_call, synchronize

MIN_REPETITIONS, MAX_REPETITIONS = 6, 20
MIN_SECONDS = 0.2  # of work in one repetition
CHANGES = 'channels-last weights', 'max-autotune', 'optimizer of one kernel per tensor'
PRINTED = {  # header: format of a cell
    'baseline': '{ratio_to}', 'TFLOP/s': '{tflop_per_second:,.1f}',
    '% of matmul peak': '{percent_of_product:.0f}',
}


# ---------------------------------------------------------------- timed work


def training_step(make, dataset, batch, form, device):
    """Prepares a step of train.py on random images.

    form: EAGER, or one of FORMS, or one of CHANGES, which are applied to COMPILED.
    """
    preprocess = Preprocessing.for_dataset(dataset)
    eager = form == EAGER
    model = make().to(device)
    if form == 'channels-last weights':
        model = model.to(memory_format=torch.channels_last)
    fused = device.type == 'cuda' and form not in (EAGER, 'optimizer of one kernel per tensor')
    optimizer = make_sgd(model, fused=fused)
    compiled = model
    if form in (COMPILED, *CHANGES):
        mode = 'max-autotune' if form == 'max-autotune' else 'reduce-overhead'
        compiled = compile_model(model, device, mode)
    forward = Forward(preprocess, 'float' if eager else 'bfloat16', device)
    images = torch.randint(256, (batch, preprocess.size, preprocess.size, 3), dtype=torch.uint8,
                           device=device).permute(0, 3, 1, 2)  # (N, 3, H, W), channels last
    if eager:
        images = images.contiguous()
    labels = torch.randint(10, (batch,), device=device)
    return functools.partial(train_step, optimizer, compiled, forward, images, labels, batch)


# ---------------------------------------------------------------- comparisons


@dataclass
class Comparison:
    title: str
    variants: list  # all of them are in memory at the same time
    target: str = ''  # as text


def compare_training(depth, width, dataset, batch, device, resnet, target=''):
    """Compares training of DiracNet-depth-width with standard convolutions and with a ResNet.

    `resnet` is (name, function that makes the ResNet).
    """
    size = Preprocessing.for_dataset(dataset).size
    make = functools.partial(diracnet, depth, width, dataset)
    forms = [(form, make, form) for form in (*FORMS, EAGER)]
    baseline = functools.partial(standard, depth, width, dataset)
    forms += [(standard_convolutions(form), baseline, form) for form in FORMS]
    forms += [(f'{resnet[0]}, {form}', resnet[1], form) for form in FORMS]
    variants = [
        Variant(name, training_step, (make, dataset, batch, form, device), batch,
                3 * multiply_adds(make, pixels=size))
        for name, make, form in forms
    ]
    return Comparison(f'training {depth}-{width:g}, batch {batch}', variants, target)


def compare_changes(depth, width, batch, device):
    """Compares training of a DiracNet for CIFAR with changes of its settings."""
    make = functools.partial(diracnet, depth, width)
    cost = 3 * multiply_adds(make)
    variants = [Variant(form, training_step, (make, 'CIFAR10', batch, form, device), batch, cost)
                for form in (COMPILED, *CHANGES)]
    return Comparison(f'changes of training {depth}-{width:g}, batch {batch}', variants)


def compare_inference(depth, batch, device, target=''):
    """Compares the folded DiracNet for ImageNet with torchvision's folded ResNet."""
    makers = {f'DiracNet-{depth}': functools.partial(DiracNet, depth),
              f'resnet{depth}, folded': functools.partial(folded_resnet, depth)}
    variants = [
        Variant(f'{name}, {form}', inference, (make, batch, form, device), batch,
                multiply_adds(make, pixels=224))
        for form in ('deploy()', EAGER) for name, make in makers.items()
    ]
    return Comparison(f'inference {depth}, batch {batch}', variants, target)


def write_jpegs(folder, n=64):
    """Writes n JPEG files of ImageNet's average size, smooth noise, in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = Path(folder, f'class{i % 2}', f'{i}.jpg')
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC))


def compare_loading(folder, repeats):
    """Compares JPEG decoding by numbers of workers: training at 224 needs the same images/s."""
    n = repeats * len(folders.list_images(folder)[0])
    workers = [w for w in (1, 2, 4, 8, 16) if w <= available_cores()]
    variants = [Variant(f'{w} worker{"s" * (w > 1)}', jpegs_for_gpu, (folder, repeats, w, 64), n)
                for w in workers]
    return Comparison('JPEG files', variants)


def comparisons(device, folder):
    """Yields the comparisons, the most important first; `folder` contains JPEG files."""

    def resnet(depth, width):
        return 'resnet', functools.partial(
            diracnets.create_model, 'resnet', 'CIFAR10', depth=depth, width=width)

    if device.type == 'cpu':
        yield compare_training(10, 1, 'CIFAR10', 8, device, resnet(10, 1))
        yield compare_changes(10, 1, 8, device)
        yield compare_inference(18, 1, device)
        yield compare_loading(folder, 1)
        return
    for depth, width, batch, target in (
        (28, 10, 128, '45 % of matmul peak'), (28, 1, 512, '50,000 images/s'),
    ):
        yield compare_training(depth, width, 'CIFAR10', batch, device, resnet(depth, width), target)
    yield compare_inference(18, 256, device, 'no slower than resnet18')
    for depth, width in ((28, 1), (34, 2)):
        yield compare_training(depth, width, 'CIFAR10', 128, device, resnet(depth, width))
    for depth in (18, 34):
        name = f'resnet{depth}'
        make = functools.partial(torchvision.models.get_model, name)
        yield compare_training(depth, 1, 'ImageNet', 256, device, (name, make))
    yield compare_loading(folder, 8)
    yield compare_changes(28, 10, 128, device)
    for depth, batch in itertools.product((18, 34), (1, 16, 256)):
        if (depth, batch) != (18, 256):
            yield compare_inference(depth, batch, device)


# ---------------------------------------------------------------- timing


def prepare(variant, device):
    """Prepares and warms up a variant; returns its timer and fills its peak memory."""
    cuda = device.type == 'cuda'
    gc.collect()  # models in reference cycles would be freed during the measurement
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    work = variant.prepare(*variant.arguments)
    for _ in range(3):
        work()
    synchronize(device)
    if cuda:
        variant.memory = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    calls = max(1, round(MIN_SECONDS / seconds_per_call(work, device=device)))
    return functools.partial(seconds_per_call, work, calls, device)


def time_variants(comparison, device, deadline):
    """Times the variants in interleaved repetitions until MAX_REPETITIONS or the deadline."""
    timers = {}
    bar = tqdm(comparison.variants, comparison.title, unit='variant', disable=None, leave=False)
    for i, variant in enumerate(bar):
        if time.monotonic() > deadline:
            break
        try:
            timers[i] = prepare(variant, device)
        except Exception as error:  # out of memory, or the compiler: the others still count
            say(f'{comparison.title}: {variant.name} skipped: {error_line(error)}')
    seconds = interleave(
        timers.values(), MAX_REPETITIONS, comparison.title,
        lambda repetition: repetition >= MIN_REPETITIONS and time.monotonic() > deadline)
    for i, values in zip(timers, seconds):
        comparison.variants[i].seconds = values


def environment_of(device):
    """Returns the columns that describe the GPU, the machine and the software."""
    return {'device': device_name(device), 'cuda': torch.version.cuda or '', **environment()}


def comparison_records(comparison, peak, columns):
    """Returns the records of a comparison; `peak` is the matmul peak in TFLOP/s.

    Ratios are to the first measured variant, except those of standard convolutions, which are to
    the DiracNet in the same form: the cost of W_hat.
    """
    measured = {variant.name: variant for variant in comparison.variants
                if len(variant.seconds) >= MIN_REPETITIONS}
    first = next(iter(measured.values()), None)
    records = []
    for variant in measured.values():
        baseline = measured.get(BASELINES.get(variant.name), first)
        tflops = variant.flops_per_second / 1e12
        records.append({
            **timing_columns(comparison.title, variant, baseline), 'ratio_to': baseline.name,
            'tflop_per_second': round(tflops, 2),
            'percent_of_product': round(100 * tflops / peak, 1),
            'product_tflop_per_second': round(peak, 1),
            'target': comparison.target, 'batch': variant.images, **columns,
        })
    return records


# ---------------------------------------------------------------- the command


def without_compile(comparison):
    """Removes the compiled variants: compilation takes a minute per model."""
    variants = [v for v in comparison.variants
                if COMPILED not in v.name and v.name not in CHANGES]
    return replace(comparison, variants=variants)


def measured(table, columns, **values):
    """Returns the records in a CSV file with these values, of this device and commit.

    Without git there are none: the code may have changed.
    """
    values |= {name: str(columns.get(name)) for name in ('device', 'torch', 'commit')}
    return [record for record in read_csv(table)
            if columns.get('commit') and values.items() <= record.items()]


def time_in_order(comparisons, peak, device, table, columns, deadline):
    """Measures the comparisons until the deadline and appends their results to a CSV file."""
    for comparison in comparisons:
        done = {record['what'] for record in measured(table, columns, compared=comparison.title)}
        if done >= {variant.name for variant in comparison.variants}:
            say(f'{comparison.title}: skipped, already in {table}')
            continue
        if time.monotonic() > deadline:
            say(f'{comparison.title}: skipped, no time left')
            continue
        try:
            time_variants(comparison, device, deadline)
        except Exception as error:  # of one comparison: the others still count
            say(f'{comparison.title}: failed: {error_line(error)}')
        records = comparison_records(comparison, peak, columns)
        if records:
            append_results(records, table)
            print_records(records, comparison.target, PRINTED)
        free_compiled_models()


def measure_runs(device, logs, columns, deadline):
    """Measures the cost of runs and the kernels of their steps until the deadline."""
    runs, images = (((28, 1), (34, 2), (28, 10)), 50_000) if device.type == 'cuda' else (
        ((10, 1),), 256)
    for depth, width in runs:
        name, make = f'{depth}-{width:g}', functools.partial(diracnet, depth, width)
        titles = {f'{name}, batch 128, {form}': form
                  for form in ([UNCOMPILED] if device.type == 'cpu' else FORMS)}
        if time.monotonic() > deadline:
            say(f'run of {name}: skipped, no time left')
            continue
        if not measured(logs / 'runs.csv', columns, model=name):
            try:
                cost = {'model': name, **run_cost(depth, width, images)}
            except SystemExit as stopped:  # of train.py, which printed the reason
                say(f'run of {name}: failed with exit status {stopped.code}')
                continue
            append_results([{**cost, **columns}], logs / 'runs.csv')
            print_table([*cost], [[str(value) for value in cost.values()]], left=[*cost])
        for title, form in titles.items():
            if measured(logs / 'profile.csv', columns, step=title):
                say(f'profile of {title}: skipped, already in {logs / "profile.csv"}')
                continue
            if time.monotonic() > deadline:
                say(f'profile of {title}: skipped, no time left')
                continue
            try:
                work = training_step(make, 'CIFAR10', 128, form, device)
                records = profile_records(title, profile_step(work, device))
            except Exception as error:  # the profiler has no permission, or no memory
                say(f'profile of {title}: failed: {error_line(error)}')
                continue
            append_results([{**record, **columns} for record in records], logs / 'profile.csv')
            print_table([*records[0]], [[str(value) for value in record.values()]
                                        for record in records], left=['kernels'])


def run_checks():
    """Runs the tests that need a GPU in another process; returns its exit status."""
    tests = ROOT / 'tests' / 'test_cuda.py'  # other files import packages that are not needed
    return subprocess.run([sys.executable, str(ROOT / 'test.py'), str(tests), '-m', 'gpu']
                          ).returncode


def parse_options(argv):
    parser = ArgumentParser(prog='experiments.gpu', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--minutes', type=at_least(0, float), default=8,
        help='time limit: no measurement starts after it (default: %(default)s)')
    add('--checks', default=True, action=argparse.BooleanOptionalAction,
        help='run the tests of tests/test_cuda.py first (default: yes)')
    add('--compile', default=True, action=argparse.BooleanOptionalAction,
        help='time train.py --compile too, one more minute per model (default: yes)')
    add('--device', choices=('cuda', 'cpu'), default='cuda',
        help='cpu: a dry run (default: %(default)s)')
    add('--logs', type=Path,
        help='folder of the results (default: logs/gpu; runs/gpu for a dry run)')
    opt = parser.parse_args(argv)
    opt.logs = opt.logs or ROOT / ('logs' if opt.device == 'cuda' else 'runs') / 'gpu'
    return opt


def main(argv=None):
    opt = parse_options(argv)
    deadline = time.monotonic() + 60 * opt.minutes
    with exit_on_error('experiments.gpu'):
        if opt.device == 'cpu':
            os.environ['CUDA_VISIBLE_DEVICES'] = ''  # read when CUDA is first used
        elif not torch.cuda.is_available():
            raise ValueError('no CUDA GPU found; use --device cpu for a dry run')
        device = torch.device(opt.device)
        status = run_checks() if opt.checks and opt.device == 'cuda' else 0
        torch.backends.cudnn.benchmark = opt.device == 'cuda'  # as in train.py
        peak = matmul_gflops('bfloat16', device, 8192 if opt.device == 'cuda' else 1024) / 1000
        say('', f'bfloat16 matmul peak: {peak:,.1f} TFLOP/s')
        with tempfile.TemporaryDirectory() as folder:
            write_jpegs(folder)
            compared = comparisons(device, folder)
            columns = environment_of(device)
            measure = functools.partial(time_in_order, peak=peak, device=device,
                                        table=opt.logs / 'rates.csv', columns=columns,
                                        deadline=deadline)
            if opt.compile:
                measure(itertools.islice(compared, 2))  # the most important ones
                measure_runs(device, opt.logs, columns, deadline)
                measure(compared)
            else:
                measure(map(without_compile, compared))
    if status:
        sys.exit(1)


if __name__ == '__main__':
    main()
