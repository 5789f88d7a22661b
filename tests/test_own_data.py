"""The user's own images: augmentation, normalization, and training on arrays and Datasets."""

import ast
import contextlib
import os
import re
import shutil
import signal
import sys
import threading
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import functional

import diracnets
import export
import predict
import train
from diracnets.folding import fold
from diracnets.preprocessing import Preprocessing, normalize
from pages import blocks
from runs import assert_same_run, params_of, refused, run, stats_of, write_images
from training import augmentation, data, folders, options
from training.data import DataSplits
from training.loader import iterate_batches, make_loader

RNG = np.random.default_rng(0)
MEAN, STD = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
OPTIONS = ['--depth', 10, '--batch_size', 12, '--epochs', 2, '--epoch_step', '[2]']  # as in `run`


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """Returns a folder of 32 training and 10 test images, and the same images as two pairs."""
    root = tmp_path_factory.mktemp('images')
    arrays = []
    for folder, n, seed in (('train', 16, 0), ('test', 5, 1)):
        written = write_images(root / folder, n=n, seed=seed)
        images = np.stack([written[path] for path in sorted(written)])
        arrays.append((images, np.repeat([0, 1], n)))
    return root, *arrays


@pytest.fixture(scope='module')
def by_folder(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('folder') / 'run'
    run(pairs[0], folder, '--flip', 'all')
    return folder


def train_on(splits, folder, *words):
    train.main([str(word) for word in (*OPTIONS, '--save', folder, *words)], splits)


# ---------------------------------------------------------------- flips


def eight_ways(image):
    """Returns the four rotations of an image (S, S, C) and of its mirror image, as bytes."""
    return [np.rot90(i, k).tobytes() for i in (image, image[:, ::-1]) for k in range(4)]


@pytest.mark.parametrize(('flip', 'ways'), [('none', [0]), ('horizontal', [0, 4]),
                                            ('all', range(8))])
def test_flips_of_memory_images_are_uniform(flip, ways):
    images = RNG.integers(0, 256, (50, 9, 9, 3), dtype=np.uint8)
    dataset = data.MemoryImages(images, np.arange(50)).augmented(flip=flip)
    counts = np.zeros(8, int)
    for seed in range(40):
        batch, _, _ = dataset[torch.arange(50), seed, torch.arange(50)]
        for image, flipped in zip(images, batch.permute(0, 2, 3, 1).contiguous().numpy()):
            counts[eight_ways(image).index(flipped.tobytes())] += 1
    expected = 2000 / len(ways)
    assert set(np.flatnonzero(counts)) == set(ways)
    assert counts[list(ways)] == pytest.approx(expected, abs=4 * expected**0.5)


@pytest.mark.parametrize('reflect', [True, False])
def test_augment_crops_and_flips_the_padded_image(reflect):
    images = RNG.integers(1, 256, (20, 8, 8, 2), dtype=np.uint8)
    mode = {'mode': 'reflect'} if reflect else {}
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), **mode)
    settings = augmentation.Augmentation(pad=2, flip='all', reflect=reflect)
    indices, offsets_and_flips = torch.arange(20), set()
    for seed in range(60):
        aug_params = augmentation.sample_aug_params(indices, indices, settings, seed)
        crops = augmentation.augment(torch.from_numpy(images), indices, aug_params, settings)
        for image, crop in zip(padded, crops.numpy()):
            ways = {way: k for k, way in enumerate(eight_ways(crop))}
            matches = [(top, left, ways[window]) for top in range(5) for left in range(5)
                       if (window := image[top : top + 8, left : left + 8].tobytes()) in ways]
            assert len(matches) == 1
            offsets_and_flips.update(matches)
    assert len(offsets_and_flips) == 5 * 5 * 8


def test_flips_of_image_files_without_crops(tmp_path):
    write_images(tmp_path, n=4, size=(80, 90))
    paths, labels, _ = folders.list_images(str(tmp_path))
    dataset = folders.ImageFiles(paths, labels, 70)
    unflipped = dataset[torch.arange(8), None, torch.arange(8)][0].permute(0, 2, 3, 1).numpy()
    for flip, ways in (('none', {0}), ('horizontal', {0, 4}), ('all', set(range(8)))):
        images, sampled = dataset.augmented(crop=False, flip=flip), set()
        for seed in range(12):
            batch = images[torch.arange(8), 100 * seed, torch.arange(8)][0].permute(0, 2, 3, 1)
            sampled |= {eight_ways(image).index(flipped.tobytes())
                        for image, flipped in zip(unflipped, batch.contiguous().numpy())}
        assert sampled == ways


@pytest.mark.parametrize('kind', ['memory', 'files', 'pairs'])
def test_alternating_flip_flips_each_image_in_every_second_epoch(tmp_path, kind):
    write_images(tmp_path, n=15, size=(70, 70))
    paths, labels, _ = folders.list_images(str(tmp_path))
    dataset = folders.ImageFiles(paths, labels, 70)
    unflipped = dataset[torch.arange(30), None, torch.arange(30)][0].permute(0, 2, 3, 1)
    if kind == 'memory':
        dataset = data.MemoryImages(unflipped, labels)
    if kind == 'pairs':
        dataset = data.DatasetImages([*zip(unflipped.numpy(), labels)], 2)
    loader = make_loader(dataset.augmented(crop=False, flip='alternating'), 8, 0, seed=3)
    epochs = []
    for epoch in (1, 2, 3):
        loader.sampler.set_epoch(epoch)
        order = torch.as_tensor(np.concatenate([indices for indices, *_ in loader.sampler]))
        images = torch.cat([images for images, _, _ in loader]).permute(0, 2, 3, 1)
        ways = torch.tensor([[torch.equal(i, unflipped[n]), torch.equal(i, unflipped[n].flip(1))]
                             for n, i in zip(order, images)])
        assert (ways.sum(1) == 1).all()
        epochs.append(ways[order.argsort(), 1])
    assert epochs[0].sum() == 15
    assert torch.equal(epochs[1], ~epochs[0])
    assert torch.equal(epochs[2], epochs[0])


@pytest.mark.parametrize('kind', ['memory', 'pairs'])
@pytest.mark.parametrize('side', [3, 4])
def test_cutout_makes_one_square_of_each_image_grey(side, kind):
    images = RNG.integers(0, 128, (20, 7, 7, 3), dtype=np.uint8)  # never gray
    indices, squares = torch.arange(20), set()
    if kind == 'memory':
        dataset = data.MemoryImages(images, np.arange(20))
    else:
        dataset = data.DatasetImages([*zip(images, range(20))], 20)
    for seed in range(60):
        cut, labels, _ = dataset.augmented(pad=2, cutout=side)[indices, seed, indices]
        uncut, _, _ = dataset.augmented(pad=2)[indices, seed, indices]
        for image, before in zip(*(i.permute(0, 2, 3, 1).numpy() for i in (cut, uncut))):
            grey = (image == 128).all(2)
            assert (image[~grey] == before[~grey]).all()
            rows, cols = (np.flatnonzero(grey.any(axis)) for axis in (1, 0))
            assert grey[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()
            assert grey.sum() == len(rows) * len(cols)
            squares.add((rows[0], rows[-1], cols[0], cols[-1]))
        assert labels.tolist() == list(range(20))
    # the center may be any of 7 x 7 pixels, and the square is clipped
    ends = {(max(0, m - side // 2), min(6, m - side // 2 + side - 1)) for m in range(7)}
    assert squares == {rows + cols for rows in ends for cols in ends}


def test_sample_aug_params_is_the_same_with_cutout():
    """A seed gives the same crops and flips with --cutout and without."""
    indices = torch.arange(30)
    generator = torch.Generator().manual_seed(5)  # the order of samples before --cutout existed
    shifts = torch.randint(-4, 5, (2, 30, 1), generator=generator)
    flips = torch.rand(1, 30, 1, generator=generator) < 0.5
    for side in (0, 8):
        settings = augmentation.Augmentation(pad=4, cutout=side)
        aug_params = augmentation.sample_aug_params(indices, indices, settings, 5)
        assert torch.equal(aug_params.shifts, shifts)
        assert torch.equal(aug_params.flips, flips)


def test_cutout_is_rejected_for_large_files_and_without_augmentation(capsys):
    error = refused(capsys, '--dataset', 'ImageNet', '--cutout', '8')
    assert '--cutout 8: expected --image_size of at most 64' in error
    error = refused(capsys, '--no-augment', '--cutout', '8')
    assert '--no-augment and --cutout 8 contradict each other' in error
    assert re.search('--cutout 32: .* 32', refused(capsys, '--cutout', '32'))


def test_padding_is_checked_only_if_images_are_cropped(capsys):
    assert '--randomcrop_pad 70: ' in refused(capsys, '--randomcrop_pad', '70')
    assert options.parse_options(['--randomcrop_pad', '70', '--no-crop']).randomcrop_pad == 70


def test_flip_and_crop_are_separate_options(capsys):
    def parsed(*line):
        opt = options.parse_options(list(line))
        return opt.augment, opt.crop, opt.flip

    assert parsed() == (True, True, 'horizontal')
    assert parsed('--dataset', 'Digits') == (True, True, 'none')
    assert parsed('--dataset', 'Digits', '--flip', 'all') == (True, True, 'all')
    assert parsed('--no-augment', '--no-crop') == (False, False, 'horizontal')
    error = refused(capsys, '--no-augment', '--flip', 'all')
    assert '--no-augment and --flip all' in error


def test_run_flips_and_crops_by_its_options(pairs, tmp_path):
    """Flips alone do not change symmetric images."""
    half = RNG.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    half = np.concatenate([half, half[:, ::-1]], axis=1)
    images = np.concatenate([half, half[:, :, ::-1]], axis=2)
    images = (images // 2 + images.swapaxes(1, 2) // 2).astype(np.uint8)
    splits = DataSplits.from_arrays((images, np.arange(24) % 2), (images[:6], np.arange(6) % 2))
    for name, words in {'plain': ['--no-augment'], 'flips': ['--no-crop', '--flip', 'all'],
                        'crops': ['--flip', 'none'], 'squares': ['--no-crop', '--cutout', '4'],
                        }.items():
        train_on(splits, tmp_path / name, '--epochs', 1, *words)
    plain = params_of(tmp_path / 'plain')
    assert all(torch.equal(p, plain[k]) for k, p in params_of(tmp_path / 'flips').items())
    for name in ('crops', 'squares'):
        assert not torch.equal(params_of(tmp_path / name)['conv'], plain['conv'])


def test_resume_of_an_older_run_keeps_its_augmentation(by_folder, pairs, tmp_path, capsys):
    older = torch.load(by_folder / 'model.pt7', weights_only=True)
    for name in ('flip', 'crop', 'cutout', 'normalise', 'mean', 'std'):
        del older['args'][name]
    torch.save(older, tmp_path / 'model.pt7')
    with pytest.raises(SystemExit):
        run(pairs[0], tmp_path / 'new', '--flip', 'all', '--epochs', 3, '--resume', tmp_path)
    assert 'flip changed from horizontal to all' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(pairs[0], tmp_path / 'new', '--cutout', 4, '--epochs', 3, '--resume', tmp_path)
    assert 'cutout changed from 0 to 4' in capsys.readouterr().err
    run(pairs[0], tmp_path / 'new', '--epochs', 3, '--resume', tmp_path)
    assert diracnets.load(tmp_path).preprocess == Preprocessing.for_dataset('Folder', 32)


# ---------------------------------------------------------------- normalization


@pytest.mark.parametrize('size', [32, 72])
def test_measure_normalization_is_the_mean_and_std_of_all_pixels(tmp_path, size):
    write_images(tmp_path / 'train', n=9, size=(size, size + 3))
    for path in (tmp_path / 'train').rglob('*.png'):  # channels that differ
        cv2.imwrite(str(path), (cv2.imread(str(path)) * [0.3, 0.6, 0.9] + 20).astype(np.uint8))
    shutil.copytree(tmp_path / 'train', tmp_path / 'test')
    inputs = Preprocessing.for_dataset('Folder', size)
    splits = data.load_splits('Folder', str(tmp_path), inputs)
    pixels = splits.train[torch.arange(18), None, torch.arange(18)][0].double().numpy() / 255
    mean, std = data.measure_normalization(splits.train, nthread=2)
    assert mean == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-6)
    assert std == pytest.approx(pixels.std((0, 2, 3)), abs=1e-6)


@pytest.mark.parametrize('channels', [1, 5])
def test_splits_from_arrays_of_any_number_of_channels(channels):
    images = RNG.integers(0, 200, (30, 8, 8, channels), dtype=np.uint8)
    labels = np.arange(30) % 3
    array = images[..., 0] if channels == 1 else images
    splits = DataSplits.from_arrays((array, labels), (array[:6], labels[:6]))
    assert (splits.train.shape, splits.classes) == ((8, 8, channels), ['0', '1', '2'])
    opt = options.parse_options(['--normalise', 'measured'], splits)
    assert options.parse_options([], splits) == opt  # there is no default for such images
    mean, std = data.measure_normalization(splits.train, 0)
    inputs = Preprocessing.for_dataset('Folder', 8, mean, std)
    assert inputs.channels == channels
    batch, _, _ = splits.test[torch.tensor([4, 2]), None, torch.arange(2)]
    expected = (images[[4, 2]] / 255 - images.mean((0, 1, 2)) / 255) / (
        images.std((0, 1, 2)) / 255)
    np.testing.assert_allclose(data_inputs(batch, inputs), expected, atol=2e-5)
    with pytest.raises(ValueError, match=f'{channels} channels: expected 3'):
        data_inputs(batch, Preprocessing.for_dataset('Folder', 8))


def data_inputs(batch, inputs):
    return normalize(batch, inputs, torch.float64).permute(0, 2, 3, 1).numpy()


def test_normalise_option_is_stored_in_checkpoints_and_exported_files(pairs, tmp_path, capsys):
    root = pairs[0]
    numbers = f'[{",".join(map(str, MEAN + STD))}]'
    run(root, tmp_path / 'run', '--normalise', numbers, '--dtype', 'float', '--epochs', 1)
    trained = diracnets.load(tmp_path / 'run')
    assert (trained.preprocess.mean, trained.preprocess.std) == (MEAN, STD)

    path = root / 'test' / 'dog' / '3.png'
    pixels = cv2.imread(str(path))[:, :, ::-1].astype(float) / 255
    expected = torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)
    net, inputs, _ = predict.load_classifier(str(tmp_path / 'run'))
    torch.testing.assert_close(inputs(str(path)).double(), expected, rtol=0, atol=1e-5)
    export.main([str(tmp_path / 'run'), '--to', str(tmp_path / 'net.pth')])
    assert predict.load_classifier(str(tmp_path / 'net.pth'))[1] == inputs
    printed = capsys.readouterr().out
    assert 'mean (0.2000, 0.4000, 0.6000), std (0.1000, 0.2000, 0.3000)' in printed

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
    assert '--normalize measured: ' in refused(capsys, *evaluate, 'measured')


def test_resume_keeps_the_measured_normalization(pairs, tmp_path):
    run(pairs[0], tmp_path / 'whole', '--normalise', 'measured')
    run(pairs[0], tmp_path / 'run', '--normalise', 'measured', '--epochs', 1)
    run(pairs[0], tmp_path / 'run', '--normalise', 'measured', '--resume', 'auto')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')
    args = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)['args']
    assert args['mean'] == pytest.approx(pairs[1][0].mean((0, 1, 2)) / 255, abs=1e-6)
    assert args['std'] == pytest.approx(pairs[1][0].std((0, 1, 2)) / 255, abs=1e-6)


def test_resume_rejects_an_invalid_measured_normalization(pairs, tmp_path, capsys):
    run(pairs[0], tmp_path, '--normalise', 'measured', '--epochs', 1)
    with pytest.raises(SystemExit):
        run(pairs[0], tmp_path, '--resume', 'auto')
    assert "normalise changed from measured to ''; use" in capsys.readouterr().err
    saved = torch.load(tmp_path / 'model.pt7', weights_only=True)
    torch.save({**saved, 'args': {**saved['args'], 'std': [0.0] * 3}}, tmp_path / 'model.pt7')
    with pytest.raises(SystemExit) as stopped:
        run(pairs[0], tmp_path, '--normalise', 'measured', '--resume', 'auto', '--force')
    assert stopped.value.code == 2
    assert 'std (0.0, 0.0, 0.0)' in capsys.readouterr().err


@pytest.mark.parametrize('numbers', [
    '[0.5,0.5,0.5]', '[0.5,0.5,0.5,0,1,1]', '[]', '[0.5,"a"]', '{}', '7', 'mine', '[1e999,1]',
    f'[1{400 * "0"},1]', '[' * 20_000,
])
def test_normalise_option_rejects_invalid_values(capsys, numbers):
    error = refused(capsys, '--dataset', 'Folder', '--normalise', numbers)
    assert re.search('--normalise.*: .*expected', error)


def test_normalise_option_rejects_another_number_of_channels(pairs, tmp_path, capsys):
    error = refused(capsys, '--dataset', 'Folder', '--dataroot', pairs[0], '--depth', 10,
                    '--normalise', '[0.5,0.5]', '--save', tmp_path / 'run')
    assert re.search('--normalize .*1 channels: expected 3', error)
    assert not (tmp_path / 'run').exists()


# ---------------------------------------------------------------- arrays and Datasets


class Items(Dataset):
    """A Dataset of the images of a pair, as arrays, PIL images or tensors."""

    classes = ('cat', 'dog')

    def __init__(self, pair, kind):
        self.images, self.labels, self.kind = *pair, kind

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        make = {'PIL': functional.to_pil_image, 'array': np.asarray, 'float': functional.to_tensor,
                'tensor': lambda image: torch.from_numpy(image).permute(2, 0, 1)}[self.kind]
        return make(self.images[i]), self.labels[i]


@pytest.mark.parametrize('kind', ['arrays', 'PIL', 'array', 'tensor', 'float'])
def test_training_on_arrays_equals_training_on_the_same_files(pairs, by_folder, tmp_path, kind):
    if kind == 'arrays':
        splits = DataSplits.from_arrays(*pairs[1:], classes=['cat', 'dog'])
    else:
        splits = DataSplits.from_arrays(*(Items(pair, kind) for pair in pairs[1:]))
    workers = {'PIL': 2}.get(kind, 0)
    train_on(splits, tmp_path / 'run', '--flip', 'all', '--nthread', workers)
    assert_same_run(tmp_path / 'run', by_folder)
    assert splits.train.augmentation.flip == 'none'  # the splits are not modified


def test_docs_example_trains_on_arrays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, *_ = [text for language, text in blocks('docs/training.md') if language == 'python']
    assert len([line for line in text.splitlines() if line]) <= 10
    names = {}
    exec(text, names)
    splits = next(value for value in names.values() if isinstance(value, DataSplits))
    stats = stats_of(tmp_path / 'runs' / 'mine')
    assert [s['epoch'] for s in stats] == [1, 2, 3]
    assert stats[-1]['test_acc'] > 80  # of ten digits
    assert '1500 training and 297 test images, 10 classes' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        exec(text, names)
    assert re.search('runs/mine: .*--resume auto', capsys.readouterr().err)
    train.main(['--evaluate', '--resume', 'runs/mine'], splits)
    accuracy = capsys.readouterr().out.splitlines()[-1]
    assert accuracy == f'test_acc: {stats[-1]["test_acc"]:.2f}'

    cv2.imwrite('digit.png', names['images'][1600])
    batch, _, _ = splits.test[torch.tensor([100]), None, torch.arange(1)]
    trained = diracnets.load('runs/mine')
    expected = normalize(batch, trained.preprocess)
    assert expected.shape == (1, 1, 8, 8)
    with torch.no_grad():
        logits = trained.model(expected)
        for name in ('net.pth', 'net.onnx'):
            export.main(['runs/mine', '--to', name])
            model, preprocess, *_ = predict.load_classifier(name)
            torch.testing.assert_close(preprocess('digit.png')[None], expected)
            torch.testing.assert_close(model(expected), logits, rtol=1e-3, atol=1e-3)


class Logger(ModuleType):
    """A stand-in for the packages wandb and mlflow: `logged` has the calls, with their steps."""

    def __init__(self, name, folder):
        super().__init__(name)
        self.folder, self.logged, self.summary = folder, [], {}

    def init(self, project, config):
        return contextlib.nullcontext(self)

    def log(self, stats, step=None):
        saved = torch.load(self.folder / 'model.pt7', weights_only=True)
        self.logged.append((saved['epoch'], step, stats))  # the checkpoint is complete

    log_metrics = log


@pytest.mark.parametrize(('number', 'name'), [(1, 'wandb'), (2, 'mlflow')])
def test_docs_examples_log_each_epoch_by_a_callback(pairs, tmp_path, monkeypatch, number, name):
    text = [text for language, text in blocks('docs/training.md') if language == 'python'][number]
    logger = Logger(name, tmp_path)
    monkeypatch.setitem(sys.modules, name, logger)
    argv = [str(word) for word in (*OPTIONS, '--save', tmp_path)]
    splits = DataSplits.from_arrays(*pairs[1:])
    names = {'argv': argv, 'splits': splits, 'train': train}
    exec(text, names)
    stats, result = stats_of(tmp_path), names['result']
    assert (result.folder, result.history) == (str(tmp_path), stats)
    assert result.best_acc == max(s['test_acc'] for s in stats)
    best = torch.load(tmp_path / 'best.pt7', weights_only=True)
    assert stats[best['epoch'] - 1]['test_acc'] == result.best_acc
    assert [epoch for epoch, *_ in logger.logged] == [1, 2]
    if name == 'wandb':
        assert [logged for *_, logged in logger.logged] == stats
        assert logger.summary == {'best_acc': result.best_acc}
    else:
        keys = ('train_loss', 'train_acc', 'test_loss', 'test_acc')
        assert [logged for _, *logged in logger.logged] == [
            [s['epoch'], {key: s[key] for key in keys}] for s in stats]


def test_main_returns_the_result_of_a_finished_run_and_of_an_evaluation(pairs, tmp_path):
    splits = DataSplits.from_arrays(*pairs[1:])
    argv = [str(word) for word in (*OPTIONS, '--save', tmp_path / 'run', '--dtype', 'float')]
    first = train.main(argv, splits)
    assert train.main([*argv, '--resume', 'auto'], splits) == first
    evaluated = train.main(['--evaluate', '--resume', first.folder, '--dtype', 'float'], splits)
    assert evaluated['test_acc'] == first.history[-1]['test_acc']
    assert evaluated['test_loss'] == pytest.approx(first.history[-1]['test_loss'], rel=1e-6)


@pytest.mark.parametrize('model', ['diracnet-v1', 'plain', 'resnet', 'wide-resnet'])
def test_models_with_a_depth_take_any_number_of_channels(model, tmp_path):
    images = RNG.integers(0, 256, (30, 8, 8, 5), dtype=np.uint8)
    splits = DataSplits.from_arrays(*[(images, np.arange(30) % 3)] * 2)
    train_on(splits, tmp_path, '--model', model, '--width', 1, '--epochs', 1)
    assert diracnets.load(tmp_path).preprocess.channels == 5


def test_other_models_reject_other_than_three_channels(tmp_path, capsys):
    images = RNG.integers(0, 256, (30, 8, 8, 5), dtype=np.uint8)
    splits = DataSplits.from_arrays(*[(images, np.arange(30) % 3)] * 2)
    with pytest.raises(SystemExit):
        train.main(['--model', 'densenet', '--save', str(tmp_path / 'run')], splits)
    assert 'densenet: expected 3 input channels, got 5' in capsys.readouterr().err


@pytest.mark.parametrize('recipe', options.RECIPES)
def test_recipes_apply_to_data_from_python(recipe):
    images = RNG.integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    splits = DataSplits.from_arrays(*[(images, np.arange(4) % 2)] * 2)
    opt = options.parse_options(['--recipe', recipe, '--epochs', '3'], splits)
    expected = options.parse_options(['--recipe', recipe, '--epochs', '3'])
    assert (opt.lr, opt.batch_size, opt.epochs) == (expected.lr, expected.batch_size, 3)
    with pytest.raises(SystemExit):
        options.parse_options(['--recipe', recipe, '--dataset', 'CIFAR10'], splits)


def test_batch_of_one_image_that_batch_norm_rejects_ends_before_training(tmp_path, capsys):
    images = RNG.integers(0, 256, (17, 70, 70, 3), dtype=np.uint8)
    splits = DataSplits.from_arrays(*[(images, np.arange(17) % 2)] * 2)
    with pytest.raises(SystemExit) as exit:
        train.main(['--model', 'resnet18', '--batch_size', '16', '--grow', '[32]',
                    '--save', str(tmp_path / 'run')], splits)
    assert exit.value.code == 2
    assert ('--batch_size 16: leaves a batch of one of the 17 images, too few for batch norm at 32 '
            'pixels; use another') in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_run_on_a_dataset_is_interrupted_and_resumed(pairs, tmp_path, capsys):
    class Interrupting(Items):
        left = 60

        def __getitem__(self, i):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(i)

    _, train_pair, test_pair = pairs
    arrays = DataSplits.from_arrays(train_pair, test_pair, ['cat', 'dog'])
    more = ['--val', 8, '--nthread', 0]
    train_on(arrays, tmp_path / 'whole', *more)
    with pytest.raises(SystemExit) as exit_info:
        train_on(DataSplits.from_arrays(Interrupting(train_pair, 'array'),
                                        Items(test_pair, 'array')), tmp_path / 'run', *more)
    assert exit_info.value.code == 143
    last = capsys.readouterr().out.splitlines()[-1]
    argv = re.fullmatch(r'interrupted by SIGTERM .*; checkpoint saved; resume with: '
                        r'train\.main\((\[.*\]), splits\)', last)[1]
    train.main(ast.literal_eval(argv), arrays)
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')
    assert all('val_acc' in epoch for epoch in stats_of(tmp_path / 'run'))


def test_resume_rejects_other_data(pairs, tmp_path, capsys):
    _, (images, labels), test_pair = pairs
    names = ['cat', 'dog']

    def refusal(splits):
        with pytest.raises(SystemExit) as exit_info:
            train_on(splits, tmp_path, '--epochs', 2, '--resume', 'auto')
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1
        return error

    train_on(DataSplits.from_arrays((images, labels), test_pair, names), tmp_path, '--epochs', 1)
    capsys.readouterr()
    fewer = DataSplits.from_arrays((images[4:], labels[4:]), test_pair, names)
    assert ('given changed from 32 + 10 images (32, 32, 3) to 28 + 10 images (32, 32, 3)'
            in refusal(fewer))
    small = DataSplits.from_arrays((images[:, :16, :16], labels),
                                   (test_pair[0][:, :16, :16], test_pair[1]), names)
    assert 'image_size changed from 32 to 16; ' in refusal(small)
    others = DataSplits.from_arrays((images, labels), test_pair, ['owl', 'yak'])
    assert 'the dataset 2 (owl to yak)' in refusal(others)
    with pytest.raises(SystemExit):
        train.main(['--evaluate', '--resume', str(tmp_path)], small)
    assert 'images are (16, 16, 3): expected (32, 32, 3)' in capsys.readouterr().err


def test_random_transforms_of_a_dataset_follow_the_seed(pairs, tmp_path):
    class Noisy(Items):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return torch.where(torch.rand(32, 32) < 0.1, 0, image), label

    def epoch(workers):
        splits = DataSplits.from_arrays(Noisy(pairs[1], 'tensor'), Items(pairs[2], 'tensor'))
        return torch.cat([images for images, *_ in make_loader(splits.train, 12, workers, seed=1)])

    assert torch.equal(epoch(0), epoch(2))


def arrays(n=6, shape=(8, 8, 3), dtype=np.uint8, labels=None):
    return np.ones((n, *shape), dtype), np.arange(n) % 2 if labels is None else labels


@pytest.mark.parametrize(('sources', 'message'), [
    ((arrays(dtype=np.float32), arrays()), r'images are float32 \(6, 8, 8, 3\): expected'),
    ((arrays(shape=(8, 9, 3)), arrays()), '6 images of 8 x 9 pixels: expected square'),
    ((arrays(shape=(4, 4)), arrays()), '6 images of 4 x 4 pixels: .* 8 pixels'),
    ((arrays(n=0), arrays()), '0 images'),
    ((arrays(), arrays(shape=(8, 8))), r'are \(8, 8, 3\), test images \(8, 8, 1\): expected the'),
    ((arrays(labels=np.ones(6)), arrays()), r'labels are float64 \(6,\): expected'),
    ((arrays(labels=np.zeros((6, 1), int)), arrays()), r'labels are int64 \(6, 1\)'),
    ((arrays(), arrays(), ['a']), '1 classes: expected two or more'),
    ((arrays(labels=np.arange(6)), arrays(), ['a', 'b']), 'labels are 0 to 5: expected 0 to 1'),
    ((arrays(labels=np.arange(6) - 1), arrays()), 'labels are -1 to 4: expected 0 to '),
    ((arrays(labels=['cat', 'dog'] * 3), arrays()), r'labels are <U3 \(6,\): expected integers'),
    ((arrays(labels=np.arange(6) + 2**40), arrays()), 'labels are 1099511627776 to '),
    ((arrays(labels=np.full(6, 2**64 - 1, np.uint64)), arrays()), 'labels are 184467440737'),
    (([*zip(*arrays())], arrays()), '6 arrays: expected images and labels'),
    ((Items(arrays(labels=[2] * 6), 'PIL'), arrays()), 'item 0 of the Dataset: label 2: expected'),
    ((Items(arrays(dtype=np.int64), 'array'), arrays()),
     r'item 0 of the Dataset: an image of int64 \(8, 8, 3\): expected'),
    ((Items(arrays(labels=[[1]] * 6), 'PIL'), arrays()), "item 0 of the Dataset: 'list' object"),
    ((Items(arrays(n=0), 'array'), arrays()), 'a Dataset of 0 images: '),
    ((TensorDataset(torch.ones(6, 3, 8, 8)), arrays()), 'a Dataset without classes: '),
])
def test_splits_from_arrays_rejects_invalid_data(sources, message):
    with pytest.raises(data.DataError, match=message):
        DataSplits.from_arrays(*sources)


def test_run_ends_with_one_line_when_items_have_several_sizes(pairs, tmp_path, capsys):
    class Growing(Items):
        def __getitem__(self, i):
            return np.zeros((8 + i, 8 + i, 3), np.uint8), self.labels[i]

    splits = DataSplits.from_arrays(Growing(pairs[1], ''), Growing(pairs[2], ''))
    with pytest.raises(SystemExit) as exit_info:
        train_on(splits, tmp_path, '--nthread', 1)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('train.py: item ')
    assert ': expected (8, 8, 3)' in error


class Failing(Items):
    """A Dataset of the images of a pair whose last items raise `kind`, an exception."""

    def __getitem__(self, i):
        if i > len(self.labels) // 2:
            raise self.kind
        return self.images[i], self.labels[i]


@pytest.mark.parametrize('error', [RuntimeError('stack expects'), EOFError('no more input')])
def test_worker_keeps_the_type_of_an_error_of_a_dataset(pairs, error):
    splits = DataSplits.from_arrays(Failing(pairs[1], error), Items(pairs[2], 'array'))
    with pytest.raises(type(error), match=str(error)):
        list(iterate_batches(make_loader(splits.train, 4, nthread=1)))


@pytest.mark.slow
def test_run_saves_and_ends_with_one_line_when_an_item_is_unreadable(pairs, tmp_path, capsys):
    truncated = Failing(pairs[1], OSError('image file is truncated'))
    splits = DataSplits.from_arrays(truncated, Items(pairs[2], 'array'))
    with pytest.raises(SystemExit) as exit_info:
        train_on(splits, tmp_path, '--batch_size', 2)
    assert exit_info.value.code == 2
    assert re.fullmatch(r'train.py: item \d+ of the Dataset: image file is truncated',
                        capsys.readouterr().err.splitlines()[-1])
    assert (tmp_path / 'model.pt7').exists()


@pytest.mark.slow
def test_main_rejects_arrays_with_a_data_set_name_and_without_training_images(pairs, capsys):
    splits = DataSplits.from_arrays(*pairs[1:])
    for flags in (['--dataset', 'CIFAR10'], ['--image_size', '32']):
        with pytest.raises(SystemExit):
            train.main(flags, splits)
        assert 'and data from Python' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([], DataSplits.from_arrays(None, pairs[2]))
    assert 'no training images' in capsys.readouterr().err


def test_folded_model_takes_the_inputs_of_its_run(pairs, by_folder):
    """The folded model takes inputs of the run's preprocessing."""
    trained = diracnets.load(by_folder)
    batch = torch.from_numpy(pairs[2][0]).permute(0, 3, 1, 2)
    inputs = torch.from_numpy(data_inputs(batch, trained.preprocess)).permute(0, 3, 1, 2)
    network, folded = trained.model.double(), fold(trained.model, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), network(inputs))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int32])
def test_splits_from_arrays_take_labels_of_any_integer_type(dtype):
    images, labels = arrays(labels=np.array([5, 0, 1, 2, 3, 4], dtype))
    for given in (labels, torch.from_numpy(labels)):
        splits = DataSplits.from_arrays((images, given), (images[:3], given[:3]))
        assert splits.classes == ['0', '1', '2', '3', '4', '5']
        assert splits.train.labels.tolist() == [5, 0, 1, 2, 3, 4]
        assert splits.train.labels.dtype == torch.int64


def test_splits_from_arrays_number_their_classes():
    images, labels = torch.zeros(6, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1, 2])
    assert DataSplits.from_arrays((images, labels), (images, labels)).classes == ['0', '1', '2']


def test_run_in_another_thread_equals_the_run_in_the_main_thread(pairs, tmp_path):
    arrays = DataSplits.from_arrays(*pairs[1:])
    thread = threading.Thread(target=train_on, args=(arrays, tmp_path / 'thread'))
    thread.start()
    train_on(arrays, tmp_path / 'main')
    thread.join()
    assert len(stats_of(tmp_path / 'thread')) == len(stats_of(tmp_path / 'main')) > 1


def test_resume_into_another_folder_writes_a_best_checkpoint(pairs, tmp_path):
    arrays = DataSplits.from_arrays(*pairs[1:])
    train_on(arrays, tmp_path / 'run', '--epochs', 1)
    state = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    torch.save({**state, 'best': 100.0}, tmp_path / 'run' / 'model.pt7')
    train_on(arrays, tmp_path / 'more', '--epochs', 2, '--resume', tmp_path / 'run')
    best = torch.load(tmp_path / 'more' / 'best.pt7', weights_only=True)
    assert best['epoch'] == 2
    assert best['best'] == stats_of(tmp_path / 'more')[-1]['test_acc']


def test_run_refuses_a_folder_with_a_best_checkpoint_or_a_log_only(pairs, tmp_path, capsys):
    arrays = DataSplits.from_arrays(*pairs[1:])
    train_on(arrays, tmp_path / 'best', '--epochs', 2)
    shutil.copytree(tmp_path / 'best', tmp_path / 'log')
    for folder, names in (('best', ('model.pt7', 'previous.pt7', 'log.txt')),
                          ('log', ('model.pt7', 'previous.pt7', 'best.pt7'))):
        for name in names:
            (tmp_path / folder / name).unlink()
    for folder, words in (('best', ()), ('log', ('--resume', 'auto'))):
        with pytest.raises(SystemExit):
            train_on(arrays, tmp_path / folder, *words)
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.endswith('contains a run; it has no checkpoint to resume; use another --save')
