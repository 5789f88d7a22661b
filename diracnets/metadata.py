"""What may stand in a file beside its parameters, and what an exported one says of its network.

Whatever comes from a file is held against this before anything walks through it.
"""

import json
import math
import re
import reprlib
from collections.abc import Mapping

import torch

METADATA_KEY = 'diracnets'  # under which an exported file says what it is of, as JSON
PATH_OPTIONS = {'save', 'resume', 'name', 'gpu_id'}  # options that say where, not what
ORIGIN_KEYS = ('network', 'exported_from', 'epoch', 'calibration')
MAX_VALUES, MAX_DEPTH, MAX_TEXT = 1_000_000, 20, 10_000  # beside the tensors of a file
MAX_JSON = 2**24  # characters
SIZES = ('depth', 'width', 'layers', 'growth', 'reduce', 'droprate', 'image_size')  # in args
MAX_SIZE = 10_000  # of them: what is larger would be built for ever
TEXTS = ('model', 'block', 'activation', 'dataset', 'dtype')  # in args


def check_bounds(contents):
    """Raises ValueError if there is more beside the tensors than one can walk through or print.

    Lists that hold each other many times over take no room in a file, and all memory when walked.
    """
    level, count = [contents], 0
    for _ in range(MAX_DEPTH):
        inside = []
        for value in level:
            if isinstance(value, Mapping):
                inside += [*value, *value.values()]
            elif isinstance(value, (list, tuple, set)):
                inside += value
            elif isinstance(value, (str, bytes)) and len(value) > MAX_TEXT:
                raise ValueError(f'a text of {len(value)} characters: expected at most {MAX_TEXT}')
            count += 1
            if count + len(inside) > MAX_VALUES:
                raise ValueError(f'more than {MAX_VALUES} values beside the tensors')
        level = inside
    if level:
        raise ValueError(f'values nested deeper than {MAX_DEPTH}')


def _is_count(value):
    return type(value) is int and 0 <= value < 2**53


def _is_texts(value):
    return isinstance(value, (list, tuple)) and all(type(name) is str for name in value)


def _is_options(value):
    plain = (str, int, float, bool, type(None))
    return isinstance(value, Mapping) and all(
        isinstance(value.get(name, 1), (int, float)) and 0 <= value.get(name, 1) <= MAX_SIZE
        for name in SIZES
    ) and value.get('image_size', 1) % 1 == 0 and all(
        isinstance(value.get(name, ''), str) for name in TEXTS
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
    'stats': (lambda value: isinstance(value, Mapping), 'a dict'),
    'optimizer': (lambda value: isinstance(value, Mapping), 'a dict'),
    'epoch': (_is_count, 'a count'),
    'step': (_is_count, 'a count'),
    'totals': (_is_totals, 'four or five numbers'),
    'best': (lambda value: isinstance(value, (int, float)) and 0 <= value <= 100, 'per cent'),
    'rng': (lambda value: isinstance(value, Mapping), 'a dict'),
    'classes': (_is_texts, 'a list of names'),
    'args': (_is_options, 'a dict of plain options, numbers for depth and width'),
    'versions': (_is_options, 'a dict of texts'),
    'inputs': (_is_options, 'a dict of plain values'),
    'network': (lambda value: type(value) is str, 'a text'),
    'exported_from': (lambda value: type(value) is str, 'a text'),
    'calibration': (_is_options, 'a dict of plain values'),
}
MAY_BE_NONE = {'stats', 'classes', 'totals'}


def check_schema(contents):
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


# ---------------------------------------------------------------- what an exported file says


def make_metadata(args, classes, inputs, origin):
    """What an exported file says of its network, in every format: {METADATA_KEY: JSON text}.

    args: options of train.py, as a checkpoint has them; of paths in it the last part alone is said.
    classes: their names, or None. inputs: the fields of its Inputs: kind of images, size in pixels,
    mean and std of the channels in [0, 1]. origin: of ORIGIN_KEYS, `network`, its title;
    `exported_from`, a file or folder by its own name; `epoch`, the finished ones; and of int8
    `calibration`: dataset (a folder by its own name), images (how many, of how many), how they were
    chosen, seed, and whether the channels were equalised on them.
    """
    args = {name: strip_folders(value) for name, value in args.items() if name not in PATH_OPTIONS}
    origin = {name: value for name, value in origin.items() if value is not None}
    said = {**origin, 'args': args, 'inputs': inputs, 'classes': classes}
    return {METADATA_KEY: json.dumps(said)}


def strip_folders(value):
    """A value of an option: of a text that is a path the last part, as the rest is of a machine."""
    return re.split(r'[/\\]', value.rstrip('/\\'))[-1] if isinstance(value, str) else value


def parse_metadata(texts, path):
    """Reads what `metadata` made from the texts of a file: a dict, empty without such a text.

    Raises ValueError that names the file for anything else under its key.
    """
    if METADATA_KEY not in texts:
        return {}
    try:
        said = parse_json(texts[METADATA_KEY])
        check_schema({'params': {}, **said})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'{path}: what it says of its network is no JSON of ours: {error}'
        ) from error
    return {name: said[name] for name in ('args', 'classes', 'inputs', *ORIGIN_KEYS) if name in said}


def parse_json(text):
    """Parses JSON that anyone may have written; raises ValueError or TypeError."""
    if len(text) > MAX_JSON:
        raise ValueError(f'{len(text)} characters: expected at most {MAX_JSON}')
    try:
        said = json.loads(text)
    except RecursionError as error:
        raise ValueError('nested too deep') from error
    check_bounds(said)
    return said
