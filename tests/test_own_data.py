"""Images of one's own: how they are mirrored."""


import numpy as np
import pytest
import torch
from runs import refused, run, write_images

from training import augment, data, options

RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """The folder of 32 training and 10 test images, and the same as two pairs of arrays."""
    root = tmp_path_factory.mktemp('images')
    found = []
    for folder, n, seed in (('train', 16, 0), ('test', 5, 1)):
        written = write_images(root / folder, n=n, seed=seed)
        images = np.stack([written[path] for path in sorted(written)])
        found.append((images, np.repeat([0, 1], n)))
    return root, *found


@pytest.fixture(scope='module')
def by_folder(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('folder') / 'run'
    run(pairs[0], folder, '--flip', 'all')
    return folder


# ---------------------------------------------------------------- flips


def eight_ways(image):
    """Lists the four turns of an image (S, S, C) and of its mirror image, as bytes."""
    return [np.rot90(i, k).tobytes() for i in (image, image[:, ::-1]) for k in range(4)]


@pytest.mark.parametrize(('flip', 'ways'), [('none', [0]), ('horizontal', [0, 4]),
                                            ('all', range(8))])
def test_flips_of_small_images(flip, ways):
    images = RNG.integers(0, 256, (50, 9, 9, 3), dtype=np.uint8)
    dataset = data.MemoryImages(images, np.arange(50), pad=0, flip=flip)
    counts = np.zeros(8, int)
    for seed in range(40):
        batch, _, _ = dataset[torch.arange(50), seed, torch.arange(50)]
        for image, taken in zip(images, batch.permute(0, 2, 3, 1).contiguous().numpy()):
            counts[eight_ways(image).index(taken.tobytes())] += 1
    expected = 2000 / len(ways)
    assert set(np.flatnonzero(counts)) == set(ways)
    assert counts[list(ways)] == pytest.approx(expected, abs=4 * expected**0.5)


@pytest.mark.parametrize('reflect', [True, False])
def test_turned_crops_are_those_of_the_padded_image(reflect):
    images = RNG.integers(1, 256, (20, 8, 8, 2), dtype=np.uint8)
    mode = {'mode': 'reflect'} if reflect else {}
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), **mode)
    found = set()
    for seed in range(60):
        draws = augment.draw(20, torch.arange(20), 2, 'all', seed)
        taken = augment.crop_and_flip(torch.from_numpy(images), torch.arange(20), *draws, reflect)
        for whole, crop in zip(padded, taken.numpy()):
            lying = {way: k for k, way in enumerate(eight_ways(crop))}
            places = [(top, left, lying[place]) for top in range(5) for left in range(5)
                      if (place := whole[top : top + 8, left : left + 8].tobytes()) in lying]
            assert len(places) == 1
            found.update(places)
    assert len(found) == 5 * 5 * 8


def test_flips_of_files_without_crops(tmp_path):
    write_images(tmp_path, n=4, size=(80, 90))
    paths, labels, _ = data.list_images(str(tmp_path))
    still = data.ImageFiles(paths, labels, 70)
    whole = still[torch.arange(8), None, torch.arange(8)][0].permute(0, 2, 3, 1).numpy()
    for flip, ways in (('none', {0}), ('horizontal', {0, 4}), ('all', set(range(8)))):
        images, found = still.augmented(crop=False, flip=flip), set()
        for seed in range(12):
            batch = images[torch.arange(8), 100 * seed, torch.arange(8)][0].permute(0, 2, 3, 1)
            found |= {eight_ways(image).index(taken.tobytes())
                      for image, taken in zip(whole, batch.contiguous().numpy())}
        assert found == ways


def test_flips_and_crops_are_options_apart(capsys):
    def parsed(*line):
        opt = options.parse_options(list(line))
        return opt.augment, opt.crop, opt.flip

    assert parsed() == (True, True, 'horizontal')
    assert parsed('--dataset', 'Digits') == (True, True, 'none')
    assert parsed('--dataset', 'Digits', '--flip', 'all') == (True, True, 'all')
    assert parsed('--no-augment', '--no-crop') == (False, False, 'horizontal')
    error = refused(capsys, '--no-augment', '--flip', 'all')
    assert '--no-augment and --flip all both given: expected one of them' in error


def test_older_runs_go_on_as_they_were_augmented(by_folder, pairs, tmp_path, capsys):
    older = torch.load(by_folder / 'model.pt7', weights_only=True)
    for name in ('flip', 'crop'):
        del older['args'][name]
    torch.save(older, tmp_path / 'model.pt7')
    with pytest.raises(SystemExit):
        run(pairs[0], tmp_path / 'new', '--flip', 'all', '--epochs', 3, '--resume', tmp_path)
    assert 'flip was horizontal, is all: expected the same' in capsys.readouterr().err
    run(pairs[0], tmp_path / 'new', '--epochs', 3, '--resume', tmp_path)
