"""The experiments: what they train, what they keep of it, and that it goes on where it stopped."""

import csv
import functools
import itertools
import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, JpegImagePlugin

import diracnets
import train
from diracconv import dirac_weight
from diracnets.checkpoint import load_params
from experiments import cost_estimate, definitions, figures, init, interleaved, jpeg, measures, run
from experiments.definitions import BUDGETS, EXPERIMENTS, VARIANTS, RunSpec
from training import data
from training.options import parse_options


def read(table):
    with open(table, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """Folders that all experiments of this module share, as those of the repository are."""
    return tmp_path_factory.mktemp('experiments')


@pytest.fixture(scope='module')
def digit_files(tmp_path_factory):
    """Some of the digits as a Folder: image files to calibrate on."""
    folder = tmp_path_factory.mktemp('digits')
    sets = data.load_splits('Digits')
    for split, images in (('train', sets.train), ('test', sets.test)):
        for i in range(200):
            name = folder / split / str(int(images.labels[i]))
            name.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(name / f'{i}.png'), images.images[i].numpy())
    return folder


def tiny(experiment, place, *options):
    run.main([experiment, '--budget', 'tiny', '--logs', str(place / 'logs'),
              '--runs', str(place / 'runs'), *map(str, options)])
    return place / 'logs' / experiment


@pytest.mark.slow
@pytest.mark.parametrize('experiment', [e for e in EXPERIMENTS if e not in ('cost', 'int8')])
def test_a_tiny_budget_goes_to_its_figure(experiment, place, monkeypatch):
    small = functools.partial(interleaved.product_rate, size=256)  # of 4096 it takes most of a minute
    monkeypatch.setattr(measures, 'product_rate', small)
    folder = tiny(experiment, place)
    trainings = EXPERIMENTS[experiment](BUDGETS['tiny'])
    rows = read(folder / 'results.csv')
    assert [(row['series'], float(row['x']), int(row['seed'])) for row in rows] == [
        (training.series, training.x, training.seed) for training in trainings]
    for row, training in zip(rows, trainings):
        lines = (place / 'logs' / row['log']).read_text().splitlines()
        last = json.loads(lines[-1].removeprefix('json_stats: '))
        assert float(row['test_acc_percent']) == last['test_acc']
        assert last['model'] == training.options['model']
        assert int(row['epochs']) == training.options['epochs'] == len(lines)
    assert cv2.imread(str(folder / f'{experiment}.png')).std() > 10


@pytest.mark.slow
def test_int8_to_its_figure(digit_files, place):
    folder = tiny('int8', place, '--dataset', 'Folder', '--dataroot', digit_files)
    row, *_ = rows = read(folder / 'measured.csv')
    assert {row['series'] for row in rows} == {'plain', 'diracnet', 'resnet'}
    # the accuracy of the log is of bfloat16 or float32 before folding: the same network
    trained = {row['run']: float(row['test_acc_percent']) for row in read(folder / 'results.csv')}
    assert abs(float(row['float32_test_acc_percent']) - trained[row['run']]) < 2
    assert cv2.imread(str(folder / 'int8.png')).std() > 10


@pytest.mark.slow
def test_cost_to_its_figure(monkeypatch, place):
    monkeypatch.setattr(measures, 'TURNS', 2)
    monkeypatch.setattr(measures, 'STEPS', 1)
    folder = tiny('cost', place)
    rows = read(folder / 'measured.csv')
    assert len(rows) == 8
    assert all(row['n'] == '2' and float(row['milliseconds']) > 0 for row in rows)
    assert cv2.imread(str(folder / 'cost.png')).std() > 10


@pytest.mark.slow
def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    table = tiny('init', tmp_path, '--only', 'plain, 1, *') / 'results.csv'
    before = read(table)
    monkeypatch.setattr(train, 'main', lambda words: pytest.fail('trained again'))
    tiny('init', tmp_path, '--only', 'plain, 1, *')
    assert read(table) == before
    # the same training in another experiment: its row, in that one's place, and no time left
    monkeypatch.setattr(cost_estimate, 'RATES', {1: 1})
    row, = read(tiny('depth', tmp_path, '--only', 'plain*') / 'results.csv')
    assert row == {**before[0], 'x': '10'}
    assert 'plain, 10, seed 1; 0.0 h left' in capsys.readouterr().out


@pytest.mark.slow
def test_a_command_says_how_long_it_took(tmp_path, monkeypatch, capsys):
    tiny('depth', tmp_path, '--only', 'plain*')
    clock = itertools.count(0, 900)  # a quarter of an hour between two looks at it
    monkeypatch.setattr(run, 'time', SimpleNamespace(monotonic=lambda: next(clock)))
    tiny('depth', tmp_path, '--only', 'plain*')
    assert capsys.readouterr().out.endswith('; this command took 0.25 h\n')


@pytest.mark.slow
def test_what_is_measured_is_the_training_of_the_row(tmp_path, capsys):
    only = '--only', 'diracnet, *'
    row, = read(tiny('delta', tmp_path, *only) / 'results.csv')
    folder = tmp_path / 'runs' / 'Digits' / row['run']
    shutil.rmtree(folder)  # its parameters are gone: the same training makes them again
    table = tiny('versions', tmp_path, *only) / 'results.csv'
    assert read(table) == [{**row, 'x': '1'}]
    for name in ('results.csv', 'measured.csv'):
        (table.parent / name).unlink()
    log = folder / 'log.txt'
    log.write_text(log.read_text().replace('"test_acc": ', '"test_acc": 1'))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        tiny('versions', tmp_path, *only)
    error = capsys.readouterr().err
    assert error.startswith(f'experiments.run: {folder}: epochs and accuracy 1, 1')
    assert error.endswith(f'expected 1, {row["test_acc_percent"]}, as its row has; another --logs '
                          'begins anew\n')
    assert not table.exists()


def test_nothing_is_drawn_of_what_is_not_measured_yet(tmp_path):
    (tmp_path / 'alpha-beta').mkdir()
    (tmp_path / 'alpha-beta' / 'results.csv').write_text('series,x,seed,ended\nwidth 1,1,1,whole\n')
    with pytest.raises(ValueError, match='nothing measured yet: expected rows in measured.csv'):
        figures.draw('alpha-beta', tmp_path)


def test_what_stopped_goes_on(tmp_path, monkeypatch):
    words = []

    def stop(given):
        words.extend(given)
        raise SystemExit(143)

    monkeypatch.setattr(train, 'main', stop)
    with pytest.raises(SystemExit) as ending:
        tiny('depth', tmp_path, '--only', 'plain*')
    assert ending.value.code == 143
    assert not (tmp_path / 'logs').exists()
    assert words[-2:] == ['--resume', 'auto']


def test_a_diverged_training_is_a_row_without_figures(tmp_path, monkeypatch):
    def diverge(words):
        raise SystemExit(3)

    monkeypatch.setattr(train, 'main', diverge)
    with pytest.raises(SystemExit) as ending:  # nothing can be drawn
        tiny('depth', tmp_path, '--only', 'plain*')
    assert ending.value.code == 2
    row, = read(tmp_path / 'logs' / 'depth' / 'results.csv')
    assert (row['ended'], row['test_acc_percent'], row['epochs']) == ('diverged', '', '0')


def test_the_log_of_a_gpu_does_not_replace_that_of_a_cpu(tmp_path, monkeypatch):
    training = EXPERIMENTS['depth'](BUDGETS['tiny'])[0]
    place = run.Paths(tmp_path / 'logs', tmp_path / 'runs', 'Digits', '.')
    place.folder(training).mkdir(parents=True)
    kept = []
    for device, accuracy in (('CPU', 70.0), ('NVIDIA H100 80GB HBM3', 71.0)):
        monkeypatch.setattr(run, 'device', lambda device=device: device)
        line = json.dumps({'epoch': 1, 'test_acc': accuracy})
        (place.folder(training) / 'log.txt').write_text(f'json_stats: {line}\n')
        kept.append(run.keep_log(training, place)[1])
    assert kept == [f'trainings/Digits/{training.run}.txt',
                    f'trainings/Digits/NVIDIA-H100-80GB-HBM3/{training.run}.txt']
    assert [run.read_log(place.logs / path)[0]['test_acc'] for path in kept] == [70.0, 71.0]


def test_two_processes_share_trainings(tmp_path, capsys):
    training = EXPERIMENTS['depth'](BUDGETS['tiny'])[0]
    folder = tmp_path / 'runs' / 'Digits'
    folder.mkdir(parents=True)
    lock = folder / f'{training.run}.lock'
    lock.touch()
    with run.Lock(lock) as other:
        other.take()
        with pytest.raises(SystemExit):
            tiny('depth', tmp_path, '--only', training.name)
    assert 'left out' in capsys.readouterr().out
    assert not (tmp_path / 'logs' / 'depth').exists()


def test_hours_are_counted_by_hand():
    training = RunSpec('plain', 10, 1, {'model': 'plain', 'depth': 10, 'width': 1, 'epochs': 4})
    # 32^2 positions of 3 x 16 and twice 16 x 16; 16^2 of 16 x 32, 32 x 32; 8^2 of 32 x 64, 64 x 64
    convolutions = 9 * (1024 * (48 + 512) + 256 * (512 + 1024) + 64 * (2048 + 4096))
    assert cost_estimate.work(training, 'Folder') == 3 * 200_000 * (convolutions + 640)
    assert cost_estimate.work(training, 'Digits') == 3 * 4 * 1437 * (convolutions + 640)


def test_hours_of_growing_images_are_counted_by_hand():
    options = {'recipe': 'speedrun', 'model': 'diracnet-fast', 'epochs': 4,
               'grow': '[20,24,28,32]'}

    def convolutions(size):  # of 2 x 2 without padding, pooled behind each first one of a group
        first, second, third, last = size - 1, (size - 1) // 2, (size - 1) // 4, (size - 1) // 8
        nines = (first**2 * 24 * 64 + second**2 * (64 * 64 + 64 * 256)
                 + third**2 * 2 * 256 * 256 + last**2 * 256 * 256)
        return first**2 * 12 * 24 + 9 * nines + 2560

    counted = sum(convolutions(size) for size in (20, 24, 28, 32))
    assert cost_estimate.work(RunSpec('a', 4, 1, options), 'Folder') == 3 * 50_000 * counted


def test_options_are_words():
    options = {'depth': 10, 'whiten': False, 'nesterov': True}
    assert definitions.words_of(options) == ['--depth', '10', '--no-whiten', '--nesterov']


def test_jpeg_files_are_those_of_pillows_defaults(tmp_path, capsys):
    folder = tmp_path / 'made' / 'digits'
    jpeg.main([str(folder), '--dataset', 'Digits'])
    assert capsys.readouterr().out == f'1,437 and 360 images written to {folder}\n'
    digits, files = data.load_splits('Digits'), data.load_splits('Folder', folder)
    assert files.classes == digits.classes
    for written, given in ((files.train, digits.train), (files.test, digits.test)):
        order = given.labels.sort(stable=True).indices
        assert torch.equal(written.labels, given.labels[order])
        differences = written.images.double() - given.images[order].double()
        assert 0 < differences.abs().mean() < 5  # of 255: no image is another's
        assert differences.abs().flatten(1).mean(dim=1).max() < 10
    with Image.open(folder / 'train' / digits.classes[0] / '0000.jpg') as image:
        # half of the first line of the standard's table K.1, which is quality 75
        assert image.quantization[0][:8] == [8, 6, 5, 8, 12, 20, 26, 31]
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
    with pytest.raises(SystemExit) as ending:
        jpeg.main([str(folder), '--dataset', 'Digits'])
    assert ending.value.code == 2
    assert 'is there already: expected a new folder' in capsys.readouterr().err


def test_the_recipe_of_the_speed_run_has_the_epochs_of_the_experiment():
    epochs, chosen, _ = BUDGETS['small'].speedrun[0]
    assert parse_options(['--recipe', 'speedrun']).epochs == epochs
    assert list(VARIANTS)[chosen][0] == 'the recipe'


def test_six_views_are_weighted():
    images = torch.rand(2, 3, 5, 5, dtype=torch.double)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode='reflect')
    weights = torch.rand(3, 5, 5, dtype=torch.double)

    def network(inputs):  # not linear, nor the same for the mirror image
        return (inputs * weights).sum((1, 2, 3)).square()

    expected = 0
    for part, top in ((2, 1), (1, 0), (1, 2)):  # eighths; where the view begins, padded by 1
        view = padded[:, :, top : top + 5, top : top + 5]
        for seen in (view, view[..., ::-1]):
            expected += part / 8 * (seen * weights.numpy()).sum((1, 2, 3)) ** 2
    np.testing.assert_allclose(measures.six_views(network, images), expected, rtol=1e-12)


def test_a_speed_run_is_measured(place):
    folder = tiny('speedrun', place)
    row, _ = read(folder / 'measured.csv')
    result, _ = read(folder / 'results.csv')
    # in other batches, by a network that has just begun to learn
    assert abs(float(row['test_acc_percent']) - float(result['test_acc_percent'])) < 3
    assert float(row['machine_tflop']) == pytest.approx(
        float(row['train_seconds']) * float(row['product_gflop_per_second']) / 1000, abs=0.1)


def test_starts():
    torch.manual_seed(0)
    drawn = diracnets.create_model('plain', 'CIFAR10', depth=10, width=1)
    before = {name: p.clone() for name, p in drawn.named_parameters()}
    for name, p in init.started(drawn, 'scaled-0.1').named_parameters():
        torch.testing.assert_close(p, before[name] * (0.1 if p.dim() == 4 else 1))
    weight = init.started(drawn, 'delta-orthogonal').features.group1.block0.conv.weight
    assert weight.shape == (32, 16, 3, 3)
    middle = weight[:, :, 1, 1]
    torch.testing.assert_close(middle.T @ middle, torch.eye(16), atol=1e-5, rtol=0)
    assert weight.count_nonzero() == middle.count_nonzero()
    with pytest.raises(ValueError, match='sideways'):
        init.started(drawn, 'sideways')


def test_alpha_beta_measures_the_two_parts_of_w_hat(place):
    tiny('alpha-beta', place)
    training, = EXPERIMENTS['alpha-beta'](BUDGETS['tiny'])
    rows = read(place / 'logs' / 'alpha-beta' / 'measured.csv')
    params = load_params(str(place / 'runs' / 'Digits' / training.run / 'epoch-1.pt7'))
    names = [f'group{g}.block{b}' for g in range(3) for b in range(2)]
    assert [(row['epoch'], row['layer']) for row in rows] == [
        (epoch, str(layer)) for epoch in '01' for layer in range(1, 7)]
    for row, name in zip(rows[6:], names):
        alpha, beta, weight = (params[f'{name}.{part}'].double()
                               for part in ('alpha', 'beta', 'conv'))
        free = dirac_weight(weight, torch.zeros_like(alpha), beta)
        dirac = dirac_weight(weight, alpha, beta) - free
        assert float(row['dirac_norm']) == pytest.approx(dirac.norm().item(), rel=1e-5)
        assert float(row['free_norm']) == pytest.approx(free.norm().item(), rel=1e-5)
        assert float(row['alpha_mean']) == pytest.approx(alpha.mean().item(), rel=1e-5)
    for row, width, of_delta in zip(rows, (8, 8, 16, 16, 32, 32), (8, 8, 8, 16, 16, 32)):
        assert float(row['alpha_mean']) == 1  # as they start, alpha 1 and beta 0.1
        assert float(row['dirac_norm']) == pytest.approx(of_delta ** 0.5)
        assert float(row['free_norm']) == pytest.approx(0.1 * width ** 0.5)


def test_lines_over_layers_are_means_of_seeds():
    axes = Figure().subplots()
    rows = [{'layer': layer, 'alpha_mean': layer + seed} for seed in (0, 4) for layer in (1, 2)]
    figures.over_layers(axes, rows, lambda row: row['alpha_mean'], 'alpha', capsize=2)
    assert [*axes.lines[0].get_ydata()] == [3, 4]
    low, high = axes.lines[1].get_ydata(), axes.lines[2].get_ydata()
    assert [*(high - low)] == pytest.approx(2 * [2 * 8 ** 0.5])  # deviation of 1 and 5: sqrt(8)


def test_histograms_of_activations_sum_to_one(place):
    tiny('versions', place)
    rows = read(place / 'logs' / 'versions' / 'measured.csv')
    shares = figures.grouped([{**row, 'share': float(row['share'])} for row in rows],
                             'run', 'layer')
    assert len(shares) == 6
    for bins in shares.values():
        assert len(bins) == measures.BINS
        assert 0.98 < sum(row['share'] for row in bins) < 1 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'number', 'shape'), [
    ('diracnet', 0, (16, 3, 3, 3)), ('plain', 0, (16, 3, 3, 3)), ('diracnet', 2, (16, 16, 3, 3)),
])
def test_relative_gradients_against_finite_differences(model, number, shape):
    torch.manual_seed(5)
    images, labels = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 7])
    torch.manual_seed(1)  # the network that is measured
    network = measures.by_name(model, 10, 1).double().train()
    filters = [p for p in network.parameters() if p.dim() == 4][number]
    assert filters.shape == shape
    slopes, step = [], 1e-6
    with torch.no_grad():
        for i in range(filters.numel()):
            ends = []
            for sign in (1, -1):
                filters.view(-1)[i] += sign * step
                ends.append(torch.nn.functional.cross_entropy(network(images), labels))
                filters.view(-1)[i] -= sign * step
            slopes.append((ends[0] - ends[1]) / (2 * step))
        expected = torch.stack(slopes).norm() / filters.norm()
    assert expected > 0.01
    found = measures.relative_gradients(model, 10, images, labels)
    assert found[number] == pytest.approx(expected.item(), rel=1e-4)
    assert len(found) == 7  # the stem, and two in each block of a group


def test_gradients_are_measured_once(place):
    table = tiny('thousand', place) / 'measured.csv'
    rows = read(table)
    assert [(row['series'], row['x'], int(row['layer'])) for row in rows] == [
        (model, '10', layer) for model in ('diracnet', 'plain') for layer in range(1, 8)]
    assert all(0 < float(row['relative_gradient']) < 1e3 for row in rows)
    tiny('thousand', place)
    assert read(table) == rows


def test_points_are_means_and_deviations_over_seeds():
    rows = [{'series': 'a', 'x': 1, 'value': value} for value in (1.0, 2.0, 6.0)]
    assert figures.mean_and_deviation([row['value'] for row in rows]) == (3.0, 7 ** 0.5)
    assert figures.counts(rows) == 'n = 3'
    axes = Figure().subplots()
    figures.points(axes, rows + [{'series': 'b', 'value': -0.001}], 'value', 'points')
    assert [label.get_text() for label in axes.get_yticklabels()] == ['a', 'b']
    assert [text.get_text() for text in axes.texts] == ['3.00', '0.00']  # -0.00 is said of none
    circles, mean, *_ = axes.lines
    assert (list(circles.get_xdata()), list(mean.get_xdata())) == ([1, 2, 6], [3])


@pytest.mark.slow
def test_the_list_says_hours(capsys):
    run.main(['--list'])
    out = capsys.readouterr().out
    assert all(f'| {name} ' in out for name in EXPERIMENTS)
    cost = next(line.split('|') for line in out.splitlines() if line.startswith('| cost '))
    assert float(cost[3]) > 0  # nothing is trained, but it is timed
    # three DiracNets-28-1 and three that repeat delta, of 200,000 images each: 54.8e6 multiply-adds
    delta = next(line.split('|') for line in out.splitlines() if line.startswith('| delta '))
    assert float(delta[3]) == pytest.approx(
        6 * 200_000 * 3 * 54.8e6 / cost_estimate.RATES[1] / 3600, abs=0.06)


@pytest.mark.parametrize(('width', 'rate'), [(0.25, 2), (0.5, 2), (1, 5), (1.5, 5), (10, 7)])
def test_seconds_are_counted_at_the_rate_of_the_width(width, rate, monkeypatch):
    monkeypatch.setattr(cost_estimate, 'RATES', {0.5: 2, 1: 5, 4: 7})
    training, = BUDGETS['tiny'].trainings('diracnet', 0, model='diracnet', depth=10, width=width)
    assert cost_estimate.seconds(training, 'Digits') == cost_estimate.work(training, 'Digits') / rate


def test_the_network_of_the_speed_run_is_a_wide_one_at_any_width(monkeypatch):
    monkeypatch.setattr(cost_estimate, 'RATES', {0.5: 2, 4: 7})
    for options in ({}, {'width': 0.75}):
        training = RunSpec('a', 4, 1, {'recipe': 'speedrun', 'model': 'diracnet-fast', **options})
        assert cost_estimate.seconds(training, 'Folder') == cost_estimate.work(training, 'Folder') / 7
