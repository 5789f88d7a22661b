"""From files to batches: pixels, order and augmentation."""

import os
import struct
import threading
import time

import cv2
import numpy as np
import pytest
import torch

from corruption import TURNED, jpeg_parts, jpeg_segment, png_of
from diracnets import image_headers, preprocessing
from diracnets.preprocessing import Preprocessing
from runs import write_images
from training import augmentation, data
from training.datasets import IGNORED
from training.loader import make_loader


@pytest.fixture
def memory():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 12, 12, 3), dtype=np.uint8)
    return images, data.MemoryImages(images, np.arange(50)).augmented(pad=3)


def test_normalise():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 5), dtype=np.uint8)
    for kind, mean, std in [
        ('CIFAR10', np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255),
        ('CIFAR100', np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255),
        ('ImageNet', np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])),
    ]:
        expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
        inputs = preprocessing.normalize(torch.from_numpy(images), Preprocessing.for_dataset(kind), torch.float64)
        np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-6, atol=1e-6)
        inputs = preprocessing.normalize(torch.from_numpy(images), Preprocessing.for_dataset(kind))
        assert inputs.dtype == torch.float32


def test_images_without_seed_are_left_alone(memory):
    images, dataset = memory
    batch, labels, whole = dataset[torch.tensor([7, 3]), None, torch.arange(2)]
    assert whole == 2
    assert batch.shape == (2, 3, 12, 12)
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1).numpy(), images[[7, 3]])
    assert labels.tolist() == [7, 3]


def test_augmentation_is_a_crop_of_the_padded_image(memory):
    images, dataset = memory
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode='reflect')
    found = set()
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
            found |= where
    assert len(found) == 7 * 7 * 2  # every place, both ways


def test_padding_with_zeros(memory):
    images, _ = memory
    dataset = data.MemoryImages(images, np.arange(50)).augmented(
        pad=3, flip='none', reflect=False)
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)))
    found = set()
    for seed in range(20):
        batch, labels, _ = dataset[torch.arange(50), seed, torch.arange(50)]
        for image, label in zip(batch.permute(0, 2, 3, 1).numpy(), labels.tolist()):
            where = [
                (top, left) for top in range(7) for left in range(7)
                if np.array_equal(image, padded[label, top : top + 12, left : left + 12])
            ]
            assert len(where) == 1
            found.add(where[0])
    assert len(found) == 7 * 7


def test_without_augmentation_only_the_order_is_random(memory):
    images, dataset = memory
    batches = list(make_loader(dataset.augmented(crop=False, flip='none'), 16, seed=1))
    labels = torch.cat([labels for _, labels, _ in batches])
    assert labels.tolist() != list(range(50))
    pixels = torch.cat([images for images, _, _ in batches]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels, images[labels.numpy()])


@pytest.mark.parametrize('kind', ['memory', 'files'])
def test_images_held_out(memory, tmp_path, kind):
    dataset = memory[1]
    if kind == 'files':
        write_images(tmp_path, n=25, size=(20, 20))
        dataset = data.ImageFiles(*data.list_images(str(tmp_path))[:2], size=16)
    train, val = data.hold_out(dataset, 8)
    assert (len(train), len(val)) == (42, 8)

    def pixels(images):
        return {images[torch.tensor([i]), None, torch.arange(1)][0].numpy().tobytes()
                for i in range(len(images))}

    assert pixels(train) | pixels(val) == pixels(dataset)
    assert not pixels(train) & pixels(val)
    assert pixels(data.hold_out(dataset, 8)[1]) == pixels(val)
    with pytest.raises(data.DataError, match='50 images to hold out: expected fewer than all 50'):
        data.hold_out(dataset, 50)


def test_padding_as_wide_as_the_image_is_refused():
    with pytest.raises(data.DataError, match='randomcrop_pad 8: expected less than .* 8'):
        data.MemoryImages(np.zeros((1, 8, 8, 3), np.uint8), [0]).augmented(pad=8)


def test_an_epoch_sees_every_image_once_and_follows_from_the_seed(memory):
    _, dataset = memory

    def epoch(seed, number):
        loader = make_loader(dataset, batch_size=16, seed=seed)
        loader.sampler.set_epoch(number)
        assert len(loader) == 4
        images, labels, whole = zip(*loader)
        assert whole == tuple(map(len, labels))
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
def test_shares_of_all_ranks_are_the_whole_batch(memory, tmp_path, kind, world):
    dataset = memory[1]
    if kind == 'files':
        write_images(tmp_path, n=26, size=(24, 20))
        dataset = data.ImageFiles(*data.list_images(str(tmp_path))[:2], size=16).augmented()
    n = len(dataset)
    for seed in (None, 1):
        alone = list(make_loader(dataset, 12, 0, seed))  # the last batch: 2 or 4 of 50 or 52
        ranks = [list(make_loader(dataset, 12, 0, seed, rank, world)) for rank in range(world)]
        for whole, shares in zip(alone, zip(*ranks)):
            counted = [labels != IGNORED for _, labels, _ in shares]
            sizes = [int(c.sum()) for c in counted]
            assert max(sizes) - min(sizes) <= 1
            images = torch.cat([images[c] for (images, _, _), c in zip(shares, counted)])
            assert torch.equal(images, whole[0])
            assert torch.equal(
                torch.cat([labels[c] for (_, labels, _), c in zip(shares, counted)]), whole[1]
            )
            assert {share[2] for share in shares} == {len(whole[1])}
            assert all(len(labels) for _, labels, _ in shares)
        assert sum(len(batch[1]) for batch in alone) == n


def test_steps_that_are_done_are_left_out(memory):
    loader = make_loader(memory[1], 16, seed=1)
    batches = list(loader)
    loader.sampler.set_epoch(1, step=2)
    rest = list(loader)
    assert len(rest) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, batches[2:]))


def test_inputs_of_data_sets():
    names = ('CIFAR10', 'CIFAR100', 'Digits', 'ImageNet', 'Folder')
    assert [(i.kind, i.size) for i in map(Preprocessing.for_dataset, names)] == [
        ('CIFAR10', 32), ('CIFAR100', 32), ('CIFAR10', 32), ('ImageNet', 224), ('CIFAR10', 32)
    ]
    folders = [Preprocessing.for_dataset('Folder', size) for size in (64, 65)]
    assert [(i.kind, i.size) for i in folders] == [('CIFAR10', 64), ('ImageNet', 65)]
    assert folders[1].mean == (0.485, 0.456, 0.406)
    # what older checkpoints say of data sets that have a size of their own
    assert Preprocessing.from_args({'dataset': 'ImageNet', 'image_size': 32}) == Preprocessing.for_dataset('ImageNet')
    for arguments in (('ImageNet', 32), ('CIFAR10', 48), ('Folder', -3), ('Folder', 0)):
        with pytest.raises(ValueError, match=f'image_size {arguments[1]}: expected'):
            Preprocessing.for_dataset(*arguments)
    with pytest.raises(ValueError, match="'MNIST': expected one of CIFAR10, .*, Folder"):
        Preprocessing.for_dataset('MNIST')


def test_images_that_come_in_one_size():
    with pytest.raises(data.DataError, match='Digits has images of 32 pixels: expected 48'):
        data.load_splits('Digits', preprocess=Preprocessing.for_dataset('Folder', 48))


def test_test_batches_come_in_order(memory):
    images, dataset = memory
    loader = make_loader(dataset, batch_size=20)
    batches, labels, _ = zip(*loader)
    assert torch.cat(labels).tolist() == list(range(50))
    np.testing.assert_array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), images)


def test_digits():
    sets = data.load_splits('Digits', pad=0)
    assert (len(sets.train), len(sets.test), len(sets.classes)) == (1437, 360, 10)
    assert sets.train.augmentation.flip == 'none'
    images = torch.cat([sets.train.images, sets.test.images])
    assert images.shape == (1797, 32, 32, 3)
    assert (images.min(), images.max()) == (0, 255)
    assert torch.equal(images[..., 0], images[..., 2])
    from sklearn.datasets import load_digits

    # the mean of each digit survives the resizing; ours are in another order
    means = np.sort(load_digits().images.mean((1, 2)) / 16 * 255)
    ours = np.sort(images[..., 0].double().mean((1, 2)).numpy())
    assert np.abs(means - ours).max() < 6
    labels = torch.cat([sets.train.labels, sets.test.labels])
    assert labels.bincount().tolist() == np.bincount(load_digits().target).tolist()
    again = data.load_splits('Digits', training=False)
    assert again.train is None
    assert torch.equal(sets.test.images, again.test.images)


@pytest.mark.parametrize('test_folder', ['test', 'val'])
def test_folder_of_small_images(tmp_path, test_folder):
    train = write_images(tmp_path / 'train', n=3)
    test = write_images(tmp_path / test_folder, n=2, seed=1)
    (tmp_path / 'train' / 'cat' / 'notes.txt').write_text('not an image')
    sets = data.load_splits('Folder', str(tmp_path), pad=4)
    assert sets.classes == ['cat', 'dog']
    assert sets.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (sets.train.augmentation.pad, sets.train.augmentation.flip) == (4, 'horizontal')
    for dataset, written in [(sets.train, train), (sets.test, test)]:
        np.testing.assert_array_equal(dataset.images.numpy(), np.stack(list(written.values())))


def test_other_sizes_are_resized_and_cropped(tmp_path):
    columns = np.repeat(np.arange(0, 240, 6, dtype=np.uint8), 2)  # 80 wide, 40 high: a ramp
    image = np.broadcast_to(columns[None, :, None], (40, 80, 3))
    resized = preprocessing.resize_and_crop(image, 20, 20)
    assert resized.shape == (20, 20, 3)
    # half the size, and of its 40 columns the middle 20
    np.testing.assert_allclose(resized[0, :, 0], np.arange(0, 240, 6)[10:30], atol=3)
    untouched = preprocessing.resize_and_crop(image, 40, 30)
    np.testing.assert_array_equal(untouched, image[5:35, 25:55])


def slow_cubic(row, size):
    """Cubic interpolation (a = -0.75) of a row of pixels at another size, its ends repeated."""
    result = np.zeros(size)
    for i in range(size):
        x = (i + 0.5) * len(row) / size - 0.5
        for k in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - k)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            result[i] += row[min(max(k, 0), len(row) - 1)] * (near if d <= 1 else far)
    return result


def test_interpolation_is_cubic():
    row = np.array([90, 100, 180, 60, 110, 120, 40, 90], np.uint8)
    image = np.broadcast_to(row[None, :, None], (8, 8, 3))
    expected = slow_cubic(row, 12)
    np.testing.assert_allclose(preprocessing.resize_and_crop(image, 12, 12)[0, :, 0], expected, atol=1)


def test_large_images_are_read_as_needed(tmp_path):
    write_images(tmp_path / 'train', n=5, size=(80, 100))
    test = write_images(tmp_path / 'val', n=2, size=(80, 80))
    sets = data.load_splits('Folder', str(tmp_path), Preprocessing.for_dataset('Folder', 70))
    images, labels, _ = sets.test[torch.tensor([3, 0]), None, torch.arange(2)]
    assert images.shape == (2, 3, 70, 70)
    pixels = np.stack([list(test.values())[i][5:75, 5:75] for i in (3, 0)])  # 80 = 70 * 256 // 224
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    assert labels.tolist() == [1, 0]

    def epoch(nthread):
        state = torch.get_rng_state()
        batches = list(make_loader(sets.train, batch_size=4, nthread=nthread, seed=1))
        assert nthread or torch.equal(torch.get_rng_state(), state)
        return torch.cat([images for images, *_ in batches])

    alone, workers = epoch(0), epoch(2)
    assert alone.shape == (10, 3, 70, 70)
    assert torch.equal(alone, workers)  # the seed decides, not the number of workers


def test_random_crop_of_a_flat_image_is_flat(tmp_path):
    path = str(tmp_path / 'flat.png')
    cv2.imwrite(path, np.full((50, 60, 3), (30, 20, 10), np.uint8))
    crop = augmentation.read_random_crop(path, 24)
    assert crop.shape == (24, 24, 3)
    assert (crop == (10, 20, 30)).all()


def test_random_crops_flip_half(tmp_path):
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
    """A JPEG file of 402 x 603 smooth pixels, sides that no reduction divides."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    path = str(tmp_path / 'photograph.jpg')
    cv2.imwrite(path, cv2.resize(noise, (603, 402), interpolation=cv2.INTER_CUBIC))
    return path


@pytest.mark.parametrize('size', [32, 70, 140, 300])
def test_crops_of_reduced_images_have_the_pixels_of_whole_ones(photograph, size, monkeypatch):
    def crops():
        torch.manual_seed(1)
        read = [augmentation.read_random_crop(photograph, size) for _ in range(30)]
        return np.stack(read).astype(float)

    used, decode = [], augmentation.decode_image
    monkeypatch.setattr(augmentation, 'decode_image',
                        lambda *args: used.append((*args, 1)[2]) or decode(*args))
    reduced = crops()
    monkeypatch.setattr(augmentation, 'jpeg_size', lambda content: None)  # which decodes the whole image
    difference = np.abs(reduced - crops())
    largest = {32: 8, 70: 4, 140: 2, 300: 1}[size]
    assert max(used[:30]) == largest  # the smaller side is 402: 402 // 32 = 12, 402 // 70 = 5, ...
    if largest == 1:
        assert difference.max() == 0
    # of 255: a corner moves by half a pixel of the reduced image, whose steps are some 10 levels
    assert difference.mean() < 5
    whole = np.array(used[:30]) == 1
    assert (difference[whole] == 0).all()


def test_size_in_the_head_of_a_jpeg_file(photograph, tmp_path):
    content = np.fromfile(photograph, np.uint8)
    assert image_headers.jpeg_size(content) == (402, 603)
    exif = bytes([0xFF, 0xD8, 0xFF, 0xE1, 0, 4, 0, 0])  # which may say that the image is turned
    assert image_headers.jpeg_size(np.frombuffer(exif + content.tobytes()[2:], np.uint8)) is None
    cv2.imwrite(str(tmp_path / 'image.png'), np.zeros((4, 5, 3), np.uint8))
    assert image_headers.jpeg_size(np.fromfile(tmp_path / 'image.png', np.uint8)) is None
    for length in range(200):
        assert image_headers.jpeg_size(content[:length]) in (None, (402, 603))


def test_skipped_files_are_counted_aloud(tmp_path, capsys):
    images = write_images(tmp_path)
    for name in ('cat/a.gif', 'cat/b.GIF', 'dog/c.avif', 'dog/._d.png', 'dog/README'):
        (tmp_path / name).write_bytes(b'nothing')
    for name in ('.ipynb_checkpoints', 'dog/.ipynb_checkpoints'):
        (tmp_path / name).mkdir()
    paths, _, classes = data.list_images(str(tmp_path))
    assert (sorted(images), ['cat', 'dog']) == (paths, classes)
    assert capsys.readouterr().err == (
        f'{tmp_path}: 7 skipped (2 .ipynb_checkpoints, 2 .gif, 1 ._d.png, 1 README, 1 .avif): '
        f'expected {", ".join(data.IMAGE_EXTENSIONS)}\n')
    for path in images:
        if 'cat' in path:
            os.remove(path)
    with pytest.raises(data.DataError, match='cat: a class folder without an image: 2 .gif; exp'):
        data.list_images(str(tmp_path))


def test_nothing_skipped_is_nothing_said(tmp_path, capfd):
    write_images(tmp_path)
    data.list_images(str(tmp_path))
    assert capfd.readouterr() == ('', '')


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(data.DataError, match='train: no such folder'):
        data.load_splits('Folder', str(tmp_path))
    write_images(tmp_path / 'train')
    with pytest.raises(data.DataError, match='val: no such folder'):
        data.load_splits('ImageNet', str(tmp_path))
    write_images(tmp_path / 'test', classes=('cat', 'eel'))
    with pytest.raises(data.DataError, match='class folders differ: dog, eel'):
        data.load_splits('Folder', str(tmp_path))
    (tmp_path / 'test' / 'eel').rename(tmp_path / 'test' / 'dog')
    broken = tmp_path / 'train' / 'dog' / '1.png'
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(data.DataError, match=f'{broken}: not a readable image'):
        data.load_splits('Folder', str(tmp_path))
    cv2.imwrite(str(broken.with_suffix('.jpg')), np.full((32, 32, 3), 90, np.uint8))
    broken.unlink()
    broken = broken.with_suffix('.jpg')
    data.load_splits('Folder', str(tmp_path))
    broken.write_bytes(broken.read_bytes()[:-60])  # OpenCV would make grey rows of what is missing
    with pytest.raises(data.DataError, match=f'{broken}: not a readable image'):
        data.load_splits('Folder', str(tmp_path))
    for image in (tmp_path / 'train' / 'dog').iterdir():
        image.unlink()
    with pytest.raises(data.DataError, match='train/dog: a class folder without an image'):
        data.load_splits('Folder', str(tmp_path))
    (tmp_path / 'train' / 'dog').rmdir()
    with pytest.raises(data.DataError, match='1 class folders, expected two or more'):
        data.load_splits('Folder', str(tmp_path))


SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8), (120, 90)
)


def encoded(ending, image=SMOOTH, *options):
    return cv2.imencode(f'.{ending}', image, options)[1].tobytes()


def faulty(kind):
    """The bytes of a file of some kind that is no image of 90 x 120, and what is said of it."""
    before, frame, tables, scan = jpeg_parts(encoded('jpg'))
    bmp, side = encoded('bmp'), struct.pack('<i', 60_000)
    return {
        'huge PNG': (png_of(100_000, 100_000), '100000 x 100000 pixels: .*MAX_PIXELS'),
        'large PNG': (png_of(20_000, 20_000), '20000 x 20000 pixels: .* 89,478,485 .MAX_PIXELS'),
        'JPEG without height': (
            before + frame[:5] + b'\0\0' + frame[7:] + tables + scan, 'of 120 x 0 pixels'),
        'BMP with wrong sides': (bmp[:18] + 2 * side + bmp[26:], '60000 x 60000 pixels'),
        'BMP without width': (bmp[:18] + bytes(4) + bmp[22:], 'of 0 x 90 pixels'),
        'Sun raster of a kind not known here': (
            struct.pack('>8I', 0x59A66A95, 100_000, 100_000, 24, 0, 1, 0, 0), 'not a readable'),
        'long JPEG': (encoded('jpg', np.zeros((1, 65_500, 3), np.uint8)),
                      '16768000 x 256 pixels after resizing: .*MAX_PIXELS'),
    }[kind]


@pytest.mark.parametrize('kind', [
    'huge PNG', 'large PNG', 'JPEG without height', 'BMP with wrong sides', 'BMP without width',
    'Sun raster of a kind not known here', 'long JPEG',
])
def test_a_faulty_image_is_a_data_error_that_names_it(tmp_path, capfd, kind):
    content, message = faulty(kind)
    path = tmp_path / 'faulty'
    path.write_bytes(content)
    readers = [preprocessing.read_test_image, augmentation.read_random_crop]
    for read in readers[: 1 if kind == 'long JPEG' else 2]:  # a crop of it is small
        with pytest.raises(data.DataError, match=f'^{path}: .*{message}') as refused:
            read(str(path), 224)
        assert '\n' not in str(refused.value)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('ending', ['png', 'jpg', 'bmp', 'ppm', 'pgm', 'webp', 'tif', 'gif'])
def test_sizes_are_known_before_pixels(tmp_path, monkeypatch, ending):
    for options in {'jpg': [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)],
                    'webp': [(), (cv2.IMWRITE_WEBP_QUALITY, 80)]}.get(ending, [()]):
        image = SMOOTH[..., 0] if ending == 'pgm' else SMOOTH
        content = np.frombuffer(encoded(ending, image, *options), np.uint8)
        assert image_headers.size_in_head(content) == (90, 120)
        assert preprocessing.decode_image(content, 'image').shape == (90, 120, 3)
        for length in range(64):
            assert image_headers.size_in_head(content[:length]) in (None, (90, 120))
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing, 'MAX_PIXELS', 90 * 120 - 1)
            patch.setattr(cv2, 'imdecode', None)  # is not called
            with pytest.raises(data.DataError, match='image: 120 x 90 pixels: expected at most'):
                preprocessing.decode_image(content, 'image')


def test_sizes_in_the_heads_of_rarer_files():
    webp = b'RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0' + b'\x6f\x11\x01' + b'\x9f\x86\x01'
    old_bmp = b'BM' + bytes(12) + struct.pack('<IHH', 12, 70_000 - 65_536, 90)
    down_bmp = b'BM' + bytes(12) + struct.pack('<Iii', 40, 120, -90)
    tiff = b'MM\0*' + struct.pack('>IHHHIHHHHIHH', 8, 2, 257, 3, 1, 90, 0, 256, 3, 1, 120, 0)
    ppm = b'P6 # of a camera\n# 1 2\n120\t90\n255\n'
    for head, size in [(webp, (100_000, 70_000)), (old_bmp, (90, 4464)), (down_bmp, (90, 120)),
                       (tiff, (90, 120)), (ppm, (90, 120)), (b'nothing', None), (b'', None)]:
        assert image_headers.size_in_head(np.frombuffer(head, np.uint8)) == size


def test_jpegs_that_are_whole_and_that_are_cut(tmp_path, capfd):
    before, frame, tables, scan = jpeg_parts(encoded('jpg'))
    thumbnail = jpeg_segment(0xE1, b'Exif\0\0' + encoded('jpg', SMOOTH[:32, :32]))
    path = tmp_path / 'image.jpg'

    def read(content):
        path.write_bytes(content)
        return preprocessing.read_image(str(path))

    whole = read(before + frame + tables + scan)
    progressive = encoded('jpg', SMOOTH, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    parts = before[:2] + thumbnail + before[2:] + frame + tables, scan
    for content in (b''.join(parts), progressive):
        for behind in (b'', bytes(5000), b'\xff\xd8' + bytes(2000), content + bytes(2000)):
            np.testing.assert_array_equal(read(content + behind), read(content))
    np.testing.assert_array_equal(read(b''.join(parts)), whole)
    for cut in (2, 60, len(scan) // 2, len(scan), len(scan) + 20):
        for content in (b''.join(parts), before + frame + tables + scan, progressive):
            for behind in (b'', bytes(2000)):
                with pytest.raises(data.DataError, match=f'{path}: not a readable image$'):
                    read(content[:-cut] + behind)
    assert capfd.readouterr().err == ''


def test_exif_data_behind_the_head_of_the_frame_turn_too(tmp_path):
    before, frame, tables, scan = jpeg_parts(encoded('jpg'))
    content = np.frombuffer(before + frame + TURNED + tables + scan, np.uint8)
    assert preprocessing.decode_image(content, 'image').shape == (120, 90, 3)
    assert image_headers.jpeg_size(content) is None  # which of the sides is the height it does not say


@pytest.mark.parametrize('ending', ['png', 'bmp', 'ppm', 'webp', 'tif', 'gif'])
def test_cut_files_are_refused_without_a_line_of_opencv(tmp_path, capfd, ending):
    content = encoded(ending)
    for length in (20, len(content) // 2, len(content) - 20):
        with pytest.raises(data.DataError, match='^image: not a readable image'):
            preprocessing.decode_image(np.frombuffer(content[:length], np.uint8), 'image')
    assert capfd.readouterr().err == ''


def test_only_ordinary_files_of_some_size_are_read(tmp_path, monkeypatch):
    said, fifo = [], tmp_path / 'fifo.png'
    os.mkfifo(fifo)

    def read(path):
        try:
            preprocessing.read_test_image(str(path), 32)
        except data.DataError as error:
            said.append(str(error))

    for path in (fifo, '/dev/null', '/dev/zero'):
        reading = threading.Thread(target=read, args=[path], daemon=True)
        reading.start()
        reading.join(timeout=10)
        assert not reading.is_alive()
    assert said == [f'{path}: not an ordinary file' for path in (fifo, '/dev/null', '/dev/zero')]
    link = tmp_path / 'link.png'
    link.symlink_to(tmp_path / 'image.png')
    (tmp_path / 'image.png').write_bytes(encoded('png'))
    assert preprocessing.read_image(str(link)).shape == (90, 120, 3)
    monkeypatch.setattr(preprocessing, 'MAX_BYTES', 1000)
    with pytest.raises(data.DataError, match=r'bytes: expected at most 1,000 \(MAX_BYTES\)'):
        preprocessing.read_image(str(link))


def test_no_thread_reads_on_when_an_image_is_faulty(tmp_path, monkeypatch):
    write_images(tmp_path / 'train', n=70)  # more than one thread takes at a time
    write_images(tmp_path / 'test')

    def slow(path, size):
        if path.endswith('cat/0.png'):
            raise data.DataError(path)
        time.sleep(0.01)
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(data, 'read_test_image', slow)
    before = set(threading.enumerate())
    with pytest.raises(data.DataError, match='cat/0.png'):
        data.load_splits('Folder', str(tmp_path))
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize('name', ['CIFAR10', 'CIFAR100'])
def test_cifar_that_cannot_be_downloaded(tmp_path, name, monkeypatch):
    dataset = getattr(data.torchvision.datasets, name)
    monkeypatch.setattr(dataset, 'url', 'http://127.0.0.1:9/nothing')
    with pytest.raises(data.DataError, match=f'{name} is not in .* put {dataset.filename}'):
        data.load_splits(name, str(tmp_path))


def test_cifar(tmp_path, monkeypatch):
    class Few:
        """Stands in for the files of torchvision's data set, which tests cannot download."""

        classes = ['cat', 'dog']

        def __init__(self, root, train, download):
            self.data = np.full((4 if train else 2, 32, 32, 3), 7, np.uint8)
            self.targets = [0, 1] * (2 if train else 1)

    monkeypatch.setattr(data.torchvision.datasets, 'CIFAR100', Few)
    sets = data.load_splits('CIFAR100', str(tmp_path), pad=2)
    assert (sets.classes, sets.train.augmentation.pad) == (['cat', 'dog'], 2)
    assert (sets.train.augmentation.flip, sets.test.labels.tolist()) == ('horizontal', [0, 1])
    sets = data.load_splits('CIFAR100', str(tmp_path), training=False)
    assert (sets.train, sets.test.labels.tolist()) == (None, [0, 1])


def test_a_device_makes_the_same_batches():
    sets = data.load_splits('Digits', pad=4, flip='all')
    moved = sets.train.to(torch.device('cpu'))
    batch = torch.tensor([5, 3, 900, 7]), 11, torch.tensor([0, 3])
    for found, expected in zip(moved[batch], sets.train[batch]):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert sets.to(torch.device('cpu')).train is sets.train  # images stay where there is no GPU


def test_images_lie_in_the_memory_of_a_gpu_where_they_fit(monkeypatch):
    free = []
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free[-1], 80e9))
    for free_bytes, expected in ((400, True), (399, False)):
        free.append(free_bytes)
        assert data.fits_in_memory(100, torch.device('cuda')) is expected
    assert not data.fits_in_memory(0, torch.device('cpu'))
