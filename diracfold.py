"""How batch norm and delta disappear: trained parameters become a network of plain convolutions.

    params = load_params('logs/diracnet-28-1')     # or any file that holds a DiracNet's parameters
    net = fold(params)                             # DiracNet, same logits

Batch norm after a convolution, y = (W_hat * x - mean) * a + bias with a = weight / sqrt(var + eps),
is one convolution of filters a W_hat and bias `bias - mean a`. Both this and W_hat (Zagoruyko &
Komodakis, arXiv 1706.00388, eq. 3) are linear in the input, so the folded network is exact.
"""

import copy
import functools
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn
from torch.fx import Tracer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

import diracimage
from diracconv import DiracParametrization
from diracnet import (
    BN_EPS,
    IMAGENET_BLOCKS,
    DiracNet,
    Network,
    init_params,
    load_published,
    topology,
    w_hats,
)

CHECKPOINT_URLS = {  # unfolded, with which training can go on
    18: 'https://s3.amazonaws.com/modelzoo-networks/diracnet18-v2_checkpoint.pth',
    34: 'https://s3.amazonaws.com/modelzoo-networks/diracnet34-v2_checkpoint.pth',
}
IMAGE_SIZES = {'CIFAR10': 32, 'CIFAR100': 32, 'ImageNet': 224}  # pixels
PLAIN_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WRAPPERS = re.compile(r'^(module\.|_orig_mod\.)+')  # of DistributedDataParallel, torch.compile
BLOCK = re.compile(r'group\d+\.block\d+(?=\.)')
DELTA = re.compile(r'^eye[\d_]+$')  # dense identities, which the original kept: eye64_64_3_3


# ---------------------------------------------------------------- fold


def fold(what, dtype=torch.float32):
    """Folds Dirac parameterisation and batch norm into plain convolutions, for evaluation.

    what: one of
    - the parameters of a functional DiracNet (flat name -> tensor), or the Network that carries
      them: returns a DiracNet;
    - any other nn.Module: returns a copy, in which each layer with a `fold()` (a DiracConv, say, or
      a block of diverse branches) is what that returns, and each convolution with a
      DiracParametrization, or whose output goes to a batch norm and nowhere else, is one plain
      convolution. Such a batch norm is gone from an nn.Sequential of named layers; elsewhere
      nn.Identity stands for it. Names, sharing and everything else stay; a layer with hooks, or
      with another parametrization, keeps its batch norm, and so does one that is used twice.
    dtype: of the result; the arithmetic is done in float64.

    The result is on the CPU for parameters, on the module's device for a module (meta included),
    and in evaluation mode. Raises ValueError for parameters that are no DiracNet's, and for a
    module with batch norm that torch.fx cannot trace (whose forward depends on values of tensors,
    say): fold its parts.
    """
    if isinstance(what, DistributedDataParallel):
        what = what.module
    what = getattr(what, '_orig_mod', what)  # of torch.compile
    if isinstance(what, Network):
        what = what.state_dict()
    if isinstance(what, Mapping):
        return _fold_params(what, dtype)
    if isinstance(what, nn.Module):
        return _fold_module(what, dtype)
    raise ValueError(f'{type(what).__name__} cannot be folded: expected parameters or an nn.Module')


@torch.no_grad()
def _fold_params(params, dtype):
    options = identify(params)
    params = {name: tensor.to('cpu', torch.float64, copy=True) for name, tensor in params.items()}
    names = [name for name, _, _ in topology(**options).layers()]
    filters = {'conv': params['conv'], **w_hats(params, names)}
    folded = {name: params[name] for name in ('fc.weight', 'fc.bias')}
    for name, weight in filters.items():
        bn = name.removesuffix('conv') + 'bn'
        folded[f'features.{name}.weight'], folded[f'features.{name}.bias'] = fuse_conv_bn_weights(
            weight, None, params[f'{bn}.running_mean'], params[f'{bn}.running_var'], BN_EPS,
            params[f'{bn}.weight'], params[f'{bn}.bias'],
        )
    with torch.device('meta'):  # nothing is drawn that would be thrown away
        net = DiracNet(**options)
    net.load_state_dict(folded, assign=True)
    return net.to(dtype).requires_grad_().eval()


@torch.no_grad()
def _fold_module(module, dtype):
    root = nn.ModuleList([copy.deepcopy(module)]).eval().double()  # so that all have a parent
    for layer in list(root.modules()):
        if hasattr(layer, 'fold'):
            _replace(root, layer, layer.fold())
        elif parametrize.is_parametrized(layer, 'weight') and any(
            isinstance(p, DiracParametrization) for p in layer.parametrizations.weight
        ):
            # a class made for this layer loses the parametrization: the copy needs one of its own
            kind = type(layer)
            layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            parametrize.remove_parametrizations(layer, 'weight')
    for conv, bn in _conv_bn_pairs(root[0]):
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        _replace(root, bn, None)
    return root[0].to(dtype).eval()


def _replace(root, old, new):
    """Puts `new`, or nothing, in every place of the tree where `old` is: sharing stays."""
    for parent in list(root.modules()):
        # named_children() would leave out repeated ones
        for name in [name for name, child in parent._modules.items() if child is old]:
            if new is None and isinstance(parent, nn.Sequential) and not name.isdigit():
                delattr(parent, name)  # no number that may be used as an index changes
            else:
                setattr(parent, name, new or nn.Identity())


def _trace(module):
    try:
        return Tracer().trace(module)
    except Exception as error:  # the traced code may raise anything when it is given proxies
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f'{type(module).__name__} cannot be traced ({reason}): expected a forward that '
            'does not depend on the values of tensors; fold its submodules one by one'
        ) from error


def _conv_bn_pairs(module):
    """Lists (convolution, batch norm) in which the second alone sees what the first gives."""
    norms = {  # one without running statistics takes those of the batch: it cannot be folded
        layer for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    if not norms:
        return []
    graph = _trace(module)
    layers = dict(module.named_modules(remove_duplicate=False))
    called = [node.target for node in graph.nodes if node.op == 'call_module']
    read = [node.target.rpartition('.')[0] for node in graph.nodes if node.op == 'get_attr']
    uses = Counter(layers[name] for name in called + read)

    def is_free(layer):
        return uses[layer] == 1 and not layer._forward_hooks and not layer._forward_pre_hooks

    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.op == 'call_module' and node.args else None
        if getattr(before, 'op', None) != 'call_module' or len(before.users) > 1:
            continue
        conv, bn = layers[before.target], layers[node.target]
        # exactly these types: a subclass, as parametrize makes, may compute something else
        if type(conv) in PLAIN_CONVS and bn in norms and is_free(conv) and is_free(bn):
            pairs.append((conv, bn))
    return pairs


# ---------------------------------------------------------------- read


def read(path):
    """Reads the parameters of any network, and what a checkpoint says beside them.

    path: a checkpoint of train.py or the folder of its run (the model.pt7 there); one of the
    original repository (running statistics in `params`, or in `stats`; dense deltas are dropped);
    a bare state dict, saved by torch or as .safetensors. Prefixes of DDP are dropped.

    Returns a dict: `params` (flat name -> tensor on the CPU), `args` (the options of its training,
    or empty) and `classes` (their names, or None). Raises ValueError for what is wrong with the
    contents, OSError for a file that cannot be read. Pickles are read with weights_only: none can
    run code.
    """
    path = os.path.join(path, 'model.pt7') if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such file: expected a checkpoint or a folder with one')
    contents = _load_safetensors(path) if path.endswith('.safetensors') else _load_pickle(path)
    if not isinstance(contents, Mapping):
        raise ValueError(f'{path}: holds a {type(contents).__name__}: expected a dict')
    return _entries(contents)


def load_params(path):
    """Reads the parameters of a functional DiracNet, ready for `f`, `Network` and `fold`.

    path and errors are those of `read` and `describe`.
    """
    contents = read(path)
    describe(contents, path)
    return contents['params']


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
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
                raise ValueError('altered')  # torch.load would take the numbers as they are
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


def _entries(contents):
    """Brings the contents of a file to the dict of `read`."""
    if not isinstance(contents.get('params'), Mapping):
        contents = {'params': contents}
    params = {**contents['params'], **(contents.get('stats') or {})}
    params = {WRAPPERS.sub('', name): tensor for name, tensor in params.items()}
    return {
        'params': {name: tensor for name, tensor in params.items() if not DELTA.match(name)},
        'args': contents.get('args') or {},
        'classes': contents.get('classes'),
    }


def describe(contents, path):
    """Tells which functional DiracNet a file holds; from now on its parameters require grad.

    contents: what `read` returned. Returns a dict: `options` (of `topology`, told by the shapes)
    and `image_size` (pixels). Raises ValueError, naming the file, for parameters that are no
    DiracNet's or contradict the options beside them.
    """
    params, args = contents['params'], contents['args']
    try:
        options = identify(params)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    stated = options | {name: args[name] for name in ('depth', 'width') if name in args}
    if topology(**stated) != topology(**options):
        raise ValueError(
            f'{path}: its args say depth {stated["depth"]}, width {stated["width"]}: expected '
            f'those of its parameters, depth {options["depth"]}, width {options["width"]:g}'
        )
    for name, tensor in params.items():
        tensor.requires_grad_('running_' not in name)
    return {'options': options, 'image_size': image_size(args, options['dataset'])}


def image_size(args, dataset):
    """The size of a network's inputs in pixels, by the options of its training if there are any."""
    chosen = args.get('dataset') == 'Folder'  # the other sets have a size of their own
    return args['image_size'] if chosen else IMAGE_SIZES[dataset]


def identify(params):
    """Tells a functional DiracNet by the names and shapes of its parameters.

    Returns the arguments of `topology`: a dict of depth, width, dataset ('CIFAR10' for all nets
    whose stem is 3 x 3, 'ImageNet' for 7 x 7) and num_classes. Raises ValueError that says which
    keys are missing or unknown, or which shapes are wrong.
    """
    if 'features.conv.weight' in params:
        raise ValueError('holds a folded network: expected the parameters it was folded from')
    for name, ndim in {'conv': 4, 'fc.weight': 2}.items():
        if name not in params:
            raise ValueError(f'{name} is missing: expected the parameters of a DiracNet')
        if getattr(params[name], 'ndim', None) != ndim:
            raise ValueError(f'{name} is wrong: expected a tensor of {ndim} dimensions')
    num_classes, channels = params['fc.weight'].shape
    imagenet = params['conv'].shape[-1] == 7
    found = {
        'depth': _depth(params, imagenet),
        'width': channels / (512 if imagenet else 64),
        'dataset': 'ImageNet' if imagenet else 'CIFAR10',
        'num_classes': num_classes,
    }
    with torch.device('meta'):  # shapes alone
        expected = init_params(topology(**found))
    check_fit(params, expected)
    return found


def _depth(params, imagenet):
    """Counts the blocks of each group, whole or not: returns the depth that has so many."""
    names = {match[0] for match in map(BLOCK.match, params) if match}
    counts = Counter(name.partition('.')[0] for name in names)  # of blocks in each group
    blocks = tuple(counts[group] for group in sorted(counts))
    if imagenet:
        depths = {tuple(2 * n for n in half): depth for depth, half in IMAGENET_BLOCKS.items()}
        expected = 'those of depth 18 or 34'
    else:
        depths = {(2 * n,) * 3: 6 * n + 4 for n in range(1, len(params))}
        expected = 'three groups of the same even number'
    if blocks not in depths:
        counted = ', '.join(map(str, blocks)) or 'no'
        raise ValueError(f'holds groups of {counted} blocks: expected {expected}')
    return depths[blocks]


def check_fit(params, expected):
    """Raises ValueError naming the keys and shapes in which parameters differ from `expected`."""
    differ = [f'{name} is missing' for name in expected.keys() - params.keys()]
    differ += [f'{name} is unknown' for name in params.keys() - expected.keys()]
    differ += [
        f'{name} is {tuple(params[name].shape)}, expected {tuple(expected[name].shape)}'
        for name in expected.keys() & params.keys()
        if params[name].shape != expected[name].shape
    ]
    if differ:
        more = f', and {len(differ) - 5} more' if len(differ) > 5 else ''
        raise ValueError(
            f'the checkpoint does not fit the network: {", ".join(sorted(differ)[:5])}{more}'
        )


# ---------------------------------------------------------------- published


def checkpoint_path(depth):
    """Returns where torch.hub keeps the original checkpoint of depth 18 or 34, once fetched."""
    return os.path.join(
        torch.hub.get_dir(), 'checkpoints', os.path.basename(CHECKPOINT_URLS[depth])
    )


def pretrained_params(depth):
    """Loads the original, unfolded parameters of the ImageNet DiracNet of depth 18 or 34.

    They are fetched once into torch.hub's cache. Returns a flat dict, as that of
    `define_diracnet(depth, 1, 'ImageNet')`, to fine-tune from; `preprocess(depth)` makes their
    inputs. Raises ValueError for another depth, RuntimeError that says which file to put where if
    they cannot be had.
    """
    if depth not in CHECKPOINT_URLS:
        raise ValueError(f'depth {depth}: expected 18 or 34, of which there are published weights')
    contents = _entries(load_published(CHECKPOINT_URLS[depth], check_hash=False))
    try:
        describe(contents, checkpoint_path(depth))
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    return contents['params']


def preprocess(depth, dataset='ImageNet', image_size=None):
    """Returns the transform that the accuracy of a DiracNet was measured with.

    depth, dataset: as in `topology`; image_size: pixels, by default 224 for ImageNet and 32 for
    CIFAR. The transform takes the path of an image file and returns an input, float32
    (3, image_size, image_size): RGB, resized by OpenCV (cubic, and cut to the middle 224 of 256 in
    nets for ImageNet), scaled to [0, 1], less the mean and over the deviation of the data set. It
    raises ValueError for a file that is no image.
    """
    topology(depth, 1, dataset)  # for its errors
    return functools.partial(diracimage.read_input, dataset=dataset,
                             size=image_size or IMAGE_SIZES[dataset])
