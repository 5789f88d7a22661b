"""Every file that holds the parameters of a network, read safely: nothing in it can run code.

    params = load_params('logs/diracnet-28-1')      # of a DiracNet: a run, or any file
    net = diracfold.fold(params)

A run of train.py (its folder, or a checkpoint in it), the original repository's checkpoints, those
of DistributedDataParallel and torch.compile, bare state dicts and safetensors, folded or not.
Archives are checked whole before they are read, as torch.load takes altered numbers for good ones.
"""

import json
import math
import os
import re
import reprlib
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from diracnet import (
    DiracNet,
    Topology,
    check_fit,
    init_params,
    is_folded,
    load_published,
)

MODEL, PREVIOUS, BEST = 'model.pt7', 'previous.pt7', 'best.pt7'  # in the folder of a run
CHECKPOINT_URLS = {  # unfolded, with which training can go on
    18: 'https://s3.amazonaws.com/modelzoo-networks/diracnet18-v2_checkpoint.pth',
    34: 'https://s3.amazonaws.com/modelzoo-networks/diracnet34-v2_checkpoint.pth',
}
WRAPPERS = re.compile(r'^(module\.|_orig_mod\.)+')  # of DistributedDataParallel, torch.compile
METADATA = 'diracnets'  # under which an exported state dict says what it is of, as JSON
MOST_VALUES, MOST_DEPTH, MOST_TEXT = 1_000_000, 20, 10_000  # beside the tensors of a file
DELTA = re.compile(r'^eye[\d_]+$')  # dense identities, which the original kept: eye64_64_3_3


@dataclass(frozen=True)
class Saved:
    """What a file says of a network."""

    path: str
    params: dict  # flat name -> tensor, on the CPU
    args: dict  # the options of its training, or empty
    classes: list  # their names, or None

    def topology(self):
        """Reads the Topology off the parameters of a DiracNet, functional or folded.

        Raises ValueError, naming the file, for parameters that are no DiracNet's, or whose depth or
        width `args` contradict.
        """
        try:
            net = Topology.of(self.params)
            with torch.device('meta'):  # shapes alone
                folded = is_folded(self.params)
                check_fit(self.params, DiracNet.of(net).state_dict() if folded
                          else init_params(net))
        except ValueError as error:
            raise ValueError(f'{self.path}: {error}') from error
        depth, width = (self.args.get(name, getattr(net, name)) for name in ('depth', 'width'))
        if not net.is_of(depth, width):
            raise ValueError(
                f'{self.path}: its args say depth {depth}, width {width}: expected those of its '
                f'parameters, depth {net.depth}, width {net.width:g}'
            )
        return net


def load_params(path):
    """Reads the parameters of a functional DiracNet, for `f`, `Network` and `fold`.

    path: a file or the folder of a run. Returns a flat dict from name to tensor on the CPU, as
    that of `define_diracnet`, in which no tensor requires grad. Raises ValueError for what is
    wrong with the contents, OSError for a file that cannot be read.
    """
    return _functional(read(path))


def _functional(saved):
    """The parameters of a functional DiracNet; raises ValueError, naming the file, for others."""
    if is_folded(saved.params):
        raise ValueError(
            f'{saved.path}: holds a folded network: expected the parameters it was folded from'
        )
    saved.topology()
    return saved.params


def read(path):
    """Reads the parameters of any network, and what the file says beside them: Saved.

    The running statistics may stand in `params`, or in `stats`; dense deltas and prefixes of
    wrappers are dropped. path and errors are those of `load`.
    """
    return _saved(load(path), path)


def _saved(contents, path):
    if not isinstance(contents.get('params'), Mapping):
        contents = {'params': contents, **_metadata_of(contents)}
    params = {**contents['params'], **(contents.get('stats') or {})}
    params = {WRAPPERS.sub('', name): tensor for name, tensor in params.items()}
    params = {name: tensor for name, tensor in params.items() if not DELTA.match(name)}
    return Saved(str(path), params, contents.get('args') or {}, contents.get('classes'))


def metadata(args, classes):
    """What an exported state dict says of itself: {key: text}, which `read` finds again.

    args: options of train.py, as a checkpoint has them; classes: their names, or None.
    """
    return {METADATA: json.dumps({'args': args, 'classes': classes})}


def _metadata_of(state_dict):
    """What an exported state dict says of itself, `args` and `classes`: a dict, perhaps empty."""
    text = getattr(state_dict, '_metadata', {}).get(METADATA)
    try:
        said = json.loads(text) if text else {}
        _check_schema({'params': {}, **said})
    except (TypeError, ValueError) as error:
        raise ValueError(f'what it says of its network is no JSON of ours: {error}') from error
    return {name: said[name] for name in ('args', 'classes') if name in said}


def load(path, required=()):
    """Loads a file, or the newest good one of a run's folder: a dict, its tensors on the CPU.

    required: keys that it must have. Where a run's model.pt7 is damaged or missing the one before
    it serves, and stderr says so. Raises ValueError for what is wrong with the contents, OSError
    for a file that cannot be read.
    """
    path = os.path.join(path, MODEL) if os.path.isdir(path) else str(path)
    try:
        return load_file(path, required)
    except (ValueError, FileNotFoundError) as error:
        previous = os.path.join(os.path.dirname(path), PREVIOUS)
        if os.path.basename(path) != MODEL or not os.path.exists(previous):
            raise
        contents = load_file(previous, required)
        print(f'{error}; taking {previous}', file=sys.stderr)
        return contents


def load_file(path, required=()):
    """Loads one file, checked: a dict. required and errors are those of `load`."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such file: expected a checkpoint or a folder with one')
    contents = _load_safetensors(path) if path.endswith('.safetensors') else _load_pickle(path)
    if not isinstance(contents, Mapping):
        raise ValueError(f'{path}: holds a {type(contents).__name__}: expected a dict')
    try:
        _check_bounds(contents)
        _check_schema(contents)
        for name in required:
            if name not in contents:
                raise ValueError(f'{name} is missing: expected a checkpoint of train.py')
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return contents


def _check_bounds(contents):
    """Raises ValueError if there is more beside the tensors than one can walk through or print.

    Lists that hold each other many times over take no room in a file, and all memory when walked.
    """
    level, count = [contents], 0
    for _ in range(MOST_DEPTH):
        inside = []
        for value in level:
            if isinstance(value, Mapping):
                inside += [*value, *value.values()]
            elif isinstance(value, (list, tuple, set)):
                inside += value
            elif isinstance(value, (str, bytes)) and len(value) > MOST_TEXT:
                raise ValueError(f'a text of {len(value)} characters: expected at most {MOST_TEXT}')
            count += 1
            if count + len(inside) > MOST_VALUES:
                raise ValueError(f'more than {MOST_VALUES} values beside the tensors')
        level = inside
    if level:
        raise ValueError(f'values nested deeper than {MOST_DEPTH}')


def _is_count(value):
    return type(value) is int and 0 <= value < 2**53


def _is_texts(value):
    return isinstance(value, (list, tuple)) and all(type(name) is str for name in value)


def _is_options(value):
    plain = (str, int, float, bool, type(None))
    return isinstance(value, Mapping) and all(
        isinstance(value.get(name, 1), (int, float)) for name in ('depth', 'width', 'image_size')
    ) and all(
        type(name) is str and (
            isinstance(option, plain)
            or isinstance(option, (list, tuple)) and all(isinstance(o, plain) for o in option)
        ) for name, option in value.items()
    )


def _is_totals(value):
    return isinstance(value, (list, tuple)) and len(value) in (4, 5) and all(
        isinstance(number, (int, float)) and math.isfinite(number) for number in value
    )


SCHEMA = {  # of what may stand beside `params`: what it must be, in words
    'optimizer': (lambda value: isinstance(value, Mapping), 'a dict'),
    'epoch': (_is_count, 'a count'),
    'step': (_is_count, 'a count'),
    'totals': (_is_totals, 'four or five numbers'),
    'best': (lambda value: isinstance(value, (int, float)) and 0 <= value <= 100, 'per cent'),
    'rng': (lambda value: isinstance(value, Mapping), 'a dict'),
    'classes': (_is_texts, 'a list of names'),
    'args': (_is_options, 'a dict of plain options, numbers for depth and width'),
    'versions': (_is_options, 'a dict of texts'),
}
MAY_BE_NONE = {'classes', 'totals'}


def _check_schema(contents):
    """Raises ValueError that names what is of another kind than train.py and the original write."""
    whole = isinstance(contents.get('params'), Mapping)
    for name, (fits, expected) in SCHEMA.items() if whole else ():
        value = contents.get(name)
        if name in contents and not (value is None and name in MAY_BE_NONE or fits(value)):
            raise ValueError(f'{name} is {reprlib.repr(value)}: expected {expected}')
    for part in ('params', 'stats') if whole else (None,):
        for name, tensor in (contents.get(part) or {} if part else contents).items():
            _check_tensor(name, tensor)


def _check_tensor(name, tensor):
    if type(name) is not str or not isinstance(tensor, torch.Tensor):
        kind = type(tensor).__name__
        raise ValueError(f'{reprlib.repr(name)} is a {kind}: expected the tensor of a parameter')
    if name.endswith('num_batches_tracked'):
        return
    if not tensor.is_floating_point():
        raise ValueError(f'{name} is of {tensor.dtype}: expected floating-point numbers')
    if not tensor.isfinite().all():
        raise ValueError(f'{name} holds numbers that are not finite')


def _load_safetensors(path):
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors import torch as safetensors
    except ImportError as error:
        raise ValueError(
            f"{path}: safetensors is missing: expected pip install 'diracnets[deploy]'"
        ) from error
    try:
        contents = OrderedDict(safetensors.load_file(path))
        with safe_open(path, 'pt') as file:
            contents._metadata = file.metadata() or {}
        return contents
    except SafetensorError as error:
        raise ValueError(f'{path}: truncated, or not a safetensors file ({error})') from error


def _load_pickle(path):
    with open(path, 'rb') as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of pickle protocols
        try:
            archive = file.read(2) == b'PK' or zipfile.is_zipfile(file)  # else a pickle of old
            if archive and zipfile.ZipFile(file).testzip():
                raise ValueError('altered')
            file.seek(0)
            return torch.load(file, map_location='cpu', weights_only=True)
        except Exception as error:  # damaged bytes make both readers raise almost anything
            code = re.search(r'GLOBAL (\S+)', str(error))
            if code:
                raise ValueError(
                    f'{path}: refused, its pickle would run {code[1]}: expected tensors and plain '
                    'values alone'
                ) from error
            raise ValueError(
                f'{path}: truncated, damaged or no weights: expected a file that torch.load reads '
                'with weights_only'
            ) from error


# ---------------------------------------------------------------- published


def checkpoint_path(depth):
    """Returns where torch.hub keeps the original checkpoint of depth 18 or 34, once fetched."""
    return os.path.join(
        torch.hub.get_dir(), 'checkpoints', os.path.basename(CHECKPOINT_URLS[depth])
    )


def pretrained_params(depth):
    """Loads the original, unfolded parameters of the ImageNet DiracNet of depth 18 or 34.

    They are fetched once into torch.hub's cache, under a name that has no hash to check. Returns a
    flat dict, as that of `define_diracnet(depth, 1, 'ImageNet')`, to fine-tune from:
    `Network(f, params)` makes parameters of them; `diracimage.preprocess()` makes their inputs.
    Raises ValueError for another depth, RuntimeError that says which file to put where if they
    cannot be had, hold NaN or are another network's.
    """
    if depth not in CHECKPOINT_URLS:
        raise ValueError(f'depth {depth}: expected 18 or 34, of which there are published weights')

    def params_of(contents):
        saved = _saved(contents, checkpoint_path(depth))
        args = {**saved.args, 'depth': depth, 'width': 1}  # as it was published
        return _functional(replace(saved, args=args))

    return load_published(CHECKPOINT_URLS[depth], params_of)
