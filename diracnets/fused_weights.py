"""W_hat of all layers of a model at once: a few large operations in place of many small ones.

On CUDA it is one Triton kernel, and one more in the backward pass. With many small kernels for
W_hat, a step of DiracNet-28-1 took 1.5 times as long as with W on an H100 (docs/speed.md).
"""

import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from diracconv import add_delta, dirac_weight

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU
    triton = None

MAX_FUSED = 2**14  # maximum elements of a filter that one Triton program processes


def dirac_weights(convs: Sequence[nn.Module], dtype: torch.dtype | None = None,
                  inputs: Tensor | None = None) -> dict[nn.Module, Tensor]:
    """Returns W_hat of each layer; layers of one shape are computed together.

    They are like the groups of one convolution: a few large operations take less time than many
    small ones. On CUDA, one Triton kernel computes all layers. convs: DiracConv1d, 2d or 3d. dtype:
    of the results (default: that of the weights). inputs: (N, C, H, W), in whose memory format the
    kernel writes the results.
    """
    if _are_fusible(convs):
        channels_last = inputs is not None and inputs.is_contiguous(
            memory_format=torch.channels_last)
        params = [getattr(conv, name) for name in ('weight', 'alpha', 'beta') for conv in convs]
        groups = tuple(conv.groups for conv in convs)
        return dict(zip(convs, FusedWeights.apply(groups, dtype, channels_last, *params)))
    by_shape = {}
    for conv in convs:
        key = conv.weight.shape, conv.groups, conv.weight.dtype, conv.weight.device
        by_shape.setdefault(key, []).append(conv)
    w_hats = {}
    for (_, groups, weight_dtype, _), layers in by_shape.items():
        weight, alpha, beta = (torch.cat([getattr(layer, name) for layer in layers])
                               for name in ('weight', 'alpha', 'beta'))
        w_hat = dirac_weight(weight, alpha, beta, groups * len(layers)).to(dtype or weight_dtype)
        w_hats.update(zip(layers, w_hat.chunk(len(layers))))
    return w_hats


# ---------------------------------------------------------------- CUDA


if triton:
    @triton.jit
    def _forward_kernel(w_hat, weight, alpha, beta, starts, sizes, deltas,
                        taps: tl.constexpr, block: tl.constexpr):
        """Computes W_hat of one filter. taps: of a kernel, if W_hat is channels last, else 1."""
        row, c = tl.program_id(0), tl.arange(0, block)
        start, n, delta = tl.load(starts + row), tl.load(sizes + row), tl.load(deltas + row)
        w = tl.load(weight + start + c, c < n, 0.0)
        norm = tl.sqrt(tl.maximum(tl.sum(w * w), 1e-24))  # NORM_EPS squared
        out = tl.load(beta + row) / norm * w + tl.where(c == delta, tl.load(alpha + row), 0.0)
        tl.store(w_hat + start + c % taps * (n // taps) + c // taps, out, c < n)

    @triton.jit
    def _backward_kernel(grad_weight, grad_alpha, grad_beta, grad, weight, beta, starts, sizes,
                         deltas, taps: tl.constexpr, block: tl.constexpr):
        """Computes the gradients of one filter from that of its W_hat."""
        row, c = tl.program_id(0), tl.arange(0, block)
        start, n, delta = tl.load(starts + row), tl.load(sizes + row), tl.load(deltas + row)
        g = tl.load(grad + start + c % taps * (n // taps) + c // taps, c < n, 0.0)
        g = g.to(tl.float32)
        w = tl.load(weight + start + c, c < n, 0.0)
        square = tl.sum(w * w)
        norm = tl.sqrt(tl.maximum(square, 1e-24))
        dot = tl.sum(g * w)
        radial = tl.where(square > 1e-24, dot / norm / norm, 0.0)  # the norm does not change there
        tl.store(grad_weight + start + c, tl.load(beta + row) / norm * (g - radial * w), c < n)
        tl.store(grad_alpha + row, tl.sum(tl.where(c == delta, g, 0.0)))
        tl.store(grad_beta + row, dot / norm)


class FusedWeights(torch.autograd.Function):
    """W_hat of several layers, computed by one kernel, and its gradients by another.

    apply(groups, dtype, channels_last, *params) returns a tuple of W_hats. params: the weights of
    n layers with kernels of one size in float32, then their alphas, then their betas. Second
    gradients are those of `dirac_weight`.
    """

    @staticmethod
    def forward(ctx, groups, dtype, channels_last, *params):
        ctx.save_for_backward(*params)
        ctx.groups, ctx.channels_last = groups, channels_last
        n = len(groups)
        weights, (weight, alpha, beta) = params[:n], _packed(params, n)
        w_hat = torch.empty_like(weight, dtype=dtype)
        _launch(_forward_kernel, groups, channels_last, weights, w_hat, weight, alpha, beta)
        parts = w_hat.split([w.numel() for w in weights])
        return tuple(
            part.view(len(w), *w.shape[2:], -1).movedim(-1, 1) if channels_last else part.view_as(w)
            for part, w in zip(parts, weights))

    @staticmethod
    def backward(ctx, *grads):
        params, n, second = ctx.saved_tensors, len(ctx.groups), torch.is_grad_enabled()
        if second or is_batchedtensor(grads[0]) or is_legacy_batchedtensor(grads[0]):
            with torch.enable_grad():
                w_hats = [dirac_weight(*layer, groups).to(grad.dtype)
                          for *layer, groups, grad in zip(
                              params[:n], params[n : 2 * n], params[2 * n :], ctx.groups, grads)]
            needed = [p for p, need in zip(params, ctx.needs_input_grad[3:]) if need]
            computed = iter(torch.autograd.grad(w_hats, needed, grads, create_graph=second))
            results = [next(computed) if need else None for need in ctx.needs_input_grad[3:]]
            return None, None, None, *results
        grad = torch.cat([(g.movedim(1, -1) if ctx.channels_last else g).flatten() for g in grads])
        weight, beta = _packed(params[:n] + params[2 * n :], n)
        outputs = torch.empty_like(weight), torch.empty_like(beta), torch.empty_like(beta)
        _launch(_backward_kernel, ctx.groups, ctx.channels_last, params[:n], *outputs, grad, weight,
                beta)
        parts = [part for i, output in enumerate(outputs)
                 for part in output.split([p.numel() for p in params[i * n : (i + 1) * n]])]
        return None, None, None, *(part.view_as(p) for part, p in zip(parts, params))


def _packed(params, n):
    """Concatenates the elements of each n parameters, such as all weights and all betas."""
    return [torch.cat([p.flatten() for p in params[i : i + n]]) for i in range(0, len(params), n)]


def _launch(kernel, groups, channels_last, weights, *tensors):
    """Runs a kernel with one program for each filter."""
    filters = _filters(tuple(w.shape for w in weights), groups, weights[0].device)
    taps = math.prod(weights[0].shape[2:]) if channels_last else 1
    block = triton.next_power_of_2(max(math.prod(w.shape[1:]) for w in weights))
    with torch.cuda.device_of(weights[0]):
        kernel[len(filters[0]),](*tensors, *filters, taps, block,
                                 num_warps=min(max(block // 512, 1), 16))


@functools.lru_cache(maxsize=64)
def _filters(shapes, groups, device):
    """Returns the start of each filter in the packed weights, its size, and the index of its delta.

    Three tensors (filters,). The index is -1 for filters without delta.
    """
    sizes, deltas = [], []
    for shape, n in zip(shapes, groups):
        delta = add_delta(torch.zeros(shape), torch.ones(shape[0]), n).flatten(1)
        sizes.append(torch.full((len(delta),), delta.shape[1]))
        deltas.append(torch.where(delta.any(1), delta.argmax(1), -1))
    sizes = torch.cat(sizes)
    return tuple(t.to(device) for t in (sizes.cumsum(0) - sizes, sizes, torch.cat(deltas)))


def _are_fusible(convs):
    """Returns whether FusedWeights can compute the W_hats of layers."""
    if (triton is None or not convs or not convs[0].weight.is_cuda
            or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        return False
    device = convs[0].weight.device
    params = [p for conv in convs for p in (conv.weight, conv.alpha, conv.beta)]
    return (
        all(type(p) is nn.Parameter and p.dtype == torch.float32 and p.device == device
            for p in params)
        and len({conv.kernel_size for conv in convs}) == 1
        and max(math.prod(conv.weight.shape[1:]) for conv in convs) <= MAX_FUSED
        and _kernels_work(device)
    )


@functools.cache
def _kernels_work(device):
    """Returns whether the kernels run on a device, with correct results; warns if not."""
    try:
        # the hooks of checkpointing, in which the first call may be, must not see these tensors
        with (torch.inference_mode(False), torch.enable_grad(),
              torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)):
            params = [torch.linspace(-1, 2, n, device=device).view(shape).requires_grad_()
                      for n, shape in ((108, (4, 3, 3, 3)), (4, (4,)), (4, (4,)))]
            pairs = zip(*([w_hat, *torch.autograd.grad(w_hat.square().sum(), params)] for w_hat in (
                FusedWeights.apply((1,), None, True, *params)[0], dirac_weight(*params))))
            for fused, expected in pairs:
                torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
        return True
    except Exception as error:  # Triton, which needs a C compiler, may raise almost any
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        warnings.warn(f'W_hat is computed without Triton, which is slower ({reason})', stacklevel=2)
        return False
