"""Shows what holds on a CUDA GPU and how fast it is: checks, then rates, the most wanted first.

    python -m experiments.gpu                 # some eight minutes; stops by itself
    python -m experiments.gpu --minutes 20
    python -m experiments.gpu --no-checks --no-compile --minutes 2   # the rates that come soonest
    python -m experiments.gpu --device cpu    # tries the command itself, on small networks

Needs no network and no files: images are random, or scikit-learn's digits. Rows are appended to
logs/gpu/checks.csv and logs/gpu/gpu_results.csv. The status is 1 where a check does not hold.
"""

import argparse
import functools
import itertools
import statistics
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
from diracnets.deploy import deploy
from diracnets.fold import fold
from diracnets.preprocessing import Preprocessing
from experiments import gpu_results
from experiments.gpu_checks import check_all
from experiments.interleaved import (
    ROOT,
    Variant,
    append,
    device_name,
    environment,
    product_rate,
    ratio_to,
    shown_ratio,
    wait,
)
from experiments.variants import diracnet, jpegs_by_opencv, make_sgd, multiply_adds, one_step
from training import data, distributed
from training.compute import Forward, compile_model
from training.options import at_least

LEAST, MOST = 5, 20  # turns
TURN = 0.2  # seconds of work in a turn, at least


# ---------------------------------------------------------------- what is timed


def training_step(make, kind, batch, form, device):
    """A step of train.py on random images, in the form that `form` names, of what make() makes."""
    inputs = Preprocessing.for_dataset(kind)
    eager = form == gpu_results.EAGER
    network = make().to(device)
    optimizer = make_sgd(network, fused=device.type == 'cuda' and not eager)
    model = network if form != gpu_results.COMPILED else compile_model(network, device)
    forward = Forward(inputs, 'float' if eager else 'bfloat16', device)
    images = torch.randint(256, (batch, inputs.size, inputs.size, 3), dtype=torch.uint8,
                           device=device).permute(0, 3, 1, 2)
    if eager:
        images = images.contiguous()
    labels = torch.randint(10, (batch,), device=device)
    return one_step(optimizer, model, forward, (images, labels, batch))


def inference(make, batch, form, device):
    """Logits of a batch of 224 x 224 from a folded network: deployed, or as it stands."""
    network, shape = make().to(device).eval(), (batch, 3, 224, 224)
    inputs = torch.randn(shape, device=device)
    run = deploy(network, shape) if form == 'deploy()' else torch.no_grad()(network)
    return lambda: run(inputs)


# ---------------------------------------------------------------- comparisons


@dataclass
class Comparison:
    title: str
    sides: list  # each takes its memory beside those of the others
    target: str = ''  # in words


def of_training(depth, width, kind, batch, device, rival, target=''):
    """DiracNet-depth-width in training, against ordinary convolutions and a network with skips.

    rival: (its name, a function that makes it).
    """
    size = Preprocessing.for_dataset(kind).size
    make = functools.partial(diracnet, depth, width, kind)
    forms = [(form, make, form) for form in (*gpu_results.FORMS, gpu_results.EAGER)]
    forms += [(gpu_results.ordinary(form), functools.partial(make, dirac=False), form)
              for form in gpu_results.FORMS]
    forms += [(f'{rival[0]}, {form}', rival[1], form) for form in gpu_results.FORMS]
    sides = [
        Variant(name, training_step, (make, kind, batch, form, device), batch,
             3 * multiply_adds(make, pixels=size))
        for name, make, form in forms
    ]
    return Comparison(f'training {depth}-{width:g}, batch {batch}', sides, target)


def of_inference(depth, batch, device, target=''):
    """The folded DiracNet for ImageNet against torchvision's ResNet of its depth, treated alike."""
    resnet = functools.partial(torchvision.models.get_model, f'resnet{depth}')
    makers = {f'DiracNet-{depth}': lambda: DiracNet(depth),
              f'resnet{depth}, folded': lambda: fold(resnet().eval())}
    sides = [
        Variant(f'{name}, {form}', inference, (make, batch, form, device), batch,
             multiply_adds(make, pixels=224))
        for form in ('deploy()', gpu_results.EAGER) for name, make in makers.items()
    ]
    return Comparison(f'inference {depth}, batch {batch}', sides, target)


def write_jpegs(folder, n=64):
    """Writes n JPEG files of the size of ImageNet's, smooth noise, in two class folders."""
    noise = np.random.default_rng(0)
    for i in range(n):
        path = Path(folder, f'class{i % 2}', f'{i}.jpg')
        path.parent.mkdir(exist_ok=True)
        coarse = noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC))


def of_files(folder, repeats):
    """What decoding gives by worker processes: a training at 224 needs as many images/s."""
    n = repeats * len(data.list_images(folder)[0])
    workers = [w for w in (1, 2, 4, 8, 16) if w <= distributed.available_cores()]
    sides = [Variant(f'{w} workers', jpegs_by_opencv, (folder, repeats, w, 64), n) for w in workers]
    return Comparison('JPEG files', sides)


def comparisons(device, folder):
    """Yields what is compared, the most wanted first. folder: of JPEG files."""

    def resnet(depth, width):
        return 'resnet', lambda: diracnets.create_model('resnet', 'CIFAR10', depth=depth, width=width)

    if device.type == 'cpu':
        yield of_training(10, 1, 'CIFAR10', 8, device, resnet(10, 1))
        yield of_inference(18, 1, device)
        yield of_files(folder, 1)
        return
    yield of_training(28, 10, 'CIFAR10', 128, device, resnet(28, 10), '45 % of the product')
    yield of_training(28, 1, 'CIFAR10', 512, device, resnet(28, 1), '50,000 images/s')
    yield of_inference(18, 256, device, 'no slower than resnet18')
    yield of_training(28, 1, 'CIFAR10', 128, device, resnet(28, 1))
    yield of_training(34, 2, 'CIFAR10', 128, device, resnet(34, 2))
    for depth in (18, 34):
        rival = functools.partial(torchvision.models.get_model, f'resnet{depth}')
        yield of_training(depth, 1, 'ImageNet', 256, device, (f'resnet{depth}', rival))
    yield of_files(folder, 8)
    for depth, batch in itertools.product((18, 34), (1, 16, 256)):
        if (depth, batch) != (18, 256):
            yield of_inference(depth, batch, device)


# ---------------------------------------------------------------- timing


def used(device):
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0


def prepare(side, device):
    """Prepares and warms up a side: (its work, how often that is done in a turn)."""
    before = used(device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    work = side.prepare(*side.arguments)
    for _ in range(3):
        work()
    wait(device)
    if device.type == 'cuda':
        side.memory = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    start = time.perf_counter()
    work()
    wait(device)
    return work, max(1, round(TURN / (time.perf_counter() - start)))


def measure(comparison, device, deadline):
    """Lets the sides work in turns, until there are MOST turns or the time is over."""
    works = []
    bar = tqdm(comparison.sides, comparison.title, unit='side', disable=None, leave=False)
    for side in bar:
        if time.monotonic() > deadline:
            break
        try:
            works.append((side, *prepare(side, device)))
        except RuntimeError as error:  # of memory or a compiler: the other sides are worth having
            say(f'{comparison.title}: {side.name} left out: {str(error).splitlines()[0]}')
    for turn in range(MOST):
        if turn >= LEAST and time.monotonic() > deadline:
            break
        for side, work, times in works:
            start = time.perf_counter()
            for _ in range(times):
                work()
            wait(device)
            side.seconds.append((time.perf_counter() - start) / times)


def here(device):
    """The columns that say where a row was measured."""
    return {'device': device_name(device), 'cuda': torch.version.cuda or '', **environment()}


def rows_of(comparison, product, where):
    """The rows of a comparison: rates, and ratios to the first side that was measured.

    Those of ordinary convolutions are to the DiracNet in the same form: what W_hat costs.
    """
    rows, measured = [], [side for side in comparison.sides if len(side.seconds) >= LEAST]
    by_name = {side.name: side for side in measured}
    for side in measured:
        base = by_name.get(gpu_results.PAIRED.get(side.name), measured[0])
        rate = side.images / statistics.median(side.seconds)
        tflops = 2e-12 * side.multiply_adds * rate
        rows.append({
            'compared': comparison.title, 'what': side.name, 'n': len(side.seconds),
            'images_per_second': round(rate, 1),
            'milliseconds': round(1000 * statistics.median(side.seconds), 3),
            **ratio_to(base.seconds, side.seconds), 'ratio_to': base.name,
            'tflop_per_second': round(tflops, 2),
            'percent_of_product': round(100 * tflops / product, 1),
            'product_tflop_per_second': round(product, 1),
            'target': comparison.target, 'peak_memory_mb': round(side.memory),
            'batch': side.images, **where,
        })
    return rows


def show(rows):
    target = rows[0]['target']
    print(f'\n{rows[0]["compared"]}: {rows[0]["n"]} turns' + (f'; target: {target}' * bool(target)))
    print_table(['', 'images/s', 'ms', 'ratio (95 %)', 'to', 'TFLOP/s', 'of the product', 'MB'], [[
        row['what'], f'{row["images_per_second"]:,.0f}', f'{row["milliseconds"]:,.2f}',
        shown_ratio(row), row['ratio_to'],
        f'{row["tflop_per_second"]:,.1f}', f'{row["percent_of_product"]:.0f} %',
        f'{row["peak_memory_mb"]:,}',
    ] for row in rows])


# ---------------------------------------------------------------- the command


def check(device, table, where):
    """Runs the checks: whether all of them hold."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for row in tqdm(check_all(device, Path(folder)), 'checking', unit='check', disable=None,
                        leave=False):
            rows.append(row)
    print_table(['check', 'what', 'off by', 'at most', 'holds'],
                [list(map(str, row.values())) for row in rows], left=('what', 'holds'))
    append([{**row, **where} for row in rows], table)
    return all(row['holds'] == 'yes' for row in rows)


def without_compile(comparisons):
    """Yields the comparisons without train.py --compile, a minute of preparing for each network."""
    for comparison in comparisons:
        sides = [side for side in comparison.sides if '--compile' not in side.name]
        yield replace(comparison, sides=sides)


def time_all(device, table, where, deadline, compile=True):
    size = 8192 if device.type == 'cuda' else 1024
    product = product_rate('bfloat16', device, size) / 1000  # TFLOP/s
    say(f'\na bfloat16 product: {product:,.1f} TFLOP/s')
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(folder)
        compared = comparisons(device, folder)
        compared = compared if compile else without_compile(compared)
        time_in_order(compared, product, device, table, where, deadline)


def time_in_order(comparisons, product, device, table, where, deadline):
    for comparison in comparisons:
        if time.monotonic() > deadline:
            say(f'left out, as the time is over: {comparison.title}')
            continue
        measure(comparison, device, deadline)
        rows = rows_of(comparison, product, where)
        if rows:
            append(rows, table)
            show(rows)
        torch._dynamo.reset()  # compiled networks are kept by code, and so few of them
        if device.type == 'cuda':
            torch.cuda.empty_cache()


def main(argv=None):
    parser = ArgumentParser(prog='experiments.gpu', description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=at_least(0, float), default=8,
                        help='after which nothing new is begun (default: %(default)s)')
    parser.add_argument('--checks', default=True, action=argparse.BooleanOptionalAction,
                        help='run them before the rates')
    parser.add_argument('--compile', default=True, action=argparse.BooleanOptionalAction,
                        help='time train.py --compile too, for which each network takes a minute')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda',
                        help='cpu: to try the command (default: %(default)s)')
    parser.add_argument('--logs', type=Path, default=ROOT / 'logs' / 'gpu',
                        help='folder of the tables (default: logs/gpu)')
    opt = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * opt.minutes
    with exit_on_error('experiments.gpu'):
        if opt.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError('no CUDA GPU here: expected one, or --device cpu to try the command')
        device = torch.device(opt.device)
        torch.backends.cudnn.benchmark = opt.device == 'cuda'  # as train.py has it
        where = here(device)
        holds = not opt.checks or check(device, opt.logs / 'checks.csv', where)
        time_all(device, opt.logs / 'gpu_results.csv', where, deadline, opt.compile)
    if not holds:
        sys.exit(1)


if __name__ == '__main__':
    main()
