"""Compilation of the model of a run by torch.compile: the choice, the fallback and the warm-up."""

import gc
import importlib.util
import time
from collections.abc import Callable

import torch
from torch import nn

from cli import say, warn
from diracnets.deployment import with_own_code_object
from diracnets.image_files import DataError
from training.compute import cross_entropy
from training.distributed import rank, world_size
from training.progress import Progress


def choose_compile(to_compile: bool | str, device: torch.device, deterministic: bool) -> bool:
    """Resolves --compile: 'auto' compiles on a CUDA GPU, in one process."""
    if to_compile != 'auto':
        return to_compile
    reason = _reason_against_compile(device, deterministic)
    if rank() == 0:
        say(f'--compile auto: off ({reason})' if reason else
            f'--compile auto: on ({device.type}: captures each step as a CUDA graph)')
    return not reason


def _reason_against_compile(device, deterministic):
    """Returns why --compile auto does not compile, or ''."""
    if device.type == 'cpu':
        return 'cpu: compiled steps are slower'
    if device.type != 'cuda':
        return f'{device.type}: untested'
    if not importlib.util.find_spec('triton'):
        return 'Triton is not installed'
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 0):
        return 'compute capability {}.{}, Triton needs 7.0'.format(*capability)
    if deterministic:
        return '--deterministic: the compiler selects kernels by their speed'
    return 'several processes: untested' if world_size() > 1 else ''


def compile_model(model: nn.Module, device: torch.device,
                  cuda_mode: str = 'reduce-overhead') -> Callable:
    """Compiles a model, once for each shape of its inputs.

    On CUDA each compiled step is one CUDA graph: a step of a deep, narrow network has hundreds of
    small kernels, which Python launches more slowly than a GPU runs them. cuda_mode: the mode of
    torch.compile there, one with CUDA graphs. Gradients are outputs of a graph, which the next
    step overwrites: set them to None before each backward pass.
    """
    on_cuda, graphs = device.type == 'cuda', {}
    mode = cuda_mode if on_cuda else None

    def call(inputs):
        if inputs.shape not in graphs:  # torch.compile limits the graphs of one code object
            graphs[inputs.shape] = torch.compile(with_own_code_object(model), dynamic=False,
                                                 mode=mode)
        graph = graphs[inputs.shape]
        if not on_cuda:
            return graph(inputs)
        torch.compiler.cudagraph_mark_step_begin()  # the previous outputs may be overwritten
        return graph(inputs).clone()  # the meters keep the logits for longer

    return call


def compile_models(run, train_model: nn.Module, sizes: set) -> tuple[Callable, Callable, dict]:
    """Compiles the models for training and for evaluation of a run.

    train_model: run.model or its distributed form; sizes: training image sizes in pixels.
    Returns the two models and the log entry `compile_time`, in seconds. If this version of
    torch, or this machine, cannot compile them, it prints a warning, and returns the uncompiled
    models and no entry. With several processes it raises OSError, because the others may compile.
    """
    start = time.perf_counter()
    try:
        models = [compile_model(model, run.forward.device)
                  for model in (train_model, run.eval_model)]
        warm_up(run, *models, sizes)
    except DataError:
        raise
    except Exception as error:  # compilers raise almost any type
        message = f'torch {torch.__version__} cannot compile the model ({error_line(error)})'
        if world_size() > 1:
            raise OSError(f'{message}; omit --compile') from error
        warn(f'{message}; training continues without --compile')
        return train_model, run.eval_model, {}
    return *models, {'compile_time': time.perf_counter() - start}


def free_compiled_models() -> None:
    """Frees the memory of compiled models that are no longer used, such as CUDA graphs."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def error_line(error: Exception) -> str:
    """Returns the type of an error and the first informative line of its message."""
    lines = [line for line in str(error).splitlines() if line and not line.endswith('raised:')]
    return f'{type(error).__name__}: {(lines or [""])[0]}'


def warm_up(run, train_model: Callable, eval_model: Callable, sizes: set) -> None:
    """Calls the compiled models of a run with every batch size, which compiles them.

    On CUDA, the first call of a graph allocates its memory, and the second captures it.

    sizes: training image sizes in pixels. Leaves the model, the optimizer and the random number
    generators as they were, also after an error.
    """
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    passes = []
    for images, model, sizes_of_images in [
        (run.splits.train, train_model, sizes),
        *((getattr(run.splits, split), eval_model, [None]) for split in run.eval_splits),
    ]:
        full, last = min(run.opt.batch_size, len(images)), len(images) % run.opt.batch_size
        passes += [(images, model, size, batch_size) for size in sizes_of_images
                   for batch_size in {full, last} - {0}]
    device = run.forward.device
    calls = 3 if device.type == 'cuda' else 1  # the third replays the graph
    devices = [] if device.type == 'cpu' else [torch.accelerator.current_device_index()]
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            for images, model, size, batch_size in Progress(passes, 'compiling', unit='graph'):
                training = images is run.splits.train
                run.train() if training else run.eval()
                local_indices = torch.arange(batch_size).tensor_split(world_size())[rank()]
                pixels, labels, _ = images[torch.arange(batch_size), None, local_indices]
                for _ in range(calls):
                    with torch.set_grad_enabled(training):
                        logits = run.forward(model, pixels, size)
                        loss = cross_entropy(logits, labels, batch_size)
                    run.optimizer.zero_grad()  # see `compile_model`
                    if training:
                        loss.backward()
    finally:
        run.optimizer.zero_grad()
        run.model.load_state_dict(buffers, strict=False)
