"""What moves the parameters: SGD as in the paper, or Muon on the filters; and how fast, over time.

Each group of parameters has the rate of its own that it is to have at most as `initial_lr`, as
torch's schedulers do.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from diracnets.models.registry import ARCHITECTURES

OPTIMIZERS = ('sgd', 'muon')
SCHEDULES = ('step', 'cosine', 'onecycle', 'linear')
MUON_MOMENTUM, NEWTON_SCHULZ_STEPS = 0.6, 3  # of airbench94_muon, for few epochs
ADAM_BETAS = 0.85, 0.95
WARM_UP = 0.2  # share of a linear schedule


# ---------------------------------------------------------------- over time


def lr_factor(opt, done):
    """The share of the highest learning rate when `done` epochs, or parts of one, are done.

    `step` drops it at the start of the epochs of --epoch_step, counted from 1. `cosine` lowers it
    to 0. `onecycle` raises it from 1/25 in the first 30 %, then lowers it to 1/250000 (arXiv
    1708.07120, with the defaults of torch's OneCycleLR; the momentum stays). `linear` raises it
    from 0 in the first 20 %, then lowers it to 0, in straight lines.
    """
    if opt.lr_schedule == 'step':
        return opt.lr_decay_ratio ** sum(epoch <= done + 1 for epoch in opt.epoch_step)

    def half_cosine(start, end, part):
        return end + (start - end) * (1 + math.cos(math.pi * part)) / 2

    part = done / opt.epochs
    if opt.lr_schedule == 'linear':
        return min(part / WARM_UP, (1 - part) / (1 - WARM_UP))
    if opt.lr_schedule == 'cosine':
        return half_cosine(1, 0, part)
    if part < 0.3:
        return half_cosine(1 / 25, 1, part / 0.3)
    return half_cosine(1, 1 / 250_000, (part - 0.3) / 0.7)


def set_learning_rate(optimizer, share):
    """Sets the rate of each group to a share of its highest one.

    The momentum stays (the original lost it where the rate drops).
    """
    for group in optimizer.param_groups:
        group['lr'] = group['initial_lr'] * share


# ---------------------------------------------------------------- optimizers


def make_optimizer(network, opt):
    """The optimizer that --optimizer names, of the parameters that require grad.

    Raises ValueError for a torch without Muon.
    """
    params = [p for p in network.parameters() if p.requires_grad]
    optimizer = {'sgd': _sgd, 'muon': _muon}[opt.optimizer](params, opt)
    for group in optimizer.param_groups:
        group['initial_lr'] = group['lr']
    return optimizer


def _sgd(params, opt):
    """SGD; the decay leaves one-dimensional tensors (alpha, beta, biases, batch norm) alone.

    Except in the families whose papers decay them all.
    """
    decayed = [p.dim() > 1 or ARCHITECTURES[opt.model].decay_all for p in params]
    groups = [
        {'params': [p for p, d in zip(params, decayed) if d], 'weight_decay': opt.weight_decay},
        {'params': [p for p, d in zip(params, decayed) if not d], 'weight_decay': 0.0},
    ]
    fused = params[0].is_cuda  # one kernel for all parameters
    return torch.optim.SGD(groups, lr=opt.lr, momentum=0.9, nesterov=opt.nesterov, fused=fused)


def _muon(params, opt):
    if not hasattr(torch.optim, 'Muon'):
        raise ValueError(f'--optimizer muon with torch {torch.__version__}: expected 2.9 or newer')
    return FilterMuon(
        [p for p in params if p.dim() > 2], [p for p in params if p.dim() <= 2],
        opt.lr, opt.adam_lr,
    )


class FilterMuon:
    """torch's Muon on filters, of which each is a row of a matrix, and AdamW on all else.

    What torch's optimizers are to a training: `param_groups`, `state` and the methods below. Before
    its step, which is orthogonal whatever the gradient, each matrix is scaled to the norm that one
    with rows of norm 1 has, so that the rate alone says how far it turns, as airbench94_muon does.
    In W_hat and before batch norm this scale means nothing to the network; elsewhere (AlexNet, the
    last convolution of a Wide ResNet's block) it does, and the weights are not kept. A decay would
    mean nothing here.
    """

    def __init__(self, filters, others, lr, adam_lr):
        self.filters = filters
        # torch's takes matrices alone: these share the memory of the filters
        matrices = [nn.Parameter(f.detach().view(len(f), -1)) for f in filters]
        self.muon = torch.optim.Muon(matrices, lr, 0.0, MUON_MOMENTUM,
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

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for f, matrix in zip(self.filters, self.muon.param_groups[0]['params']):
            matrix.grad = None if f.grad is None else f.grad.reshape(len(f), -1)
            matrix.data.copy_(len(f) ** 0.5 * F.normalize(matrix.data, dim=(0, 1)))
        self.muon.step()
        self.adam.step()
        return loss

    def state_dict(self):
        """As of one optimizer: the parameters are numbered on."""
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


# ---------------------------------------------------------------- what they remember


def moments(state):
    """What an optimizer remembers of a parameter: {name: tensor of the parameter's shape, or None}.

    state: of one parameter, as of a state dict. Raises KeyError for one of another optimizer.
    """
    names = ('exp_avg', 'exp_avg_sq') if 'step' in state else ('momentum_buffer',)
    return {name: state[name] for name in names}


def check_state(optimizer):
    """Raises ValueError if a momentum cannot be that of its parameter."""
    if not optimizer.state:
        raise ValueError('the optimizer holds no momentum: expected one for each parameter')
    for parameter, state in optimizer.state.items():
        for moment in moments(state).values():
            if moment is not None and moment.shape != parameter.shape:
                raise ValueError(
                    f'a momentum is {tuple(moment.shape)}: expected {tuple(parameter.shape)}')
