"""What pip installs, beside torch and what torch requires, and nothing else."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """if True:
    import importlib.util, sys
    sys.path[:0] = sys.argv[1:]
    absent = [name for name in ('numpy', 'cv2', 'torchvision', 'networks', 'command')
              if importlib.util.find_spec(name) is None]
    import torch
    from torch import nn
    import diracnets
    from diracconv import DiracConv2d, dirac
    from diracnet import Network, define_diracnet, diracnet18
    from diracnets import fold, load_params

    def check(module, *shape):
        x = torch.randn(shape)
        torch.testing.assert_close(fold(module)(x), module.eval()(x), rtol=1e-4, atol=1e-5)

    check(DiracConv2d(3, 4, 3, padding=1), 1, 3, 8, 8)
    f, params = define_diracnet(10, 0.5, 'CIFAR10')
    f(torch.randn(2, 3, 16, 16), params, True).sum().backward()
    check(Network(f, params), 2, 3, 16, 16)
    torch.save({'params': params}, sys.argv[1] + '/run.pt7')
    assert load_params(sys.argv[1] + '/run.pt7').keys() == params.keys()
    assert diracnet18()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    check(dirac(plain), 2, 3, 8, 8)
    try:
        diracnets.preprocess()('cat.jpg')
    except ValueError as error:
        print(error)
    print(*absent)
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The folder of the files that a wheel of this project installs."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ('source', 'wheel'))
    for pattern in ('*.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        for path in ROOT.glob(pattern):
            shutil.copy(path, source)
    shutil.copytree(ROOT / 'diracnets', source / 'diracnets')
    build = 'import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])'
    subprocess.run([sys.executable, '-c', build, str(folder)], cwd=source, check=True,
                   capture_output=True)
    (built,) = folder.glob('*.whl')
    zipfile.ZipFile(built).extractall(folder)
    return folder


@pytest.fixture(scope='module')
def torch_alone(tmp_path_factory):
    """A folder as `pip install torch` would fill it, of links to the packages that are here."""
    folder, waiting, known = tmp_path_factory.mktemp('torch_alone'), ['torch'], set()
    while waiting:
        name = waiting.pop()
        known.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        for top in {file.parts[0] for file in package.files} - {'..', '__pycache__'}:
            if not (folder / top).exists():  # some share one
                (folder / top).symlink_to(package.locate_file(top))
        required = [line for line in package.requires or [] if 'extra ==' not in line]
        waiting += {re.match(r'[\w.-]+', line)[0].lower() for line in required} - known
    return folder


def test_wheel_works_beside_torch_alone(wheel, torch_alone):
    done = subprocess.run(
        [sys.executable, '-I', '-S', '-c', SCRIPT, str(wheel), str(torch_alone)], cwd=wheel,
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        'cv2 is missing: expected OpenCV, as of pip install opencv-python-headless',
        'numpy cv2 torchvision networks command',
    ]
