"""Fine-tuning with --pretrained: the last layer, and files that do not fit."""

import pytest
import torch

import diracnets
import train
from diracnets.architectures import ARCHITECTURES
from diracnets.folding import fold
from diracnets.preprocessing import Preprocessing
from runs import params_of, refused, run, write_images
from training import options, pretrained


@pytest.fixture(scope='module')
def before(tmp_path_factory):
    """A run on cats and dogs, and the folder of their images."""
    folder = tmp_path_factory.mktemp('before')
    images = images_of(folder / 'images', 'cat', 'dog')
    run(images, folder / 'run', '--epochs', 1)
    return folder / 'run', images


def images_of(folder, *classes):
    write_images(folder / 'train', classes)
    write_images(folder / 'test', classes)
    return folder


@pytest.mark.parametrize(('classes', 'outcome'), [
    (('cat', 'dog'), 'loaded: same classes'),
    (('owl', 'yak'), 'randomly initialized: class 0 is cat in the file, owl in the dataset'),
    (('cat', 'emu'), 'randomly initialized: class 1 is dog in the file, emu in the dataset'),
    (('cat', 'dog', 'emu'), 'randomly initialized: the training set has 3 classes'),
])
def test_last_layer_is_loaded_only_for_the_same_classes(before, tmp_path, capsys, classes, outcome):
    images = images_of(tmp_path / 'images', *classes)
    run(images, tmp_path / 'new', '--epochs', 1, '--lr', 0)
    capsys.readouterr()
    run(images, tmp_path / 'run', '--epochs', 1, '--lr', 0, '--pretrained', before[0])
    assert f'--pretrained {before[0]}: last layer (2 classes) {outcome}' in (
        capsys.readouterr().out.splitlines())
    old, new, after = map(params_of, (before[0], tmp_path / 'new', tmp_path / 'run'))
    source = old if classes == ('cat', 'dog') else new
    assert torch.equal(after['fc.weight'], source['fc.weight'])
    assert torch.equal(after['fc.bias'], source['fc.bias'])
    loaded = [name for name in old if not name.startswith('fc.') and 'running' not in name]
    assert all(torch.equal(after[name], old[name]) for name in loaded)


def test_load_pretrained_prints_another_normalization(before, tmp_path, capsys):
    given = '[0.5,0.25,0.125,0.5,0.25,0.125]'
    run(before[1], tmp_path / 'a', '--epochs', 1, '--normalise', given)
    assert 'normalized' not in capsys.readouterr().out
    run(before[1], tmp_path / 'b', '--epochs', 1, '--pretrained', tmp_path / 'a')
    now = '[0.49137,0.48235,0.44667,0.24706,0.24353,0.26157]'  # 125.3 / 255 and so on
    (line,) = [line for line in capsys.readouterr().out.splitlines() if 'normalized' in line]
    assert line.startswith(f'--pretrained {tmp_path / "a"}: ')
    assert f'{given}, now by {now}; ' in line
    assert line.endswith(f'--normalize {given}')
    run(before[1], tmp_path / 'c', '--epochs', 1, '--pretrained', tmp_path / 'a', '--normalise',
        given)
    assert 'normalized by' not in capsys.readouterr().out


def test_last_layer_is_loaded_when_the_file_has_no_class_names(before, tmp_path, capsys):
    torch.save(params_of(before[0]), tmp_path / 'bare.pth')
    run(before[1], tmp_path / 'run', '--epochs', 1, '--lr', 0, '--pretrained',
        tmp_path / 'bare.pth')
    assert 'last layer (2 classes) loaded: the file has no' in capsys.readouterr().out
    weights = [params_of(folder)['fc.weight'] for folder in (before[0], tmp_path / 'run')]
    assert torch.equal(*weights)


@pytest.mark.parametrize(('flags', 'differ'), [
    (['--depth', 16], 'depth 10, expected 16'),
    (['--depth', 16, '--width', 0.5], 'depth 10, expected 16; width 1, expected 0.5'),
    (['--depth', 10, '--model', 'plain'], 'model diracnet, expected plain'),
    (['--depth', 18, '--image_size', 72],
     'depth 10, expected 18; for images up to 64 pixels, expected above 64 pixels'),
])
@pytest.mark.parametrize('bare', [False, True])
def test_pretrained_error_names_the_options_that_differ(
    before, tmp_path, capsys, flags, differ, bare
):
    source = tmp_path / 'bare.pth' if bare else before[0]
    if bare:
        torch.save(params_of(before[0]), source)
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', before[1], '--save',
                    tmp_path / 'run', '--pretrained', source, *flags)
    assert error == f'train.py: --pretrained {source}: {differ}\n'
    assert not (tmp_path / 'run').exists()


def test_pretrained_fails_when_the_last_layer_has_another_shape(before, tmp_path, capsys):
    torch.save({**params_of(before[0]), 'fc.weight': torch.ones(2)}, tmp_path / 'odd.pth')
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', before[1], '--depth', 10,
                    '--save', tmp_path / 'run', '--pretrained', tmp_path / 'odd.pth')
    assert error.startswith(f'train.py: --pretrained {tmp_path / "odd.pth"}: ')


def test_whiten_keeps_the_filters_of_a_pretrained_file(before, tmp_path):
    fast = ['--model', 'diracnet-fast', '--width', 0.25, '--whiten', '--epochs', 1]
    words = ['--dataset', 'Folder', '--dataroot', before[1], '--batch_size', 12, *fast]
    train.main([*map(str, words), '--save', str(tmp_path / 'a')])
    images_of(tmp_path / 'others', 'cat', 'dog', 'emu')
    words[3] = tmp_path / 'others'
    words += ['--pretrained', tmp_path / 'a']
    train.main([*map(str, words), '--save', str(tmp_path / 'b')])
    first, second = (params_of(tmp_path / name) for name in 'ab')
    assert torch.equal(first['features.conv.weight'], second['features.conv.weight'])
    assert not torch.equal(first['features.group0.block0.conv.weight'],
                           second['features.group0.block0.conv.weight'])


def test_pretrained_fails_for_folded_parameters(before, tmp_path, capsys):
    torch.save(fold(diracnets.load(before[0]).model).state_dict(), tmp_path / 'folded.pth')
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', before[1], '--depth', 10,
                    '--save', tmp_path / 'run', '--pretrained', tmp_path / 'folded.pth')
    assert 'folded network' in error


@pytest.mark.parametrize(('model', 'last_parameters'), [
    ('plain', 2), pytest.param('densenet121', 2, marks=pytest.mark.slow), ('mobilenet', 2),
    ('diracnet-fast', 1),
])
def test_last_layer_of_other_architectures(model, last_parameters, tmp_path, capsys):
    kind = ARCHITECTURES[model].datasets[0]
    depth = {'depth': 10} if 'depth' in ARCHITECTURES[model].options else {}
    args = {'dataset': 'ImageNet' if kind == 'ImageNet' else 'CIFAR10'}
    opt = options.parse_options(
        ['--model', model, '--dataset', args['dataset'], '--pretrained', str(tmp_path / 'f.pth'),
         *(['--depth', '10'] if depth else [])])
    small, large = (diracnets.create_model(model, kind, n, **depth) for n in (3, 5))
    torch.save(small.state_dict(), tmp_path / 'f.pth')
    preprocess = Preprocessing.for_dataset(args['dataset'])
    pretrained.load_pretrained(large, opt, preprocess, list('abcde'))
    equal = [torch.equal(p, q) if p.shape == q.shape else None
             for p, q in zip(small.parameters(), large.parameters())]
    assert equal == [True] * (len(equal) - last_parameters) + [None] * last_parameters
    printed = capsys.readouterr().out
    assert 'last layer (3 classes) randomly initialized: the training set has 5 classes' in printed
    same = diracnets.create_model(model, kind, 3, **depth)
    pretrained.load_pretrained(same, opt, preprocess, list('abc'))
    assert all(map(torch.equal, small.parameters(), same.parameters()))


def test_load_pretrained_loads_the_published_weights(monkeypatch):
    published = diracnets.create_model('diracnet', 'ImageNet', depth=18).state_dict()
    monkeypatch.setattr(pretrained, 'pretrained_params', lambda depth: published)
    network = diracnets.create_model('diracnet', 'ImageNet', 3, depth=18)
    opt = options.parse_options(['--depth', '18', '--dataset', 'ImageNet', '--pretrained', '18'])
    preprocess = Preprocessing.for_dataset('ImageNet')
    pretrained.load_pretrained(network, opt, preprocess, ['cat', 'dog', 'emu'])
    loaded = network.state_dict()
    assert len(loaded['fc.bias']) == 3
    assert all(torch.equal(loaded[name], tensor) for name, tensor in published.items()
               if not name.startswith('fc'))
