"""DiracNets: layers, models, folding, loading and deployment, in one namespace.

    loaded = diracnets.load('logs/diracnet-28-2')       # model, preprocessing, class names
    model = diracnets.fold(loaded.model)                # standard convolutions

The public names, and torch with them, are imported at their first use: `train.py --help` imports
submodules that do not need torch, and should not wait for it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diracnets.namespace import *  # noqa: F403

__version__ = '0.1.0'  # pyproject.toml reads it from here


def __getattr__(name):
    if name == '__all__' or not name.startswith('_'):
        namespace = importlib.import_module('diracnets.namespace')
        if hasattr(namespace, name):
            globals()[name] = getattr(namespace, name)
        if name in globals():  # importing the namespace also sets submodules as attributes
            return globals()[name]
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted({*globals(), *__getattr__('__all__')})
