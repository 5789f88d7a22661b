"""Images to model inputs: decoding, resizing, cropping and normalization.

OpenCV decodes and resizes images, as for the original models: other libraries return other pixels,
and the published accuracies depend on them. torch is imported at first use, as importing it takes
seconds that the options of a command do not need.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING

from diracnets.image_files import (
    MAX_PIXELS,
    DataError,
    check_pixels,
    import_opencv,
    opencv_errors,
    read_image,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

MAX_SMALL = 64  # pixels: smaller inputs are full images, larger ones are center crops
DEFAULT_SIZE = 32  # pixels, of a dataset without a fixed size
IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.webp', '.tif', '.tiff')
OPTIONAL_EXTENSIONS = ('.pgm', '.pbm', '.pnm', '.jp2', '.gif', '.avif')  # see `image_extensions`
MAX_MEAN = 1e9  # of a channel's mean and std: far above the values of real images


@functools.cache
def image_extensions() -> tuple[str, ...]:
    """Returns the extensions of image files that the installed OpenCV decodes, in lower case.

    OpenCV is compiled with or without a format, for decoding and encoding alike, and lists formats
    by extension for encoding only.
    """
    have = import_opencv().haveImageWriter
    return IMAGE_EXTENSIONS + tuple(e for e in OPTIONAL_EXTENSIONS if have(f'image{e}'))


@dataclass(frozen=True)
class DatasetInfo:
    """Image size, normalization, flip and test folders of a dataset.

    `diracnet.CLASSES` contains the number of classes of each kind.
    """

    size: int | None = None  # pixels; None: chosen by the user
    mean: tuple[float, ...] | None = None  # of each channel in [0, 1]; None: that of the kind
    std: tuple[float, ...] | None = None
    flip: str = 'horizontal'  # the default of --flip
    test_folders: tuple[str, ...] = ()  # of a dataset of image files, in order of preference


_CIFAR = {'size': 32, 'mean': (125.3 / 255, 123.0 / 255, 113.9 / 255),
          'std': (63.0 / 255, 62.1 / 255, 66.7 / 255)}
DATASETS = {
    'CIFAR10': DatasetInfo(**_CIFAR),
    'CIFAR100': DatasetInfo(**_CIFAR),
    'Digits': DatasetInfo(32, flip='none'),  # a mirrored 2 is not a digit
    'ImageNet': DatasetInfo(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
                            test_folders=('val',)),
    'Folder': DatasetInfo(test_folders=('test', 'val')),
}
KINDS = tuple(name for name, info in DATASETS.items() if info.mean)  # with a normalization


def _is_normalization(mean, std):
    """Returns whether mean and std are tuples with one valid number for each channel."""
    mean, std = (values if isinstance(values, tuple) else () for values in (mean, std))
    numeric = all(type(v) in (int, float) and abs(v) < MAX_MEAN for v in mean + std)
    return numeric and len(mean) == len(std) > 0 and min(std) > 0


@dataclass(frozen=True)
class Preprocessing:
    """The transform from an image to a model input (C, size, size): (pixels - mean) / std.

    Pixels are in [0, 1]. The channels are RGB, or those of the user's own images. A model with
    other than three channels whose file has no normalization gets mean 0 and std 1.
    """

    kind: str  # one of KINDS: the dataset whose architectures fit these images
    size: int  # pixels
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """The number of image channels: 3 for RGB."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one input: (channels, size, size)."""
        return self.channels, self.size, self.size

    @classmethod
    def for_dataset(cls, dataset: str, image_size: int | None = None,
                    mean: Sequence[float] | None = None,
                    std: Sequence[float] | None = None) -> Preprocessing:
        """Returns the preprocessing of a dataset, one of DATASETS.

        image_size: pixels, for 'Folder' only (default 32); mean, std: of each channel, by default
        those of the dataset. Inputs of up to 64 pixels are for the CIFAR architectures, larger
        ones for those of ImageNet. Raises ValueError for an unknown name, for another size than
        the dataset's, and for an invalid mean or std.
        """
        if dataset not in DATASETS:
            raise ValueError(f'dataset {dataset!r}: expected one of {", ".join(DATASETS)}')
        info = DATASETS[dataset]
        size = info.size or (DEFAULT_SIZE if image_size is None else image_size)
        if not isinstance(size, Integral) or size < 1 or image_size not in (None, size):
            expected = info.size or 'an integer of at least 1'
            raise ValueError(f'image_size {image_size}: expected {expected} for {dataset}')
        kind = dataset if dataset in KINDS else 'ImageNet' if size > MAX_SMALL else 'CIFAR10'
        if mean is None and std is None:
            return cls(kind, size, DATASETS[kind].mean, DATASETS[kind].std)
        mean, std = (tuple(v) if isinstance(v, list) else v for v in (mean, std))
        if not _is_normalization(mean, std):
            raise ValueError(f'mean {mean}, std {std}: expected one mean and one std above 0 for '
                             'each channel')
        return cls(kind, size, mean, std)

    @classmethod
    def from_args(cls, args: dict) -> Preprocessing:
        """Returns the preprocessing of a training run from the `args` of its checkpoint.

        Older checkpoints contain image_size 32 for every dataset, and no mean and std: those of
        the dataset apply.
        """
        dataset = args['dataset']
        size = args.get('image_size') if dataset == 'Folder' else None
        return cls.for_dataset(dataset, size, args.get('mean'), args.get('std'))

    @classmethod
    def from_dict(cls, values: dict) -> Preprocessing:
        """Returns the preprocessing with these fields, a dict as of `dataclasses.asdict`.

        Raises ValueError for unknown, missing and invalid values.
        """
        names = [f.name for f in fields(cls)]
        if values.keys() != set(names):
            raise ValueError(f'inputs of {", ".join(map(repr, values)) or "nothing"}: expected '
                             + ', '.join(names))
        preprocess = cls(**{name: tuple(value) if isinstance(value, list) else value
                            for name, value in values.items()})
        max_size = math.isqrt(MAX_PIXELS)
        if type(preprocess.size) is not int or not 1 <= preprocess.size <= max_size:
            raise ValueError(f'inputs of size {preprocess.size!r}: expected 1 to {max_size} pixels')
        if preprocess.kind not in list(KINDS):
            raise ValueError(f'inputs of kind {preprocess.kind!r}: expected one of '
                             + ', '.join(KINDS))
        if not _is_normalization(preprocess.mean, preprocess.std):
            raise ValueError(f'inputs of mean {preprocess.mean!r}, std {preprocess.std!r}: '
                             'expected a number for each channel')
        return preprocess

    def __call__(self, image: str | bytes | os.PathLike | np.ndarray | torch.Tensor
                 ) -> torch.Tensor:
        """Returns the input for an image as in testing: float32 (C, size, size).

        image: as for `image_to_array`, in RGB for a model with three channels. A model with one
        channel gets the gray values of RGB images. OpenCV resizes the image (cubic) to `size`, or
        above 64 pixels to 256 / 224 of `size`, and the center is cropped: the same pixels always
        give the same input. Raises DataError for an unreadable file and for other arrays and
        images, such as those with another number of channels.
        """
        import torch

        name = image if isinstance(image, (str, bytes, os.PathLike)) else 'the image'
        pixels = image_to_array(image, rgb=self.channels == 3)
        pixels = _resize_for_testing(pixels, name, self.size)
        pixels = pixels.reshape(self.size, self.size, -1)  # OpenCV drops a single channel
        if self.channels == 1 and pixels.shape[2] == 3:
            cv2 = import_opencv()
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
        if pixels.shape[2] != self.channels:
            raise DataError(f'{name} has {pixels.shape[2]} channels: expected {self.channels}, the '
                            'channels of the model')
        return normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None], self)[0]


def preprocess(dataset: str = 'ImageNet', image_size: int | None = None) -> Preprocessing:
    """Returns the test transform of a dataset, a callable from an image to an input (C, S, S).

    Reported accuracies are measured with this transform. Arguments and errors are those of
    `Preprocessing.for_dataset`; `Preprocessing.__call__` describes the images.
    """
    return Preprocessing.for_dataset(dataset, image_size)


def normalize(images: torch.Tensor, preprocess: Preprocessing,
              dtype: torch.dtype | None = None) -> torch.Tensor:
    """Converts uint8 images (N, C, H, W) to inputs: (images / 255 - mean) / std.

    dtype: dtype of the inputs (default: torch.float32). Raises ValueError if the number of channels
    is not that of the preprocessing.
    """
    import torch

    if images.shape[1] != preprocess.channels:
        raise ValueError(f'images of {images.shape[1]} channels: expected '
                         f'{preprocess.channels}, the channels of the model')
    dtype = dtype or torch.float32
    mean, std = (
        torch.tensor(values, dtype=dtype).mul_(255).view(-1, 1, 1).to(
            images.device, non_blocking=True)  # a blocking copy waits for the step in progress
        for values in (preprocess.mean, preprocess.std)
    )
    return images.to(dtype).sub_(mean).div_(std)


# ---------------------------------------------------------------- images to arrays


def image_to_array(image: str | bytes | os.PathLike | np.ndarray | torch.Tensor,
                   rgb: bool = True) -> np.ndarray:
    """Converts an image to a uint8 array (H, W, C).

    image: the path of a file; a PIL image with 8 bits a channel; an array, uint8 (H, W, C); or a
    tensor (C, H, W), uint8 or floating point in [0, 1]. rgb: require or convert to RGB; otherwise
    arrays and tensors may have any number of channels or be (H, W), and grayscale PIL images keep
    one channel. PIL images are transposed by their EXIF orientation, as OpenCV does for files other
    than AVIF. PIL drops an alpha channel; OpenCV does so too, except for TIFF files, where it
    multiplies the colors by alpha.
    Raises DataError for another type, shape or mode, and for an unreadable file.
    """
    if isinstance(image, (str, bytes, os.PathLike)):
        return read_image(image)
    import_opencv()  # before NumPy, which OpenCV requires: one error for both
    import numpy as np
    import torch

    if hasattr(image, 'getexif'):
        from PIL import ImageOps

        if image.mode.startswith(('I', 'F')):  # convert() would clip these to 8 bits
            raise DataError(f'a PIL image of mode {image.mode}: expected 8 bits a channel')
        try:
            image = ImageOps.exif_transpose(image)
            image = np.array(image if image.mode == 'L' and not rgb else image.convert('RGB'))
        except (OSError, ValueError) as error:  # a truncated file, which PIL reads here; a mode
            raise DataError(f'a PIL image: not readable ({error})') from error
    elif not isinstance(image, torch.Tensor):
        image = np.asarray(image)
    dtype, shape = str(image.dtype).removeprefix('torch.'), tuple(image.shape)
    if isinstance(image, torch.Tensor):
        if image.is_floating_point() and image.numel() and image.min() >= 0 and image.max() <= 1:
            image, dtype = image.mul(255).round().byte(), 'uint8'
        image = image.movedim(0, -1) if image.ndim == 3 else image
    if dtype != 'uint8' or not (image.shape[2:] == (3,) if rgb else image.ndim in (2, 3)):
        shapes = ('(H, W, 3)', '(3, H, W)') if rgb else ('(H, W) or (H, W, C)', '(C, H, W)')
        raise DataError(f'an image of {dtype} {shape}: expected a path, a PIL image, an array '
                        f'uint8 {shapes[0]}, or a tensor {shapes[1]}, uint8 or in [0, 1]')
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    image = np.require(image, requirements=['C', 'W'])
    return image[..., None] if image.ndim == 2 else image


# ---------------------------------------------------------------- resizing and cropping


def _resized_shape(height, width, shorter):
    scale = shorter / min(height, width)
    return max(shorter, round(height * scale)), max(shorter, round(width * scale))


def resize_and_crop(image: np.ndarray, shorter: int, size: int) -> np.ndarray:
    """Resizes the shorter side to `shorter` (cubic) and crops the center to `size` x `size`."""
    height, width = image.shape[:2]
    if min(height, width) != shorter:
        cv2 = import_opencv()
        height, width = _resized_shape(height, width, shorter)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _resize_for_testing(image, name, size):
    shorter = size if size <= MAX_SMALL else size * 256 // 224
    check_pixels(name, *image.shape[:2])
    check_pixels(name, *_resized_shape(*image.shape[:2], shorter), ' after resizing')
    with opencv_errors(name):
        return resize_and_crop(image, shorter, size)


def find_images(folder: str) -> list[str]:
    """Returns the sorted paths of `list_files`; raises ValueError for a folder without images."""
    paths = sorted(list_files(folder)[0])
    if not paths:
        raise ValueError(f'{folder}: contains no images; use another folder')
    return paths


def list_files(folder: str, parents: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Returns (paths of images, names of skipped entries) of a folder and its subfolders.

    Image files have one of `image_extensions`; hidden files and folders are skipped. Links are
    followed, except to one of the `parents`: the real paths of its ancestor folders. Raises OSError
    for a folder that cannot be read.
    """
    extensions = image_extensions()
    entries = sorted(os.listdir(folder))
    images = [entry for entry in entries
              if entry.lower().endswith(extensions) and not entry.startswith('.')]
    paths, skipped = [os.path.join(folder, entry) for entry in images], []
    others = sorted({*entries} - {*images})
    if others:
        parents = (*parents, os.path.realpath(folder))
    for entry in others:
        path = os.path.join(folder, entry)
        if entry.startswith('.') or not os.path.isdir(path) or os.path.realpath(path) in parents:
            skipped.append(entry)
            continue
        inner_paths, inner_skipped = list_files(path, parents)
        paths += inner_paths
        skipped += inner_skipped
    return paths, skipped


def read_test_image(path: str | os.PathLike, size: int) -> np.ndarray:
    """Reads an image file as in testing: returns uint8 (size, size, 3), RGB.

    The shorter side is resized to `size` (above MAX_SMALL to 256 / 224 of it), and the center is
    cropped. Raises DataError that names the path for an unreadable file, and for a long, narrow
    image of more than MAX_PIXELS after resizing.
    """
    return _resize_for_testing(read_image(path), path, size)
