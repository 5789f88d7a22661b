"""Datasets of labeled images that are indexed by whole batches.

The images are in memory, in files, or items of any torch Dataset. A batch is a function of its
indices and of its own seed: the seed of a run fixes every pixel, for any number of workers.
"""

import contextlib
import copy
import operator
import random

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from diracnets.image_files import DataError
from diracnets.preprocessing import image_to_array, read_test_image
from training.augmentation import (
    NO_AUGMENTATION,
    Augmentation,
    augment,
    flip_image,
    read_random_crop,
    sample_aug_params,
)

IGNORED = -100  # label: the default ignore_index of cross_entropy


class BatchDataset(Dataset):
    """A dataset whose items are batches: (uint8 images (m, C, S, S), labels (m,), global size).

    The index of an item is (indices of the global batch, seed, local_indices). local_indices are
    the positions in the batch that this rank loads; all ranks together load what one rank would.
    With seed None images are not augmented. Empty local_indices return one image with label
    IGNORED. `shape` is the shape (S, S, C) of an image; `augmentation` defaults to none.
    """

    def augmented(self, **augmentation):
        """Returns a copy with the settings of an Augmentation."""
        augmented = copy.copy(self)
        augmented.augmentation = Augmentation(**augmentation)
        if augmented.augmentation.shift >= self.shape[0]:
            raise DataError(f'randomcrop_pad {augmented.augmentation.shift}: expected less than '
                            f'the image size, {self.shape[0]}')
        return augmented

    def relabeled(self, positions):
        """Returns a copy with label positions[i] in place of i."""
        relabeled = copy.copy(self)
        relabeled.labels = torch.tensor(positions)[self.labels]
        return relabeled

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, batch):
        indices, seed, local_indices = batch
        is_empty = len(local_indices) == 0  # this rank still has to take part in the step
        local_indices = torch.as_tensor([0] if is_empty else local_indices)
        images, labels = self.load_batch(torch.as_tensor(indices), seed, local_indices)
        if is_empty:
            labels = torch.full_like(labels, IGNORED)
        return images.permute(0, 3, 1, 2), labels, len(indices)


class MemoryImages(BatchDataset):
    """Square images in memory; one gather selects and augments a batch.

    images: uint8 (N, S, S, C), or (N, S, S) of one channel; labels: (N,).
    """

    def __init__(self, images, labels, augmentation=NO_AUGMENTATION):
        self.images, self.labels = torch.as_tensor(images), torch.as_tensor(labels)
        if self.images.ndim == 3:
            self.images = self.images[..., None]
        self.shape, self.augmentation = tuple(self.images.shape[1:]), augmentation

    def subset(self, indices):
        return MemoryImages(self.images[indices], self.labels[indices], self.augmentation)

    def to(self, device):
        """Returns a copy on a device, where batches of the same pixels are made."""
        return MemoryImages(self.images.to(device), self.labels.to(device), self.augmentation)

    def load_batch(self, indices, seed, local_indices):
        selected = indices[local_indices].to(self.images.device, non_blocking=True)
        if seed is None:
            return self.images[selected], self.labels[selected]
        # sampled on the CPU, whose generator is the same on every machine
        aug_params = sample_aug_params(indices, local_indices, self.augmentation, seed)
        images = augment(self.images, selected, aug_params, self.augmentation)
        return images, self.labels[selected]


class ImageFiles(BatchDataset):
    """Image files, read on demand as images of size x size.

    With augmentation each image is a random resized crop, otherwise that of `read_test_image`.
    """

    def __init__(self, paths, labels, size, augmentation=NO_AUGMENTATION):
        self.paths, self.labels, self.size = paths, torch.as_tensor(labels), size
        self.shape, self.augmentation = (size, size, 3), augmentation

    def subset(self, indices):
        paths = [self.paths[i] for i in indices]
        return ImageFiles(paths, self.labels[indices], self.size, self.augmentation)

    def augmented(self, pad=0, **augmentation):
        """Returns a copy with the settings of an Augmentation; files are not padded."""
        return super().augmented(**augmentation)

    def load_batch(self, indices, seed, local_indices):
        images = np.empty((len(local_indices), *self.shape), np.uint8)
        with torch.random.fork_rng(devices=[]):  # get_params uses the global generator
            for i, position in enumerate(local_indices.tolist()):
                index = int(indices[position])
                path = self.paths[index]
                if seed is None:
                    images[i] = read_test_image(path, self.size)
                    continue
                torch.default_generator.manual_seed(seed + position)  # not CUDA's generators
                read = read_random_crop if self.augmentation.crop else read_test_image
                images[i] = flip_image(read(path, self.size), self.augmentation.flip, index, seed)
        return torch.from_numpy(images), self.labels[indices[local_indices]]


@contextlib.contextmanager
def _restored_rng():
    """Restores the global generators of torch (on the CPU), NumPy and `random` at the end."""
    numpy_state, state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(state)


class DatasetImages(BatchDataset):
    """The items (image, label) of a torch Dataset, loaded on demand.

    An image is anything that `image_to_array` converts, with any number of channels; all images
    have the size of the first. They are augmented like images in memory, after the Dataset's own
    transforms. Random transforms that use the global generators of torch, NumPy or `random` follow
    the seed of the run in training; in evaluation each item has a seed of its own. Raises DataError
    that names an invalid item.
    """

    def __init__(self, items, num_classes, augmentation=NO_AUGMENTATION):
        if len(items) == 0:
            raise DataError('a Dataset of 0 images: expected at least one')
        self.items, self.positions = items, range(num_classes)  # of the labels: see `relabeled`
        self.shape, self.augmentation = self._load_item(0)[0].shape, augmentation

    def __len__(self):
        return len(self.items)

    def subset(self, indices):
        subset = copy.copy(self)
        subset.items = Subset(self.items, indices.tolist())
        return subset

    def relabeled(self, positions):
        relabeled = copy.copy(self)
        relabeled.positions = [positions[i] for i in self.positions]
        return relabeled

    def _load_item(self, i):
        try:
            image, label = self.items[i]
        except OSError as error:  # of a file that the Dataset reads
            raise DataError(f'item {i} of the Dataset: {error}') from error
        try:
            image, label = image_to_array(image, rgb=False), operator.index(label)
        except (DataError, OSError, TypeError) as error:
            raise DataError(f'item {i} of the Dataset: {error}') from error
        if not 0 <= label < len(self.positions):
            raise DataError(f'item {i} of the Dataset: label {label}: expected 0 to '
                            f'{len(self.positions) - 1}')
        return image, self.positions[label]

    def load_batch(self, indices, seed, local_indices):
        images, labels = [], []
        with _restored_rng():
            for position in local_indices.tolist():
                index = int(indices[position])
                own_seed = index if seed is None else seed + position
                torch.default_generator.manual_seed(own_seed)  # not CUDA's generators
                np.random.seed(own_seed % 2**32)
                random.seed(own_seed)
                image, label = self._load_item(index)
                if image.shape != self.shape:
                    raise DataError(f'item {index} of the Dataset is {image.shape}: '
                                    f'expected {self.shape}, the shape of the first item')
                images.append(image)
                labels.append(label)
        images = torch.from_numpy(np.stack(images))
        if seed is not None:
            aug_params = sample_aug_params(indices, local_indices, self.augmentation, seed)
            images = augment(images, torch.arange(len(images)), aug_params, self.augmentation)
        return images, torch.tensor(labels)
