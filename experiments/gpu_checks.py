"""What must hold on a GPU: each check returns rows (what, how far off, at most)."""

import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from diracnet import Network, define_diracnet
from diracnets.deploy import deploy
from diracnets.fold import fold
from diracnets.onnx import to_onnx
from experiments.interleaved import ROOT
from training import data
from training.log import LOG_FILE, read_log

DEPTH, IMAGES = 16, 64
DIGITS = ('--dataset', 'Digits', '--depth', '10', '--batch_size', '64', '--lr', '0.02')
PATIENCE = 240  # seconds that a process may take


def off(found, expected):
    """The largest difference of two tensors, over the largest number of the second."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def most_off(found, expected):
    """The largest such difference of two dicts of tensors: NaN where one of them is."""
    differences = [off(found[name], tensor) for name, tensor in expected.items()]
    return torch.tensor(differences).max().item()  # of Python, max would lose NaN


@contextlib.contextmanager
def exact_float32():
    """Has CUDA multiply float32 as float32: TF32 has 10 bits of mantissa in place of 23."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def small_network():
    torch.manual_seed(0)
    return Network(*define_diracnet(DEPTH, 1, 'CIFAR10'))


def forward_backward(network, device, dtype, autocast=False):
    """One step without an optimizer: (logits, {name: gradient}, {name: running statistic})."""
    network = copy.deepcopy(network).to(device, dtype).train()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (IMAGES,), generator=generator).to(device)
    inputs = inputs.to(device, dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
        logits = network(inputs)
    F.cross_entropy(logits.to(dtype), labels).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return logits, gradients, dict(network.named_buffers())


def vector(gradients, kind):
    """The gradients of a kind as one vector: 'alpha', 'beta' or '' for all others. float64, CPU."""
    names = [name for name in gradients
             if (name.split('.')[-1] if name.endswith(('.alpha', '.beta')) else '') == kind]
    return torch.cat([gradients[name].cpu().double().flatten() for name in names])


# ---------------------------------------------------------------- arithmetic


def arithmetic(device):
    """float32 and bfloat16 against the CPU's float64: logits, gradients, running statistics."""
    network = small_network()
    expected = forward_backward(network, 'cpu', torch.float64)
    with exact_float32():
        single = forward_backward(network, device, torch.float32)
    half = forward_backward(network, device, torch.float32, autocast=True)
    rows = []
    # bounds of gradients: two or three times what the arithmetic of a CPU is off
    for name, found, bounds in (('float32', single, (1e-4, 1e-2, 1e-4)),
                                ('bfloat16', half, (0.1, 0.5, 0.05))):
        rows += [(f'{name}: logits', off(found[0], expected[0]), bounds[0]),
                 (f'{name}: running statistics', most_off(found[2], expected[2]), bounds[2])]
        # a gradient by itself may be a sum that nearly cancels: those of a kind are one vector
        for kind in ('alpha', 'beta', ''):
            right = vector(expected[1], kind)
            rows.append((f'{name}: gradients of {kind or "the rest"}', (
                (vector(found[1], kind) - right).norm() / right.norm()).item(), bounds[1]))
    return rows


@torch.no_grad()
def folding(device):
    """Folded against unfolded, deployed against folded, ONNX against both."""
    network = small_network().to(device).eval()
    inputs = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(device)
    with exact_float32():
        expected, folded = network(inputs), fold(network)
        rows = [('folded', off(folded(inputs), expected), 1e-4)]
        run = deploy(folded, tuple(inputs.shape), torch.float32)
        rows.append(('deploy(), float32', off(run(inputs), expected), 1e-4))
    run = deploy(folded, tuple(inputs.shape), torch.bfloat16)
    rows.append(('deploy(), bfloat16', off(run(inputs), expected), 0.05))
    return rows


@torch.no_grad()
def onnx(device):
    """ONNX, exported from a network on the GPU, run by ONNX Runtime on the CPU."""
    import onnxruntime

    network = small_network().to(device).eval()
    inputs = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(device)
    session = onnxruntime.InferenceSession(
        to_onnx(fold(network), inputs, {}), providers=['CPUExecutionProvider'])
    logits, = session.run(None, {'inputs': inputs.cpu().numpy()})
    with exact_float32():
        return [('ONNX', off(torch.from_numpy(logits), network(inputs)), 1e-4)]


def augmentation(device):
    """A batch that the GPU makes against the CPU's of the same seed: pixels and labels."""
    sets = data.load_splits('Digits', pad=4, flip='all', cutout=8)
    batch = torch.arange(IMAGES), 1, torch.arange(IMAGES)
    expected, found = sets.train[batch], sets.train.to(device)[batch]
    return [(f'{what} that differ', int((a != b.cpu()).sum()), 0)
            for what, a, b in zip(('pixels', 'labels'), expected, found)]


# ---------------------------------------------------------------- processes


def python(*words, **environment):
    """Runs Python in the repository; returns what it printed. Raises RuntimeError for a failure."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        timeout=PATIENCE, env={**os.environ, **environment},
    )
    if done.returncode:
        raise RuntimeError(f'{words[0]} ended with {done.returncode}: '
                           + done.stderr.strip().rpartition('\n')[2])
    return done.stdout


def params_of(folder):
    return torch.load(folder / 'model.pt7', map_location='cpu', weights_only=True)['params']


def differing(folder, other):
    """How many tensors of two runs differ in a bit."""
    params, others = params_of(folder), params_of(other)
    return sum(not torch.equal(tensor, others[name]) for name, tensor in params.items())


def accuracy(folder, **environment):
    out = python('train.py', *DIGITS[:2], '--evaluate', '--resume', folder, '--dtype', 'float',
                 **environment)
    return float(re.search(r'test_acc: ([\d.]+)', out)[1])


def killed_and_resumed(folder, *options):
    """Trains, is killed with SIGKILL after its first epoch, and goes on to its end."""
    words = ['train.py', *DIGITS, *options, '--save', folder, '--resume', 'auto']
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not ((folder / LOG_FILE).exists() and read_log(folder / LOG_FILE)):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise RuntimeError(f'{folder.name}: no epoch in {PATIENCE} s, or in all: expected '
                               'one to be killed after')
        time.sleep(0.02)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f'{folder.name}: ended before it was killed: expected more epochs')
    python(*words)


def resuming(device, folder, epochs=6):
    """SIGKILL and resuming: the same bits where algorithms are deterministic."""
    options = ('--epochs', epochs, '--epoch_step', f'[{epochs}]', '--deterministic')
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(python, 'train.py', *DIGITS, *options, '--save', folder / 'whole')
        killed = pool.submit(killed_and_resumed, folder / 'killed', *options)
        whole.result(), killed.result()
    return [('tensors that differ after SIGKILL and resuming',
             differing(folder / 'whole', folder / 'killed'), 0)]


def carrying(device, folder):
    """A checkpoint of the GPU on the CPU, and the reverse; NCCL with one process."""
    on_cpu = {'CUDA_VISIBLE_DEVICES': ''}
    train = ('train.py', *DIGITS, '--epochs', 2, '--epoch_step', '[2]', '--resume', 'auto')
    with ThreadPoolExecutor() as pool:
        made = [
            pool.submit(python, *train, '--save', folder / 'gpu'),
            pool.submit(python, *train, '--save', folder / 'cpu', **on_cpu),
            pool.submit(python, '-m', 'torch.distributed.run', '--nproc_per_node=1',
                        '--standalone', *train, '--save', folder / 'launched'),
        ]
        for future in made:
            future.result()
        accuracies = [
            pool.submit(accuracy, folder / name, **environment)
            for name in ('gpu', 'cpu') for environment in ({}, on_cpu)
        ]
        here, there, of_cpu, on_gpu = (future.result() for future in accuracies)
    # 360 digits: one of them is 0.28 points
    return [
        ("points between GPU and CPU, the GPU's checkpoint", abs(here - there), 0.6),
        ("points between GPU and CPU, the CPU's checkpoint", abs(of_cpu - on_gpu), 0.6),
        ('torchrun: epochs missing in its log',
         2 - len(read_log(folder / 'launched' / LOG_FILE)), 0),
    ]


CHECKS = {'augmentation': augmentation, 'arithmetic': arithmetic, 'folding': folding, 'onnx': onnx}
CHECKS_OF_PROCESSES = {'resuming': resuming, 'carrying': carrying}


def check_all(device, folder):
    """Yields rows {check, what, off, at_most, holds}: one that fails otherwise says why."""
    functions = {name: (check, (device,)) for name, check in CHECKS.items()}
    functions |= {name: (check, (device, folder)) for name, check in CHECKS_OF_PROCESSES.items()}
    for name, (check, arguments) in functions.items():
        try:
            found = check(*arguments)
        except Exception as error:  # the other checks, and the rates, are worth having
            reason = f'{type(error).__name__}: {error}'.splitlines()[0]
            yield {'check': name, 'what': reason, 'off': '', 'at_most': '', 'holds': 'failed'}
            continue
        for what, how_far, at_most in found:
            yield {'check': name, 'what': what, 'off': f'{how_far:.2g}', 'at_most': at_most,
                   'holds': 'yes' if how_far <= at_most else 'no'}
