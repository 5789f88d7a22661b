"""The public names of `diracnets`, which imports this module when one is used first."""

from diracconv import DiracConv1d, DiracConv2d, DiracConv3d, DiracParametrization, dirac
from diracnet import DiracNet, define_diracnet, diracnet18, diracnet34
from diracnets.architectures import list_models
from diracnets.checkpoint import load_params, pretrained_params
from diracnets.deployment import deploy
from diracnets.folding import fold
from diracnets.loading import LoadedModel, load
from diracnets.models.registry import create_model
from diracnets.network import Network
from diracnets.onnx import OnnxModel
from diracnets.preprocessing import Preprocessing, preprocess
from diracnets.quantization import equalize

__all__ = [
    'DiracConv1d', 'DiracConv2d', 'DiracConv3d', 'DiracNet', 'DiracParametrization', 'LoadedModel',
    'Network', 'OnnxModel', 'Preprocessing', 'create_model', 'define_diracnet', 'deploy', 'dirac',
    'diracnet18', 'diracnet34', 'equalize', 'fold', 'list_models', 'load', 'load_params',
    'preprocess', 'pretrained_params',
]
