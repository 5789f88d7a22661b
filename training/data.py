"""Training, validation and test sets: by name, from class folders and from arrays.

`load_splits` loads a dataset by name; `DataSplits.from_arrays` makes splits from arrays
or torch Datasets. `training.loader` makes batches, uint8 (N, C, H, W), of a split; they are
normalized by `diracnets.preprocessing.normalize` on the training device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torchvision

from diracnets.class_names import class_positions
from diracnets.image_files import DataError
from diracnets.preprocessing import DATASETS, Preprocessing
from training.choices import MIN_PIXELS
from training.datasets import IGNORED, BatchDataset, DatasetImages, MemoryImages
from training.distributed import all_reduce, rank, world_size
from training.folders import load_folder
from training.loader import iterate_batches, make_loader
from training.progress import Progress

MAX_CLASSES = 100_000  # of arrays: the largest label sets the number of classes


@dataclass
class DataSplits:
    """A training and a test set, class names, and a validation set if one is held out."""

    train: BatchDataset | None  # None for testing only
    test: BatchDataset
    classes: list
    val: BatchDataset | None = None
    name: str = ''  # in DATASETS; empty for the user's own arrays
    files: str = ''  # of class folders: the number, and a hash of the names

    @classmethod
    def from_arrays(cls, train, test, classes=None):
        """Returns splits of the user's own images for train.main.

        train, test: pairs of images, uint8 (N, S, S) or (N, S, S, C), and labels (N,), from 0, as
        arrays or tensors; or torch Datasets (see DatasetImages). train: None for testing only.
        classes: class names, by default those of the first Dataset, or the numbers from 0 to the
        largest label of train (of test without it). Datasets with `classes` of their own are
        matched by name: a test set may lack classes, or have them in another order. If all names of
        the Datasets differ from `classes`, these rename the classes of the first Dataset by
        position. Raises DataError for invalid images and labels, and for a class that is not in
        `classes` or in the first Dataset.
        """
        sources = [_check_arrays(source) if isinstance(source, (tuple, list)) else source
                   for source in (train, test) if source is not None]
        names = [str(name) for name in (_class_names(sources) if classes is None else classes)]
        if len(names) < 2:
            raise DataError(f'{len(names)} classes: expected two or more')
        splits = [_to_dataset(source, names, _own_classes(sources)) for source in sources]
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

    def with_classes(self, classes, positions):
        """Returns splits with class names `classes`; positions: those of the old names."""
        if classes == self.classes:
            return self
        splits = {split: getattr(self, split) for split in ('train', 'val', 'test')}
        return replace(self, classes=classes, **{
            split: images.relabeled(positions) for split, images in splits.items()
            if images is not None})


def _own_classes(sources):
    """Returns the class names of the first Dataset that has some, or None."""
    return next((list(map(str, source.classes)) for source in sources
                 if hasattr(source, 'classes')), None)


def _class_names(sources):
    """Returns the class names of Datasets, or the numbers of the first pair's labels."""
    names = _own_classes(sources)
    if names is None and not all(isinstance(source, (tuple, list)) for source in sources):
        raise DataError('a Dataset without classes: expected class names')
    return names or range(next((int(labels.max()) for _, labels in sources if len(labels)), -1) + 1)


def _check_arrays(source):
    """Returns (images, labels) as arrays, the labels int64; raises DataError for other values."""
    if len(source) != 2:
        raise DataError(f'{len(source)} arrays: expected images and labels')
    images, labels = (np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
                      for values in source)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f'images are {images.dtype} {images.shape}: expected uint8 (N, S, S) or '
                        '(N, S, S, C)')
    if labels.dtype.kind not in 'iub' or labels.shape != images.shape[:1]:
        raise DataError(f'labels are {labels.dtype} {labels.shape}: expected integers '
                        f'({len(images)},)')
    if len(labels) and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise DataError(f'labels are {labels.min()} to {labels.max()}: expected 0 to '
                        f'{MAX_CLASSES - 1:,} at most')
    return np.ascontiguousarray(images), labels.astype(np.int64)


def _match_dataset(source, names, first_names):
    """Returns DatasetImages with the labels of `names`; raises DataError for other classes.

    first_names: those of the first Dataset, which `names` rename by position if all differ.
    """
    own = _own_classes([source]) or names
    expected = names if {*own} & {*names} else first_names[: len(names)]
    positions = class_positions(own, expected)
    if positions is None:
        others = ', '.join(sorted({*own} - {*expected})[:5]) or 'of equal names'
        raise DataError(f'a Dataset has classes {others}: expected {", ".join(expected[:5])}'
                        + ', ...' * (len(expected) > 5))
    return DatasetImages(source, len(own)).relabeled(positions)


def _to_dataset(source, names, first_names):
    """Returns a BatchDataset of a pair of arrays or a Dataset; raises DataError."""
    if not isinstance(source, (tuple, list)):
        dataset = _match_dataset(source, names, first_names)
    else:
        images, labels = source
        if labels.max(initial=0) >= len(names):
            raise DataError(f'labels are {labels.min()} to {labels.max()}: expected 0 to '
                            f'{len(names) - 1}')
        dataset = MemoryImages(images, labels)
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


def _load_cifar(name, root, training):
    """Loads CIFAR-10 or CIFAR-100 with torchvision, which downloads missing files."""
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
    gray = [
        cv2.resize(image, (32, 32), interpolation=cv2.INTER_CUBIC).clip(0, 16) / 16
        for image in digits.images
    ]
    images = np.round(np.stack([gray] * 3, axis=-1) * 255).astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(images))
    train, test = np.split(order, [len(order) * 4 // 5])
    return DataSplits(
        MemoryImages(images[train], digits.target[train]) if training else None,
        MemoryImages(images[test], digits.target[test]),
        [str(name) for name in digits.target_names],
    )


def load_splits(name, root='.', preprocess=None, nthread=4, training=True, classes=(),
                use_val=True, check=True, skip_corrupt=False, **augmentation):
    """Loads the training and test set of a dataset by name, one of DATASETS.

    ImageNet and Folder are image files in root/train/CLASS/ and root/val/CLASS/, Folder also in
    root/test/CLASS/. root: the folder of the files; preprocess: the Preprocessing of the model, by
    default that of the dataset; nthread: threads that read files; training: False loads the test
    set only; classes, use_val, check, skip_corrupt: see `load_folder`; augmentation: settings of an
    Augmentation, with the dataset's default for `flip`. Raises DataError that names the path of an
    invalid file, and for a preprocessing of other channels or another size than the dataset's.
    """
    preprocess = preprocess or Preprocessing.for_dataset(name)
    info = DATASETS[name]
    if preprocess.channels != 3:
        raise DataError(f'{name} has images of 3 channels: expected {preprocess.channels}, the '
                        'channels of the model')
    if info.test_folders:
        fields = load_folder(root, info.test_folders, preprocess.size, nthread, training, classes,
                             use_val, check, skip_corrupt)
        splits = DataSplits(**{'train': None, **fields})
    elif preprocess.size != info.size:
        raise DataError(f'{name} has images of {info.size} pixels: expected {preprocess.size}')
    elif name == 'Digits':
        splits = _load_digits(training)
    else:
        splits = _load_cifar(name, root, training)
    return replace(splits, name=name).augmented(**{'flip': info.flip, **augmentation})


def hold_out(dataset, n):
    """Splits a dataset at random into all but n images, and n images.

    The split is the same for every --seed. Raises DataError if n is not less than the number of
    images.
    """
    if not 0 < n < len(dataset):
        raise DataError(f'--val {n}: expected less than the number of training images, '
                        f'{len(dataset)}')
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
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
