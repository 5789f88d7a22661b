"""Dirac parameterisation of convolutions (Zagoruyko & Komodakis, arXiv 1706.00388, section 3).

Each filter of a convolution is

    W_hat = diag(alpha) * delta + diag(beta) * normalize(W)                                (eq. 3)

where `delta` is the identity kernel: convolving with it returns the input. The functional form is
`dirac_weight`; `DiracConv1d/2d/3d` are drop-in layers, and `DiracParametrization` gives any
existing convolution the same weights through `torch.nn.utils.parametrize`. `dirac` does so for all
convolutions of a network.

    conv = DiracConv2d(64, 64, kernel_size=3, padding=1)
    plain = conv.fold()                     # nn.Conv2d with the same output
    network = dirac(network)                # diracnets.fold undoes it
"""

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

ALPHA_INIT, BETA_INIT = 1.0, 0.1
NORM_EPS = 1e-12  # of torch.nn.functional.normalize


# ---------------------------------------------------------------- W_hat


def _w_hat(weight, alpha, beta, groups):
    """Equation 3: what `dirac_weight` computes."""
    scale = beta / _filter_norms(weight)                    # one number for each filter
    w_hat = _per_filter(scale, weight) * weight             # diag(beta) * normalize(W)
    return add_delta(w_hat, alpha, groups)                  # + diag(alpha) * delta


def dirac_weight(weight, alpha, beta, groups=1):
    """Computes W_hat = diag(alpha) * delta + diag(beta) * normalize(weight) (eq. 3).

    Differentiable in all three, twice, in reverse and in forward mode, and under torch.func. An
    all-zero filter gives `alpha * delta`; no gradient is NaN.

    weight: (out, in / groups, *kernel_size); alpha, beta: (out,).
    Returns a tensor of the weight's shape. The arithmetic is `_w_hat`'s.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # which read plain arithmetic alone
        return _w_hat(weight, alpha, beta, groups)
    return _DiracWeight.apply(weight, alpha, beta, groups)


fx.wrap('dirac_weight')  # one step of a symbolic trace, of which shapes are not known


def _least_norm(dtype):
    # 1e-12 is zero in float16, and zero over zero is NaN: there the smallest normal number serves
    return max(NORM_EPS, torch.finfo(dtype).tiny)


def _filter_norms(weight, dtype=None):
    """Returns (out,): the L2 norm of each filter, never below the epsilon of F.normalize."""
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=dtype)
    return norms.clamp_min(_least_norm(weight.dtype))


def _where_norms_vary(values, norms, weight):
    """Values of each filter, but zero where its norm is the epsilon, a constant."""
    return values.masked_fill(norms <= _least_norm(weight.dtype), 0)


def _per_filter(values, weight):
    """Views `values` (out,) so that it broadcasts over the filters of `weight` (out, ...)."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def normalize(weight):
    """Divides each filter, everything but dimension 0, by its L2 norm (an all-zero one stays zero).

    weight: (out, in / groups, *kernel_size); the result has the same shape.
    """
    return weight / _per_filter(_filter_norms(weight), weight)


def _delta_ones(weight, groups):
    """Where delta is one in a group's flattened weight: a slice, of min(out, in) / groups."""
    channels, kernel_size = weight.shape[1], weight.shape[2:]
    centre = 0
    for size in kernel_size:
        centre = centre * size + size // 2
    step = (channels + 1) * kernel_size.numel()  # to the next channel of the next filter
    ones = min(weight.shape[0] // groups, channels)
    return slice(centre, centre + (ones - 1) * step + 1, step)


def add_delta(weight, alpha, groups=1):
    """Returns weight + diag(alpha) * delta.

    Filter o of a group passes input channel o of that group through its tap `kernel_size // 2`, as
    in `torch.nn.init.dirac_`: the middle of an odd kernel, the tap after the middle of an even one
    (identity then needs padding `kernel_size // 2`, and the output one element longer is cut). A
    filter whose number in its group is at or above `in / groups` passes none.

    weight: (out, in / groups, *kernel_size); alpha: (out,).
    """
    flat, ones = weight.reshape(groups, -1), _delta_ones(weight, groups)
    taps = flat[:, ones]
    taps = taps + alpha.reshape(groups, -1)[:, : taps.shape[1]]
    return flat.slice_scatter(taps, 1, ones.start, ones.stop, ones.step).view(weight.shape)


# ---------------------------------------------------------------- layers


class _DiracConv:
    """What the three layers share; each also inherits from the nn.Conv of its dimension."""

    plain = None  # the nn.Conv class

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode='zeros',
        device=None,
        dtype=None,
    ):
        for name, value in {'in_channels': in_channels, 'out_channels': out_channels}.items():
            _check_numbers(name, value, 1, 1)
        ndim = int(self.plain.__name__[-2])  # Conv2d: 2
        for name, value in {
            'kernel_size': kernel_size, 'stride': stride, 'dilation': dilation
        }.items():
            _check_numbers(name, value, ndim, 1)
        if not isinstance(padding, str):
            _check_numbers('padding', padding, ndim, 0)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )
        like_weight = {'device': device, 'dtype': dtype}
        self.alpha = nn.Parameter(torch.full((out_channels,), ALPHA_INIT, **like_weight))
        self.beta = nn.Parameter(torch.full((out_channels,), BETA_INIT, **like_weight))

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, 'alpha'):  # nn.Conv's constructor calls this before there is one
            nn.init.constant_(self.alpha, ALPHA_INIT)
            nn.init.constant_(self.beta, BETA_INIT)

    def transform_weight(self):
        """Returns W_hat, differentiable: (out_channels, in_channels / groups, *kernel_size)."""
        return dirac_weight(self.weight, self.alpha, self.beta, self.groups)

    def forward(self, input):
        return self._conv_forward(input, self.transform_weight(), self.bias)

    @torch.no_grad()
    def fold(self):
        """Returns the plain nn.Conv1d, nn.Conv2d or nn.Conv3d that has the same output.

        Raises ValueError for a layer of a subclass with a forward of its own.
        """
        check_forward(self, LAYERS[self.plain])
        conv = self.plain(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
            self.dilation, self.groups, self.bias is not None, self.padding_mode,
            self.weight.device, self.weight.dtype,
        )
        conv.weight.copy_(self.transform_weight())
        if self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys,
                              unexpected_keys, error_msgs):
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + 'delta' in unexpected_keys:  # the original layers saved theirs, dense
            unexpected_keys.remove(prefix + 'delta')


class DiracConv1d(_DiracConv, nn.Conv1d):
    """nn.Conv1d with Dirac-parameterised weights: (N, C, L) to (N, out_channels, L').

    Arguments, their order and the errors are those of nn.Conv1d, so the fourth positional one is
    the stride (in the original layers it was the padding). Learns `weight`, `bias`, and per output
    channel `alpha` (starts at 1) and `beta` (starts at 0.1). Raises ValueError for bad arguments.
    """

    plain = nn.Conv1d


class DiracConv2d(_DiracConv, nn.Conv2d):
    """nn.Conv2d with Dirac-parameterised weights: (N, C, H, W) to (N, out_channels, H', W').

    As `DiracConv1d` otherwise.
    """

    plain = nn.Conv2d


class DiracConv3d(_DiracConv, nn.Conv3d):
    """nn.Conv3d with Dirac-parameterised weights: (N, C, D, H, W) to (N, out_channels, D', H', W').

    As `DiracConv1d` otherwise.
    """

    plain = nn.Conv3d


class DiracParametrization(nn.Module):
    """W_hat in place of the weight of an existing convolution.

        parametrize.register_parametrization(conv, 'weight', DiracParametrization(conv))
        parametrize.remove_parametrizations(conv, 'weight')          # weights folded

    conv: an nn.Conv1d, nn.Conv2d or nn.Conv3d, whose weight becomes W. Raises ValueError for
    anything else (transposed convolutions keep their filters in dimension 1, lazy ones have none).
    """

    def __init__(self, conv):
        super().__init__()
        if not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or nn.parameter.is_lazy(
            conv.weight
        ):
            raise ValueError(
                f'{type(conv).__name__} cannot be Dirac-parameterised: expected an initialised '
                'Conv1d, Conv2d or Conv3d'
            )
        like_weight = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
        self.groups = conv.groups
        self.alpha = nn.Parameter(torch.full((conv.out_channels,), ALPHA_INIT, **like_weight))
        self.beta = nn.Parameter(torch.full((conv.out_channels,), BETA_INIT, **like_weight))

    def forward(self, weight):
        return dirac_weight(weight, self.alpha, self.beta, self.groups)


def check_forward(layer, base):
    """Raises ValueError for a layer of a subclass of `base` with a forward of its own."""
    if type(layer).forward is not base.forward:
        raise ValueError(
            f'{type(layer).__name__} has a forward of its own: expected a {base.__name__}, or a '
            'module that contains one'
        )


def is_parametrized(layer):
    """Tells whether a layer has a DiracParametrization of its weight."""
    return parametrize.is_parametrized(layer, 'weight') and any(
        isinstance(p, DiracParametrization) for p in layer.parametrizations.weight
    )


def _check_numbers(name, value, ndim, least):
    """Raises ValueError unless `value` is an integer, or `ndim` of them, of at least `least`.

    nn.Conv checks the rest: groups, the words for padding and padding_mode.
    """
    numbers = value if isinstance(value, (tuple, list)) else (value,) * ndim
    if len(numbers) != ndim or not all(isinstance(n, Integral) and n >= least for n in numbers):
        expected = f'an integer of at least {least}' + (f', or {ndim} of them' if ndim > 1 else '')
        raise ValueError(f'{name} is {value!r}: expected {expected}')


# ---------------------------------------------------------------- networks

LAYERS = {layer.plain: layer for layer in (DiracConv1d, DiracConv2d, DiracConv3d)}


def dirac(network, which=None):
    """Dirac-parameterises the convolutions of a network, in place: returns the network.

    network: any nn.Module, itself a convolution, perhaps. which: a function of a convolution's name
    in it and of the convolution, to whether that one is meant; without, all are. For instance, as
    in DiracNets, in which the first one, that sees the images, is an ordinary one:

        dirac(network, lambda name, conv: conv.in_channels > 3 and conv.kernel_size == (3, 3))

    Each nn.Conv1d, 2d and 3d becomes a DiracConv1d, 2d or 3d: the same module, with its weight as
    W, its hooks and its places in the network, and with new parameters `alpha`, which starts at 1,
    and `beta`, at 0.1, of the weight's dtype and device, that require grad if the weight does. A
    subclass keeps its own forward, and gets a DiracParametrization. Make the optimizer afterwards,
    and wrap the network (DDP, say), as both have to know alpha and beta. Every stride, padding,
    padding mode, dilation and number of groups is welcome. What is Dirac-parameterised already
    stays as it is. Transposed convolutions stay as they are too: their filters lie in dimension 1.
    So does the arithmetic of a module that reads the weight of a convolution and never calls it.

    As W is normalised, the outputs change, also of a trained network, unless alpha is set to 0 and
    beta to the norms of the filters, where W_hat is W. `diracnets.fold` makes plain convolutions of
    them again. Raises ValueError, and changes nothing, if a lazy convolution, whose weight is not
    there yet, is among them, or if none is: neither new nor already Dirac-parameterised.
    """
    convs = [
        conv for name, conv in network.named_modules()
        if isinstance(conv, tuple(LAYERS)) and (which is None or which(name, conv))
    ]
    if not convs:
        raise ValueError(
            f'{type(network).__name__}: none of its modules is '
            + ('a convolution' if which is None else 'a convolution that is meant')
            + ': expected a Conv1d, Conv2d or Conv3d'
        )
    added_to = {
        conv: DiracParametrization(conv).requires_grad_(conv.weight.requires_grad)
        for conv in convs if not (isinstance(conv, _DiracConv) or is_parametrized(conv))
    }
    for conv, added in added_to.items():
        if type(conv) in LAYERS:
            conv.__class__ = LAYERS[type(conv)]  # who holds this module, holds the new one
            conv.alpha, conv.beta = added.alpha, added.beta
        else:
            parametrize.register_parametrization(conv, 'weight', added)
            conv.parametrizations.train(conv.training)
    return network


# ---------------------------------------------------------------- gradients


class _DiracWeight(torch.autograd.Function):
    """`_w_hat`, with its gradients written out: those of autograd take longer.

    With v = W / ||W||, of each filter, and G the gradient of W_hat:

        dbeta = <G, v>        dalpha = G at the one of delta        dW = beta / ||W|| (G - dbeta v)

    They are made of differentiable steps, so that they have gradients in turn (autograd's own
    second ones of the norm are NaN for an all-zero filter).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, alpha, beta, groups):
        return _w_hat(weight, alpha, beta, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, _, beta, ctx.groups = inputs
        ctx.save_for_backward(weight, beta)
        ctx.save_for_forward(weight, beta)

    @staticmethod
    def backward(ctx, grad):
        weight, beta = ctx.saved_tensors
        grad = grad.contiguous()  # of another dtype than W where W_hat is: CUDA's autocast
        norms = _filter_norms(weight, grad.dtype)
        grad_beta = torch.linalg.vecdot(grad.flatten(1), weight.flatten(1).to(grad.dtype)) / norms
        slope = _where_norms_vary(grad_beta / norms, norms, weight)
        grad_weight = torch.addcmul(grad, weight, _per_filter(slope, weight), value=-1)
        taps = grad.view(ctx.groups, -1)[:, _delta_ones(weight, ctx.groups)]
        without = len(beta) // ctx.groups - taps.shape[1]  # filters of a group, at its end
        grad_alpha = F.pad(taps, (0, without)).flatten()
        return grad_weight * _per_filter(beta / norms, weight), grad_alpha, grad_beta, None

    @staticmethod
    def jvp(ctx, d_weight, d_alpha, d_beta, _):
        """Returns d(W_hat) = d(beta / ||W||) W + beta / ||W|| dW + diag(d(alpha)) * delta."""
        weight, beta = ctx.saved_tensors
        norms = _filter_norms(weight)
        d_norms = (d_weight * weight).flatten(1).sum(dim=1) / norms  # autocast lowers a vecdot
        d_norms = _where_norms_vary(d_norms, norms, weight)
        scale = beta / norms
        d_scale = (d_beta - scale * d_norms) / norms
        d_w_hat = _per_filter(d_scale, weight) * weight + _per_filter(scale, weight) * d_weight
        return add_delta(d_w_hat, d_alpha, ctx.groups)
