"""Dirac parametrization of convolutions (Zagoruyko & Komodakis, arXiv 1706.00388).

The filters of a convolution are

    W_hat = diag(alpha) * delta + diag(beta) * normalize(W)                                (eq. 3)

where `delta` is the identity kernel: a convolution with delta returns its input. `dirac_weight`
computes W_hat. `DiracConv1d/2d/3d` are drop-in layers. `dirac` converts the convolutions of any
model. `DiracParametrization` is W_hat for `torch.nn.utils.parametrize`.

    conv = DiracConv2d(64, 64, kernel_size=3, padding=1)
    plain_conv = conv.fold()                # nn.Conv2d with the same output
    model = dirac(model)                    # diracnets.fold reverses this
"""

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

ALPHA_INIT, BETA_INIT = 1.0, 0.1
NORM_EPS = 1e-12  # as in torch.nn.functional.normalize
HALF_EPS = torch.finfo(torch.float16).tiny  # gradients of up to beta / epsilon must not overflow
Size = int | tuple[int, ...]  # of all dimensions, or of each


# ---------------------------------------------------------------- W_hat


def dirac_weight(weight: Tensor, alpha: Tensor, beta: Tensor, groups: int = 1) -> Tensor:
    """Computes W_hat = diag(alpha) * delta + diag(beta) * normalize(weight) (eq. 3).

    weight: (out, in / groups, *kernel_size). alpha, beta: (out,). The result has the shape and
    dtype of the weight. W_hat of an all-zero filter is alpha * delta, and its first and second
    gradients are finite. torch.jit.script compiles this function and the layers.
    """
    scale = beta / _filter_norms(weight)                        # (out,)
    w_hat = _per_filter(scale, weight) * weight                 # diag(beta) * normalize(W)
    return add_delta(w_hat, alpha, groups).to(weight.dtype)     # + diag(alpha) * delta


fx.wrap('dirac_weight')  # a leaf of symbolic traces, because it depends on shapes and dtypes


def normalize(weight: Tensor) -> Tensor:
    """Divides each filter, weight[i], by its L2 norm. An all-zero filter stays zero."""
    return (weight / _per_filter(_filter_norms(weight), weight)).to(weight.dtype)


def add_delta(weight: Tensor, alpha: Tensor, groups: int = 1) -> Tensor:
    """Returns weight + diag(alpha) * delta.

    As in `torch.nn.init.dirac_`, filter i of a group has a one at input channel i of the group and
    at tap `kernel_size // 2`. Filters beyond the number of input channels have none. The output of
    an even kernel with padding `kernel_size // 2` is one element longer than the input.

    weight: (out, in / groups, *kernel_size). alpha: (out,).
    """
    out_channels, in_channels = weight.shape[:2]
    center, taps = 0, 1
    for size in weight.shape[2:]:
        center, taps = center * size + size // 2, taps * size
    step = (in_channels + 1) * taps  # from one filter to the next
    count = min(out_channels // groups, in_channels)
    stop = center + (count - 1) * step + 1
    flat = weight.reshape(groups, -1)
    ones = flat[:, center:stop:step] + alpha.reshape(groups, -1)[:, :count]
    return flat.slice_scatter(ones, 1, center, stop, step).view(weight.shape)


# the epsilons are arguments, because torch.jit.script does not accept global floats
def _filter_norms(weight, eps: float = NORM_EPS, half_eps: float = HALF_EPS):
    """Returns the L2 norm of each filter, (out,), but at least epsilon, in float32 or float64."""
    flat = weight.flatten(1)
    wide = flat if weight.dtype == torch.float64 else flat.float()
    minimum = half_eps if weight.dtype == torch.float16 else eps
    # not linalg.vector_norm: its second gradient at zero is NaN
    return wide.square().sum(dim=1).clamp_min(minimum**2).sqrt()


def _per_filter(values, weight):
    """Views values (out,) so that they broadcast over a weight (out, ...)."""
    return values.view([-1] + [1] * (weight.dim() - 1))


# ---------------------------------------------------------------- layers


class _DiracConv:
    """Base of the three layers, which also inherit from the nn.Conv of their dimension."""

    plain: type  # the nn.Conv class
    initial = {'alpha': ALPHA_INIT, 'beta': BETA_INIT}

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = 'zeros', device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        ndim = int(self.plain.__name__[-2])  # Conv2d: 2
        _check_sizes(0, 1, in_channels=in_channels, out_channels=out_channels, groups=groups)
        _check_sizes(ndim, 1, kernel_size=kernel_size, stride=stride, dilation=dilation)
        if not isinstance(padding, str):
            _check_sizes(ndim, 0, padding=padding)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )
        _add_alpha_beta(self, self.weight)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, 'alpha'):  # the constructor of nn.Conv calls this before alpha exists
            for name, value in self.initial.items():
                nn.init.constant_(getattr(self, name), value)

    def transform_weight(self) -> Tensor:
        """Returns W_hat, differentiable: (out_channels, in_channels / groups, *kernel_size)."""
        return dirac_weight(self.weight, self.alpha, self.beta, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.transform_weight(), self.bias)

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Returns the nn.Conv1d, nn.Conv2d or nn.Conv3d that has the same output.

        Raises ValueError for a layer with its own forward or _conv_forward.
        """
        if ('forward' in vars(self) or type(self).forward is not _DiracConv.forward
                or type(self)._conv_forward is not self.plain._conv_forward):
            raise ValueError(
                f'{type(self).__name__} overrides forward: expected a '
                f'{LAYERS[self.plain].__name__}, or a module that contains one'
            )
        conv = self.plain(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
            self.dilation, self.groups, self.bias is not None, self.padding_mode, 'meta',
        )  # on the meta device: no random initialization that is discarded
        conv.weight = nn.Parameter(self.transform_weight(), self.weight.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.clone(), self.bias.requires_grad)
        return conv.train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + 'delta', None)  # the authors' layers saved delta as a tensor
        super()._load_from_state_dict(state_dict, prefix, *args)


class DiracConv1d(_DiracConv, nn.Conv1d):
    """nn.Conv1d with the weight W_hat: (N, C, L) to (N, out_channels, L').

    The arguments are those of nn.Conv1d, in the same order. (The fourth positional argument of the
    authors' layers was the padding, here it is the stride.) The learned parameters are `weight`,
    `bias`, and per output channel `alpha` (initially 1) and `beta` (initially 0.1). Raises
    ValueError for invalid arguments.
    """

    plain = nn.Conv1d


class DiracConv2d(_DiracConv, nn.Conv2d):
    """nn.Conv2d with the weight W_hat: (N, C, H, W) to (N, out_channels, H', W').

    See `DiracConv1d`.
    """

    plain = nn.Conv2d


class DiracConv3d(_DiracConv, nn.Conv3d):
    """nn.Conv3d with the weight W_hat: (N, C, D, H, W) to (N, out_channels, D', H', W').

    See `DiracConv1d`.
    """

    plain = nn.Conv3d


LAYERS = {layer.plain: layer for layer in (DiracConv1d, DiracConv2d, DiracConv3d)}


class DiracParametrization(nn.Module):
    """Parametrization that replaces the weight of a convolution by W_hat.

        parametrize.register_parametrization(conv, 'weight', DiracParametrization(conv))
        parametrize.remove_parametrizations(conv, 'weight')          # stores W_hat as the weight

    conv: an nn.Conv1d, nn.Conv2d or nn.Conv3d, whose weight becomes W. Raises ValueError for other
    layers, such as transposed convolutions, whose filters are in dimension 1, and lazy ones.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        if not isinstance(conv, tuple(LAYERS)) or nn.parameter.is_lazy(conv.weight):
            raise ValueError(
                f'{type(conv).__name__} cannot be Dirac-parametrized: expected an initialized '
                'Conv1d, Conv2d or Conv3d'
            )
        self.groups = conv.groups
        _add_alpha_beta(self, conv.weight)

    def forward(self, weight: Tensor) -> Tensor:
        return dirac_weight(weight, self.alpha, self.beta, self.groups)


def _add_alpha_beta(module, weight):
    for name, value in {'alpha': ALPHA_INIT, 'beta': BETA_INIT}.items():
        values = torch.full(weight.shape[:1], value, device=weight.device, dtype=weight.dtype)
        module.register_parameter(name, nn.Parameter(values))


def is_parametrized(layer: nn.Module) -> bool:
    """Returns whether the weight of a layer has a DiracParametrization."""
    return parametrize.is_parametrized(layer, 'weight') and any(
        isinstance(p, DiracParametrization) for p in layer.parametrizations.weight
    )


def _check_sizes(ndim, minimum, **sizes):
    """Raises ValueError unless each size is one or `ndim` integers of at least minimum.

    With ndim 0, a size must be one integer. nn.Conv checks the other arguments.
    """
    for name, value in sizes.items():
        several = ndim and isinstance(value, (tuple, list))
        numbers = value if several else (value,) * max(ndim, 1)
        if len(numbers) != max(ndim, 1) or not all(
            isinstance(n, Integral) and n >= minimum for n in numbers
        ):
            expected = f'an integer of at least {minimum}' + f', or {ndim} of them' * (ndim > 1)
            raise ValueError(f'{name} is {value!r}: expected {expected}')


# ---------------------------------------------------------------- models


def dirac(model: nn.Module, which: Callable[[str, nn.Module], bool] | None = None) -> nn.Module:
    """Applies the Dirac parametrization to the convolutions of a model, in place.

    model: any nn.Module, also a single convolution. which: a function (name, convolution) -> bool
    that selects convolutions (default: all). DiracNets do not convert the first convolution:

        dirac(model, lambda name, conv: conv.in_channels > 3 and conv.kernel_size == (3, 3))

    Returns the model. A selected nn.Conv1d, nn.Conv2d or nn.Conv3d becomes a DiracConv1d, 2d or 3d:
    the same object, with its weight as W, its hooks, and new parameters `alpha` (initially 1) and
    `beta` (initially 0.1), which have the dtype, device and requires_grad of the weight. A subclass
    or a layer with a replaced `forward` keeps this method and gets a DiracParametrization.
    Transposed convolutions and layers that are already Dirac-parametrized do not change. Create the
    optimizer and wrappers such as DDP afterwards, because they must register the new parameters.

    The outputs change because W is normalized; with alpha = 0 and beta = the norm of each filter,
    W_hat is W. A module that reads the weight of a convolution, and does not call it, gets W.
    Raises ValueError, and changes nothing, if a selected convolution is lazy or none is selected.
    """
    convs = [
        conv for name, conv in model.named_modules()
        if isinstance(conv, tuple(LAYERS)) and (which is None or which(name, conv))
    ]
    if not convs:
        raise ValueError(
            f'{type(model).__name__}: '
            + ('it contains no' if which is None else 'the argument `which` selects no')
            + ' Conv1d, Conv2d or Conv3d'
        )
    parametrizations = {
        conv: DiracParametrization(conv).requires_grad_(conv.weight.requires_grad)
        for conv in convs if not (isinstance(conv, _DiracConv) or is_parametrized(conv))
    }
    for conv, parametrization in parametrizations.items():
        if type(conv) in LAYERS and 'forward' not in vars(conv):
            conv.__class__ = LAYERS[type(conv)]  # every reference to this module stays valid
            conv.alpha, conv.beta = parametrization.alpha, parametrization.beta
        else:
            parametrize.register_parametrization(conv, 'weight', parametrization)
            conv.parametrizations.train(conv.training)
    return model
