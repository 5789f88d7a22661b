"""The adapter for timm, by the conventions that timm tests its own models for."""

import argparse
import copy
import importlib
import re

import pytest
import torch
from torch import nn

import diracnets
from diracconv import DiracConv2d
from diracnet import define_diracnet

timm = pytest.importorskip('timm')
pytest.importorskip('timm.optim')
pytest.importorskip('timm.utils')
importlib.import_module('diracnets.timm')  # registers the models
NAMES = ['diracnet18', pytest.param('diracnet34', marks=pytest.mark.slow)]


@pytest.fixture(scope='module')
def params():
    """Parameters of a DiracNet-18 with other running statistics than 0 and 1."""
    torch.manual_seed(0)
    f, params = define_diracnet(18, 1, 'ImageNet')
    with torch.no_grad():
        f(torch.randn(4, 3, 64, 64), params, mode=True)
    return {name: tensor.detach() for name, tensor in params.items()}


@pytest.fixture
def published(params, tmp_path, monkeypatch):
    """Replaces the URL of the authors' checkpoint by that of a local file of the same layout."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    stats = {name: tensor for name, tensor in params.items() if 'running_' in name}
    rest = {name: tensor for name, tensor in params.items() if name not in stats}
    stats['eye64_64_3_3'] = torch.eye(64)
    path = tmp_path / 'authors.pth'
    torch.save({'params': rest, 'stats': stats, 'epoch': 90, 'optimizer': {}}, path)
    return {'url': path.as_uri()}


def logits(params, inputs):
    f, _ = define_diracnet(18, 1, 'ImageNet')
    with torch.no_grad():
        return f(inputs, params, mode=False)


@pytest.mark.parametrize('name', NAMES)
def test_timm_model_follows_the_default_cfg(name):
    model = timm.create_model(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert (cfg['mean'], cfg['std']) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg['crop_pct'], cfg['interpolation'], cfg['num_classes']) == (0.875, 'bicubic', 1000)
    assert state[f'{cfg["first_conv"]}.weight'].shape == (64, *cfg['input_size'][:1], 7, 7)
    assert state[f'{cfg["classifier"]}.weight'].shape == (1000, model.num_features)
    assert model.get_classifier() is model.fc
    inputs = torch.randn(1, *cfg['input_size'])
    with torch.no_grad():
        features = model.forward_features(inputs)
        assert features.shape == (1, model.num_features, *cfg['pool_size'])
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean(dim=(2, 3)))
        torch.testing.assert_close(model(inputs), pooled @ model.fc.weight.T + model.fc.bias)
        model.reset_classifier(0)
        torch.testing.assert_close(model(inputs), pooled)
        model.reset_classifier(0, '')
        torch.testing.assert_close(model(inputs), features)
        model.reset_classifier(7, 'max')
        assert (model.num_classes, model.fc.out_features) == (7, 7)
        expected = features.amax(dim=(2, 3)) @ model.fc.weight.T + model.fc.bias
        torch.testing.assert_close(model(inputs), expected)
    assert f'{name}.v2_in1k' in timm.list_pretrained(f'{name}*')


@pytest.mark.parametrize('name', NAMES)
def test_timm_features_only_has_the_levels_of_feature_info(name):
    options = {'num_classes': 5, 'in_chans': 1}
    model = timm.create_model(name, features_only=True, **options).eval()
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert model.feature_info.channels() == [64, 64, 128, 256, 512]
    inputs = torch.randn(2, 1, 96, 96)
    outputs = model(inputs)
    assert [tuple(tensor.shape) for tensor in outputs] == [
        (2, 64, 48, 48), (2, 64, 24, 24), (2, 128, 12, 12), (2, 256, 6, 6), (2, 512, 3, 3)]
    whole = timm.create_model(name, **options).eval()
    whole.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(whole.forward_features(inputs), outputs[-1].relu())
    levels = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
    assert levels.feature_info.reduction() == [4, 8, 16, 32]


def test_timm_model_trains_all_parameters():
    torch.manual_seed(0)
    model = timm.create_model('diracnet18', num_classes=42, drop_rate=0.5)
    outputs = model(torch.randn(2, 3, 64, 64))
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert all(tensor.grad is not None for tensor in model.parameters())
    assert sum(isinstance(layer, DiracConv2d) for layer in model.modules()) == 16
    assert not torch.equal(model(torch.ones(2, 3, 32, 32)), model(torch.ones(2, 3, 32, 32)))
    names = [name for name, _ in model.named_parameters()]
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay']
               for p in group['params']}
    assert [name for name, p in model.named_parameters() if id(p) in decayed] == [
        name for name in names if name.endswith(('conv.weight', 'fc.weight'))]
    layers = timm.optim.create_optimizer_v2(model, 'sgd', lr=0.1, layer_decay=0.5).param_groups
    scales = {id(p): group['lr_scale'] for group in layers for p in group['params']}
    assert scales[id(model.conv.weight)] < scales[id(model.group3.block0.conv.weight)] < 1
    for coarse in (False, True):
        groups = model.group_matcher(coarse)
        assert sum(bool(re.match(groups['stem'], name)) for name in names) == 3
        matches = [re.match(groups['blocks'], name) for name in names]
        assert len({match.groups() for match in matches if match}) == (4 if coarse else 16)
    with pytest.raises(ValueError, match='checkpointing'):
        model.set_grad_checkpointing()


def test_timm_model_loads_the_authors_checkpoint(params, published):
    def create(**options):
        return timm.create_model('diracnet18', pretrained=True, pretrained_cfg_overlay=published,
                                 **options).eval()

    inputs, gray = torch.randn(2, 3, 64, 64), torch.randn(2, 1, 64, 64)
    expected = logits(params, inputs)
    model = create()
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
    features = model.forward_features(inputs)
    torch.testing.assert_close(create(num_classes=0)(inputs), features.mean(dim=(2, 3)))
    small = create(num_classes=5, in_chans=1)
    assert small.fc.out_features == 5
    torch.testing.assert_close(  # timm adds the filters of the three channels
        small.forward_features(gray), model.forward_features(gray.expand(2, 3, 64, 64)),
        rtol=1e-4, atol=1e-5)
    levels = create(features_only=True)(inputs)
    torch.testing.assert_close(levels[-1].relu(), features)


@pytest.mark.parametrize('options', [{}, {'features_only': True}])
def test_timm_model_folds(options):
    torch.manual_seed(0)
    model = timm.create_model('diracnet18', **options)
    model(torch.randn(4, 3, 64, 64))
    before = copy.deepcopy(model.state_dict())
    folded, inputs = diracnets.fold(model), torch.randn(2, 3, 64, 64)
    assert {type(m) for m in folded.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    expected, outputs = model.eval()(inputs), folded(inputs)
    for a, b in zip(expected, outputs):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_timm_checkpoints_are_read_by_both_sides(params, tmp_path):
    inputs = torch.randn(2, 3, 64, 64)
    torch.save({'params': params, 'epoch': 3, 'optimizer': {}}, tmp_path / 'model.pt7')
    model = timm.create_model('diracnet18', pretrained=True, pretrained_cfg_overlay={
        'file': str(tmp_path / 'model.pt7')}).eval()
    expected = logits(params, inputs)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
    args = argparse.Namespace(model='diracnet18')
    saver = timm.utils.CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), checkpoint_dir=str(tmp_path),
        args=args)
    saver.save_checkpoint(0, metric=90.0)
    average = {name: tensor.neg() for name, tensor in params.items()}  # of train.py --ema
    torch.save({'params': params, 'ema': average, 'epoch': 3}, tmp_path / 'ema.pt7')
    averaged = timm.create_model('diracnet18', pretrained=True, pretrained_cfg_overlay={
        'file': str(tmp_path / 'ema.pt7')})
    assert torch.equal(averaged.fc.weight, average['fc.weight'])
    saved = tmp_path / 'checkpoint-0.pth.tar'
    loaded = diracnets.load(saved)
    assert loaded.title == 'DiracNet-18-1'
    torch.testing.assert_close(loaded.model(inputs), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, params[name])
               for name, tensor in diracnets.load_params(saved).items())
    again = timm.create_model('diracnet18', checkpoint_path=str(saved)).eval()
    assert torch.equal(again(inputs), model(inputs))


@pytest.mark.parametrize('options', [{'output_stride': 8}, {'width': 0}, {'depth': 50}])
def test_timm_model_raises_when_an_option_is_invalid(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        diracnets.timm.TimmDiracNet(**{'depth': 18, **options})
