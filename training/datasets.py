"""Sets of images, and what a batch of one is: uint8 images (n, C, S, S) and labels (n,).

In memory, in files, or the items of any Dataset of torch. How one image is read is in diracimage,
what is done to it at random in training/augment.py.

A batch is drawn by its indices and a seed of its own, so that the seed of a run fixes every pixel
of it, whatever the number of workers.
"""

import copy
import operator

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from diracnets.preprocessing import DataError, read_test_image
from training.augmentation import (
    NO_AUGMENTATION,
    Augmentation,
    augment,
    flip_image,
    read_random_crop,
    sample_aug_params,
)

IGNORED = -100  # as a label: what cross_entropy leaves out


class Images(Dataset):
    """A batch of it is (images uint8 (n, C, S, S), labels (n,), size of the whole batch).

    It is asked for with (indices of the whole batch, seed, positions in it to return), arrays or
    tensors: with the positions split among several processes, all of them together return what one
    would. The seed is None where images are left as they are. No positions give one image, labelled
    IGNORED.

    `shape` is that of an image, (S, S, C); `augmentation` what happens to it at random, nothing by
    default.
    """

    def augmented(self, **augmentation):
        """The same images as a training has them: see Augmentation."""
        augmented = copy.copy(self)
        augmented.augmentation = Augmentation(**augmentation)
        if augmented.augmentation.shift >= self.shape[0]:
            raise DataError(f'randomcrop_pad {augmented.augmentation.shift}: expected less than '
                            f'the image size, {self.shape[0]}')
        return augmented

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, batch):
        indices, seed, share = batch
        filler = len(share) == 0  # a process without a share still has to take part in the step
        share = torch.zeros(1, dtype=torch.long) if filler else torch.as_tensor(share)
        images, labels = self.read(torch.as_tensor(indices), seed, share)
        if filler:
            labels = torch.full_like(labels, IGNORED)
        return images.permute(0, 3, 1, 2), labels, len(indices)


class MemoryImages(Images):
    """Square images in memory, small as a rule; a batch is taken and augmented with one gather.

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
        """The same in the memory of a device, which then makes the batches: the same pixels."""
        return MemoryImages(self.images.to(device), self.labels.to(device), self.augmentation)

    def read(self, indices, seed, share):
        chosen = indices[share].to(self.images.device)
        if seed is None:
            return self.images[chosen], self.labels[chosen]
        # drawn on the CPU, whose generator is the same on each machine
        draws = sample_aug_params(indices, share, self.augmentation, seed)
        return augment(self.images, chosen, draws, self.augmentation), self.labels[chosen]


class ImageFiles(Images):
    """Image files, read as they are needed, as images of size x size.

    Augmented, each is a random resized crop; in testing, and without crops, the shorter side is
    resized to 256 / 224 of `size` and the middle is cut.
    """

    def __init__(self, paths, labels, size, augmentation=NO_AUGMENTATION):
        self.paths, self.labels, self.size = paths, torch.as_tensor(labels), size
        self.shape, self.augmentation = (size, size, 3), augmentation

    def subset(self, indices):
        paths = [self.paths[i] for i in indices]
        return ImageFiles(paths, self.labels[indices], self.size, self.augmentation)

    def augmented(self, pad=0, **augmentation):
        """The same as a training has them; files are not padded."""
        return super().augmented(**augmentation)

    def read(self, indices, seed, share):
        images = np.empty((len(share), *self.shape), np.uint8)
        with torch.random.fork_rng(devices=[]):  # get_params knows only the global generator
            for i, position in enumerate(share.tolist()):
                index = int(indices[position])
                path = self.paths[index]
                if seed is None:
                    images[i] = read_test_image(path, self.size)
                    continue
                torch.default_generator.manual_seed(seed + position)  # not CUDA's too
                read = read_random_crop if self.augmentation.crop else read_test_image
                images[i] = flip_image(read(path, self.size), self.augmentation.flip, index, seed)
        return torch.from_numpy(images), self.labels[indices[share]]


def _pixels(image):
    """An image of a Dataset: uint8 (H, W, C). Raises DataError for what is none."""
    mode = getattr(image, 'mode', '')  # of PIL
    if isinstance(image, torch.Tensor):
        if image.is_floating_point() and image.min() >= 0 and image.max() <= 1:
            image = image.mul(255).round().byte()
        image = image.permute(1, 2, 0) if image.ndim == 3 else image
    elif mode and mode not in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA'):
        raise DataError(f'a PIL image of mode {mode}: expected 8 bits a channel, grey or RGB')
    else:
        image = image.convert('RGB') if mode not in ('', 'L', 'RGB') else image
        image = torch.as_tensor(np.array(image))
    if image.dtype != torch.uint8 or image.ndim not in (2, 3):
        raise DataError(f'an image of {image.dtype} {tuple(image.shape)}: expected uint8 (S, S), '
                        '(S, S, C), a tensor (C, S, S), or one in [0, 1]')
    return image[..., None] if image.ndim == 2 else image


class DatasetImages(Images):
    """The items (image, label) of a torch Dataset, read as they are needed.

    An image is one of PIL, an array uint8 (S, S) or (S, S, C), or, as torchvision has them, a
    tensor (C, S, S), uint8 or in [0, 1]; all are of the size of the first. They are augmented as
    those in memory, after transforms of the Dataset's own, whose draws from torch's generator
    follow the seed of the run. Raises DataError that names an item which is something else.
    """

    def __init__(self, items, num_classes, augmentation=NO_AUGMENTATION):
        if len(items) == 0:
            raise DataError('a Dataset of 0 images: expected some')
        self.items, self.num_classes = items, num_classes
        self.shape, self.augmentation = tuple(self._item(0)[0].shape), augmentation

    def __len__(self):
        return len(self.items)

    def subset(self, indices):
        items = Subset(self.items, indices.tolist())
        return DatasetImages(items, self.num_classes, self.augmentation)

    def _item(self, i):
        try:
            image, label = self.items[i]
        except OSError as error:  # of a file that it reads
            raise DataError(f'item {i} of the Dataset: {error}') from error
        try:
            image, label = _pixels(image), operator.index(label)
        except (DataError, TypeError) as error:
            raise DataError(f'item {i} of the Dataset: {error}') from error
        if not 0 <= label < self.num_classes:
            raise DataError(f'item {i} of the Dataset: label {label}: expected 0 to '
                            f'{self.num_classes - 1}')
        return image, label

    def read(self, indices, seed, share):
        items = []
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            for position in share.tolist():
                if seed is not None:
                    torch.default_generator.manual_seed(seed + position)  # not CUDA's too
                items.append(self._item(int(indices[position])))
                if items[-1][0].shape != self.shape:
                    raise DataError(f'item {indices[position]} of the Dataset is '
                                    f'{tuple(items[-1][0].shape)}: expected {self.shape}, as the '
                                    'first')
        images, labels = torch.stack([image for image, _ in items]), [label for _, label in items]
        if seed is not None:
            draws = sample_aug_params(indices, share, self.augmentation, seed)
            images = augment(images, torch.arange(len(images)), draws, self.augmentation)
        return images, torch.tensor(labels)
