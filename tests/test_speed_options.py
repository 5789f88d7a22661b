"""Speed options do not change results: bfloat16, channels last, compilation, checkpointing."""

import functools
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from diracnet import define_diracnet
from diracnets.deployment import deploy, native_bfloat16
from diracnets.folding import fold
from diracnets.network import Network
from diracnets.preprocessing import Preprocessing, normalize
from runs import assert_same_run, params_of, run, stats_of, write_sets
from training import compilation, data, options
from training.choices import available_cores
from training.compilation import warm_up
from training.compute import Forward, choose_dtype, cross_entropy, param_dtype
from training.loader import make_loader

ROOT = Path(train.__file__).parent


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp('images'), 10, 4)


# ---------------------------------------------------------------- precision and memory layout


def test_choose_dtype_auto(monkeypatch, capsys):
    cpu = torch.device('cpu')
    for native, expected in ((True, 'bfloat16'), (False, 'float')):
        monkeypatch.setattr('training.compute.native_bfloat16',
                            lambda device, n=native: (n, 'because'))
        assert choose_dtype('auto', cpu, {}) == expected
        assert capsys.readouterr().out == f'--dtype auto: {expected} (cpu: because)\n'
        assert choose_dtype('auto', cpu, {'dtype': 'double'}) == 'double'
        assert capsys.readouterr().out == '--dtype auto: double (as the checkpoint)\n'
        assert choose_dtype('float', cpu, {'dtype': 'double'}) == 'float'


@pytest.mark.skipif(not os.path.exists('/proc/cpuinfo'), reason='no list of what the CPU can do')
@pytest.mark.skipif(not hasattr(torch.cpu, 'get_capabilities'),
                    reason='this version of torch does not report features of the CPU')
def test_native_bfloat16_agrees_with_cpuinfo():
    with open('/proc/cpuinfo') as file:
        flags = file.read().split()
    native, shown = native_bfloat16('cpu')
    assert native == any(flag in flags for flag in ('avx512_bf16', 'amx_bf16', 'bf16'))
    assert ('bf16' in shown) == native


@pytest.mark.parametrize(('capabilities', 'native'), [
    ({'avx512_bf16': True, 'avx2': True}, True), ({'avx512_bf16': False, 'avx2': True}, False),
])
def test_native_bfloat16_depends_on_bfloat16_instructions_alone(monkeypatch, capabilities, native):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    assert native_bfloat16('cpu')[0] is native


def test_run_prints_its_dtype_and_the_reason(images, tmp_path, capsys):
    run(images, tmp_path, '--epochs', 1)
    expected = 'bfloat16' if native_bfloat16('cpu')[0] else 'float'
    printed = capsys.readouterr().out
    assert printed.startswith(f'--dtype auto: {expected} (cpu: ')
    assert f'computing on 1 x cpu in {expected}\n' in printed
    assert stats_of(tmp_path)[0]['dtype'] == expected
    assert all(p.dtype == torch.float32 for p in params_of(tmp_path).values())


def test_bfloat16_logits_and_gradients_agree_with_float64(digits):
    inputs, labels = digits[0][:64], digits[1][:64]
    torch.manual_seed(0)
    f, params = define_diracnet(10, 1, 'CIFAR10')
    networks = [Network(f, {k: p.to(dtype) for k, p in params.items()})
                for dtype in (torch.float32, torch.float64)]
    with torch.autocast('cpu', torch.bfloat16):
        logits = networks[0](inputs).float()
    exact = networks[1](inputs.double())
    assert (logits - exact).abs().max() < 0.03 * exact.abs().max()  # 8 bits: 0.4 % a rounding
    for out in (logits, exact):
        F.cross_entropy(out, labels).backward()
    ours, exact = [], []
    for (name, p), q in zip(networks[0].named_parameters(), networks[1].parameters()):
        ours.append(p.grad.flatten().double())
        exact.append(q.grad.flatten())
        # small gradients are differences of large terms, with the rounding of those
        assert F.cosine_similarity(ours[-1], exact[-1], dim=0) > 0.9, name
    assert F.cosine_similarity(torch.cat(ours), torch.cat(exact), dim=0) > 0.98


@pytest.mark.parametrize(('dtype', 'expected'), [
    ('float', torch.float32), ('bfloat16', torch.bfloat16), ('double', torch.float64)])
def test_forward_computes_in_its_dtype(dtype, expected):
    convolution, computed = torch.nn.Conv2d(3, 10, 32), []
    convolution.register_forward_hook(lambda *given: computed.append(given[-1].dtype))
    network = torch.nn.Sequential(convolution, torch.nn.Flatten()).to(param_dtype(dtype))
    forward = Forward(Preprocessing.for_dataset('CIFAR10'), dtype, torch.device('cpu'))
    logits = forward(network, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    loss = cross_entropy(logits, torch.tensor([0, 1]), 2)
    assert computed == [expected]
    assert loss.dtype == logits.dtype == param_dtype(dtype)


def test_batches_are_channels_last():
    sets = data.load_splits('Digits')
    images, *_ = next(iter(make_loader(sets.train, 16, seed=1)))
    inputs = normalize(images, Preprocessing.for_dataset('CIFAR10'), torch.float64)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    f, params = define_diracnet(10, 1, 'CIFAR10')
    params = {name: p.double() for name, p in params.items()}
    outputs = [f(x, params, True) for x in (inputs, inputs.contiguous())]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- compilation


@pytest.mark.parametrize(('error', 'reason'), [
    (RuntimeError('Dynamo is not supported on Python 3.99+'), 'RuntimeError: Dynamo is not'),
    (RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: none found\n\nmore"),
     'RuntimeError: InvalidCxxCompiler: none found'),
    (PermissionError(13, 'Permission denied', '/cache'), 'PermissionError: [Errno 13]'),
    (torch.OutOfMemoryError('CUDA out of memory'), 'OutOfMemoryError: CUDA out of memory'),
])
def test_training_continues_with_a_warning_when_torch_cannot_compile(
    images, tmp_path, monkeypatch, capsys, error, reason
):
    def compile_badly(model, **options):
        def call(inputs):
            model(inputs)  # changes the running statistics
            torch.rand(1)  # and the random state
            if torch.is_grad_enabled() == (where == 'training'):
                raise error
            return model(inputs)

        if where == 'torch.compile':
            raise error
        return call

    run(images, tmp_path / 'eager')
    for where in ('torch.compile', 'training', 'evaluation'):
        folder = tmp_path / where
        monkeypatch.setattr(torch, 'compile', compile_badly)
        run(images, folder, '--compile')
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith(f'torch {torch.__version__} cannot compile the model ({reason}')
        assert_same_run(folder, tmp_path / 'eager')


def test_compile_error_ends_the_run_of_several_processes(monkeypatch):
    """Otherwise one of them would train, and the others wait for it in their warm-up."""
    monkeypatch.setattr(compilation, 'world_size', lambda: 2)
    monkeypatch.setattr(compilation, 'warm_up', lambda *_: 1 / 0)
    model = torch.nn.Linear(2, 2)
    compiled_run = SimpleNamespace(forward=SimpleNamespace(device=torch.device('cpu')),
                                   eval_model=model)
    with pytest.raises(OSError, match='cannot compile the model .ZeroDivisionError.*omit --comp'):
        compilation.compile_models(compiled_run, model, set())


def test_compile_model_compiles_each_shape_and_model():
    """Also beyond torch's recompile limit, here 1, after which it would run uncompiled."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(inputs[-1].shape)
        return graph

    with torch._dynamo.config.patch(recompile_limit=1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
        for model in (torch.nn.Flatten(), torch.nn.Flatten()):
            call = compilation.compile_model(model, torch.device('cpu'))
            for n in (2, 3, 4, 3):
                assert call(torch.ones(n, 2, 2)).shape == (n, 4)
    assert compiled == 2 * [(2, 2, 2), (3, 2, 2), (4, 2, 2)]


@pytest.mark.parametrize(('device', 'changes', 'reason'), [
    ('cuda', {}, ''),
    ('cpu', {}, 'cpu: compiled steps are slower'),
    ('mps', {}, 'mps: untested'),
    ('cuda', {'capability': (6, 1)}, 'compute capability 6.1, Triton needs 7.0'),
    ('cuda', {'triton': None}, 'Triton is not installed'),
    ('cuda', {'world_size': 2}, 'several processes: untested'),
    ('cuda', {'deterministic': True}, '--deterministic: the compiler selects kernels by their '
                                      'speed'),
])
def test_compile_auto_compiles_on_cuda_in_one_process(
    monkeypatch, capsys, device, changes, reason
):
    machine = {'capability': (9, 0), 'triton': 'found', 'world_size': 1, 'deterministic': False}
    machine |= changes
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: machine['capability'])
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: machine[name])
    monkeypatch.setattr(compilation, 'world_size', lambda: machine['world_size'])
    resolved = compilation.choose_compile('auto', torch.device(device), machine['deterministic'])
    assert resolved == (not reason)
    state = f'off ({reason})' if reason else 'on (cuda: captures each step as a CUDA graph)'
    assert capsys.readouterr().out == f'--compile auto: {state}\n'


@pytest.mark.parametrize(('arguments', 'expected'), [
    ([], 'auto'), (['--compile'], True), (['--compile', 'auto'], 'auto'), (['--no-compile'], False),
    (['--no-compile', '--compile'], True),
])
def test_compile_option_has_three_states(arguments, expected):
    assert options.parse_options(arguments).compile == expected


def test_warm_up_compiles_every_batch_size():
    def images(n):
        return data.MemoryImages(torch.zeros(n, 8, 8, 3, dtype=torch.uint8), torch.zeros(n).long())

    def recording(shapes):
        def model(inputs):
            shapes.append((len(inputs), inputs.shape[-1]))
            logits = linear(inputs.mean((2, 3)))
            if logits.requires_grad:  # a CUDA graph would overwrite gradients of the last pass
                logits.register_hook(lambda _: no_gradients.append(linear.weight.grad is None))
            return logits
        return model

    no_gradients = []
    linear, trained, evaluated = torch.nn.Linear(3, 2), [], []
    compiled_run = SimpleNamespace(
        model=linear, train=linear.train, eval=linear.eval, eval_splits=('val', 'test'),
        opt=SimpleNamespace(batch_size=4),
        forward=Forward(Preprocessing.for_dataset('Folder', 8), 'float', torch.device('cpu')),
        splits=SimpleNamespace(train=images(10), val=images(7), test=images(9)),
        optimizer=torch.optim.SGD(linear.parameters(), 0.1))
    warm_up(compiled_run, recording(trained), recording(evaluated), {6, 8})
    assert set(trained) == {(4, 6), (2, 6), (4, 8), (2, 8)}
    assert set(evaluated) == {(4, 8), (3, 8), (1, 8)}
    assert no_gradients == [True] * len(trained)
    assert linear.weight.grad is None


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(('depth', 'dataset', 'size', 'part'), [
    (40, 'CIFAR10', 16, 1 / 4), (34, 'ImageNet', 64, 1 / 2),  # half is before the groups
])
def test_checkpointing_saves_memory_and_changes_no_result(depth, dataset, size, part):
    inputs, labels = torch.randn(5, 3, size, size), torch.arange(5)
    kept, results = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = Network(*define_diracnet(depth, 0.25, dataset, 5), checkpointing)
        sizes = {}

        def keep(tensor, sizes=sizes):
            if tensor.shape[:1] == (len(labels),):  # activations, each counted once
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        for _ in range(2):
            sizes.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = F.cross_entropy(network(inputs), labels)
            loss.backward()
        kept.append(sum(sizes.values()))
        gradients = {f'{name}.grad': p.grad for name, p in network.named_parameters()}
        results.append({'loss': loss.detach(), **network.state_dict(), **gradients})
    assert kept[1] < kept[0] * part
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_checkpointing_gives_the_same_run(images, tmp_path):
    run(images, tmp_path / 'plain', '--depth', 16)
    run(images, tmp_path / 'checkpointed', '--depth', 16, '--checkpointing')
    plain, checkpointed = params_of(tmp_path / 'plain'), params_of(tmp_path / 'checkpointed')
    assert all(torch.equal(tensor, checkpointed[name]) for name, tensor in plain.items())


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
def test_keep_freed_memory_respects_malloc_variables():
    code = """if True:
        import resource, torch
        from training.compute import keep_freed_memory
        keep_freed_memory()
        faults = []
        for _ in range(12):  # the kernel may reclaim idle pages: repeat
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(64 << 20, dtype=torch.uint8)  # 16,384 pages of 4 kB, freed at once
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(min(faults))
    """

    def faults(**more):
        clean = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
        command = [sys.executable, '-c', code]
        return int(subprocess.run(command, env={**clean, **more}, cwd=ROOT, check=True,
                                  capture_output=True).stdout)

    assert faults() < 20
    assert faults(MALLOC_MMAP_THRESHOLD_='1048576') > 20


def test_train_and_evaluate_keep_freed_memory_on_the_cpu(images, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, 'keep_freed_memory', lambda: calls.append(1))
    run(images, tmp_path, '--epochs', 1)
    train.main(['--evaluate', '--resume', str(tmp_path), '--dataset', 'Folder', '--dataroot',
                str(images)])
    assert len(calls) == 2


# ---------------------------------------------------------------- deployed


@pytest.mark.slow
@pytest.mark.parametrize(('dtype', 'tolerance', 'agree'), [
    (torch.bfloat16, 0.03, 970), (torch.float32, 1e-5, 1000),
])
def test_deploy_agrees_on_1000_images(trained, digits, dtype, tolerance, agree):
    network = fold(trained[1])
    inputs = digits[0][:1000]
    with torch.no_grad():
        logits = network(inputs)
    deployed = deploy(network, (500, 3, 32, 32), dtype)
    found = torch.cat([deployed(half) for half in inputs.split(500)])
    assert found.dtype == torch.float32
    assert (found - logits).abs().max() <= tolerance * logits.abs().max()
    assert (found.argmax(1) == logits.argmax(1)).sum() >= agree
    assert next(network.parameters()).dtype == torch.float32  # unchanged
    with pytest.raises(ValueError, match=r'shape \(1, 3, 32, 32\): expected \(500, 3, 32, 32\)'):
        deployed(inputs[:1])


def test_deploy_dtype():
    with pytest.raises(ValueError, match='float16: expected torch.bfloat16 or torch.float32'):
        deploy(torch.nn.Conv2d(3, 3, 1), (1, 3, 8, 8), torch.float16)


class Tells(torch.nn.Module):
    """A convolution that returns zeros unless it is compiled."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if torch.compiler.is_compiling() else torch.zeros(1)


@pytest.mark.slow
def test_deploy_compiles_every_shape_and_model():
    """Also beyond torch's recompile limit (8; here 1), which counts per code object."""
    first, second = Tells(), Tells()
    with torch._dynamo.config.patch(recompile_limit=1):
        runs = [(network, deploy(network, shape, torch.float32), torch.randn(shape)) for
                network, shape in ((first, (1, 3, 8, 8)), (first, (2, 3, 6, 9)),
                                   (second, (1, 3, 8, 8)))]
        for network, run, inputs in runs:
            torch.testing.assert_close(run(inputs), network.conv(inputs))
            with torch.inference_mode():  # is not compiled again
                copied = inputs.to(memory_format=torch.channels_last, copy=True)
                torch.testing.assert_close(run(copied), network.conv(inputs))


def test_deploy_raises_when_a_model_cannot_be_compiled():
    class Depends(Tells):
        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r'Depends cannot be compiled .*\(.*\): ') as error:
        deploy(Depends(), (1, 3, 8, 8), torch.float32)
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------- threads


def test_available_cores_are_shared_among_ranks(monkeypatch):
    for allowed, processes, expected in ((2, 1, 2), (2, 3, 1), (128, 1, 128), (128, 8, 16)):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _, n=allowed: set(range(n)))
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
        assert available_cores() == expected
        assert options.parse_options([]).nthread == min(expected, 8)


def test_default_workers_do_not_exceed_the_cores(tmp_path, recwarn):
    write_sets(tmp_path, 8, 2, (70, 70))
    train.main(['--dataset', 'Folder', '--dataroot', str(tmp_path), '--image_size', '70', '--depth',
                '18', '--width', '0.125', '--epochs', '1', '--save', str(tmp_path / 'run')])
    assert not [w for w in recwarn if 'worker' in str(w.message)]
