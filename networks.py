"""The networks by name: the DiracNet and those it is measured against; that of a trained file.

    network = build('plain', 'CIFAR10', depth=28, width=1, block='dbb')
    logits = network(inputs)                        # (N, 3, H, W) to (N, num_classes)
    trained = load('logs/diracnet-16-1')           # the network of any file or run: Trained
    deployed = diracfold.fold(trained.network)      # plain convolutions
"""

import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import diracfile
from baselines import densenet, diracnet_v1, fast, mobilenet, plain, repeated_delta, wide_resnet
from baselines.replace import with_block
from diracfold import fold
from diracimage import MAX_SMALL, Inputs
from diracnet import (
    CLASSES,
    DiracNet,
    Network,
    check_fit,
    check_integers,
    forward,
    init_params,
    is_folded,
    topology,
)
from diraconnx import OnnxNetwork
from diracschema import metadata, said_in


@dataclass(frozen=True)
class Family:
    """One row of FAMILIES."""

    # (Topology, **options), where depth and width are among the options, or (num_classes,
    # **options), to an nn.Module
    build: Callable
    options: dict  # the flags of train.py that size it, and their defaults
    kinds: tuple = tuple(CLASSES)  # of images it is for
    decay_all: bool = False  # weight decay on one-dimensional tensors too
    crop_padding: str = 'reflect'  # or 'constant': around small images, before the random crop


def _diracnet(net, checkpointing=False):
    return Network(functools.partial(forward, net, checkpointing=checkpointing), init_params(net))


def _from_torchvision(name):
    def from_torchvision(num_classes, block):
        return with_block(torchvision.models.get_model(name, num_classes=num_classes), block)

    return from_torchvision


CIFAR, IMAGENET = ('CIFAR10', 'CIFAR100'), ('ImageNet',)
SIZE = {'depth': 16, 'width': 1}
BLOCK = {'block': 'base'}
DENSENET = {'layers': 100, 'growth': 12, 'reduce': 0.5, 'bottleneck': True, 'droprate': 0.0,
            'checkpointing': False}

FAMILIES = {
    'diracnet': Family(_diracnet, {**SIZE, 'checkpointing': False}),
    'diracnet-v1': Family(diracnet_v1.diracnet_v1, SIZE, decay_all=True),
    'diracnet-repeated': Family(repeated_delta.repeated_delta, SIZE),
    'diracnet-fast': Family(fast.fast, {'width': 1, 'block': 'dirac', 'activation': 'gelu'}, CIFAR),
    'plain': Family(plain.plain, {**SIZE, **BLOCK}),
    'dirac-init': Family(plain.dirac_init, SIZE),
    'resnet': Family(plain.resnet, SIZE),
    'wide-resnet': Family(
        wide_resnet.WideResNet, {'depth': 28, 'width': 10, 'droprate': 0.0}, CIFAR
    ),
    'densenet': Family(densenet.densenet, DENSENET, CIFAR, crop_padding='constant'),
    'densenet121': Family(
        densenet.densenet121, {'droprate': 0.0, 'checkpointing': False}, IMAGENET
    ),
    'resnet18': Family(_from_torchvision('resnet18'), BLOCK, IMAGENET),
    'resnet34': Family(_from_torchvision('resnet34'), BLOCK, IMAGENET),
    'resnet50': Family(_from_torchvision('resnet50'), BLOCK, IMAGENET),
    'alexnet': Family(_from_torchvision('alexnet'), BLOCK, IMAGENET),
    'mobilenet': Family(mobilenet.mobilenet, BLOCK, IMAGENET),
}


def family(name):
    """Returns the row of FAMILIES; raises ValueError for an unknown name."""
    if name not in FAMILIES:
        raise ValueError(f'unknown model {name!r}: expected one of {", ".join(FAMILIES)}')
    return FAMILIES[name]


def build(name, kind, num_classes=None, in_channels=3, **options):
    """Builds a network of FAMILIES, newly drawn: (N, C, H, W) to logits (N, num_classes).

    kind: of the images, 'CIFAR10', 'CIFAR100' or 'ImageNet'; num_classes: in place of that data
    set's own; in_channels: C; options: those of the family's row, which holds what is not given.
    Raises ValueError for an unknown name, images or an option that the family does not take, and
    what the family itself refuses.
    """
    row = family(name)
    if kind not in row.kinds:
        raise ValueError(f'{name} is not for {kind!r}: expected one of {", ".join(row.kinds)}')
    refused = sorted(options.keys() - row.options.keys())
    if refused:
        raise ValueError(
            f'{name} takes no {", ".join(refused)}: expected of {", ".join(row.options)}'
        )
    num_classes = CLASSES[kind] if num_classes is None else num_classes
    check_integers(num_classes=num_classes)
    if num_classes < 1:
        raise ValueError(f'num_classes {num_classes}: expected at least 1')
    if in_channels != 3 and 'depth' not in row.options:
        raise ValueError(f'{name} takes images of 3 channels, not {in_channels}')
    options = {**row.options, **options}
    if not 0 <= options.get('droprate', 0) < 1:
        raise ValueError(f'droprate {options["droprate"]}: expected at least 0 and less than 1')
    if 'depth' in options:
        net = topology(
            options.pop('depth'), options.pop('width'), kind, num_classes, in_channels
        )
        return row.build(net, **options)
    return row.build(num_classes, **options)


# ---------------------------------------------------------------- trained


@dataclass(frozen=True)
class Trained:
    """The network of a file, and what its inputs and outputs are."""

    path: str
    network: nn.Module  # in evaluation mode
    options: dict  # its family, as 'model', and the options that size it
    inputs: Inputs
    num_classes: int
    classes: list  # their names, or None
    args: dict  # the options of its training, or empty
    origin: dict  # what an exported file says that it came from: see diracschema.ORIGIN

    def metadata(self, **more):
        """What an exported file says of it, as `diracschema.metadata` has it.

        more: of diracschema.ORIGIN, beside its name, its file's and the epochs of its training.
        """
        origin = {'network': self.title, 'exported_from': os.path.basename(
            os.path.abspath(self.path)), 'epoch': self.origin.get('epoch'), **more}
        return metadata({**self.args, **self.options}, self.classes, asdict(self.inputs), origin)

    @property
    def title(self):
        sizes = dict(self.options)
        name = sizes.pop('model')
        if name == 'diracnet':
            return f'DiracNet-{sizes["depth"]}-{sizes["width"]:g}'
        return ', '.join([name, *(f'{option} {value}' for option, value in sizes.items())])


def load(path, stated=None):
    """Loads the network of a file or of a run's folder, of any family, folded or not: Trained.

    That of an ONNX file, float or int8, is a diraconnx.OnnxNetwork, which ONNX Runtime computes.

    stated: what someone states of it, in the names of the options of train.py. It must not
    contradict what the file says, in the options of its training or by the shapes of a DiracNet,
    and is taken where the file says nothing. path and errors are those of `diracfile.read`; raises
    ValueError too for what is contradicted, and for parameters that do not fit.
    """
    stated, onnx = stated or {}, str(path).endswith('.onnx') and os.path.isfile(path)
    network = OnnxNetwork(path) if onnx else None
    saved = (
        diracfile.saved_of(path, said_in(network.said, path), {}) if onnx else diracfile.read(path)
    )
    try:
        told = inputs_told(saved)
        said = _agreed(saved.args, told, stated)
        if onnx:
            num_classes, sizes, inputs = _of_onnx(network, told, said)
        elif said['model'] == 'diracnet':
            network, num_classes, sizes, inputs = _of_topology(saved, told, stated)
        else:
            network, num_classes, sizes, inputs = _of_family(saved, told, said)
        if saved.classes is not None and len(saved.classes) != num_classes:
            raise ValueError(f'{len(saved.classes)} names of {num_classes} classes: expected one '
                             'for each')
    except ValueError as error:
        raise ValueError(f'{saved.path}: {error}') from error
    if not onnx:
        network.load_state_dict(saved.params, assign=True)
    return Trained(saved.path, network.eval(), {'model': said['model'], **sizes}, inputs,
                   num_classes, saved.classes, saved.args, saved.origin)


def inputs_told(saved):
    """The Inputs that a file tells, or None."""
    if saved.inputs is not None:
        return Inputs.of_fields(saved.inputs)
    return Inputs.of_args(saved.args) if 'dataset' in saved.args else None


def _agreed(args, told, stated):
    """What a file and someone else say of a network, who must not contradict each other."""
    said = args
    if told:
        said = {**args, 'image_size': told.size, 'mean': list(told.mean), 'std': list(told.std)}
    differ = [
        f'{name} is {said[name]}, not {value}' for name, value in stated.items()
        # it may be tested on other images, and how its gradients are computed does not matter
        if said.get(name, value) != value and name not in ('dataset', 'checkpointing')
    ]
    if differ:
        raise ValueError(f'{"; ".join(differ)}: expected the same, or no such option')
    said = {'model': 'diracnet', **stated, **said}
    taken = family(said['model']).options
    inputs = {'model', 'dataset', 'image_size', 'mean', 'std'}
    unknown = [f'--{name}' for name in stated.keys() - inputs - set(taken)]
    if unknown:
        raise ValueError(f'{said["model"]} takes no {", ".join(sorted(unknown))}: expected of '
                         + ', '.join(f'--{name}' for name in taken))
    return said


def _inputs(told, stated, kind=None):
    """The Inputs of a network: those told, as they are stated, or those of its kind."""
    if told:
        inputs = told
    else:
        name = kind or stated.get('dataset', 'CIFAR10')
        inputs = Inputs.of('Folder' if 'image_size' in stated else name, stated.get('image_size'),
                           stated.get('mean'), stated.get('std'))
    if kind and (kind == 'ImageNet') != (inputs.kind == 'ImageNet'):
        raise ValueError(f'images of {inputs.size} pixels: expected those of a network for {kind}, '
                         f'{"above" if kind == "ImageNet" else "up to"} {MAX_SMALL} pixels')
    return inputs


def _of_onnx(network, told, said):
    """What is said of an OnnxNetwork, if it fits: num_classes, sizes, Inputs."""
    if told is None:
        raise ValueError('says nothing of its network: expected an ONNX file of export.py')
    shape = [len(told.mean), told.size, told.size]
    if network.input_shape != shape:
        raise ValueError(f'says inputs of {shape}: expected those of its network, '
                         f'{network.input_shape}')
    return network.num_classes, _sizes(said), told


def _sizes(said):
    """The options that size a network of its family: what is said, or their defaults."""
    return {name: said.get(name, default) for name, default in
            family(said['model']).options.items()}


def _of_topology(saved, told, stated):
    """The DiracNet on the meta device that fits a file: network, num_classes, sizes, Inputs."""
    net = saved.topology()
    if not net.is_of(stated.get('depth', net.depth), stated.get('width', net.width)):
        raise ValueError(f'depth is {net.depth}, width {net.width:g}: expected the same, or no '
                         'such option')
    with torch.device('meta'):
        network = (DiracNet.of if is_folded(saved.params) else _diracnet)(net)
    sizes = {'depth': net.depth, 'width': net.width}
    inputs = _inputs(told, stated, net.kind)
    if net.in_channels != inputs.channels:
        inputs = replace(inputs, mean=(0.0,) * net.in_channels, std=(1.0,) * net.in_channels)
    return network, net.num_classes, sizes, inputs


def _of_family(saved, told, said):
    """The network on the meta device that fits a file: network, num_classes, sizes, Inputs."""
    name, inputs, sizes = said['model'], _inputs(told, said), _sizes(said)
    with torch.device('meta'):
        *_, last = build(name, inputs.kind, **sizes).state_dict()  # its dimension 0 is the classes
        shape = saved.params[last].shape[:1] if last in saved.params else ()
        num_classes = max(shape, default=0) or None
        network = build(name, inputs.kind, num_classes, inputs.channels, **sizes)
    if saved.params.keys() != network.state_dict().keys():
        folded = fold(network)
        network = folded if saved.params.keys() == folded.state_dict().keys() else network
    check_fit(saved.params, network.state_dict())
    return network, num_classes, sizes, inputs


def check_classes(path, num_classes, known, names):
    """Raises ValueError unless the classes of a data set are those of the network in a file.

    num_classes: the network's; known: their names, or None where the file does not tell; names: the
    data set's.
    """
    if len(names) != num_classes or known not in (None, names):
        expected = f'{num_classes}' + (f', {known[0]} to {known[-1]}' if known else '')
        raise ValueError(
            f'{path}: of other classes than the data set, which has {len(names)}, {names[0]} to '
            f'{names[-1]}: expected {expected}'
        )


# ---------------------------------------------------------------- size


def multiply_adds(network, size):
    """Counts the multiply-adds of the convolutions and linear layers for one image.

    size: its height and width. Works on the meta device; leaves the network in evaluation mode.
    """
    image = torch.empty(1, 3, size, size, device=next(network.parameters()).device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network.eval()(image)
    return counter.get_total_flops() // 2
