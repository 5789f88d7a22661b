r"""Exports a trained network: folded, verified against what was trained, and measured.

The ending chooses the format: .onnx, .pt2 (torch.export), .safetensors or .pth (state dicts):
    python export.py logs/diracnet-28-2 --to diracnet.onnx

In int8, its ranges calibrated on a folder of images, with the accuracy that is left:
    python export.py logs/diracnet-28-2 --to diracnet-int8.onnx --int8 ~/images/train --equalise \
        --dataset Folder --dataroot ~/images
"""

import argparse
import copy
import os

if __name__ == '__main__':  # before what takes seconds to import
    from cli import exit_on_ctrl_c

    exit_on_ctrl_c()

import torch

import diracnets
from cli import ArgumentParser, exit_on_error, print_table, require_packages
from diracnets.fold import fold
from diracnets.formats import FORMATS
from diracnets.loading import check_classes
from diracnets.onnx import OnnxModel
from diracnets.preprocessing import normalize
from diracnets.quantization import calibration_set, equalize, quantize
from training import data
from training.evaluation import top1
from training.files import errors_that_name, folder_beside, write
from training.options import DATASETS
from training.timing import rates

BATCH = 16  # images, in verifying and measuring
TOLERANCE, INT8_TOLERANCE = 1e-4, 0.5  # of the largest logit


# ---------------------------------------------------------------- inputs


def load_test_set(opt, trained):
    """Loads the test set of --dataset; raises ValueError if it is not what the network knows."""
    sets = data.load_splits(opt.dataset, opt.dataroot, trained.preprocess, training=False)
    check_classes(trained.path, trained.num_classes, trained.classes, sets.classes)
    return sets


def verification_inputs(trained, sets, paths):
    """Returns (inputs (BATCH, C, S, S), what they are): test images, calibration ones or noise."""
    if sets:
        images = data.sample_evenly(sets.test, BATCH)
        return normalize(images, trained.preprocess), f'{BATCH} test images'
    if paths:
        paths = paths[:: -(-len(paths) // BATCH)]
        inputs = torch.stack(list(map(trained.preprocess, paths)))
        return inputs, f'{len(inputs)} calibration images'
    shape, generator = (BATCH, *trained.preprocess.shape), torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), f'{BATCH} random inputs'


# ---------------------------------------------------------------- figures


def max_difference(logits, expected):
    """Returns the largest difference, over the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def describe(opt, trained, verified_on):
    """Prints what goes in, and how the figures that follow are taken."""
    mean, std = (
        ', '.join(f'{v:.4f}' for v in values)
        for values in (trained.preprocess.mean, trained.preprocess.std)
    )
    colours = 'RGB in [0, 1], ' if trained.preprocess.channels == 3 else ''
    print(f'{opt.checkpoint}: {trained.title}, {trained.num_classes} classes')
    shape = ', '.join(map(str, trained.preprocess.shape))
    print(f'inputs: (N, {shape}), {colours}less ({mean}), over ({std})')
    print(f'max difference: of logits, over the largest, on {verified_on}; from the unfolded '
          'network in float64')
    print(f'images per second: in batches of {BATCH}, CPU threads: {torch.get_num_threads()}\n',
          flush=True)


# ---------------------------------------------------------------- the command


def parse_options(argv=None):
    parser = ArgumentParser(
        prog='export.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('checkpoint', help='a checkpoint, the folder of a run, or any file of parameters')
    add('--to', required=True, metavar='FILE', help=f'to write: {", ".join(FORMATS)}')
    add('--int8', metavar='FOLDER', help='quantise the .onnx, calibrated on the images in there')
    add('--equalise', action='store_true',
        help='first bring the channels to like ranges on those images: int8 then loses less of a '
             'DiracNet, and float32 nothing')
    add('--dataset', choices=DATASETS, help='on whose test set to measure top-1, if that is wanted')
    add('--dataroot', default='.', help='folder of its files (default: .)')
    opt = parser.parse_args(argv)
    opt.ending = os.path.splitext(opt.to)[1]
    if opt.ending not in FORMATS:
        parser.error(f'--to {opt.to}: expected a name that ends in {", ".join(FORMATS)}')
    if opt.int8 and opt.ending != '.onnx':
        parser.error(f'--int8 with --to {opt.to}: expected a name that ends in .onnx')
    if opt.equalise and not opt.int8:
        parser.error('--equalise without --int8: expected a folder of images to calibrate on')
    if os.path.realpath(opt.to) == os.path.realpath(opt.checkpoint):
        parser.error(f'--to {opt.to} is the checkpoint itself: expected another name')
    require_packages('export.py', 'deploy', *FORMATS[opt.ending][2])
    return opt


def make(opt, net, trained, paths, calibration):
    """Makes files of the folded network: {title: (bytes, tolerance)}, that of --to last."""
    name, zeros = os.path.basename(opt.to), torch.zeros(2, *trained.preprocess.shape)
    content = FORMATS[opt.ending][0](net, zeros, trained.metadata())
    if not opt.int8:
        return {name: (content, TOLERANCE)}
    said = trained.metadata(calibration=calibration)
    float32, int8 = quantize(content, paths, trained.preprocess, said)
    return {'float32': (float32, TOLERANCE), name: (int8, INT8_TOLERANCE)}


def verify(networks, tolerances, inputs, expected):
    """Returns the table's cells; raises RuntimeError for a network that differs by too much."""
    cells = []
    for (name, network), tolerance in zip(networks.items(), tolerances):
        difference = max_difference(network(inputs), expected)
        if not difference <= tolerance:  # NaN is too much
            raise RuntimeError(
                f'{name} differs from the unfolded network by {difference:.1e} of the largest '
                f'logit: expected at most {tolerance:g}'
            )
        cells.append(f'{difference:.0e} (at most {tolerance:g})')
    return cells


@torch.no_grad()
def export(opt):
    """Loads, folds, writes, verifies and measures; --to appears when all of it went well."""
    trained = diracnets.load(opt.checkpoint)
    if isinstance(trained.model, OnnxModel):
        raise ValueError(f'{trained.path}: ONNX, which is run and not written again: expected the '
                         'run, or another file that was exported from it')
    paths, calibration = calibration_set(opt.int8) if opt.int8 else ([], None)
    sets = load_test_set(opt, trained) if opt.dataset else None
    inputs, described = verification_inputs(trained, sets, paths)
    unfolded, net = trained.model.float(), fold(trained.model).requires_grad_(False)
    if opt.equalise:
        net = equalize(net, torch.stack([*map(trained.preprocess, paths)]))
        calibration['equalised'] = True
    describe(opt, trained, described)
    made = make(opt, net, trained, paths, calibration)
    contents, tolerances = zip(*made.values())
    with folder_beside(opt.to) as folder:
        files = [os.path.join(folder, str(i) + opt.ending) for i in range(len(contents))]
        forms = {'unfolded': unfolded}
        for title, path, content in zip(made, files, contents):
            with errors_that_name(opt.to):
                write(path, content)
            forms[title] = FORMATS[opt.ending][1](path, net)
        expected = copy.deepcopy(unfolded).double()(inputs.double())
        memory = sum(tensor.nbytes for tensor in unfolded.state_dict().values())
        sizes = [memory, *map(len, contents)]
        rows = {
            'parameters': [
                f'{sum(p.numel() for p in network.parameters()):,}'
                for network in [unfolded] + [net] * len(files)
            ],
            'size, MB': [f'{size / 1e6:.2f}' for size in sizes],
            'max difference': verify(forms, (TOLERANCE, *tolerances), inputs, expected),
            'images per second': [f'{r:,.0f}' for r in rates(forms.values(), inputs)],
        }
        if sets:
            rows['top-1, %'] = [
                f'{top1(network, sets.test, trained.preprocess, title):.2f}'
                for title, network in forms.items()
            ]
        with errors_that_name(opt.to):
            os.replace(files[-1], opt.to)
    print_table(['', *forms], [[name, *cells] for name, cells in rows.items()])
    print(f'written to {opt.to}')


def main(argv=None):
    opt = parse_options(argv)
    with exit_on_error('export.py'):
        export(opt)


if __name__ == '__main__':
    main()
