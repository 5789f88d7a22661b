"""experiments.visualize: predictions, confusion matrix, mistakes and figures of a trained model."""

import shutil

import cv2
import pytest
import torch

import diracnets
import export
from diracnets.preprocessing import normalize
from experiments import measures, visualize
from experiments.results import read_csv
from runs import run, write_sets
from training import data

PICTURES = ('confusion.png', 'filters.png', 'layers.png', 'mistakes.png')


@pytest.fixture(scope='module')
def visualized(tmp_path_factory):
    """(folder of images, of a run, of its figures)."""
    root = tmp_path_factory.mktemp('visualized')
    images = write_sets(root / 'images', 12, 30)
    run(images, root / 'run', '--epochs', 1)
    visualize.main([str(root / 'run'), '--dataroot', str(images), '--save', str(root / 'seen')])
    return images, root / 'run', root / 'seen'


def test_predictions_are_those_of_the_unfolded_model(visualized):
    images, folder, drawn = visualized
    trained = diracnets.load(str(folder))
    test = data.load_splits('Folder', images, trained.preprocess, training=False).test
    rows = read_csv(drawn / 'predictions.csv')
    assert len(rows) == len(test)
    network = trained.model.double().eval()
    for number, row in enumerate(rows):
        pixels, labels, _ = test[torch.tensor([number]), None, torch.tensor([0])]
        with torch.no_grad():
            logits = network(normalize(pixels, trained.preprocess).double())[0]
        shares = logits.exp() / logits.exp().sum()
        assert row['image'] == str(number)
        assert row['class'] == trained.classes[labels[0]]
        assert row['labelled'] == trained.classes[shares.argmax()]
        sure = 100 * shares.max().item()
        assert float(row['probability_percent']) == pytest.approx(sure, abs=0.01)


def test_confusion_matrix_counts_pairs():
    pairs = [('a', 'a'), ('a', 'b'), ('b', 'b'), ('c', 'a'), ('a', 'b')]
    rows = [{'class': c, 'labelled': labelled} for c, labelled in pairs]
    counts = visualize.confusion_matrix(rows, ['a', 'b', 'c'])
    assert counts.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 0]]


def test_mistakes_are_drawn_most_confident_first(visualized):
    images, folder, drawn = visualized
    preprocess = diracnets.load(str(folder)).preprocess
    test = data.load_splits('Folder', images, preprocess, training=False).test
    sure = [10, 90, 50, 70]
    rows = [{'image': i, 'class': 'a', 'labelled': labelled, 'probability_percent': p}
            for i, (labelled, p) in enumerate(zip('bbab', sure))]
    titles = [axes.get_title() for axes in visualize.draw_mistakes(rows, test, '').axes]
    assert titles[:4] == ['"b", 90.0 %\nis: a', '"b", 70.0 %\nis: a', '"b", 10.0 %\nis: a', '']


def test_figures_are_drawn(visualized):
    *_, drawn = visualized
    assert sorted(path.name for path in drawn.iterdir()) == sorted((*PICTURES, 'predictions.csv'))
    for name in PICTURES:
        picture = cv2.imread(str(drawn / name))
        assert min(picture.shape[:2]) > 200
        assert picture.std() > 5  # something is drawn


def test_exported_models_are_drawn_without_filters(visualized, tmp_path):
    images, folder, drawn = visualized
    file = str(tmp_path / 'model.onnx')
    export.main([str(folder), '--to', file, '--dataset', 'Folder', '--dataroot', str(images)])
    visualize.main([file, '--dataroot', str(images), '--save', str(tmp_path / 'seen')])
    seen = sorted(path.name for path in (tmp_path / 'seen').iterdir())
    assert seen == ['confusion.png', 'mistakes.png', 'predictions.csv']
    assert [row['labelled'] for row in read_csv(tmp_path / 'seen' / 'predictions.csv')] == [
        row['labelled'] for row in read_csv(drawn / 'predictions.csv')]


def test_test_set_of_a_single_class_of_the_model_is_used_in_place_of_val(visualized, tmp_path):
    images, folder, drawn = visualized
    _, second = sorted(path.name for path in (images / 'test').iterdir())
    shutil.copytree(images / 'train', tmp_path / 'val')
    shutil.copytree(images / 'test' / second, tmp_path / 'test' / second)
    visualize.main([str(folder), '--dataroot', str(tmp_path), '--save', str(tmp_path / 'seen')])
    seen, expected = (
        [(row['class'], row['labelled'], row['probability_percent'])
         for row in read_csv(path / 'predictions.csv') if row['class'] == second]
        for path in (tmp_path / 'seen', drawn))
    assert len(read_csv(tmp_path / 'seen' / 'predictions.csv')) == len(seen) == 30
    assert [row[:2] for row in seen] == [row[:2] for row in expected]
    for (*_, probability), (*_, other) in zip(seen, expected):  # of batches of other images
        assert float(probability) == pytest.approx(float(other), abs=0.01)


@pytest.mark.parametrize('model', ['plain', 'diracnet-v1', 'diracnet-fast'])
def test_layer_statistics_are_of_diracnets_alone(model):
    params = diracnets.create_model(model, 'CIFAR10').state_dict()
    assert measures.layer_statistics(params) == []
    diracnet = diracnets.create_model('diracnet', 'CIFAR10', depth=10)
    assert len(measures.layer_statistics(diracnet.state_dict())) == 6


def test_layer_statistics_leave_out_alpha_without_a_one_in_delta():
    alpha, beta = torch.tensor([2., 4., 100.]), torch.tensor([3., 0., 3.])
    record, = measures.layer_statistics({
        'a.alpha': alpha, 'a.beta': beta, 'a.conv': torch.zeros(3, 2, 3, 3)})
    assert (record['alpha_mean'], record['alpha_deviation']) == (3, 1)
    assert record['dirac_norm'] == pytest.approx(20 ** 0.5)
    assert record['beta_mean']**2 + record['beta_deviation']**2 == pytest.approx(6)


def test_command_exits_with_one_line_when_the_model_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        visualize.main([str(tmp_path / 'none'), '--save', str(tmp_path / 'seen')])
    assert stopped.value.code != 0
    error = capsys.readouterr().err
    assert error.startswith('experiments.visualize: ')
    assert error.count('\n') == 1
