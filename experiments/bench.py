"""Measures how fast it is, each thing in turn with what it is compared with.

    python -m experiments.bench train       # epochs, against float32, NCHW, PIL; and freed memory
    python -m experiments.bench data --images FOLDER    # input pipelines; of class folders of JPEGs
    python -m experiments.bench infer       # the deployed network
    python -m experiments.bench depth       # time and memory of a step over depth
    python -m experiments.bench overhead    # what W_hat, and modules, take of a step
    python -m experiments.bench profile     # where the time of a step goes: 28-1, the speed-run
    python -m experiments.bench plot        # logs/bench.png of the last rows of each

The sides of a comparison, of experiments/sides.py, work in turns (experiments/turns.py). Rows are
appended to logs/bench.csv.
"""

import argparse
import functools
import importlib.util
import statistics

import torchvision
from torch.profiler import ProfilerActivity, profile

import diracnets
from cli import ArgumentParser, exit_on_error
from diracnet import DiracNet
from experiments.interleaved import ROOT, Variant, compare, draw, product_peak
from experiments.variants import (
    BATCH,
    NATIVE,
    by_pil,
    checkpointed_step,
    deployed_diracnet,
    deployed_resnet,
    diracnet,
    eager_diracnet,
    epoch_giving_memory_back,
    epoch_of_train,
    epoch_with_pil,
    gathered,
    jpegs_by_opencv,
    jpegs_by_pil,
    multiply_adds,
    onnx_runtime,
    openvino,
    repeated,
    step,
    step_of,
    step_of_modules,
    step_of_ordinary_convolutions,
)
from training import data, distributed, options

DEPLOYED_IMAGES = 64  # through a deployed network in one turn
STEPS = 5  # of a training in one turn, to find what W_hat takes of it
TABLE = ROOT / 'logs' / 'bench.csv'
DEPTHS = (28, 52, 100, 202, 400)


# ---------------------------------------------------------------- training


def bench_train(args):
    for depth, width, steps, target in ((28, 1, 16, 3), (34, 2, 4, 3.5), (28, 4, 2, 5)):
        n = steps * BATCH
        work = 3 * multiply_adds(diracnet, depth, width)  # forward and, twice that, backward
        sizes = depth, width, n
        sides = [
            Variant('float32, NCHW, images by PIL', epoch_with_pil, sizes, n, work),
            Variant('train.py', epoch_of_train, sizes, n, work, NATIVE),
        ]
        if (depth, width) == (28, 1):
            sides += [
                Variant('train.py --dtype float', epoch_of_train, (*sizes, 'float32'), n, work),
                Variant('train.py --compile', epoch_of_train, (*sizes, NATIVE, True), n, work, NATIVE),
            ]
        compare(f'train {depth}-{width}', sides, args.pairs, TABLE, target)
        compare(f'freed memory {depth}-{width}', [
            Variant('given back', epoch_giving_memory_back, sizes, n, work, NATIVE),
            Variant('kept, as train.py does', epoch_of_train, sizes, n, work, NATIVE),
        ], args.pairs, TABLE)


# ---------------------------------------------------------------- input


def bench_data(args):
    n = 10_000
    compare('32 x 32 images', [
        Variant('PIL, one at a time, 4 workers', by_pil, (n,), n),
        Variant('a gather for each batch', gathered, (n,), n),
    ], args.pairs, TABLE)
    if not args.images:
        print('JPEG files: left out, as there is no --images FOLDER')
        return
    workers = min(distributed.available_cores(), options.MAX_WORKERS)
    n = 3 * len(data.list_images(args.images)[0])
    compare('JPEG files', [
        Variant(f'ImageFolder with PIL, {workers} workers', jpegs_by_pil,
             (args.images, 3, workers), n),
        Variant(f'OpenCV, {workers} workers', jpegs_by_opencv, (args.images, 3, workers), n),
    ], args.pairs, TABLE, 1.5)


# ---------------------------------------------------------------- deployed


def bench_infer(args):
    work = multiply_adds(DiracNet, 18, pixels=224)
    resnet = multiply_adds(torchvision.models.resnet18, pixels=224)
    for batch in (16, 1):

        def side(name, prepare, work=work, dtype=NATIVE, batch=batch):
            return Variant(name, repeated, (DEPLOYED_IMAGES // batch, prepare, batch),
                        DEPLOYED_IMAGES, work, dtype)

        sides = [
            side('float32, NCHW, eager', eager_diracnet, dtype='float32'),
            side('deploy()', deployed_diracnet),
            side("deploy() of torchvision's resnet18, folded", deployed_resnet, resnet),
        ]
        for name, package, prepare, dtype in (
            ('ONNX Runtime', 'onnxruntime', onnx_runtime, 'float32'),
            ('OpenVINO', 'openvino', openvino, NATIVE),  # it takes bfloat16 by itself
        ):
            if importlib.util.find_spec(package):
                sides.append(side(f'{name}, {dtype}', prepare, dtype=dtype))
            else:
                print(f'{name}: left out, as {package} is not installed')
        compare(f'DiracNet-18, batch {batch}', sides, args.pairs, TABLE, 4 if batch == 16 else '')


# ---------------------------------------------------------------- depth and W_hat


def bench_depth(args):
    rows = compare('depth, a step of 128 images', [
        Variant(f'DiracNet-{depth}-1', step, (depth, 1), BATCH,
             3 * multiply_adds(diracnet, depth, 1), NATIVE)
        for depth in DEPTHS
    ], args.pairs, TABLE)
    for name, unit in (('milliseconds', 'ms'), ('peak_memory_mb', 'MB')):
        values = [row[name] for row in rows]
        slope, base = statistics.linear_regression(DEPTHS, values)
        residuals = [value / (base + slope * depth) - 1 for depth, value in zip(DEPTHS, values)]
        print(f'{name} = {base:.0f} + {slope:.2f} x depth, in {unit}; residuals: '
              + ', '.join(f'{100 * r:+.1f} %' for r in residuals))
    compare('depth 1000 with --checkpointing', [
        Variant('DiracNet-1000-1', checkpointed_step, (1000,), BATCH,
             3 * multiply_adds(diracnet, 1000, 1), NATIVE)
    ], args.pairs, TABLE)


def bench_overhead(args):
    for depth, width in ((28, 1), (34, 2)):
        work = 3 * multiply_adds(diracnet, depth, width)
        compare(f'W_hat {depth}-{width}', [
            Variant('ordinary convolutions', repeated,
                 (STEPS, step_of_ordinary_convolutions, depth, width), STEPS * BATCH, work, NATIVE),
            Variant('W_hat', repeated, (STEPS, step, depth, width), STEPS * BATCH, work, NATIVE),
            Variant('W_hat, in modules', repeated, (STEPS, step_of_modules, depth, width),
                 STEPS * BATCH, work, NATIVE),
        ], 4 * args.pairs, TABLE)


def bench_profile(args):
    recipe = options.parse_options(['--recipe', 'speedrun'])
    fast = functools.partial(
        diracnets.create_model, recipe.model, 'CIFAR10', **options.model_options(recipe))
    for title, one, images, make in (
        ('DiracNet-28-1', step(28, 1), BATCH, functools.partial(diracnet, 28, 1)),
        ('the speed-run', step_of(recipe, fast()), recipe.batch_size, fast),
    ):
        for _ in range(10):  # until memory is laid out
            one()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(args.pairs):
                one()
        # forward and, twice that, backward; nearly all of it in convolutions
        show_profile(f'a step of {title}, {images} images', found.key_averages(),
                     3 * images * args.pairs * multiply_adds(make), args.pairs)


def show_profile(title, events, work, steps):
    """Prints where the time of steps goes; work: the multiply-adds of all their convolutions."""
    whole_step = sum(event.self_cpu_time_total for event in events)  # microseconds
    in_convolutions = sum(event.self_cpu_time_total for event in events
                          if 'convolution' in event.key)
    share = in_convolutions / whole_step
    rate = 2e-3 * work / in_convolutions / product_peak(NATIVE)
    print(f'{title}: {whole_step / 1000 / steps:.0f} ms; convolutions take {100 * share:.0f} % of '
          f'it, at {100 * rate:.0f} % of the rate of a product')
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]:
        print(f'{100 * event.self_cpu_time_total / whole_step:5.1f} %  {event.key}')


def bench_plot(args):
    draw(TABLE).savefig(TABLE.with_suffix('.png'))
    print(TABLE.with_suffix('.png'))


BENCHES = {'train': bench_train, 'data': bench_data, 'infer': bench_infer, 'depth': bench_depth,
           'overhead': bench_overhead, 'profile': bench_profile, 'plot': bench_plot}


def main(argv=None):
    parser = ArgumentParser(prog='experiments.bench', description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=BENCHES, help='what to measure, or plot')
    parser.add_argument('--pairs', type=options.at_least(10, int), default=10,
                        help='turns of each side (default: %(default)s)')
    parser.add_argument('--images', default='', type=options.expand_path,
                        help='folder of class folders of JPEG files, for data')
    args = parser.parse_args(argv)
    with exit_on_error('experiments.bench'):
        BENCHES[args.what](args)


if __name__ == '__main__':
    main()
