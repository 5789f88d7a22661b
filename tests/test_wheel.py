"""The wheel works with torch as the only other package, in the folder of another project."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import diracnets

ROOT = Path(__file__).parent.parent
OPTIONAL = ('numpy', 'PIL', 'cv2', 'torchvision', 'onnxruntime', 'safetensors', 'tqdm')
USER_FILES = ('train.py', 'networks.py', 'command.py', 'cli.py', 'training.py', 'models.py')
SCRIPT = """if True:
    import importlib.util, pathlib, sys
    sys.path[:0] = ['.', *sys.argv[1:3]]
    installed = [name for name in sys.argv[3:] if importlib.util.find_spec(name)]
    assert not installed, installed
    import torch
    from torch import nn
    import diracnets
    from diracconv import DiracConv2d, dirac
    from diracnet import define_diracnet, diracnet18
    from diracnets import Network, create_model, fold

    def check(module, *shape):
        x = torch.randn(shape)
        torch.testing.assert_close(fold(module)(x), module.eval()(x), rtol=1e-4, atol=1e-5)

    assert all(hasattr(diracnets, name) for name in diracnets.__all__)
    assert {'diracnet', 'plain', 'resnet18'} <= set(diracnets.list_models())
    check(DiracConv2d(3, 4, 3, padding=1), 1, 3, 8, 8)
    check(create_model('plain', depth=10, width=0.5), 2, 3, 16, 16)
    check(create_model('plain', depth=10, width=0.5, block='dbb'), 2, 3, 16, 16)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    check(dirac(plain), 2, 3, 8, 8)
    assert diracnet18()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)

    f, params = define_diracnet(10, 0.5, 'CIFAR10')
    f(torch.randn(2, 3, 16, 16), params, True).sum().backward()
    network = Network(f, params)
    args = {'depth': 10, 'width': 0.5, 'dataset': 'Digits', 'image_size': 32}
    pathlib.Path('run').mkdir()
    torch.save({'params': network.state_dict(), 'args': args, 'classes': [*'0123456789']},
               'run/model.pt7')
    loaded = diracnets.load('run')
    assert (loaded.num_classes, loaded.classes[3], loaded.preprocess.size) == (10, '3', 32)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.model(x), network.eval()(x))
    check(loaded.model, 2, 3, 32, 32)
    assert diracnets.load_params('run').keys() == params.keys()

    for name in ('cat.jpg', 'model.onnx', 'model.safetensors'):
        pathlib.Path(name).write_bytes(b'0123456789')
    for call in (lambda: create_model('resnet18'), lambda: create_model('densenet121'),
                 lambda: loaded.preprocess('cat.jpg'), lambda: diracnets.load('model.onnx'),
                 lambda: diracnets.load('model.safetensors')):
        try:
            call()
        except (ImportError, ValueError) as error:
            print(error)
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A folder with the files that a wheel of this project installs."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ('source', 'wheel'))
    for pattern in ('*.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        for path in ROOT.glob(pattern):
            shutil.copy(path, source)
    for package in ('diracnets', 'training', 'experiments', 'tests'):
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns('__pycache__')
        )
    build = 'import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])'
    subprocess.run([sys.executable, '-c', build, str(folder)], cwd=source, check=True,
                   capture_output=True)
    (built,) = folder.glob('*.whl')
    zipfile.ZipFile(built).extractall(folder)
    built.unlink()
    return folder


@pytest.fixture(scope='module')
def torch_alone(tmp_path_factory):
    """A folder as after `pip install torch`, with links to the packages installed here."""
    folder = tmp_path_factory.mktemp('torch_alone')
    remaining, visited = ['torch'], set()
    while remaining:
        name = remaining.pop()
        visited.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # required on other platforms
            continue
        for top in {file.parts[0] for file in package.files} - {'..', '__pycache__'}:
            if not (folder / top).exists():  # some packages share a folder
                (folder / top).symlink_to(package.locate_file(top))
        requirements = [line for line in package.requires or [] if 'extra ==' not in line]
        remaining += {re.match(r'[\w.-]+', line)[0].lower() for line in requirements} - visited
    return folder


def test_wheel_contains_the_library_only(wheel):
    version = diracnets.__version__
    assert {path.name for path in wheel.iterdir()} == {
        'diracconv.py', 'diracnet.py', 'diracnets', f'diracnets-{version}.dist-info'}
    assert (wheel / 'diracnets' / 'py.typed').exists()
    modules = {path.relative_to(ROOT) for path in (ROOT / 'diracnets').rglob('*.py')}
    assert {path.relative_to(wheel) for path in (wheel / 'diracnets').rglob('*.py')} == modules
    (metadata,) = importlib.metadata.distributions(name='diracnets', path=[str(wheel)])
    assert metadata.version == version
    required = [line.replace(' ', '') for line in metadata.requires if 'extra' not in line]
    assert required == ['torch>=2.9']


@pytest.mark.slow
def test_wheel_works_with_torch_alone_beside_user_files(wheel, torch_alone, tmp_path):
    for name in USER_FILES:
        (tmp_path / name).write_text(f'raise ImportError("imported the {name} of the user")\n')
    process = subprocess.run(
        [sys.executable, '-I', '-S', '-c', SCRIPT, str(wheel), str(torch_alone), *OPTIONAL],
        cwd=tmp_path, capture_output=True, text=True,
    )
    assert process.returncode == 0, process.stderr
    errors = process.stdout.splitlines()
    missing = ['torchvision', 'torchvision', 'opencv', 'onnxruntime', 'safetensors']
    assert len(errors) == len(missing)
    for error, package in zip(errors, missing):
        assert package in error.lower()
