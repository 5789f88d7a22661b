r"""Exports a trained network: folded, verified against what was trained, and measured.

The ending chooses the format: .onnx, .pt2 (torch.export), .safetensors or .pth (state dicts):
    python export.py logs/diracnet-28-2 --to diracnet.onnx

In int8, its ranges calibrated on a folder of images, with the accuracy that is left:
    python export.py logs/diracnet-28-2 --to diracnet-int8.onnx --int8 ~/images/train --equalise \
        --dataset Folder --dataroot ~/images
"""

import argparse
import contextlib
import copy
import functools
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

if __name__ == '__main__':  # before what takes seconds to import
    from cli import exit_on_ctrl_c

    exit_on_ctrl_c()

import torch
from tqdm import tqdm

import diracnets
from cli import ArgumentParser, exit_on_error, print_table, require_packages
from diracnets.checkpoint import PT2_CONFIG
from diracnets.fold import fold
from diracnets.loading import check_classes
from diracnets.onnx import OnnxModel
from diracnets.preprocessing import normalize
from diracnets.quantization import equalize
from training import data
from training.checkpoint import write
from training.loader import make_loader
from training.options import DATASETS

BATCH = 16  # images, in verifying and measuring
ROUNDS = 10
CALIBRATION_IMAGES = 256
DISK_HEADROOM = 5  # float32 files, of which int8 takes four on its way
TOLERANCE, INT8_TOLERANCE = 1e-4, 0.5  # of the largest logit


# ---------------------------------------------------------------- formats


def in_memory(save, contents):
    """Returns the bytes of a file of torch's: its own writer aborts where the disk is full."""
    file = io.BytesIO()
    save(contents, file)
    return file.getvalue()


def as_onnx(net, inputs, said):
    program = torch.onnx.export(
        net, (inputs,), input_names=['inputs'], output_names=['logits'], opset_version=18,
        dynamic_shapes=({0: torch.export.Dim('N')},), dynamo=True, verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces: paths of this machine
    return add_metadata(program.model_proto, said)


def add_metadata(model, said):
    """Returns the bytes of an ONNX model that says this of itself, beside what it says already."""
    for name, text in said.items():
        model.metadata_props.add(key=name, value=text)
    return model.SerializeToString()


def open_onnx(path, net):
    return OnnxModel(path)


def as_pt2(net, inputs, said):
    program = torch.export.export(net, (inputs,), dynamic_shapes=({0: torch.export.Dim('N')},))
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # paths of this machine
    content = in_memory(functools.partial(torch.export.save, extra_files=said), program)
    if PT2_CONFIG.encode() not in content:
        raise ValueError(f'.pt2 of torch {torch.__version__}: its parameters cannot be read '
                         'without running what is in the file: expected torch 2.9 or newer')
    return content


def open_pt2(path, net):
    return torch.export.load(path).module()


def open_state_dict(state, net):
    net = copy.deepcopy(net)
    net.load_state_dict(state, assign=True)
    return net


def as_safetensors(net, inputs, said):
    from safetensors.torch import save

    return save(net.state_dict(), said)


def open_safetensors(path, net):
    from safetensors.torch import load_file

    return open_state_dict(load_file(path), net)


def as_pth(net, inputs, said):
    state = net.state_dict()
    state._metadata.update(said)  # which torch.save keeps, and load_state_dict passes over
    return in_memory(torch.save, state)


def open_pth(path, net):
    return open_state_dict(torch.load(path, weights_only=True), net)


# as(net, inputs, what the file says of itself) -> bytes, open(path, net) -> inputs to logits,
# packages
FORMATS = {
    '.onnx': (as_onnx, open_onnx, ('onnx', 'onnxruntime', 'onnxscript')),
    '.pt2': (as_pt2, open_pt2, ()),
    '.safetensors': (as_safetensors, open_safetensors, ('safetensors',)),
    '.pth': (as_pth, open_pth, ()),
}


class Calibration:
    """Hands batches of inputs to ONNX Runtime's quantizer: {'inputs': (n, C, S, S)}, then None."""

    def __init__(self, paths, transform):
        self.paths = tqdm(paths, 'calibrating', unit='img', disable=None, leave=False)
        self.batches = map(transform, self.paths)

    def get_next(self):
        inputs = next(self.batches, None)
        return None if inputs is None else {'inputs': inputs[None].numpy()}


def check_disk_space(folder, content):
    """Raises OSError where DISK_HEADROOM files of this content do not fit into a temporary folder.

    ONNX Runtime itself would print a traceback, and read again what it could not write.
    """
    files = [Path(folder, f'room-{i}') for i in range(DISK_HEADROOM)]
    with errors_that_name(tempfile.gettempdir()):
        for file in files:
            file.write_bytes(content)
    for file in files:
        file.unlink()


def quantize(content, paths, transform, said):
    """Makes int8 of the bytes of a float32 ONNX file: activations per tensor, filters per channel.

    paths: of the images to calibrate on, which transform makes inputs of; said: what the int8 file
    says of itself. Returns the bytes of both files, float32 optimised as int8 is.
    """
    import onnx
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:  # ONNX Runtime goes by files, here and within
        float32, int8 = (Path(folder, name) for name in ('float32.onnx', 'int8.onnx'))
        check_disk_space(folder, content)
        float32.write_bytes(content)
        # all shapes but the batch's are numbers: in symbols, some networks' cannot be inferred
        quant_pre_process(float32, float32, skip_symbolic_shape=True)
        quantize_static(float32, int8, Calibration(paths, transform), per_channel=True)
        model = onnx.load(int8)
        del model.metadata_props[:]  # what the float32 file said
        return float32.read_bytes(), add_metadata(model, said)


# ---------------------------------------------------------------- inputs


def calibration_set(folder):
    """Chooses up to CALIBRATION_IMAGES image files under a folder, evenly over the sorted paths.

    Returns (their paths, what an int8 file says of them): no seed, as nothing is drawn. Raises
    ValueError for a folder without an image.
    """
    paths = sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(data.IMAGE_EXTENSIONS)
    )
    if not paths:
        raise ValueError(f'--int8 {folder}: no image in it: expected images to calibrate on')
    chosen = paths[:: -(-len(paths) // CALIBRATION_IMAGES)]
    return chosen, {
        'dataset': os.path.basename(os.path.abspath(folder)), 'images': len(chosen),
        'of': len(paths), 'chosen': 'evenly over the sorted paths', 'seed': None,
    }


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


def rates(networks, inputs):
    """Measures images per second of each network, in turns: the median of ROUNDS."""
    seconds = [[] for _ in networks]
    bar = tqdm(range(1 + ROUNDS), 'measuring', unit='round', disable=None, leave=False)
    for i in bar:
        for network, times in zip(networks, seconds):
            start = time.perf_counter()
            network(inputs)
            if i > 0:  # the first round warms up
                times.append(time.perf_counter() - start)
    return [len(inputs) / statistics.median(times) for times in seconds]


def top1(network, test, inputs, title):
    """Returns the accuracy on the test set in per cent."""
    loader = make_loader(test, BATCH)
    right = sum(
        (network(normalize(images, inputs)).argmax(1) == labels).sum().item()
        for images, labels, _ in tqdm(loader, f'top-1, {title}', disable=None, leave=False)
    )
    return 100 * right / len(test)


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


@contextlib.contextmanager
def errors_that_name(path):
    """Has an OSError name the file that was asked for, in place of one on the way to it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


@contextlib.contextmanager
def folder_beside(path):
    """A temporary folder beside a file to come; folders made for one that does not come go."""
    target = Path(path).absolute().parent
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        with errors_that_name(path):
            target.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=target)
        with folder as name:
            yield name
    except BaseException:
        for folder in made:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


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
