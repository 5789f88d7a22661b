"""Random augmentation of training images: crops, flips and Cutout.

Small images are padded, cropped and flipped with one gather, on the device of the images. Large
images are cropped while they are decoded.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import torch
from torchvision.transforms import RandomResizedCrop

from diracnets.image_files import decode_image, jpeg_size, opencv_errors, read_bytes
from training.choices import FLIPS

GRAY = 128  # of a Cutout square: near the mean of photographs, which is normalized to 0


@dataclass(frozen=True)
class Augmentation:
    """Settings of the random augmentation of training images."""

    crop: bool = True  # images in memory: after padding; image files: 8 to 100 % of the area
    pad: int = 0  # pixels
    flip: str = 'horizontal'  # one of FLIPS
    reflect: bool = True  # pad with the reflected image; otherwise with black
    cutout: int = 0  # pixels, the side of the Cutout square (1708.04552); not for image files

    @property
    def shift(self):
        """The maximum shift of images in memory, in pixels."""
        return self.pad if self.crop else 0


NO_AUGMENTATION = Augmentation(crop=False, flip='none')


# ---------------------------------------------------------------- small images, with one gather


class AugParams(NamedTuple):
    """The random augmentation parameters of n images."""

    shifts: torch.Tensor  # of rows and columns, in pixels (2, n, 1)
    flips: torch.Tensor  # bool, one row for each of the k kinds of flip (k, n, 1)
    centers: torch.Tensor  # of the Cutout square, row and column over the size (2, n, 1)


def alternating_flip(indices, seed):
    """Returns whether images are flipped in the epoch of a batch's seed: (n,) to (n,), bool.

    The seeds of odd epochs are odd, as are the indices of half of the images.
    """
    return (indices + seed) % 2 == 1


def sample_aug_params(indices, local_indices, augmentation, seed):
    """Samples the parameters of a global batch from its seed: returns AugParams of this rank.

    indices: indices of the images of the global batch (n,); local_indices: positions in the batch
    of this rank's images (m,).
    """
    n, generator = len(indices), torch.Generator().manual_seed(seed)
    max_shift, flip = augmentation.shift, augmentation.flip
    shifts = torch.randint(-max_shift, max_shift + 1, (2, n, 1), generator=generator)
    flips = torch.rand(FLIPS[flip], n, 1, generator=generator) < 0.5
    if flip == 'alternating':
        flips = alternating_flip(indices, seed).view(1, n, 1)
    centers = torch.rand(2, n, 1, generator=generator)
    return AugParams(*(values[:, local_indices] for values in (shifts, flips, centers)))


def crop_and_flip(images, indices, shifts, flips, reflect):
    """Shifts and flips images[indices], (N, S, S, C) to (n, S, S, C), with one gather.

    indices: (n,); shifts, flips: as in AugParams, on the device of the images; reflect: pad with
    the reflected image, otherwise with black.
    """
    size = images.shape[1]
    rows, cols = torch.arange(size, device=images.device) + shifts  # (n, S) each
    if len(flips) > 0:
        cols = torch.where(flips[0], cols.flip(1), cols)
    if len(flips) > 1:
        rows = torch.where(flips[1], rows.flip(1), rows)
    rows, cols = rows[:, :, None], cols[:, None, :]
    reflected = (size - 1 - (size - 1 - i.abs()).abs() for i in (rows, cols))
    crops = images[(indices[:, None, None], *reflected)]
    if not reflect:
        inside = (rows >= 0) & (rows < size) & (cols >= 0) & (cols < size)  # (n, S, S)
        crops = crops * inside[..., None]
    if len(flips) > 2:
        crops = torch.where(flips[2][..., None, None], crops.transpose(1, 2), crops).contiguous()
    return crops


def cutout(images, centers, side):
    """Makes a square of each image (n, S, S, C) gray; squares are clipped at the image border.

    centers: as in AugParams; side: side of the square in pixels.
    """
    size = images.shape[1]
    first = (size * centers).long() - side // 2
    offsets = torch.arange(size, device=images.device) - first
    rows, cols = (offsets >= 0) & (offsets < side)  # (n, S) each
    return images.masked_fill((rows[:, :, None] & cols[:, None, :])[..., None], GRAY)


def augment(images, indices, params, augmentation):
    """Returns augmented images[indices], uint8 (N, S, S, C) to (n, S, S, C).

    indices: (n,); params: AugParams of these images.
    """
    shifts, flips = (values.to(images.device, non_blocking=True) for values in params[:2])
    crops = crop_and_flip(images, indices, shifts, flips, augmentation.reflect)
    if augmentation.cutout:
        centers = params.centers.to(images.device, non_blocking=True)
        crops = cutout(crops, centers, augmentation.cutout)
    return crops


def progressive_sizes(size, sizes, epochs):
    """Returns the image size of each epoch (progressive resizing), `sizes` in equal parts.

    The later sizes get the remaining epochs. Without `sizes` every epoch has `size`.
    """
    sizes = sizes or [size]
    return [sizes[(len(sizes) * epoch - 1) // epochs] for epoch in range(1, epochs + 1)]


# ---------------------------------------------------------------- large images, one by one


def jpeg_reduction(height, width, size):
    """Returns the largest of 1, 2, 4 and 8 that reduces a crop to no less than `size` pixels."""
    return max(k for k in (1, 2, 4, 8) if k == 1 or min(height, width) >= k * size)


def read_random_crop(path, size):
    """Reads a random resized crop of an image file: returns uint8 (size, size, 3), RGB.

    The crop has 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, and is resized (cubic).
    Samples from torch's global generator. Raises DataError that names an unreadable file.
    """
    content = read_bytes(path)
    shape, image, factor = jpeg_size(content), None, 1
    if shape is None:
        image = decode_image(content, path)
        shape = image.shape[:2]
    crop = RandomResizedCrop.get_params(
        torch.empty(3, *shape, device='meta'), (0.08, 1.0), (3 / 4, 4 / 3))
    if image is None:  # decoding at reduced size takes less time, if the crop stays large enough
        factor = jpeg_reduction(*crop[2:], size)
        image = decode_image(content, path, factor)
    top, left, height, width = (round(number / factor) for number in crop)
    image = image[top : top + height, left : left + width]
    with opencv_errors(path):
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def flip_image(image, flip, index, seed):
    """Flips an image, an array (S, S, C), at random by one of FLIPS.

    index: index of the image; seed: seed of the batch. Samples from torch's global generator.
    """
    if flip == 'alternating':
        return image[:, ::-1] if alternating_flip(index, seed) else image
    flips = lambda i: i[:, ::-1], lambda i: i[::-1], lambda i: i.swapaxes(0, 1)
    for flip_once in flips[: FLIPS[flip]]:
        image = flip_once(image) if torch.rand(()) < 0.5 else image
    return image
