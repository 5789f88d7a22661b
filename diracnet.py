"""DiracNets (Zagoruyko & Komodakis, arXiv 1706.00388), functional and folded.

`define_diracnet` gives the network that is trained, a function of its parameters:

    f, params = define_diracnet(depth=28, width=1, dataset='CIFAR10')
    logits = f(inputs, params, mode=True)           # mode: True in training

`Network(f, params)` carries the two as one nn.Module. `DiracNet` is what is deployed: batch norm
and the Dirac term folded into plain convolutions, with published weights for ImageNet:

    net = diracnet18(pretrained=True)
"""

import functools
import hashlib
import itertools
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from os.path import basename, exists, join

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from diracconv import ALPHA_INIT, BETA_INIT, dirac_weight

BN_EPS, BN_MOMENTUM = 1e-5, 0.1
CIFAR_STEM, CIFAR_CHANNELS = 3, (16, 32, 64)  # kernel of the stem; channels of groups at width 1
IMAGENET_STEM, IMAGENET_CHANNELS = 7, (64, 128, 256, 512)
IMAGENET_BLOCKS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}  # by depth: convolutions in each group
BLOCK = re.compile(r'(?:features\.)?group(\d+)\.block(\d+)\.')  # before a parameter's name
CLASSES = {'CIFAR10': 10, 'CIFAR100': 100, 'ImageNet': 1000}
MODEL_URLS = {
    18: 'https://s3.amazonaws.com/modelzoo-networks/diracnet18v2folded-a2174e15.pth',
    34: 'https://s3.amazonaws.com/modelzoo-networks/diracnet34v2folded-dfb15d34.pth',
}


@dataclass(frozen=True)
class Topology:
    """The sizes that make one DiracNet (section 3.2, tables 1 and 5)."""

    stem: int  # kernel of the first convolution: 3, or 7 with stride 2 and a max-pool after it
    channels: tuple  # of each group; the stem has those of the first
    blocks: tuple  # convolutions in each group
    num_classes: int
    in_channels: int = 3

    @classmethod
    def from_params(cls, params):
        """Reads the Topology of a DiracNet off its parameters, functional or folded, by shape.

        params: flat name -> tensor. Raises ValueError for those of no DiracNet; whether all of
        them are there is for `check_params` to say.
        """
        stem = _shape_of(params, 'features.conv.weight' if is_folded(params) else 'conv', 4)
        num_classes, channels = _shape_of(params, 'fc.weight', 2)
        found = {match.groups() for match in map(BLOCK.match, params) if match}
        counts = Counter(int(group) for group, _ in found)
        blocks = tuple(counts[group] for group in sorted(counts))
        if stem[-1] == IMAGENET_STEM:
            regular, expected = blocks in IMAGENET_BLOCKS.values(), 'those of depth 18 or 34'
        else:
            regular = len(blocks) == 3 and len(set(blocks)) == 1 and blocks[0] % 2 == 0
            expected = 'three groups of the same even number'
        if not regular:
            counted = ', '.join(map(str, blocks)) or 'no'
            raise ValueError(f'holds groups of {counted} blocks: expected {expected}')
        sizes = cls(stem[-1], (channels,), blocks, num_classes)
        return make_topology(sizes.depth, sizes.width, sizes.kind, num_classes, stem[1])

    @property
    def imagenet(self):
        """Whether the stem is the one for large images."""
        return self.stem == IMAGENET_STEM

    @property
    def kind(self):
        """The images it is for: 'ImageNet', or 'CIFAR10', of which CIFAR100 differs in classes."""
        return 'ImageNet' if self.imagenet else 'CIFAR10'

    @property
    def depth(self):
        """Layers, as the paper counts them: on CIFAR two more than there are."""
        return sum(self.blocks) + (2 if self.imagenet else 4)

    @property
    def width(self):
        """The factor on the numbers of channels."""
        return self.channels[-1] / (IMAGENET_CHANNELS if self.imagenet else CIFAR_CHANNELS)[-1]

    def matches(self, depth, width):
        """Whether it is that of a depth and width, which may round down to the same channels."""
        try:
            net = make_topology(depth, width, self.kind, self.num_classes, self.in_channels)
            return net == self
        except ValueError:
            return False

    def layers(self):
        """Yields (name, in channels, out channels) of the convolutions after the stem."""
        cin = self.channels[0]
        for g, (cout, blocks) in enumerate(zip(self.channels, self.blocks)):
            for b in range(blocks):
                yield f'group{g}.block{b}', cin, cout
                cin = cout


def is_folded(params):
    """Tells the parameters of a folded network from those of a functional one."""
    return 'features.conv.bias' in params  # others have batch norm there, and a stem without bias


def _shape_of(params, name, ndim):
    if name not in params:
        raise ValueError(f'{name} is missing: expected the parameters of a DiracNet')
    if getattr(params[name], 'ndim', None) != ndim:
        raise ValueError(f'{name} is wrong: expected a tensor of {ndim} dimensions')
    return params[name].shape


def check_integers(**sizes):
    """Raises ValueError that names a size that is no integer, as 16.0 is not."""
    for name, value in sizes.items():
        if not isinstance(value, Integral):
            raise ValueError(f'{name} {value!r}: expected an integer')


def make_topology(depth, width, dataset, num_classes=None, in_channels=3):
    """Returns the Topology of a DiracNet.

    depth: 6n + 4 for the CIFAR networks, 18 or 34 for ImageNet; width: the factor on the numbers of
    channels, which are rounded down; dataset: 'CIFAR10', 'CIFAR100' or 'ImageNet'; num_classes: in
    place of the dataset's own; in_channels: of the images, 3 for RGB. Raises ValueError that names
    the nearest valid choices.
    """
    if dataset not in CLASSES:
        raise ValueError(f'unknown dataset {dataset!r}: expected one of {", ".join(CLASSES)}')
    num_classes = CLASSES[dataset] if num_classes is None else num_classes
    check_integers(depth=depth, num_classes=num_classes, in_channels=in_channels)
    if num_classes < 1:
        raise ValueError(f'num_classes {num_classes}: expected at least 1')
    if in_channels < 1:
        raise ValueError(f'in_channels {in_channels}: expected at least 1')
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
    if not 1 <= channels[0] * width < float('inf'):
        raise ValueError(f'width {width}: expected at least {1 / channels[0]}, for one channel')
    channels = tuple(int(c * width) for c in channels)
    return Topology(stem, channels, blocks, num_classes, in_channels)


def check_params(params, expected):
    """Raises ValueError naming the keys and shapes in which parameters differ from `expected`."""
    differ = [f'{name} is missing' for name in expected.keys() - params.keys()]
    differ += [f'{name} is unknown' for name in params.keys() - expected.keys()]
    differ += [
        f'{name} is {tuple(params[name].shape)}, expected {tuple(expected[name].shape)}'
        for name in expected.keys() & params.keys()
        if params[name].shape != expected[name].shape
    ]
    if differ:
        more = f', and {len(differ) - 5} more' if len(differ) > 5 else ''
        raise ValueError(
            f'the checkpoint does not fit the network: {", ".join(sorted(differ)[:5])}{more}'
        )


def _bn_params(prefix, channels):
    return {
        f'{prefix}.weight': torch.rand(channels),
        f'{prefix}.bias': torch.zeros(channels),
        f'{prefix}.running_mean': torch.zeros(channels),
        f'{prefix}.running_var': torch.ones(channels),
    }


def init_params(net):
    """Draws the parameters of a Topology: a flat dict from dotted name to tensor (section 3.2).

    Everything but the running statistics requires grad.
    """
    kaiming = nn.init.kaiming_normal_  # fan-in, gain sqrt(2)
    params = {'conv': kaiming(torch.empty(net.channels[0], net.in_channels, net.stem, net.stem))}
    params.update(_bn_params('bn', net.channels[0]))
    for name, cin, cout in net.layers():
        params[f'{name}.conv'] = kaiming(torch.empty(cout, cin, 3, 3))
        params[f'{name}.alpha'] = torch.full((cout,), ALPHA_INIT)
        params[f'{name}.beta'] = torch.full((cout,), BETA_INIT)
        params.update(_bn_params(f'{name}.bn', cout))
    params['fc.weight'] = kaiming(torch.empty(net.num_classes, net.channels[-1]))
    params['fc.bias'] = torch.zeros(net.num_classes)
    for name, tensor in params.items():
        tensor.requires_grad_('running_' not in name)
    return params


def _batch_norm(x, params, prefix, mode, tracked=True):
    return F.batch_norm(
        x,
        params[f'{prefix}.running_mean'],
        params[f'{prefix}.running_var'],
        params[f'{prefix}.weight'],
        params[f'{prefix}.bias'],
        training=mode,
        momentum=BN_MOMENTUM * tracked,
        eps=BN_EPS,
    )


def dirac_weights(params, names, dtype=None):
    """Computes W_hat (eq. 3) of the blocks of these names: a dict of the names of W in `params`.

    Neighbours of one shape are computed together, as if they were the groups of one convolution.
    dtype: of the result, where it is another than that of the parameters.
    """
    found = {}
    for _, alike in itertools.groupby(names, key=lambda name: params[f'{name}.conv'].shape):
        alike = list(alike)
        weight, alpha, beta = (
            torch.cat([params[f'{name}.{part}'] for name in alike])
            for part in ('conv', 'alpha', 'beta')
        )
        w_hat = dirac_weight(weight, alpha, beta, groups=len(alike)).to(dtype or weight.dtype)
        found.update(zip([f'{name}.conv' for name in alike], w_hat.chunk(len(alike))))
    return found


def _group(x, params, names, mode, tracked=True):
    """Runs the blocks of these names on what a ReLU returned: (N, C, H, W) to (N, C', H, W).

    params: with W_hat in place of W.
    """
    for i, name in enumerate(names):
        if i > 0:
            x = F.relu(x, inplace=True)  # batch norm need not keep what it returned
        x = F.conv2d(x, params[f'{name}.conv'], padding=1)
        x = _batch_norm(x, params, f'{name}.bn', mode, tracked)
    return x


def _checkpointed_group(x, params, names, mode, dirac):
    """As `_group`, with W itself in params: keeps the outputs of about the root of the blocks."""
    length = max(1, round(len(names) ** 0.5))
    for start in range(0, len(names), length):
        first = iter([True])

        def blocks(x, names=names[start : start + length], first=first):
            # a batch counts once in the running statistics, though it passes twice
            tracked = next(first, False)
            filters = dirac_weights(params, names if dirac else [])
            return _group(x, {**params, **filters}, names, mode, tracked)

        if start > 0:
            x = F.relu(x, inplace=True)
        x = checkpoint(blocks, x, use_reentrant=False)
    return x


def forward(net, inputs, params, mode, checkpointing=False, dirac=True):
    """Runs the network of a Topology: inputs (N, in_channels, H, W) to logits (N, num_classes).

    With mode=True batch norm uses the statistics of the batch and updates the running ones.
    checkpointing: compute most blocks again in the backward pass, for less memory. dirac=False:
    filters are W itself, as in ordinary convolutions, to measure what W_hat costs.
    """
    x = F.conv2d(inputs, params['conv'], stride=1 + net.imagenet, padding=net.stem // 2)
    x = _batch_norm(x, params, 'bn', mode)
    if net.imagenet:
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    run_group = _group
    if checkpointing and mode:
        run_group = functools.partial(_checkpointed_group, dirac=dirac)
    elif dirac:
        # all at once: the many small steps to W_hat take five times as long between convolutions,
        # which leave nothing of it in the caches
        # and cast at once too, to what autocast has made of x
        params = {**params, **dirac_weights(params, [name for name, _, _ in net.layers()], x.dtype)}
    for g, blocks in enumerate(net.blocks):
        if g > 0:
            x = F.max_pool2d(x, kernel_size=2)
        names = [f'group{g}.block{b}' for b in range(blocks)]
        # a block begins with ReLU, which is also the one that follows the stem on CIFAR
        x = run_group(F.relu(x, inplace=True), params, names, mode)  # (N, channels[g], H', W')
    x = F.relu(x).mean(dim=(2, 3))  # (N, channels[-1])
    return F.linear(x, params['fc.weight'], params['fc.bias'])


def define_diracnet(
    depth, width, dataset, num_classes=None, checkpointing=False, in_channels=3
):
    """Returns (f, params): the network as a function and its parameters, newly drawn.

    `f(inputs, params, mode)` takes inputs (N, in_channels, H, W), square, and returns logits
    (N, num_classes); mode=True is training. checkpointing: less memory in training for more time,
    with the same results. The other arguments and the errors are those of `topology`.
    """
    net = make_topology(depth, width, dataset, num_classes, in_channels)
    return functools.partial(forward, net, checkpointing=checkpointing), init_params(net)


class Network(nn.Module):
    """Carries a functional definition, so that torch.compile, DDP and other tools take it.

    Its state dict has the flat names of `params`; running statistics are its buffers, all else its
    parameters, which require grad.
    """

    def __init__(self, f, params):
        super().__init__()
        self.f = f
        for name, tensor in params.items():
            # a dot may not stand in a parameter's name: each part is a module of its own
            *parts, leaf = name.split('.')
            owner = self
            for part in parts:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            if 'running_' in leaf:
                owner.register_buffer(leaf, tensor)
            else:
                owner.register_parameter(leaf, nn.Parameter(tensor.detach()))

    def forward(self, inputs):
        params = dict(self.named_parameters())
        params.update(self.named_buffers())
        return self.f(inputs, params, self.training)


class DiracNet(nn.Module):
    """The folded network: a chain of ReLU and plain convolutions, (N, C, H, W) to logits.

    Its state dict has the keys of the published folded checkpoints: `features.conv.weight|bias`,
    `features.group{g}.block{b}.conv.weight|bias`, `fc.weight|bias`. Arguments and errors are those
    of `topology`; `DiracNet.of` takes a Topology.
    """

    def __init__(self, depth=18, width=1, dataset='ImageNet', num_classes=None, in_channels=3):
        super().__init__()
        net = make_topology(depth, width, dataset, num_classes, in_channels)
        conv = nn.Conv2d(
            in_channels, net.channels[0], net.stem, 1 + net.imagenet, padding=net.stem // 2
        )
        self.features = nn.Sequential(OrderedDict(conv=conv))
        if net.imagenet:
            self.features.add_module('max_pool', nn.MaxPool2d(3, stride=2, padding=1))
        for name, cin, cout in net.layers():
            group, block = name.split('.')
            if not hasattr(self.features, group):
                if group != 'group0':
                    self.features.add_module(f'{group}_pool', nn.MaxPool2d(2))
                self.features.add_module(group, nn.Sequential())
            getattr(self.features, group).add_module(block, nn.Sequential(OrderedDict(
                relu=nn.ReLU(), conv=nn.Conv2d(cin, cout, 3, padding=1)
            )))
        self.features.add_module('relu', nn.ReLU())
        self.features.add_module('avg_pool', nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(net.channels[-1], net.num_classes)

    @classmethod
    def from_topology(cls, net):
        return cls(net.depth, net.width, net.kind, net.num_classes, net.in_channels)

    def forward(self, inputs):
        return self.fc(self.features(inputs).flatten(1))


# ---------------------------------------------------------------- published weights


def find_nonfinite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Returns the name of the first tensor that contains NaN or Inf, or None."""
    return next((name for name, t in tensors.items() if not t.isfinite().all()), None)


def check_finite(params):
    """Raises ValueError naming a tensor of flat parameters with NaN or an infinity in it."""
    for name, tensor in params.items():
        if not tensor.isfinite().all():
            raise ValueError(f'{name} holds NaN or an infinity: expected finite numbers')


def sha256(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path, expected):
    """Raises ValueError for a file whose SHA-256 begins otherwise than expected."""
    found = sha256(path)[: len(expected)]
    if found != expected:
        raise ValueError(f'its SHA-256 begins with {found}, expected {expected}')


def load_published(url, params_of):
    """Loads the parameters in a published file through torch.hub's cache, on the CPU.

    params_of: from what the file holds to a flat dict of them; raises ValueError for those of
    another network. Where the file's name ends in the start of its SHA-256, that is checked each
    time. Raises RuntimeError that says which file to put where if they cannot be had, or hold NaN.
    """
    path = join(torch.hub.get_dir(), 'checkpoints', basename(url))
    try:
        named = re.search(r'-([0-9a-f]+)\.\w+$', path)
        if named and exists(path):  # torch.hub checks what it fetches, and that alone
            check_hash(path, named[1])
        contents = torch.hub.load_state_dict_from_url(
            url, map_location='cpu', check_hash=True, weights_only=True
        )
        params = params_of(contents)
        check_finite(params)
        return params
    except Exception as error:  # damaged bytes make torch.load raise almost anything
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise RuntimeError(
            f'cannot load {url} ({reason}): put the file from there at {path}'
        ) from error


def _diracnet(depth, pretrained):
    net = DiracNet(depth)
    if pretrained:
        def params_of(contents):
            check_params(contents, net.state_dict())
            return contents

        net.load_state_dict(load_published(MODEL_URLS[depth], params_of))
    return net


def diracnet18(pretrained=False):
    """DiracNet-18 for ImageNet, folded: (N, 3, 224, 224) to (N, 1000) logits.

    pretrained: load the published weights, fetched once into torch.hub's cache, where their hash is
    checked each time. Their inputs are RGB in [0, 1], resized with OpenCV, less mean (.485, .456,
    .406), over std (.229, .224, .225). Raises RuntimeError that says which file to put where if
    they cannot be had.
    """
    return _diracnet(18, pretrained)


def diracnet34(pretrained=False):
    """DiracNet-34 for ImageNet, folded; as `diracnet18` otherwise."""
    return _diracnet(34, pretrained)
