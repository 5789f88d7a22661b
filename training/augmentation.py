"""What is drawn for the images of a training, and what becomes of them.

Small images are padded, cropped, mirrored and turned with one gather: a function of (images,
indices, draws) alone, on the device of the images. Large ones are cut as they are decoded.
"""

from dataclasses import dataclass

import cv2
import torch
from torchvision.transforms import RandomResizedCrop

from diracnets.image_headers import jpeg_size
from diracnets.preprocessing import NamedErrors, decode_image, read_bytes

FLIPS = {  # name: of how many ways to mirror an image, each is taken for half of them
    'none': 0,  # digits, letters
    'horizontal': 1,  # photographs
    'alternating': 1,  # likewise, but in every second epoch (arXiv 2404.00498, section 3.6)
    'all': 3,  # left to right, upside down, transposed: in turn, the eight ways a square can lie
}
GREY = 128  # of what is cut out: near the mean of photographs, which normalising makes 0


@dataclass(frozen=True)
class Augmentation:
    """What happens at random to each image of a training."""

    crop: bool = True  # in memory they are cut after padding; of files, 8 to 100 % of their area
    pad: int = 0  # pixels
    flip: str = 'horizontal'  # one of FLIPS
    reflect: bool = True  # padded with their reflection, or black
    cutout: int = 0  # pixels, a side of the square that is made grey, not in files (1708.04552)

    @property
    def shift(self):
        """How far images in memory are moved at most, in pixels."""
        return self.pad if self.crop else 0


NO_AUGMENTATION = Augmentation(crop=False, flip='none')


# ---------------------------------------------------------------- small images, with one gather


def alternating_flip(indices, seed):
    """Whether images are mirrored in the epoch of a batch's seed, as they are in every second one.

    The seeds of odd epochs are odd, as are the indices of half of the images: (n,) to (n,), bool.
    """
    return (indices + seed) % 2 == 1


def sample_aug_params(indices, share, augmentation, seed):
    """Draws from the seed of a batch what happens to the images of a share.

    indices: of the whole batch (n,); share: positions in it (m,); augmentation: an Augmentation.
    Returns (shifts of rows and columns (2, m, 1), in pixels; whether they are mirrored left to
    right, upside down and transposed, as many as FLIPS says (k, m, 1); where the middle of a square
    to cut out lies, row and column over the size (2, m, 1)).
    """
    n, generator = len(indices), torch.Generator().manual_seed(seed)
    most, flip = augmentation.shift, augmentation.flip
    shifts = torch.randint(-most, most + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(FLIPS[flip], n, 1, generator=generator) < 0.5
    if flip == 'alternating':
        mirrored = alternating_flip(indices, seed).view(1, n, 1)
    middles = torch.rand(2, n, 1, generator=generator)
    return shifts[:, share], mirrored[:, share], middles[:, share]


def crop_and_flip(images, indices, shifts, mirrored, reflect):
    """Takes n of the images (N, S, S, C), shifted and mirrored as drawn: (n, S, S, C).

    indices: (n,); shifts, mirrored: as of `draw`, on the device of the images. What a shift brings
    in from outside is their reflection, or black.
    """
    size = images.shape[1]
    rows, cols = torch.arange(size, device=images.device) + shifts  # (n, S) each
    if len(mirrored) > 0:
        cols = torch.where(mirrored[0], cols.flip(1), cols)
    if len(mirrored) > 1:
        rows = torch.where(mirrored[1], rows.flip(1), rows)
    rows, cols = rows[:, :, None], cols[:, None, :]
    reflected = (size - 1 - (size - 1 - i.abs()).abs() for i in (rows, cols))
    taken = images[(indices[:, None, None], *reflected)]
    if not reflect:
        inside = (rows >= 0) & (rows < size) & (cols >= 0) & (cols < size)  # (n, S, S)
        taken = taken * inside[..., None]
    if len(mirrored) > 2:
        taken = torch.where(mirrored[2][..., None, None], taken.transpose(1, 2), taken).contiguous()
    return taken


def cutout(images, middles, side):
    """Makes a square of each image (n, S, S, C) grey, of which a part may lie outside it.

    middles: as of `draw`; side: of the square, in pixels.
    """
    size = images.shape[1]
    first = (size * middles).long() - side // 2
    at = torch.arange(size, device=images.device) - first
    rows, cols = (at >= 0) & (at < side)  # (n, S) each
    return images.masked_fill((rows[:, :, None] & cols[:, None, :])[..., None], GREY)


def augment(images, chosen, draws, augmentation):
    """Takes the chosen of the images (N, S, S, C) as they were drawn: (n, S, S, C), uint8.

    chosen: (n,); draws: of `draw`; augmentation: an Augmentation.
    """
    shifts, mirrored, middles = draws
    shifts, mirrored = shifts.to(images.device), mirrored.to(images.device)
    taken = crop_and_flip(images, chosen, shifts, mirrored, augmentation.reflect)
    if augmentation.cutout:
        taken = cutout(taken, middles.to(images.device), augmentation.cutout)
    return taken


def progressive_sizes(size, sizes, epochs):
    """The size of the images in each epoch: each of `sizes` for an equal share of the epochs.

    Where they do not divide, the later sizes have more of them; without any, all have `size`.
    Returns a list of ints.
    """
    sizes = sizes or [size]
    return [sizes[(len(sizes) * epoch - 1) // epochs] for epoch in range(1, epochs + 1)]


# ---------------------------------------------------------------- large images, one by one


def jpeg_reduction(height, width, size):
    """The most of 1, 2, 4 and 8 by which a crop may shrink and still not be below the size."""
    return max(k for k in (1, 2, 4, 8) if k == 1 or min(height, width) >= k * size)


def read_random_crop(path, size):
    """Reads a random crop of an image file: uint8 (size, size, 3), RGB.

    Cuts 8 to 100 % of the area at an aspect of 3/4 to 4/3, and resizes (cubic). Draws from torch's
    global generator. Raises DataError that names an unreadable file.
    """
    content = read_bytes(path)
    whole, image, factor = jpeg_size(content), None, 1
    if whole is None:
        image = decode_image(content, path)
        whole = image.shape[:2]
    shape = torch.empty(3, *whole, device='meta')
    crop = RandomResizedCrop.get_params(shape, (0.08, 1.0), (3 / 4, 4 / 3))
    if image is None:  # a large crop is decoded at a part of its size, in a part of the time
        factor = jpeg_reduction(*crop[2:], size)
        image = decode_image(content, path, factor)
    top, left, height, width = (round(number / factor) for number in crop)
    image = image[top : top + height, left : left + width]
    with NamedErrors(path):
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def flip_image(image, flip, index, seed):
    """Mirrors an array (S, S, C), an image of a batch, as FLIPS says.

    index: of the image; seed: of the batch. Draws from torch's global generator.
    """
    if flip == 'alternating':
        return image[:, ::-1] if alternating_flip(index, seed) else image
    ways = lambda i: i[:, ::-1], lambda i: i[::-1], lambda i: i.swapaxes(0, 1)
    for way in ways[: FLIPS[flip]]:
        image = way(image) if torch.rand(()) < 0.5 else image
    return image
