"""A CUDA GPU computes the numbers of the CPU: `python test.py -m gpu`."""

import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from diracconv import DiracConv2d
from diracnet import define_diracnet
from diracnets.deployment import deploy
from diracnets.folding import fold
from diracnets.fused_weights import dirac_weights
from diracnets.network import Network
from diracnets.onnx import to_onnx
from pages import ROOT
from runs import params_of, stats_of, wait_until
from training import data

DIGITS = ('--dataset', 'Digits', '--depth', '10', '--batch_size', '64', '--lr', '0.02')
TIMEOUT = 240  # seconds of a process
GPU = [pytest.mark.gpu,
       pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU and -m gpu')]
on_gpu = pytest.mark.parametrize('device', [pytest.param('cuda', marks=GPU)])
on_both = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=GPU)])


def difference(tensor, expected):
    """Returns the maximum difference of two tensors, relative to the largest expected value."""
    tensor, expected = tensor.detach().cpu().double(), expected.detach().cpu().double()
    return ((tensor - expected).abs().max() / expected.abs().max()).item()


@contextlib.contextmanager
def exact_float32():
    """Turns TF32 off: it has 10 bits of mantissa instead of 23."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Network(*define_diracnet(16, 1, 'CIFAR10'))


@pytest.fixture
def inputs():
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------- arithmetic


def forward_backward(model, device, dtype, autocast=False):
    """Returns logits, {name: gradient} and {name: running statistic} of one training step."""
    model = copy.deepcopy(model).to(device, dtype).train()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (64,), generator=generator).to(device)
    inputs = inputs.to(device, dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        logits = model(inputs)
    F.cross_entropy(logits.to(dtype), labels).backward()
    statistics = {n: b for n, b in model.named_buffers() if 'running_' in n}
    return logits, {n: p.grad for n, p in model.named_parameters()}, statistics


def gradient_vector(gradients, kind):
    """Returns the gradients of 'alpha', 'beta' or of all other parameters ('') as one vector.

    A single gradient may be a sum that nearly cancels, so they are compared as one vector.
    """
    names = [name for name in gradients
             if (name.split('.')[-1] if name.endswith(('.alpha', '.beta')) else '') == kind]
    return torch.cat([gradients[name].cpu().double().flatten() for name in names])


@on_both
@pytest.mark.parametrize(('autocast', 'tolerances'), [
    (False, (1e-4, 1e-2, 1e-4)), (True, (0.1, 0.5, 0.05)),
], ids=['float32', 'bfloat16'])
def test_training_step_matches_float64_of_the_cpu(model, device, autocast, tolerances):
    expected_logits, expected_gradients, expected_statistics = forward_backward(
        model, 'cpu', torch.float64)
    with exact_float32():
        logits, gradients, statistics = forward_backward(model, device, torch.float32, autocast)
    of_logits, of_gradients, of_statistics = tolerances
    assert 0 < difference(logits, expected_logits) <= of_logits
    for name, expected in expected_statistics.items():
        assert difference(statistics[name], expected) <= of_statistics, name
    # tolerances of gradients: two to three times the differences of CPU arithmetic
    for kind in ('alpha', 'beta', ''):
        expected = gradient_vector(expected_gradients, kind)
        error = (gradient_vector(gradients, kind) - expected).norm() / expected.norm()
        assert 0 < error <= of_gradients, kind


@on_gpu
def test_w_hat_takes_few_kernels_and_equals_float64_of_the_cpu(model, inputs, device):
    """One kernel for the forward and one for the backward pass, and what packs the parameters."""
    def w_hats_and_gradients(model):
        convs = [module for module in model.modules() if isinstance(module, DiracConv2d)]
        params = [p for conv in convs for p in (conv.weight, conv.alpha, conv.beta)]
        w_hats = list(dirac_weights(convs, inputs=inputs).values())
        return *w_hats, *torch.autograd.grad(w_hats, params, [w**2 for w in w_hats])

    inputs = inputs.contiguous(memory_format=torch.channels_last)
    model = model.to(device)
    w_hats_and_gradients(model)  # compiles the kernels
    with torch.profiler.profile() as profile:
        results = w_hats_and_gradients(model)
    launches = [event.name for event in profile.events() if event.device_type.name == 'CUDA']
    assert {name for name in launches if 'ward_kernel' in name} == {
        '_forward_kernel', '_backward_kernel'}
    assert len(launches) - len(results) // 4 < 30  # without the squares of this test
    for tensor, expected in zip(results, w_hats_and_gradients(model.cpu().double())):
        assert difference(tensor, expected) <= 1e-5


@on_gpu
@torch.no_grad()
def test_folded_and_deployed_match_the_unfolded_model(model, inputs, device):
    model, inputs = model.to(device).eval(), inputs.to(device)
    with exact_float32():
        expected, folded = model(inputs), fold(model)
        assert difference(folded(inputs), expected) <= 1e-4
        run = deploy(folded, tuple(inputs.shape), torch.float32)
        assert difference(run(inputs), expected) <= 1e-4
    run = deploy(folded, tuple(inputs.shape), torch.bfloat16)
    assert difference(run(inputs), expected) <= 0.05


@on_gpu
@torch.no_grad()
def test_onnx_of_a_gpu_model_matches_on_the_cpu(model, inputs, device):
    onnxruntime = pytest.importorskip('onnxruntime')
    model, inputs = model.to(device).eval(), inputs.to(device)
    session = onnxruntime.InferenceSession(
        to_onnx(fold(model), inputs, {}), providers=['CPUExecutionProvider'])
    logits, = session.run(None, {'inputs': inputs.cpu().numpy()})
    with exact_float32():
        assert difference(torch.from_numpy(logits), model(inputs)) <= 1e-4


@on_gpu
def test_augmented_batch_equals_that_of_the_cpu(device):
    splits = data.load_splits('Digits', pad=4, flip='all', cutout=8)
    moved = splits.train.to(device)
    arrays = [(moved.images, moved.labels)] * 2
    assert torch.equal(data.DataSplits.from_arrays(*arrays).train.images, splits.train.images)
    batch = torch.arange(64), 1, torch.arange(64)
    for expected, tensor in zip(splits.train[batch][:2], splits.train.to(device)[batch][:2]):
        assert torch.equal(tensor.cpu(), expected)


# ---------------------------------------------------------------- processes


def python(*arguments, **variables):
    """Runs Python in the repository and returns its output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=TIMEOUT, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_and_resume(folder, *arguments):
    """Trains, kills the process after its first epoch, and resumes the run."""
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or (folder / 'log.txt').exists(), TIMEOUT)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL  # it had not finished
    python(*arguments)


@on_gpu
def test_killed_run_resumes_bit_identically_when_deterministic(tmp_path, device):
    train = ('train.py', *DIGITS, '--epochs', 6, '--epoch_step', '[6]', '--deterministic',
             '--resume', 'auto', '--save')
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(python, *train, tmp_path / 'whole')
        killed = pool.submit(kill_and_resume, tmp_path / 'killed', *train, tmp_path / 'killed')
        whole.result(), killed.result()
    killed = params_of(tmp_path / 'killed')
    for name, tensor in params_of(tmp_path / 'whole').items():
        assert torch.equal(tensor, killed[name]), name


def accuracy(folder, **variables):
    out = python('train.py', *DIGITS[:2], '--evaluate', '--resume', folder, '--dtype', 'float',
                 **variables)
    return float(re.search(r'test_acc: ([\d.]+)', out)[1])


@on_gpu
def test_checkpoints_have_the_same_accuracy_on_gpu_and_cpu(tmp_path, device):
    on_cpu = {'CUDA_VISIBLE_DEVICES': ''}
    train = ('train.py', *DIGITS, '--epochs', 2, '--epoch_step', '[2]', '--resume', 'auto',
             '--save')
    launcher = ('-m', 'torch.distributed.run', '--nproc_per_node=1', '--standalone')
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda run: python(*run[0], **run[1]), [
            ((*train, tmp_path / 'gpu'), {}), ((*train, tmp_path / 'cpu'), on_cpu),
            ((*launcher, *train, tmp_path / 'launched'), {})]))  # NCCL with one process
        cases = [(tmp_path / name, variables) for name in ('gpu', 'cpu')
                 for variables in ({}, on_cpu)]
        gpu_on_gpu, gpu_on_cpu, cpu_on_gpu, cpu_on_cpu = pool.map(
            lambda case: accuracy(case[0], **case[1]), cases)
    # one of the 360 digits is 0.28 pp
    assert abs(gpu_on_gpu - gpu_on_cpu) <= 0.6
    assert abs(cpu_on_gpu - cpu_on_cpu) <= 0.6
    assert [stats['epoch'] for stats in stats_of(tmp_path / 'launched')] == [1, 2]
    assert 'compile_time' in stats_of(tmp_path / 'gpu')[-1]  # no fallback to the uncompiled model
