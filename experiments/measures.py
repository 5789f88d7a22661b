"""What is measured of trained networks beside the figures of their logs: measured.csv."""

import functools
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

import export
import networks
from baselines.diracnet_v1 import NCReLU
from command import say
from diracfile import load_params
from diracfold import fold
from diracimage import normalise
from experiments.bench import BATCH, NATIVE, repeated, step, step_of_ordinary_convolutions
from experiments.turns import Side, append, compare, read_rows
from training import data

TABLE = 'measured.csv'
IMAGES = 1000  # of the test set, for activations
BINS, BIN = 48, 0.25  # of a histogram: their number, and their width in deviations
TURNS, STEPS = 20, 5  # of what is timed, and steps in a turn


def load_test_images(training, place, inputs):
    return data.load(place.dataset_of(training), place.dataroot, inputs, training=False).test


# ---------------------------------------------------------------- alpha and beta


@torch.no_grad()
def alpha_beta(training, place):
    """Rows of each layer at each epoch: alpha, beta, and the norms of the two parts of W_hat."""
    rows = []
    files = {int(path.stem.partition('-')[2]): path
             for path in place.folder(training).glob('epoch-*.pt7')}
    for epoch, path in sorted(files.items()):
        params = load_params(path)
        names = [name.removesuffix('.alpha') for name in params if name.endswith('.alpha')]
        for layer, name in enumerate(names, 1):
            alpha, beta, weight = (params[f'{name}.{part}'] for part in ('alpha', 'beta', 'conv'))
            delta = min(weight.shape[:2])  # filters with a one of delta
            rows.append({
                'epoch': epoch, 'layer': layer,
                'alpha_mean': alpha.mean().item(), 'alpha_deviation': alpha.std().item(),
                'beta_mean': beta.mean().item(), 'beta_deviation': beta.std().item(),
                'dirac_norm': alpha[:delta].norm().item(),  # of diag(alpha) delta
                'free_norm': beta.norm().item(),  # of diag(beta) normalize(W): unit filters
            })
    return rows


# ---------------------------------------------------------------- activations


@torch.no_grad()
def activations(training, place):
    """Rows of the histograms behind the first, the middle and the last ReLU or NCReLU."""
    trained = networks.load(str(place.folder(training)))
    network, test = fold(trained.network), load_test_images(training, place, trained.inputs)
    layers = [module for module in network.modules() if isinstance(module, (nn.ReLU, NCReLU))]
    images = data.evenly(test, min(IMAGES, len(test)))  # of all classes
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
    network(normalise(images, trained.inputs))
    return rows


# ---------------------------------------------------------------- int8


@torch.no_grad()
def int8(training, place):
    """The row of a network exported to float32 and to int8: its accuracy in each."""
    trained = networks.load(str(place.folder(training)))
    test = load_test_images(training, place, trained.inputs)
    net = fold(trained.network)
    content = export.as_onnx(net, torch.zeros(2, *trained.inputs.shape), trained.metadata())
    paths, _ = export.calibration_set(os.path.join(place.dataroot, 'train'))
    files = zip(('float32', 'int8'), export.quantise(content, paths, trained.inputs.read, {}))
    row = {'calibration_images': len(paths)}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files:
            path = Path(folder, f'{name}.onnx')
            path.write_bytes(content)
            accuracy = export.top1(export.open_onnx(path, net), test, trained.inputs, name)
            row[f'{name}_test_acc_percent'] = accuracy
    return [row]


# ---------------------------------------------------------------- cost


def by_name(model, depth, width):
    return networks.build(model, 'CIFAR10', depth=depth, width=width)


def inference_of(model, depth, folded):
    """Logits of a batch from a network by name, as it was trained or folded."""
    network = by_name(model, depth, 1).eval()
    network = fold(network) if folded else network
    inputs = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run():
        with torch.autocast('cpu', torch.bfloat16, enabled=NATIVE == 'bfloat16'):
            network(inputs)

    return run


def cost(place):
    """Times a step of training and inference, in turns: rows are experiments/turns.py's."""
    table = place.logs / 'cost' / TABLE
    depth, images = 28, STEPS * BATCH

    def side(name, prepare, *arguments):
        return Side(name, repeated, (STEPS, prepare, *arguments), images, dtype=NATIVE)

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


# ---------------------------------------------------------------- all


OF_PARAMETERS = {'alpha-beta': alpha_beta, 'versions': activations, 'int8': int8}


def measured(experiment, logs):
    """The runs that an experiment has measured."""
    return {row['run'] for row in read_rows(logs / experiment / TABLE)}


def measure(experiment, trainings, place):
    """Measures what is not measured yet; trainings that have not ended are left out."""
    if experiment == 'cost':
        cost(place)
    if experiment not in OF_PARAMETERS:
        return
    done = measured(experiment, place.logs)
    for training in trainings:
        row = place.row(training, experiment)
        if training.run in done or not row or row['ended'] != 'whole':
            continue
        say(f'{experiment}: measuring {training.name}')
        what = {'series': training.series, 'x': training.x, 'seed': training.seed,
                'run': training.run}
        append([{**what, **measures} for measures in OF_PARAMETERS[experiment](training, place)],
               place.logs / experiment / TABLE)
