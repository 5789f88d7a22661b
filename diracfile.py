"""Every file that holds the parameters of a network, read safely: nothing in it can run code.

    params = load_params('logs/diracnet-28-1')      # of a DiracNet: a run, or any file
    net = diracfold.fold(params)

A run of train.py (its folder, or a checkpoint in it), the original repository's checkpoints, those
of DistributedDataParallel and torch.compile, bare state dicts and safetensors, folded or not.
Archives are checked whole before they are read, as torch.load takes altered numbers for good ones.
"""

import os
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from diracnet import (
    DiracNet,
    Topology,
    check_fit,
    init_params,
    is_folded,
    load_published,
    topology,
)

MODEL, PREVIOUS, BEST = 'model.pt7', 'previous.pt7', 'best.pt7'  # in the folder of a run
CHECKPOINT_URLS = {  # unfolded, with which training can go on
    18: 'https://s3.amazonaws.com/modelzoo-networks/diracnet18-v2_checkpoint.pth',
    34: 'https://s3.amazonaws.com/modelzoo-networks/diracnet34-v2_checkpoint.pth',
}
WRAPPERS = re.compile(r'^(module\.|_orig_mod\.)+')  # of DistributedDataParallel, torch.compile
DELTA = re.compile(r'^eye[\d_]+$')  # dense identities, which the original kept: eye64_64_3_3


@dataclass(frozen=True)
class Saved:
    """What a file says of a network."""

    path: str
    params: dict  # flat name -> tensor, on the CPU
    args: dict  # the options of its training, or empty
    classes: list  # their names, or None

    def topology(self, stated=None):
        """Reads the Topology off the parameters of a DiracNet, functional or folded.

        stated: options that someone states beside `args`. Raises ValueError, naming the file, for
        parameters that are no DiracNet's, or that another depth or width than theirs is stated for.
        """
        try:
            net = Topology.of(self.params)
            with torch.device('meta'):  # shapes alone
                folded = is_folded(self.params)
                check_fit(self.params, DiracNet.of(net).state_dict() if folded
                          else init_params(net))
        except ValueError as error:
            raise ValueError(f'{self.path}: {error}') from error
        said = {**self.args, **(stated or {})}
        depth, width = said.get('depth', net.depth), said.get('width', net.width)
        if topology(depth, width, net.kind, net.num_classes) != net:
            raise ValueError(
                f'{self.path}: depth {depth}, width {width} are stated: expected those of its '
                f'parameters, depth {net.depth}, width {net.width:g}'
            )
        return net


def load_params(path):
    """Reads the parameters of a functional DiracNet, for `f`, `Network` and `fold`.

    path: a file or the folder of a run. Returns a flat dict from name to tensor on the CPU, as
    that of `define_diracnet`, in which no tensor requires grad. Raises ValueError for what is
    wrong with the contents, OSError for a file that cannot be read.
    """
    saved = read(path)
    if is_folded(saved.params):
        raise ValueError(
            f'{path}: holds a folded network: expected the parameters it was folded from'
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
        contents = {'params': contents}
    params = {**contents['params'], **(contents.get('stats') or {})}
    params = {WRAPPERS.sub('', name): tensor for name, tensor in params.items()}
    params = {name: tensor for name, tensor in params.items() if not DELTA.match(name)}
    return Saved(str(path), params, contents.get('args') or {}, contents.get('classes'))


def load(path):
    """Loads a file, or the newest good one of a run's folder: a dict, its tensors on the CPU.

    Where a run's model.pt7 is damaged or missing the one before it serves, and stderr says so.
    Raises ValueError for what is wrong with the contents, OSError for a file that cannot be read.
    """
    path = os.path.join(path, MODEL) if os.path.isdir(path) else str(path)
    try:
        return _load_file(path)
    except (ValueError, FileNotFoundError) as error:
        previous = os.path.join(os.path.dirname(path), PREVIOUS)
        if os.path.basename(path) != MODEL or not os.path.exists(previous):
            raise
        contents = _load_file(previous)
        print(f'{error}; taking {previous}', file=sys.stderr)
        return contents


def _load_file(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such file: expected a checkpoint or a folder with one')
    contents = _load_safetensors(path) if path.endswith('.safetensors') else _load_pickle(path)
    if not isinstance(contents, Mapping):
        raise ValueError(f'{path}: holds a {type(contents).__name__}: expected a dict')
    return contents


def _load_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(
            f"{path}: safetensors is missing: expected pip install 'diracnets[deploy]'"
        ) from error
    try:
        return load_file(path)
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

    They are fetched once into torch.hub's cache. Returns a flat dict, as that of
    `define_diracnet(depth, 1, 'ImageNet')`, to fine-tune from: `Network(f, params)` makes
    parameters of them; `diracimage.preprocess()` makes their inputs. Raises ValueError for another
    depth, RuntimeError that says which file to put where if they cannot be had.
    """
    if depth not in CHECKPOINT_URLS:
        raise ValueError(f'depth {depth}: expected 18 or 34, of which there are published weights')
    contents = load_published(CHECKPOINT_URLS[depth], check_hash=False)
    saved = _saved(contents, checkpoint_path(depth))
    try:
        saved.topology()
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    return saved.params
