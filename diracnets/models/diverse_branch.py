"""Diverse Branch Block (Ding et al., arXiv 2103.13425) and ACB (Ding et al., arXiv 1908.03930).

Blocks that train as several branches and deploy as one convolution. The six transforms, section
3.2 of the former, are functions of kernels (out, in / groups, k, k) and biases (out,); all are
differentiable. Arguments, methods and keys are named as in the published DBB; those that nothing
here uses are kept for code and weights that were made with it.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from diracconv import add_delta

# ---------------------------------------------------------------- the six transforms


def _scale_and_shift(bn):
    """What a batch norm does to a channel in evaluation: (scale (C,), shift (C,))."""
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return scale, bn.bias - bn.running_mean * scale


def fuse_bn(kernel, bn):
    """Transform I: a convolution without bias and its batch norm as one: (kernel, bias)."""
    scale, shift = _scale_and_shift(bn)
    return kernel * scale.view(-1, 1, 1, 1), shift


def add_branches(*branches):
    """Transform II: the sum of branches (kernel, bias) of equal shapes as one: (kernel, bias)."""
    kernels, biases = zip(*branches)
    return sum(kernels), sum(biases)


def merge_1x1_kxk(first, second, groups=1):
    """Transform III: a 1x1 convolution, then a kxk one without padding, as one kxk one.

    first: (kernel (mid, in / groups, 1, 1), bias (mid,)), stride 1; second: (kernel
    (out, mid / groups, k, k), bias (out,)). Returns (kernel (out, in / groups, k, k), bias (out,)).
    If the second pads, what the first makes of zero must be what it pads with.
    """
    merged = []
    for (kernel1, bias1), (kernel2, bias2) in zip(
        zip(*(t.chunk(groups) for t in first)), zip(*(t.chunk(groups) for t in second))
    ):
        kernel = F.conv2d(kernel2, kernel1.transpose(0, 1))
        merged.append((kernel, bias2 + (kernel2 * bias1.view(-1, 1, 1)).sum(dim=(1, 2, 3))))
    return concat_branches(*merged)


def concat_branches(*branches):
    """Transform IV: branches (kernel, bias) whose outputs are concatenated as one."""
    kernels, biases = zip(*branches)
    return torch.cat(kernels), torch.cat(biases)


def average_as_conv(channels, kernel_size, groups=1, device=None, dtype=None):
    """Transform V: average pooling as a kernel (channels, channels / groups, k, k)."""
    kernel = torch.zeros(channels, channels // groups, 1, 1, device=device, dtype=dtype)
    kernel = add_delta(kernel, kernel.new_full((channels,), 1 / kernel_size**2), groups)
    return kernel.expand(-1, -1, kernel_size, kernel_size)


def pad_kernel(kernel, size):
    """Transform VI: zeros around a kernel of odd height and width, (..., size, size)."""
    rows, cols = ((size - length) // 2 for length in kernel.shape[2:])
    return F.pad(kernel, (cols, cols, rows, rows))


# ---------------------------------------------------------------- what the branches are made of


class IdentityConv1x1(nn.Conv2d):
    """A 1x1 convolution with identity + W, W starting at zero: (N, C, H, W) to the same."""

    def __init__(self, channels, groups=1):
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        nn.init.zeros_(self.weight)

    def get_actual_kernel(self):
        """Returns identity + W: (C, C / groups, 1, 1)."""
        return add_delta(self.weight, torch.ones_like(self.weight[:, 0, 0, 0]), self.groups)

    def forward(self, x):
        return self._conv_forward(x, self.get_actual_kernel(), None)


class BNAndPad(nn.Module):
    """Batch norm, then padding with what it makes of zero: (N, C, H, W) to (N, C, H+2p, W+2p).

    So the convolution behind it sees what it would see of a zero-padded input, and the two merge.
    The padding is made of running statistics, in training too, and passes no gradient.
    """

    def __init__(self, padding, channels):
        super().__init__()
        self.padding = padding
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = self.bn(x)
        _, shift = _scale_and_shift(self.bn)
        padding = [self.padding] * 4
        border = 1 - F.pad(torch.ones_like(x[:1, :1]), padding)  # (1, 1, H + 2p, W + 2p)
        return F.pad(x, padding) + border * shift.detach().view(-1, 1, 1)


def _branch(**layers):
    return nn.Sequential(OrderedDict(layers))


# ---------------------------------------------------------------- the blocks


class _Branches(nn.Module):
    """What the two blocks share: the arguments, and the convolution they deploy as."""

    deployed_name = None  # of that convolution, as published

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                 nonlinear):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size {kernel_size}: expected an odd one')
        if padding != kernel_size // 2:
            raise ValueError(f'padding {padding}: expected {kernel_size // 2}, kernel_size // 2')
        if dilation != 1:
            raise ValueError(f'dilation {dilation}: expected 1')
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f'groups {groups}: expected a divisor of {in_channels} and {out_channels} channels'
            )
        self.conv_arguments = (
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        )
        self.kernel_size, self.groups = kernel_size, groups
        self.nonlinear = nn.Identity() if nonlinear is None else nonlinear

    def make(self, deploy):
        """Makes the one convolution, or the branches."""
        if deploy:
            self.add_module(self.deployed_name, nn.Conv2d(*self.conv_arguments))
        else:
            self.make_branches(*self.conv_arguments)

    @property
    def deployed(self):
        """The convolution that stands in place of the branches, or None."""
        return getattr(self, self.deployed_name, None)

    def forward(self, x):
        out = self.deployed(x) if self.deployed else self.sum_branches(x)
        return self.nonlinear(out)

    def get_equivalent_kernel_bias(self):
        """Returns the one convolution's kernel (out, in / groups, k, k) and bias (out,).

        Differentiable in all branches' parameters; batch norms count as in evaluation.
        """
        if self.deployed:
            return self.deployed.weight, self.deployed.bias
        return add_branches(*self.equivalent_branches())

    @torch.no_grad()
    def equivalent_conv(self):
        """Returns a new nn.Conv2d with the output that the branches have in evaluation."""
        kernel, bias = self.get_equivalent_kernel_bias()
        conv = nn.Conv2d(*self.conv_arguments, device=kernel.device, dtype=kernel.dtype)
        conv.weight.copy_(kernel)
        conv.bias.copy_(bias)
        return conv.train(self.training)

    def switch_to_deploy(self):
        """Puts the one convolution in place of the branches."""
        if not self.deployed:
            conv = self.equivalent_conv()
            for name, _ in list(self.named_children()):
                if name != 'nonlinear':
                    delattr(self, name)
            self.add_module(self.deployed_name, conv)

    def fold(self):
        """Returns the plain layer with the same output in evaluation."""
        conv = self.equivalent_conv()
        if isinstance(self.nonlinear, nn.Identity):
            return conv
        return nn.Sequential(OrderedDict(conv=conv, nonlinear=self.nonlinear))


class DiverseBranchBlock(_Branches):
    """Four branches summed, then the nonlinearity: (N, in, H, W) to (N, out, H', W').

    kxk; 1x1; 1x1 then average; 1x1 then kxk (section 3.3); each convolution and pooling
    has its batch norm. Depthwise, the 1x1 branch and the 1x1 before the average are left out, and
    1x1 then kxk is twice as wide as the input between them.

    kernel_size: odd; padding: kernel_size // 2; dilation: 1; internal_channels_1x1_3x3: the width
    between 1x1 and kxk, by default that of the input; deploy: one convolution instead, to load
    deployed weights; nonlinear: a module; single_init: start with the kxk branch alone. Raises
    ValueError for other sizes.
    """

    deployed_name = 'dbb_reparam'

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1,
                 groups=1, internal_channels_1x1_3x3=None, deploy=False, nonlinear=None,
                 single_init=False):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, nonlinear
        )
        self.depthwise = groups == in_channels == out_channels
        self.internal = internal_channels_1x1_3x3 or in_channels * (1 + self.depthwise)
        if self.internal % groups:
            raise ValueError(
                f'internal_channels_1x1_3x3 {self.internal}: expected a multiple of {groups} groups'
            )
        self.make(deploy)
        if single_init and not deploy:
            nn.init.ones_(self.dbb_origin.bn.weight)
            for bn in self.last_batch_norms()[1:]:
                nn.init.zeros_(bn.weight)

    def make_branches(self, cin, cout, k, stride, padding, dilation, groups):
        def conv(cin, cout, k, stride=1, padding=0):
            return nn.Conv2d(cin, cout, k, stride, padding, groups=groups, bias=False)

        self.dbb_origin = _branch(
            conv=conv(cin, cout, k, stride, padding), bn=nn.BatchNorm2d(cout)
        )
        if self.depthwise:
            self.dbb_avg = _branch(
                avg=nn.AvgPool2d(k, stride, padding), avgbn=nn.BatchNorm2d(cout)
            )
        else:
            self.dbb_1x1 = _branch(conv=conv(cin, cout, 1), bn=nn.BatchNorm2d(cout))
            self.dbb_avg = _branch(
                conv=conv(cin, cout, 1), bn=BNAndPad(padding, cout),
                avg=nn.AvgPool2d(k, stride), avgbn=nn.BatchNorm2d(cout),
            )
        first = (
            {'idconv1': IdentityConv1x1(cin, groups)} if self.internal == cin
            else {'conv1': conv(cin, self.internal, 1)}
        )
        self.dbb_1x1_kxk = _branch(
            **first, bn1=BNAndPad(padding, self.internal),
            conv2=conv(self.internal, cout, k, stride), bn2=nn.BatchNorm2d(cout),
        )

    def last_batch_norms(self):
        """The last one of each branch, that of the kxk branch first."""
        pointwise = [] if self.depthwise else [self.dbb_1x1.bn]
        return [self.dbb_origin.bn, *pointwise, self.dbb_avg.avgbn, self.dbb_1x1_kxk.bn2]

    def sum_branches(self, x):
        out = self.dbb_origin(x) + self.dbb_avg(x) + self.dbb_1x1_kxk(x)  # (N, out, H', W')
        if self.depthwise:
            return out
        # a 1x1 convolution that strides itself crashes with images of 3 channels last on CPUs
        # without AVX-512 (oneDNN 3.13): its gradient writes beyond the end of a tensor
        stride = self.conv_arguments[3]
        return out + self.dbb_1x1(x[:, :, ::stride, ::stride])

    def equivalent_branches(self):
        """Yields each branch as one kxk convolution: (kernel, bias)."""
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


class ACBlock(_Branches):
    """Asymmetric convolutions kxk, kx1 and 1xk, each with its batch norm, summed (1908.03930).

    (N, in, H, W) to (N, out, H', W'). Arguments and errors as those of DiverseBranchBlock.
    """

    deployed_name = 'fused_conv'
    branches = ('square', 'ver', 'hor')  # in the names of the published keys

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1,
                 groups=1, deploy=False, nonlinear=None):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, nonlinear
        )
        self.make(deploy)

    def make_branches(self, cin, cout, k, stride, padding, dilation, groups):
        for name, size in zip(self.branches, [(k, k), (k, 1), (1, k)]):
            around = tuple(length // 2 for length in size)
            conv = nn.Conv2d(cin, cout, size, stride, around, groups=groups, bias=False)
            self.add_module(f'{name}_conv', conv)
            self.add_module(f'{name}_bn', nn.BatchNorm2d(cout))

    def _layers(self):
        """Yields (convolution, its batch norm) of each branch."""
        for name in self.branches:
            yield getattr(self, f'{name}_conv'), getattr(self, f'{name}_bn')

    def sum_branches(self, x):
        return sum(bn(conv(x)) for conv, bn in self._layers())  # (N, out, H', W')

    def equivalent_branches(self):
        """Yields each branch as one kxk convolution: (kernel, bias)."""
        for conv, bn in self._layers():
            kernel, bias = fuse_bn(conv.weight, bn)
            yield pad_kernel(kernel, self.kernel_size), bias
