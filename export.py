r"""Exports a trained model: folds, verifies, and measures accuracy, size and speed.

The extension of the file selects the format: .onnx, .pt2 (torch.export), .safetensors or .pth
(state dicts):
    python export.py logs/diracnet-28-2 --to diracnet.onnx
    python export.py diracnet18 --to diracnet18.onnx        # the authors' ImageNet model

int8, calibrated on a folder of images, with the top-1 accuracy before and after quantization:
    python export.py logs/diracnet-28-2 --to diracnet-int8.onnx --int8 ~/images/train --equalize \
        --dataset Folder --dataroot ~/images

No file is written if its outputs differ from those of the trained model.
"""

import copy
import functools
import os

from cli import (
    ArgumentParser,
    exit_on_ctrl_c,
    exit_on_error,
    exit_on_signals,
    printable,
    require_packages,
    say,
    table,
)
from diracnets.preprocessing import DATASETS

EXTENSIONS = {  # of diracnets.formats.FORMATS: the packages required in addition to torch
    '.onnx': ('onnx', 'onnxruntime', 'onnxscript'), '.pt2': (), '.safetensors': ('safetensors',),
    '.pth': (),
}


def parse_options(argv=None):
    parser = ArgumentParser.of_script('export.py', __doc__)
    add = parser.add_argument
    add('checkpoint', help='folder of a run, checkpoint, .pth or .safetensors file, or the name '
                           'diracnet18 or diracnet34')
    add('--to', required=True, metavar='FILE',
        help=f'file to write; the extension is one of {", ".join(EXTENSIONS)}')
    add('--dynamic_size', action='store_true',
        help='write an .onnx file that accepts inputs of any height and width')
    add('--int8', metavar='FOLDER',
        help='quantize the .onnx file to int8, calibrated on the images in this folder')
    add('--equalize', '--equalise', nargs='?', const='', metavar='FOLDER', dest='equalize',
        help='equalize the channel ranges on the images of --int8, or without --int8 on those in '
             'this folder, which improves the int8 accuracy of DiracNets; float outputs do not '
             'change')
    add('--dataset', choices=DATASETS, help='measure the top-1 accuracy on this test set')
    add('--dataroot', default='.', help='folder of the test set (default: .)')
    opt = parser.parse_args(argv)
    opt.extension = os.path.splitext(opt.to)[1]
    if opt.extension not in EXTENSIONS:
        parser.error(f'--to {opt.to}: unknown format; use one of {", ".join(EXTENSIONS)}')
    for name in ('int8', 'dynamic_size'):
        if getattr(opt, name) and opt.extension != '.onnx':
            parser.error(f'--to {opt.to}: --{name} needs a file name that ends in .onnx')
    if opt.equalize == '' and not opt.int8:
        parser.error('--equalize: needs calibration images; use --equalize FOLDER or add --int8')
    if opt.equalize and opt.int8:
        parser.error(f'--equalize {opt.equalize}: the images are those of --int8; omit the folder')
    if os.path.realpath(opt.to) == os.path.realpath(opt.checkpoint):
        parser.error(f'--to {opt.to}: would overwrite the checkpoint; use another name')
    if opt.dataroot != parser.get_default('dataroot') and not opt.dataset:
        parser.error(f'--dataroot {opt.dataroot}: needs --dataset')
    require_packages('export.py', 'deploy', *EXTENSIONS[opt.extension])
    return opt


if __name__ == '__main__':  # --help and errors come before the imports that take seconds
    exit_on_ctrl_c()
    parse_options()

import torch
import torch.nn.functional as F

from diracnets.class_names import match_classes
from diracnets.folding import fold
from diracnets.formats import FORMATS
from diracnets.loading import load
from diracnets.onnx import OnnxModel
from diracnets.preprocessing import normalize
from diracnets.quantization import calibration_set, equalize, quantize
from training import data
from training.evaluation import top1
from training.files import path_in_errors, sibling_tempdir, write_synced
from training.timing import images_per_second

BATCH = 16  # images, for verification and timing
OTHER_SIZE_BATCH = 4  # images, for verification at another size
TOLERANCE, INT8_TOLERANCE = 1e-4, 0.5  # of logits, relative to the largest logit


# ---------------------------------------------------------------- inputs


def load_test_set(opt, loaded):
    """Loads the test set of --dataset; raises ValueError for classes that the model lacks."""
    splits = data.load_splits(opt.dataset, opt.dataroot, loaded.preprocess, training=False,
                              classes=loaded.classes or ())
    return splits.test.relabeled(match_classes(
        loaded.path, loaded.num_classes, loaded.classes, splits.classes))


def verification_inputs(loaded, test, paths):
    """Returns inputs (N, C, S, S) and their source: test images, calibration images or noise."""
    if test:
        images = data.sample_evenly(test, BATCH)
        return normalize(images, loaded.preprocess), f'{BATCH} test images'
    if paths:
        paths = paths[:: -(-len(paths) // BATCH)]
        inputs = torch.stack([loaded.preprocess(path) for path in paths])
        return inputs, f'{len(inputs)} calibration images'
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn((BATCH, *loaded.preprocess.shape), generator=generator)
    return inputs, f'{BATCH} random inputs'


# ---------------------------------------------------------------- figures


def print_header(opt, loaded, source):
    """Prints the model, its inputs, and how the figures in the table are measured."""
    preprocess = loaded.preprocess
    mean, std = (', '.join(f'{value:.4f}' for value in values)
                 for values in (preprocess.mean, preprocess.std))
    shape = ', '.join(map(str, preprocess.shape))
    colors = 'RGB in [0, 1], ' if preprocess.channels == 3 else ''
    say(f'{opt.checkpoint}: {loaded.title}, {loaded.num_classes} classes',
        f'inputs: (N, {shape}), {colors}normalized with mean ({mean}), std ({std})',
        'max difference: of the logits from those of the unfolded model in float64, relative to '
        f'the largest logit, on {source}',
        f'images per second: batches of {BATCH}, CPU threads: {torch.get_num_threads()}', '')


class MismatchError(RuntimeError):
    """The outputs of an exported model differ from those of the original one."""


def verify(models, tolerances, inputs, expected):
    """Returns the cells of `max difference`; raises MismatchError beyond the tolerance.

    models and tolerances have the same titles; expected: logits (N, num_classes).
    """
    cells = []
    for title, model in models.items():
        difference = ((model(inputs) - expected).abs().max() / expected.abs().max()).item()
        if not difference <= tolerances[title]:  # also for NaN
            raise MismatchError(
                f'{title} differs from the unfolded model by {difference:.1e} of the largest '
                f'logit: expected at most {tolerances[title]:g}; nothing was written'
            )
        cells.append(f'{difference:.0e} (at most {tolerances[title]:g})')
    return cells


def verify_other_size(models, tolerances, inputs, reference):
    """Returns a row like that of `verify`, for inputs of another size and shape.

    reference: the original model. Raises ValueError if a model fails for these inputs.
    """
    height, width = inputs.shape[2] * 3 // 2, inputs.shape[3] * 2
    inputs = F.interpolate(inputs[:OTHER_SIZE_BATCH], (height, width))
    try:
        cells = verify(models, tolerances, inputs, reference(inputs.double()))
    except MismatchError as error:
        raise MismatchError(f'inputs of {height} x {width} pixels: {error}') from error
    except RuntimeError as error:
        raise ValueError(f'--dynamic_size: the model fails for inputs of {height} x {width} '
                         'pixels; omit this option') from error
    return {f'max difference, {height} x {width}': cells}


# ---------------------------------------------------------------- export


def export_bytes(opt, folded, loaded, paths, calibration):
    """Returns {title: bytes}; the last one is the content of --to."""
    example = torch.zeros(2, *loaded.preprocess.shape)
    to_bytes = FORMATS[opt.extension].to_bytes
    if opt.dynamic_size:
        to_bytes = functools.partial(to_bytes, dynamic_size=True)
    metadata = loaded.metadata(calibration=calibration)
    content = to_bytes(folded, example, metadata)
    name = os.path.basename(opt.to)
    if not opt.int8:
        return {name: content}
    float32, int8 = quantize(content, paths, loaded.preprocess, metadata)
    return {'float32': float32, name: int8}


@torch.no_grad()
def export(opt):
    """Loads, folds, exports, verifies and measures; --to is written only if all of it succeeds."""
    loaded = load(opt.checkpoint)
    if isinstance(loaded.model, OnnxModel):
        raise ValueError(f'{loaded.path}: an ONNX file cannot be exported again; use the run or '
                         'another file that was exported from it')
    images = opt.int8 or opt.equalize
    paths, calibration = calibration_set(images) if images else ([], None)
    test = load_test_set(opt, loaded) if opt.dataset else None
    inputs, source = verification_inputs(loaded, test, paths)
    unfolded, folded = loaded.model.float(), fold(loaded.model).requires_grad_(False)
    if opt.equalize is not None:
        folded = equalize(folded, torch.stack([loaded.preprocess(path) for path in paths]))
        calibration['equalised'] = True
    print_header(opt, loaded, source)

    contents = export_bytes(opt, folded, loaded, paths, calibration)
    models, tolerances = {'unfolded': unfolded}, dict.fromkeys(['unfolded', *contents], TOLERANCE)
    if opt.int8:
        tolerances[os.path.basename(opt.to)] = INT8_TOLERANCE
    with sibling_tempdir(opt.to) as folder:
        for number, (title, content) in enumerate(contents.items()):
            path = os.path.join(folder, f'{number}{opt.extension}')
            with path_in_errors(opt.to):
                write_synced(path, content)
            models[title] = FORMATS[opt.extension].open(path, folded)
        reference = copy.deepcopy(unfolded).double()
        memory = sum(tensor.nbytes for tensor in unfolded.state_dict().values())
        sizes = [memory, *map(len, contents.values())]
        rows = {
            'parameters': [f'{sum(param.numel() for param in model.parameters()):,}'
                           for model in (unfolded, *[folded] * len(contents))],
            'size, MB': [f'{size / 1e6:.2f}' for size in sizes],
            'max difference': verify(models, tolerances, inputs, reference(inputs.double())),
            **(verify_other_size(models, tolerances, inputs, reference)
               if opt.dynamic_size else {}),
            'images per second': [f'{rate:,.0f}' for rate in
                                  images_per_second(models.values(), inputs)],
        }
        if test:
            rows['top-1, %'] = [f'{top1(model, test, loaded.preprocess, title):.2f}'
                                for title, model in models.items()]
        with path_in_errors(opt.to):
            os.replace(path, opt.to)  # the last file
    lines = table(['', *map(printable, models)], [[name, *cells] for name, cells in rows.items()])
    say(*lines, f'written to {opt.to}')


def main(argv=None):
    opt = parse_options(argv)
    with exit_on_error('export.py'), exit_on_signals():
        export(opt)


if __name__ == '__main__':
    main()
