"""How near the identity each layer of a DiracNet is."""

import math

import torch

SHOWN = {  # what figures show of a row: label, and value
    'mean of alpha': lambda row: row['alpha_mean'],
    'root mean square of beta': lambda row: math.hypot(row['beta_mean'], row['beta_deviation']),
    'norm of the Dirac part\nover that of the free part':
        lambda row: row['dirac_norm'] / row['free_norm'],
}


@torch.no_grad()
def layers_of(params):
    """Rows of the Dirac layers, the first above the stem: alpha, beta, norms of W_hat's two parts.

    params: a flat dict, of the functional form before folding; of others there are no rows.
    """
    rows = []
    names = [name.removesuffix('.alpha') for name in params if name.endswith('.alpha')]
    for layer, name in enumerate((n for n in names if f'{n}.conv' in params), 1):
        alpha, beta, weight = (params[f'{name}.{part}'] for part in ('alpha', 'beta', 'conv'))
        delta = min(weight.shape[:2])  # filters with a one of delta
        rows.append({
            'layer': layer,
            'alpha_mean': alpha.mean().item(), 'alpha_deviation': alpha.std().item(),
            'beta_mean': beta.mean().item(), 'beta_deviation': beta.std().item(),
            'dirac_norm': alpha[:delta].norm().item(),  # of diag(alpha) delta
            'free_norm': beta.norm().item(),  # of diag(beta) normalize(W): unit filters
        })
    return rows
