"""The metadata in checkpoints and exported files: schema, limits and JSON format.

Files come from anyone. Their contents are checked against these limits and this schema before any
other code uses them.
"""

import argparse
import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diracnet import find_nonfinite

METADATA_KEY = 'diracnets'  # the key of the JSON text in an exported file
PATH_OPTIONS = {'save', 'resume', 'name', 'gpu_id'}  # options of one machine, not exported
ORIGIN_KEYS = ('network', 'exported_from', 'epoch', 'calibration')
MAX_VALUES, MAX_DEPTH, MAX_TEXT = 1_000_000, 20, 10_000  # limits on everything but tensors
MAX_JSON = 2**24  # characters
SIZES = ('depth', 'width', 'layers', 'growth', 'reduce', 'droprate', 'image_size')  # in args
MAX_SIZE = 10_000  # of SIZES: building a larger model would take too long
COUNTERS = ('num_batches_tracked', 'n_averaged')  # integers in state dicts
DTYPES = {  # others, such as float8, lack operations
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64,
}
TEXTS = ('model', 'block', 'activation', 'dataset', 'dtype')  # in args


# ---------------------------------------------------------------- limits and schema


def check_bounds(contents: Any) -> None:
    """Raises ValueError for values that are too many, too long or too deeply nested to process.

    Lists that contain each other many times are small in a file and exhaust memory when traversed;
    so do tensors that repeat one number. Nothing is computed from a tensor.
    """
    level, count = [contents], 0
    for _ in range(MAX_DEPTH):
        children = []
        for value in level:
            if isinstance(value, argparse.Namespace):
                value = vars(value)
            if isinstance(value, Mapping):
                children += [*value, *value.values()]
                for name, tensor in value.items():
                    if isinstance(tensor, Tensor):
                        _check_storage(reprlib.repr(name), tensor)
            elif isinstance(value, (list, tuple, set)):
                children += value
            elif isinstance(value, (str, bytes)) and len(value) > MAX_TEXT:
                raise ValueError(f'a text of {len(value)} characters: expected at most {MAX_TEXT}')
            elif isinstance(value, Tensor):
                _check_storage('a tensor', value)
            count += 1
            if count + len(children) > MAX_VALUES:
                raise ValueError(f'more than {MAX_VALUES} values in addition to the tensors')
        level = children
    if level:
        raise ValueError(f'values nested deeper than {MAX_DEPTH}')


def _check_storage(name, tensor):
    """Raises ValueError unless a tensor has its numbers in memory, in a common dtype."""
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = 'nested' if tensor.is_nested else 'sparse'
    elif tensor.device.type != 'cpu':
        kind = f'on the device {tensor.device}'
    elif tensor.dtype not in DTYPES:
        kind = f'of {tensor.dtype}'
    elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        kind = 'expanded'
    else:
        return
    raise ValueError(f'{name} is {kind}: expected a dense tensor of a common dtype')


def _is_dict(value):
    return isinstance(value, Mapping)


def _is_str(value):
    return type(value) is str


def _is_count(value):
    return type(value) is int and 0 <= value < 2**53


def _is_plain_dict(value):
    """Whether a value is a dict of plain values whose SIZES and TEXTS have sensible types."""
    plain = (str, int, float, bool, type(None))
    return isinstance(value, Mapping) and all(
        isinstance(value.get(name, 1), (int, float)) and 0 <= value.get(name, 1) <= MAX_SIZE
        for name in SIZES
    ) and value.get('image_size', 1) % 1 == 0 and all(
        isinstance(value.get(name, ''), str) for name in TEXTS
    ) and all(
        _is_str(name) and (
            isinstance(option, plain)
            or isinstance(option, (list, tuple)) and all(isinstance(o, plain) for o in option)
        ) for name, option in value.items()
    )


def _is_totals(value):
    return isinstance(value, (list, tuple)) and len(value) in (4, 5) and all(
        isinstance(number, (int, float)) and 0 <= number < math.inf for number in value
    )


SCHEMA = {  # keys of a checkpoint except `params`: the check, and the expected type in words
    'stats': (_is_dict, 'a dict'),
    'ema': (_is_dict, 'a dict'),
    'optimizer': (_is_dict, 'a dict'),
    'epoch': (_is_count, 'a non-negative integer'),
    'step': (_is_count, 'a non-negative integer'),
    'totals': (_is_totals, 'four or five non-negative numbers'),
    'best': (lambda v: isinstance(v, (int, float)) and 0 <= v <= 100, 'a percentage'),
    'rng': (_is_dict, 'a dict'),
    'classes': (lambda v: isinstance(v, (list, tuple)) and all(map(_is_str, v)),
                'a list of names'),
    'args': (_is_plain_dict, 'a dict of plain options, numbers for depth and width'),
    'versions': (_is_plain_dict, 'a dict of strings'),
    'inputs': (_is_plain_dict, 'a dict of plain values'),
    'network': (_is_str, 'a string'),
    'exported_from': (_is_str, 'a string'),
    'calibration': (_is_plain_dict, 'a dict of plain values'),
}
OPTIONAL = {'stats', 'classes', 'totals'}  # keys that may be None


def check_schema(contents: Mapping) -> None:
    """Raises ValueError for the first value of a wrong type in a checkpoint or state dict.

    Parameters must be floating-point tensors with finite values, variances not negative, and the
    optimizer must have the momenta of all parameters or of none.
    """
    if not isinstance(contents.get('params'), Mapping):  # a state dict
        _check_tensors(contents)
        return
    for name, (is_valid, expected) in SCHEMA.items():
        value = contents.get(name)
        if name in contents and not (value is None and name in OPTIONAL or is_valid(value)):
            raise ValueError(f'{name} is {reprlib.repr(value)}: expected {expected}')
    _check_momenta(contents.get('optimizer') or {})
    _check_tensors(contents['params'])
    _check_tensors(contents.get('stats') or {})
    _check_tensors(contents.get('ema') or {})


def _check_momenta(optimizer):
    """Raises ValueError if some parameters have a momentum of SGD or Adam, and others do not."""
    state, groups = optimizer.get('state'), optimizer.get('param_groups')
    if not (_is_dict(state) and isinstance(groups, (list, tuple)) and all(map(_is_dict, groups))):
        return
    momenta = [buffers.get('momentum_buffer', buffers.get('exp_avg'))
               for buffers in state.values() if _is_dict(buffers)]
    found = sum(isinstance(momentum, Tensor) for momentum in momenta)
    numbers = [group.get('params') for group in groups]
    expected = sum(len(params) for params in numbers if isinstance(params, (list, tuple)))
    if 0 < found < expected:
        raise ValueError(f'optimizer has the momenta of {found} of {expected} parameters: expected '
                         'all or none')


def _check_tensors(tensors):
    for name, tensor in tensors.items():
        if not _is_str(name) or not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(f'{reprlib.repr(name)} is a {kind}: expected a tensor')
        if not tensor.is_floating_point() and not name.endswith(COUNTERS):
            raise ValueError(f'{name} is of {tensor.dtype}: expected floating-point numbers')
        if name.endswith('running_var') and (tensor < 0).any():
            raise ValueError(f'{name} contains negative values: expected variances')
    nonfinite = find_nonfinite({n: t for n, t in tensors.items() if t.is_floating_point()})
    if nonfinite:
        raise ValueError(f'{nonfinite} contains non-finite values (NaN or Inf)')


# ---------------------------------------------------------------- metadata of exported files


def make_metadata(args: Mapping, classes: list[str] | None, inputs: Mapping,
                  origin: Mapping) -> dict[str, str]:
    """Returns the metadata that every exported file contains: {METADATA_KEY: JSON text}.

    args: the options of train.py as in a checkpoint; paths are cut to their last part. classes:
    their names, or None. inputs: the fields of the Preprocessing. origin: values by ORIGIN_KEYS.
    `network` is a title, `exported_from` the name of a file or folder, `epoch` the number of
    finished epochs. `calibration` describes the images of int8 and equalization: the name of the
    dataset's folder, the number of images used and available, how they were chosen, the seed, and
    whether ranges were equalized.
    """
    args = {name: strip_folders(value) for name, value in args.items() if name not in PATH_OPTIONS}
    origin = {name: value for name, value in origin.items() if value is not None}
    metadata = {**origin, 'args': args, 'inputs': inputs, 'classes': classes}
    return {METADATA_KEY: json.dumps(metadata)}


def strip_folders(value: Any) -> Any:
    """Returns the last part of a path, so that no folder of this machine is published.

    A value that is not a string is returned unchanged.
    """
    return re.split(r'[/\\]', value.rstrip('/\\'))[-1] if isinstance(value, str) else value


def parse_metadata(texts: Mapping[str, str], path: str | os.PathLike) -> dict[str, Any]:
    """Parses the metadata that `make_metadata` returned, from the texts in a file.

    Returns a dict, empty if the texts do not contain METADATA_KEY. Raises ValueError that names the
    file if the text under that key is invalid.
    """
    if METADATA_KEY not in texts:
        return {}
    try:
        metadata = _parse_json(texts[METADATA_KEY])
        check_schema({'params': {}, **metadata})
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path}: invalid metadata ({error})') from error
    keys = ('args', 'classes', 'inputs', *ORIGIN_KEYS)
    return {name: metadata[name] for name in keys if name in metadata}


def _parse_json(text):
    if len(text) > MAX_JSON:
        raise ValueError(f'{len(text)} characters: expected at most {MAX_JSON}')
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError('nested too deep') from error
    check_bounds(value)
    return value
