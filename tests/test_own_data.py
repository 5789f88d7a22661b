"""Images of one's own: how they are mirrored and normalised."""

import shutil

import cv2
import numpy as np
import pytest
import torch
from runs import assert_same_run, params_of, refused, run, stats_of, write_images

import export
import networks
import predict
import train
from diracimage import Inputs
from training import augment, data, options

RNG = np.random.default_rng(0)
MEAN, STD = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)


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
    for name in ('flip', 'crop', 'normalise', 'mean', 'std'):
        del older['args'][name]
    torch.save(older, tmp_path / 'model.pt7')
    with pytest.raises(SystemExit):
        run(pairs[0], tmp_path / 'new', '--flip', 'all', '--epochs', 3, '--resume', tmp_path)
    assert 'flip was horizontal, is all: expected the same' in capsys.readouterr().err
    run(pairs[0], tmp_path / 'new', '--epochs', 3, '--resume', tmp_path)
    assert networks.load(tmp_path).inputs == Inputs.of('Folder', 32)


# ---------------------------------------------------------------- mean and deviation


@pytest.mark.parametrize('size', [32, 72])
def test_measured_mean_and_deviation(tmp_path, size):
    write_images(tmp_path / 'train', n=9, size=(size, size + 3))
    for path in (tmp_path / 'train').rglob('*.png'):  # channels that differ
        cv2.imwrite(str(path), (cv2.imread(str(path)) * [0.3, 0.6, 0.9] + 20).astype(np.uint8))
    shutil.copytree(tmp_path / 'train', tmp_path / 'test')
    inputs = Inputs.of('Folder', size)
    sets = data.load('Folder', str(tmp_path), inputs)
    whole = sets.train[torch.arange(18), None, torch.arange(18)][0].double().numpy() / 255
    mean, std = data.measure(sets.train, nthread=2)
    assert mean == pytest.approx(whole.mean((0, 2, 3)), abs=1e-6)
    assert std == pytest.approx(whole.std((0, 2, 3)), abs=1e-6)


def test_files_know_their_mean_and_deviation(pairs, tmp_path, capsys):
    root = pairs[0]
    numbers = f'[{",".join(map(str, MEAN + STD))}]'
    run(root, tmp_path / 'run', '--normalise', numbers, '--dtype', 'float', '--epochs', 1)
    trained = networks.load(tmp_path / 'run')
    assert (trained.inputs.mean, trained.inputs.std) == (MEAN, STD)

    path = root / 'test' / 'dog' / '3.png'
    pixels = cv2.imread(str(path))[:, :, ::-1].astype(float) / 255
    expected = torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)
    net, inputs, _ = predict.load(str(tmp_path / 'run'))
    torch.testing.assert_close(inputs.read(str(path)).double(), expected, rtol=0, atol=1e-5)
    export.main([str(tmp_path / 'run'), '--to', str(tmp_path / 'net.pth')])
    assert predict.load(str(tmp_path / 'net.pth'))[1] == inputs
    assert '(0.2000, 0.4000, 0.6000), over (0.1000, 0.2000, 0.3000)' in capsys.readouterr().out

    evaluate = ['--evaluate', '--dataset', 'Folder', '--dataroot', root, '--dtype', 'float']
    logged = stats_of(tmp_path / 'run')[0]['test_loss']
    torch.save(params_of(tmp_path / 'run'), tmp_path / 'bare.pth')
    for file, more in (('run', []), ('run', ['--normalise', numbers]),
                       ('bare.pth', ['--normalise', numbers])):
        train.main([str(word) for word in (*evaluate, '--resume', tmp_path / file, *more)])
        loss = capsys.readouterr().out.splitlines()[-2]
        assert float(loss.removeprefix('test_loss: ')) == pytest.approx(logged, abs=1e-4)
    evaluate += ['--resume', tmp_path / 'run', '--normalise']
    assert 'mean is [0.2, 0.4, 0.6], not [0.5, 0.5, 0.5]; std is' in refused(
        capsys, *evaluate, '[0.5,0.5,0.5,1,1,1]')
    assert 'measured with --evaluate: expected' in refused(capsys, *evaluate, 'measured')


def test_a_run_that_measured_goes_on(pairs, tmp_path):
    run(pairs[0], tmp_path / 'whole', '--normalise', 'measured')
    run(pairs[0], tmp_path / 'run', '--normalise', 'measured', '--epochs', 1)
    run(pairs[0], tmp_path / 'run', '--normalise', 'measured', '--resume', 'auto')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')
    args = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)['args']
    assert args['mean'] == pytest.approx(pairs[1][0].mean((0, 1, 2)) / 255, abs=1e-6)
    assert args['std'] == pytest.approx(pairs[1][0].std((0, 1, 2)) / 255, abs=1e-6)


@pytest.mark.parametrize('numbers', [
    '[0.5,0.5,0.5]', '[0.5,0.5,0.5,0,1,1]', '[]', '[0.5,"a"]', '{}', '7', 'mine', '[1e999,1]',
    f'[1{400 * "0"},1]', '[' * 20_000,
])
def test_what_is_no_mean_and_deviation(capsys, numbers):
    assert 'expected measured, or a list of the mean of each channel' in refused(
        capsys, '--dataset', 'Folder', '--normalise', numbers)


def test_mean_of_other_channels_than_the_images(pairs, tmp_path, capsys):
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', pairs[0], '--depth', 10,
                    '--normalise', '[0.5,0.5]', '--save', tmp_path / 'run')
    assert '--normalise of 1 channels: expected 3, of the images' in error
    assert not (tmp_path / 'run').exists()
