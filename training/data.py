"""From files and arrays to data sets: uint8 images (N, C, H, W), of files RGB, and labels (N,).

`load` gives a training and a test set by name, `DataSplits.from_arrays` those that Python has; training/batches.py
makes batches of one of them. `diracnets.preprocessing.normalise` is the last step, on the device that trains.
"""

import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool

import cv2
import numpy as np
import torch
import torchvision
from torch.utils.data import Dataset
from tqdm import tqdm

from diracnets.preprocessing import (
    IMAGE_EXTENSIONS,
    IMAGE_SIZES,
    MAX_SMALL,
    DataError,
    Preprocessing,
    read_test_image,
)
from training.datasets import IGNORED, DatasetImages, ImageFiles, MemoryImages
from training.distributed import all_reduce, rank, world_size
from training.loader import iterate_batches, make_loader

MIN_PIXELS = 8  # of a side of an image


def default_flip(name):
    """How the training images of a data set are mirrored by default, one of augment.FLIPS."""
    return 'none' if name == 'Digits' else 'horizontal'  # a 2 is no 5


@dataclass
class DataSplits:
    """A training and a test set, their class names, and a validation set if one is held out."""

    train: Dataset  # None where there is only testing to be done
    test: Dataset
    classes: list
    val: Dataset = None
    name: str = ''  # by which `load` was asked for it; of images that Python has, none

    @classmethod
    def from_arrays(cls, train, test, classes=None):
        """DataSplits of one's own, for train.main: each of train and test is a pair or a Dataset.

        A pair is of images, uint8 (N, S, S) or (N, S, S, C), and labels (N,), counted from 0, as
        arrays or tensors. Of a torch Dataset see DatasetImages. train: None, to test only;
        classes: their names, without which those of the Dataset or the numbers of the labels are
        taken. Raises DataError for what cannot be trained on.
        """
        given = [images for images in (train, test) if images is not None]
        for images in given:
            if isinstance(images, (tuple, list)) and len(images) != 2:
                raise DataError(f'{len(images)} arrays: expected images and labels')
        names = [str(name) for name in (_names(given) if classes is None else classes)]
        if len(names) < 2:
            raise DataError(f'{len(names)} classes: expected two or more')
        sets = [_given(images, len(names)) for images in given]
        if sets[0].shape != sets[-1].shape:
            raise DataError(f'training images are {sets[0].shape}, test images {sets[-1].shape}: '
                            'expected the same')
        return cls(sets[0] if sets[1:] else None, sets[-1], names)

    def __str__(self):
        numbers = [len(images) for images in (self.train, self.test) if images is not None]
        return f'{" + ".join(map(str, numbers))} images {self.test.shape}'

    def to(self, device):
        """The same, its images in memory moved to a GPU's, if a quarter of that holds them."""
        moved = {}
        for split in ('train', 'val', 'test'):
            images = getattr(self, split)
            if isinstance(images, MemoryImages) and fits_in_memory(images.images.nbytes, device):
                moved[split] = images.to(device)
        return replace(self, **moved)

    def augmented(self, **augmentation):
        """The same, its training images augmented: see `Images.augmented`."""
        train = None if self.train is None else self.train.augmented(**augmentation)
        return replace(self, train=train)


def _names(given):
    """The class names of Datasets or, in pairs, the numbers that stand for classes."""
    for images in given:
        if hasattr(images, 'classes'):
            return images.classes
        if not isinstance(images, (tuple, list)):
            raise DataError('a Dataset without classes: expected their names')
    return range(1 + max(int(np.max(np.asarray(labels), initial=-1)) for _, labels in given))


def _given(images, num_classes):
    """A pair of arrays, or a Dataset, as Images of so many classes; raises DataError."""
    if not isinstance(images, (tuple, list)):
        images = DatasetImages(images, num_classes)
    else:
        pixels, labels = (torch.as_tensor(np.ascontiguousarray(array)) for array in images)
        if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4):
            raise DataError(f'images are {pixels.dtype} {tuple(pixels.shape)}: expected uint8 '
                            '(N, S, S) or (N, S, S, C)')
        if labels.is_floating_point() or labels.shape != pixels.shape[:1]:
            raise DataError(f'labels are {labels.dtype} {tuple(labels.shape)}: expected numbers of '
                            f'classes ({len(pixels)},)')
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise DataError(f'labels are {labels.min()} to {labels.max()}: expected 0 to '
                            f'{num_classes - 1}')
        images = MemoryImages(pixels, labels.long())
    height, width, _ = images.shape
    if len(images) == 0 or height != width or height < MIN_PIXELS:
        raise DataError(f'{len(images)} images of {height} x {width} pixels: expected square ones '
                        f'of {MIN_PIXELS} or more')
    return images


def fits_in_memory(nbytes, device):
    """Whether so many bytes of images leave room for a training in the memory of a GPU."""
    if device.type != 'cuda':
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= free / 4


# ---------------------------------------------------------------- from names to data sets


def list_images(folder):
    """Lists a folder of class folders: (paths, labels, class names), all sorted.

    What is hidden, and what has another ending than those of images, is left out, and stderr says
    how much that is. Raises DataError for a missing folder, fewer than two classes, or a class
    without an image.
    """
    if not os.path.isdir(folder):
        raise DataError(f'{folder}: no such folder; expected one folder of images for each class')
    folders = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    classes = [name for name in folders if not name.startswith('.')]
    skipped = [name for name in folders if name.startswith('.')]
    if len(classes) < 2:
        raise DataError(f'{folder}: {len(classes)} class folders, expected two or more')
    paths, labels = [], []
    for label, name in enumerate(classes):
        there = sorted(os.listdir(os.path.join(folder, name)))
        files = [file for file in there
                 if file.lower().endswith(IMAGE_EXTENSIONS) and not file.startswith('.')]
        others = sorted({*there} - {*files})
        if not files:
            held = f': {_kinds(others)}; expected {", ".join(IMAGE_EXTENSIONS)}' if others else ''
            raise DataError(f'{os.path.join(folder, name)}: a class folder without an image{held}')
        paths += [os.path.join(folder, name, file) for file in files]
        labels += [label] * len(files)
        skipped += others
    if skipped and rank() == 0:
        print(f'{folder}: {len(skipped)} skipped ({_kinds(skipped)}): expected '
              f'{", ".join(IMAGE_EXTENSIONS)}', file=sys.stderr)
    return paths, labels, classes


def _kinds(names):
    """Counts names by their endings, the most frequent first: '2 .gif, 1 .avif, 1 README'."""
    counts = Counter(
        name if name.startswith('.') else os.path.splitext(name)[1].lower() or name
        for name in names
    ).most_common()
    rest = f', {sum(count for _, count in counts[5:])} others' if counts[5:] else ''
    return ', '.join(f'{count} {kind}' for kind, count in counts[:5]) + rest


def _read_all(paths, size, nthread, name):
    """Reads small images into memory: uint8 (N, size, size, 3)."""
    images = np.empty((len(paths), size, size, 3), np.uint8)
    ended = threading.Event()

    def read(i):
        if not ended.is_set():
            images[i] = read_test_image(paths[i], size)

    pool = ThreadPool(max(1, nthread))
    try:
        done = pool.imap_unordered(read, range(len(paths)), chunksize=64)
        for _ in tqdm(done, f'reading {name}', len(paths), unit='img', disable=None, leave=False):
            pass
    finally:  # a thread that still reads when the interpreter ends would abort it
        ended.set()
        pool.terminate()
        pool.join()
    return images


def _load_folder(root, test_folders, training, size, nthread):
    """A folder with one of `test_folders` and, for training, train/, each of class folders."""
    test_folders = [os.path.join(root, folder) for folder in test_folders]
    test_folder = next(filter(os.path.isdir, test_folders), test_folders[0])

    def images(folder, paths, labels):
        if size > MAX_SMALL:
            return ImageFiles(paths, labels, size)
        return MemoryImages(_read_all(paths, size, nthread, folder), labels)

    if not training:
        *test, classes = list_images(test_folder)
        return DataSplits(None, images(test_folder, *test), classes)
    train_folder = os.path.join(root, 'train')
    *train, classes = list_images(train_folder)
    *test, test_classes = list_images(test_folder)
    if test_classes != classes:
        differ = ', '.join(sorted(set(classes) ^ set(test_classes))[:5])
        raise DataError(f'{train_folder} and {test_folder}: the class folders differ: {differ}')
    return DataSplits(images(train_folder, *train), images(test_folder, *test), classes)


def _load_cifar(name, root, training):
    """CIFAR-10 or CIFAR-100 from the files of their authors, downloaded if they are not there."""
    dataset = getattr(torchvision.datasets, name)
    try:
        test = dataset(root, train=False, download=True)
        train = dataset(root, train=True, download=True) if training else None
    except (OSError, RuntimeError) as error:
        raise DataError(
            f'{name} is not in {root} and cannot be downloaded ({error}): '
            f'put {dataset.filename} or its folder {dataset.base_folder}/ there'
        ) from error
    train = MemoryImages(train.data, train.targets) if training else None
    return DataSplits(train, MemoryImages(test.data, test.targets), test.classes)


def _load_digits(training):
    """The 1,797 digits of scikit-learn at 32 x 32, four fifths of them to train (a fixed split)."""
    from sklearn.datasets import load_digits  # slow to import, and needed here alone

    digits = load_digits()
    grey = [
        cv2.resize(image, (32, 32), interpolation=cv2.INTER_CUBIC).clip(0, 16) / 16
        for image in digits.images
    ]
    images = np.round(np.stack([grey] * 3, axis=-1) * 255).astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(images))
    train, test = np.split(order, [len(order) * 4 // 5])
    return DataSplits(
        MemoryImages(images[train], digits.target[train]) if training else None,
        MemoryImages(images[test], digits.target[test]),
        [str(name) for name in digits.target_names],
    )


def load_splits(name, root='.', preprocess=None, nthread=4, training=True, **augmentation):
    """Loads a data set by name; without `training` its test set alone.

    name: CIFAR10, CIFAR100, Digits, ImageNet (train/ and val/) or Folder (train/ and test/ or
    val/); root: the folder with the files; preprocess: the Preprocessing that the images are for, by default
    the data set's own; nthread: threads that read small images; augmentation: of the training
    images, as `Images.augmented` has it, but `flip` by default the data set's own. Raises DataError
    for what is wrong with the files, naming the path, and for other sizes or channels than those of
    images that come in one.
    """
    preprocess = preprocess or Preprocessing.for_dataset(name)
    if preprocess.channels != 3:
        raise DataError(f'{name} has images of 3 channels: expected {preprocess.channels}, those of '
                        'the network')
    if name in ('ImageNet', 'Folder'):
        test_folders = ('val',) if name == 'ImageNet' else ('test', 'val')
        sets = _load_folder(root, test_folders, training, preprocess.size, nthread)
    elif preprocess.size != IMAGE_SIZES[name]:
        raise DataError(f'{name} has images of {IMAGE_SIZES[name]} pixels: expected {preprocess.size}')
    elif name == 'Digits':
        sets = _load_digits(training)
    else:
        sets = _load_cifar(name, root, training)
    return replace(sets, name=name).augmented(**{'flip': default_flip(name), **augmentation})


def hold_out(dataset, n, seed=0):
    """Splits a data set at random into all but n images, and n. Raises DataError if n is too many.

    The split is that of the seed, which has a default so that runs of any seed hold out the same.
    """
    if not 0 < n < len(dataset):
        raise DataError(f'{n} images to hold out: expected fewer than all {len(dataset)}')
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataset.subset(order[:-n]), dataset.subset(order[-n:])


def sample_evenly(dataset, n):
    """n images of a set, evenly over its order, as they are in testing: uint8 (n, C, S, S)."""
    chosen = torch.linspace(0, len(dataset) - 1, n).long()
    images, _, _ = dataset[chosen, None, torch.arange(n)]
    return images


def measure_normalization(images, nthread):
    """Measures each channel over all pixels of a set of images: (means, deviations), in [0, 1].

    The images are as in testing; several processes share them. Raises DataError for a channel that
    has one value everywhere, which nothing can be divided by.
    """
    counts = torch.zeros(images.shape[-1], 256, dtype=torch.int64)  # of each value
    loader = make_loader(images, 256, nthread, rank=rank(), world_size=world_size())
    for pixels, labels, _ in iterate_batches(loader):
        channels = pixels[labels != IGNORED].transpose(0, 1).flatten(1)
        counts += torch.stack([channel.bincount(minlength=256) for channel in channels])
    counts = torch.tensor(all_reduce(counts.flatten().tolist()), dtype=torch.float64)
    shares = counts.view(-1, 256) / len(images) / images.shape[0] ** 2
    values = torch.arange(256, dtype=torch.float64) / 255
    means = shares @ values
    deviations = (shares * (values - means[:, None]) ** 2).sum(1).sqrt()
    rounded = [[round(value, 6) for value in row.tolist()] for row in (means, deviations)]
    if not all(rounded[1]):
        raise DataError(f'channel {rounded[1].index(0)} of the training images has one value '
                        'everywhere: expected channels that differ')
    return rounded
