"""RepVGG block (Ding et al., arXiv 2101.03697)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diracconv import add_delta
from diracnets.models.diverse_branch import (
    KernelBias,
    MultiBranchBlock,
    branch,
    fuse_bn,
    pad_kernel,
)


class RepVGGBlock(MultiBranchBlock):
    """Sum of kxk, 1x1 and identity branches, each with a batch norm, then the nonlinearity.

    (N, in, H, W) to (N, out, H', W'). The identity needs equal channels and stride 1. The keys of
    the state dict are the published ones, the arguments and the errors those of MultiBranchBlock.
    """

    deployed_name = 'rbr_reparam'

    def make_branches(self, cin, cout, k, stride, padding, dilation, groups):
        def conv_bn(k, stride, padding):
            conv = nn.Conv2d(cin, cout, k, stride, padding, groups=groups, bias=False)
            return branch(conv=conv, bn=nn.BatchNorm2d(cout))

        self.rbr_identity = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None
        self.rbr_dense = conv_bn(k, stride, padding)
        self.rbr_1x1 = conv_bn(1, 1, 0)

    def sum_branches(self, x: Tensor) -> Tensor:
        strided = x[:, :, :: self.stride, :: self.stride]  # not in the 1x1, as in DBB
        out = self.rbr_dense(x) + self.rbr_1x1(strided)  # (N, out, H', W')
        return out if self.rbr_identity is None else out + self.rbr_identity(x)

    def equivalent_branches(self) -> Iterator[KernelBias]:
        """Yields each branch as one kxk convolution."""
        pointwise = self.rbr_1x1.conv.weight
        branches = [(self.rbr_dense.conv.weight, self.rbr_dense.bn), (pointwise, self.rbr_1x1.bn)]
        if self.rbr_identity is not None:
            ones = torch.ones_like(pointwise[:, 0, 0, 0])
            identity = add_delta(torch.zeros_like(pointwise), ones, self.groups)
            branches.append((identity, self.rbr_identity))
        for weight, bn in branches:
            kernel, bias = fuse_bn(weight, bn)
            yield pad_kernel(kernel, self.kernel_size), bias
