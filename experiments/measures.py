"""Measurements that the logs of runs do not contain, written to measured.csv."""

import functools
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import diracnets
from cli import say
from diracnets.checkpoint import MODEL_FILE, load_params
from diracnets.folding import fold
from diracnets.models.diracnet_v1 import NCReLU
from diracnets.onnx import OnnxModel, to_onnx
from diracnets.preprocessing import Preprocessing, normalize
from diracnets.quantization import calibration_set, equalize, quantize
from experiments.definitions import COMPARED_BLOCKS, command_line
from experiments.interleaved import Variant, compare, worker
from experiments.results import append_results, read_csv
from experiments.variants import BATCH, NATIVE, repeated, standard_step, step, step_of
from training import data
from training.compute import keep_freed_memory
from training.evaluation import top1
from training.log import LOG_FILE, read_log
from training.options import model_options, parse_options
from training.timing import matmul_gflops

TABLE, STEP_TABLE = 'measured.csv', 'steps.csv'
IMAGES = 1000  # of the test set, for activations
BINS, BIN = 48, 0.25  # of a histogram: their number, and their width in std
REPETITIONS, STEPS = 20, 5  # of the timings, and steps per repetition
DEPTH = 28  # of the models that are timed, and of the blocks that are quantized
GRADIENT_IMAGES = 16  # digits, for the gradients at initialization


def load_test_images(run, paths, preprocess):
    return data.load_splits(paths.dataset_of(run), paths.dataroot, preprocess, training=False).test


# ---------------------------------------------------------------- alpha and beta


@torch.no_grad()
def layer_statistics(params):
    """Returns records of the Dirac layers: alpha, beta and the norms of the terms of W_hat.

    `params` is the flat state dict of a functional DiracNet; for other models the result is [].
    The alphas of filters without a one in delta have no effect, and are left out. Deviations are
    those of the layer's values, not estimates: sqrt(mean^2 + deviation^2) is a root mean square.
    """
    records = []
    names = [name.removesuffix('.alpha') for name in params if name.endswith('.alpha')]
    for layer, name in enumerate((n for n in names if f'{n}.conv' in params), 1):
        alpha, beta, weight = (params[f'{name}.{part}'] for part in ('alpha', 'beta', 'conv'))
        alpha = alpha[:min(weight.shape[:2])]  # of the filters in which delta has a one
        records.append({
            'layer': layer,
            'alpha_mean': alpha.mean().item(), 'alpha_deviation': alpha.std(correction=0).item(),
            'beta_mean': beta.mean().item(), 'beta_deviation': beta.std(correction=0).item(),
            'dirac_norm': alpha.norm().item(),  # of diag(alpha) delta
            'free_norm': beta.norm().item(),  # of diag(beta) W_norm, whose filters have norm 1
        })
    return records


def alpha_beta(run, paths):
    """Returns the statistics of each layer at initialization (epoch 0) and after each epoch."""
    sizes = {name: run.options[name] for name in ('depth', 'width')}
    params = {0: diracnets.create_model('diracnet', 'CIFAR10', **sizes).state_dict()}
    for path in paths.run_folder(run).glob('epoch-*.pt7'):
        params[int(path.stem.partition('-')[2])] = load_params(path)
    return [{'epoch': epoch, **record}
            for epoch in sorted(params) for record in layer_statistics(params[epoch])]


# ---------------------------------------------------------------- activations


@torch.no_grad()
def activations(run, paths):
    """Returns histograms of the activations after the first, middle and last nonlinearity."""
    loaded = diracnets.load(str(paths.run_folder(run)))
    model, test = fold(loaded.model), load_test_images(run, paths, loaded.preprocess)
    layers = [module for module in model.modules() if isinstance(module, (nn.ReLU, NCReLU))]
    images = data.sample_evenly(test, min(IMAGES, len(test)))  # of all classes
    edge = BINS * BIN / 2
    records = []

    def add_histogram(layer, module, inputs, output):
        std = output.std()
        fractions = torch.histc(output / std, BINS, -edge, edge) / output.numel()
        records.extend(
            {'layer': layer, 'deviation': std.item(), 'from_deviations': i * BIN - edge,
             'share': fraction}
            for i, fraction in enumerate(fractions.tolist())
        )

    for i in (0, len(layers) // 2, len(layers) - 1):
        layers[i].register_forward_hook(functools.partial(add_histogram, i + 1))
    model(normalize(images, loaded.preprocess))
    return records


# ---------------------------------------------------------------- int8


@torch.no_grad()
def int8(run, paths):
    """Returns the accuracies of a model in float32 and int8, with and without equalization."""
    loaded = diracnets.load(str(paths.run_folder(run)))
    test = load_test_images(run, paths, loaded.preprocess)
    model = fold(loaded.model)
    images, _ = calibration_set(os.path.join(paths.dataroot, 'train'))
    equalized = equalize(model, torch.stack([*map(loaded.preprocess, images)]))
    record = {'calibration_images': len(images)}
    with tempfile.TemporaryDirectory() as folder:
        for form, names in ((model, ('float32', 'int8')),
                            (equalized, ('equalised_float32', 'equalised_int8'))):
            content = to_onnx(form, torch.zeros(2, *loaded.preprocess.shape), {})
            contents = quantize(content, images, loaded.preprocess, {})
            for name, content in zip(names, contents):
                path = Path(folder, f'{name}.onnx')
                path.write_bytes(content)
                accuracy = top1(OnnxModel(path), test, loaded.preprocess, name)
                record[f'{name}_test_acc_percent'] = accuracy
    return [record]


# ---------------------------------------------------------------- the speed-run


def tta_logits(model, inputs):
    """Returns logits of inputs (N, C, S, S) with test-time augmentation: six views, averaged.

    The views are the image, two copies shifted by one pixel along the diagonal (reflection
    padding), and the mirror images of all three. The unshifted views have half of the weight
    (Jordan, arXiv 2404.00498, section 3.5).
    """
    size, padded = inputs.shape[-1], F.pad(inputs, (1, 1, 1, 1), 'reflect')
    shifted = padded[..., :size, :size], padded[..., 2:, 2:]
    views = (inputs, 2), *((view, 1) for view in shifted)
    return sum(weight / 8 * (model(view) + model(view.flip(-1))) for view, weight in views)


@torch.no_grad()
def speedrun(run, paths):
    """Returns the accuracy of a speed-run, without and with TTA, and its compute.

    Matmul-equivalent compute is the training time multiplied by the matmul rate measured here.
    """
    gflops = matmul_gflops(NATIVE)  # emulated bfloat16 would take minutes
    folder = paths.run_folder(run)
    seconds = sum(stats['train_time'] for stats in read_log(folder / LOG_FILE))
    loaded = diracnets.load(str(folder))
    test = load_test_images(run, paths, loaded.preprocess)
    model = loaded.model.eval().to(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16, enabled=loaded.args['dtype'] == 'bfloat16'):
        plain, tta = (top1(form, test, loaded.preprocess, name) for form, name in (
            (model, 'one view'), (functools.partial(tta_logits, model), 'TTA')))
    return [{
        'test_acc_percent': round(plain, 2), 'tta_test_acc_percent': round(tta, 2),
        'train_seconds': round(seconds, 1), 'matmul_gflop_per_second': round(gflops, 1),
        'matmul_equivalent_tflop': round(seconds * gflops / 1000, 1),
    }]


# ---------------------------------------------------------------- cost


def cifar_model(name, depth, width, **options):
    return diracnets.create_model(name, 'CIFAR10', depth=depth, width=width, **options)


def inference(name, depth, folded):
    """Prepares the logits of a batch by a model as it was trained, or folded."""
    keep_freed_memory()  # as in train.py; otherwise the allocation of pages is timed
    model = cifar_model(name, depth, 1).eval()
    model = fold(model) if folded else model
    inputs = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run():
        with torch.autocast('cpu', torch.bfloat16, enabled=NATIVE == 'bfloat16'):
            model(inputs)

    return run


def cost(runs, paths):
    """Times a training step and inference of DiracNet, plain network and ResNet."""
    table = paths.logs / 'cost' / TABLE
    depth, images = DEPTH, STEPS * BATCH

    def variant(name, prepare, *arguments):
        return Variant(name, repeated, (STEPS, prepare, *arguments), images, dtype=NATIVE)

    comparisons = {'training step, 28-1': [
        variant('standard convolutions', standard_step, depth, 1),
        variant('diracnet', step, depth, 1),
        variant('plain, module-based', step, depth, 1, functools.partial(cifar_model, 'plain')),
        variant('resnet, module-based', step, depth, 1, functools.partial(cifar_model, 'resnet')),
    ], 'inference, 28-1': [
        variant('plain, folded', inference, 'plain', depth, True),
        variant('diracnet, folded', inference, 'diracnet', depth, True),
        variant('diracnet, unfolded', inference, 'diracnet', depth, False),
        variant('resnet, folded', inference, 'resnet', depth, True),
    ]}
    done = {record['compared'] for record in read_csv(table)}
    for title, variants in comparisons.items():
        if title not in done:
            compare(title, variants, REPETITIONS, table)


# ---------------------------------------------------------------- blocks


def block_step(depth, model, **options):
    """Prepares a training step of a model of width 1; the options are those of `create_model`."""
    return step(depth, 1, functools.partial(cifar_model, model, **options))


def has_checkpoint(run, experiment, paths):
    """Returns whether the run's folder has the checkpoint of its result: another may differ."""
    result = paths.result(run, experiment)
    return (bool(result) and result['ended'] == 'complete'
            and (paths.run_folder(run) / MODEL_FILE).exists()
            and epochs_and_accuracy(run, paths) == [result['epochs'], result['test_acc_percent']])


def blocks(runs, paths):
    """Times a step with each block, and measures int8 where there is a checkpoint, at one depth.

    Runs of other experiments are not trained again to get a checkpoint; `int8` measured some.
    """
    table = paths.logs / 'blocks' / STEP_TABLE
    if not table.exists():
        compare(f'training step, {DEPTH}-1', [
            Variant(block, functools.partial(block_step, **options), (DEPTH,), BATCH, dtype=NATIVE)
            for block, options in COMPARED_BLOCKS.items()
        ], REPETITIONS, table)
    for run in runs if paths.dataset == 'Folder' else ():  # int8 calibrates on image files
        if (run.x == DEPTH and run.run_name not in measured_runs('int8', paths.logs)
                and has_checkpoint(run, 'blocks', paths)):
            add_measurement(int8, 'blocks', run, paths)


# ---------------------------------------------------------------- memory


def options_step(opt):
    """Prepares a training step of the model and with the batch size of options of train.py."""
    return step_of(opt, diracnets.create_model(opt.model, 'CIFAR10', **model_options(opt)))


def peak_memory(run, paths):
    """Measures the peak memory of training steps on the CPU, in a process of its own."""
    opt = parse_options(command_line(run.options))
    variant = Variant(run.series, options_step, (opt,), opt.batch_size, dtype=NATIVE)
    with worker(variant) as timer:
        timer()
    return [{'peak_memory_mb': round(variant.memory), 'batch_size': opt.batch_size}]


# ---------------------------------------------------------------- gradients


def relative_gradients(name, depth, images, labels):
    """Returns the gradient norm over the norm of each filter, at initialization.

    The stem comes first. `images` is (N, 3, S, S) in float64: gradients of a plain network of 1,000
    layers overflow float32. Compare two models only over depth: a filter is all of W in one, and
    the part that beta scales in the other.
    """
    torch.manual_seed(1)
    model = cifar_model(name, depth, 1).double().train()
    F.cross_entropy(model(images), labels).backward()
    return [(p.grad.norm() / p.norm()).item() for p in model.parameters() if p.dim() == 4]


def gradients(runs, paths):
    """Measures the relative gradients of DiracNets and plain networks at each depth."""
    table = paths.logs / 'thousand' / TABLE
    done = {(record['series'], float(record['x'])) for record in read_csv(table)}
    first = torch.arange(GRADIENT_IMAGES)
    pixels, labels, _ = data.load_splits('Digits').train[first, None, first]  # not augmented
    images = normalize(pixels, Preprocessing.for_dataset('Digits')).double()
    depths = {(name, run.x): run.options['depth']
              for run in runs for name in ('diracnet', 'plain')}
    for (name, x), depth in depths.items():
        if (name, x) not in done:
            ratios = relative_gradients(name, depth, images, labels)
            append_results([{'series': name, 'x': x, 'layer': layer, 'relative_gradient': ratio}
                            for layer, ratio in enumerate(ratios, 1)], table)


# ---------------------------------------------------------------- all


EXPERIMENT_MEASURES = {'cost': cost, 'thousand': gradients, 'blocks': blocks}  # per experiment
RUN_MEASURES = {  # once per run
    'alpha-beta': alpha_beta, 'versions': activations, 'int8': int8, 'speedrun': speedrun,
    'reference': peak_memory,
}


def measured_runs(experiment, logs):
    """Returns the names of the runs that have been measured for an experiment."""
    return {record['run'] for record in read_csv(logs / experiment / TABLE)}


def epochs_and_accuracy(run, paths):
    """Returns the epochs and the last accuracy in the log of a run, as text."""
    log = paths.run_folder(run) / LOG_FILE
    epochs = read_log(log) if log.exists() else []
    return [str(len(epochs)), *(str(stats['test_acc']) for stats in epochs[-1:])]


def add_measurement(measure, experiment, run, paths):
    """Appends the records of a measurement of a run to measured.csv, unless it has some."""
    if run.run_name in measured_runs(experiment, paths.logs):
        return
    say(f'{experiment}: measuring {run.title}')
    columns = {'series': run.series, 'x': run.x, 'seed': run.seed, 'run': run.run_name}
    append_results([{**columns, **record} for record in measure(run, paths)],
                   paths.logs / experiment / TABLE)


def measure_run(experiment, run, paths):
    """Measures a finished run of an experiment in RUN_MEASURES."""
    if experiment in RUN_MEASURES and paths.result(run, experiment)['ended'] == 'complete':
        add_measurement(RUN_MEASURES[experiment], experiment, run, paths)
