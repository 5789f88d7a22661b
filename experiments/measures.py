"""What is measured of networks beside the figures of their logs: measured.csv."""

import functools
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import diracnets
from cli import say
from diracnets.checkpoint import load_params
from diracnets.fold import fold
from diracnets.models.diracnet_v1 import NCReLU
from diracnets.onnx import open_onnx, to_onnx
from diracnets.preprocessing import Preprocessing, normalize
from diracnets.quantization import calibration_set, equalize, quantize
from experiments.interleaved import Variant, append, compare, product_rate, read_rows
from experiments.layers import layers_of
from experiments.variants import BATCH, NATIVE, repeated, step, step_of_ordinary_convolutions
from training import data
from training.compute import keep_freed_memory
from training.evaluation import top1
from training.log import LOG_FILE, read_log

TABLE = 'measured.csv'
IMAGES = 1000  # of the test set, for activations
BINS, BIN = 48, 0.25  # of a histogram: their number, and their width in deviations
TURNS, STEPS = 20, 5  # of what is timed, and steps in a turn
GRADIENT_IMAGES = 16  # digits, of which the first gradients are


def load_test_images(training, place, inputs):
    return data.load_splits(place.dataset_of(training), place.dataroot, inputs, training=False).test


# ---------------------------------------------------------------- alpha and beta


def alpha_beta(training, place):
    """The rows of each layer, at the start (epoch 0) and after each epoch that was kept."""
    sizes = {name: training.options[name] for name in ('depth', 'width')}
    states = {0: diracnets.create_model('diracnet', 'CIFAR10', **sizes).state_dict()}
    for path in place.folder(training).glob('epoch-*.pt7'):
        states[int(path.stem.partition('-')[2])] = load_params(path)
    return [{'epoch': epoch, **row}
            for epoch, params in sorted(states.items()) for row in layers_of(params)]


# ---------------------------------------------------------------- activations


@torch.no_grad()
def activations(training, place):
    """Rows of the histograms behind the first, the middle and the last ReLU or NCReLU."""
    trained = diracnets.load(str(place.folder(training)))
    network, test = fold(trained.model), load_test_images(training, place, trained.preprocess)
    layers = [module for module in network.modules() if isinstance(module, (nn.ReLU, NCReLU))]
    images = data.sample_evenly(test, min(IMAGES, len(test)))  # of all classes
    rows = []

    def count(layer, module, inputs, output):
        deviation = output.std()
        edge = BINS * BIN / 2
        counts = torch.histc(output / deviation, BINS, -edge, edge) / output.numel()
        rows.extend(
            {'layer': layer, 'deviation': deviation.item(),
             'from_deviations': i * BIN - edge, 'share': share}
            for i, share in enumerate(counts.tolist())
        )

    for number in (0, len(layers) // 2, len(layers) - 1):
        layers[number].register_forward_hook(functools.partial(count, number + 1))
    network(normalize(images, trained.preprocess))
    return rows


# ---------------------------------------------------------------- int8


@torch.no_grad()
def int8(training, place):
    """The row of a network in float32, in int8, and in int8 with equalised channels: accuracies."""
    trained = diracnets.load(str(place.folder(training)))
    test = load_test_images(training, place, trained.preprocess)
    net = fold(trained.model)
    paths, _ = calibration_set(os.path.join(place.dataroot, 'train'))
    equalised = equalize(net, torch.stack([*map(trained.preprocess, paths)]))
    row = {'calibration_images': len(paths)}
    with tempfile.TemporaryDirectory() as folder:
        for form, names in ((net, ('float32', 'int8')),
                            (equalised, ('equalised_float32', 'equalised_int8'))):
            content = to_onnx(form, torch.zeros(2, *trained.preprocess.shape), {})
            files = quantize(content, paths, trained.preprocess, {})
            for name, content in zip(names, files):
                path = Path(folder, f'{name}.onnx')
                path.write_bytes(content)
                accuracy = top1(open_onnx(path, form), test, trained.preprocess, name)
                row[f'{name}_test_acc_percent'] = accuracy
    return [row]


# ---------------------------------------------------------------- the speed-run


def six_views(network, inputs):
    """Logits of images (N, C, S, S) and of their mirror images, averaged.

    Half of the weight is of the whole ones, half of those moved by one pixel to two corners, what
    comes in being their reflection (Jordan, arXiv 2404.00498, section 3.5).
    """
    size, padded = inputs.shape[-1], F.pad(inputs, (1, 1, 1, 1), 'reflect')
    moved = padded[..., :size, :size], padded[..., 2:, 2:]
    views = (inputs, 2), *((m, 1) for m in moved)
    return sum(weight / 8 * (network(view) + network(view.flip(-1))) for view, weight in views)


@torch.no_grad()
def speedrun(training, place):
    """The row of a speed-run: its accuracy alone and by six views, and what it took of a machine.

    A product of matrices is timed beside it, as machines differ: seconds times its rate is the work
    that the machine could have done.
    """
    rate = product_rate(NATIVE)  # emulated, a product of bfloat16 takes minutes
    folder = place.folder(training)
    seconds = sum(stats['train_time'] for stats in read_log(folder / LOG_FILE))
    trained = diracnets.load(str(folder))
    test = load_test_images(training, place, trained.preprocess)
    network = trained.model.eval().to(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16, enabled=trained.args['dtype'] == 'bfloat16'):
        one, six = (top1(form, test, trained.preprocess, name) for form, name in (
            (network, 'one view'), (functools.partial(six_views, network), 'six views')))
    return [{
        'test_acc_percent': round(one, 2), 'six_views_test_acc_percent': round(six, 2),
        'train_seconds': round(seconds, 1), 'product_gflop_per_second': round(rate, 1),
        'machine_tflop': round(seconds * rate / 1000, 1),
    }]


# ---------------------------------------------------------------- cost


def by_name(model, depth, width):
    return diracnets.create_model(model, 'CIFAR10', depth=depth, width=width)


def inference_of(model, depth, folded):
    """Logits of a batch from a network by name, as it was trained or folded."""
    keep_freed_memory()  # as train.py does: else what is timed is how pages come back
    network = by_name(model, depth, 1).eval()
    network = fold(network) if folded else network
    inputs = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run():
        with torch.autocast('cpu', torch.bfloat16, enabled=NATIVE == 'bfloat16'):
            network(inputs)

    return run


def cost(trainings, place):
    """Times a step of training and inference, in turns: rows are experiments/turns.py's."""
    table = place.logs / 'cost' / TABLE
    depth, images = 28, STEPS * BATCH

    def side(name, prepare, *arguments):
        return Variant(name, repeated, (STEPS, prepare, *arguments), images, dtype=NATIVE)

    done = {row['compared'] for row in read_rows(table)}
    both = {'a training step, 28-1': [
        side('ordinary convolutions', step_of_ordinary_convolutions, depth, 1),
        side('diracnet', step, depth, 1),
        side('plain, of modules', step, depth, 1, functools.partial(by_name, 'plain')),
        side('resnet, of modules', step, depth, 1, functools.partial(by_name, 'resnet')),
    ], 'inference, 28-1': [
        side('plain, folded', inference_of, 'plain', depth, True),
        side('diracnet, folded', inference_of, 'diracnet', depth, True),
        side('diracnet, not folded', inference_of, 'diracnet', depth, False),
        side('resnet, folded', inference_of, 'resnet', depth, True),
    ]}
    for title, sides in both.items():
        if title not in done:  # nothing is measured again
            compare(title, sides, TURNS, table)


# ---------------------------------------------------------------- gradients


def relative_gradients(model, depth, images, labels):
    """Norms of the filters' gradients over the filters' own, before any training, stem first.

    In float64: those of a plain network of 1000 layers overflow float32. Those of two models are
    not to be compared but over depth, as in W_hat a filter is only the part that beta scales.
    images: (N, 3, S, S), float64.
    """
    torch.manual_seed(1)
    network = by_name(model, depth, 1).double().train()
    F.cross_entropy(network(images), labels).backward()
    return [(p.grad.norm() / p.norm()).item() for p in network.parameters() if p.dim() == 4]


def gradients(trainings, place):
    """Measures the filters' first gradients at each depth, of DiracNet and of plain network."""
    table = place.logs / 'thousand' / TABLE
    done = {(row['series'], float(row['x'])) for row in read_rows(table)}
    first = torch.arange(GRADIENT_IMAGES)
    pixels, labels, _ = data.load_splits('Digits').train[first, None, first]  # no seed: not augmented
    images = normalize(pixels, Preprocessing.for_dataset('Digits')).double()
    left = {(model, training.x): training.options['depth']
            for training in trainings for model in ('diracnet', 'plain')}
    for (model, x), depth in left.items():
        if (model, x) not in done:
            found = relative_gradients(model, depth, images, labels)
            append([{'series': model, 'x': x, 'layer': layer, 'relative_gradient': gradient}
                    for layer, gradient in enumerate(found, 1)], table)


# ---------------------------------------------------------------- all


OF_UNTRAINED = {'cost': cost, 'thousand': gradients}  # once for an experiment
OF_PARAMETERS = {  # once for a training
    'alpha-beta': alpha_beta, 'versions': activations, 'int8': int8, 'speedrun': speedrun,
}


def measured(experiment, logs):
    """The runs that an experiment has measured."""
    return {row['run'] for row in read_rows(logs / experiment / TABLE)}


def measure(experiment, training, place):
    """Measures a training that has ended, unless it is measured: its rows go to the table."""
    row = place.row(training, experiment)
    if (experiment not in OF_PARAMETERS or training.run in measured(experiment, place.logs)
            or row['ended'] != 'whole'):
        return
    say(f'{experiment}: measuring {training.name}')
    what = {'series': training.series, 'x': training.x, 'seed': training.seed, 'run': training.run}
    append([{**what, **measures} for measures in OF_PARAMETERS[experiment](training, place)],
           place.logs / experiment / TABLE)
