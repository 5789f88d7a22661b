"""DiracNets (Zagoruyko & Komodakis, arXiv 1706.00388), functional and folded.

`define_diracnet` returns the model for training as a function and its parameters:

    f, params = define_diracnet(depth=28, width=1, dataset='CIFAR10')
    logits = f(inputs, params, mode=True)           # mode: True in training

`diracnets.Network(f, params)` is the same as a chain of modules. `DiracNet` is the model for
deployment: batch norm and the Dirac parametrization are folded into standard convolutions. ImageNet
weights are published:

    model = diracnet18(pretrained=True)
"""

import functools
import hashlib
import itertools
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diracconv import ALPHA_INIT, BETA_INIT, dirac_weight

BN_EPS, BN_MOMENTUM = 1e-5, 0.1
CIFAR_STEM, CIFAR_CHANNELS = 3, (16, 32, 64)  # stem kernel size; channels of groups at width 1
IMAGENET_STEM, IMAGENET_CHANNELS = 7, (64, 128, 256, 512)
IMAGENET_BLOCKS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}  # depth: blocks in each group
BLOCK = re.compile(r'(?:features\.)?group(\d+)\.block(\d+)\.')  # prefix of a parameter's name
CLASSES = {'CIFAR10': 10, 'CIFAR100': 100, 'ImageNet': 1000}
MODEL_URLS = {
    18: 'https://s3.amazonaws.com/modelzoo-networks/diracnet18v2folded-a2174e15.pth',
    34: 'https://s3.amazonaws.com/modelzoo-networks/diracnet34v2folded-dfb15d34.pth',
}
Params = Mapping[str, Tensor]  # flat name, such as 'group0.block0.conv', -> tensor


# ---------------------------------------------------------------- topology


@dataclass(frozen=True)
class Topology:
    """The sizes that define one DiracNet (section 3.2, tables 1 and 5)."""

    stem: int  # kernel size of the first convolution: 3, or 7 with stride 2 and a max-pool
    channels: tuple[int, ...]  # of each group; the stem has as many as the first group
    blocks: tuple[int, ...]  # convolutions in each group
    num_classes: int
    in_channels: int = 3

    @classmethod
    def from_params(cls, params: Params) -> 'Topology':
        """Infers the Topology of a functional or folded DiracNet from its parameter shapes.

        params: flat name -> tensor. Raises ValueError if their names and shapes are not those of a
        DiracNet.
        """
        stem = _shape_of(params, 'features.conv.weight' if is_folded(params) else 'conv', 4)
        num_classes, channels = _shape_of(params, 'fc.weight', 2)
        names = {match.groups() for match in map(BLOCK.match, params) if match}
        counts = Counter(int(group) for group, _ in names)
        blocks = tuple(counts[group] for group in sorted(counts))
        if stem[-1] == IMAGENET_STEM:
            valid, expected = blocks in IMAGENET_BLOCKS.values(), 'those of depth 18 or 34'
        else:
            valid = len(blocks) == 3 and len(set(blocks)) == 1 and blocks[0] % 2 == 0
            expected = 'three groups of the same even number'
        if not valid:
            numbers = ', '.join(map(str, blocks)) or 'no'
            raise ValueError(f'the groups have {numbers} blocks: expected {expected}')
        sizes = cls(stem[-1], (channels,), blocks, num_classes)
        topology = make_topology(sizes.depth, sizes.width, sizes.kind, num_classes, stem[1])
        with torch.device('meta'):  # only shapes are needed
            check_params(params, DiracNet.from_topology(topology).state_dict()
                         if is_folded(params) else init_params(topology))
        return topology

    @property
    def imagenet(self) -> bool:
        """Whether the stem is the one for ImageNet-size images."""
        return self.stem == IMAGENET_STEM

    @property
    def kind(self) -> str:
        """'ImageNet', or 'CIFAR10' for all small images."""
        return 'ImageNet' if self.imagenet else 'CIFAR10'

    @property
    def depth(self) -> int:
        """The depth as the paper counts it: for CIFAR two more than the number of layers."""
        return sum(self.blocks) + (2 if self.imagenet else 4)

    @property
    def width(self) -> float:
        """The multiplier of the numbers of channels."""
        return self.channels[-1] / (IMAGENET_CHANNELS if self.imagenet else CIFAR_CHANNELS)[-1]

    def matches(self, depth: int, width: float) -> bool:
        """Whether `make_topology` returns this Topology for a depth and a width."""
        sizes = depth, width, self.kind, self.num_classes, self.in_channels
        try:
            return self == make_topology(*sizes)
        except ValueError:
            return False

    def layers(self) -> Iterator[tuple[str, int, int]]:
        """Yields (name, in channels, out channels) of each convolution after the stem."""
        cin = self.channels[0]
        for g, (cout, blocks) in enumerate(zip(self.channels, self.blocks)):
            for b in range(blocks):
                yield f'group{g}.block{b}', cin, cout
                cin = cout


def _shape_of(params, name, ndim):
    if name not in params:
        raise ValueError(f'{name} is missing: expected the parameters of a DiracNet, got '
                         + (join_names(params) or 'none'))
    if getattr(params[name], 'ndim', None) != ndim:
        raise ValueError(f'{name} is invalid: expected a tensor with {ndim} dimensions')
    return params[name].shape


def check_integers(minimum: int | None = None, /, **sizes: Any) -> None:
    """Raises ValueError for a size that is not an integer (16.0 is not) or below the minimum."""
    for name, value in sizes.items():
        if not isinstance(value, Integral):
            raise ValueError(f'{name} {value!r}: expected an integer')
        if minimum is not None and value < minimum:
            raise ValueError(f'{name} {value}: expected at least {minimum}')


def make_topology(depth: int, width: float, dataset: str, num_classes: int | None = None,
                  in_channels: int = 3) -> Topology:
    """Returns the Topology of a DiracNet.

    depth: 6n + 4 for CIFAR, 18 or 34 for ImageNet. width: the multiplier of the numbers of
    channels, which are rounded down. dataset: 'CIFAR10', 'CIFAR100' or 'ImageNet'. num_classes: by
    default that of the dataset. in_channels: channels of the images. Raises ValueError that names
    the nearest valid values.
    """
    if dataset not in CLASSES:
        raise ValueError(f'unknown dataset {dataset!r}: expected one of {", ".join(CLASSES)}')
    num_classes = CLASSES[dataset] if num_classes is None else num_classes
    check_integers(depth=depth)
    check_integers(1, num_classes=num_classes, in_channels=in_channels)
    if dataset == 'ImageNet':
        stem, channels = IMAGENET_STEM, IMAGENET_CHANNELS
        if depth not in IMAGENET_BLOCKS:
            raise ValueError(f'depth {depth}: DiracNets for ImageNet have depth 18 or 34')
        blocks = IMAGENET_BLOCKS[depth]
    else:
        stem, channels = CIFAR_STEM, CIFAR_CHANNELS
        if depth < 10 or depth % 6 != 4:
            below = max(10, (depth - 4) // 6 * 6 + 4)
            raise ValueError(
                f'depth {depth}: DiracNets for CIFAR have depth 6n + 4; '
                f'the nearest are {below} and {below + 6}'
            )
        blocks = ((depth - 4) // 6 * 2,) * 3
    if not (isinstance(width, Real) and 1 <= channels[0] * width < float('inf')):
        raise ValueError(f'width {width!r}: expected at least {1 / channels[0]}, for one channel')
    channels = tuple(int(c * width) for c in channels)
    return Topology(stem, channels, blocks, num_classes, in_channels)


# ---------------------------------------------------------------- parameters


def is_folded(params: Params) -> bool:
    """Returns whether parameters are those of a folded DiracNet."""
    return 'features.conv.bias' in params  # other models have a stem without bias


def find_nonfinite(tensors: Params) -> str | None:
    """Returns the name of the first tensor that contains NaN or Inf, or None."""
    return next((name for name, t in tensors.items() if not t.isfinite().all()), None)


def join_names(names: Iterable[Any], limit: int = 5) -> str:
    """Returns the first names in one line, each cut to 200 characters, and the number of others."""
    names = list(names)
    more = f', and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(str(name)[:200] for name in names[:limit]) + more


def check_params(params: Params, expected: Params) -> None:
    """Raises ValueError that lists the names and shapes that differ from `expected`."""
    errors = [f'{name} is missing' for name in expected.keys() - params.keys()]
    errors += [f'{name} is unknown' for name in params.keys() - expected.keys()]
    errors += [
        f'{name} is {tuple(params[name].shape)}, expected {tuple(expected[name].shape)}'
        for name in expected.keys() & params.keys()
        if params[name].shape != expected[name].shape
    ]
    if errors:
        raise ValueError(f'the checkpoint does not fit the network: {join_names(sorted(errors))}')


def init_params(topology: Topology) -> dict[str, Tensor]:
    """Initializes the parameters of a DiracNet: flat name -> tensor (section 3.2).

    All tensors except running statistics require grad.
    """
    kaiming = nn.init.kaiming_normal_  # fan-in, gain sqrt(2)
    cin, cout = topology.in_channels, topology.channels[0]
    params = {'conv': kaiming(torch.empty(cout, cin, topology.stem, topology.stem))}
    params.update(_init_batch_norm('bn', cout))
    for name, cin, cout in topology.layers():
        params[f'{name}.conv'] = kaiming(torch.empty(cout, cin, 3, 3))
        params[f'{name}.alpha'] = torch.full((cout,), ALPHA_INIT)
        params[f'{name}.beta'] = torch.full((cout,), BETA_INIT)
        params.update(_init_batch_norm(f'{name}.bn', cout))
    params['fc.weight'] = kaiming(torch.empty(topology.num_classes, topology.channels[-1]))
    params['fc.bias'] = torch.zeros(topology.num_classes)
    for name, tensor in params.items():
        tensor.requires_grad_('running_' not in name)
    return params


def _init_batch_norm(prefix, channels):
    return {
        f'{prefix}.weight': torch.rand(channels),
        f'{prefix}.bias': torch.zeros(channels),
        f'{prefix}.running_mean': torch.zeros(channels),
        f'{prefix}.running_var': torch.ones(channels),
    }


# ---------------------------------------------------------------- functional model


def _normalize(x, params, prefix, mode):
    mean, var, weight, bias = (
        params[f'{prefix}.{leaf}'] for leaf in ('running_mean', 'running_var', 'weight', 'bias')
    )
    return F.batch_norm(x, mean, var, weight, bias, mode, BN_MOMENTUM, BN_EPS)


def forward(topology: Topology, inputs: Tensor, params: Params, mode: bool) -> Tensor:
    """Runs a DiracNet: inputs (N, in_channels, H, W) to logits (N, num_classes).

    With mode=True, batch norm uses batch statistics and updates the running statistics.
    """
    stride, padding = 1 + topology.imagenet, topology.stem // 2
    x = F.conv2d(inputs, params['conv'], stride=stride, padding=padding)
    x = _normalize(x, params, 'bn', mode)
    if topology.imagenet:
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for g, blocks in enumerate(topology.blocks):
        if g > 0:
            x = F.max_pool2d(x, kernel_size=2)
        for name in (f'group{g}.block{b}' for b in range(blocks)):
            w_hat = dirac_weight(*(params[f'{name}.{leaf}'] for leaf in ('conv', 'alpha', 'beta')))
            x = F.conv2d(F.relu(x), w_hat, padding=1)
            x = _normalize(x, params, f'{name}.bn', mode)  # (N, channels[g], H', W')
    x = F.relu(x).mean(dim=(2, 3))  # (N, channels[-1])
    return F.linear(x, params['fc.weight'], params['fc.bias'])


def define_diracnet(
    depth: int, width: float, dataset: str, num_classes: int | None = None, in_channels: int = 3,
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """Returns (f, params): a DiracNet as a function, and its randomly initialized parameters.

    `f(inputs, params, mode)` maps square inputs (N, in_channels, H, W) to logits (N, num_classes);
    mode=True is training. The arguments and the errors are those of `make_topology`.
    """
    topology = make_topology(depth, width, dataset, num_classes, in_channels)
    return functools.partial(forward, topology), init_params(topology)


# ---------------------------------------------------------------- modules


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Returns the batch norm of a DiracNet, whose scales are initialized in [0, 1)."""
    bn = nn.BatchNorm2d(channels, BN_EPS, BN_MOMENTUM)
    nn.init.uniform_(bn.weight)
    return bn


def conv_block(conv_type: type[nn.Conv2d], cin: int, cout: int) -> nn.Sequential:
    """Returns ReLU, 3x3 convolution, batch norm: (N, cin, H, W) to (N, cout, H, W)."""
    conv = conv_type(cin, cout, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv, bn=batch_norm(cout)))


def stem_conv(topology: Topology, bias: bool) -> nn.Conv2d:
    """Returns the first convolution: (N, in_channels, H, W) to (N, channels[0], H', W')."""
    return nn.Conv2d(
        topology.in_channels, topology.channels[0], topology.stem, 1 + topology.imagenet,
        padding=topology.stem // 2, bias=bias,
    )


def make_layers(
    topology: Topology, stem: Mapping[str, nn.Module], block: Callable[[int, int], nn.Module],
    group: Callable[[OrderedDict], nn.Module] = nn.Sequential, last_relu: bool = True,
) -> OrderedDict[str, nn.Module]:
    """Returns the layers of a DiracNet before the linear layer, by name.

    In sequence they map images (N, in_channels, H, W) to features (N, channels[-1], 1, 1). stem:
    the first layers, by name. block: makes a block from (in channels, out channels). group: makes
    the module of a group from its blocks. last_relu: a ReLU before the average pooling.
    """
    layers = OrderedDict(stem)
    if topology.imagenet:
        layers['max_pool'] = nn.MaxPool2d(3, stride=2, padding=1)
    for name, members in itertools.groupby(topology.layers(), lambda row: row[0].split('.')[0]):
        if name != 'group0':
            layers[f'{name}_pool'] = nn.MaxPool2d(2)
        layers[name] = group(OrderedDict(
            (block_name.split('.')[1], block(cin, cout)) for block_name, cin, cout in members
        ))
    if last_relu:
        layers['relu'] = nn.ReLU()
    layers['avg_pool'] = nn.AdaptiveAvgPool2d(1)
    return layers


class DiracNet(nn.Module):
    """The folded DiracNet, a chain of ReLU and standard convolutions: (N, C, H, W) to logits.

    The state dict has the keys of the published folded checkpoints: `features.conv.weight|bias`,
    `features.group{g}.block{b}.conv.weight|bias`, `fc.weight|bias`. The arguments and errors are
    those of `make_topology`, except that num_classes=0 makes `fc` an nn.Identity: the outputs are
    the pooled features (N, channels[-1]).
    """

    def __init__(self, depth: int = 18, width: float = 1, dataset: str = 'ImageNet',
                 num_classes: int | None = None, in_channels: int = 3) -> None:
        super().__init__()
        no_head = num_classes == 0
        topology = make_topology(depth, width, dataset, None if no_head else num_classes,
                                 in_channels)
        stem = {'conv': stem_conv(topology, bias=True)}
        self.features = nn.Sequential(make_layers(topology, stem, self._block))
        self.fc = (nn.Identity() if no_head
                   else nn.Linear(topology.channels[-1], topology.num_classes))

    @staticmethod
    def _block(cin, cout):
        return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(cin, cout, 3, padding=1)))

    @classmethod
    def from_topology(cls, t: Topology) -> 'DiracNet':
        return cls(t.depth, t.width, t.kind, t.num_classes, t.in_channels)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.features(inputs).flatten(1))


# ---------------------------------------------------------------- published weights


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_hash(path: str | Path, expected: str) -> None:
    """Raises ValueError if the SHA-256 of a file does not start with the expected digits."""
    actual = sha256(path)[: len(expected)]
    if actual != expected:
        raise ValueError(f'its SHA-256 begins with {actual}, expected {expected}')


def load_published(url: str, get_params: Callable[[Any], Params]) -> Params:
    """Loads the parameters of a published checkpoint on the CPU, cached by torch.hub.

    get_params: returns the flat parameters in the contents of the file; raises ValueError if they
    are those of another model. If the file name ends in digits of its SHA-256, they are checked.
    Raises RuntimeError, with the path for a manual download, if the file is unusable.
    """
    path = Path(torch.hub.get_dir(), 'checkpoints', url.rpartition('/')[2])
    try:
        digits = re.search(r'-([0-9a-f]+)\.\w+$', path.name)
        if digits and path.exists():  # torch.hub checks the hash of downloads, but not of the cache
            check_hash(path, digits[1])
        params = get_params(torch.hub.load_state_dict_from_url(
            url, map_location='cpu', check_hash=True, weights_only=True
        ))
        if name := find_nonfinite(params):
            raise ValueError(f'{name} contains NaN or Inf')
        return params
    except Exception as error:  # torch.load of a corrupt file may raise almost anything
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise RuntimeError(f'{url}: {reason}; download it to {path}') from error


def _diracnet(depth, pretrained, num_classes, in_channels):
    model = DiracNet(depth, num_classes=num_classes, in_channels=in_channels)
    if not pretrained:
        return model
    with torch.device('meta'):
        published = DiracNet(depth).state_dict()

    def get_params(contents):
        check_params(contents, published)
        return contents

    params = load_published(MODEL_URLS[depth], get_params)
    fits = {'features.conv.': in_channels == 3, 'fc.': num_classes in (1000, None)}
    if not fits['features.conv.']:
        warnings.warn(f'diracnet{depth}: features.conv is randomly initialized; the weights '
                      f'are for 3 input channels, not {in_channels}', stacklevel=3)
    new = tuple(prefix for prefix, fit in fits.items() if not fit)
    params = {name: tensor for name, tensor in params.items() if not name.startswith(new)}
    model.load_state_dict({**model.state_dict(), **params})
    return model


def diracnet18(pretrained: bool = False, num_classes: int = 1000,
               in_channels: int = 3) -> DiracNet:
    """Returns the folded DiracNet-18: (N, in_channels, H, W) to logits (N, num_classes).

    pretrained: load the authors' weights for ImageNet, downloaded once into the cache of torch.hub;
    their hash is checked each time. The classes are those of ILSVRC2012, ordered by WordNet ID.
    Inputs (N, 3, 224, 224) are RGB in [0, 1], center crops of images whose shorter side OpenCV
    resized to 256 (cubic), normalized with mean (.485, .456, .406) and std (.229, .224, .225), as
    by `diracnets.preprocess()`. The authors report a top-1 error of 30.37 % and a top-5 error of
    10.88 % (in their notebook); these figures were not reproduced here. Raises RuntimeError, with
    the path for a manual download, if the weights cannot be loaded.

    num_classes: if it is not 1000, `fc` is randomly initialized, also with `pretrained`; 0 replaces
    `fc` by nn.Identity, and the outputs are the pooled features (N, 512). in_channels: if it is not
    3, the stem, `features.conv`, is randomly initialized too, with a warning.
    """
    return _diracnet(18, pretrained, num_classes, in_channels)


def diracnet34(pretrained: bool = False, num_classes: int = 1000,
               in_channels: int = 3) -> DiracNet:
    """Returns the folded DiracNet-34: (N, in_channels, H, W) to logits (N, num_classes).

    Inputs (N, 3, 224, 224), mean, std, classes, arguments and errors are those of `diracnet18`. The
    RepVGG paper quotes a top-1 error of 27.79 % for the authors' weights; a top-5 error of 9.34 %
    is unverified. These figures were not reproduced here.
    """
    return _diracnet(34, pretrained, num_classes, in_channels)
