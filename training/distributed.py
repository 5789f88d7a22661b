"""The processes of torchrun, or a single process, and reductions over processes."""

import os
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from training.choices import available_cores


def init(deterministic=False):
    """Joins the process group if torchrun started this process; returns the device to use.

    The device is the accelerator of torch (CUDA; MPS and XPU are untested), else the CPU. The
    backend is the default of the device: NCCL on CUDA and gloo on the CPU. deterministic: use
    deterministic kernels where they exist. Raises ValueError if there are more processes than GPUs.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device, local_rank = accelerator or torch.device('cpu'), int(os.environ.get('LOCAL_RANK', 0))
    if accelerator and local_rank >= torch.accelerator.device_count():
        raise ValueError(f'process {local_rank} of this machine has no GPU; use --nproc_per_node '
                         f'{torch.accelerator.device_count()} or less')
    torch.backends.cudnn.benchmark = device.type == 'cuda' and not deterministic
    if deterministic and accelerator:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS reads it at first use
    if accelerator:  # also False, after a run that set it in this process
        # only a warning: the backward pass of max-pooling has no deterministic kernel, but its
        # windows do not overlap on small images, so that the order of additions does not matter
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if 'LOCAL_RANK' not in os.environ:
        return device
    store, rank, world_size = next(dist.rendezvous('env://'))
    store = _store_of_this_start(store, rank, world_size)
    dist.init_process_group(dist.get_default_backend_for_device(device), store=store, rank=rank,
                            world_size=world_size)
    if not accelerator:
        if os.environ.get('OMP_NUM_THREADS') == '1':  # torchrun's default
            torch.set_num_threads(available_cores())
        return device
    torch.accelerator.set_device_index(local_rank)
    return torch.device(device.type, local_rank)


def launcher():
    """Returns a string that identifies the process that started this one, such as torchrun.

    In a container its process id is often 1, so that the text also has its start time, and the boot
    of the machine that this time is relative to. Without /proc it has the process id only.
    """
    pid = os.getppid()
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()  # after the name
        return f'{pid} {fields[19]} {boot}'  # field 22 of proc_pid_stat(5): clock ticks since boot
    except OSError:
        return str(pid)


def _store_of_this_start(store, rank, world_size):
    """Returns a PrefixStore whose prefix only the processes of this (re)start share.

    torchrun keeps one store over restarts, with the addresses of the dead processes; a process that
    reads such an address waits forever. TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each restart a
    new store, but torchrun reads that variable before it starts this process, so every user would
    have to set it. The restart count does not identify a restart: each machine has its own.

    Therefore the first process chooses a random prefix, and sends it to each process that asks with
    a random token. Requests of dead processes are answered, too, without effect.
    """
    if rank > 0:
        token = uuid.uuid4().hex
        store.set(f'request/{rank}', token)
        prefix = store.get(f'prefix/{token}').decode()  # blocks until it is set
        store.add(f'{prefix}/received', 1)
        return dist.PrefixStore(prefix, store)
    prefix = uuid.uuid4().hex
    while store.add(f'{prefix}/received', 0) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f'request/{other}']):
                store.set(f'prefix/{store.get(f"request/{other}").decode()}', prefix)
        time.sleep(0.01)  # seconds
    return dist.PrefixStore(prefix, store)


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(numbers, op=dist.ReduceOp.SUM):
    """Reduces a list of numbers elementwise over all processes; returns a list."""
    if world_size() == 1:
        return numbers
    device = 'cpu' if dist.get_backend() == 'gloo' else torch.accelerator.current_accelerator()
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.tolist()


def merge_dicts(values):
    """Merges the dicts of all processes; returns the same dict in each of them."""
    parts = [values]
    if world_size() > 1:
        parts *= world_size()
        dist.all_gather_object(parts, values)
    return {key: value for part in parts for key, value in part.items()}


def rank_zero_first(load):
    """Calls load() in the first process of each machine in order, then in all others.

    The first process downloads, and the others find the files, on shared and separate disks.
    """
    if world_size() == 1:
        return load()
    first, result = int(os.environ['LOCAL_RANK']) == 0, None
    for turn in range(world_size()):
        if first and rank() == turn:
            result = load()
        dist.barrier()
    return result if first else load()
