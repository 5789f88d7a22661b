"""Measures the speed of training, input, inference and W_hat, each against a baseline.

    python -m experiments.bench train       # epochs, against float32, NCHW, PIL; freed memory
    python -m experiments.bench data --images FOLDER    # input pipelines; class folders of JPEGs
    python -m experiments.bench infer       # the deployed model
    python -m experiments.bench depth       # time and memory of a step over depth
    python -m experiments.bench overhead    # cost of W_hat in a step, all at once and by layer
    python -m experiments.bench memory      # --checkpointing of DenseNet-BC-100-12
    python -m experiments.bench profile     # time per operation of a step: 28-1, the speed-run
    python -m experiments.bench deploy --run RUN --dataset Folder --dataroot FOLDER   # agreement
    python -m experiments.bench plot        # logs/bench.png of the latest results

The variants of a comparison (experiments/variants.py) are timed in interleaved repetitions. Results
are appended to logs/bench.csv. `deploy` prints how far the predictions, accuracy and logits of the
deployed and the eager model agree on test images.
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
from diracnets.deployment import deploy
from diracnets.folding import fold
from experiments import variants
from experiments.interleaved import (
    Variant,
    compare,
    latest_comparisons,
    matmul_peak,
    pairs_with_baseline,
)
from experiments.results import ROOT, read_results
from experiments.variants import BATCH, NATIVE, diracnet, multiply_adds, repeated
from training import folders, options
from training.choices import available_cores
from training.evaluation import compute_logits
from training.setup import load_test_splits

DEPLOYED_IMAGES = 64  # per repetition of a deployed model
STEPS = 5  # training steps per repetition, to measure the cost of W_hat
TABLE = ROOT / 'logs' / 'bench.csv'
DEPTHS = (28, 52, 100, 202, 400)


# ---------------------------------------------------------------- training


def bench_train(args):
    for depth, width, steps, target in ((28, 1, 16, 3), (34, 2, 4, 3.5), (28, 4, 2, 5)):
        n = steps * BATCH
        work = 3 * multiply_adds(diracnet, depth, width)  # forward and, twice that, backward

        def variant(name, prepare, dtype=NATIVE, *arguments, sizes=(depth, width, n), work=work):
            return Variant(name, prepare, (*sizes, *arguments), sizes[-1], work, dtype)

        compared = [
            variant('float32, NCHW, PIL', variants.epoch_with_pil, 'float32'),
            variant('train.py', variants.epoch_of_train),
        ]
        if (depth, width) == (28, 1):
            compared += [
                variant('train.py --dtype float', variants.epoch_of_train, 'float32', 'float32'),
                variant('train.py --compile', variants.epoch_of_train, NATIVE, NATIVE, True),
            ]
        compare(f'train {depth}-{width}', compared, args.repetitions, TABLE, target)
        compare(f'freed memory {depth}-{width}', [
            variant('returned to the system', variants.epoch_returning_memory),
            variant('kept (train.py)', variants.epoch_of_train),
        ], args.repetitions, TABLE)


# ---------------------------------------------------------------- input


def bench_data(args):
    # lists the images first: an invalid folder ends the command before it measures
    paths = folders.list_images(args.images)[0] if args.images else None
    n = 10_000
    compare('32 x 32 images', [
        Variant('PIL, 4 workers', variants.by_pil, (n,), n),
        Variant('one gather per batch', variants.gathered, (n,), n),
    ], args.repetitions, TABLE)
    if paths is None:
        print('JPEG files: skipped, because --images FOLDER is missing')
        return
    workers = min(available_cores(), options.MAX_WORKERS)
    n = 3 * len(paths)
    arguments = args.images, 3, workers
    compare('JPEG files', [
        Variant(f'ImageFolder with PIL, {workers} workers', variants.jpegs_by_pil, arguments, n),
        Variant(f'OpenCV, {workers} workers', variants.jpegs_by_opencv, arguments, n),
    ], args.repetitions, TABLE, 1.5)


# ---------------------------------------------------------------- deployed


def bench_infer(args):
    work = multiply_adds(DiracNet, 18, pixels=224)
    resnet = multiply_adds(torchvision.models.resnet18, pixels=224)
    eager, deployed, deployed_resnet = (
        functools.partial(variants.inference, functools.partial(make, 18), form=form)
        for make, form in ((DiracNet, 'eager'), (DiracNet, 'deploy()'),
                           (variants.folded_resnet, 'deploy()')))
    for batch in (16, 1):

        def variant(name, prepare, work=work, dtype=NATIVE, batch=batch):
            return Variant(name, repeated, (DEPLOYED_IMAGES // batch, prepare, batch),
                           DEPLOYED_IMAGES, work, dtype)

        compared = [
            variant('float32, NCHW, eager', eager, dtype='float32'),
            variant('deploy()', deployed),
            variant("deploy() of torchvision's resnet18, folded", deployed_resnet, resnet),
        ]
        for name, package, prepare, dtype in (
            ('ONNX Runtime', 'onnxruntime', variants.onnx_runtime, 'float32'),
            ('OpenVINO', 'openvino', variants.openvino, NATIVE),  # OpenVINO selects bfloat16
        ):
            if importlib.util.find_spec(package):
                compared.append(variant(f'{name}, {dtype}', prepare, dtype=dtype))
            else:
                print(f'{name}: skipped, because {package} is not installed')
        compare(f'DiracNet-18, batch {batch}', compared, args.repetitions, TABLE,
                4 if batch == 16 else '')


def bench_deploy(args):
    if not args.run:
        raise ValueError('deploy: no model; use --run RUN')
    loaded, batch = diracnets.load(args.run), 500
    preprocess = loaded.preprocess
    test = load_test_splits(loaded, args.dataset, args.dataroot).test
    model = fold(loaded.model)
    deployed = deploy(model, (batch, *preprocess.shape))

    def deployed_padded(inputs):  # the last batch may be smaller
        padded = inputs.new_zeros(batch, *inputs.shape[1:])
        padded[: len(inputs)] = inputs
        return deployed(padded)[: len(inputs)].clone()

    eager, labels = compute_logits(model, test, preprocess, 'eager', batch)
    fast, _ = compute_logits(deployed_padded, test, preprocess, 'deployed', batch)
    for name, logits in (('eager', eager), ('deployed', fast)):
        print(f'{name}: {100 * (logits.argmax(1) == labels).double().mean():.2f} % top-1')
    equal = (eager.argmax(1) == fast.argmax(1)).sum()
    difference = 100 * (eager - fast).abs().max() / eager.abs().max()
    print(f'same prediction: {equal:,} of {len(labels):,}; maximum difference of logits: '
          f'{difference:.1f} % of the largest logit')


# ---------------------------------------------------------------- depth, W_hat and memory


def bench_depth(args):
    results = compare('depth, a step of 128 images', [
        Variant(f'DiracNet-{depth}-1', variants.step, (depth, 1), BATCH,
                3 * multiply_adds(diracnet, depth, 1), NATIVE)
        for depth in DEPTHS
    ], args.repetitions, TABLE)
    for name, unit in (('milliseconds', 'ms'), ('peak_memory_mb', 'MB')):
        values = [record[name] for record in results]
        slope, base = statistics.linear_regression(DEPTHS, values)
        residuals = [value / (base + slope * depth) - 1 for depth, value in zip(DEPTHS, values)]
        print(f'{name} = {base:.0f} + {slope:.2f} x depth, in {unit}; residuals: '
              + ', '.join(f'{100 * r:+.1f} %' for r in residuals))
    compare('depth 1000 with --checkpointing', [
        Variant('DiracNet-1000-1', variants.checkpointed_step, (1000, 1), BATCH,
                3 * multiply_adds(diracnet, 1000, 1), NATIVE)
    ], args.repetitions, TABLE)


def bench_overhead(args):
    for depth, width in ((28, 1), (34, 2)):
        work = 3 * multiply_adds(diracnet, depth, width)
        compare(f'W_hat {depth}-{width}', [
            Variant(name, repeated, (STEPS, prepare, depth, width), STEPS * BATCH, work, NATIVE)
            for name, prepare in (
                ('standard convolutions', variants.standard_step), ('W_hat', variants.step),
                ('W_hat, layer by layer', variants.layer_by_layer_step))
        ], 4 * args.repetitions, TABLE)


def bench_memory(args):
    compare('DenseNet-BC-100-12, a step of 64 images', [
        Variant(name, variants.densenet_step, (checkpointing,), 64)
        for name, checkpointing in (('without --checkpointing', False), ('--checkpointing', True))
    ], args.repetitions, TABLE)


# ---------------------------------------------------------------- profile


def bench_profile(args):
    recipe = options.parse_options(['--recipe', 'speedrun'])
    fast = functools.partial(
        diracnets.create_model, recipe.model, 'CIFAR10', **options.model_options(recipe))
    for title, step, images, make in (
        ('DiracNet-28-1', variants.step(28, 1), BATCH, functools.partial(diracnet, 28, 1)),
        ('the speed-run', variants.step_of(recipe, fast()), recipe.batch_size, fast),
    ):
        for _ in range(10):  # warm-up
            step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(args.repetitions):
                step()
        # forward and, twice that, backward; nearly all of it in convolutions
        show_profile(f'a step of {title}, {images} images', profiler.key_averages(),
                     3 * images * args.repetitions * multiply_adds(make), args.repetitions)


def show_profile(title, events, work, steps):
    """Prints the time per operation; `work` counts the multiply-adds of all convolutions."""
    total = sum(event.self_cpu_time_total for event in events)  # microseconds
    convolutions = sum(event.self_cpu_time_total for event in events if 'convolution' in event.key)
    rate = 2e-3 * work / convolutions / matmul_peak(NATIVE)
    print(f'{title}: {total / 1000 / steps:.0f} ms; convolutions take '
          f'{100 * convolutions / total:.0f} % of it, at {100 * rate:.0f} % of matmul peak')
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]:
        print(f'{100 * event.self_cpu_time_total / total:5.1f} %  {event.key}')


# ---------------------------------------------------------------- plot


def draw_speedups(table):
    """Draws the latest results of each comparison in a CSV file; returns a matplotlib Figure."""
    from matplotlib.figure import Figure

    from experiments.axes import log_scale

    results = read_results(table)
    depths = [record for title, records in latest_comparisons(results).items()
              if title.startswith('depth,') for record in records]
    ratios = [record for _, record in pairs_with_baseline(results)]
    figure = Figure((12, 0.28 * len(ratios) + 1.5), dpi=110, layout='constrained')
    axes = figure.subplot_mosaic([['ratio', 'milliseconds'], ['ratio', 'peak_memory_mb']],
                                 width_ratios=(3, 2))
    speedups = axes['ratio']
    for y, record in enumerate(ratios):
        ratio, low, high = (record[name] for name in ('ratio', 'ratio_low', 'ratio_high'))
        speedups.errorbar(ratio, y, xerr=[[ratio - low], [high - ratio]], fmt='o', color='C0',
                          markersize=4, capsize=2)
        if record['target']:
            speedups.plot(record['target'], y, '|', color='C3', markersize=14, markeredgewidth=2)
    names = [f'{record["compared"]}: {record["what"]} (n = {record["n"]:.0f})'
             for record in ratios]
    speedups.set_yticks(range(len(ratios)), names, fontsize=7)
    speedups.invert_yaxis()
    speedups.axvline(1, color='grey', linewidth=1)
    log_scale(speedups)
    speedups.grid(alpha=0.25)
    speedups.set_xlabel('speedup over the baseline (median, 95 % CI); red: target')
    numbers = [int(record['what'].split('-')[1]) for record in depths]
    for name, ylabel in (('milliseconds', 'time (ms)'), ('peak_memory_mb', 'peak memory (MB)')):
        axes[name].plot(numbers, [record[name] for record in depths], 'o-')
        axes[name].set(ylabel=ylabel, xlim=(0, None), ylim=(0, None))
        axes[name].grid(alpha=0.25)
    n = f' (n = {depths[0]["n"]:.0f})' if depths else ''
    axes['milliseconds'].set_title(f'step of 128 images, width 1{n}', fontsize=10)
    axes['peak_memory_mb'].set_xlabel('depth (layers)')
    return figure


def bench_plot(args):
    draw_speedups(TABLE).savefig(TABLE.with_suffix('.png'))
    print(TABLE.with_suffix('.png'))


BENCHES = {'train': bench_train, 'data': bench_data, 'infer': bench_infer, 'depth': bench_depth,
           'overhead': bench_overhead, 'memory': bench_memory, 'profile': bench_profile,
           'deploy': bench_deploy, 'plot': bench_plot}


def main(argv=None):
    parser = ArgumentParser(prog='experiments.bench', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bench', choices=BENCHES, help='comparisons to measure, or plot')
    parser.add_argument('--repetitions', type=options.at_least(10, int), default=10,
                        help='per variant (default: %(default)s)')
    parser.add_argument('--images', default='', help='class folders of JPEG files, for data')
    parser.add_argument('--run', help='folder of a run, or a checkpoint, for deploy')
    parser.add_argument('--dataset', choices=options.DATASETS, default='CIFAR10',
                        help='dataset of the test images, for deploy (default: %(default)s)')
    parser.add_argument('--dataroot', default='.',
                        help='folder of its files (default: %(default)s)')
    args = parser.parse_args(argv)
    with exit_on_error('experiments.bench'):
        BENCHES[args.bench](args)


if __name__ == '__main__':
    main()
