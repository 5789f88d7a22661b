"""Loads the network of a file or of a run's folder, of any architecture.

    trained = load('logs/diracnet-16-1')           # LoadedModel
    deployed = diracnets.fold(trained.model)       # plain convolutions
"""

import os
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from diracnet import DiracNet, check_params, is_folded
from diracnets.checkpoint import make_contents, read_checkpoint
from diracnets.fold import fold
from diracnets.metadata import make_metadata, parse_metadata
from diracnets.models.registry import build_diracnet, create_model, get_architecture
from diracnets.onnx import OnnxModel
from diracnets.preprocessing import MAX_SMALL, Preprocessing


@dataclass(frozen=True)
class LoadedModel:
    """The network of a file, and what its inputs and outputs are."""

    path: str
    model: nn.Module  # in evaluation mode
    options: dict  # its family, as 'model', and the options that size it
    preprocess: Preprocessing
    num_classes: int
    classes: list  # their names, or None
    args: dict  # the options of its training, or empty
    origin: dict  # what an exported file says that it came from: see diracnets.metadata.ORIGIN

    def metadata(self, **more):
        """What an exported file says of it, as `diracnets.metadata.metadata` has it.

        more: of diracnets.metadata.ORIGIN, beside its name, its file's and the epochs of its training.
        """
        origin = {'network': self.title, 'exported_from': os.path.basename(
            os.path.abspath(self.path)), 'epoch': self.origin.get('epoch'), **more}
        return make_metadata({**self.args, **self.options}, self.classes, asdict(self.preprocess), origin)

    @property
    def title(self):
        sizes = dict(self.options)
        name = sizes.pop('model')
        if name == 'diracnet':
            return f'DiracNet-{sizes["depth"]}-{sizes["width"]:g}'
        return ', '.join([name, *(f'{option} {value}' for option, value in sizes.items())])


def load(path, stated=None):
    """Loads the network of a file or of a run's folder, of any family, folded or not: LoadedModel.

    That of an ONNX file, float or int8, is a diraconnx.OnnxNetwork, which ONNX Runtime computes.

    stated: what someone states of it, in the names of the options of train.py. It must not
    contradict what the file says, in the options of its training or by the shapes of a DiracNet,
    and is taken where the file says nothing. path and errors are those of `read_checkpoint`; raises
    ValueError too for what is contradicted, and for parameters that do not fit.
    """
    stated, onnx = stated or {}, str(path).endswith('.onnx') and os.path.isfile(path)
    network = OnnxModel(path) if onnx else None
    saved = (
        make_contents(path, parse_metadata(network.said, path), {}) if onnx else read_checkpoint(path)
    )
    try:
        told = file_preprocessing(saved)
        said = merge_options(saved.args, told, stated)
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
    return LoadedModel(saved.path, network.eval(), {'model': said['model'], **sizes}, inputs,
                   num_classes, saved.classes, saved.args, saved.origin)


def file_preprocessing(saved):
    """The Preprocessing that a file tells, or None."""
    if saved.inputs is not None:
        return Preprocessing.from_dict(saved.inputs)
    return Preprocessing.from_args(saved.args) if 'dataset' in saved.args else None


def merge_options(args, told, stated):
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
    taken = get_architecture(said['model']).options
    inputs = {'model', 'dataset', 'image_size', 'mean', 'std'}
    unknown = [f'--{name}' for name in stated.keys() - inputs - set(taken)]
    if unknown:
        raise ValueError(f'{said["model"]} takes no {", ".join(sorted(unknown))}: expected of '
                         + ', '.join(f'--{name}' for name in taken))
    return said


def _inputs(told, stated, kind=None):
    """The Preprocessing of a network: those told, as they are stated, or those of its kind."""
    if told:
        inputs = told
    else:
        name = kind or stated.get('dataset', 'CIFAR10')
        inputs = Preprocessing.for_dataset('Folder' if 'image_size' in stated else name, stated.get('image_size'),
                           stated.get('mean'), stated.get('std'))
    if kind and (kind == 'ImageNet') != (inputs.kind == 'ImageNet'):
        raise ValueError(f'images of {inputs.size} pixels: expected those of a network for {kind}, '
                         f'{"above" if kind == "ImageNet" else "up to"} {MAX_SMALL} pixels')
    return inputs


def _of_onnx(network, told, said):
    """What is said of an OnnxModel, if it fits: num_classes, sizes, Preprocessing."""
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
            get_architecture(said['model']).options.items()}


def _of_topology(saved, told, stated):
    """The DiracNet on the meta device that fits a file: network, num_classes, sizes, Preprocessing."""
    net = saved.topology()
    if not net.matches(stated.get('depth', net.depth), stated.get('width', net.width)):
        raise ValueError(f'depth is {net.depth}, width {net.width:g}: expected the same, or no '
                         'such option')
    with torch.device('meta'):
        network = (DiracNet.from_topology if is_folded(saved.params) else build_diracnet)(net)
    sizes = {'depth': net.depth, 'width': net.width}
    inputs = _inputs(told, stated, net.kind)
    if net.in_channels != inputs.channels:
        inputs = replace(inputs, mean=(0.0,) * net.in_channels, std=(1.0,) * net.in_channels)
    return network, net.num_classes, sizes, inputs


def _of_family(saved, told, said):
    """The network on the meta device that fits a file: network, num_classes, sizes, Preprocessing."""
    name, inputs, sizes = said['model'], _inputs(told, said), _sizes(said)
    with torch.device('meta'):
        *_, last = create_model(name, inputs.kind, **sizes).state_dict()  # its dimension 0 is the classes
        shape = saved.params[last].shape[:1] if last in saved.params else ()
        num_classes = max(shape, default=0) or None
        network = create_model(name, inputs.kind, num_classes, inputs.channels, **sizes)
    if saved.params.keys() != network.state_dict().keys():
        folded = fold(network)
        network = folded if saved.params.keys() == folded.state_dict().keys() else network
    check_params(saved.params, network.state_dict())
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
