"""plot.py: reading complete and truncated logs, and the figure."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

import plot

ROOT = Path(plot.__file__).parent


def record(epoch, **stats):
    stats = {'train_loss': 2 / epoch, 'test_loss': 3 / epoch, 'train_acc': 40 + epoch,
             'test_acc': 50 + epoch, 'epoch_lr': 0.1, **stats}
    return f'json_stats: {json.dumps({"epoch": epoch, **stats})}\n'


def write(folder, *records):
    folder.mkdir()
    (folder / 'log.txt').write_text(''.join(records))
    return folder / 'log.txt'


def run(*arguments, cwd):
    return subprocess.run([sys.executable, ROOT / 'plot.py', *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True)


def test_read_log_sorts_epochs_and_keeps_the_last_record_of_each(tmp_path):
    log = write(tmp_path / 'a', record(1), record(3), record(2), record(3, test_acc=60.5))
    epochs = plot.read_log(log)
    assert [stats['epoch'] for stats in epochs] == [1, 2, 3]
    assert epochs[-1]['test_acc'] == 60.5


@pytest.mark.parametrize('cut', range(len('json_stats: '), len(record(2)) - 2, 13))
def test_read_log_skips_truncated_records(tmp_path, cut):
    log = write(tmp_path / 'a', record(1), record(2)[:cut])
    assert [stats['epoch'] for stats in plot.read_log(log)] == [1]
    with open(log, 'a') as file:
        file.write(record(2) + record(3))
    assert [stats['epoch'] for stats in plot.read_log(log)] == [1, 2, 3]


def test_plot_logs_plots_losses_accuracies_and_rates(tmp_path):
    first = write(tmp_path / 'plain', record(1), record(2), record(3))
    second = write(tmp_path / 'resnet', record(1), record(2, epoch_lr=0.02))
    logs = dict(zip(plot.short_names([first, second]), map(plot.read_log, [first, second])))
    loss, accuracy, rate = plot.plot_logs(logs).axes
    plotted = [list(map(list, zip(*line.get_data()))) for line in loss.lines]
    train, test = [[1, 2], [2, 1], [3, 2 / 3]], [[1, 3], [2, 1.5], [3, 1]]
    assert plotted == [train, test, train[:2], test[:2]]
    assert [line.get_ydata()[-1] for line in accuracy.lines] == [43, 53, 42, 52]
    assert [list(line.get_ydata()) for line in rate.lines] == [[0.1] * 3, [0.1, 0.02]]
    assert 'accuracy (%)' in accuracy.get_ylabel()
    legend = [text.get_text() for text in plot.plot_logs(logs).legends[0].texts]
    assert 'plain (53.00 % at epoch 3)' in legend
    assert 'resnet (52.00 % at epoch 2)' in legend


def test_legend_shows_the_accuracy_of_the_last_epoch(tmp_path):
    log = write(tmp_path / 'run', record(1, test_acc=60.0), record(2, test_acc=55.0))
    figure = plot.plot_logs({'run': plot.read_log(log)})
    assert 'run (55.00 % at epoch 2)' in [text.get_text() for text in figure.legends[0].texts]
    figure = plot.plot_logs({'run': [*plot.read_log(log), {'epoch': 3}]})
    assert 'run (55.00 % at epoch 2)' in [text.get_text() for text in figure.legends[0].texts]


def test_plot_logs_leaves_a_gap_when_a_record_lacks_a_metric(tmp_path):
    log = write(tmp_path / 'old', 'json_stats: {"epoch": 1, "test_acc": 9.0}\n', record(2))
    loss, accuracy, _ = plot.plot_logs({'old': plot.read_log(log)}).axes
    assert list(loss.lines[0].get_ydata())[1] == 1.0
    assert list(accuracy.lines[1].get_ydata()) == [9.0, 52]


def test_short_names_are_paths_when_folder_names_repeat(tmp_path):
    paths = [tmp_path / 'a' / 'run' / 'log.txt', tmp_path / 'b' / 'run' / 'log.txt']
    assert plot.short_names(paths) == [str(path) for path in paths]
    paths = [tmp_path / 'run' / 'log.txt', tmp_path / 'other.txt']
    assert plot.short_names(paths) == ['run', 'other']


@pytest.mark.slow
def test_command_plots_files_and_folders(tmp_path):
    write(tmp_path / 'plain', record(1), record(2))
    write(tmp_path / 'resnet', record(1))
    done = run('plain', 'resnet/log.txt', '--save', 'both.png', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    image = cv2.imread(str(tmp_path / 'both.png'))
    assert image.shape[0] >= 500
    assert image.shape[1] >= 1500
    assert len({tuple(pixel) for pixel in image.reshape(-1, 3)[::7].tolist()}) > 10


def test_plot_logs_plots_validation_with_its_own_line_style(tmp_path):
    log = write(tmp_path / 'a', record(1, val_loss=2.5, val_acc=45), record(2))
    loss, accuracy, _ = (figure := plot.plot_logs({'a': plot.read_log(log)})).axes
    assert len(loss.lines) == len(accuracy.lines) == 3
    assert accuracy.lines[1].get_ydata()[0] == 45
    assert len({line.get_linestyle() for line in accuracy.lines}) == 3
    assert [text.get_text() for text in figure.legends[0].texts][:3] == ['train', 'val', 'test']
    assert '(nats)' in loss.get_ylabel()


@pytest.mark.parametrize(('name', 'signature'), [
    ('a.pdf', b'%PDF'), ('a.PNG', b'\x89PNG'), ('a.svg', b'<?xml'), ('a.jpg', b'\xff\xd8'),
])
def test_command_writes_the_format_of_the_extension(tmp_path, name, signature):
    plot.main([str(write(tmp_path / 'a', record(1))), '--save', str(tmp_path / name)])
    assert (tmp_path / name).read_bytes().startswith(signature)


@pytest.mark.parametrize('name', ['a.doc', 'a', 'a.'])
def test_command_fails_when_the_extension_is_unknown(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(write(tmp_path / 'a', record(1))), '--save', str(tmp_path / name)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f'plot.py: --save {tmp_path / name}: ')
    assert error.count('\n') == 1
    assert '.pdf, ' in error


@pytest.mark.parametrize(('text', 'status'), [('', 2), ('json_stats: {"epo', 2), (None, 2)])
def test_command_fails_when_a_log_has_no_epochs(tmp_path, monkeypatch, capsys, text, status):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / 'log.txt').write_text(text)
    with pytest.raises(SystemExit) as exit:
        plot.main(['log.txt'])
    assert exit.value.code == status
    error = capsys.readouterr().err
    assert error.startswith('plot.py: ')
    assert 'log.txt' in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'training.png').exists()


def test_import_of_plot_imports_no_models():
    script = ('import sys, plot\n'
              'print({"torch", "torchvision", "diracnet", "diracnets"} & sys.modules.keys())')
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stderr


def test_plot_filters_accepts_one_weight_in_bfloat16():
    figure = plot.plot_filters(torch.full((1, 1, 1, 1), 2, dtype=torch.bfloat16), 'one')
    image, = figure.axes[0].images
    assert image.get_clim() == (-2, 2)


def test_command_leaves_out_non_numeric_values(tmp_path, capsys):
    run = tmp_path / 'a $x_$ run'
    run.mkdir()
    records = ({'epoch': 1, 'test_acc': None, 'train_loss': 'low'}, {'epoch': 2, 'test_acc': 50.0})
    (run / 'log.txt').write_text(''.join(f'json_stats: {json.dumps(r)}\n' for r in records))
    assert plot.read_logs([run / 'log.txt']) == {
        run.name: [{'epoch': 1}, {'epoch': 2, 'test_acc': 50.0}]}
    plot.main([str(run), '--save', str(tmp_path / 'plot.png')])
    (run / 'log.txt').write_text('json_stats: {"epoch": 1}\n')
    with pytest.raises(SystemExit):
        plot.main([str(run), '--save', str(tmp_path / 'plot.png')])
    assert 'no epochs' in capsys.readouterr().err
