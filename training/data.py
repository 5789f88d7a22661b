"""Training, validation and test sets: by name, from class folders and from arrays.

`load_splits` loads a dataset by name; `DataSplits.from_arrays` makes splits from arrays
or torch Datasets. `training.loader` makes batches, uint8 (N, C, H, W), of a split; they are
normalized by `diracnets.preprocessing.normalize` on the training device.
"""

from __future__ import annotations

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

from diracnets.image_files import DataError
from diracnets.preprocessing import (
    DATASETS,
    IMAGE_EXTENSIONS,
    MAX_SMALL,
    Preprocessing,
    read_test_image,
)
from training.datasets import IGNORED, BatchDataset, DatasetImages, ImageFiles, MemoryImages
from training.distributed import all_reduce, rank, world_size
from training.loader import iterate_batches, make_loader
from training.progress import Progress

MIN_PIXELS = 8  # height and width of an image


def default_flip(name):
    """Returns the default of --flip for a dataset: one of training.augmentation.FLIPS."""
    return DATASETS.get(name, DATASETS['Folder']).flip


@dataclass
class DataSplits:
    """A training and a test set, class names, and a validation set if one is held out."""

    train: BatchDataset | None  # None for testing only
    test: BatchDataset
    classes: list
    val: BatchDataset | None = None
    name: str = ''  # in DATASETS; empty for the user's own arrays

    @classmethod
    def from_arrays(cls, train, test, classes=None):
        """Returns splits of the user's own images for train.main.

        train, test: pairs of images, uint8 (N, S, S) or (N, S, S, C), and labels (N,), from 0, as
        arrays or tensors; or torch Datasets (see DatasetImages). train: None for testing only.
        classes: class names, by default those of the Dataset or the numbers of the labels. Raises
        DataError for invalid images and labels.
        """
        sources = [source for source in (train, test) if source is not None]
        for source in sources:
            if isinstance(source, (tuple, list)) and len(source) != 2:
                raise DataError(f'{len(source)} arrays: expected images and labels')
        names = [str(name) for name in (_class_names(sources) if classes is None else classes)]
        if len(names) < 2:
            raise DataError(f'{len(names)} classes: expected two or more')
        splits = [_to_dataset(source, len(names)) for source in sources]
        if splits[0].shape != splits[-1].shape:
            raise DataError(f'training images are {splits[0].shape}, test images '
                            f'{splits[-1].shape}: expected the same')
        return cls(splits[0] if splits[1:] else None, splits[-1], names)

    def __str__(self):
        sizes = [len(images) for images in (self.train, self.test) if images is not None]
        return f'{" + ".join(map(str, sizes))} images {self.test.shape}'

    def to(self, device):
        """Returns splits with images moved to a GPU if they fit in a quarter of its free memory."""
        moved = {}
        for split in ('train', 'val', 'test'):
            images = getattr(self, split)
            if isinstance(images, MemoryImages) and fits_in_memory(images.images.nbytes, device):
                moved[split] = images.to(device)
        return replace(self, **moved)

    def augmented(self, **augmentation):
        """Returns splits with augmented training images: see `BatchDataset.augmented`."""
        train = None if self.train is None else self.train.augmented(**augmentation)
        return replace(self, train=train)


def _class_names(sources):
    """Returns the class names of Datasets, or the numbers of the labels of pairs."""
    for source in sources:
        if hasattr(source, 'classes'):
            return source.classes
        if not isinstance(source, (tuple, list)):
            raise DataError('a Dataset without classes: expected class names')
    return range(1 + max(int(np.max(np.asarray(labels), initial=-1)) for _, labels in sources))


def _to_dataset(source, num_classes):
    """Returns a BatchDataset of a pair of arrays or a Dataset; raises DataError."""
    if not isinstance(source, (tuple, list)):
        dataset = DatasetImages(source, num_classes)
    else:
        images, labels = (torch.as_tensor(np.ascontiguousarray(array)) for array in source)
        if images.dtype != torch.uint8 or images.ndim not in (3, 4):
            raise DataError(f'images are {images.dtype} {tuple(images.shape)}: expected uint8 '
                            '(N, S, S) or (N, S, S, C)')
        if labels.is_floating_point() or labels.shape != images.shape[:1]:
            raise DataError(f'labels are {labels.dtype} {tuple(labels.shape)}: expected integers '
                            f'({len(images)},)')
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise DataError(f'labels are {labels.min()} to {labels.max()}: expected 0 to '
                            f'{num_classes - 1}')
        dataset = MemoryImages(images, labels.long())
    height, width, _ = dataset.shape
    if len(dataset) == 0 or height != width or height < MIN_PIXELS:
        raise DataError(f'{len(dataset)} images of {height} x {width} pixels: expected square '
                        f'images of at least {MIN_PIXELS} pixels')
    return dataset


def fits_in_memory(nbytes, device):
    """Returns whether images of `nbytes` leave enough memory of a GPU for training."""
    if device.type != 'cuda':
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= free / 4


# ---------------------------------------------------------------- datasets by name


def list_images(folder):
    """Lists a folder of class folders: returns sorted (paths, labels, class names).

    Hidden entries and files with other extensions are skipped, and counted on stderr. Raises
    DataError for a missing folder, fewer than two classes, or a class without images.
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
        entries = sorted(os.listdir(os.path.join(folder, name)))
        files = [entry for entry in entries
                 if entry.lower().endswith(IMAGE_EXTENSIONS) and not entry.startswith('.')]
        others = sorted({*entries} - {*files})
        if not files:
            counts = f', only {_count_by_extension(others)}' if others else ''
            raise DataError(f'{os.path.join(folder, name)}: a class folder without images{counts}: '
                            f'expected {", ".join(IMAGE_EXTENSIONS)}')
        paths += [os.path.join(folder, name, file) for file in files]
        labels += [label] * len(files)
        skipped += others
    if skipped and rank() == 0:
        print(f'{folder}: skipped {len(skipped)} entries ({_count_by_extension(skipped)}): '
              f'expected {", ".join(IMAGE_EXTENSIONS)}', file=sys.stderr)
    return paths, labels, classes


def _count_by_extension(names):
    """Counts names by extension, the most frequent first: '2 .gif, 1 .avif, 1 README'."""
    counts = Counter(
        name if name.startswith('.') else os.path.splitext(name)[1].lower() or name
        for name in names
    ).most_common()
    rest = f', {sum(count for _, count in counts[5:])} others' if counts[5:] else ''
    return ', '.join(f'{count} {extension}' for extension, count in counts[:5]) + rest


def _read_small_images(paths, size, nthread, name):
    """Reads small images into memory, with a progress bar: returns uint8 (N, size, size, 3)."""
    images = np.empty((len(paths), size, size, 3), np.uint8)
    stopped = threading.Event()

    def read(i):
        if not stopped.is_set():
            images[i] = read_test_image(paths[i], size)

    pool = ThreadPool(max(1, nthread))
    try:
        done = pool.imap_unordered(read, range(len(paths)), chunksize=64)
        for _ in Progress(done, f'reading {name}', len(paths), 'img'):
            pass
    finally:  # a thread that reads while the interpreter exits would abort the process
        stopped.set()
        pool.terminate()
        pool.join()
    return images


def _load_folder(root, test_folders, training, size, nthread):
    """Loads class folders from the first existing one of `test_folders` and from train/."""
    test_folders = [os.path.join(root, folder) for folder in test_folders]
    test_folder = next(filter(os.path.isdir, test_folders), test_folders[0])

    def load(folder, paths, labels):
        if size > MAX_SMALL:
            return ImageFiles(paths, labels, size)
        return MemoryImages(_read_small_images(paths, size, nthread, folder), labels)

    if not training:
        *test, classes = list_images(test_folder)
        return DataSplits(None, load(test_folder, *test), classes)
    train_folder = os.path.join(root, 'train')
    *train, classes = list_images(train_folder)
    *test, test_classes = list_images(test_folder)
    if test_classes != classes:
        different = ', '.join(sorted(set(classes) ^ set(test_classes))[:5])
        raise DataError(f'{train_folder} and {test_folder}: different class folders: {different}')
    return DataSplits(load(train_folder, *train), load(test_folder, *test), classes)


def _load_cifar(name, root, training):
    """Loads CIFAR-10 or CIFAR-100 by torchvision, which downloads missing files."""
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
    """Loads the 1,797 digits of scikit-learn at 32 x 32; a fixed 80 % are for training."""
    from sklearn.datasets import load_digits  # slow to import

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
    """Loads the training and test set of a dataset by name, one of DATASETS.

    ImageNet and Folder are image files in root/train/CLASS/ and root/val/CLASS/, Folder also in
    root/test/CLASS/. root: the folder of the files; preprocess: the Preprocessing of the model, by
    default that of the dataset; nthread: threads that read small images; training: False loads
    the test set only; augmentation: settings of an Augmentation, with the dataset's default for
    `flip`. Raises DataError that names the path of an invalid file, and for a preprocessing of
    other channels or another size than the dataset's.
    """
    preprocess = preprocess or Preprocessing.for_dataset(name)
    info = DATASETS[name]
    if preprocess.channels != 3:
        raise DataError(f'{name} has images of 3 channels: expected {preprocess.channels}, the '
                        'channels of the model')
    if info.test_folders:
        splits = _load_folder(root, info.test_folders, training, preprocess.size, nthread)
    elif preprocess.size != info.size:
        raise DataError(f'{name} has images of {info.size} pixels: expected {preprocess.size}')
    elif name == 'Digits':
        splits = _load_digits(training)
    else:
        splits = _load_cifar(name, root, training)
    return replace(splits, name=name).augmented(**{'flip': info.flip, **augmentation})


def hold_out(dataset, n, seed=0):
    """Splits a dataset at random into all but n images, and n images.

    seed: of the split; with the default, runs of every seed hold out the same images. Raises
    DataError if n is not less than the number of images.
    """
    if not 0 < n < len(dataset):
        raise DataError(f'{n} images to hold out: expected fewer than all {len(dataset)}')
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataset.subset(order[:-n]), dataset.subset(order[-n:])


def sample_evenly(dataset, n):
    """Returns n images, evenly spaced in a dataset and not augmented: uint8 (n, C, S, S)."""
    indices = torch.linspace(0, len(dataset) - 1, n).long()
    images, _, _ = dataset[indices, None, torch.arange(n)]
    return images


def measure_normalization(images, nthread):
    """Measures the mean and std of each channel over all images, in [0, 1]: (means, stds).

    The images are not augmented; all ranks share the work. Raises DataError for a channel with
    standard deviation 0.
    """
    counts = torch.zeros(images.shape[-1], 256, dtype=torch.int64)  # of each pixel value
    loader = make_loader(images, 256, nthread, rank=rank(), world_size=world_size())
    batches = Progress(iterate_batches(loader), 'measuring --normalize', len(loader))
    for pixels, labels, _ in batches:
        channels = pixels[labels != IGNORED].transpose(0, 1).flatten(1)
        counts += torch.stack([channel.bincount(minlength=256) for channel in channels])
    counts = torch.tensor(all_reduce(counts.flatten().tolist()), dtype=torch.float64)
    frequencies = counts.view(-1, 256) / len(images) / images.shape[0] ** 2
    values = torch.arange(256, dtype=torch.float64) / 255
    means = frequencies @ values
    stds = (frequencies * (values - means[:, None]) ** 2).sum(1).sqrt()
    means, stds = ([round(value, 6) for value in row.tolist()] for row in (means, stds))
    if not all(stds):
        raise DataError(f'channel {stds.index(0)} of the training images has one value '
                        'everywhere: expected a standard deviation above 0')
    return means, stds
