"""The processes that torchrun starts, and what they add up; alone, there is one."""

import os

import torch
import torch.distributed as dist


def start():
    """Joins the processes of torchrun, if it started this one; returns this one's device.

    NCCL on CUDA, gloo on the CPU.
    """
    cuda = torch.cuda.is_available()
    torch.backends.cudnn.benchmark = cuda
    if 'LOCAL_RANK' not in os.environ:
        return torch.device('cuda' if cuda else 'cpu')
    dist.init_process_group('nccl' if cuda else 'gloo')
    if not cuda:
        return torch.device('cpu')
    device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
    torch.cuda.set_device(device)
    return device


def end():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def over_ranks(numbers, op=dist.ReduceOp.SUM):
    """Combines a list of numbers over all processes."""
    if world() == 1:
        return numbers
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op)
    return numbers.tolist()


def first_before_others(act):
    """Calls act() in the first process, then in the others: what one downloads, all read."""
    if rank() > 0:
        dist.barrier()
    result = act()
    if rank() == 0 and world() > 1:
        dist.barrier()
    return result
