"""The released checkpoints in logs/: their contents, and how experiments.release writes them."""

from pathlib import Path

import pytest
import torch

import diracnets
import hubconf
from diracnet import check_hash
from diracnets.checkpoint import load_params, read_checkpoint
from experiments import release
from experiments.results import read_csv
from runs import params_of, run, stats_of, write_sets
from training.log import read_log

LOGS = Path(__file__).parent.parent / 'logs'


@pytest.mark.parametrize('name', hubconf.TRAINED)
def test_released_checkpoint_matches_its_card(name):
    _, depth, width = name.split('-')
    network = torch.hub.load(str(LOGS.parent), 'diracnet_cifar', source='local',
                             depth=int(depth), width=int(width), pretrained=True)
    params = load_params(LOGS / name)
    assert all(torch.equal(t, params[key]) and t.dtype == torch.float32
               for key, t in network.state_dict().items())
    trained = diracnets.load(LOGS / name)
    assert (len(trained.classes), trained.classes) == (10, sorted(trained.classes))
    last = read_log(LOGS / name / 'log.txt')[-1]
    assert last['epoch'] == last['epochs']
    seeds = [read_log(log)[-1] for log in (LOGS / name).glob('*log.txt')]
    assert len({stats['seed'] for stats in seeds}) == len(seeds)
    assert len({stats['epochs'] for stats in seeds}) == 1
    assert last['n_parameters'] == sum(p.numel() for p in network.parameters())
    images = read_csv(LOGS / name / 'seen' / 'predictions.csv')
    accuracy = 100 * sum(image['class'] == image['labelled'] for image in images) / len(images)
    assert accuracy == pytest.approx(last['test_acc'], abs=0.2)  # which is in bfloat16
    hours = sum(stats['train_time'] for stats in read_log(LOGS / name / 'log.txt')) / 3600
    expected = (f'| {last["n_parameters"]:,} | 50,000 | {last["epoch"]} | {len(seeds)} | '
                f'{hours:.1f} | {accuracy:.2f} |')
    assert expected in (LOGS / name / 'README.md').read_text()


def test_hub_refuses_other_sizes_and_another_hash(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='diracnet-22-1 with 10 classes'):
        hubconf.diracnet_cifar(22, 1, pretrained=True)
    name = next(iter(hubconf.TRAINED))
    _, depth, width = name.split('-')
    with pytest.raises(ValueError, match='with 100 classes'):
        hubconf.diracnet_cifar(int(depth), int(width), 100, pretrained=True)
    monkeypatch.setitem(hubconf.TRAINED, name, '0' * 64)
    with pytest.raises(ValueError, match=r'model\.pt7: .*0000'):
        hubconf.diracnet_cifar(int(depth), int(width), pretrained=True)


@pytest.mark.parametrize('ema', ['0', '0.9'])
def test_release_keeps_parameters_and_log_without_local_paths(tmp_path, capsys, ema):
    images = write_sets(tmp_path / 'images', 4, 4)
    run(images, tmp_path / 'run', '--ema', ema)
    capsys.readouterr()
    release.main([str(tmp_path / 'run'), '--to', str(tmp_path / 'kept')])
    path, digest = capsys.readouterr().out.strip().rsplit(': SHA-256 ', 1)
    check_hash(path, digest)
    contents = torch.load(path, weights_only=True)
    assert 'optimizer' not in contents
    assert str(tmp_path) not in (tmp_path / 'kept' / 'log.txt').read_text() + str(contents['args'])
    before = read_checkpoint(tmp_path / 'run').params  # the average, with --ema
    after = params_of(tmp_path / 'kept')
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for epoch, kept in zip(stats_of(tmp_path / 'run'), stats_of(tmp_path / 'kept')):
        assert {n: v for n, v in epoch.items() if kept[n] != v}.keys() == {'dataroot', 'save'}
    assert diracnets.load(tmp_path / 'kept').classes == ['cat', 'dog']


def test_release_refuses_an_unfinished_run(tmp_path, capsys):
    run(write_sets(tmp_path / 'images', 4, 4), tmp_path / 'run')
    folder = tmp_path / 'run'
    complete = torch.load(folder / 'model.pt7', weights_only=True)
    for change, to, message in (
        ({}, folder, f'--to {folder}: is the run itself'),
        ({'step': 1}, tmp_path / 'kept', f'{folder}: 2 epochs in its checkpoint, 2 in its log'),
        ({'epoch': 1}, tmp_path / 'kept', f'{folder}: 1 epochs in its checkpoint, 2 in its log'),
    ):
        torch.save({**complete, **change}, folder / 'model.pt7')
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            release.main([str(folder), '--to', str(to)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count('\n') == 1
    assert not (tmp_path / 'kept').exists()
