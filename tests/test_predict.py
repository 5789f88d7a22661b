"""predict.py: folders, batches, JSON and CSV; published models by name; ~ in arguments."""

import csv
import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import diracnet
import diracnets
import export
import plot
import predict
from diracnets import class_names
from test_export import error_of, images, torch_home  # noqa: F401 (fixtures)
from training import timing

ROOT = Path(predict.__file__).parent


@pytest.fixture
def photos(images, tmp_path):  # noqa: F811
    """A folder with nested folders of images, a text file, a hidden file and a broken image."""
    source = sorted((images / 'test').rglob('*.png'))
    for i, name in enumerate(('b.png', 'a/z.PNG', 'a/b/c.png', 'c/a.png')):
        path = tmp_path / 'photos' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source[i], path)
    (tmp_path / 'photos' / 'notes.txt').write_text('no image')
    shutil.copy(source[0], tmp_path / 'photos' / '.hidden.png')
    (tmp_path / 'photos' / 'a' / 'broken.png').write_bytes(source[0].read_bytes()[:100])
    return tmp_path / 'photos'


ORDER = ['a/b/c.png', 'a/z.PNG', 'b.png', 'c/a.png']  # of the readable images


def run_predict(arguments, capsys):
    """Runs predict.py on arguments with a broken image; returns stdout and stderr."""
    with pytest.raises(SystemExit) as exit:
        predict.main(list(map(str, arguments)))
    assert exit.value.code == 2
    return capsys.readouterr()


def test_predict_reads_the_images_of_a_folder_in_order(photos, run_folder, capsys):
    printed = run_predict([photos, '--model', run_folder], capsys)
    shown = [line for line in printed.out.splitlines() if line[0] != ' ']
    assert shown == [str(photos / name) for name in ORDER]
    assert printed.err.startswith(f'predict.py: {photos}/a/broken.png: ')
    assert printed.err.count('\n') == 1
    names = [str(photos / name) for name in ORDER]
    predict.main([*names, '--model', str(run_folder)])
    assert capsys.readouterr().out == printed.out


def test_predict_follows_links_and_skips_hidden_folders(photos, run_folder, tmp_path, capsys):
    (photos / 'a').rename(photos / '.a')
    (photos / 'c').rename(tmp_path / 'elsewhere')
    (photos / 'c').symlink_to(tmp_path / 'elsewhere')
    (photos / 'c' / 'back').symlink_to(photos)
    predict.main([str(photos), '--model', str(run_folder)])
    shown = [line for line in capsys.readouterr().out.splitlines() if line[0] != ' ']
    assert shown == [str(photos / name) for name in ('b.png', 'c/a.png')]


def test_predict_refuses_a_folder_without_images(run_folder, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    line = error_of(predict.main, [str(tmp_path / 'empty'), '--model', str(run_folder)], capsys)
    assert line.startswith(f'predict.py: {tmp_path}/empty: ')


def test_predict_refuses_a_folder_as_output(capsys, tmp_path):
    error = error_of(predict.main, ['a.jpg', '--model', 'a', '--json', str(tmp_path)], capsys)
    assert f'--json {tmp_path}: not a regular file; use another path' in error


def test_predict_gives_equal_probabilities_for_any_batch_size(
    photos, run_folder, trained, digits, tmp_path, capsys, monkeypatch
):
    load = predict.load_classifier

    def load_in_float64(name):  # float32 rounds differently for each batch size and on each CPU
        model, preprocess, classes = load(name)
        return model.double(), lambda path: preprocess(path).double(), classes

    monkeypatch.setattr(predict, 'load_classifier', load_in_float64)
    results = []
    for batch in (1, 2, 3, 32):
        monkeypatch.setattr(predict, 'BATCH', batch)
        run_predict([photos, '--model', run_folder, '--json', tmp_path / 'p.json'], capsys)
        results.append(json.loads((tmp_path / 'p.json').read_text()))
    for result in results:
        assert [entry['path'] for entry in result] == [str(photos / name) for name in ORDER]
    model, preprocess, classes = predict.load_classifier(str(run_folder))
    for entries in zip(*results):
        with torch.no_grad():
            logits = model(preprocess(entries[0]['path'])[None])[0].numpy()
        expected = np.exp(logits - logits.max())
        expected /= expected.sum()
        order = np.argsort(-expected)[:5]
        for entry in entries:
            top = entry['predictions']
            assert [p['class'] for p in top] == [classes[i] for i in order]
            np.testing.assert_allclose([p['probability'] for p in top], expected[order], atol=1e-12)


def test_predict_writes_the_same_values_as_json_and_csv(
    photos, run_folder, tmp_path, capsys, monkeypatch
):
    odd = 'a,"b"\nü.png'
    os.rename(photos / 'b.png', photos / odd)
    monkeypatch.chdir(tmp_path)
    run_predict([photos, '--model', run_folder, '--json', 'p.json', '--csv', 'p.csv'], capsys)
    entries = json.loads(Path('p.json').read_text())
    with open('p.csv', encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    assert str(photos / odd) in [row['path'] for row in rows]
    assert len(entries) == len(rows) == 4
    for entry, row in zip(entries, rows):
        assert row['path'] == entry['path']
        for i, p in enumerate(entry['predictions'], 1):
            assert row[f'class_{i}'] == p['class']
            assert float(row[f'probability_{i}']) == p['probability']
    assert sorted(os.listdir('.')) == ['p.csv', 'p.json', 'photos']
    assert len(rows[0]) == 1 + 2 * len(entries[0]['predictions'])


def test_predict_writes_its_files_when_stdout_is_closed(photos, run_folder, tmp_path):
    command = [sys.executable, ROOT / 'predict.py', photos / 'b.png', '--model', run_folder,
               '--json', tmp_path / 'p.json']
    with open('/dev/full', 'w') as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count('\n') == 1  # the warning
    assert len(json.loads((tmp_path / 'p.json').read_text())) == 1


def test_predict_writes_the_finished_images_when_it_is_interrupted(
    photos, run_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(predict, 'BATCH', 1)
    read = predict.read_input

    def interrupted(preprocess, path):
        if calls:
            raise KeyboardInterrupt
        calls.append(path)
        return read(preprocess, path)

    calls = []
    monkeypatch.setattr(predict, 'read_input', interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        predict.main([str(photos), '--model', str(run_folder), '--json', str(tmp_path / 'p.json')])
    assert [entry['path'] for entry in json.loads((tmp_path / 'p.json').read_text())] == calls


def test_predict_writes_no_file_when_the_model_fails(photos, run_folder, tmp_path, capsys):
    path = tmp_path / 'p.json'
    path.write_text('before')
    error_of(predict.main, [str(photos), '--model', str(tmp_path / 'none'), '--json', str(path)],
             capsys)
    assert path.read_text() == 'before'
    options = [str(photos), '--model', str(run_folder), '--csv', str(tmp_path / 'no' / 'p.csv')]
    assert '--csv' in error_of(predict.main, options, capsys)


def test_predict_escapes_names_that_are_not_printable(photos, trained, tmp_path, capsys):
    forged = 'x\n   99.99 %  digit 3\x1b[2J\r.png'
    os.rename(photos / 'b.png', photos / forged)
    names = [f'digit\n{i}\x1b' for i in range(10)]
    torch.save({'params': trained[1], 'classes': names, 'args': {'dataset': 'Digits'}},
               tmp_path / 'model.pth')
    os.rename(photos / 'a' / 'broken.png', photos / 'a' / 'broken\n.png')
    printed = run_predict([photos, '--model', tmp_path / 'model.pth'], capsys)
    assert len(printed.out.splitlines()) == 4 * 6
    assert printed.err.count('\n') == 1
    assert not any(c in printed.out + printed.err for c in '\x1b\r')
    assert r'x\n   99.99' in printed.out


# ---------------------------------------------------------------- published models, ~


def test_load_and_the_commands_accept_the_name_of_a_published_model(
    torch_home, images, tmp_path, monkeypatch, capsys  # noqa: F811
):
    monkeypatch.setattr(export, 'BATCH', 2)
    monkeypatch.setattr(timing, 'REPETITIONS', 1)
    monkeypatch.setenv('TORCH_HOME', str(torch_home))
    (file,) = (torch_home / 'hub' / 'checkpoints').glob('diracnet18v2folded-*.pth')
    monkeypatch.setitem(diracnet.MODEL_URLS, 18, f'http://127.0.0.1:1/{file.name}')
    path = str(tmp_path / 'x.safetensors')
    export.main(['diracnet18', '--to', path])
    loaded = diracnets.load(path)
    state = torch.load(file, weights_only=True)
    assert all(torch.equal(t, state[name]) for name, t in loaded.model.state_dict().items())
    assert loaded.preprocess == diracnets.preprocess('ImageNet')
    assert (loaded.title, loaded.num_classes) == ('DiracNet-18-1', 1000)
    assert loaded.origin['exported_from'] == 'diracnet18'
    capsys.readouterr()
    printed = []
    for name in ('diracnet18', path):
        predict.main([str(next(images.rglob('*.png'))), '--model', name])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    named = diracnets.load('diracnet18', {'depth': 18})
    assert (named.title, named.preprocess) == (loaded.title, loaded.preprocess)
    assert all(torch.equal(t, state[name]) for name, t in named.model.state_dict().items())
    with pytest.raises(ValueError, match='diracnet18: depth is 18, not 34'):
        diracnets.load('diracnet18', {'depth': 34})
    with pytest.raises(FileNotFoundError):
        diracnets.load('./diracnet18')
    assert class_names.imagenet_classes()[0] == 'tench'


def test_commands_expand_the_home_folder(run_folder, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(photos)
    shutil.copytree(run_folder, tmp_path / 'run')
    export.main(['~/run', '--to=~/x.pth'])
    predict.main(['~/photos/b.png', '--model', '~/x.pth', '--csv', '~/p.csv'])
    (tmp_path / 'log.txt').write_text(
        'json_stats: {"epoch": 1, "train_loss": 1.0, "test_acc": 50.0}\n')
    plot.main(['~/log.txt', '--save', '~/plot.png'])
    assert {'x.pth', 'p.csv', 'plot.png'} <= set(os.listdir(tmp_path))
    assert '~' not in os.listdir(photos)


@pytest.mark.parametrize(('word', 'expected'), [
    ('~', 'HOME'), ('~/a', 'HOME/a'), ('--to=~/a', '--to=HOME/a'), ('-k=~', '-k=HOME'),
    ('a~/b', 'a~/b'), ('~a', '~a'), ('--to=a=~/b', '--to=a=~/b'), ('a=~/b', 'a=~/b'),
])
def test_expand_home_replaces_a_leading_tilde(monkeypatch, word, expected):
    monkeypatch.setenv('HOME', '/home/\\1')
    assert cli.expand_home(word) == expected.replace('HOME', '/home/\\1')
    user = pwd.getpwuid(os.getuid())
    assert cli.expand_home(f'--to=~{user.pw_name}/a') == f'--to={user.pw_dir}/a'


@pytest.mark.parametrize('option', ['--json', '--csv'])
def test_predict_refuses_an_output_that_would_replace_something_else(option, tmp_path, capsys):
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'cat.png').write_bytes(b'image')
    (tmp_path / 'link').symlink_to('cat.png')
    replaced = 'exists, and is not a .json'
    for path, problem in (('fifo', 'not a regular file'), ('cat.png', replaced),
                          ('link', replaced), ('missing/file', 'its folder does not exist')):
        arguments = [tmp_path / 'cat.png', '--model', 'run', option, tmp_path / path]
        assert f'{option} {tmp_path / path}: {problem}' in run_predict(arguments, capsys).err
    same = ['cat.png', '--model', 'run', '--json', tmp_path / 'out', '--csv', tmp_path / 'out']
    assert f'--csv {tmp_path / "out"}: an input, or another' in run_predict(same, capsys).err


def test_predict_writes_through_a_link(photos, run_folder, tmp_path, capsys):
    (tmp_path / 'target.csv').write_text('old')
    (tmp_path / 'link.csv').symlink_to('target.csv')
    predict.main([str(photos / 'b.png'), '--model', str(run_folder),
                  '--csv', str(tmp_path / 'link.csv')])
    assert (tmp_path / 'link.csv').is_symlink()
    assert (tmp_path / 'target.csv').read_text().startswith('path,class_1')
