"""DiracNets for torch.hub. From a clone of this repository:

    model = torch.hub.load('.', 'diracnet18', source='local', pretrained=True, num_classes=5)
"""

from pathlib import Path as _Path  # torch.hub lists all callables without an underscore

import torch

from diracnet import check_hash as _check_hash
from diracnet import define_diracnet as _define_diracnet
from diracnet import diracnet18, diracnet34  # noqa: F401
from diracnets.network import Network as _Network

dependencies = ['torch']
TRAINED = {  # released checkpoints in logs/: the SHA-256 of each model.pt7
    'diracnet-16-1': '5dc351daceae957861d83114b5bc274918acdda97187c6358f43e3f3ac6a46a9',
    'diracnet-28-2': '9511f9ef9f6c9cc36f0a32ceb904e90cdd49100623a8a748fe2e41586a4b3b06',
}


def diracnet_cifar(depth: int = 28, width: float = 2, num_classes: int = 10,
                   pretrained: bool = False) -> _Network:
    """DiracNet for CIFAR-like images, not folded; `diracnets.fold` folds it.

    depth: 6n + 4; width: multiplies the 16, 32 and 64 channels; num_classes: 10 for CIFAR-10, 100
    for CIFAR-100. Inputs (N, 3, 32, 32), or squares of at least 4 pixels, are RGB in [0, 1],
    normalized with mean (125.3, 123.0, 113.9) / 255 and std (63.0, 62.1, 66.7) / 255. Outputs are
    the logits (N, num_classes); CIFAR-10's classes are in alphabetical order.

    pretrained: load a released checkpoint of this repository, of depth 28 and width 2 or of depth
    16 and width 1; call `.eval()` to use it. logs/diracnet-28-2/README.md and
    logs/diracnet-16-1/README.md contain the figures and the limitations. Raises ValueError for
    other sizes and for a file with another hash, OSError for a missing file. Without `pretrained`
    the parameters are randomly initialized.
    """
    model = _Network(*_define_diracnet(depth, width, 'CIFAR10', num_classes))
    if pretrained:
        model.load_state_dict(_released_params(depth, width, num_classes))
    return model


def _released_params(depth, width, num_classes):
    name = f'diracnet-{depth}-{width:g}'
    if name not in TRAINED or num_classes != 10:
        raise ValueError(f'no released {name} with {num_classes} classes; use 10 classes and one '
                         f'of {", ".join(TRAINED)}')
    path = _Path(__file__).parent / 'logs' / name / 'model.pt7'
    try:
        _check_hash(path, TRAINED[name])
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return torch.load(path, map_location='cpu', weights_only=True)['params']
