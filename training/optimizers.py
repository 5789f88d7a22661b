"""Optimizers, SGD as in the paper or Muon on the filters, and learning rate schedules.

`initial_lr` of a parameter group is its maximum learning rate, as in torch's schedulers.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diracnets.architectures import ARCHITECTURES

MUON_MOMENTUM, NEWTON_SCHULZ_STEPS = 0.6, 3  # as airbench94_muon, for few epochs
ADAM_BETAS = 0.85, 0.95
WARM_UP = 0.2  # fraction of a linear schedule


# ---------------------------------------------------------------- learning rate


def lr_factor(opt, done):
    """Returns the learning rate as a fraction of its maximum after `done` epochs, a float.

    `step` drops at the start of the epochs of --epoch_step, counted from 1. `cosine` falls to 0.
    `onecycle` rises from 1/25 in the first 30 %, then falls to 1/250000 (arXiv 1708.07120, with the
    defaults of torch's OneCycleLR, but a constant momentum). `linear` rises from 0 in the first
    20 %, then falls to 0.
    """
    if opt.lr_schedule == 'step':
        return opt.lr_decay_ratio ** sum(epoch <= done + 1 for epoch in opt.epoch_step)

    def half_cosine(start, end, progress):
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    progress = done / opt.epochs
    if opt.lr_schedule == 'linear':
        return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))
    if opt.lr_schedule == 'cosine':
        return half_cosine(1, 0, progress)
    if progress < 0.3:
        return half_cosine(1 / 25, 1, progress / 0.3)
    return half_cosine(1, 1 / 250_000, (progress - 0.3) / 0.7)


def set_learning_rate(optimizer, factor):
    """Sets the learning rate of each group to `factor` times its maximum.

    Momentum buffers stay; the original code created a new optimizer, without them, at each drop.
    """
    for group in optimizer.param_groups:
        group['lr'] = group['initial_lr'] * factor


# ---------------------------------------------------------------- optimizers


def make_optimizer(model, opt):
    """Returns the optimizer of --optimizer for the parameters that require gradients.

    Raises ValueError for muon without filters to train.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = {'sgd': _sgd, 'muon': _muon}[opt.optimizer](params, opt)
    for group in optimizer.param_groups:
        group['initial_lr'] = group['lr']
    return optimizer


def _sgd(params, opt):
    """Returns SGD without weight decay on 1-D tensors (alpha, beta, biases, batch norm).

    Architectures whose papers decay all parameters have `decay_all`.
    """
    decayed = [p.dim() > 1 or ARCHITECTURES[opt.model].decay_all for p in params]
    groups = [
        {'params': [p for p, d in zip(params, decayed) if d], 'weight_decay': opt.weight_decay},
        {'params': [p for p, d in zip(params, decayed) if not d], 'weight_decay': 0.0},
    ]
    fused = params[0].is_cuda  # one kernel updates all parameters
    return torch.optim.SGD(groups, lr=opt.lr, momentum=0.9, nesterov=opt.nesterov, fused=fused)


def _muon(params, opt):
    if all(p.dim() <= 2 for p in params):
        raise ValueError('--optimizer muon: all filters are frozen; use sgd')
    return FilterMuon(
        [p for p in params if p.dim() > 2], [p for p in params if p.dim() <= 2],
        opt.lr, opt.adam_lr,
    )


def make_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """Returns the exponential moving average of a model, running statistics included.

    It starts as a copy of the model after the first update. With decay 0 there is none.
    """
    average = get_ema_multi_avg_fn(decay)
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True) if decay else None


class FilterMuon:
    """torch's Muon on filters, with one filter per matrix row, and AdamW on all other parameters.

    It has the interface of torch's optimizers that a run needs: `param_groups`, `state` and the
    methods below. As in airbench94_muon, each matrix is scaled before its step to the norm of a
    matrix with rows of norm 1. Muon's update is orthogonal, so the learning rate alone determines
    the relative change. In W_hat and before batch norm this scale has no effect on the outputs;
    elsewhere it changes them (AlexNet, the last convolution of a Wide ResNet block, the identity
    convolutions of DBB, whose filters get the norm of the identity). Weight decay is 0, as the
    scaling would undo it.
    """

    def __init__(self, filters, others, lr, adam_lr):
        self.filters = filters
        # torch's Muon accepts only matrices; these share the memory of the filters
        matrices = [nn.Parameter(f.detach().view(len(f), -1)) for f in filters]
        self.muon = torch.optim.Muon(matrices, lr, 0.0, MUON_MOMENTUM, nesterov=True,
                                     ns_steps=NEWTON_SCHULZ_STEPS)
        self.adam = torch.optim.AdamW(others, adam_lr, ADAM_BETAS, weight_decay=0.0, fused=True)

    @property
    def param_groups(self):
        return self.muon.param_groups + self.adam.param_groups

    @property
    def state(self):
        return {**self.muon.state, **self.adam.state}

    def zero_grad(self):
        for f in self.filters:
            f.grad = None
        self.adam.zero_grad()

    def step(self):
        for f, matrix in zip(self.filters, self.muon.param_groups[0]['params']):
            matrix.grad = None if f.grad is None else f.grad.reshape(len(f), -1)
            matrix.data.copy_(len(f) ** 0.5 * F.normalize(matrix.data, dim=(0, 1)))
        self.muon.step()
        self.adam.step()

    def state_dict(self):
        """Returns the state dict of one optimizer: parameters of AdamW follow those of Muon."""
        muon, adam = self.muon.state_dict(), self.adam.state_dict()
        numbered = {len(self.filters) + number: state for number, state in adam['state'].items()}
        return {'state': {**muon['state'], **numbered},
                'param_groups': muon['param_groups'] + adam['param_groups']}

    def load_state_dict(self, saved):
        n = len(self.filters)
        muon = {number: state for number, state in saved['state'].items() if number < n}
        adam = {number - n: state for number, state in saved['state'].items() if number >= n}
        *groups, group = saved['param_groups']
        self.muon.load_state_dict({'state': muon, 'param_groups': groups})
        self.adam.load_state_dict({'state': adam, 'param_groups': [group]})


# ---------------------------------------------------------------- state


def moments(state):
    """Returns the momentum buffers of a parameter: {name: tensor of the same shape, or None}.

    state: the optimizer's state of that parameter. Raises KeyError for that of another optimizer.
    """
    names = ('exp_avg', 'exp_avg_sq') if 'step' in state else ('momentum_buffer',)
    return {name: state[name] for name in names}


def check_state(optimizer):
    """Raises ValueError if there is no momentum, or one differs in shape from its parameter."""
    if not optimizer.state:
        raise ValueError('the optimizer has no momentum: expected one for each parameter')
    for parameter, state in optimizer.state.items():
        for moment in moments(state).values():
            if moment is not None and moment.shape != parameter.shape:
                raise ValueError(
                    f'a momentum is {tuple(moment.shape)}, expected {tuple(parameter.shape)}')
