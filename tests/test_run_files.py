"""Writes that a run must refuse: non-finite momenta, and events of lost epochs."""

import pytest
import torch

from training import checkpoint
from training.checkpoint import DivergedError
from training.tensorboard import TensorBoardWriter


@pytest.mark.parametrize('part', ['params', 'optimizer'])
def test_save_refuses_nonfinite_tensors(tmp_path, part):
    tensors = {'params': torch.ones(2), 'optimizer': torch.ones(2)}
    tensors[part][1] = float('inf')
    state = {'params': {'conv': tensors['params']}, 'step': 3, 'epoch': 0, 'args': {},
             'optimizer': {'state': {0: {'momentum_buffer': tensors['optimizer']}}}}
    with pytest.raises(DivergedError, match='not finite after step 3'):
        checkpoint.save(str(tmp_path), state)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_purges_the_events_from_the_first_epoch_on(tmp_path, monkeypatch):
    import torch.utils.tensorboard

    options = {}

    def refuse(folder, **arguments):
        options.update(arguments)
        raise OSError('no events here')

    monkeypatch.setattr(torch.utils.tensorboard, 'SummaryWriter', refuse)
    stats = {'epoch': 3, 'epochs': 5, 'epoch_lr': 0.1, 'test_acc': 50.0}
    TensorBoardWriter(str(tmp_path), {'lr': 0.1}).write(stats, torch.nn.Linear(1, 1))
    assert options == {'purge_step': 3}
