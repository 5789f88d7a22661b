"""Every file that holds the parameters of a network, read safely: nothing in it can run code.

    params = load_params('logs/diracnet-28-2')      # of a DiracNet: a run, or any file
    net = diracnets.fold(params)

A run of train.py (its folder, or a checkpoint in it), the original repository's checkpoints, those
of DistributedDataParallel and torch.compile, bare state dicts and safetensors, folded or not, and
the parameters in a .pt2 of export.py, whose program is not run: torch.export.load would run code.
Archives are checked whole before they are read, as torch.load takes altered numbers for good ones.

What an exported file says of its network beside them is in diracnets.metadata.
"""

import errno
import os
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from diracnet import DiracNet, Topology, check_params, init_params, is_folded, load_published
from diracnets.metadata import (
    METADATA_KEY,
    ORIGIN_KEYS,
    check_bounds,
    check_schema,
    parse_json,
    parse_metadata,
)

MODEL_FILE, PREVIOUS_FILE, BEST_FILE = 'model.pt7', 'previous.pt7', 'best.pt7'  # in the folder of a run
CHECKPOINT_URLS = {  # unfolded, with which training can go on
    18: 'https://s3.amazonaws.com/modelzoo-networks/diracnet18-v2_checkpoint.pth',
    34: 'https://s3.amazonaws.com/modelzoo-networks/diracnet34-v2_checkpoint.pth',
}
WRAPPERS = re.compile(r'^(module\.|_orig_mod\.)+')  # of DistributedDataParallel, torch.compile
PT2_CONFIG = 'data/weights/model_weights_config.json'  # in a .pt2 of torch: what is where
PT2_DTYPES = {5: torch.int64, 7: torch.float32}  # by their numbers there
DELTA = re.compile(r'^eye[\d_]+$')  # dense identities, which the original kept: eye64_64_3_3


@dataclass(frozen=True)
class CheckpointContents:
    """What a file says of a network."""

    path: str
    params: dict  # flat name -> tensor, on the CPU
    args: dict  # the options of its training, or empty
    classes: list  # their names, or None
    inputs: dict  # the fields of its Inputs, or None
    origin: dict  # of diracnets.metadata.ORIGIN: what it came from

    def topology(self):
        """Reads the Topology off the parameters of a DiracNet, functional or folded.

        Raises ValueError for parameters that are no DiracNet's, or whose depth or width `args`
        contradict.
        """
        net = Topology.from_params(self.params)
        with torch.device('meta'):  # shapes alone
            folded = is_folded(self.params)
            check_params(self.params, DiracNet.from_topology(net).state_dict() if folded else init_params(net))
        depth, width = (self.args.get(name, getattr(net, name)) for name in ('depth', 'width'))
        if not net.matches(depth, width):
            raise ValueError(
                f'its args say depth {depth}, width {width}: expected those of its parameters, '
                f'depth {net.depth}, width {net.width:g}'
            )
        return net


def load_params(path):
    """Reads the parameters of a functional DiracNet, for `f`, `Network` and `fold`.

    path: a file or the folder of a run. Returns a flat dict from name to tensor on the CPU, as
    that of `define_diracnet`, in which no tensor requires grad. Raises ValueError for what is
    wrong with the contents, OSError for a file that cannot be read.
    """
    return _functional(read_checkpoint(path))


def _functional(saved):
    """The parameters of a functional DiracNet; raises ValueError, naming the file, for others."""
    if is_folded(saved.params):
        raise ValueError(
            f'{saved.path}: holds a folded network: expected the parameters it was folded from'
        )
    try:
        saved.topology()
    except ValueError as error:
        raise ValueError(f'{saved.path}: {error}') from error
    return saved.params


def read_checkpoint(path):
    """Reads the parameters of any network, and what the file says beside them: CheckpointContents.

    The running statistics may stand in `params`, or in `stats`; dense deltas and prefixes of
    wrappers are dropped. path and errors are those of `load`.
    """
    return _saved(load_dict(path), path)


def _saved(contents, path):
    if not isinstance(contents.get('params'), Mapping):
        texts = getattr(contents, '_metadata', None)
        said = parse_metadata(texts if isinstance(texts, Mapping) else {}, path)
        contents = {'params': contents, **said}
    params = {**contents['params'], **(contents.get('stats') or {})}
    params = {WRAPPERS.sub('', name): tensor for name, tensor in params.items()}
    params = {name: tensor for name, tensor in params.items() if not DELTA.match(name)}
    return make_contents(path, contents, params)


def make_contents(path, contents, params):
    """What a file says of a network whose parameters are known, or {}: CheckpointContents."""
    return CheckpointContents(str(path), params, contents.get('args') or {}, contents.get('classes'),
                 contents.get('inputs'), {name: contents[name] for name in ORIGIN_KEYS
                                          if contents.get(name) is not None})


def load_dict(path, required=()):
    """Loads a file, or the newest good one of a run's folder: a dict, its tensors on the CPU.

    required: keys that it must have. Where a run's model.pt7 is damaged or missing the one before
    it serves, and stderr says so. Raises ValueError for what is wrong with the contents, OSError
    for a file that cannot be read.
    """
    path = os.path.join(path, MODEL_FILE) if os.path.isdir(path) else str(path)
    try:
        return load_dict_file(path, required)
    except (ValueError, FileNotFoundError) as error:
        previous = os.path.join(os.path.dirname(path), PREVIOUS_FILE)
        if os.path.basename(path) != MODEL_FILE or not os.path.exists(previous):
            raise
        contents = load_dict_file(previous, required)
        print(f'{error}; taking {previous}', file=sys.stderr)
        return contents


def load_dict_file(path, required=()):
    """Loads one file, checked: a dict. required and errors are those of `load`."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such file: expected a checkpoint or a folder with one')
    loader = LOADERS.get(os.path.splitext(path)[1], _load_pickle)
    contents = loader(path)
    if not isinstance(contents, Mapping):
        raise ValueError(f'{path}: holds a {type(contents).__name__}: expected a dict')
    try:
        check_bounds(contents)
        check_schema(contents)
        for name in required:
            if name not in contents:
                raise ValueError(f'{name} is missing: expected a checkpoint of train.py')
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return contents


def _let_through(error, path):
    """Raises OSError, naming the file, for an error that says nothing of what is in it."""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's
    ):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), path) from error
    # of damaged bytes are those without a number, and EINVAL, of places before a file's start
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise OSError(error.errno, error.strerror, path) from error


def _load_safetensors(path):
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors import torch as safetensors
    except ImportError as error:
        raise ValueError(
            f'{path}: safetensors is missing: expected pip install safetensors'
        ) from error
    try:
        contents = OrderedDict(safetensors.load_file(path))
        with safe_open(path, 'pt') as file:
            contents._metadata = file.metadata() or {}
        return contents
    except SafetensorError as error:
        raise ValueError(f'{path}: truncated, or not a safetensors file ({error})') from error


def _load_pt2(path):
    """Reads the parameters of a .pt2, and its texts, from where torch.export.save puts them."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type for part in archive.infolist()) or archive.testzip():
                raise ValueError('altered')
            root = archive.namelist()[0].split('/')[0]
            config = parse_json(archive.read(f'{root}/{PT2_CONFIG}'))['config']
            contents = OrderedDict(
                (name, _pt2_tensor(archive.read(f'{root}/data/weights/{said["path_name"]}'), said))
                for name, said in config.items()
            )
            contents._metadata = {METADATA_KEY: archive.read(f'{root}/extra/{METADATA_KEY}').decode()}
            return contents
    except Exception as error:  # damaged bytes make it raise almost anything
        _let_through(error, path)
        raise ValueError(
            f'{path}: truncated, damaged or not of export.py: expected a .pt2 that says what its '
            'network is'
        ) from error


def _pt2_tensor(content, said):
    """A parameter, from its bytes and what a .pt2 says of them."""
    meta = said['tensor_meta']
    shape = [size['as_int'] for size in meta['sizes']]
    if said['use_pickle']:
        raise ValueError('expected bytes')
    tensor = torch.frombuffer(bytearray(content), dtype=PT2_DTYPES[meta['dtype']]).view(shape)
    strides = [stride['as_int'] for stride in meta['strides']]
    if any(s != t for s, t, size in zip(strides, tensor.stride(), shape) if size > 1):
        raise ValueError('expected contiguous parameters')
    return tensor


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
            _let_through(error, path)
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


# by a name's ending; every other file is torch.save's
LOADERS = {'.safetensors': _load_safetensors, '.pt2': _load_pt2}


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
    `Network(f, params)` makes parameters of them; `diracnets.preprocess()` makes their inputs.
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
