"""Asymmetric Convolution Block, ACB (Ding et al., arXiv 1908.03930)."""

from collections.abc import Iterator

from torch import Tensor, nn

from diracnets.models.diverse_branch import KernelBias, MultiBranchBlock, fuse_bn, pad_kernel


class ACBlock(MultiBranchBlock):
    """Sum of kxk, kx1 and 1xk convolutions, each with a batch norm, then the nonlinearity.

    (N, in, H, W) to (N, out, H', W'). The arguments and the errors are those of MultiBranchBlock.
    """

    deployed_name = 'fused_conv'
    branches = ('square', 'ver', 'hor')  # in the keys of the published state dicts

    def make_branches(self, cin, cout, k, stride, padding, dilation, groups):
        for name, size in zip(self.branches, [(k, k), (k, 1), (1, k)]):
            branch_padding = tuple(length // 2 for length in size)
            conv = nn.Conv2d(cin, cout, size, stride, branch_padding, groups=groups, bias=False)
            self.add_module(f'{name}_conv', conv)
            self.add_module(f'{name}_bn', nn.BatchNorm2d(cout))

    def _layers(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        for name in self.branches:
            yield getattr(self, f'{name}_conv'), getattr(self, f'{name}_bn')

    def sum_branches(self, x: Tensor) -> Tensor:
        return sum(bn(conv(x)) for conv, bn in self._layers())  # (N, out, H', W')

    def equivalent_branches(self) -> Iterator[KernelBias]:
        """Yields each branch as one kxk convolution."""
        for conv, bn in self._layers():
            kernel, bias = fuse_bn(conv.weight, bn)
            yield pad_kernel(kernel, self.kernel_size), bias
