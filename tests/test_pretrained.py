"""Fine-tuning: what becomes of the last layer, and networks that do not fit."""

import pytest
import torch

import diracnets
import train
from diracnets.fold import fold
from diracnets.models.registry import ARCHITECTURES
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


@pytest.mark.parametrize(('classes', 'said'), [
    (('cat', 'dog'), 'is kept: they are the same'),
    (('owl', 'yak'), 'is replaced by a new one: class 0 was cat, is owl'),
    (('cat', 'emu'), 'is replaced by a new one: class 1 was dog, is emu'),
    (('cat', 'dog', 'emu'), 'is replaced by a new one of 3'),
])
def test_last_layer(before, tmp_path, capsys, classes, said):
    images = images_of(tmp_path / 'images', *classes)
    run(images, tmp_path / 'new', '--epochs', 1, '--lr', 0)
    capsys.readouterr()
    run(images, tmp_path / 'run', '--epochs', 1, '--lr', 0, '--pretrained', before[0])
    assert f'--pretrained {before[0]}: the last layer, of 2 classes, {said}' in (
        capsys.readouterr().out.splitlines())
    old, new, after = map(params_of, (before[0], tmp_path / 'new', tmp_path / 'run'))
    kept = old if classes == ('cat', 'dog') else new
    assert torch.equal(after['fc.weight'], kept['fc.weight'])
    assert torch.equal(after['fc.bias'], kept['fc.bias'])
    learnt = [name for name in old if not name.startswith('fc.') and 'running' not in name]
    assert all(torch.equal(after[name], old[name]) for name in learnt)


def test_another_normalisation_is_said_and_how_to_keep_it(before, tmp_path, capsys):
    given = '[0.5,0.25,0.125,0.5,0.25,0.125]'
    run(before[1], tmp_path / 'a', '--epochs', 1, '--normalise', given)
    assert 'normalised' not in capsys.readouterr().out
    run(before[1], tmp_path / 'b', '--epochs', 1, '--pretrained', tmp_path / 'a')
    ours = '[0.49137,0.48235,0.44667,0.24706,0.24353,0.26157]'  # 125.3 / 255 and so on
    assert (f'--pretrained {tmp_path / "a"}: inputs were normalised by {given}, and are by {ours} '
            f'here: --normalise {given} keeps what they were\n') in capsys.readouterr().out
    run(before[1], tmp_path / 'c', '--epochs', 1, '--pretrained', tmp_path / 'a', '--normalise',
        given)
    assert 'normalised by' not in capsys.readouterr().out


def test_last_layer_of_classes_without_names(before, tmp_path, capsys):
    torch.save(params_of(before[0]), tmp_path / 'bare.pth')
    run(before[1], tmp_path / 'run', '--epochs', 1, '--lr', 0, '--pretrained',
        tmp_path / 'bare.pth')
    said = 'the last layer, of 2 classes, is kept: the file does not say which they are'
    assert said in capsys.readouterr().out
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
def test_another_network_is_one_line(before, tmp_path, capsys, flags, differ, bare):
    source = tmp_path / 'bare.pth' if bare else before[0]
    if bare:
        torch.save(params_of(before[0]), source)
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', before[1], '--save',
                    tmp_path / 'run', '--pretrained', source, *flags)
    assert error == f'train.py: --pretrained {source}: {differ}\n'
    assert not (tmp_path / 'run').exists()


def test_a_last_layer_of_another_shape_is_one_line(before, tmp_path, capsys):
    torch.save({**params_of(before[0]), 'fc.weight': torch.ones(2)}, tmp_path / 'odd.pth')
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', before[1], '--depth', 10,
                    '--save', tmp_path / 'run', '--pretrained', tmp_path / 'odd.pth')
    assert error.startswith(f'train.py: --pretrained {tmp_path / "odd.pth"}: ')


def test_whitening_filters_of_a_file_are_kept(before, tmp_path):
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


def test_folded_parameters_are_no_beginning(before, tmp_path, capsys):
    torch.save(fold(diracnets.load(before[0]).model).state_dict(), tmp_path / 'folded.pth')
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', before[1], '--depth', 10,
                    '--save', tmp_path / 'run', '--pretrained', tmp_path / 'folded.pth')
    assert 'holds a folded network: expected the parameters it was folded from' in error


@pytest.mark.parametrize(('family', 'of_last'), [
    ('plain', 2), ('densenet121', 2), ('mobilenet', 2), ('diracnet-fast', 1),
])
def test_last_layer_of_other_families(family, of_last, tmp_path, capsys):
    kind = ARCHITECTURES[family].datasets[0]
    depth = {'depth': 10} if 'depth' in ARCHITECTURES[family].options else {}
    args = {'dataset': 'ImageNet' if kind == 'ImageNet' else 'CIFAR10'}
    opt = options.parse_options(
        ['--model', family, '--dataset', args['dataset'], '--pretrained', str(tmp_path / 'f.pth'),
         *(['--depth', '10'] if depth else [])])
    small, large = (diracnets.create_model(family, kind, n, **depth) for n in (3, 5))
    torch.save(small.state_dict(), tmp_path / 'f.pth')
    pretrained.load_pretrained(large, opt, Preprocessing.for_dataset(args['dataset']), list('abcde'))
    taken = [torch.equal(p, q) if p.shape == q.shape else None
             for p, q in zip(small.parameters(), large.parameters())]
    assert taken == [True] * (len(taken) - of_last) + [None] * of_last
    assert 'the last layer, of 3 classes, is replaced by a new one of 5' in capsys.readouterr().out
    same = diracnets.create_model(family, kind, 3, **depth)
    pretrained.load_pretrained(same, opt, Preprocessing.for_dataset(args['dataset']), list('abc'))
    assert all(map(torch.equal, small.parameters(), same.parameters()))


def test_published_parameters_are_taken(monkeypatch):
    published = diracnets.create_model('diracnet', 'ImageNet', depth=18).state_dict()
    monkeypatch.setattr(pretrained, 'pretrained_params', lambda depth: published)
    network = diracnets.create_model('diracnet', 'ImageNet', 3, depth=18)
    opt = options.parse_options(['--depth', '18', '--dataset', 'ImageNet', '--pretrained', '18'])
    pretrained.load_pretrained(network, opt, Preprocessing.for_dataset('ImageNet'), ['cat', 'dog', 'emu'])
    taken = network.state_dict()
    assert len(taken['fc.bias']) == 3
    assert all(torch.equal(taken[name], tensor) for name, tensor in published.items()
               if not name.startswith('fc'))
