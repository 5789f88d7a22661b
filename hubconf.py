"""DiracNets through torch.hub; from a clone of this repository:

    net = torch.hub.load('.', 'diracnet18', source='local', pretrained=True)
"""

from pathlib import Path

import torch

import diracnet
from diracnet import check_hash

dependencies = ['torch']
TRAINED = {  # in logs/, with its card; the SHA-256 of its model.pt7
    'diracnet-16-1': '5dc351daceae957861d83114b5bc274918acdda97187c6358f43e3f3ac6a46a9',
    'diracnet-28-2': '9511f9ef9f6c9cc36f0a32ceb904e90cdd49100623a8a748fe2e41586a4b3b06',
}


def diracnet18(pretrained=False):
    """DiracNet-18 for ImageNet, folded to plain convolutions: 11.5 million parameters.

    Inputs (N, 3, 224, 224): RGB in [0, 1], the middle of images whose shorter side OpenCV resized
    to 256 (cubic), less mean (0.485, 0.456, 0.406), over deviation (0.229, 0.224, 0.225);
    `diracnets.preprocess()` makes them of files. Outputs: logits of the 1000 classes of
    ILSVRC2012, in the order of their WordNet numbers.

    pretrained: with the weights that the authors published (fetched once, hash checked each
    time). Their top-1 and top-5 errors on the validation set, 30.37 and 10.88 %, are the authors'
    figures (arXiv 1706.00388), not measured here.
    """
    return diracnet.diracnet18(pretrained)


def diracnet34(pretrained=False):
    """DiracNet-34 for ImageNet, folded to plain convolutions: 21.6 million parameters.

    Inputs (N, 3, 224, 224): RGB in [0, 1], the middle of images whose shorter side OpenCV resized
    to 256 (cubic), less mean (0.485, 0.456, 0.406), over deviation (0.229, 0.224, 0.225);
    `diracnets.preprocess()` makes them of files. Outputs: logits of the 1000 classes of
    ILSVRC2012, in the order of their WordNet numbers.

    pretrained: with the weights that the authors published (fetched once, hash checked each
    time). Their top-1 error on the validation set is 27.79 %, as the RepVGG paper quotes it, the
    top-5 error 9.34 %, which is unverified. These figures were not measured here.
    """
    return diracnet.diracnet34(pretrained)


def diracnet_cifar(depth=28, width=2, num_classes=10, pretrained=False):
    """DiracNet for CIFAR-like images; `diracnets.fold` makes it plain.

    depth: 6n + 4; width: the factor on 16, 32, 64 channels; num_classes: 10 for CIFAR-10, 100 for
    CIFAR-100. Inputs (N, 3, 32, 32), or any square of 4 pixels or more: RGB in [0, 1], less mean
    (125.3, 123.0, 113.9) / 255, over deviation (63.0, 62.1, 66.7) / 255. Outputs: logits of
    num_classes; of CIFAR-10 in the alphabetical order of the names of its classes.

    pretrained: with the parameters that this repository trained and keeps, of depth 28 and width 2
    or 16 and 1: their figures, and what they are good for, are in logs/diracnet-28-2/README.md and
    logs/diracnet-16-1/README.md. To be used they want `.eval()`. Raises ValueError for others and
    for a file with another hash, OSError for one that is missing. Without, they are newly drawn.
    """
    f, params = diracnet.define_diracnet(depth, width, 'CIFAR10', num_classes)
    network = diracnet.Network(f, params)
    if pretrained:
        network.load_state_dict(_trained(depth, width, num_classes))
    return network


def _trained(depth, width, num_classes):
    """The parameters of a network that this repository keeps: a flat dict."""
    name = f'diracnet-{depth}-{width:g}'
    if name not in TRAINED or num_classes != 10:
        raise ValueError(f'no trained {name} of {num_classes} classes: expected 10 classes and '
                         f'one of {", ".join(TRAINED)}')
    path = Path(__file__).parent / 'logs' / name / 'model.pt7'
    try:
        check_hash(path, TRAINED[name])
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return torch.load(path, map_location='cpu', weights_only=True)['params']
