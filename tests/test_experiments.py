"""The experiments: their runs, results, measures and figures, and that they resume."""

import csv
import functools
import itertools
import json
import shutil
from dataclasses import replace
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
from diracnets import quantization
from diracnets.checkpoint import load_params
from experiments import (
    definitions,
    figures,
    jpeg,
    measures,
    result_tables,
    results,
    run,
    tables,
)
from experiments.axes import draw_over_layers, draw_points
from experiments.definitions import BUDGETS, EXPERIMENTS, SCRIPTS, RunSpec
from experiments.release import write_log
from records import run_records, write_csv, write_speedrun
from runs import use_forkserver, write_sets
from training import data
from training.folders import files_of
from training.log import read_log
from training.options import parse_options


def read(table):
    with open(table, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """The folder of logs and runs that all experiments of this module share."""
    return tmp_path_factory.mktemp('experiments')


@pytest.fixture(scope='module')
def digit_files(tmp_path_factory):
    """Some of the digits as a Folder: image files to calibrate on."""
    folder = tmp_path_factory.mktemp('digits')
    splits = data.load_splits('Digits')
    for split, images in (('train', splits.train), ('test', splits.test)):
        for i in range(200):
            name = folder / split / str(int(images.labels[i]))
            name.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(name / f'{i}.png'), images.images[i].numpy())
    return folder


def load_few(name, *arguments, load=data.load_splits, **options):
    """Loads a dataset: of the digits, 200 training images, and all images for testing."""
    splits = load(name, *arguments, **options)
    if name == 'Digits' and splits.train:
        splits = replace(splits, train=splits.train.subset(torch.arange(200)))
    return splits


@functools.wraps(definitions.speedrun)  # figures have its docstring
def narrow_speedrun(budget):
    return [replace(spec, options={**spec.options, 'width': 0.25, 'batch_size': 20})
            for spec in definitions.speedrun(budget)]


def tiny(experiment, folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'load_splits', load_few)
        patch.setitem(EXPERIMENTS, 'speedrun', narrow_speedrun)
        use_forkserver(patch)
        patch.setattr(measures, 'matmul_gflops', lambda dtype: 5e4)  # measuring it takes a minute
        run.main([experiment, '--budget', 'tiny', '--logs', str(folder / 'logs'),
                  '--runs', str(folder / 'runs'), *map(str, options)])
    return folder / 'logs' / experiment


def test_results_of_other_images_are_refused(tmp_path):
    images, logs = write_sets(tmp_path / 'all', 2, 1), tmp_path / 'logs'
    files = files_of(images, ('test',))
    write_csv(logs / 'depth' / 'results.csv', [
        {'series': 'plain', 'dataset': 'Folder', 'run': 'a', 'log': f'{name}.txt'}
        for name in ('empty', 'old', 'new')])
    write_log([], logs / 'empty.txt')
    write_log([{'epoch': 1}], logs / 'old.txt')  # of a version that did not list the files
    write_log([{'epoch': 1, 'files': files}], logs / 'new.txt')
    paths = run.Paths(logs, tmp_path / 'runs', 'Folder', str(images))
    run.check_same_images(paths)
    other = write_sets(tmp_path / 'other', 3, 1)
    with pytest.raises(ValueError, match=f'are of {files}; use another --logs'):
        run.check_same_images(replace(paths, dataroot=str(other)))
    run.check_same_images(replace(paths, dataroot=str(tmp_path)))  # no images: nothing to compare


@pytest.mark.slow
@pytest.mark.parametrize('experiment', [e for e in EXPERIMENTS if e not in ('cost', 'int8')])
def test_tiny_budget_gives_results_and_figure(experiment, shared, monkeypatch):
    monkeypatch.setattr(measures, 'REPETITIONS', 2)
    monkeypatch.setattr(measures, 'DEPTH', 10)
    folder = tiny(experiment, shared)
    runs = EXPERIMENTS[experiment](BUDGETS['tiny'])
    records = read(folder / 'results.csv')
    assert [(record['series'], float(record['x']), int(record['seed'])) for record in records] == [
        (spec.series, spec.x, spec.seed) for spec in runs]
    for record, spec in zip(records, runs):
        lines = (shared / 'logs' / record['log']).read_text().splitlines()
        last = json.loads(lines[-1].removeprefix('json_stats: '))
        assert float(record['test_acc_percent']) == last['test_acc']
        assert last['model'] == spec.options['model']
        assert int(record['epochs']) == spec.options['epochs'] == len(lines)
    assert cv2.imread(str(folder / f'{experiment}.png')).std() > 10


@pytest.mark.slow
def test_int8_gives_accuracies_and_figure(digit_files, shared, monkeypatch):
    monkeypatch.setattr(quantization, 'CALIBRATION_IMAGES', 20)
    folder = tiny('int8', shared, '--dataset', 'Folder', '--dataroot', digit_files)
    row, *_ = rows = read(folder / 'measured.csv')
    assert {row['series'] for row in rows} == {'plain', 'diracnet', 'resnet'}
    assert row['calibration_images'] == '20'
    # the log has the accuracy of the unfolded model in bfloat16 or float32
    trained = {row['run']: float(row['test_acc_percent']) for row in read(folder / 'results.csv')}
    assert abs(float(row['float32_test_acc_percent']) - trained[row['run']]) < 2
    assert cv2.imread(str(folder / 'int8.png')).std() > 10


@pytest.mark.slow
def test_cost_gives_times_and_figure(monkeypatch, shared):
    monkeypatch.setattr(measures, 'REPETITIONS', 2)
    monkeypatch.setattr(measures, 'STEPS', 1)
    monkeypatch.setattr(measures, 'DEPTH', 10)
    folder = tiny('cost', shared)
    rows = read(folder / 'measured.csv')
    assert len(rows) == 8
    assert all(row['n'] == '2' and float(row['milliseconds']) > 0 for row in rows)
    assert cv2.imread(str(folder / 'cost.png')).std() > 10


# ---------------------------------------------------------------- blocks


def test_blocks_share_the_runs_of_depth():
    logs = results.ROOT / 'logs'
    paths = run.Paths(logs, logs / 'none', 'Folder', '.')
    for budget, depths in (('small', (16, 28, 52)), ('medium', (28,))):
        runs = EXPERIMENTS['blocks'](BUDGETS[budget])
        assert {(spec.series, spec.x, spec.seed) for spec in runs} == set(itertools.product(
            ('base', 'dirac-init', 'dirac', 'acb', 'dbb', 'repvgg', 'default-init'), depths,
            (1, 2, 3)))
        names = {spec.run_name for spec in EXPERIMENTS['depth'](BUDGETS[budget])}
        assert {spec.series for spec in runs if spec.run_name in names} == {
            'base', 'dirac-init', 'dirac'}
        assert len({spec.run_name for spec in runs}) == len(runs) == 21 * len(depths)
    trained = [spec for spec in EXPERIMENTS['blocks'](BUDGETS['small'])
               if not run.needs_training(spec, 'blocks', paths)]
    of_depth = {(row['series'], row['x'], row['seed'])
                for row in read(logs / 'depth' / 'results.csv') if row['x'] in ('16', '28', '52')}
    for name, model in (('base', 'plain'), ('dirac-init', 'dirac-init'), ('dirac', 'diracnet')):
        shared = {(model, f'{spec.x}', f'{spec.seed}') for spec in trained if spec.series == name}
        assert shared == {point for point in of_depth if point[0] == model}
        assert len(shared) == 9


def test_blocks_train_with_their_block():
    opts = [(spec.series, parse_options(definitions.command_line(spec.options)))
            for spec in EXPERIMENTS['blocks'](BUDGETS['medium']) if spec.seed == 1]
    assert [(name, opt.model, opt.block, opt.depth, opt.epochs) for name, opt in opts
            if opt.model == 'plain'] == [
        (name, 'plain', name, 28, 30) for name in ('base', 'acb', 'dbb', 'repvgg')]


def test_blocks_time_the_models_that_are_trained(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(measures, 'compare', lambda *arguments: compared.append(arguments))
    monkeypatch.setattr(measures, 'DEPTH', 10)
    measures.blocks([], run.Paths(tmp_path, tmp_path / 'runs', 'Digits', '.'))
    (_, variants, _, table), = compared
    assert table == tmp_path / 'blocks' / 'steps.csv'
    # convolutions, batch norms and linear layer of 10-1: the stem, then two layers in each group
    pairs = [(3, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    base = sum(9 * cin * cout + 2 * cout for cin, cout in pairs) + 650
    expected = {
        'base': base, 'dirac-init': base, 'default-init': base,
        'dirac': base + sum(2 * cout for _, cout in pairs[1:]),
        'acb': base + sum(6 * cin * cout + 4 * cout for cin, cout in pairs),
        'repvgg': base + sum(cin * cout + 2 * cout + 2 * cin * (cin == cout)
                             for cin, cout in pairs),
    }
    counts = {}
    for variant in variants:
        model = variant.prepare(*variant.arguments).args[1]
        counts[variant.name] = sum(parameter.numel() for parameter in model.parameters())
    assert counts.pop('dbb') > max(expected.values())
    assert counts == expected
    table.parent.mkdir()
    table.touch()
    measures.blocks([], run.Paths(tmp_path, tmp_path / 'runs', 'Digits', '.'))
    assert len(compared) == 1


@pytest.mark.slow
def test_blocks_measure_int8_of_the_checkpoints_of_their_results(
    digit_files, tmp_path, monkeypatch
):
    monkeypatch.setattr(measures, 'DEPTH', 10)
    monkeypatch.setattr(quantization, 'CALIBRATION_IMAGES', 20)
    write_blocks(tmp_path / 'logs', times={'repvgg': 1})
    folder = tmp_path / 'logs' / 'blocks'
    options = '--only', 'repvgg, *', '--dataset', 'Folder', '--dataroot', digit_files
    tiny('blocks', tmp_path, *options)
    row, = read(folder / 'measured.csv')
    result, = read(folder / 'results.csv')
    assert (row['series'], row['x'], row['run']) == ('repvgg', '10', result['run'])
    # the log has the accuracy of the unfolded model in bfloat16 or float32
    assert abs(float(row['float32_test_acc_percent']) - float(result['test_acc_percent'])) < 2
    tiny('blocks', tmp_path, *options)
    assert len(read(folder / 'measured.csv')) == 1
    (folder / 'measured.csv').unlink()
    log = tmp_path / 'runs' / 'Folder' / result['run'] / 'log.txt'
    log.write_text(log.read_text().replace('"test_acc": ', '"test_acc": 1'))  # of another run
    tiny('blocks', tmp_path, *options)
    assert not (folder / 'measured.csv').exists()


def write_blocks(logs, runs=(), times=()):
    """Writes results of blocks, (series, layers, seed, accuracy, epochs), and step times."""
    (logs / 'blocks').mkdir(parents=True)
    if runs:
        (logs / 'blocks' / 'results.csv').write_text(
            'series,x,seed,test_acc_percent,epochs,ended,train_loss,parameters,dataset,run,log,'
            'device,threads,torch\n'
            + ''.join(
                f'{series},{x},{seed},{accuracy},{epochs},{"complete" if accuracy else "diverged"},'
                f'0.5,1234,Folder,{series}-{x}-{epochs}ep-s{seed},log.txt,CPU,2,2.14\n'
                for series, x, seed, accuracy, epochs in runs))
    if times:
        (logs / 'blocks' / 'steps.csv').write_text('what,ratio,ratio_low,ratio_high\n' + ''.join(
            f'{name},{1 / time},{1 / (time + 0.5)},{1 / (time - 0.25)}\n'
            for name, time in times.items()))


def test_table_of_blocks_leaves_out_what_is_missing(tmp_path):
    write_blocks(tmp_path, [
        ('repvgg', 28, 1, 80, 4), ('base', 28, 1, 60, 4), ('base', 28, 2, 64, 4),
        ('base', 52, 1, '', 4), ('dirac', 52, 1, 70, 4), ('dirac', 52, 2, '', 4),
    ], {'base': 1, 'repvgg': 1.5, 'dbb': 3})
    for name, run_name, drop in (('int8', 'base-28-4ep-s1', 1), ('blocks', 'base-28-4ep-s2', 2),
                                 ('again/int8', 'base-28-4ep-s1', 3), ('blocks', 'another', 9)):
        (tmp_path / name).mkdir(exist_ok=True, parents=True)
        with open(tmp_path / name / 'measured.csv', 'a') as file:
            if not file.tell():
                file.write('run,float32_test_acc_percent,int8_test_acc_percent\n')
            file.write(f'{run_name},70,{70 - drop}\n')
    header, lines = result_tables.blocks(tmp_path)
    assert header == [
        'block', 'parameters, 28 layers', 'step time / base (95 % CI)', '28 layers, % (n)',
        '52 layers, % (n)', '28 layers: - base, pp (95 % CI)', 'loss, 28 layers',
        'loss, 52 layers', 'int8 drop, pp (n)']
    assert lines == [
        ['base', '1,234', '1.00 (0.75 to 1.50)', '62.00 ± 2.83 (2)', '1 diverged', '',
         '0.500 ± 0.000', '', '2.00 ± 1.00 (3)'],
        ['dirac', '', '', '', '70.00 (1, 1 diverged)', '', '', '0.500', ''],
        ['repvgg', '1,234', '1.50 (1.25 to 2.00)', '80.00 (1)', '', '+18.0', '0.500', '', ''],
    ]
    assert tables.table('blocks', tmp_path / 'nothing').startswith('| block ')


def test_table_of_references_has_memory_and_published_accuracy(tmp_path):
    record = run_records({('DenseNet-40-12', 4): [71.5]})[0]
    write_csv(tmp_path / 'reference' / 'results.csv', [
        {**record, 'parameters': 1234, 'train_seconds': 5400, 'threads': 2}])
    write_csv(tmp_path / 'reference' / 'measured.csv', [
        {'run': record['run'], 'peak_memory_mb': 2345}])
    header, lines = result_tables.reference(tmp_path)
    assert lines == [
        ['DenseNet-40-12', '1,234', '4', '71.50', '1.50', '2 x CPU', '2,345', '94.76']]
    assert len(header) == len(lines[0])


def test_figure_of_the_speedrun_draws_accuracy_over_compute(tmp_path):
    write_speedrun(tmp_path, [('airbench94_muon', 8, '', 89, 90, 3, 5e12, 'A'),
                              ('airbench94_muon', 8, '', 91, '', '', 5e12, 'A')])
    _, over_compute = figures.draw('speedrun', tmp_path).axes
    points = {container.get_label(): container for container in over_compute.containers}
    assert list(points) == ['airbench94_muon, 8 epochs', 'recipe, 8, 12 epochs']
    line, _, (horizontal, vertical) = points['recipe, 8, 12 epochs']
    assert [*line.get_xydata().flatten()] == pytest.approx([5, 89, 10, 91])
    assert [*horizontal.get_segments()[1][:, 0]] == pytest.approx([10 - 8**0.5, 10 + 8**0.5])
    assert [*vertical.get_segments()[0][:, 1]] == pytest.approx([89 - 2**0.5, 89 + 2**0.5])


def test_figure_of_blocks_draws_accuracy_over_cost(tmp_path):
    write_blocks(tmp_path, [
        ('base', 28, 1, 60, 4), ('base', 28, 2, 64, 4), ('repvgg', 28, 1, 70, 4),
        ('repvgg', 28, 2, 74, 4), ('acb', 28, 1, 75, 4), ('base', 16, 1, 80, 4),
        ('repvgg', 28, 3, '', 4)], {'base': 1, 'repvgg': 1.5, 'dbb': 3})
    write_blocks(tmp_path / 'medium', [('repvgg', 28, 1, 90, 30)])
    figure = figures.draw('blocks', tmp_path)
    shallow, deep = figure.axes
    assert shallow.get_title() == '16 layers, n = 1'
    assert deep.get_title() == '28 layers, n = 1 to 2'  # one run of 30 epochs
    points = {container.get_label(): container for container in deep.containers}
    assert list(points) == ['base', 'repvgg']  # acb has no step time, dbb no run
    line, _, (horizontal, vertical) = points['repvgg']
    assert [*line.get_xydata().flatten()] == pytest.approx([6, 72, 45, 90])
    assert [*horizontal.get_segments()[0][:, 0]] == pytest.approx([5, 8])  # the 95 % interval
    assert [*vertical.get_segments()[0][:, 1]] == pytest.approx([72 - 8 ** 0.5, 72 + 8 ** 0.5])
    assert len({container[0].get_marker() for container in points.values()}) == 2
    (tmp_path / 'blocks' / 'steps.csv').unlink()
    with pytest.raises(ValueError, match='steps.csv'):
        figures.draw('blocks', tmp_path)


# ---------------------------------------------------------------- finished and interrupted runs


@pytest.mark.slow
def test_finished_runs_are_skipped(tmp_path, monkeypatch, capsys):
    table = tiny('init', tmp_path, '--only', 'plain, 1, *') / 'results.csv'
    before = read(table)
    monkeypatch.setattr(train, 'main', lambda words: pytest.fail('trained again'))
    tiny('init', tmp_path, '--only', 'plain, 1, *')
    assert read(table) == before
    # the same run in another experiment: its result with that one's x, and no time left
    monkeypatch.setattr(definitions, 'RATES', {1: 1})
    row, = read(tiny('depth', tmp_path, '--only', 'plain*') / 'results.csv')
    assert row == {**before[0], 'x': '10'}
    assert 'plain, 10, seed 1; 0.0 h left' in capsys.readouterr().out


@pytest.mark.slow
def test_command_prints_its_hours(tmp_path, monkeypatch, capsys):
    tiny('depth', tmp_path, '--only', 'plain*')
    clock = itertools.count(0, 900)  # a quarter of an hour between two calls
    monkeypatch.setattr(run, 'time', SimpleNamespace(monotonic=lambda: next(clock)))
    tiny('depth', tmp_path, '--only', 'plain*')
    assert '0.25 h' in capsys.readouterr().out


@pytest.mark.slow
def test_measures_are_of_the_run_of_the_result(tmp_path, capsys):
    only = '--only', 'diracnet, *'
    row, = read(tiny('delta', tmp_path, *only) / 'results.csv')
    folder = tmp_path / 'runs' / 'Digits' / row['run']
    shutil.rmtree(folder)  # without its checkpoint the run is trained again
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
    assert f'expected 1, {row["test_acc_percent"]} ' in error
    assert not table.exists()


def test_draw_raises_when_nothing_is_measured(tmp_path):
    (tmp_path / 'alpha-beta').mkdir()
    results = tmp_path / 'alpha-beta' / 'results.csv'
    results.write_text('series,x,seed,ended\nwidth 1,1,1,complete\n')
    with pytest.raises(ValueError, match='measured.csv'):
        figures.draw('alpha-beta', tmp_path)


def test_interrupted_run_has_no_result_and_is_resumed(tmp_path, monkeypatch):
    passed = []

    def stop(arguments):
        passed.extend(arguments)
        raise SystemExit(143)

    monkeypatch.setattr(train, 'main', stop)
    with pytest.raises(SystemExit) as stopped:
        tiny('depth', tmp_path, '--only', 'plain*')
    assert stopped.value.code == 143
    assert not (tmp_path / 'logs').exists()
    assert passed[-2:] == ['--resume', 'auto']


def test_diverged_run_has_a_result_without_metrics(tmp_path, monkeypatch):
    def diverge(arguments):
        raise SystemExit(3)

    monkeypatch.setattr(train, 'main', diverge)
    with pytest.raises(SystemExit) as stopped:  # nothing can be drawn
        tiny('depth', tmp_path, '--only', 'plain*')
    assert stopped.value.code == 2
    row, = read(tmp_path / 'logs' / 'depth' / 'results.csv')
    assert (row['ended'], row['test_acc_percent'], row['epochs']) == ('diverged', '', '0')


def test_log_of_a_gpu_does_not_replace_that_of_a_cpu(tmp_path, monkeypatch):
    spec = EXPERIMENTS['depth'](BUDGETS['tiny'])[0]
    paths = run.Paths(tmp_path / 'logs', tmp_path / 'runs', 'Digits', '.')
    paths.run_folder(spec).mkdir(parents=True)
    copies = []
    for device, accuracy in (('CPU', 70.0), ('NVIDIA H100 80GB HBM3', 71.0)):
        monkeypatch.setattr(run, 'training_device', lambda device=device: device)
        line = json.dumps({'epoch': 1, 'test_acc': accuracy})
        (paths.run_folder(spec) / 'log.txt').write_text(f'json_stats: {line}\n')
        copies.append(run.copy_log(spec, paths)[1])
    assert copies == [f'trainings/Digits/{spec.run_name}.txt',
                      f'trainings/Digits/NVIDIA-H100-80GB-HBM3/{spec.run_name}.txt']
    assert [run.read_log(paths.logs / path)[0]['test_acc'] for path in copies] == [70.0, 71.0]


def test_run_of_another_process_is_left_out(tmp_path, capsys):
    spec = EXPERIMENTS['depth'](BUDGETS['tiny'])[0]
    folder = tmp_path / 'runs' / 'Digits'
    folder.mkdir(parents=True)
    lock = folder / f'{spec.run_name}.lock'
    lock.touch()
    with run.Lock(lock) as other:
        other.acquire()
        with pytest.raises(SystemExit):
            tiny('depth', tmp_path, '--only', spec.title)
    assert 'skipped' in capsys.readouterr().out
    assert not (tmp_path / 'logs' / 'depth').exists()


def test_multiply_adds_of_a_run_by_hand():
    spec = RunSpec('plain', 10, 1, {'model': 'plain', 'depth': 10, 'width': 1, 'epochs': 4})
    # 32^2 positions of 3 x 16 and twice 16 x 16; 16^2 of 16 x 32, 32 x 32; 8^2 of 32 x 64, 64 x 64
    convolutions = 9 * (1024 * (48 + 512) + 256 * (512 + 1024) + 64 * (2048 + 4096))
    count = definitions.training_multiply_adds
    assert count(spec, 'Folder') == 3 * 200_000 * (convolutions + 640)
    assert count(spec, 'Digits') == 3 * 4 * 1437 * (convolutions + 640)


def test_multiply_adds_of_progressive_resizing_by_hand():
    options = {'recipe': 'speedrun', 'model': 'diracnet-fast', 'epochs': 4,
               'grow': '[20,24,28,32]'}

    def convolutions(size):  # 2 x 2 without padding, pooling after the first one of each group
        first, second, third, last = size - 1, (size - 1) // 2, (size - 1) // 4, (size - 1) // 8
        nines = (first**2 * 24 * 64 + second**2 * (64 * 64 + 64 * 256)
                 + third**2 * 2 * 256 * 256 + last**2 * 256 * 256)
        return first**2 * 12 * 24 + 9 * nines + 2560

    counted = sum(convolutions(size) for size in (20, 24, 28, 32))
    assert definitions.training_multiply_adds(
        RunSpec('a', 4, 1, options), 'Folder') == 3 * 50_000 * counted


def test_command_line_of_options():
    options = {'depth': 10, 'whiten': False, 'nesterov': True}
    assert definitions.command_line(options) == ['--depth', '10', '--no-whiten', '--nesterov']


def test_jpeg_files_have_pillows_defaults(tmp_path, capsys):
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
    assert f'{folder}: already exists' in capsys.readouterr().err


def test_speedrun_recipe_has_the_epochs_of_the_experiment():
    assert parse_options(['--recipe', 'speedrun']).epochs == BUDGETS['small'].speedrun[0]


def test_tta_logits_weight_six_views():
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
    np.testing.assert_allclose(measures.tta_logits(network, images), expected, rtol=1e-12)


@pytest.mark.slow
def test_speedrun_measures_accuracy_and_compute(shared):
    folder = tiny('speedrun', shared)
    row, _ = read(folder / 'measured.csv')
    result, _ = read(folder / 'results.csv')
    # in other batches, by a model that has hardly learned
    assert abs(float(row['test_acc_percent']) - float(result['test_acc_percent'])) < 3
    epoch, = read_log(shared / 'logs' / result['log'])
    assert float(row['train_seconds']) == pytest.approx(epoch['train_time'], abs=0.051)
    assert float(row['matmul_equivalent_tflop']) == pytest.approx(50 * epoch['train_time'], abs=0.1)


def test_change_init():
    torch.manual_seed(0)
    model = diracnets.create_model('plain', 'CIFAR10', depth=10, width=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for name, p in run.change_init(model, 'scaled-0.1').named_parameters():
        torch.testing.assert_close(p, before[name] * (0.1 if p.dim() == 4 else 1))
    weight = run.change_init(model, 'delta-orthogonal').features.group1.block0.conv.weight
    assert weight.shape == (32, 16, 3, 3)
    middle = weight[:, :, 1, 1]
    torch.testing.assert_close(middle.T @ middle, torch.eye(16), atol=1e-5, rtol=0)
    assert weight.count_nonzero() == middle.count_nonzero()
    with pytest.raises(ValueError, match='sideways'):
        run.change_init(model, 'sideways')


def test_alpha_beta_measures_the_two_terms_of_w_hat(shared):
    tiny('alpha-beta', shared)
    spec, = EXPERIMENTS['alpha-beta'](BUDGETS['tiny'])
    rows = read(shared / 'logs' / 'alpha-beta' / 'measured.csv')
    params = load_params(str(shared / 'runs' / 'Digits' / spec.run_name / 'epoch-1.pt7'))
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
        used = alpha[:weight.shape[1]]  # the other filters have no one in delta
        assert float(row['alpha_mean']) == pytest.approx(used.mean().item(), rel=1e-5)
    for row, width, of_delta in zip(rows, (8, 8, 16, 16, 32, 32), (8, 8, 8, 16, 16, 32)):
        assert float(row['alpha_mean']) == 1  # at initialization alpha is 1 and beta 0.1
        assert float(row['dirac_norm']) == pytest.approx(of_delta ** 0.5)
        assert float(row['free_norm']) == pytest.approx(0.1 * width ** 0.5)


def test_draw_over_layers_draws_mean_and_std_over_seeds():
    axes = Figure().subplots()
    rows = [{'layer': layer, 'alpha_mean': layer + seed} for seed in (0, 4) for layer in (1, 2)]
    draw_over_layers(axes, rows, lambda row: row['alpha_mean'], 'alpha', capsize=2)
    assert [*axes.lines[0].get_ydata()] == [3, 4]
    low, high = axes.lines[1].get_ydata(), axes.lines[2].get_ydata()
    assert [*(high - low)] == pytest.approx(2 * [2 * 8 ** 0.5])  # std of 1 and 5: sqrt(8)


@pytest.mark.slow
def test_histograms_of_activations_sum_to_one(shared):
    tiny('versions', shared)
    records = results.read_results(shared / 'logs' / 'versions' / 'measured.csv')
    histograms = results.grouped(records, 'run', 'layer')
    assert len(histograms) == 6
    for bins in histograms.values():
        assert len(bins) == measures.BINS
        assert 0.98 < sum(row['share'] for row in bins) < 1 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'number', 'shape'), [
    ('diracnet', 0, (4, 3, 3, 3)), ('plain', 0, (4, 3, 3, 3)), ('diracnet', 2, (4, 4, 3, 3)),
])
def test_relative_gradients_against_finite_differences(model, number, shape, monkeypatch):
    make = measures.cifar_model
    monkeypatch.setattr(measures, 'cifar_model', lambda name, depth, width: make(
        name, depth, width / 4))  # fewer filters to change
    torch.manual_seed(5)
    images, labels = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 7])
    torch.manual_seed(1)  # of the measured model
    network = measures.cifar_model(model, 10, 1).double().train()
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
    ratios = measures.relative_gradients(model, 10, images, labels)
    assert ratios[number] == pytest.approx(expected.item(), rel=1e-4)
    assert len(ratios) == 7  # the stem, and two in each block of a group


@pytest.mark.slow
def test_gradients_are_measured_once(shared):
    table = tiny('thousand', shared) / 'measured.csv'
    rows = read(table)
    assert [(row['series'], row['x'], int(row['layer'])) for row in rows] == [
        (model, '10', layer) for model in ('diracnet', 'plain') for layer in range(1, 8)]
    assert all(0 < float(row['relative_gradient']) < 1e3 for row in rows)
    tiny('thousand', shared)
    assert read(table) == rows


def test_draw_points_draws_mean_and_std_over_seeds():
    records = [{'series': 'a', 'x': 1, 'value': value} for value in (1.0, 2.0, 6.0)]
    assert results.mean_std([record['value'] for record in records]) == (3.0, 7 ** 0.5)
    assert results.run_counts(records) == '3'
    axes = Figure().subplots()
    draw_points(axes, records + [{'series': 'b', 'value': -0.001}], 'value', 'points')
    assert [label.get_text() for label in axes.get_yticklabels()] == ['a', 'b']
    assert [text.get_text() for text in axes.texts] == ['3.00', '0.00']  # never -0.00
    circles, mean, *_ = axes.lines
    assert (list(circles.get_xdata()), list(mean.get_xdata())) == ([1, 2, 6], [3])


@pytest.mark.slow
def test_list_prints_estimated_hours(capsys, monkeypatch):
    # counting the multiply-adds of hundreds of layers takes half a minute
    monkeypatch.setitem(BUDGETS, 'small', replace(BUDGETS['small'], deeper=(), thousand=(100,)))
    run.main(['--list'])
    out = capsys.readouterr().out
    assert all(f'| {name} ' in out for name in (*EXPERIMENTS, *SCRIPTS))
    cost = next(line.split('|') for line in out.splitlines() if line.startswith('| cost '))
    assert float(cost[3]) > 0  # no runs, but timings
    # six runs of 28-1 models with 200,000 images each and 54.8e6 multiply-adds per image
    delta = next(line.split('|') for line in out.splitlines() if line.startswith('| delta '))
    assert float(delta[3]) == pytest.approx(
        6 * 200_000 * 3 * 54.8e6 / definitions.RATES[1] / 3600, abs=0.06)


@pytest.mark.parametrize(('width', 'rate'), [(0.25, 2), (0.5, 2), (1, 5), (1.5, 5), (10, 7)])
def test_estimated_seconds_use_the_rate_of_the_width(width, rate, monkeypatch):
    monkeypatch.setattr(definitions, 'RATES', {0.5: 2, 1: 5, 4: 7})
    spec, = BUDGETS['tiny'].runs('diracnet', 0, model='diracnet', depth=10, width=width)
    seconds = definitions.training_multiply_adds(spec, 'Digits') / rate
    assert definitions.estimated_seconds(spec, 'Digits') == seconds


def test_estimated_seconds_of_blocks_agree_with_measured_steps():
    times = results.step_times(results.ROOT / 'logs')
    runs = {spec.series: definitions.estimated_seconds(spec, 'Folder')
            for spec in EXPERIMENTS['blocks'](BUDGETS['medium']) if spec.seed == 1}
    for block in ('acb', 'dbb', 'repvgg'):
        _, low, high = times[block]
        assert 0.9 * low < runs[block] / runs['base'] < 1.1 * high, block


def test_estimated_seconds_use_the_rate_of_wide_models_for_diracnet_fast(monkeypatch):
    monkeypatch.setattr(definitions, 'RATES', {0.5: 2, 4: 7})
    for options in ({}, {'width': 0.75}):
        spec = RunSpec('a', 4, 1, {'recipe': 'speedrun', 'model': 'diracnet-fast', **options})
        seconds = definitions.training_multiply_adds(spec, 'Folder') / 7
        assert definitions.estimated_seconds(spec, 'Folder') == seconds


def test_options_of_scripts_are_valid():
    commands = [arguments for define in SCRIPTS.values() for arguments, _ in define('images')]
    assert len(commands) == 9 + 3 + 5
    for arguments in commands:
        if 'train.py' in arguments:
            parse_options(arguments[arguments.index('train.py') + 1 :])
        elif arguments[:2] == ['-m', 'experiments.run']:
            run.parse_options(arguments[2:])


def test_scripts_refuse_the_options_of_experiments(capsys):
    with pytest.raises(SystemExit):
        run.main(['dtype', '--runs', 'elsewhere'])
    assert '--runs: not for the script dtype' in capsys.readouterr().err


def test_run_script_stops_at_a_command_that_fails(monkeypatch):
    calls = []

    def record(command, env, **options):
        calls.append((command[1:], env.get('NAME')))
        return SimpleNamespace(returncode=len(calls) - 1)

    monkeypatch.setattr(run.subprocess, 'run', record)
    with pytest.raises(RuntimeError, match='python second: .* 1'):
        run.run_script([(['first'], {'NAME': 'value'}), (['second'], {}), (['third'], {})])
    assert calls == [(['first'], 'value'), (['second'], None)]
