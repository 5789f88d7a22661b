"""Blocks of several branches: published keys, and outputs against independent implementations."""

import itertools
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diracconv import DiracConv2d
from diracnets import create_model, fold
from diracnets.models import diverse_branch
from diracnets.models.asymmetric_convolution import ACBlock
from diracnets.models.blocks import with_block
from diracnets.models.diverse_branch import DiverseBranchBlock
from diracnets.models.repvgg import RepVGGBlock
from reference import batch_norm

SHAPES = [  # in, out, groups
    (4, 6, 1), (4, 4, 1), (4, 6, 2), (6, 6, 6), (4, 8, 4), (1, 1, 1),
]
BLOCKS = [DiverseBranchBlock, ACBlock, RepVGGBlock]
VARIANTS = list(itertools.product(SHAPES, (3, 5), (1, 2)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomize(module):
    """Gives every parameter and running statistic a random value, in float64."""
    for name, tensor in module.double().state_dict().items():
        if name.endswith('running_var'):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    return module


def random_block(block, cin, cout, k, stride, groups, **options):
    return randomize(block(cin, cout, k, stride, k // 2, groups=groups, **options))


def slow_dbb(state, x, k, stride, groups):
    """Computes the four branches of the paper in evaluation mode from a state dict."""

    def conv(x, key, stride=1, padding=0):
        weight = state[f'{key}.weight']
        if 'idconv1' in key:
            weight = weight.clone()
            for o in range(len(weight)):
                weight[o, o % weight.shape[1]] += 1
        return F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)

    def bn_and_pad(x, key):
        zero = batch_norm(torch.zeros(x.shape[1], 1, 1, dtype=x.dtype), state, key)
        n, c, height, width = x.shape
        p = k // 2
        padded = zero.expand(n, c, height + 2 * p, width + 2 * p).clone()
        padded[:, :, p : p + height, p : p + width] = batch_norm(x, state, key)
        return padded

    def average(x):
        patches = x.unfold(2, k, stride).unfold(3, k, stride)
        return patches.sum((-1, -2)) / k**2

    out = batch_norm(conv(x, 'dbb_origin.conv', stride, k // 2), state, 'dbb_origin.bn')
    if 'dbb_1x1.conv.weight' in state:
        out = out + batch_norm(conv(x, 'dbb_1x1.conv', stride), state, 'dbb_1x1.bn')
        padded = bn_and_pad(conv(x, 'dbb_avg.conv'), 'dbb_avg.bn.bn')
    else:
        padded = F.pad(x, [k // 2] * 4)
    out = out + batch_norm(average(padded), state, 'dbb_avg.avgbn')
    first = 'idconv1' if 'dbb_1x1_kxk.idconv1.weight' in state else 'conv1'
    padded = bn_and_pad(conv(x, f'dbb_1x1_kxk.{first}'), 'dbb_1x1_kxk.bn1.bn')
    return out + batch_norm(conv(padded, 'dbb_1x1_kxk.conv2', stride), state, 'dbb_1x1_kxk.bn2')


@pytest.mark.parametrize(('shape', 'k', 'stride'), VARIANTS)
def test_dbb_matches_sum_of_branches_in_paper(shape, k, stride):
    cin, cout, groups = shape
    block = random_block(DiverseBranchBlock, cin, cout, k, stride, groups).eval()
    x = torch.randn(2, cin, 9, 8, dtype=torch.float64)
    expected = slow_dbb(block.state_dict(), x, k, stride, groups)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('block_type', BLOCKS)
@pytest.mark.parametrize(('shape', 'k', 'stride'), VARIANTS)
def test_blocks_keep_outputs_when_deployed_or_folded(block_type, shape, k, stride):
    cin, cout, groups = shape
    block = random_block(block_type, cin, cout, k, stride, groups, nonlinear=nn.ReLU()).eval()
    x = torch.randn(2, cin, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        kernel, bias = block.get_equivalent_kernel_bias()
        by_hand = F.conv2d(x, kernel, bias, stride, k // 2, groups=groups).relu()
        folded = block.fold()(x)
        block.switch_to_deploy()
        deployed = block(x)
    for result in (by_hand, folded, deployed):
        assert (result - expected).abs().max() < 1e-10 * expected.abs().max()
    assert expected.abs().max() > 0.1
    assert torch.equal(block.get_equivalent_kernel_bias()[0], kernel)
    block.switch_to_deploy()  # idempotent
    assert torch.equal(block(x), deployed)


def test_acb_matches_sum_of_three_convolutions():
    block = random_block(ACBlock, 4, 6, 3, 2, 2).eval()
    state = block.state_dict()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = sum(
        batch_norm(F.conv2d(x, state[f'{name}_conv.weight'], stride=2, padding=padding, groups=2),
                   state, f'{name}_bn')
        for name, padding in (('square', (1, 1)), ('ver', (1, 0)), ('hor', (0, 1)))
    )
    assert state['ver_conv.weight'].shape[2:] == (3, 1)
    assert state['hor_conv.weight'].shape[2:] == (1, 3)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('shape', 'k', 'stride'), VARIANTS)
def test_repvgg_matches_sum_of_branches_in_paper(shape, k, stride):
    cin, cout, groups = shape
    block = random_block(RepVGGBlock, cin, cout, k, stride, groups).eval()
    state = block.state_dict()
    x = torch.randn(2, cin, 9, 8, dtype=torch.float64)
    expected = sum(
        batch_norm(F.conv2d(x, state[f'{name}.conv.weight'], None, stride, padding, 1, groups),
                   state, f'{name}.bn')
        for name, padding in (('rbr_dense', k // 2), ('rbr_1x1', 0))
    )
    has_identity = cin == cout and stride == 1
    if has_identity:
        expected = expected + batch_norm(x, state, 'rbr_identity')
    assert ('rbr_identity.weight' in state) == has_identity
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('cin', 'cout', 'groups'), [(4, 4, 1), (4, 4, 2), (6, 6, 6), (4, 8, 4)])
def test_repvgg_kernel_by_hand(cin, cout, groups):
    block = random_block(RepVGGBlock, cin, cout, 3, 1, groups).eval()
    state = block.state_dict()

    def scale(prefix, o):
        std = (state[f'{prefix}.running_var'][o] + 1e-5).sqrt()
        return state[f'{prefix}.weight'][o] / std

    kernel = state['rbr_dense.conv.weight'].clone()
    for o in range(cout):
        kernel[o] *= scale('rbr_dense.bn', o)
        kernel[o, :, 1, 1] += scale('rbr_1x1.bn', o) * state['rbr_1x1.conv.weight'][o, :, 0, 0]
        if cin == cout:  # input channel o is channel o % (in / groups) of its group
            kernel[o, o % (cin // groups), 1, 1] += scale('rbr_identity', o)
    torch.testing.assert_close(block.fold().weight, kernel, rtol=1e-12, atol=1e-12)


def test_repvgg_uses_batch_statistics_of_each_branch_in_training():
    block = random_block(RepVGGBlock, 4, 4, 3, 1, 1).train()
    state = block.state_dict()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)

    def normalized(x, prefix):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        weight, bias = (state[f'{prefix}.{name}'].view(-1, 1, 1) for name in ('weight', 'bias'))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    expected = (normalized(F.conv2d(x, state['rbr_dense.conv.weight'], padding=1), 'rbr_dense.bn')
                + normalized(F.conv2d(x, state['rbr_1x1.conv.weight']), 'rbr_1x1.bn')
                + normalized(x, 'rbr_identity'))
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def bn_keys(prefix):
    return {f'{prefix}.{name}' for name in
            ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')}


def test_dbb_state_dict_has_published_keys():
    common = {'dbb_origin.conv.weight', 'dbb_1x1_kxk.conv2.weight'}.union(
        *map(bn_keys, ['dbb_origin.bn', 'dbb_avg.avgbn', 'dbb_1x1_kxk.bn1.bn', 'dbb_1x1_kxk.bn2'])
    )
    dense = common | {
        'dbb_1x1.conv.weight', 'dbb_avg.conv.weight', 'dbb_1x1_kxk.idconv1.weight'
    } | bn_keys('dbb_1x1.bn') | bn_keys('dbb_avg.bn.bn')
    depthwise = common | {'dbb_1x1_kxk.conv1.weight'}
    deployed = {'dbb_reparam.weight', 'dbb_reparam.bias'}
    block = DiverseBranchBlock(4, 4, 3, padding=1)
    assert block.state_dict().keys() == dense
    assert DiverseBranchBlock(4, 4, 3, padding=1, groups=4).state_dict().keys() == depthwise
    block.switch_to_deploy()
    assert block.state_dict().keys() == deployed
    built = DiverseBranchBlock(4, 4, 3, padding=1, deploy=True)
    built.load_state_dict(block.state_dict())
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(built(x), block(x))


def test_repvgg_state_dict_has_published_keys():
    strided = {'rbr_dense.conv.weight', 'rbr_1x1.conv.weight'}.union(
        *map(bn_keys, ['rbr_dense.bn', 'rbr_1x1.bn']))
    block = RepVGGBlock(4, 4, 3, padding=1)
    assert block.state_dict().keys() == strided | bn_keys('rbr_identity')
    for other in (RepVGGBlock(4, 4, 3, 2, 1), RepVGGBlock(4, 8, 3, padding=1)):
        assert other.state_dict().keys() == strided
    block.switch_to_deploy()
    assert block.state_dict().keys() == {'rbr_reparam.weight', 'rbr_reparam.bias'}
    built = RepVGGBlock(4, 4, 3, padding=1, deploy=True)
    built.load_state_dict(block.state_dict())
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(built(x), block(x))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_repvgg_a0_has_published_number_of_parameters():
    layers, cin = [], 3
    with torch.device('meta'):
        for cout, blocks in ((48, 1), (48, 2), (96, 4), (192, 14), (1280, 1)):
            for stride in [2] + [1] * (blocks - 1):
                layers.append(RepVGGBlock(cin, cout, 3, stride, 1))
                cin = cout
        model = nn.Sequential(*layers, nn.Linear(cin, 1000))
    assert parameters(model) == 9_108_968  # 9.11M of repvgg_a0 in timm
    biases = sum(layer.conv_args[1] for layer in layers)
    assert round((parameters(fold(model)) - biases) / 1e6, 2) == 8.30  # table 4, weights alone


def test_plain_with_repvgg_has_parameters_by_hand():
    def block(cin, cout):  # two convolutions, and two or three batch norms of 2 C each
        return 10 * cin * cout + 2 * 2 * cout + 2 * cout * (cin == cout)

    groups = ((16, 16), (16, 32), (32, 64))
    expected = block(3, 16) + sum(block(cin, cout) + 7 * block(cout, cout) for cin, cout in groups)
    with torch.device('meta'):
        model = create_model('plain', 'CIFAR10', depth=28, width=1, block='repvgg')
    assert parameters(model) == expected + 64 * 10 + 10
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.features.children())


def test_dbb_1x1_before_kxk_has_internal_width_and_starts_as_identity():
    dense = DiverseBranchBlock(4, 6, 3, padding=1)
    assert (dense.dbb_1x1_kxk.idconv1.weight == 0).all()
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(dense.dbb_1x1_kxk.idconv1(x), x)
    wide = DiverseBranchBlock(4, 6, 3, padding=1, internal_channels_1x1_3x3=5)
    assert wide.dbb_1x1_kxk.conv1.weight.shape == (5, 4, 1, 1)
    assert wide.dbb_1x1_kxk.conv1.weight.abs().min() > 0
    depthwise = DiverseBranchBlock(4, 4, 3, padding=1, groups=4)
    assert depthwise.dbb_1x1_kxk.conv2.weight.shape == (4, 2, 3, 3)


def test_bn_and_pad_pads_with_batch_norm_of_zero_without_gradient():
    layer = diverse_branch.BNAndPad(1, 2).train()
    nn.init.constant_(layer.bn.weight, 3.0)
    nn.init.constant_(layer.bn.bias, 0.5)
    x = torch.randn(4, 2, 5, 5) + 1
    out = layer(x)
    zero = 0.5 - 3 * layer.bn.running_mean / (layer.bn.running_var + 1e-5).sqrt()
    for edge in (out[:, :, 0], out[:, :, -1], out[:, :, :, 0], out[:, :, :, -1]):
        torch.testing.assert_close(edge, zero.view(1, 2, 1).expand_as(edge))
    out[:, :, 0].sum().backward()
    assert layer.bn.bias.grad.tolist() == [0, 0]
    assert layer.bn.weight.grad.tolist() == [0, 0]


def test_bn_and_pad_keeps_the_dtype_of_autocast():
    assert diverse_branch.BNAndPad(1, 2)(torch.randn(4, 2, 5, 5).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('block_type', BLOCKS)
@pytest.mark.parametrize('groups', [1, 4])
def test_equivalent_kernel_has_gradient_for_every_branch(block_type, groups):
    block = random_block(block_type, 4, 4, 3, 1, groups).train()
    kernel, bias = block.get_equivalent_kernel_bias()
    scale = kernel.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    # distances to an int8 grid
    (((kernel / scale).sin() ** 2).sum() + (bias**2).sum()).backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize('block_type', BLOCKS)
@pytest.mark.parametrize(('options', 'expected'), [
    ({'kernel_size': 4, 'padding': 2}, 'kernel_size 4'),
    ({'kernel_size': 3, 'padding': 0}, 'padding 0.* 1'),
    ({'kernel_size': 3, 'padding': 1, 'dilation': 2}, 'dilation 2'),
    ({'kernel_size': 3, 'padding': 1, 'groups': 3}, 'groups 3.* 4 and 4'),
    ({'kernel_size': 3, 'padding': 1, 'groups': 0}, 'groups 0'),
])
def test_blocks_raise_for_invalid_arguments(block_type, options, expected):
    with pytest.raises(ValueError, match=expected):
        block_type(4, 4, **options)


def test_dbb_raises_when_groups_do_not_divide_internal_width():
    with pytest.raises(ValueError, match='internal_channels_1x1_3x3 5.* 2 groups'):
        DiverseBranchBlock(4, 4, 3, padding=1, groups=2, internal_channels_1x1_3x3=5)


@pytest.mark.parametrize('groups', [1, 2])
def test_merge_1x1_kxk_equals_both_convolutions(groups):
    first = torch.randn(6, 4 // groups, 1, 1).double(), torch.randn(6).double()
    second = torch.randn(8, 6 // groups, 3, 3).double(), torch.randn(8).double()
    kernel, bias = diverse_branch.merge_1x1_kxk(first, second, groups)
    x = torch.randn(2, 4, 7, 7).double()
    expected = F.conv2d(F.conv2d(x, *first, groups=groups), *second, groups=groups)
    torch.testing.assert_close(F.conv2d(x, kernel, bias, groups=groups), expected)


def test_concat_branches_equals_concatenated_outputs():
    branches = [(torch.randn(n, 4, 3, 3), torch.randn(n)) for n in (2, 5)]
    x = torch.randn(2, 4, 6, 6)
    expected = torch.cat([F.conv2d(x, *branch) for branch in branches], 1)
    torch.testing.assert_close(F.conv2d(x, *diverse_branch.concat_branches(*branches)), expected)


def test_add_branches_equals_sum_of_outputs():
    branches = [(torch.randn(5, 4, 3, 3).double(), torch.randn(5).double()) for _ in range(3)]
    x = torch.randn(2, 4, 6, 6).double()
    expected = sum(F.conv2d(x, *branch) for branch in branches)
    torch.testing.assert_close(F.conv2d(x, *diverse_branch.add_branches(*branches)), expected)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_average_as_conv_equals_average_pooling(groups):
    kernel = diverse_branch.average_as_conv(4, 3, groups)
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(F.conv2d(x, kernel, groups=groups), F.avg_pool2d(x, 3, 1))


@pytest.mark.parametrize('size', [(1, 1), (3, 1), (1, 3), (3, 3), (5, 5)])
def test_pad_kernel_keeps_output(size):
    kernel = torch.randn(3, 4, *size)
    x = torch.randn(2, 4, 9, 9)
    expected = F.conv2d(x, kernel, padding=tuple(length // 2 for length in size))
    padded = diverse_branch.pad_kernel(kernel, 5)
    assert padded.shape == (3, 4, 5, 5)
    torch.testing.assert_close(F.conv2d(x, padded, padding=2), expected)


def test_fuse_bn_equals_convolution_and_batch_norm():
    bn = randomize(nn.BatchNorm2d(3)).eval()
    kernel, x = torch.randn(3, 4, 3, 3).double(), torch.randn(2, 4, 6, 6).double()
    expected = bn(F.conv2d(x, kernel))
    torch.testing.assert_close(F.conv2d(x, *diverse_branch.fuse_bn(kernel, bn)), expected)


@pytest.mark.parametrize('conv', [
    nn.Conv2d(3, 4, (3, 1), padding=(1, 0)), nn.Conv2d(3, 4, (1, 3), padding=(0, 1)),
    nn.Conv2d(3, 4, (3, 7), padding=(1, 3)), nn.Conv2d(3, 4, 3, padding=(1, 0)),
    nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1), nn.Conv2d(3, 4, 3, padding=2, dilation=(2, 1)),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect')])
def test_with_block_raises_for_convolutions_that_branches_cannot_replace(conv):
    with pytest.raises(ValueError, match='^0 is Conv2d.*expected equal sizes in both dimensions'):
        with_block(nn.Sequential(conv), 'acb')


def test_with_block_raises_without_a_convolution_and_for_a_shared_one():
    for block in ('dirac', 'repvgg'):
        for model in (nn.Sequential(nn.Linear(3, 3)), nn.Conv2d(3, 4, 3, padding=1)):
            with pytest.raises(ValueError, match='contains no nn.Conv2d'):
                with_block(model, block)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match='^2 is used in several places'):
        with_block(nn.Sequential(shared, nn.ReLU(), shared), 'repvgg')


def test_with_block_keeps_shape_and_dtype_with_padding_same():
    layers = nn.Conv2d(3, 4, 3, padding='same'), nn.Conv2d(4, 5, 1)
    model = with_block(nn.Sequential(*layers).double(), 'repvgg')
    assert model(torch.randn(2, 3, 6, 5).double()).shape == (2, 5, 6, 5)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}


def test_with_block_dirac_keeps_the_first_convolution():
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, (1, 3)))
    model = with_block(nn.Sequential(OrderedDict(body=body, head=nn.Conv2d(8, 5, 3))), 'dirac')
    assert [type(layer) for layer in (body[0], body[2], model.head)] == [
        nn.Conv2d, DiracConv2d, DiracConv2d]


def test_with_block_replaces_only_kernels_between_1_and_7():
    with torch.device('meta'):
        alexnet = create_model('alexnet', block='dbb')
        resnet = create_model('resnet50', block='acb')
    first, *others = [
        type(m) for m in alexnet.features if isinstance(m, (nn.Sequential, DiverseBranchBlock))
    ]
    assert first is nn.Sequential  # 11 x 11: convolution and batch norm
    assert others == [DiverseBranchBlock] * 4
    assert type(resnet.conv1) is nn.Conv2d
    assert type(resnet.bn1) is nn.BatchNorm2d
    bottleneck = resnet.layer1[0]
    kinds = [type(m) for m in (bottleneck.conv1, bottleneck.conv2, bottleneck.conv3)]
    assert kinds == [nn.Conv2d, ACBlock, nn.Conv2d]
    kinds = [type(m) for m in (bottleneck.bn1, bottleneck.bn2, bottleneck.bn3)]
    assert kinds == [nn.BatchNorm2d, nn.Identity, nn.BatchNorm2d]
