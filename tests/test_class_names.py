"""Class names: datasets with some of the classes, or with the classes in another order."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import train
from diracnets.class_names import match_classes
from diracnets.image_files import DataError
from runs import assert_same_run
from training.data import DataSplits

COLORS = {'blue': (0, 0, 250), 'green': (0, 250, 0), 'red': (250, 0, 0), 'white': (250,) * 3}


class Colors(Dataset):
    """A Dataset with n images of each class, whose color is the name of the class."""

    def __init__(self, *classes, n=8):
        self.classes, self.n = classes, n

    def __len__(self):
        return self.n * len(self.classes)

    def __getitem__(self, i):
        label = i // self.n
        image = np.full((8, 8, 3), COLORS[self.classes[label]], np.uint8)
        image[0, 0] = i % self.n
        return image, label


def labels_of(images):
    """Returns {color: label} of a split of Colors."""
    batch, labels, _ = images[torch.arange(len(images)), None, torch.arange(len(images))]
    colors = {color: name for name, color in COLORS.items()}
    pairs = {(colors[tuple(pixels)], label)
             for pixels, label in zip(batch[:, :, 1, 1].tolist(), labels.tolist())}
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


@pytest.mark.parametrize(('test', 'classes', 'expected'), [
    (('green', 'red'), None, {'green': 1, 'red': 2}),
    (('red', 'blue', 'green'), None, {'red': 2, 'blue': 0, 'green': 1}),
    (('green', 'red'), ['red', 'white', 'green', 'blue'], {'green': 2, 'red': 0}),
    (('green', 'red'), ['sky', 'grass', 'blood'], {'green': 1, 'red': 2}),  # other names
    (('white', 'red'), ['red', 'white', 'green', 'blue'], {'white': 1, 'red': 0}),
])
def test_splits_from_arrays_match_the_classes_of_datasets_by_name(test, classes, expected):
    splits = DataSplits.from_arrays(Colors('blue', 'green', 'red'), Colors(*test), classes)
    assert splits.classes == (classes or ['blue', 'green', 'red'])
    assert labels_of(splits.test) == expected
    assert labels_of(splits.test.subset(torch.arange(16))) == {
        name: expected[name] for name in test[:2]}
    if classes and 'red' in classes:
        expected = {name: classes.index(name) for name in ('blue', 'green', 'red')}
    else:
        expected = {'blue': 0, 'green': 1, 'red': 2}
    assert labels_of(splits.train) == expected


@pytest.mark.parametrize(('test', 'classes', 'named'), [
    (('green', 'white'), None, 'white'),
    (('green', 'white'), ['blue', 'green', 'red'], 'white'),
    (('green', 'red'), ['blue', 'sky', 'red'], 'green'),
    (('green', 'white'), ['sky', 'grass', 'blood'], 'white'),
    (('green', 'red'), ['sky', 'grass'], 'red'),
    (('green', 'green'), None, 'equal names'),
])
def test_splits_from_arrays_reject_classes_that_do_not_match(test, classes, named):
    with pytest.raises(DataError, match=f'classes .*{named}.*: expected '):
        DataSplits.from_arrays(Colors('blue', 'green', 'red'), Colors(*test), classes)


def test_run_and_evaluation_match_classes_by_name(tmp_path, capsys):
    """The accuracy of a network that predicts one class is the share of this class."""
    splits = DataSplits.from_arrays(Colors('blue', 'green', 'red'), Colors('green', 'red', n=6))
    options = ['--depth', '10', '--batch_size', '24', '--epochs', '1', '--dtype', 'float',
               '--randomcrop_pad', '1', '--save', str(tmp_path)]
    train.main(options, splits)
    model = torch.load(tmp_path / 'model.pt7', weights_only=True)
    model['params']['fc.weight'].zero_()
    model['params']['fc.bias'] = torch.tensor([0.0, 0.0, 1.0])  # predicts red
    torch.save(model, tmp_path / 'red.pt7')
    for classes, accuracy in ((('green', 'red'), 50), (('red', 'blue'), 50), (('green', 'blue'), 0),
                              (('red', 'green', 'blue'), 100 / 3)):
        train.main(['--evaluate', '--resume', str(tmp_path / 'red.pt7')],
                   DataSplits.from_arrays(None, Colors(*classes)))
        printed = capsys.readouterr().out
        assert printed.splitlines()[-1] == f'test_acc: {accuracy:.2f}'
        assert ('matched by name: 2 of 3' in printed) == (len(classes) == 2)
    with pytest.raises(SystemExit):
        train.main(['--evaluate', '--resume', str(tmp_path)],
                   DataSplits.from_arrays(None, Colors('blue', 'white')))
    assert 'the dataset 2 (blue to white)' in capsys.readouterr().err


def test_resume_matches_classes_in_another_order_by_name(tmp_path):
    def options(folder, *words):
        return ['--depth', '10', '--batch_size', '24', '--epochs', '2', '--dtype', 'float',
                '--save', str(tmp_path / folder), '--randomcrop_pad', '1', *words]

    colors = Colors('blue', 'green', 'red')
    images, labels = (np.stack([item[part] for item in map(colors.__getitem__, range(24))])
                      for part in (0, 1))
    blue_first = DataSplits.from_arrays(*[(images, labels)] * 2, ['blue', 'green', 'red'])
    red_first = DataSplits.from_arrays(*[(images, 2 - labels)] * 2, ['red', 'green', 'blue'])
    train.main(options('whole'), blue_first)
    train.main(options('run', '--epochs', '1'), blue_first)
    train.main(options('run', '--resume', 'auto'), red_first)
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


@pytest.mark.parametrize(('classes', 'dataset', 'force', 'expected'), [
    (['a', 'b', 'c'], ['a', 'b', 'c'], False, [0, 1, 2]),
    (['a', 'b', 'c'], ['c', 'a'], False, [2, 0]),
    (['a', 'b', 'c'], ['c', 'b', 'a'], True, [2, 1, 0]),
    (['a', 'b', 'c'], ['x', 'b', 'y'], True, [0, 1, 2]),
    (['a', 'b', 'a'], ['a', 'b', 'a'], False, [0, 1, 2]),  # as the names of ImageNet
    (None, ['x', 'y', 'z'], False, [0, 1, 2]),
    (['a', 'b', 'c'], ['x', 'b', 'y'], False, None),
    (['a', 'b', 'a'], ['a', 'b'], False, None),
    (['a', 'b', 'c'], ['x', 'y'], True, None),
    (None, ['x', 'y'], True, None),
])
def test_match_classes_is_by_name_or_by_position(classes, dataset, force, expected):
    if expected is None:
        with pytest.raises(ValueError, match='^file: classes differ'):
            match_classes('file', 3, classes, dataset, force)
    else:
        assert match_classes('file', 3, classes, dataset, force) == expected
