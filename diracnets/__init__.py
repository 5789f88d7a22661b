"""DiracNets: layers, models, folding, loading and deployment, in one namespace.

    loaded = diracnets.load('logs/diracnet-28-2')       # model, preprocessing, class names
    model = diracnets.fold(loaded.model)                # standard convolutions
"""

from diracconv import DiracConv1d, DiracConv2d, DiracConv3d, DiracParametrization, dirac
from diracnet import DiracNet, Network, define_diracnet, diracnet18, diracnet34
from diracnets.checkpoint import load_params, pretrained_params
from diracnets.deploy import deploy
from diracnets.fold import fold
from diracnets.loading import LoadedModel, load
from diracnets.models.registry import create_model, list_models
from diracnets.onnx import OnnxModel
from diracnets.preprocessing import Preprocessing, preprocess
from diracnets.quantization import equalize

__version__ = '0.1.0'  # pyproject.toml reads it from here
__all__ = [
    'DiracConv1d', 'DiracConv2d', 'DiracConv3d', 'DiracNet', 'DiracParametrization', 'LoadedModel',
    'Network', 'OnnxModel', 'Preprocessing', '__version__', 'create_model',
    'define_diracnet', 'deploy', 'dirac', 'diracnet18', 'diracnet34', 'equalize', 'fold',
    'list_models', 'load', 'load_params', 'preprocess', 'pretrained_params',
]
