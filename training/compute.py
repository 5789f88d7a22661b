"""The forward pass and the loss of a batch: device and precision."""

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cli import say
from diracnets.deployment import native_bfloat16
from diracnets.preprocessing import Preprocessing, normalize
from training.datasets import IGNORED
from training.distributed import rank, world_size


def choose_dtype(dtype: str, device: torch.device, args: dict) -> str:
    """Resolves --dtype: 'auto' is the dtype in the args of a checkpoint, or the hardware's."""
    if dtype != 'auto':
        return dtype
    native, reason = native_bfloat16(device)
    dtype, reason = 'bfloat16' if native else 'float', f'{device.type}: {reason}'
    if args.get('dtype', 'auto') != 'auto':
        dtype, reason = args['dtype'], 'as the checkpoint'
    if rank() == 0:
        say(f'--dtype auto: {dtype} ({reason})')
    return dtype


def param_dtype(dtype: str) -> torch.dtype:
    """Returns the torch dtype of the parameters: bfloat16 is autocast from float32."""
    return torch.float64 if dtype == 'double' else torch.float32


@dataclass(frozen=True)
class Forward:
    """The forward pass of a batch of uint8 images, on one device and in one precision."""

    preprocess: Preprocessing
    dtype: str  # 'float', 'double' or 'bfloat16' (autocast)
    device: torch.device

    def __call__(self, model: Callable, images: torch.Tensor, size: int | None = None):
        """Returns the logits (n, num_classes) of images (n, C, S, S), resized to `size` pixels."""
        inputs = normalize(images.to(self.device, non_blocking=True), self.preprocess,
                           param_dtype(self.dtype))
        if size not in (None, self.preprocess.size):
            inputs = F.interpolate(inputs, (size, size), mode='bilinear', antialias=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == 'bfloat16'):
            logits = model(inputs)
        return logits.to(param_dtype(self.dtype))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, global_batch_size: int,
                  label_smoothing: float = 0.0) -> torch.Tensor:
    """Returns this rank's part of the mean cross-entropy of a batch, times the number of ranks.

    DistributedDataParallel averages gradients over ranks, which cancels that factor. logits:
    (n, num_classes) and labels: (n,) of the images of this rank; IGNORED labels do not count.
    """
    loss = F.cross_entropy(logits, labels.to(logits.device, non_blocking=True), reduction='sum',
                           ignore_index=IGNORED, label_smoothing=label_smoothing)
    return loss * (world_size() / global_batch_size)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step, because new pages are slow to allocate.

    MALLOC_* environment variables take precedence. Other C libraries are not changed.
    """
    configured = any(name.startswith('MALLOC_') for name in os.environ)
    if platform.libc_ver()[0] == 'glibc' and not configured:
        trim_threshold, mmap_max = -1, -4  # parameter numbers of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never trim
        libc.mallopt(mmap_max, 0)  # mapped blocks would be unmapped when they are freed
