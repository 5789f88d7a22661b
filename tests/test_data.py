"""Image files, datasets and batches: pixels, order and augmentation."""

import io
import os
import struct
import sys
import threading
import time
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from tqdm import TMonitor

from corruption import ROTATED, jpeg_parts, jpeg_segment, png_of
from diracnets import image_files, preprocessing
from diracnets.image_files import DataError, decode_image
from diracnets.preprocessing import Preprocessing
from runs import write_images
from training import augmentation, data, folders
from training.datasets import IGNORED
from training.loader import make_loader


@pytest.fixture
def memory():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 12, 12, 3), dtype=np.uint8)
    return images, data.MemoryImages(images, np.arange(50)).augmented(pad=3)


def test_normalize_subtracts_mean_and_divides_by_std():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 5), dtype=np.uint8)
    for kind, mean, std in [
        ('CIFAR10', np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255),
        ('CIFAR100', np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255),
        ('ImageNet', np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])),
    ]:
        expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
        batch, preprocess = torch.from_numpy(images), Preprocessing.for_dataset(kind)
        inputs = preprocessing.normalize(batch, preprocess, torch.float64)
        np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-6, atol=1e-6)
        assert preprocessing.normalize(batch, preprocess).dtype == torch.float32


def test_memory_images_are_not_augmented_without_seed(memory):
    images, dataset = memory
    batch, labels, global_batch_size = dataset[torch.tensor([7, 3]), None, torch.arange(2)]
    assert global_batch_size == 2
    assert batch.shape == (2, 3, 12, 12)
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1).numpy(), images[[7, 3]])
    assert labels.tolist() == [7, 3]


def test_augment_crops_the_reflected_padding_at_every_offset(memory):
    images, dataset = memory
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode='reflect')
    offsets = set()
    for seed in range(40):
        batch, labels, _ = dataset[torch.arange(50), seed, torch.arange(50)]
        for image, label in zip(batch.permute(0, 2, 3, 1).numpy(), labels.tolist()):
            where = {
                (top, left, flip)
                for top in range(7)
                for left in range(7)
                for flip in (False, True)
                if np.array_equal(
                    image[:, ::-1] if flip else image,
                    padded[label, top : top + 12, left : left + 12],
                )
            }
            assert len(where) == 1
            offsets |= where
    assert len(offsets) == 7 * 7 * 2  # every offset, flipped and not


def test_augment_crops_the_black_padding_at_every_offset(memory):
    images, _ = memory
    dataset = data.MemoryImages(images, np.arange(50)).augmented(
        pad=3, flip='none', reflect=False)
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)))
    offsets = set()
    for seed in range(20):
        batch, labels, _ = dataset[torch.arange(50), seed, torch.arange(50)]
        for image, label in zip(batch.permute(0, 2, 3, 1).numpy(), labels.tolist()):
            where = [
                (top, left) for top in range(7) for left in range(7)
                if np.array_equal(image, padded[label, top : top + 12, left : left + 12])
            ]
            assert len(where) == 1
            offsets.add(where[0])
    assert len(offsets) == 7 * 7


def test_loader_changes_only_the_order_without_augmentation(memory):
    images, dataset = memory
    batches = list(make_loader(dataset.augmented(crop=False, flip='none'), 16, seed=1))
    labels = torch.cat([labels for _, labels, _ in batches])
    assert labels.tolist() != list(range(50))
    pixels = torch.cat([images for images, _, _ in batches]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels, images[labels.numpy()])


@pytest.mark.parametrize('kind', ['memory', 'files'])
def test_hold_out_splits_a_data_set(memory, tmp_path, kind):
    dataset = memory[1]
    if kind == 'files':
        write_images(tmp_path, n=25, size=(20, 20))
        dataset = folders.ImageFiles(*folders.list_images(str(tmp_path))[:2], size=16)
    train, val = data.hold_out(dataset, 8)
    assert (len(train), len(val)) == (42, 8)

    def pixels(images):
        return {images[torch.tensor([i]), None, torch.arange(1)][0].numpy().tobytes()
                for i in range(len(images))}

    assert pixels(train) | pixels(val) == pixels(dataset)
    assert not pixels(train) & pixels(val)
    assert pixels(data.hold_out(dataset, 8)[1]) == pixels(val)
    with pytest.raises(DataError, match='^--val 50: expected less than the number .*, 50$'):
        data.hold_out(dataset, 50)


def test_augmented_rejects_padding_as_wide_as_the_image():
    with pytest.raises(DataError, match='randomcrop_pad 8: .* 8$'):
        data.MemoryImages(np.zeros((1, 8, 8, 3), np.uint8), [0]).augmented(pad=8)


def test_loader_epoch_has_every_image_once_and_follows_the_seed(memory):
    _, dataset = memory

    def epoch(seed, number):
        loader = make_loader(dataset, batch_size=16, seed=seed)
        loader.sampler.set_epoch(number)
        assert len(loader) == 4
        images, labels, global_batch_sizes = zip(*loader)
        assert global_batch_sizes == tuple(map(len, labels))
        assert [len(batch) for batch in labels] == [16, 16, 16, 2]
        return torch.cat(images), torch.cat(labels).tolist()

    images, labels = epoch(1, 1)
    assert sorted(labels) == list(range(50))
    again, same_labels = epoch(1, 1)
    assert torch.equal(images, again)
    assert labels == same_labels
    for seed, number in [(2, 1), (1, 2)]:
        assert epoch(seed, number)[1] != labels


@pytest.mark.parametrize('kind', ['memory', 'files'])
@pytest.mark.parametrize('world', [1, 2, 3, 5])
def test_batches_of_all_ranks_are_the_global_batch(memory, tmp_path, kind, world):
    dataset = memory[1]
    if kind == 'files':
        write_images(tmp_path, n=26, size=(24, 20))
        dataset = folders.ImageFiles(*folders.list_images(str(tmp_path))[:2], size=16).augmented()
    n = len(dataset)
    for seed in (None, 1):
        batches = list(make_loader(dataset, 12, 0, seed))  # the last batch: 2 or 4 of 50 or 52
        ranks = [list(make_loader(dataset, 12, 0, seed, rank, world)) for rank in range(world)]
        for (all_images, all_labels, _), parts in zip(batches, zip(*ranks)):
            valid = [labels != IGNORED for _, labels, _ in parts]
            sizes = [int(v.sum()) for v in valid]
            assert max(sizes) - min(sizes) <= 1
            images = torch.cat([images[v] for (images, _, _), v in zip(parts, valid)])
            assert torch.equal(images, all_images)
            labels = torch.cat([labels[v] for (_, labels, _), v in zip(parts, valid)])
            assert torch.equal(labels, all_labels)
            assert {global_batch_size for *_, global_batch_size in parts} == {len(all_labels)}
            assert all(len(labels) for _, labels, _ in parts)
        assert sum(len(labels) for _, labels, _ in batches) == n


def test_sampler_skips_finished_steps(memory):
    loader = make_loader(memory[1], 16, seed=1)
    batches = list(loader)
    loader.sampler.set_epoch(1, step=2)
    rest = list(loader)
    assert len(rest) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, batches[2:]))


def test_preprocessing_for_dataset_has_kind_and_size():
    names = ('CIFAR10', 'CIFAR100', 'Digits', 'ImageNet', 'Folder')
    assert [(i.kind, i.size) for i in map(Preprocessing.for_dataset, names)] == [
        ('CIFAR10', 32), ('CIFAR100', 32), ('CIFAR10', 32), ('ImageNet', 224), ('CIFAR10', 32)
    ]
    folders = [Preprocessing.for_dataset('Folder', size) for size in (64, 65)]
    assert [(i.kind, i.size) for i in folders] == [('CIFAR10', 64), ('ImageNet', 65)]
    assert folders[1].mean == (0.485, 0.456, 0.406)
    # older checkpoints contain image_size 32 for every dataset
    older = Preprocessing.from_args({'dataset': 'ImageNet', 'image_size': 32})
    assert older == Preprocessing.for_dataset('ImageNet')
    for arguments in (('ImageNet', 32), ('CIFAR10', 48), ('Folder', -3), ('Folder', 0),
                      ('Folder', 48.0), ('Folder', '48')):
        with pytest.raises(ValueError, match=f'image_size {arguments[1]}: expected'):
            Preprocessing.for_dataset(*arguments)
    with pytest.raises(ValueError, match="'MNIST': .* CIFAR10, .*, Folder"):
        Preprocessing.for_dataset('MNIST')


def test_load_splits_rejects_another_size_than_the_data_set():
    with pytest.raises(DataError, match='^Digits .* 32 pixels: .* 48$'):
        data.load_splits('Digits', preprocess=Preprocessing.for_dataset('Folder', 48))


def test_loader_keeps_the_order_without_seed(memory):
    images, dataset = memory
    loader = make_loader(dataset, batch_size=20)
    batches, labels, _ = zip(*loader)
    assert torch.cat(labels).tolist() == list(range(50))
    np.testing.assert_array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), images)


def test_load_splits_digits():
    splits = data.load_splits('Digits', pad=0)
    assert (len(splits.train), len(splits.test), len(splits.classes)) == (1437, 360, 10)
    assert splits.train.augmentation.flip == 'none'
    images = torch.cat([splits.train.images, splits.test.images])
    assert images.shape == (1797, 32, 32, 3)
    assert (images.min(), images.max()) == (0, 255)
    assert torch.equal(images[..., 0], images[..., 2])
    from sklearn.datasets import load_digits

    # the mean of each digit survives the resizing; ours are in another order
    means = np.sort(load_digits().images.mean((1, 2)) / 16 * 255)
    ours = np.sort(images[..., 0].double().mean((1, 2)).numpy())
    assert np.abs(means - ours).max() < 6
    labels = torch.cat([splits.train.labels, splits.test.labels])
    assert labels.bincount().tolist() == np.bincount(load_digits().target).tolist()
    again = data.load_splits('Digits', training=False)
    assert again.train is None
    assert torch.equal(splits.test.images, again.test.images)


@pytest.mark.parametrize('test_folder', ['test', 'val'])
def test_load_splits_reads_small_images_into_memory(tmp_path, test_folder):
    train = write_images(tmp_path / 'train', n=3)
    test = write_images(tmp_path / test_folder, n=2, seed=1)
    (tmp_path / 'train' / 'cat' / 'notes.txt').write_text('not an image')
    splits = data.load_splits('Folder', str(tmp_path), pad=4)
    assert splits.classes == ['cat', 'dog']
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (splits.train.augmentation.pad, splits.train.augmentation.flip) == (4, 'horizontal')
    for dataset, written in [(splits.train, train), (splits.test, test)]:
        np.testing.assert_array_equal(dataset.images.numpy(), np.stack(list(written.values())))


def test_resize_and_crop_keeps_the_center(tmp_path):
    columns = np.repeat(np.arange(0, 240, 6, dtype=np.uint8), 2)  # 80 wide, 40 high: a ramp
    image = np.broadcast_to(columns[None, :, None], (40, 80, 3))
    resized = preprocessing.resize_and_crop(image, 20, 20)
    assert resized.shape == (20, 20, 3)
    # half the size, and of its 40 columns the middle 20
    np.testing.assert_allclose(resized[0, :, 0], np.arange(0, 240, 6)[10:30], atol=3)
    untouched = preprocessing.resize_and_crop(image, 40, 30)
    np.testing.assert_array_equal(untouched, image[5:35, 25:55])


def reference_cubic(row, size):
    """Resizes a row of pixels by cubic interpolation (a = -0.75), with repeated border pixels."""
    result = np.zeros(size)
    for i in range(size):
        x = (i + 0.5) * len(row) / size - 0.5
        for k in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - k)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            result[i] += row[min(max(k, 0), len(row) - 1)] * (near if d <= 1 else far)
    return result


def test_resize_and_crop_is_cubic():
    row = np.array([90, 100, 180, 60, 110, 120, 40, 90], np.uint8)
    image = np.broadcast_to(row[None, :, None], (8, 8, 3))
    expected = reference_cubic(row, 12)
    resized = preprocessing.resize_and_crop(image, 12, 12)
    np.testing.assert_allclose(resized[0, :, 0], expected, atol=1)


def test_load_splits_reads_large_images_on_demand(tmp_path):
    write_images(tmp_path / 'train', n=5, size=(80, 100))
    test = write_images(tmp_path / 'val', n=2, size=(80, 80))
    splits = data.load_splits('Folder', str(tmp_path), Preprocessing.for_dataset('Folder', 70))
    images, labels, _ = splits.test[torch.tensor([3, 0]), None, torch.arange(2)]
    assert images.shape == (2, 3, 70, 70)
    pixels = np.stack([list(test.values())[i][5:75, 5:75] for i in (3, 0)])  # 80 = 70 * 256 // 224
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    assert labels.tolist() == [1, 0]

    def epoch(nthread):
        state = torch.get_rng_state()
        batches = list(make_loader(splits.train, batch_size=4, nthread=nthread, seed=1))
        assert nthread or torch.equal(torch.get_rng_state(), state)
        return torch.cat([images for images, *_ in batches])

    alone, workers = epoch(0), epoch(2)
    assert alone.shape == (10, 3, 70, 70)
    assert torch.equal(alone, workers)  # pixels depend on the seed, not on the number of workers


def test_random_crop_of_a_uniform_image_is_uniform(tmp_path):
    path = str(tmp_path / 'flat.png')
    cv2.imwrite(path, np.full((50, 60, 3), (30, 20, 10), np.uint8))
    crop = augmentation.read_random_crop(path, 24)
    assert crop.shape == (24, 24, 3)
    assert (crop == (10, 20, 30)).all()


def test_random_crops_have_all_sizes_and_half_are_flipped(tmp_path):
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    path = str(tmp_path / 'ramp.png')
    cv2.imwrite(path, ramp)
    torch.manual_seed(0)
    crops = [augmentation.flip_image(augmentation.read_random_crop(path, 32), 'horizontal', 0, 0)
             [0, :, 0].astype(int) for _ in range(400)]
    rising = np.mean([crop[-1] > crop[0] for crop in crops])
    assert rising == pytest.approx(0.5, abs=0.08)
    widths = np.array([abs(crop[-1] - crop[0]) for crop in crops])
    assert widths.min() >= 10  # 8 % of the area at 3 : 4 is 16 pixels wide
    assert widths.max() >= 58


@pytest.fixture
def photograph(tmp_path):
    """Writes a smooth JPEG image of 402 x 603 pixels, which no reduction divides."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    path = str(tmp_path / 'photograph.jpg')
    cv2.imwrite(path, cv2.resize(noise, (603, 402), interpolation=cv2.INTER_CUBIC))
    return path


@pytest.mark.parametrize('size', [32, 70, 140, 300])
def test_random_crop_of_a_reduced_jpeg_matches_the_full_decoding(photograph, size, monkeypatch):
    def crops():
        torch.manual_seed(1)
        images = [augmentation.read_random_crop(photograph, size) for _ in range(30)]
        return np.stack(images).astype(float)

    reductions, decode = [], augmentation.decode_image
    monkeypatch.setattr(augmentation, 'decode_image',
                        lambda *args: reductions.append((*args, 1)[2]) or decode(*args))
    reduced = crops()
    monkeypatch.setattr(augmentation, 'jpeg_size', lambda content: None)  # forces full decoding
    difference = np.abs(reduced - crops())
    largest = {32: 8, 70: 4, 140: 2, 300: 1}[size]
    assert max(reductions[:30]) == largest  # 402 // 32 = 12, 402 // 70 = 5, ...
    if largest == 1:
        assert difference.max() == 0
    # a corner moves by half a pixel of the reduced image, whose neighbors differ by some 10 of 255
    assert difference.mean() < 5
    assert (difference[np.array(reductions[:30]) == 1] == 0).all()


def test_jpeg_size_reads_the_header(photograph):
    content = Path(photograph).read_bytes()
    assert image_files.jpeg_size(content) == (402, 603)
    exif = bytes([0xFF, 0xD8, 0xFF, 0xE1, 0, 4, 0, 0])  # may contain an orientation
    assert image_files.jpeg_size(exif + content[2:]) is None
    assert image_files.jpeg_size(encoded('png')) is None
    for length in range(200):
        assert image_files.jpeg_size(content[:length]) in (None, (402, 603))


def test_list_images_counts_skipped_files(tmp_path, capsys):
    images = write_images(tmp_path)
    for name in ('cat/a.heic', 'cat/b.HEIC', 'dog/c.svg', 'dog/._d.png', 'dog/README'):
        (tmp_path / name).write_bytes(b'nothing')
    for name in ('.ipynb_checkpoints', 'dog/.ipynb_checkpoints'):
        (tmp_path / name).mkdir()
    paths, _, classes = folders.list_images(str(tmp_path))
    assert (sorted(images), ['cat', 'dog']) == (paths, classes)
    error = capsys.readouterr().err
    assert error.startswith(f'{tmp_path}: ')
    assert '7 entries (2 .ipynb_checkpoints, 2 .heic, 1 ._d.png, 1 README, 1 .svg)' in error
    assert error.endswith(f'{", ".join(preprocessing.image_extensions())}\n')
    for path in images:
        if 'cat' in path:
            os.remove(path)
    with pytest.raises(DataError, match='/cat: .*2 .heic: '):
        folders.list_images(str(tmp_path))


def test_list_images_prints_nothing_when_nothing_is_skipped(tmp_path, capfd):
    write_images(tmp_path)
    folders.list_images(str(tmp_path))
    assert capfd.readouterr() == ('', '')


def test_load_splits_names_the_invalid_folder_or_file(tmp_path):
    with pytest.raises(DataError, match='train: no such folder'):
        data.load_splits('Folder', str(tmp_path))
    write_images(tmp_path / 'train')
    with pytest.raises(DataError, match='val: no such folder'):
        data.load_splits('ImageNet', str(tmp_path))
    write_images(tmp_path / 'test', classes=('cat', 'eel'))
    with pytest.raises(DataError, match='train and .*test: .* eel$'):
        data.load_splits('Folder', str(tmp_path))
    (tmp_path / 'test' / 'eel').rename(tmp_path / 'test' / 'dog')
    corrupt = tmp_path / 'train' / 'dog' / '1.png'
    corrupt.write_bytes(corrupt.read_bytes()[:40])
    with pytest.raises(DataError, match=f'^{corrupt}: not a readable image'):
        data.load_splits('Folder', str(tmp_path))
    cv2.imwrite(str(corrupt.with_suffix('.jpg')), np.full((32, 32, 3), 90, np.uint8))
    corrupt.unlink()
    corrupt = corrupt.with_suffix('.jpg')
    data.load_splits('Folder', str(tmp_path))
    corrupt.write_bytes(corrupt.read_bytes()[:-60])  # OpenCV decodes missing rows as gray
    with pytest.raises(DataError, match=f'^{corrupt}: not a readable image'):
        data.load_splits('Folder', str(tmp_path))
    for image in (tmp_path / 'train' / 'dog').iterdir():
        image.unlink()
    with pytest.raises(DataError, match='train/dog: a class folder without images'):
        data.load_splits('Folder', str(tmp_path))
    (tmp_path / 'train' / 'dog').rmdir()
    with pytest.raises(DataError, match='train: 1 class folders'):
        data.load_splits('Folder', str(tmp_path))


SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8), (120, 90)
)


def encoded(ending, image=SMOOTH, *options):
    return cv2.imencode(f'.{ending}', image, options)[1].tobytes()


def corrupt_file(kind):
    """Returns the content of a corrupt or oversized file and a pattern of the error."""
    before, frame, tables, scan = jpeg_parts(encoded('jpg'))
    bmp, side = encoded('bmp'), struct.pack('<i', 60_000)
    return {
        'huge PNG': (png_of(100_000, 100_000), '100000 x 100000 pixels: .*MAX_PIXELS'),
        'huge WebP': (b'RIFF\0\0\0\0WEBPVP8X\x0a' + bytes(7) + 2 * b'\x6f\x11\x01',
                      'pixels: .* 89,478,485 .MAX_PIXELS' if PIL.__version__ >= '13'
                      else 'not a readable'),  # older versions do not read the size
        'large PNG': (png_of(20_000, 20_000), '20000 x 20000 pixels: .* 89,478,485 .MAX_PIXELS'),
        'JPEG without height': (
            before + frame[:5] + b'\0\0' + frame[7:] + tables + scan, 'of 120 x 0 pixels'),
        'huge BMP': (bmp[:18] + 2 * side + bmp[26:], 'pixels: .*MAX_PIXELS'),
        'large BMP': (bmp[:18] + 2 * struct.pack('<i', 10_000) + bmp[26:],
                      '10000 x 10000 pixels: .*MAX_PIXELS'),
        'BMP without width': (bmp[:18] + bytes(4) + bmp[22:], 'not a readable'),
        'huge Sun raster': (
            struct.pack('>8I', 0x59A66A95, 100_000, 100_000, 24, 0, 1, 0, 0),
            'pixels: .*MAX_PIXELS'),
        'huge PAM, which Pillow does not identify': (
            b'P7\nWIDTH 100000\nHEIGHT 100000\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n',
            'not a readable'),
        'long JPEG': (encoded('jpg', np.zeros((1, 65_500, 3), np.uint8)),
                      '16768000 x 256 pixels after resizing: .*MAX_PIXELS'),
    }[kind]


@pytest.mark.parametrize('kind', [
    'huge PNG', 'large PNG', 'huge WebP', 'JPEG without height', 'huge BMP', 'large BMP',
    'BMP without width', 'huge Sun raster', 'huge PAM, which Pillow does not identify', 'long JPEG',
])
def test_image_readers_name_a_corrupt_or_oversized_file(tmp_path, capfd, kind):
    content, message = corrupt_file(kind)
    path = tmp_path / 'corrupt'
    path.write_bytes(content)
    readers = [preprocessing.read_test_image, augmentation.read_random_crop]
    for read in readers[: 1 if kind == 'long JPEG' else 2]:  # a crop of it is small
        with pytest.raises(DataError, match=f'^{path}: .*{message}') as raised:
            read(str(path), 224)
        assert '\n' not in str(raised.value)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('ending', ['png', 'jpg', 'bmp', 'ppm', 'pgm', 'webp', 'tif', 'gif'])
def test_decode_image_checks_max_pixels_before_decoding(monkeypatch, ending):
    for options in {'jpg': [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)],
                    'webp': [(), (cv2.IMWRITE_WEBP_QUALITY, 80)]}.get(ending, [()]):
        image = SMOOTH[..., 0] if ending == 'pgm' else SMOOTH
        content = encoded(ending, image, *options)
        assert image_files.decode_image(content, 'image').shape == (90, 120, 3)
        with monkeypatch.context() as patch:
            patch.setattr(image_files, 'MAX_PIXELS', 90 * 120 - 1)
            patch.setattr(cv2, 'imdecode', None)  # is not called
            with pytest.raises(DataError, match='^image: 120 x 90 pixels: .* 10,799 .MAX_PIXELS'):
                image_files.decode_image(content, 'image')


def test_decode_image_decodes_formats_that_pillow_does_not_identify():
    for content in (encoded('pfm', SMOOTH.astype(np.float32)), encoded('pam')):
        with pytest.raises(PIL.UnidentifiedImageError):
            PIL.Image.open(io.BytesIO(content))
        assert image_files.decode_image(content, 'image').shape == (90, 120, 3)


def test_decode_image_leaves_the_warning_filters_as_they_are():
    bomb, before = corrupt_file('large BMP')[0], [*warnings.filters]

    def decode(_):
        with pytest.raises(DataError, match='^image: 10000 x 10000 pixels'):
            image_files.decode_image(bomb, 'image')

    with ThreadPool(4) as pool:
        pool.map(decode, range(40))
    assert warnings.filters == before


def test_read_image_detects_truncated_jpeg_files(tmp_path, capfd):
    start, frame, tables, scan = jpeg_parts(encoded('jpg'))
    thumbnail = jpeg_segment(0xE1, b'Exif\0\0' + encoded('jpg', SMOOTH[:32, :32]))
    path = tmp_path / 'image.jpg'

    def read(content):
        path.write_bytes(content)
        return image_files.read_image(str(path))

    plain = start + frame + tables + scan
    with_thumbnail = start[:2] + thumbnail + start[2:] + frame + tables + scan
    progressive = encoded('jpg', SMOOTH, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    for content in (with_thumbnail, progressive):
        for trailing in (b'', bytes(5000), b'\xff\xd8' + bytes(2000), content + bytes(2000)):
            np.testing.assert_array_equal(read(content + trailing), read(content))
    np.testing.assert_array_equal(read(with_thumbnail), read(plain))
    for cut in (2, 60, len(scan) // 2, len(scan), len(scan) + 20):
        for content in (with_thumbnail, plain, progressive):
            for trailing in (b'', bytes(2000)):
                with pytest.raises(DataError, match=f'^{path}: not a readable image$'):
                    read(content[:-cut] + trailing)
    assert capfd.readouterr().err == ''


def test_jpeg_size_is_none_when_exif_data_follow_the_frame_header():
    start, frame, tables, scan = jpeg_parts(encoded('jpg'))
    content = start + frame + ROTATED + tables + scan
    assert image_files.decode_image(content, 'image').shape == (120, 90, 3)
    assert image_files.jpeg_size(content) is None


@pytest.mark.parametrize('ending', [
    'png', 'bmp', 'ppm', 'webp', 'tif', 'gif', 'pnm', 'jp2', 'avif',
])
def test_decode_image_rejects_truncated_files_without_output(capfd, ending):
    if not cv2.haveImageWriter(f'image.{ending}'):
        pytest.skip('this OpenCV has no such decoder')
    content = encoded(ending)
    for length in (20, len(content) // 2, len(content) - 20):
        with pytest.raises(DataError, match='^image: not a readable image'):
            image_files.decode_image(content[:length], 'image')
    assert capfd.readouterr().err == ''


def test_read_image_rejects_special_and_large_files(tmp_path, monkeypatch):
    errors, fifo = [], tmp_path / 'fifo.png'
    os.mkfifo(fifo)

    def read(path):
        try:
            preprocessing.read_test_image(str(path), 32)
        except DataError as error:
            errors.append(str(error))

    for path in (fifo, '/dev/null', '/dev/zero'):
        thread = threading.Thread(target=read, args=[path], daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert errors == [f'{path}: not a regular file' for path in (fifo, '/dev/null', '/dev/zero')]
    link = tmp_path / 'link.png'
    link.symlink_to(tmp_path / 'image.png')
    (tmp_path / 'image.png').write_bytes(encoded('png'))
    assert image_files.read_image(str(link)).shape == (90, 120, 3)
    monkeypatch.setattr(image_files, 'MAX_BYTES', 1000)
    with pytest.raises(DataError, match=r'bytes: .* 1,000 \(MAX_BYTES\)'):
        image_files.read_image(str(link))


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'P', '1', 'CMYK'])
def test_image_to_array_transposes_pil_images_by_exif_orientation(mode):
    image = PIL.Image.fromarray(SMOOTH).convert(mode)
    image.getexif()[0x112] = 6  # rotate by 90 degrees
    expected = np.rot90(np.array(PIL.Image.fromarray(SMOOTH).convert(mode).convert('RGB')), -1)
    np.testing.assert_array_equal(preprocessing.image_to_array(image), expected)
    pixels = preprocessing.image_to_array(image, rgb=False)
    assert pixels.shape == (120, 90, 1 if mode == 'L' else 3)
    np.testing.assert_array_equal(pixels, expected[..., : pixels.shape[2]])


def test_image_to_array_is_the_same_for_paths_arrays_and_tensors(tmp_path):
    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), SMOOTH[..., ::-1])
    tensor = torch.from_numpy(SMOOTH).permute(2, 0, 1)
    read_only = SMOOTH.copy()
    read_only.flags.writeable = False
    for image in (path, str(path), SMOOTH, read_only, tensor, tensor.float() / 255,
                  (tensor / 255).double().requires_grad_(), PIL.Image.fromarray(SMOOTH)):
        for rgb in (True, False):
            pixels = preprocessing.image_to_array(image, rgb)
            np.testing.assert_array_equal(pixels, SMOOTH)
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous
            assert pixels.flags.writeable


@pytest.mark.parametrize('image', [SMOOTH[..., 0], SMOOTH[..., :1], SMOOTH[..., [0, 1, 2, 0, 1]]])
def test_image_to_array_takes_other_channels_when_rgb_is_false(image):
    channels = image.reshape(90, 120, -1)
    tensor = torch.from_numpy(channels.copy()).permute(2, 0, 1)
    for source in (image, channels, tensor):
        np.testing.assert_array_equal(preprocessing.image_to_array(source, rgb=False), channels)
        with pytest.raises(DataError, match=r'uint8 \(.*expected .*\(H, W, 3\)'):
            preprocessing.image_to_array(source)


def test_preprocessing_takes_the_channels_of_the_model():
    gray, five = SMOOTH[..., :1], SMOOTH[..., [0, 1, 2, 0, 1]]
    for image in (gray, five):
        channels = image.shape[2]
        preprocess = Preprocessing('CIFAR10', 24, (0.25,) * channels, (0.5,) * channels)
        expected = np.stack([  # each channel on its own; 90 x 120 pixels to 24 x 32
            cv2.resize(image[..., i], (32, 24), interpolation=cv2.INTER_CUBIC)[:, 4:28]
            for i in range(channels)])
        tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
        for source in (image, tensor, image[..., 0] if channels == 1 else image):
            torch.testing.assert_close(
                preprocess(source), (torch.from_numpy(expected) / 255 - 0.25) / 0.5)
    of_gray = Preprocessing('CIFAR10', 24, (0.25,), (0.5,))
    assert torch.equal(of_gray(PIL.Image.fromarray(gray[..., 0])), of_gray(gray))
    assert torch.equal(of_gray(np.repeat(gray, 3, axis=2)), of_gray(gray))
    for channels in (1, 5):
        preprocess = Preprocessing('CIFAR10', 24, (0.5,) * channels, (0.5,) * channels)
        with pytest.raises(DataError, match=f'the image has 2 channels: expected {channels}'):
            preprocess(SMOOTH[..., :2])


@pytest.mark.parametrize(('image', 'message'), [
    (SMOOTH / 255, r'float64 \(90, 120, 3\)'),
    (torch.full((3, 9, 9), 1.5), r'float32 \(3, 9, 9\)'),
    (torch.full((3, 9, 9), torch.nan), r'float32 \(3, 9, 9\)'),
    (torch.zeros(3, 0, 0), r'float32 \(3, 0, 0\)'),
    (SMOOTH[None], r'uint8 \(1, 90, 120, 3\)'),
    (None, r'object \(\)'),
    (PIL.Image.fromarray(SMOOTH[..., 0].astype(np.uint16)), 'mode I;16'),
    (PIL.Image.fromarray(SMOOTH[..., 0].astype(np.float32)), 'mode F'),
])
@pytest.mark.parametrize('rgb', [True, False])
def test_image_to_array_rejects_other_values(image, message, rgb):
    with pytest.raises(DataError, match=message):
        preprocessing.image_to_array(image, rgb)


def test_image_readers_name_the_missing_package(tmp_path, monkeypatch):
    for ending in ('jpg', 'bmp'):
        (tmp_path / f'image.{ending}').write_bytes(encoded(ending))
    monkeypatch.setitem(sys.modules, 'PIL', None)
    assert preprocessing.image_to_array(tmp_path / 'image.jpg').shape == (90, 120, 3)
    with pytest.raises(DataError, match='image.bmp: .*install pillow'):
        image_files.read_image(tmp_path / 'image.bmp')
    image_files.import_opencv.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'cv2', None)
        for image in (tmp_path / 'image.jpg', SMOOTH):
            with pytest.raises(DataError, match='install opencv-python-headless'):
                preprocessing.image_to_array(image)


def test_load_splits_ends_its_threads_when_an_image_is_corrupt(tmp_path, monkeypatch):
    write_images(tmp_path / 'train', n=70)  # more than one thread takes at a time
    write_images(tmp_path / 'test')

    def slow(path, size):
        if path.endswith('train/cat/0.png'):
            raise DataError(path)
        time.sleep(0.01)
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(folders, 'read_test_image', slow)
    before = set(threading.enumerate())
    with pytest.raises(DataError, match='cat/0.png'):
        data.load_splits('Folder', str(tmp_path))
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if not isinstance(thread, TMonitor)]  # of tqdm


@pytest.mark.parametrize('name', ['CIFAR10', 'CIFAR100'])
def test_load_splits_says_where_to_put_cifar_when_the_download_fails(tmp_path, name, monkeypatch):
    dataset = getattr(data.torchvision.datasets, name)
    monkeypatch.setattr(dataset, 'url', 'http://127.0.0.1:9/nothing')
    with pytest.raises(DataError, match=f'{name} is not in .* put {dataset.filename}'):
        data.load_splits(name, str(tmp_path))


def test_load_splits_cifar(tmp_path, monkeypatch):
    class Few:
        """Replaces torchvision's dataset, whose files tests cannot download."""

        classes = ['cat', 'dog']

        def __init__(self, root, train, download):
            self.data = np.full((4 if train else 2, 32, 32, 3), 7, np.uint8)
            self.targets = [0, 1] * (2 if train else 1)

    monkeypatch.setattr(data.torchvision.datasets, 'CIFAR100', Few)
    splits = data.load_splits('CIFAR100', str(tmp_path), pad=2)
    assert (splits.classes, splits.train.augmentation.pad) == (['cat', 'dog'], 2)
    assert (splits.train.augmentation.flip, splits.test.labels.tolist()) == ('horizontal', [0, 1])
    splits = data.load_splits('CIFAR100', str(tmp_path), training=False)
    assert (splits.train, splits.test.labels.tolist()) == (None, [0, 1])


def test_memory_images_to_device_keep_their_batches():
    splits = data.load_splits('Digits', pad=4, flip='all')
    moved = splits.train.to(torch.device('cpu'))
    batch = torch.tensor([5, 3, 900, 7]), 11, torch.tensor([0, 3])
    for value, expected in zip(moved[batch], splits.train[batch]):
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected))
    assert splits.to(torch.device('cpu')).train is splits.train  # only a GPU takes copies


def test_fits_in_memory_is_a_quarter_of_free_gpu_memory(monkeypatch):
    free = []
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free[-1], 80e9))
    for free_bytes, expected in ((400, True), (399, False)):
        free.append(free_bytes)
        assert data.fits_in_memory(100, torch.device('cuda')) is expected
    assert not data.fits_in_memory(0, torch.device('cpu'))


@pytest.mark.parametrize(('kind', 'channels'), [(b'P5', 1), (b'P6', 3)])
def test_decode_image_refuses_pnm_files_whose_maximum_opencv_ignores(kind, channels):
    def white(maximum, size):
        header = b'%s # comment\n2 2\n%d\n' % (kind, maximum)
        return header + 4 * channels * maximum.to_bytes(size, 'big')

    for maximum, size in ((255, 1), (65535, 2)):
        assert (decode_image(white(maximum, size), 'white.ppm') == 255).all()
    for maximum, size in ((100, 1), (1023, 2)):
        with pytest.raises(DataError, match=f'maximum of its pixels is {maximum}'):
            decode_image(white(maximum, size), 'white.ppm')


def test_from_arrays_refuses_test_labels_that_the_training_set_lacks():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match='labels are 0 to 200: expected 0 to 1'):
        data.DataSplits.from_arrays((images, [0, 1, 0, 1]), (images, [0, 1, 0, 200]))
