"""DiracNets as backbones: the code of docs/backbones.md, its shapes, and folding in any order."""

import copy

import pytest
import torch
from torch import nn

import diracnet
import diracnets
from diracnet import DiracNet, define_diracnet
from pages import ROOT, blocks

pytest.importorskip('timm')

SIZES = {'group0': (2, 64, 56, 56), 'group1': (2, 128, 28, 28), 'group2': (2, 256, 14, 14),
         'group3': (2, 512, 7, 7)}


def count(model, kind):
    return sum(isinstance(layer, kind) for layer in model.modules())


def shapes(features):
    return {name: tuple(tensor.shape) for name, tensor in features.items()}


@pytest.fixture(scope='module')
def page():
    """The names that the code blocks of the page define, without downloads."""
    torch.manual_seed(0)
    params = define_diracnet(18, 1, 'ImageNet')[1]
    folded, text = DiracNet(18).state_dict(), (ROOT / 'docs/backbones.md').read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diracnet, 'load_published', lambda url, get_params: get_params(folded))
        patch.setattr(diracnets, 'pretrained_params', lambda depth: params)
        codes = blocks('docs/backbones.md')
        assert len(codes) == text.count('```python') == 7
        names = {}
        for _, code in codes[:-1]:
            exec(code, names)
        names['folding'] = codes[-1][1]
        return names


def test_page_extracts_strides_4_to_32(page):
    assert shapes(page['features']) == SIZES
    assert page['features']['group3'].min() < 0
    assert page['pooled'].shape == (2, 512)
    with torch.no_grad():
        assert shapes(page['extractor'](page['images'])) == SIZES
        assert [tuple(tensor.shape) for tensor in page['maps']] == [*SIZES.values()]
        final = page['features']['group3'].relu().mean(dim=(2, 3))
    torch.testing.assert_close(final, page['pooled'])
    assert page['classifier'](page['images'][:, :1]).shape == (2, 5)


@pytest.mark.slow
def test_page_pyramid_detectors_and_segmenter_compute(page):
    assert shapes(page['pyramid']) == {
        name: (2, 256, size, size) for name, (_, _, size, _) in SIZES.items()}
    assert page['masks'].shape == (2, 21, 224, 224)
    targets = [{'boxes': torch.tensor([[10.0, 10, 50, 60]]), 'labels': torch.tensor([1])}] * 2
    for detector, losses in ((page['faster_rcnn'], 4), (page['retinanet'], 2)):
        detector.transform.min_size = (64,)
        values = detector.train()(list(page['images']), targets)
        assert len(values) == losses
        assert all(loss.isfinite() for loss in values.values())
        sum(values.values()).backward()
        stem = next(detector.backbone.body.parameters())
        assert stem.grad.abs().sum() > 0
        stem.grad = None


def test_page_freezes_batch_norm(page):
    body = page['retinanet'].train().backbone.body
    page['freeze_batch_norm'](body)
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    body(page['images']).popitem()[1].sum().backward()
    norms = [layer for layer in body.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 17
    assert all(not layer.training and layer.weight.grad is None for layer in norms)
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())


def test_page_folds_before_or_after_extraction(page):
    images = page['images'][:, :, :96, :96]
    page = copy.deepcopy({name: page[name] for name in (
        'network', 'extractor', 'retinanet', 'segmenter', 'levels', 'folding',
    )}) | {'create_feature_extractor': page['create_feature_extractor']}
    with torch.no_grad():
        page['network'].train()(images)  # other running statistics than 0 and 1
        for name in ('extractor', 'retinanet', 'segmenter'):
            page[name].eval()
        levels = page['extractor'](images)
        pyramid, maps = page['retinanet'].backbone(images), page['segmenter'](images)
        exec(page['folding'], page)
        deployed = page['deployed']
        assert count(deployed, nn.BatchNorm2d) == 0
        assert count(deployed, diracnets.DiracConv2d) == 0
        assert count(page['retinanet'].backbone, nn.BatchNorm2d) == 0
        for before, after in (
            (levels, deployed(images)), (levels, diracnets.fold(page['extractor'])(images)),
            (pyramid, page['retinanet'].backbone(images)), (maps, page['segmenter'](images)),
        ):
            assert before.keys() == after.keys()
            for name, tensor in before.items():
                assert (after[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name
