"""Seeds of batches, and of the images in a batch: none may be used twice."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from training.datasets import DatasetImages
from training.loader import BatchSampler, make_loader


def test_every_batch_has_a_seed_of_its_own():
    sampler, seeds = BatchSampler(20, 4, seed=1), []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        seeds += [seed for _, seed, _ in sampler]
    assert len(set(seeds)) == 10


SAMPLERS = {
    'torch': lambda: torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy(),
    'numpy': lambda: np.random.randint(256, size=(8, 8, 3), dtype=np.uint8),
    'random': lambda: np.frombuffer(random.randbytes(192), np.uint8).reshape(8, 8, 3),
}


class Noise(Dataset):
    def __init__(self, generator='torch'):
        self.sample = SAMPLERS[generator]

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.sample(), 0


def test_images_of_a_batch_get_different_transforms():
    images, *_ = DatasetImages(Noise(), 2)[torch.arange(4), 7, torch.arange(4)]
    assert len(torch.unique(images, dim=0)) == 4


@pytest.mark.parametrize('generator', SAMPLERS)
def test_random_transforms_in_training_follow_the_seed(generator):
    dataset = DatasetImages(Noise(generator), 2)

    def epoch(seed, nthread):
        loader = make_loader(dataset, 3, nthread, seed)
        return torch.cat([batch for batch, *_ in loader])

    images = epoch(1, nthread=0)
    assert len(torch.unique(images, dim=0)) == 4
    assert torch.equal(epoch(1, nthread=2), images)
    assert not torch.equal(epoch(2, nthread=2), images)


@pytest.mark.parametrize('generator', SAMPLERS)
def test_random_transforms_in_evaluation_are_those_of_the_item(generator):
    dataset, state = DatasetImages(Noise(generator), 2), torch.get_rng_state()
    others = str(np.random.get_state()), random.getstate()
    (images, *_), = make_loader(dataset, 4, nthread=0)
    assert torch.equal(torch.get_rng_state(), state)  # of the dropout in training
    assert (str(np.random.get_state()), random.getstate()) == others
    assert len(torch.unique(images, dim=0)) == 4
    for batch_size, nthread, world_size in ((1, 0, 1), (3, 2, 1), (4, 0, 2)):
        torch.manual_seed(batch_size)
        batches = [batch for rank in range(world_size) for batch, *_ in make_loader(
            dataset, batch_size, nthread, rank=rank, world_size=world_size)]
        assert torch.equal(torch.cat(batches), images)
