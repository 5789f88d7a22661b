"""How batch norm and delta disappear: trained parameters become a network of plain convolutions.

    net = fold(params)              # of define_diracnet, or diracfile.load_params: a DiracNet
    net = fold(module)              # any nn.Module

Batch norm after a convolution, y = (W_hat * x - mean) * a + bias with a = weight / sqrt(var + eps),
is one convolution of filters a W_hat and bias `bias - mean a`. Both this and W_hat (Zagoruyko &
Komodakis, arXiv 1706.00388, eq. 3) are linear in the input, so the folded network is exact.
"""

import copy
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn
from torch.fx import Tracer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.optim.swa_utils import AveragedModel

from diracconv import check_forward, is_parametrized
from diracnet import (
    BN_EPS,
    DiracNet,
    Network,
    Topology,
    check_params,
    dirac_weights,
    init_params,
    is_folded,
)

PLAIN_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)  # and torch.compile's
HOOKS = (  # what a module's hooks are kept in; those of the last two are called with keywords
    '_forward_hooks', '_forward_pre_hooks', '_forward_hooks_always_called',
    '_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs',
)


def fold(what, dtype=torch.float32):
    """Folds Dirac parameterisation and batch norm into plain convolutions, for evaluation.

    what: one of
    - the parameters of a functional DiracNet (flat name -> tensor): returns a DiracNet;
    - an nn.Module: returns a copy, in which each Network is a DiracNet, wherever it is, each layer
      with a method `fold()` (a DiracConv, say, or a block of diverse branches) is the nn.Module
      that it returns, and each convolution with a DiracParametrization, or whose output goes to a
      batch norm and nowhere else, is one plain convolution. Such a batch norm is gone from an
      nn.Sequential of named layers; elsewhere nn.Identity stands for it. In place of DataParallel,
      DistributedDataParallel, AveragedModel and what torch.compile returns stands what they wrap.
      Names, sharing, hooks and everything else stay; a layer with hooks, or with another
      parametrization, keeps its batch norm, and so does one that is used twice.
    dtype: of the result; the arithmetic is done in float64.

    The result is on the CPU for parameters, on the module's device for a module (meta included),
    and in evaluation mode. Raises ValueError for parameters that are no DiracNet's, for a Network
    or a DiracConv of a subclass with a forward of its own, for what a layer's `fold()` refuses, for
    a tensor that is computed from others and kept (a weight that torch.nn.utils.prune masks, say),
    and for a module with batch norm that torch.fx cannot trace (whose forward depends on values of
    tensors, say): fold its parts.
    """
    if isinstance(what, Mapping):
        return _fold_params(what, dtype)
    if isinstance(what, nn.Module):
        return _fold_module(what, dtype)
    raise ValueError(f'{type(what).__name__} cannot be folded: expected parameters or an nn.Module')


@torch.no_grad()
def _fold_params(params, dtype, device='cpu'):
    if is_folded(params):
        raise ValueError('holds a folded network: expected the parameters it was folded from')
    net = Topology.from_params(params)
    with torch.device('meta'):  # nothing is drawn that would be thrown away
        check_params(params, init_params(net))
        folded_net = DiracNet.from_topology(net)
    params = {name: tensor.to(device, torch.float64, copy=True) for name, tensor in params.items()}
    filters = {'conv': params['conv'], **dirac_weights(params, [name for name, _, _ in net.layers()])}
    folded = {name: params[name] for name in ('fc.weight', 'fc.bias')}
    for name, weight in filters.items():
        bn = name.removesuffix('conv') + 'bn'
        folded[f'features.{name}.weight'], folded[f'features.{name}.bias'] = fuse_conv_bn_weights(
            weight, None, params[f'{bn}.running_mean'], params[f'{bn}.running_var'], BN_EPS,
            params[f'{bn}.weight'], params[f'{bn}.bias'],
        )
    folded_net.load_state_dict(folded, assign=True)
    return folded_net.to(dtype).eval()


@torch.no_grad()
def _fold_module(module, dtype):
    _check_tensors(module)
    root = nn.ModuleList([_unwrapped_copy(module)]).eval().double()  # so that all have a parent
    for layer in list(root.modules()):
        if isinstance(layer, Network):
            _replace(root, layer, _fold_network(layer))
        elif _has_fold(layer):
            folded = layer.fold()
            if not isinstance(folded, nn.Module):
                raise ValueError(f'{type(layer).__name__}.fold() gives a {type(folded).__name__}: '
                                 'expected the nn.Module that takes its place')
            _replace(root, layer, folded)
        elif is_parametrized(layer):
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


def _has_fold(layer):
    return callable(getattr(type(layer), 'fold', None))


def _check_tensors(module):
    """Raises ValueError for a tensor that is computed from others, and so cannot be copied.

    Such is a weight that torch.nn.utils.prune masks, or weight_norm and spectral_norm make. Where
    it does not require grad it can, but not into the layer that a `fold()` gives.
    """
    for name, layer in module.named_modules():
        for key, value in vars(layer).items():
            if isinstance(value, torch.Tensor) and (not value.is_leaf or (
                _has_fold(layer) and {f'{key}_orig', f'{key}_v'} & layer._parameters.keys()
            )):
                raise ValueError(
                    f'{f"{name}.{key}".lstrip(".")} is computed from other tensors: expected a '
                    'parameter, as prune.remove, remove_weight_norm and remove_spectral_norm leave '
                    'it, or no such tensor'
                )


def _wrapped(layer):
    """What a wrapper that changes no outputs is around, or None."""
    return layer.module if isinstance(layer, WRAPPERS) else layer._modules.get('_orig_mod')


def _unwrapped_copy(module):
    """A deep copy with what they wrap in place of all wrappers, which cannot all be copied."""
    copies = {}  # id -> copy, of what copy.deepcopy need not copy any more
    for wrapper in reversed([layer for layer in module.modules() if _wrapped(layer)]):
        inside = copy.deepcopy(_wrapped(wrapper), copies)
        _hand_on_hooks(wrapper, inside)
        copies[id(wrapper)] = inside
    return copy.deepcopy(module, copies)


def has_hooks(layer):
    """Whether hooks of a layer's own see, and may change, what goes in or comes out."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _hand_on_hooks(old, new):
    """Puts a module's hooks around those of another: the first to see inputs, the last outputs."""
    for kind in HOOKS:
        getattr(new, kind).update(getattr(old, kind))
    for number in reversed(old._forward_pre_hooks):
        new._forward_pre_hooks.move_to_end(number, last=False)


def _fold_network(network):
    check_forward(network, Network)
    params = network.state_dict()
    return _fold_params(params, torch.float64, next(iter(params.values())).device)


def _replace(root, old, new):
    """Puts `new`, or nothing, in every place of the tree where `old` is: sharing and hooks stay."""
    if new is not None:
        _hand_on_hooks(old, new)
    for parent in list(root.modules()):
        # named_children() would leave out repeated ones
        for name in [name for name, child in parent._modules.items() if child is old]:
            if new is None and isinstance(parent, nn.Sequential) and not name.isdigit():
                delattr(parent, name)  # no number that may be used as an index changes
            else:
                setattr(parent, name, new or nn.Identity())


def trace(module):
    """The graph of a module by torch.fx; raises ValueError where it cannot be traced."""
    try:
        return Tracer().trace(module)
    except Exception as error:  # the traced code may raise anything when it is given proxies
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise ValueError(
            f'{type(module).__name__} cannot be traced ({reason}): expected a forward that '
            'does not depend on the values of tensors; fold its submodules one by one'
        ) from error


def _passes(layers, node, bn):
    """Whether a node is a max-pool, without hooks, that this batch norm alone follows and may lead.

    The largest of some numbers stays the largest where all are scaled by a positive one.
    """
    pool = layers[node.target] if getattr(node, 'op', None) == 'call_module' else None
    if not isinstance(pool, nn.MaxPool2d) or pool.return_indices or has_hooks(pool):
        return False
    if len(node.users) > 1 or not isinstance(bn, _BatchNorm):
        return False
    # on the meta device there are no values: taken to be as batch norms start, positive
    return bn.weight is None or bn.weight.is_meta or bool((bn.weight > 0).all())


def _conv_bn_pairs(module):
    """Lists (convolution, batch norm) in which the second alone sees what the first gives.

    There may be a max-pool between them, through which a batch norm of positive scales goes.
    """
    norms = {  # one without running statistics takes those of the batch: it cannot be folded
        layer for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    if not norms:
        return []
    graph = trace(module)
    layers = dict(module.named_modules(remove_duplicate=False))
    called = [node.target for node in graph.nodes if node.op == 'call_module']
    read = [node.target.rpartition('.')[0] for node in graph.nodes if node.op == 'get_attr']
    uses = Counter(layers[name] for name in called + read)

    def is_free(layer):
        return uses[layer] == 1 and not has_hooks(layer)

    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.op == 'call_module' and node.args else None
        if _passes(layers, before, layers.get(node.target)):
            before = before.args[0]
        if getattr(before, 'op', None) != 'call_module' or len(before.users) > 1:
            continue
        conv, bn = layers[before.target], layers[node.target]
        # exactly these types: a subclass, as parametrize makes, may compute something else
        if type(conv) in PLAIN_CONVS and bn in norms and is_free(conv) and is_free(bn):
            pairs.append((conv, bn))
    return pairs
