"""Slow reference implementation of W_hat."""

import torch
from torch import nn


def slow_w_hat(weight, alpha, beta, groups):
    """Computes equation 3 filter by filter in float64, with the dense delta of torch."""
    delta = torch.zeros_like(weight, dtype=torch.float64)
    nn.init.dirac_(delta, groups)
    filters = [
        alpha[o].double() * delta[o]
        + beta[o].double() * weight[o].double() / max(weight[o].double().pow(2).sum() ** 0.5, 1e-12)
        for o in range(len(weight))
    ]
    return torch.stack(filters)


def batch_norm(x, state, prefix):
    """Computes batch norm in evaluation mode by its definition."""
    mean, var, weight, bias = (
        state[f'{prefix}.{name}'].view(-1, 1, 1)
        for name in ('running_mean', 'running_var', 'weight', 'bias')
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias
