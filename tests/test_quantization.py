"""Cross-layer range equalization: outputs stay, ranges become similar, int8 errors shrink."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import diracnets
import export
from diracnets.folding import fold
from diracnets.onnx import to_onnx
from diracnets.quantization import MAX_SCALE, MIN_RANGE, conv_pairs, equalize, quantize
from runs import write_images
from test_export import run_onnx, table_of


@pytest.fixture
def uneven():
    """A folded DiracNet with channels of very different ranges, one of them dead."""
    torch.manual_seed(0)
    net = fold(diracnets.create_model('diracnet', 'CIFAR10', depth=10, width=0.5)).double()
    with torch.no_grad():
        for first, second in conv_pairs(net):
            scale = 2 ** torch.empty(first.out_channels, dtype=torch.double).uniform_(-2, 2)
            first.weight *= scale[:, None, None, None]
            first.bias.normal_(0, 0.1).mul_(scale)
            second.weight /= scale[:, None, None]
        first.weight[3] = 0
        first.bias[3] = -1
    return net


def ranges(net, inputs):
    """The largest activation of each input channel of all convolutions except the first one."""
    maxima = []
    hooks = [second.register_forward_pre_hook(lambda _, i: maxima.append(i[0].amax((0, 2, 3))))
             for _, second in conv_pairs(net)]
    net(inputs)
    for hook in hooks:
        hook.remove()
    return maxima


@torch.no_grad()
def test_equalize_keeps_the_outputs_and_reduces_the_spread_of_ranges(uneven):
    inputs = torch.randn(20, 3, 32, 32, dtype=torch.double)
    before = {name: tensor.clone() for name, tensor in uneven.state_dict().items()}
    equalized = equalize(uneven, inputs)
    torch.testing.assert_close(equalized(inputs), uneven(inputs), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in uneven.state_dict().items())
    assert len(conv_pairs(uneven)) == 6
    for old, new in zip(ranges(uneven, inputs), ranges(equalized, inputs)):
        live = old > MIN_RANGE * old.max()
        spread = [(channels[live].max() / channels[live].min()).item() for channels in (old, new)]
        assert spread[1] < max(1.001, spread[0] / 2)
    dead = list(conv_pairs(uneven))[-1][0], list(conv_pairs(equalized))[-1][0]
    assert torch.equal(*(conv.weight[3] for conv in dead))
    assert torch.equal(*(conv.bias[3] for conv in dead))


@torch.no_grad()
def test_equalize_limits_the_scale_of_a_channel():
    net = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 1, 1)).eval()
    net[0].weight[:] = torch.tensor([1.0, 1000.0, 30.0]).view(3, 1, 1, 1)
    equalized = equalize(net, torch.ones(1, 1, 2, 2))
    # 1 is noise compared with 1000; the mean of the two others is sqrt(30 * 1000)
    expected = torch.tensor([1.0, 1000 / MAX_SCALE, 30 * MAX_SCALE])
    torch.testing.assert_close(equalized[0].weight.flatten(), expected)
    torch.testing.assert_close(equalized[2].weight.flatten() * expected,
                               net[2].weight.flatten() * net[0].weight.flatten())


def test_conv_pairs_have_only_scale_equivariant_layers_between():
    def pairs(*between, channels=4):
        return len(conv_pairs(nn.Sequential(
            nn.Conv2d(2, channels, 3), *between, nn.Conv2d(channels, 2, 3))))

    assert pairs(nn.ReLU(), nn.MaxPool2d(2)) == 1
    assert pairs(nn.AvgPool2d(2), nn.ReLU()) == 1
    assert pairs(nn.GELU()) == pairs(nn.BatchNorm2d(4)) == pairs(nn.Sigmoid()) == 0
    shared = nn.Conv2d(2, 2, 3)
    assert conv_pairs(nn.Sequential(shared, nn.ReLU(), shared)) == []
    # a skip connection uses the output of the first one too
    resnet = fold(diracnets.create_model('resnet', 'CIFAR10', depth=10, width=0.5))
    convs = [module for module in resnet.modules() if isinstance(module, nn.Conv2d)]
    assert len(conv_pairs(resnet)) < len(convs) - 1


def test_equalize_keeps_the_outputs_of_convolutions_that_share_a_weight():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).double(), torch.randn(4, 4, 9, 9)
    model[2].weight = model[0].weight
    equalized = equalize(model, inputs)
    assert not torch.equal(equalized[0].weight, model[0].weight)
    torch.testing.assert_close(equalized(inputs.double()), model(inputs.double()))


def test_equalize_and_deploy_refuse_an_onnx_model(uneven, tmp_path):
    inputs, path = torch.zeros(1, 3, 32, 32), tmp_path / 'model.onnx'
    path.write_bytes(to_onnx(uneven.float(), inputs, {}))
    model = diracnets.OnnxModel(path)
    for refuse in (lambda: equalize(model, inputs), lambda: diracnets.deploy(model, inputs.shape)):
        with pytest.raises(ValueError, match='OnnxModel has no parameters'):
            refuse()


def test_equalize_refuses_a_model_without_pairs_of_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match='Sequential cannot be equalized'):
        equalize(model, torch.zeros(1, 3, 8, 8))


@pytest.mark.slow
def test_equalize_reduces_the_int8_error(uneven, tmp_path):
    inputs = torch.randn(16, 3, 32, 32)
    net, images = uneven.float(), dict(enumerate(inputs))
    expected, differences = net(inputs), []
    for form in (net, equalize(net, inputs)):
        content = to_onnx(form, inputs[:2], {})
        _, int8 = quantize(content, list(images), images.get, {})
        path = tmp_path / 'int8.onnx'
        path.write_bytes(int8)
        differences.append((run_onnx(path, inputs) - expected).square().mean().item())
    assert differences[1] < 0.7 * differences[0]


def test_equalize_has_two_spellings():
    options = ['run', '--to', 'a.onnx', '--int8', '.']
    parsed = [export.parse_options([*options, option]).equalize
              for option in ('--equalise', '--equalize')]
    assert parsed[0] == parsed[1] != export.parse_options(options).equalize


@pytest.mark.slow
def test_export_equalizes(run_folder, tmp_path, capsys):
    write_images(tmp_path / 'images', n=3)
    weights = {}
    for name in ('plain.onnx', 'equalised.onnx'):
        options = ['--equalise'] if name == 'equalised.onnx' else []
        path = tmp_path / name
        export.main([str(run_folder), '--to', str(path), '--int8', str(tmp_path / 'images'),
                     *options])
        table = table_of(capsys.readouterr().out)
        assert float(table['max difference']['float32'].split()[0]) < 1e-4
        assert diracnets.load(path).origin['calibration'].get('equalised', False) is bool(options)
        weights[name] = [onnx.numpy_helper.to_array(w).astype(int)
                         for w in onnx.load(path).graph.initializer if len(w.dims) == 4]
    moved = [np.abs(w - other).max() for w, other in zip(*weights.values(), strict=True)]
    assert len(moved) == 7
    assert moved[0] <= 1  # the stem's outputs alone are scaled, and each filter has a scale in int8
    assert min(moved[1:]) > 1


def test_export_equalizes_float_files(run_folder, digits, tmp_path):
    write_images(tmp_path / 'images', n=3)
    plain, path = str(tmp_path / 'plain.pth'), str(tmp_path / 'equalized.pth')
    export.main([str(run_folder), '--to', plain])
    export.main([str(run_folder), '--to', path, '--equalize', str(tmp_path / 'images')])
    before, after = diracnets.load(plain), diracnets.load(path)
    assert 'calibration' not in before.origin
    assert after.origin['calibration']['equalised'] is True
    weights = [m.weight for m in after.model.modules() if isinstance(m, nn.Conv2d)]
    pairs = zip(weights, (m.weight for m in before.model.modules() if isinstance(m, nn.Conv2d)))
    assert min((a - b).abs().max() for a, b in pairs) > 0.01
    inputs = digits[0][:20]
    torch.testing.assert_close(after.model(inputs), before.model(inputs), rtol=1e-4, atol=1e-4)
