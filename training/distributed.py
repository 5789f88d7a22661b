"""The processes that torchrun starts, and what they add up; alone, there is one."""

import os
import time
import uuid

import torch
import torch.distributed as dist


def available_cores():
    """The CPU cores that fall to this process, of those that torchrun's here may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, allowed // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def start(deterministic=False):
    """Joins the processes of torchrun, if it started this one; returns this one's device.

    NCCL on CUDA, gloo on the CPU. deterministic: have CUDA add in the same order each time, where
    it can. Raises ValueError where there are more processes than GPUs.
    """
    cuda, local = torch.cuda.is_available(), int(os.environ.get('LOCAL_RANK', 0))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f'process {local} of this machine has no GPU: expected --nproc_per_node '
                         f'of at most {torch.cuda.device_count()}')
    torch.backends.cudnn.benchmark = cuda and not deterministic
    if deterministic and cuda:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read at its first use
        # max-pooling warns: its windows do not overlap on small images, and so add in no order
        torch.use_deterministic_algorithms(True, warn_only=True)
    if 'LOCAL_RANK' not in os.environ:
        return torch.device('cuda' if cuda else 'cpu')
    store, number, count = next(dist.rendezvous('env://'))
    store = _fresh_store(store, number, count)
    dist.init_process_group(
        'nccl' if cuda else 'gloo', store=store, rank=number, world_size=count
    )
    if not cuda:
        if os.environ.get('OMP_NUM_THREADS') == '1':  # as torchrun sets it where nobody did
            torch.set_num_threads(available_cores())
        return torch.device('cpu')
    device = torch.device('cuda', local)
    torch.cuda.set_device(device)
    return device


def _fresh_store(store, rank, world_size):
    """Returns the part of torchrun's store that these processes, and none before them, write to.

    torchrun keeps its store when it starts processes again, with the addresses of the dead ones: a
    process that reads one of those waits for ever. The count of restarts does not tell them apart,
    as each machine counts its own. So the first process makes a new name, and answers with it each
    process that calls; a call that a dead one left is answered too, and heard by nobody.
    """
    if rank > 0:
        caller = uuid.uuid4().hex
        store.set(f'call/{rank}', caller)
        name = store.get(f'answer/{caller}').decode()  # waits for it
        store.set(f'{name}/heard/{rank}', '')
        return dist.PrefixStore(name, store)
    name, silent = uuid.uuid4().hex, set(range(1, world_size))
    while silent:
        for other in silent:
            if store.check([f'call/{other}']):
                store.set(f'answer/{store.get(f"call/{other}").decode()}', name)
        silent = {other for other in silent if not store.check([f'{name}/heard/{other}'])}
        time.sleep(0.01)  # in seconds
    return dist.PrefixStore(name, store)


def end():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(numbers, op=dist.ReduceOp.SUM):
    """Combines a list of numbers over all processes."""
    if world_size() == 1:
        return numbers
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op)
    return numbers.tolist()


def rank_zero_first(act):
    """Calls act() in the first process of each machine, in turn, then in the others.

    So what one downloads, all read, whether machines share a disk or not.
    """
    if world_size() == 1:
        return act()
    first, result = int(os.environ['LOCAL_RANK']) == 0, None
    for turn in range(world_size()):
        if first and rank() == turn:
            result = act()
        dist.barrier()
    return result if first else act()
