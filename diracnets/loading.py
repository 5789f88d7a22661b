"""Loads a model of any architecture from a file, from the folder of a run, or by a published name.

    loaded = load('logs/diracnet-28-2')            # LoadedModel
    inputs = loaded.preprocess('cat.jpg')[None]    # (1, 3, 32, 32)
    label = loaded.classes[loaded.model(inputs).argmax()]
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

import diracnet
from diracnet import DiracNet, check_params, is_folded
from diracnets.architectures import get_architecture
from diracnets.checkpoint import CheckpointContents, make_contents, read_checkpoint
from diracnets.folding import fold
from diracnets.metadata import make_metadata, parse_metadata
from diracnets.models.registry import build_diracnet, create_model
from diracnets.onnx import OnnxModel
from diracnets.preprocessing import MAX_SMALL, Preprocessing

PUBLISHED = {f'diracnet{depth}': depth for depth in diracnet.MODEL_URLS}  # name: depth


@dataclass(frozen=True)
class LoadedModel:
    """A model, with its preprocessing and its class names."""

    path: str  # or the name of a published model
    model: nn.Module  # in evaluation mode, float32; float64 for a file of --dtype double
    options: dict  # the architecture, as 'model', and the options that set its size
    preprocess: Preprocessing
    num_classes: int
    classes: list[str] | None
    args: dict  # the options of the training run, or empty
    origin: dict  # values by metadata.ORIGIN_KEYS; keys missing in the file are absent

    def metadata(self, **origin: Any) -> dict[str, str]:
        """Returns the metadata of a file exported from this model; see `make_metadata`.

        origin: values by ORIGIN_KEYS, in addition to the title, file name and epoch of this model.
        """
        name = os.path.basename(os.path.abspath(self.path))
        origin = {'network': self.title, 'exported_from': name, 'epoch': self.origin.get('epoch'),
                  **origin}
        return make_metadata(
            {**self.args, **self.options}, self.classes, asdict(self.preprocess), origin
        )

    @property
    def title(self) -> str:
        """The architecture with its size, as in 'DiracNet-28-2' or 'plain, depth 28, ...'."""
        sizes = dict(self.options)
        name = sizes.pop('model')
        if name == 'diracnet':
            return f'DiracNet-{sizes["depth"]}-{sizes["width"]:g}'
        return ', '.join([name, *(f'{option} {value}' for option, value in sizes.items())])


def load(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> LoadedModel:
    """Loads a model, in evaluation mode, from a file, from the folder of a run, or by its name.

    path: a checkpoint of train.py or of another training script (see `diracnets.checkpoint`), a
    .onnx, .safetensors or .pth file of export.py, or 'diracnet18' or 'diracnet34' for the authors'
    ImageNet models ('./diracnet18' is a file). The model of an ONNX file is an OnnxModel.
    overrides: options of train.py for what the file does not contain; they must not contradict the
    file. A bare state dict with the names and shapes of a DiracNet is loaded as one. Those of a
    folded plain network or ResNet for CIFAR are equal: name the model in overrides. Raises
    ValueError for invalid contents, for overrides that contradict the file, and for parameters that
    do not fit; OSError for a file that cannot be read; RuntimeError, with the path for a manual
    download, for published weights that cannot be loaded.
    """
    overrides = overrides or {}
    if path in PUBLISHED:
        return _load_by_name(path, overrides)
    if str(path).endswith('.onnx') and os.path.isfile(path):
        model = OnnxModel(path)
        contents = make_contents(path, parse_metadata(model.metadata, path), params={})
    else:
        model, contents = None, read_checkpoint(path)
    try:
        preprocess = file_preprocess(contents)
        options = merge_options(contents.args, preprocess, overrides)
        if model is not None:
            _check_onnx(model, preprocess)
            num_classes, sizes = model.num_classes, _size_options(options)
        else:
            build = _build_diracnet if options['model'] == 'diracnet' else _build_other
            model, num_classes, sizes, preprocess = build(contents, preprocess, options)
            model.load_state_dict(contents.params, assign=True)
            if all(parameter.dtype != torch.float64 for parameter in model.parameters()):
                model.float()  # the dtype of preprocessed images
        if contents.classes is not None and len(contents.classes) != num_classes:
            raise ValueError(f'contains {len(contents.classes)} class names for {num_classes} '
                             'classes: expected one for each')
    except ValueError as error:
        raise ValueError(f'{contents.path}: {error}') from error
    return LoadedModel(
        contents.path, model.eval(), {'model': options['model'], **sizes}, preprocess, num_classes,
        contents.classes, contents.args, contents.origin,
    )


def _load_by_name(name, overrides):
    """Returns the LoadedModel of a published model; the names of its classes are not included."""
    options = {'model': 'diracnet', 'depth': PUBLISHED[name], 'width': 1}
    preprocess = Preprocessing.for_dataset('ImageNet')
    try:
        merge_options(options, preprocess, overrides)
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error
    model = getattr(diracnet, name)(pretrained=True).eval()
    return LoadedModel(name, model, options, preprocess, 1000, None, {}, {})


# ---------------------------------------------------------------- options


def file_preprocess(contents: CheckpointContents) -> Preprocessing | None:
    """Returns the Preprocessing in a file's metadata, or None if it contains none."""
    if contents.inputs is not None:
        return Preprocessing.from_dict(contents.inputs)
    return Preprocessing.from_args(contents.args) if 'dataset' in contents.args else None


def merge_options(args: Mapping[str, Any], preprocess: Preprocessing | None,
                  overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the options in a file with overrides for options that the file does not contain.

    Raises ValueError for overrides that contradict the file or that the architecture does not have.
    """
    in_file = dict(args)
    if preprocess:
        in_file.update(image_size=preprocess.size, mean=list(preprocess.mean),
                       std=list(preprocess.std))
    overrides = {name: list(value) if isinstance(value, tuple) else value
                 for name, value in overrides.items()}
    # a model may be tested on another dataset, and checkpointing changes only the gradients' cost
    contradictions = [
        f'{name} is {in_file[name]}, not {value}' for name, value in overrides.items()
        if in_file.get(name, value) != value and name not in ('dataset', 'checkpointing')
    ]
    if contradictions:
        raise ValueError(f'{"; ".join(contradictions)}; omit these options')
    options = {'model': 'diracnet', **overrides, **in_file}
    accepted = get_architecture(options['model']).options
    input_options = {'model', 'dataset', 'image_size', 'mean', 'std'}
    unknown = sorted(f'--{name}' for name in overrides.keys() - input_options - accepted.keys())
    if unknown:
        raise ValueError(f'{options["model"]} has no option {", ".join(unknown)}; its options are '
                         + ', '.join(f'--{name}' for name in accepted))
    return options


def _size_options(options):
    """Returns the options that set the size of an architecture, with its defaults."""
    defaults = get_architecture(options['model']).options
    return {name: options.get(name, default) for name, default in defaults.items()}


def _resolve_preprocess(preprocess, options, kind=None):
    """Returns the Preprocessing in a file, or else of the options or the kind of images."""
    if preprocess is None:
        size = options.get('image_size')
        dataset = 'Folder' if size is not None else kind or options.get('dataset', 'CIFAR10')
        preprocess = Preprocessing.for_dataset(
            dataset, size, options.get('mean'), options.get('std'))
    if kind and (kind == 'ImageNet') != (preprocess.kind == 'ImageNet'):
        sizes = 'more than' if kind == 'ImageNet' else 'at most'
        raise ValueError(f'image_size {preprocess.size}: expected {sizes} {MAX_SMALL} pixels for '
                         f'this {kind} model')
    return preprocess


# ---------------------------------------------------------------- models


def _check_onnx(model, preprocess):
    """Raises ValueError unless the Preprocessing has the input shape of an OnnxModel."""
    if preprocess is None:
        raise ValueError('contains no metadata; use an ONNX file of export.py')
    fits = (dim in (None, size) for dim, size in zip(model.input_shape, preprocess.shape))
    if not all(fits):
        raise ValueError(f'its metadata describe inputs {preprocess.shape}: expected '
                         f'{model.input_shape}, the inputs of its graph')


def _build_diracnet(contents, preprocess, options):
    """Returns (model on the meta device, num_classes, size options, Preprocessing)."""
    topology = contents.topology()  # from the shapes of the parameters
    sizes = {'depth': topology.depth, 'width': topology.width}
    if not topology.matches(*(options.get(name, size) for name, size in sizes.items())):
        raise ValueError(f'depth is {topology.depth}, width {topology.width:g}; omit these options')
    with torch.device('meta'):
        build = DiracNet.from_topology if is_folded(contents.params) else build_diracnet
        model = build(topology)
    normalized = (contents.inputs or contents.args.get('mean')
                  or preprocess is None and options.get('mean'))
    preprocess = _resolve_preprocess(preprocess, options, topology.kind)
    channels = topology.in_channels
    if channels != preprocess.channels:
        if normalized:
            raise ValueError(f'mean has {preprocess.channels} values: expected {channels}, one for '
                             'each input channel of the model')
        preprocess = replace(preprocess, mean=(0.0,) * channels, std=(1.0,) * channels)
    return model, topology.num_classes, sizes, preprocess


def _build_other(contents, preprocess, options):
    """Returns what `_build_diracnet` does, for another architecture."""
    name, sizes = options['model'], _size_options(options)
    preprocess = _resolve_preprocess(preprocess, options)
    with torch.device('meta'):
        *_, last = create_model(name, preprocess.kind, **sizes).state_dict()  # (num_classes, ...)
        shape = contents.params[last].shape[:1] if last in contents.params else ()
        num_classes = max(shape, default=0) or None
        model = create_model(name, preprocess.kind, num_classes, preprocess.channels, **sizes)
    if contents.params.keys() != model.state_dict().keys():
        folded = fold(model)
        model = folded if contents.params.keys() == folded.state_dict().keys() else model
    check_params(contents.params, model.state_dict())
    return model, num_classes, sizes, preprocess
