"""Reads the parameters of a model from any file that contains them.

    params = load_params('logs/diracnet-28-2')      # of a DiracNet: the folder of a run, or a file
    model = diracnets.fold(params)

Supported files are checkpoints of train.py (or the folder of a run), checkpoints of the original
repository and of other training scripts, which contain a state dict under one of PARAMS_KEYS, bare
state dicts and safetensors files, folded or not. A prefix that all names share is removed, such as
`module.` of DistributedDataParallel or `net.` of a LightningModule. Nothing in a file is executed.
The CRC of every entry of an archive is checked first, because torch.load does not detect altered
values.
"""

import argparse
import errno
import os
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diracnet import Topology, is_folded, join_names, load_published
from diracnets.metadata import ORIGIN_KEYS, check_bounds, check_schema, parse_metadata
from diracnets.network import flat_name

MODEL_FILE, PREVIOUS_FILE, BEST_FILE = 'model.pt7', 'previous.pt7', 'best.pt7'  # of a run's folder
CHECKPOINT_URLS = {  # unfolded parameters, from which training can continue
    18: 'https://s3.amazonaws.com/modelzoo-networks/diracnet18-v2_checkpoint.pth',
    34: 'https://s3.amazonaws.com/modelzoo-networks/diracnet34-v2_checkpoint.pth',
}
UNREADABLE = {  # extension: the error
    '.pt2': 'a .pt2 file contains a program; open it with torch.export.load',
    '.onnx': 'the parameters in an ONNX file cannot be read; use the run or another file that was '
             'exported from it',
}
PARAMS_KEYS = ('params', 'state_dict', 'model_state_dict', 'model', 'net')  # train.py: the first
COMPILED = re.compile(r'(?<![^.])_orig_mod\.')  # of torch.compile, also of a part of the model
# dense identities in original checkpoints, like eye64_64_3_3, and the counter of AveragedModel
IGNORED = re.compile(r'(.*\.)?(eye[\d_]+|n_averaged)$')


@dataclass(frozen=True)
class CheckpointContents:
    """The parameters and the metadata in one file."""

    path: str
    params: dict[str, Tensor]  # flat names, on the CPU
    args: dict  # the options of the training run, or empty
    classes: list[str] | None
    inputs: dict | None  # the fields of the Preprocessing
    origin: dict  # values by metadata.ORIGIN_KEYS; keys missing in the file are absent

    def topology(self) -> Topology:
        """Infers the Topology of a DiracNet, functional or folded, from the parameter shapes.

        Raises ValueError for parameters of another architecture, and for a depth or width in `args`
        that contradicts the shapes.
        """
        topology = Topology.from_params(self.params)
        depth, width = (self.args.get(name, getattr(topology, name)) for name in ('depth', 'width'))
        if not topology.matches(depth, width):
            raise ValueError(
                f'its args contain depth {depth}, width {width}, but its parameters have depth '
                f'{topology.depth}, width {topology.width:g}'
            )
        return topology

    def unfolded_params(self) -> dict[str, Tensor]:
        """Returns the parameters of a functional DiracNet; raises ValueError for other models."""
        try:
            if is_folded(self.params):
                raise ValueError('contains a folded network; use the checkpoint from which it was '
                                 'exported')
            self.topology()
        except ValueError as error:
            raise ValueError(f'{self.path}: {error}') from error
        return self.params


def load_params(path: str | os.PathLike) -> dict[str, Tensor]:
    """Loads the parameters of a functional DiracNet, for `f`, `Network` and `fold`.

    path: a file or the folder of a run. Returns a flat dict of tensors on the CPU, with the names
    of `define_diracnet`; no tensor requires grad. Raises ValueError for invalid contents, OSError
    for a file that cannot be read.
    """
    params = read_checkpoint(path).unfolded_params()
    return {name: tensor.detach() for name, tensor in params.items()}


def read_checkpoint(path: str | os.PathLike) -> CheckpointContents:
    """Reads the parameters and the metadata of a model of any architecture.

    Running statistics may be in `params` or in `stats`; dense deltas, the counter of AveragedModel
    and a common prefix of all names are removed. The parameters of a DiracNet that are named after
    its modules, as in diracnets.timm, get flat names. path and errors are those of `load_dict`.
    """
    return parse_checkpoint(load_dict(path), path)


def parse_checkpoint(contents: Mapping, path: str | os.PathLike) -> CheckpointContents:
    """Parses a dict that was loaded from a file; see `read_checkpoint`. path: for errors."""
    ema = contents.get('ema')
    if isinstance(ema, Mapping) and ema:  # the average of train.py --ema, in place of the weights
        contents = {**contents, 'params': ema}
    if not isinstance(contents.get('params'), Mapping):  # a state dict
        texts = getattr(contents, '_metadata', None)
        metadata = parse_metadata(texts if isinstance(texts, Mapping) else {}, path)
        contents = {'params': contents, **metadata}
    params = {**contents['params'], **(contents.get('stats') or {})}
    params = {COMPILED.sub('', name): t for name, t in params.items() if not IGNORED.match(name)}
    start = len(common_prefix(params))
    params = {name[start:]: tensor.contiguous() for name, tensor in params.items()}
    if 'group0.block0.conv.alpha' in params:  # a functional DiracNet with the names of modules
        params = {flat_name(name): tensor for name, tensor in params.items()
                  if not name.endswith('.num_batches_tracked')}
    return make_contents(path, contents, params)


def common_prefix(names: Iterable[str]) -> str:
    """Returns the longest prefix of whole parts that all names share, such as 'model.net.', or ''.

    No model of this project has one, because its first and last layers have different names.
    """
    prefix = os.path.commonprefix(list(names))
    return prefix[: prefix.rfind('.') + 1]


def make_contents(path: str | os.PathLike, contents: Mapping, params: dict) -> CheckpointContents:
    """Makes CheckpointContents from the metadata in `contents` and from separate parameters."""
    origin = {name: contents[name] for name in ORIGIN_KEYS if contents.get(name) is not None}
    return CheckpointContents(str(path), params, contents.get('args') or {},
                              contents.get('classes'), contents.get('inputs'), origin)


# ---------------------------------------------------------------- files


def load_dict(path: str | os.PathLike, required: Iterable[str] = ()) -> Mapping:
    """Loads the dict in a file, or in the newest readable checkpoint of a run's folder.

    required: keys that the dict must contain. If a run's model.pt7 is corrupt or missing,
    previous.pt7 is loaded, with a warning on stderr. Returns the dict, its tensors on the CPU.
    Raises ValueError for invalid contents, OSError for a file that cannot be read; both name the
    file.
    """
    path = os.path.join(path, MODEL_FILE) if os.path.isdir(path) else str(path)
    try:
        return load_dict_file(path, required)
    except (ValueError, FileNotFoundError) as error:
        previous = os.path.join(os.path.dirname(path), PREVIOUS_FILE)
        if os.path.basename(path) != MODEL_FILE or not os.path.exists(previous):
            raise
        contents = load_dict_file(previous, required)
        print(f'{error}; using {previous} instead', file=sys.stderr)
        return contents


def load_dict_file(path: str, required: Iterable[str] = ()) -> Mapping:
    """Loads and checks the dict in exactly this file; see `load_dict`."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such file; give a checkpoint or the folder of a run')
    extension = os.path.splitext(path)[1]
    try:
        if extension in UNREADABLE:
            raise ValueError(UNREADABLE[extension])
        contents = (_read_safetensors if extension == '.safetensors' else _read_pickle)(path)
        if not isinstance(contents, Mapping):
            raise ValueError(f'contains a {type(contents).__name__}, expected a dict')
        check_bounds(contents)
        contents = _find_params(contents)
        check_schema(contents)
        for name in required:
            if name not in contents:
                raise ValueError(f'{name} is missing; use a checkpoint of train.py')
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return contents


def _find_params(contents):
    """Returns a checkpoint of train.py unchanged, and of another one only the state dict."""
    def has_tensors(value):  # hyperparameters may be called params too
        return any(isinstance(inner, Tensor) or isinstance(inner, Mapping) and has_tensors(inner)
                   for inner in value.values())

    if isinstance(contents.get('params'), Mapping) and has_tensors(contents['params']):
        return contents
    while inner := [contents[k] for k in PARAMS_KEYS if isinstance(contents.get(k), Mapping)]:
        contents = max(inner, key=has_tensors)  # the first of several
    if not all(isinstance(value, Tensor) for value in contents.values()):
        raise ValueError(
            f'its keys are {join_names(contents, 12)}: expected tensors, or a state dict under '
            + ', '.join(PARAMS_KEYS)
        )
    return contents


def _read_safetensors(path):
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ValueError('safetensors is not installed; pip install safetensors') from error
    try:
        with safe_open(path, 'pt') as file:  # once, because the file may be replaced at any time
            names = file.keys()
            contents = OrderedDict((name, file.get_tensor(name)) for name in names)
            contents._metadata = file.metadata() or {}
        return contents
    except Exception as error:  # of safetensors, or of torch for an unknown dtype
        _raise_if_environment_error(error, path)
        reason = str(error).partition('\n')[0]
        raise ValueError(f'corrupt, or not a safetensors file ({reason})') from error


def _read_pickle(path):
    with open(path, 'rb') as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.load warns of unusual pickle protocols
        try:
            is_archive = file.read(2) == b'PK' or zipfile.is_zipfile(file)  # else a legacy pickle
            if is_archive:
                archive = zipfile.ZipFile(file)
                # a small compressed file may expand to GBs; testzip checks the CRC of every entry
                if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                    raise ValueError('an entry is compressed or has the wrong CRC')
            file.seek(0)
            with _namespaces_allowed():
                return torch.load(file, map_location='cpu', weights_only=True)
        except Exception as error:  # corrupt bytes make both readers raise almost any exception
            _raise_if_environment_error(error, path)
            code = re.search(r'GLOBAL (\S+)', str(error))
            if code:
                raise ValueError(f'refused, because its pickle would call {code[1]}; save only '
                                 'tensors and plain values') from error
            raise ValueError(
                'corrupt, or not a file that torch.load reads with weights_only=True') from error


def _namespaces_allowed():
    """Lets torch.load read the options in checkpoints of scripts that use argparse."""
    known = torch.serialization.get_safe_globals()  # the context removes its types at the end
    return torch.serialization.safe_globals({argparse.Namespace}.difference(known))


def _raise_if_environment_error(error, path):
    """Raises OSError, naming the file, unless the error may come from the file's contents."""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's
    ):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), path) from error
    # corrupt bytes cause errors without a number, and EINVAL, for offsets before a file's start
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise OSError(error.errno, error.strerror, path) from error


# ---------------------------------------------------------------- published checkpoints


def checkpoint_path(depth: int) -> str:
    """Returns the path of the original checkpoint of depth 18 or 34 in torch.hub's cache."""
    return os.path.join(
        torch.hub.get_dir(), 'checkpoints', os.path.basename(CHECKPOINT_URLS[depth])
    )


def pretrained_params(depth: int) -> dict[str, Tensor]:
    """Loads the authors' unfolded parameters of the ImageNet DiracNet of depth 18 or 34.

    The file is downloaded once into torch.hub's cache; its name contains no hash to check. Returns
    a flat dict like that of `define_diracnet(depth, 1, 'ImageNet')`, to fine-tune from:
    `Network(f, params)` makes them trainable; `diracnets.preprocess()` makes the inputs. Raises
    ValueError for another depth, and RuntimeError, which names the URL and the local path, if the
    download fails or the file contains non-finite values or parameters of another network.
    """
    if depth not in CHECKPOINT_URLS:
        raise ValueError(f'depth {depth}: expected 18 or 34, the published depths')

    def params_of(downloaded):
        contents = parse_checkpoint(downloaded, checkpoint_path(depth))
        args = {**contents.args, 'depth': depth, 'width': 1}
        return replace(contents, args=args).unfolded_params()

    return load_published(CHECKPOINT_URLS[depth], params_of)
