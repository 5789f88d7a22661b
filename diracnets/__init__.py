"""DiracNets: layers, models, folding, loading and deployment, in one namespace.

    loaded = diracnets.load('logs/diracnet-28-2')       # model, preprocessing, class names
    model = diracnets.fold(loaded.model)                # standard convolutions
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diracnets.namespace import *  # noqa: F403

__version__ = '0.1.0'  # pyproject.toml reads it from here


class _Package(types.ModuleType):
    """The package, which imports its public names, and torch with them, at their first use.

    `train.py --help` imports submodules that do not need torch, and should not wait for it.
    """

    def __getattr__(self, name):
        if name == '__all__' or not name.startswith('_'):
            namespace = importlib.import_module('diracnets.namespace')
            if hasattr(namespace, name):
                setattr(self, name, getattr(namespace, name))
                return getattr(namespace, name)
        raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')

    def __setattr__(self, name, value):
        # the import of the modules fold and deploy must not hide the functions of the same name
        if name not in ('fold', 'deploy') or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)

    def __dir__(self):
        return sorted({*super().__dir__(), *self.__all__})


sys.modules[__name__].__class__ = _Package
