"""Diverse Branch Block, DBB (Ding et al., arXiv 2103.13425).

The block trains as parallel branches and deploys as one convolution. The six transforms of section
3.2 are differentiable functions of kernels (out, in / groups, k, k) and biases (out,). Public
methods, state dict keys and constructor arguments are those of the published code, except
`single_init`, which is not implemented.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diracconv import add_delta

KernelBias = tuple[Tensor, Tensor]  # of one convolution

# ---------------------------------------------------------------- the six transforms


def _scale_shift(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Returns the affine map of a batch norm in evaluation mode: scale (C,), shift (C,)."""
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return scale, bn.bias - bn.running_mean * scale


def fuse_bn(kernel: Tensor, bn: nn.BatchNorm2d) -> KernelBias:
    """Transform I: fuses a convolution without bias and its batch norm."""
    scale, shift = _scale_shift(bn)
    return kernel * scale.view(-1, 1, 1, 1), shift


def add_branches(*branches: KernelBias) -> KernelBias:
    """Transform II: fuses branches of equal shape whose outputs are added."""
    kernels, biases = zip(*branches)
    return sum(kernels), sum(biases)


def merge_1x1_kxk(first: KernelBias, second: KernelBias, groups: int = 1) -> KernelBias:
    """Transform III: fuses a 1x1 convolution and the kxk convolution without padding after it.

    first has the shapes (mid, in / groups, 1, 1) and (mid,) and stride 1; second has the shapes
    (out, mid / groups, k, k) and (out,). If the second convolution pads, the padding must be the
    first convolution's response to a zero input.
    """
    merged = []
    for (kernel1, bias1), (kernel2, bias2) in zip(
        zip(*(t.chunk(groups) for t in first)), zip(*(t.chunk(groups) for t in second))
    ):
        kernel = F.conv2d(kernel2, kernel1.transpose(0, 1))
        merged.append((kernel, bias2 + (kernel2 * bias1.view(-1, 1, 1)).sum(dim=(1, 2, 3))))
    return concat_branches(*merged)


def concat_branches(*branches: KernelBias) -> KernelBias:
    """Transform IV: fuses branches whose outputs are concatenated."""
    kernels, biases = zip(*branches)
    return torch.cat(kernels), torch.cat(biases)


def average_as_conv(channels: int, kernel_size: int, groups: int = 1,
                    device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Transform V: average pooling as a kernel (channels, channels / groups, k, k)."""
    kernel = torch.zeros(channels, channels // groups, 1, 1, device=device, dtype=dtype)
    kernel = add_delta(kernel, kernel.new_full((channels,), 1 / kernel_size**2), groups)
    return kernel.expand(-1, -1, kernel_size, kernel_size)


def pad_kernel(kernel: Tensor, size: int) -> Tensor:
    """Transform VI: zero-pads a kernel of odd height and width to (..., size, size)."""
    rows, cols = ((size - length) // 2 for length in kernel.shape[2:])
    return F.pad(kernel, (cols, cols, rows, rows))


# ---------------------------------------------------------------- parts of branches


class IdentityConv1x1(nn.Conv2d):
    """1x1 convolution with the weight identity + W, where W starts at zero: keeps (N, C, H, W)."""

    def __init__(self, channels: int, groups: int = 1):
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        nn.init.zeros_(self.weight)

    def get_actual_kernel(self) -> Tensor:
        """Returns identity + W: (C, C / groups, 1, 1)."""
        return add_delta(self.weight, torch.ones_like(self.weight[:, 0, 0, 0]), self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.get_actual_kernel(), None)


class BNAndPad(nn.Module):
    """Batch norm, then padding with its response to zero: (N, C, H, W) to (N, C, H+2p, W+2p).

    A convolution after it sees the same values as with zero padding before the batch norm, so both
    can be fused. The padding depends on running statistics, also in training, and has no gradient.
    """

    def __init__(self, padding: int, channels: int):
        super().__init__()
        self.padding = padding
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        shift = _scale_shift(self.bn)[1].detach().to(x.dtype)  # float32 would slow down autocast
        padding = [self.padding] * 4
        border = 1 - F.pad(torch.ones_like(x[:1, :1]), padding)  # (1, 1, H + 2p, W + 2p)
        return F.pad(x, padding) + border * shift.view(-1, 1, 1)


def branch(**layers: nn.Module) -> nn.Sequential:
    """Returns the layers of a branch in order, with their names."""
    return nn.Sequential(OrderedDict(layers))


# ---------------------------------------------------------------- blocks


class MultiBranchBlock(nn.Module):
    """Base class of blocks that train as a sum of branches and deploy as one convolution.

    kernel_size is odd, padding is kernel_size // 2, dilation is 1. deploy creates one convolution
    in place of the branches, for a deployed state dict. nonlinear is a module that runs after the
    sum. Subclasses define `make_branches`, `sum_branches` and `equivalent_branches`; options are
    those of their `make_layers`. Raises ValueError for other sizes.
    """

    deployed_name: str  # of the deployed convolution in the published state dicts

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
        padding: int = 0, dilation: int = 1, groups: int = 1, deploy: bool = False,
        nonlinear: nn.Module | None = None, **options: Any,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size {kernel_size}: expected an odd number')
        if padding != kernel_size // 2:
            raise ValueError(f'padding {padding}: expected {kernel_size // 2}, kernel_size // 2')
        if dilation != 1:
            raise ValueError(f'dilation {dilation}: expected 1')
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f'groups {groups}: expected a divisor of {in_channels} and {out_channels} channels'
            )
        self.conv_args = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups
        self.nonlinear = nn.Identity() if nonlinear is None else nonlinear
        self.make_layers(deploy, **options)

    def make_layers(self, deploy: bool) -> None:
        """Creates the deployed convolution, or the branches."""
        if deploy:
            self.add_module(self.deployed_name, nn.Conv2d(*self.conv_args))
        else:
            self.make_branches(*self.conv_args)

    @property
    def deployed(self) -> nn.Conv2d | None:
        """The convolution that replaces the branches, or None."""
        return getattr(self, self.deployed_name, None)

    def forward(self, x: Tensor) -> Tensor:
        out = self.deployed(x) if self.deployed else self.sum_branches(x)
        return self.nonlinear(out)

    def get_equivalent_kernel_bias(self) -> KernelBias:
        """Returns the kernel (out, in / groups, k, k) and bias (out,) of the deployed convolution.

        Both are differentiable in the parameters of all branches. Batch norms are those of
        evaluation mode.
        """
        if self.deployed:
            return self.deployed.weight, self.deployed.bias
        return add_branches(*self.equivalent_branches())

    @torch.no_grad()
    def equivalent_conv(self) -> nn.Conv2d:
        """Returns a new convolution that equals the sum of the branches in evaluation mode."""
        kernel, bias = self.get_equivalent_kernel_bias()
        conv = nn.Conv2d(*self.conv_args, device=kernel.device, dtype=kernel.dtype)
        conv.weight.copy_(kernel)
        conv.bias.copy_(bias)
        conv.requires_grad_(any(parameter.requires_grad for parameter in self.parameters()))
        return conv.train(self.training)

    def switch_to_deploy(self) -> None:
        """Replaces the branches by the deployed convolution, in place."""
        if not self.deployed:
            conv = self.equivalent_conv()
            for name, _ in list(self.named_children()):
                if name != 'nonlinear':
                    delattr(self, name)
            self.add_module(self.deployed_name, conv)

    def fold(self) -> nn.Module:
        """Returns a standard layer that equals the block in evaluation mode."""
        conv = self.equivalent_conv()
        if isinstance(self.nonlinear, nn.Identity):
            return conv
        return nn.Sequential(OrderedDict(conv=conv, nonlinear=self.nonlinear))


class DiverseBranchBlock(MultiBranchBlock):
    """Sum of four branches, then the nonlinearity: (N, in, H, W) to (N, out, H', W').

    The branches are kxk, 1x1, 1x1 and average pooling, 1x1 and kxk (section 3.3). Each convolution
    and pooling has a batch norm. A depthwise block has no 1x1 branch and no 1x1 convolution before
    the pooling; its last branch has twice the input width between 1x1 and kxk.

    internal_channels_1x1_3x3 is the width between 1x1 and kxk, by default the input width. The
    other arguments and the errors are those of MultiBranchBlock.
    """

    deployed_name = 'dbb_reparam'

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
        padding: int = 0, dilation: int = 1, groups: int = 1,
        internal_channels_1x1_3x3: int | None = None, deploy: bool = False,
        nonlinear: nn.Module | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deploy,
            nonlinear, internal=internal_channels_1x1_3x3,
        )

    def make_layers(self, deploy: bool, internal: int | None) -> None:
        in_channels, out_channels, *_, groups = self.conv_args
        self.depthwise = groups == in_channels == out_channels
        self.internal = internal or in_channels * (1 + self.depthwise)
        if self.internal % groups:
            raise ValueError(
                f'internal_channels_1x1_3x3 {self.internal}: expected a multiple of {groups} groups'
            )
        super().make_layers(deploy)

    def make_branches(self, cin, cout, k, stride, padding, dilation, groups):
        def conv(cin, cout, k, stride=1, padding=0):
            return nn.Conv2d(cin, cout, k, stride, padding, groups=groups, bias=False)

        self.dbb_origin = branch(conv=conv(cin, cout, k, stride, padding), bn=nn.BatchNorm2d(cout))
        if self.depthwise:
            self.dbb_avg = branch(avg=nn.AvgPool2d(k, stride, padding), avgbn=nn.BatchNorm2d(cout))
        else:
            self.dbb_1x1 = branch(conv=conv(cin, cout, 1), bn=nn.BatchNorm2d(cout))
            self.dbb_avg = branch(
                conv=conv(cin, cout, 1), bn=BNAndPad(padding, cout),
                avg=nn.AvgPool2d(k, stride), avgbn=nn.BatchNorm2d(cout),
            )
        first = (
            {'idconv1': IdentityConv1x1(cin, groups)} if self.internal == cin
            else {'conv1': conv(cin, self.internal, 1)}
        )
        self.dbb_1x1_kxk = branch(
            **first, bn1=BNAndPad(padding, self.internal),
            conv2=conv(self.internal, cout, k, stride), bn2=nn.BatchNorm2d(cout),
        )

    def sum_branches(self, x: Tensor) -> Tensor:
        out = self.dbb_origin(x) + self.dbb_avg(x) + self.dbb_1x1_kxk(x)  # (N, out, H', W')
        if self.depthwise:
            return out
        # a 1x1 convolution with a stride crashes in the backward pass with channels_last inputs on
        # CPUs without AVX-512: oneDNN 3.13 writes past the end of the gradient
        return out + self.dbb_1x1(x[:, :, :: self.stride, :: self.stride])

    def equivalent_branches(self) -> Iterator[KernelBias]:
        """Yields each branch as one kxk convolution."""
        origin, average, k = self.dbb_origin, self.dbb_avg, self.kernel_size
        weight = origin.conv.weight
        yield fuse_bn(weight, origin.bn)
        pooling = average_as_conv(len(weight), k, self.groups, weight.device, weight.dtype)
        pooling = fuse_bn(pooling, average.avgbn)
        if self.depthwise:
            yield pooling
        else:
            kernel, bias = fuse_bn(self.dbb_1x1.conv.weight, self.dbb_1x1.bn)
            yield pad_kernel(kernel, k), bias
            pointwise = fuse_bn(average.conv.weight, average.bn.bn)
            yield merge_1x1_kxk(pointwise, pooling, self.groups)
        last = self.dbb_1x1_kxk
        kernel = (
            last.idconv1.get_actual_kernel() if hasattr(last, 'idconv1') else last.conv1.weight
        )
        yield merge_1x1_kxk(
            fuse_bn(kernel, last.bn1.bn), fuse_bn(last.conv2.weight, last.bn2), self.groups
        )
