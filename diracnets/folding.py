"""Folding: Dirac parametrization and batch norm become part of standard convolutions.

    model = fold(params)            # of define_diracnet or diracnets.load_params: a DiracNet
    model = fold(module)            # any nn.Module

Batch norm after a convolution, y = a (W_hat * x - mean) + bias with a = weight / sqrt(var + eps),
equals one convolution with the filters a W_hat and the bias `bias - a mean`. W_hat (Zagoruyko &
Komodakis, arXiv 1706.00388, eq. 3) does not depend on the input, so folding is exact.
"""

import copy
import inspect
import itertools
import threading
from collections import Counter
from collections.abc import Mapping
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.optim.swa_utils import AveragedModel

from diracconv import dirac_weight, is_parametrized
from diracnet import DiracNet, Topology, is_folded
from diracnets.network import Network, has_hooks

PLAIN_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_FUNCTIONS = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)  # torch.compile adds _orig_mod
MAX_FLAGS = 6  # arguments with the default True or False: their combinations are traced
VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_TRACING = threading.RLock()  # torch.fx patches nn.Module for all threads while it traces
MOVED_HOOKS = (
    '_forward_hooks', '_forward_pre_hooks', '_forward_hooks_always_called',
    '_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs',
)


def fold(source: Mapping[str, Tensor] | nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Folds the Dirac parametrization and batch norm into standard convolutions.

    source is one of
    - the parameters of a functional DiracNet (flat name to tensor): returns a DiracNet;
    - an nn.Module: returns a copy with these replacements at any depth. A layer with a method
      `fold()`, such as DiracConv2d or a multi-branch block, becomes the nn.Module that the method
      returns. A convolution with a DiracParametrization, or whose output goes only to a batch norm,
      becomes one standard convolution, and the batch norm an nn.Identity. A Network becomes an
      nn.Sequential of its folded layers, and a DiracNet if it is the whole module and has the
      layers of one. DataParallel, DistributedDataParallel, AveragedModel and the wrapper of
      torch.compile are removed. Names, shared layers, forward hooks and all other modules remain.
      A convolution keeps its batch norm if one of the two has hooks or is also used without the
      other, or if the convolution has another parametrization.
    dtype is the dtype of the result; the arithmetic is in float64.

    The result is in evaluation mode, on the CPU for parameters and on the device of the module
    (also meta) otherwise. Raises ValueError for parameters that are not those of a DiracNet, for a
    DiracConv with its own forward, for errors in a layer's `fold()`, for a weight of a replaced
    layer that another forward uses, for a remaining tensor that is computed from others (such as a
    weight under torch.nn.utils.prune), for a program of torch.jit or, with batch norm, of
    torch.export, and for a module with batch norm that torch.fx cannot trace, such as one with
    control flow that depends on its inputs; fold its submodules instead. torch.fx may follow
    another branch of a forward that tests the type of its input.
    """
    if isinstance(source, Mapping):
        if is_folded(source):
            raise ValueError('contains a folded network; use its parameters before folding')
        return _fold_module(Network.from_params(source).cpu(), dtype)
    if isinstance(source, nn.Module):
        return _fold_module(source, dtype)
    raise ValueError(
        f'{type(source).__name__} cannot be folded: expected parameters or an nn.Module'
    )


@torch.no_grad()
def _fold_module(module, dtype):
    _check_copyable(module)
    root = nn.ModuleList([_unwrapped_copy(module)]).eval().double()  # the module gets a parent
    _replace(root, {layer: _with_called_convs(layer) for layer in root.modules()
                    if isinstance(layer, fx.GraphModule)})
    is_network, folded_layers = type(root[0]) is Network, {}
    for layer in root.modules():
        if type(layer) is Network:
            layer.__class__ = nn.Sequential  # it may get layers that a Network does not have
        elif _has_fold(layer):
            folded_layers[layer] = folded = layer.fold()
            if not isinstance(folded, nn.Module):
                raise ValueError(
                    f'{type(layer).__name__}.fold() returned a {type(folded).__name__}: expected '
                    'the nn.Module that replaces the layer'
                )
        elif is_parametrized(layer):
            # remove_parametrizations changes the class that parametrize made for this layer, and
            # the copy shares that class with the original: give the copy its own
            cls = type(layer)
            layer.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
            parametrized = layer.parametrizations.weight
            for name, tensor in list(parametrized.named_parameters(recurse=False)):
                # W_hat replaces the values of this tensor, which may be shared
                setattr(parametrized, name, nn.Parameter(tensor.clone(), tensor.requires_grad))
            parametrize.remove_parametrizations(layer, 'weight')
    _replace(root, folded_layers)
    pairs = _conv_bn_pairs(root[0], folded_layers.values())
    for conv, bn in pairs:
        has_bias = conv.bias is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        if not has_bias:  # torch makes the new bias a parameter that does not require grad
            conv.bias.requires_grad_(conv.weight.requires_grad)
    _replace(root, {bn: nn.Identity() for _, bn in pairs})
    model = _as_diracnet(root[0]) if is_network else root[0]
    # unlike .to(dtype), this leaves complex tensors complex
    return model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t).eval()


def _as_diracnet(network):
    """Returns the DiracNet with the layers of a folded Network, or the Network if they differ."""
    def layers(model):
        return [(type(layer), repr(layer)) for layer in model.modules()  # repr: all arguments
                if not layer._modules and not isinstance(layer, (nn.Identity, nn.Flatten))]

    def in_diracnet(tensors):
        return {name if name.startswith('fc.') else f'features.{name}': tensor
                for name, tensor in tensors}

    params = in_diracnet(network.state_dict().items())
    try:
        topology = Topology.from_params(params)
    except ValueError:
        return network
    with torch.device('meta'):  # no random initialization that is discarded
        model = DiracNet.from_topology(topology)
    if (layers(model) != layers(network)
            or any(type(layer) is not nn.Sequential
                   for layer in network.modules() if layer._modules)
            or has_hooks(*list(network.modules())[1:]) or 'forward' in vars(network)):
        return network
    model.load_state_dict(params, assign=True)
    originals = in_diracnet(network.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(originals[name].requires_grad)
    _move_hooks(network, model)
    return model


def _has_fold(layer):
    """Returns whether a layer has a method `fold()`, without other arguments."""
    method = getattr(type(layer), 'fold', None)
    return callable(method) and not any(
        parameter.default is parameter.empty and parameter.kind not in VARIADIC
        for parameter in list(inspect.signature(method).parameters.values())[1:])


def _check_copyable(module):
    """Raises ValueError for a tensor that is computed from others, and so cannot be copied.

    torch.nn.utils.prune, weight_norm and spectral_norm create such tensors. Without requires_grad
    they can be copied, except into the layer that a `fold()` returns. Also raises ValueError for a
    replaced forward, and for programs of torch.export and torch.jit, which contain operators in
    place of layers.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (_ConvNd, _BatchNorm)) and isinstance(
                vars(layer).get('forward'), FunctionType):
            raise ValueError(f'{name or "the module"} has a forward that was replaced by a '
                             'function, in which a copy would call the original layer: restore it')
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(f'{name or "the module"} is a program of torch.jit, which cannot be '
                             'folded: fold the model, then compile it')
        if isinstance(layer, fx.GraphModule) and any(
                'batch_norm' in str(node.target) and isinstance(node.target, OpOverload)
                for node in layer.graph.nodes):
            raise ValueError(f'{name or "the module"} is a program of torch.export, in which batch '
                             'norm cannot be folded: fold the model, then export it')
        for key, value in vars(layer).items():
            if isinstance(value, Tensor) and (not value.is_leaf or (
                _has_fold(layer) and {f'{key}_orig', f'{key}_v'} & layer._parameters.keys()
            )):
                raise ValueError(
                    f'{f"{name}.{key}".lstrip(".")} is computed from other tensors: make it a '
                    'parameter with prune.remove, remove_weight_norm or remove_spectral_norm, or '
                    'delete it'
                )


# ---------------------------------------------------------------- replacing modules


def _wrapped(layer):
    """Returns the module in a wrapper that does not change outputs, or None."""
    return layer.module if isinstance(layer, WRAPPERS) else layer._modules.get('_orig_mod')


def _unwrapped_copy(module):
    """Returns a deep copy without wrappers, some of which cannot be copied."""
    copies = {}  # id of a wrapper: its replacement, for copy.deepcopy
    for wrapper in reversed([layer for layer in module.modules() if _wrapped(layer)]):
        inside = copy.deepcopy(_wrapped(wrapper), copies)
        _move_hooks(wrapper, inside)
        copies[id(wrapper)] = inside
    return copy.deepcopy(module, copies)


def _move_hooks(old, new):
    """Adds the hooks of a module around those of another one: its pre-hooks first, others last."""
    for attribute in MOVED_HOOKS:
        getattr(new, attribute).update(getattr(old, attribute))
    for key in reversed(old._forward_pre_hooks):
        new._forward_pre_hooks.move_to_end(key, last=False)


def _replace(root, replacements):
    """Replaces modules, {old: new}, wherever they occur in `root`; moves their hooks."""
    for old, new in replacements.items():
        _move_hooks(old, new)
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):  # children() leaves out repeated ones
            if child in replacements:
                setattr(parent, name, replacements[child])


# ---------------------------------------------------------------- batch norms


class _Tracer(fx.Tracer):
    """A Tracer of the calls in its own thread: those of other threads run as usual."""

    def __init__(self):
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def traces(module: nn.Module) -> list[fx.Graph]:
    """Returns the torch.fx graphs of a module: all that its forward may take by its arguments.

    The arguments with the default None are all given or all None, and each argument with the
    default True or False has both values. Raises ValueError if the module cannot be traced.
    """
    try:
        defaults = {name: parameter.default for name, parameter
                    in inspect.signature(module.forward).parameters.items()}
        optional = {name: None for name, default in defaults.items() if default is None}
        flags = [name for name, default in defaults.items() if type(default) is bool]
        if len(flags) > MAX_FLAGS:
            raise ValueError(f'{len(flags)} flags: expected at most {MAX_FLAGS}')
        with _TRACING:
            return [_Tracer().trace(module, {**arguments, **dict(zip(flags, values))})
                    for arguments in ([{}, optional] if optional else [{}])
                    for values in itertools.product((False, True), repeat=len(flags))]
    except Exception as error:  # the traced code may raise anything when it gets proxies
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise ValueError(
            f'{type(module).__name__} cannot be traced ({reason}): its control flow must '
            'not depend on its inputs; fold its submodules one by one'
        ) from error


def _commutes_with_pool(layers, node, bn):
    """Returns whether a node is a max-pool that can run after instead of before a batch norm.

    A maximum commutes with scaling by positive numbers. The pool must have no hooks and no other
    consumer than the batch norm.
    """
    pool = layers[node.target] if getattr(node, 'op', None) == 'call_module' else None
    if not isinstance(pool, nn.MaxPool2d) or pool.return_indices or has_hooks(pool):
        return False
    if len(node.users) > 1 or not isinstance(bn, _BatchNorm):
        return False
    # the meta device has no values: assume the initial scales, which are positive
    return bn.weight is None or bn.weight.is_meta or bool((bn.weight > 0).all())


def _with_called_convs(module):
    """Returns a GraphModule with calls of folded convolutions in place of inlined DiracConv layers.

    The usual tracers, as in torchvision's create_feature_extractor, trace through DiracConv layers.
    """
    graph = copy.deepcopy(module.graph)
    params = {**dict(module.named_parameters(remove_duplicate=False)),
              **dict(module.named_buffers(remove_duplicate=False))}
    converted = {}  # by the parameters and arguments of a layer: its name
    for node in graph.nodes:
        w_hat = node.args[1] if node.target in CONV_FUNCTIONS else None
        if getattr(w_hat, 'target', None) is not dirac_weight or (
                len(w_hat.args), len(node.args)) != (4, 7):  # not the calls of a DiracConv layer
            continue
        inputs, _, bias, *arguments = node.args
        targets = [arg.target for arg in (*w_hat.args[:3], bias) if arg is not None]
        layer = *targets, *arguments
        if layer not in converted:  # a shared layer is called several times
            name = targets[1].rpartition('.')[0] or 'conv'
            name += f'_{len(converted)}' * (name in converted.values())
            stride, padding, dilation, groups = arguments
            if not params.keys() >= {*targets}:
                raise ValueError(f'a tensor of {name} is computed from others: make it a parameter '
                                 'with prune.remove or remove_weight_norm before tracing')
            weight, alpha, beta, *bias = (params[target] for target in targets)
            conv = CONV_FUNCTIONS[node.target](
                weight.shape[1] * groups, len(weight), weight.shape[2:], stride, padding, dilation,
                groups, bool(bias), device='meta',
            )
            conv.weight = nn.Parameter(dirac_weight(weight, alpha, beta, groups),
                                       weight.requires_grad)
            if bias:
                conv.bias = nn.Parameter(bias[0].clone(), bias[0].requires_grad)
            parent, _, leaf = name.rpartition('.')
            setattr(module.get_submodule(parent), leaf, conv)
            converted[layer] = name
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(converted[layer], (inputs,)))
    for node in reversed(graph.nodes):
        if not node.users and (node.op == 'get_attr' or node.target is dirac_weight
                               or node.target in CONV_FUNCTIONS):
            graph.erase_node(node)
    return fx.GraphModule(module, graph, type(module).__name__)


def _conv_bn_pairs(module, replaced):
    """Returns the pairs (convolution, batch norm) that can be fused.

    In every call of the two, the batch norm is the only consumer of the convolution's output, or of
    the output of a max-pool after it that commutes with the batch norm. Raises ValueError if a
    forward reads the weight of a layer in `replaced`, which is W_hat now.
    """
    convs = {layer for layer in replaced if type(layer) in PLAIN_CONVS} - {module}
    norms = {  # without running statistics a batch norm uses those of the batch, also in evaluation
        layer for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    try:
        graphs = traces(module) if convs or norms else []
    except ValueError as error:
        if 'not installed as a submodule' in str(error.__cause__):  # so it was not replaced
            raise ValueError(f'{type(module).__name__} calls a layer that is not a submodule: use '
                             'nn.ModuleList or nn.Sequential in place of a list') from error
        if norms:
            raise
        graphs = []  # without batch norm, also modules that cannot be traced are folded
    layers = dict(module.named_modules(remove_duplicate=False))
    uses, pairs = Counter(), Counter()
    for graph in graphs:
        _check_reads(graph, layers, convs)
        uses += count_uses(graph, layers)
        pairs += _count_pairs(graph, layers, norms)
    return [pair for pair, count in pairs.items() if all(uses[layer] == count for layer in pair)]


def _check_reads(graph, layers, convs):
    """Raises ValueError if the graph reads a tensor of one of `convs` outside this layer."""
    for node in graph.nodes:
        if node.op == 'get_attr' and layers[node.target.rpartition('.')[0]] in convs:
            raise ValueError(f'{node.target} is used outside its layer: folding would change its '
                             'values; use a copy of it there')


def count_uses(graph: fx.Graph, layers: Mapping[str, nn.Module]) -> Counter:
    """Counts how often each of `layers`, modules by name, is called or one of its tensors read."""
    called = [node.target for node in graph.nodes if node.op == 'call_module']
    read = [node.target.rpartition('.')[0] for node in graph.nodes if node.op == 'get_attr']
    return Counter(layers[name] for name in called + read)


def _count_pairs(graph, layers, norms):
    pairs = Counter()
    for node in graph.nodes:
        before = next(iter(node.all_input_nodes), None) if node.op == 'call_module' else None
        if _commutes_with_pool(layers, before, layers.get(node.target)):
            before, = before.all_input_nodes
        if getattr(before, 'op', None) != 'call_module' or len(before.users) > 1:
            continue
        conv, bn = layers[before.target], layers[node.target]
        # exact types: a subclass, such as one made by parametrize, may compute something else
        if type(conv) in PLAIN_CONVS and bn in norms and not has_hooks(conv, bn):
            pairs[conv, bn] += 1
    return pairs
