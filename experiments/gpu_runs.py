"""Measures the cost of a run on a GPU, and the kernels of a training step.

experiments/gpu.py calls both and appends their results to logs/gpu/runs.csv and profile.csv.
"""

import re
import tempfile
from collections import defaultdict

import torch

import train
from experiments.variants import random_images
from training.compilation import free_compiled_models
from training.data import DataSplits
from training.timing import synchronize

EPOCHS = 200  # of the paper's CIFAR runs
KERNELS = {  # kind: pattern in the name of a kernel, on a CPU of an operator; the first match
    'W_hat': r'^_(forward|backward)_kernel',
    'fused by the compiler': r'triton_',
    'batch norm': r'batch_?norm|bn_(fw|bw)|norm_(fw|bw)',
    'layout conversion': r'nchwTo|nhwcTo|NchwTo|NhwcTo',
    'convolution and matmul': r'conv|cudnn|xmma|gemm|cutlass|wgrad|dgrad|nvjet|mkldnn|addmm',
    'pooling': r'pool',
    'optimizer': r'FusedSgd|fused_sgd|multi_tensor',
    'concatenation': r'[cC]at(Array|$)|aten::cat',
    'copy and cast': r'[cC]opy|[mM]emcpy|aten::to',
    'fill': r'[fF]ill|[mM]emset|zero_',
}


def run_cost(depth, width, n=50_000):
    """Trains a DiracNet for two epochs on n random images with the defaults of train.py.

    Returns the record of a run of 200 epochs with that time per epoch, the second one: minutes,
    with the warm-up of the compiler, and the peak memory.
    """
    images, labels = random_images(n)
    test = images[: n // 5], labels[: n // 5]
    splits = DataSplits.from_arrays((images, labels), test, classes=range(10))
    sizes = ['--depth', str(depth), '--width', f'{width:g}']
    free_compiled_models()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        stats = train.main([*sizes, '--epochs', '2', '--save', f'{folder}/run'], splits).history[-1]
    seconds, compile_time = stats['train_time'] + stats['test_time'], stats.get('compile_time', 0)
    return {
        'command': f'python train.py {" ".join(sizes)}', 'batch': stats['batch_size'],
        'dtype': stats['dtype'], 'images_per_second': round(stats['images_per_second'], 1),
        'seconds_per_epoch': round(seconds, 2), 'compile_seconds': round(compile_time, 1),
        'epochs': EPOCHS, 'minutes': round((EPOCHS * seconds + compile_time) / 60, 1),
        'peak_memory_mb': round(torch.cuda.max_memory_reserved() / 1e6)
        if torch.cuda.is_available() else '',
    }


def kind_of(kernel):
    """Returns the kind of a kernel by its name: a key of KERNELS, or 'elementwise and other'."""
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, kernel)),
                'elementwise and other')


def profile_step(work, device, steps=5):
    """Profiles the work of a step; returns {kind of kernel: (milliseconds, launches)} per step.

    On a CPU the kernels are operators. Raises RuntimeError if no kernel was recorded.
    """
    for _ in range(3):  # warm-up
        work()
    synchronize(device)
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            work()
        synchronize(device)
    kinds, on_cpu = defaultdict(lambda: [0.0, 0]), device.type == 'cpu'
    for event in profile.events():
        # annotations, such as Optimizer.step, span the kernels that they contain
        if event.device_type.name == device.type.upper() and not event.is_user_annotation:
            microseconds = event.self_cpu_time_total if on_cpu else event.time_range.elapsed_us()
            kinds[kind_of(event.name)][0] += microseconds / 1000 / steps
            kinds[kind_of(event.name)][1] += 1
    if not kinds:
        raise RuntimeError('the profiler recorded no kernel')
    return {kind: (milliseconds, count / steps) for kind, (milliseconds, count) in kinds.items()}


def profile_records(title, kinds):
    """Returns the records of a profile, with the slowest kind first."""
    total = sum(milliseconds for milliseconds, _ in kinds.values())
    ordered = sorted(kinds.items(), key=lambda item: -item[1][0])
    return [{'step': title, 'kernels': kind, 'milliseconds': round(milliseconds, 3),
             'percent': round(100 * milliseconds / total, 1), 'launches': round(launches, 1)}
            for kind, (milliseconds, launches) in ordered]
