"""Loads a model by its name, if the authors published it, or else from a file.

    loaded = load_by_name('diracnet18')             # LoadedModel
"""

import diracnet
from diracnets.loading import LoadedModel, load
from diracnets.preprocessing import Preprocessing

PUBLISHED = {'diracnet18': 18, 'diracnet34': 34}  # name: depth


def load_by_name(name: str) -> LoadedModel:
    """Loads a model of PUBLISHED, with its weights, or any other model as `diracnets.load` does.

    The names of the 1000 ImageNet classes are not included: see `imagenet_classes`. Raises
    RuntimeError, with the path for a manual download, if published weights cannot be loaded.
    """
    if name not in PUBLISHED:
        return load(name)
    model = getattr(diracnet, name)(pretrained=True).eval()
    options = {'model': 'diracnet', 'depth': PUBLISHED[name], 'width': 1}
    preprocess = Preprocessing.for_dataset('ImageNet')
    return LoadedModel(name, model, options, preprocess, 1000, None, {}, {})


def imagenet_classes() -> list[str]:
    """Returns the names of the 1000 classes of ILSVRC2012, in the order of their WordNet IDs.

    Raises ValueError if torchvision, which contains the names, is not installed.
    """
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError as error:
        raise ValueError('torchvision is not installed; pip install torchvision') from error
    return ResNet18_Weights.IMAGENET1K_V1.meta['categories']
