"""The Triton kernels of diracnets/fused_weights.py, without a GPU."""

import os
import subprocess
import sys

import pytest

from diracnets import fused_weights
from pages import ROOT

triton = pytest.importorskip('triton')


def test_kernels_in_the_interpreter():
    """Results, gradients and launches: see tests/interpreted_kernels.py."""
    arguments = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/interpreted_kernels.py']
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'TRITON_INTERPRET': '1'})
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('kernel', ['_forward_kernel', '_backward_kernel'])
def test_kernels_compile_for_a_gpu(kernel, monkeypatch, tmp_path):
    """To machine code of an H100, without one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    function = getattr(fused_weights, kernel)
    names = function.arg_names
    types = {'w_hat': '*bf16', 'grad': '*bf16', **dict.fromkeys(names[-5:-2], '*i64'),
             'taps': 'constexpr', 'block': 'constexpr'}
    source = ASTSource(function, {name: types.get(name, '*fp32') for name in names}, constexprs={
        (names.index('taps'),): 9, (names.index('block'),): 8192})
    compiled = triton.compile(source, target=GPUTarget('cuda', 90, 32), options={'num_warps': 16})
    assert compiled.asm['cubin']
