"""The DiracNet as a chain of modules, for training.

    f, params = define_diracnet(depth=28, width=1, dataset='CIFAR10')
    model = Network(f, params)
"""

import contextlib
import functools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from diracconv import DiracConv2d
from diracnet import (
    Params,
    Topology,
    batch_norm,
    check_params,
    conv_block,
    forward,
    make_layers,
    stem_conv,
)
from diracnets.fused_weights import dirac_weights

BATCH_COUNT = '.num_batches_tracked'  # a buffer of BatchNorm2d that is not in the parameters
HOOK_ATTRIBUTES = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
# layers whose output the ReLU after them may overwrite: their backward passes do not need it.
# Exact types: a subclass may keep its output, or return its input
INPLACE_RELU_AFTER = nn.BatchNorm2d, nn.SyncBatchNorm, nn.MaxPool2d


class Network(nn.Sequential):
    """The DiracNet for training, a chain of modules: (N, in_channels, H, W) to (N, num_classes).

        f, params = define_diracnet(28, 1, 'CIFAR10')
        model = Network(f, params)              # model(inputs) equals f(inputs, params, mode)
        model = Network.from_params(params)     # for example those of diracnets.load_params

    The children are `conv`, `bn`, for ImageNet `max_pool`, then `group0`, `group1_pool`, `group1`
    and so on, `relu`, `avg_pool`, `flatten` and `fc`. The blocks of a group, `group0.block0`, are
    `relu`, `conv` (a DiracConv2d) and `bn`. The state dict has the flat names of `params`; the
    modules share their memory. Running statistics are buffers, all other tensors parameters that
    require grad.

    The whole model computes W_hat of all layers of one shape at once, which is faster than layer
    by layer. A model with hooks, a traced model and a child that is called alone run layer by
    layer, with equal results. checkpointing: recompute most blocks in the backward pass to save
    memory, with equal results. Raises ValueError if f is not a function of `define_diracnet`, or if
    the params are not those of f.
    """

    def __init__(self, f: Callable[..., Tensor], params: Params,
                 checkpointing: bool = False) -> None:
        if getattr(f, 'func', None) is not forward:
            raise ValueError(f'f is {f!r}: expected the function that define_diracnet returned')
        topology, = f.args
        with torch.device('meta'):  # no random initialization that is discarded
            stem = {'conv': stem_conv(topology, bias=False), 'bn': batch_norm(topology.channels[0])}
            layers = make_layers(topology, stem, functools.partial(conv_block, DiracConv2d))
            layers['flatten'] = nn.Flatten()
            layers['fc'] = nn.Linear(topology.channels[-1], topology.num_classes)
            super().__init__(layers)
        check_params(params, self.state_dict())
        self.checkpointing = checkpointing
        self.load_state_dict({name: t.detach() for name, t in params.items()}, assign=True)

    @classmethod
    def from_params(cls, params: Params, checkpointing: bool = False) -> 'Network':
        """Makes the model of flat parameters; raises ValueError for those of another model."""
        return cls(functools.partial(forward, Topology.from_params(params)), params, checkpointing)

    def __getitem__(self, index: int | slice) -> nn.Module:
        return nn.Sequential(OrderedDict(self._modules))[index]

    def forward(self, inputs: Tensor) -> Tensor:
        if self.checkpointing and self.training and not isinstance(inputs, fx.Proxy):
            return self._run_checkpointed(inputs)
        return _run(self, inputs)

    def _run_checkpointed(self, x):
        """Runs the layers, but stores only about sqrt(n) of the outputs of n blocks in a group."""
        for child in self:
            blocks = list(child) if type(child) is nn.Sequential and not has_hooks(child) else []
            length = max(1, round(len(blocks) ** 0.5))
            for start in range(0, len(blocks), length):
                segment = nn.Sequential(*blocks[start : start + length])
                x = run_checkpointed(segment, functools.partial(_run, segment), x)
            if not blocks:
                x = child(x)
        return x

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state_dict = super().state_dict(*args, **kwargs)
        prefix = kwargs.get('prefix', '')
        for name in [name for name in state_dict if name.startswith(prefix)]:
            tensor = state_dict.pop(name)  # every tensor, to keep the order
            if not name.endswith(BATCH_COUNT):
                state_dict[prefix + flat_name(name.removeprefix(prefix))] = tensor
        return state_dict

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in [name for name in state_dict if name.startswith(prefix)]:
            tensor = state_dict.pop(name)
            state_dict[prefix + module_name(name.removeprefix(prefix))] = tensor
            if name.endswith('.running_var'):
                count = torch.zeros((), dtype=torch.long, device=tensor.device)
                state_dict.setdefault(name.removesuffix('.running_var') + BATCH_COUNT, count)
        super()._load_from_state_dict(state_dict, prefix, *args)


def flat_name(name: str) -> str:
    """Returns the name in `params` of a tensor in the modules of a Network."""
    name = re.sub(r'^(|group\d+\.block\d+\.)conv\.weight$', r'\1conv', name)
    return re.sub(r'^(group\d+\.block\d+\.)conv\.(alpha|beta)$', r'\1\2', name)


def module_name(name: str) -> str:
    """Returns the name in the modules of a Network of a tensor in `params`."""
    name = re.sub(r'^(group\d+\.block\d+\.)(alpha|beta)$', r'\1conv.\2', name)
    return re.sub(r'^(|group\d+\.block\d+\.)conv$', r'\1conv.weight', name)


def _run(model, x):
    """Runs an nn.Sequential as its forward does, but W_hat of all layers of one shape at once.

    Layer by layer, W_hat takes about six times as long, because the convolutions between evict the
    parameters from the caches. Hooks and traces need every module to be called.
    """
    inside = list(model.modules())[1:]
    if isinstance(x, fx.Proxy) or torch.jit.is_tracing() or has_hooks(*inside):
        return nn.Sequential.forward(model, x)
    layers, weights = list(_flatten(model)), {}
    for previous, layer in zip([None, *layers], layers):
        if type(layer) is DiracConv2d:
            if not weights:
                convs = [conv for conv in layers if type(conv) is DiracConv2d]
                weights = dirac_weights(convs, x.dtype if _has_autocast(x) else None, x)
            x = layer._conv_forward(x, weights[layer], layer.bias)
        elif _is_standard_norm(layer):
            # calling the module would take 1 % longer per step. It also counts batches, which only
            # a momentum of None uses
            x = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias,
                             layer.training, layer.momentum, layer.eps)
        elif type(layer) is nn.ReLU and type(previous) in INPLACE_RELU_AFTER:
            x = F.relu(x, inplace=True)
        else:
            x = layer(x)
    return x


def _has_autocast(x):
    """Returns whether autocast is enabled on the device of a tensor; the meta device has none."""
    return x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type)


def _is_standard_norm(layer):
    """Returns whether a layer is a BatchNorm2d that updates its statistics with its momentum."""
    return (type(layer) is nn.BatchNorm2d and layer.track_running_stats
            and layer.momentum is not None)


def _flatten(model):
    """Yields the layers of nested nn.Sequentials, in the order of their calls."""
    for child in model:
        if type(child) is nn.Sequential:
            yield from _flatten(child)
        else:
            yield child


def has_hooks(*modules: nn.Module) -> bool:
    """Returns whether a module has hooks, or a forward method of its own, as some tools add."""
    return any(getattr(module, name) for module in modules for name in HOOK_ATTRIBUTES) or any(
        'forward' in vars(module) for module in modules) or _has_any_global_hook()


@contextlib.contextmanager
def _frozen_running_stats(model):
    """Keeps the running statistics of the batch norms in a model unchanged."""
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, settings):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def run_checkpointed(model: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Calls a function, but recomputes it in the backward pass in place of storing activations.

    The recomputation does not update the running statistics of the batch norms in `model`.
    """
    return checkpoint(
        function, *inputs, use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _frozen_running_stats(model)),
    )
