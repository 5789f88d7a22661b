"""Sets of images, and what a batch of one is: uint8 images (n, C, S, S) and labels (n,).

In memory, or in files. How one image is read is in diracimage,
what is done to it at random in training/augment.py.

A batch is drawn by its indices and a seed of its own, so that the seed of a run fixes every pixel
of it, whatever the number of workers.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from diracimage import DataError, read_test_image
from training.augment import crop_and_flip, draw, flip_at_random, read_random_crop

IGNORED = -100  # as a label: what cross_entropy leaves out


class Images(Dataset):
    """A batch of it is (images uint8 (n, C, S, S), labels (n,), size of the whole batch).

    It is asked for with (indices of the whole batch, seed, positions in it to return): with the
    positions split among several processes, all of them together return what one would. The seed
    is None where images are left as they are. No positions give one image, labelled IGNORED.

    `shape` is that of an image, (S, S, C). `augmented` gives the same images as a training has
    them: cropped at random if `crop`, small ones after padding by `pad` pixels with their
    reflection or (not `reflect`) black, and mirrored as `flip` says, one of augment.FLIPS.
    """

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, batch):
        indices, seed, share = batch
        filler = len(share) == 0  # a process without a share still has to take part in the step
        share = torch.zeros(1, dtype=torch.long) if filler else share
        images, labels = self.read(indices, seed, share)
        if filler:
            labels = torch.full_like(labels, IGNORED)
        return images.permute(0, 3, 1, 2), labels, len(indices)


class MemoryImages(Images):
    """Square images in memory, small as a rule; a batch is taken and augmented with one gather.

    images: uint8 (N, S, S, C), or (N, S, S) of one channel; labels: (N,).
    """

    def __init__(self, images, labels, pad=0, flip='none', reflect=True):
        self.images, self.labels = torch.as_tensor(images), torch.as_tensor(labels)
        if self.images.ndim == 3:
            self.images = self.images[..., None]
        self.shape = tuple(self.images.shape[1:])
        if pad >= self.shape[0]:
            raise DataError(
                f'randomcrop_pad {pad}: expected less than the image size, {self.shape[0]}'
            )
        self.pad, self.flip, self.reflect = pad, flip, reflect

    def subset(self, indices):
        images, labels = self.images[indices], self.labels[indices]
        return MemoryImages(images, labels, self.pad, self.flip, self.reflect)

    def augmented(self, crop=True, pad=0, flip='horizontal', reflect=True):
        return MemoryImages(self.images, self.labels, pad if crop else 0, flip, reflect)

    def read(self, indices, seed, share):
        chosen = indices[share]
        if seed is None:
            return self.images[chosen], self.labels[chosen]
        draws = draw(len(indices), share, self.pad, self.flip, seed)
        return crop_and_flip(self.images, chosen, *draws, self.reflect), self.labels[chosen]


class ImageFiles(Images):
    """Image files, read as they are needed, as images of size x size.

    In training each is a random resized crop; in testing, and without `crop`, the shorter side is
    resized to 256 / 224 of `size` and the middle is cut.
    """

    def __init__(self, paths, labels, size, crop=True, flip='horizontal'):
        self.paths, self.labels, self.size = paths, torch.as_tensor(labels), size
        self.shape, self.crop, self.flip = (size, size, 3), crop, flip

    def subset(self, indices):
        paths = [self.paths[i] for i in indices]
        return ImageFiles(paths, self.labels[indices], self.size, self.crop, self.flip)

    def augmented(self, crop=True, pad=0, flip='horizontal', reflect=True):
        return ImageFiles(self.paths, self.labels, self.size, crop, flip)

    def read(self, indices, seed, share):
        images = np.empty((len(share), *self.shape), np.uint8)
        with torch.random.fork_rng(devices=[]):  # get_params knows only the global generator
            for i, position in enumerate(share.tolist()):
                path = self.paths[indices[position]]
                if seed is None:
                    images[i] = read_test_image(path, self.size)
                    continue
                torch.manual_seed(seed + position)
                read = read_random_crop if self.crop else read_test_image
                images[i] = flip_at_random(read(path, self.size), self.flip)
        return torch.from_numpy(images), self.labels[indices[share]]
