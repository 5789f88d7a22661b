"""From an image, a file or pixels, to the input of a network: read, resize, crop, normalise.

Images are read and resized with OpenCV, as those that the original models were trained on: other
libraries' pixels differ, and the stated accuracies need these.
"""

import math
import os
import stat
from dataclasses import dataclass, fields

import torch

from diracnets.image_headers import is_cut, size_in_head

try:
    import cv2
    import numpy as np
except ImportError:  # the networks, folded or not, do without
    cv2 = None
else:
    if 'OPENCV_LOG_LEVEL' not in os.environ:  # what is wrong is said once, by a DataError
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

MAX_SMALL = 64  # pixels: up to this size inputs are whole images, above the middle of larger ones
DEFAULT_SIZE = 32  # pixels, of images that say nothing else
MAX_PIXELS = 2**28 // 3  # of an image, as it is read and as it is resized: 256 MiB, as in Pillow
MAX_BYTES = 2**30  # of an image file
IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.webp', '.tif', '.tiff')
MAX_MEAN = 1e9  # of a channel, and of its deviation: far beyond what images have
_READ = os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)  # no FIFO's wait
IMAGE_SIZES = {'CIFAR10': 32, 'CIFAR100': 32, 'Digits': 32, 'ImageNet': 224}  # pixels, of each data set
NORMALIZATION = {  # by kind: mean and standard deviation of the channels of images in [0, 1]
    'CIFAR10': ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    'ImageNet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
NORMALIZATION['CIFAR100'] = NORMALIZATION['CIFAR10']


class DataError(ValueError):
    """What is wrong with a data set, and where."""


def _are_of_channels(mean, std):
    """Whether these can be the mean and the deviation of each channel: tuples of numbers."""
    given = [values if isinstance(values, tuple) else () for values in (mean, std)]
    numbers = all(type(v) in (int, float) and abs(v) < MAX_MEAN for v in sum(given, ()))
    return numbers and len(given[0]) == len(given[1]) > 0 and min(given[1]) > 0


@dataclass(frozen=True)
class Preprocessing:
    """What the inputs of a network are: (N, C, size, size), in [0, 1], less mean, over std.

    The channels are RGB, or those of images of one's own. Of a network of others than three whose
    file tells no mean and deviation they are 0 and 1.
    """

    kind: str  # 'CIFAR10', 'CIFAR100' or 'ImageNet': which networks are for such images
    size: int  # pixels
    mean: tuple  # of each channel
    std: tuple

    @property
    def channels(self):
        """Of the images: 3, unless the network's are no RGB ones."""
        return len(self.mean)

    @property
    def shape(self):
        """Of one input: (channels, size, size)."""
        return self.channels, self.size, self.size

    @classmethod
    def for_dataset(cls, dataset, image_size=None, mean=None, std=None):
        """The inputs that the images of a data set become.

        dataset: one of IMAGE_SIZES, whose images have that size, or 'Folder', for images of one's own;
        image_size: pixels of a Folder (without, 32); mean, std: of each channel, in place of those
        of the kind. Up to 64 pixels inputs are those of the CIFAR networks, above of the ImageNet
        ones. Raises ValueError for another name, or another size than the data set's, and for what
        can be no mean and deviation.
        """
        if dataset != 'Folder' and dataset not in IMAGE_SIZES:
            raise ValueError(f'unknown dataset {dataset!r}: expected one of {", ".join(IMAGE_SIZES)}, '
                             'Folder')
        size = IMAGE_SIZES.get(dataset, DEFAULT_SIZE if image_size is None else image_size)
        if size < 1 or image_size not in (None, size):
            raise ValueError(f'image_size {image_size}: expected {IMAGE_SIZES.get(dataset, "at least 1")}'
                             f', of {dataset}')
        kind = 'ImageNet' if size > MAX_SMALL else 'CIFAR10'
        kind = dataset if dataset in NORMALIZATION else kind
        if mean is None and std is None:
            return cls(kind, size, *NORMALIZATION[kind])
        given = [tuple(v) if isinstance(v, list) else v for v in (mean, std)]
        if not _are_of_channels(*given):
            raise ValueError(f'mean {mean}, std {std}: expected the mean of each channel and, '
                             'above 0, its deviation')
        return cls(kind, size, *given)

    @classmethod
    def from_args(cls, args):
        """The inputs of a training, by its options in a checkpoint.

        Older ones say 32 of every data set, also of those that have a size of their own, and no
        mean and deviation, which were those of the kind.
        """
        dataset = args['dataset']
        size = args.get('image_size') if dataset == 'Folder' else None
        return cls.for_dataset(dataset, size, args.get('mean'), args.get('std'))

    @classmethod
    def from_dict(cls, said):
        """The inputs whose fields a file says: a dict, as `dataclasses.asdict` makes it.

        Raises ValueError for what is no such dict.
        """
        known = [f.name for f in fields(cls)]
        if said.keys() != set(known):
            raise ValueError(f'inputs of {", ".join(map(repr, said)) or "nothing"}: expected '
                             + ', '.join(known))
        inputs = cls(**{name: tuple(value) if isinstance(value, list) else value
                        for name, value in said.items()})
        most = math.isqrt(MAX_PIXELS)
        if type(inputs.size) is not int or not 1 <= inputs.size <= most:
            raise ValueError(f'inputs of size {inputs.size!r}: expected 1 to {most} pixels')
        if inputs.kind not in [*NORMALIZATION]:
            raise ValueError(f'inputs of kind {inputs.kind!r}: expected one of '
                             + ', '.join(NORMALIZATION))
        if not _are_of_channels(inputs.mean, inputs.std):
            raise ValueError(f'inputs of mean {inputs.mean!r}, std {inputs.std!r}: expected a '
                             'number for each channel')
        return inputs

    def __call__(self, image):
        """Makes an input of an image as in testing: (3, size, size), or (1, size, size), float32.

        image: the path of a file, a PIL image, or an array, uint8 (H, W, 3), RGB. It is resized by
        OpenCV (cubic; above 64 pixels to 256 / 224 of the size, of which the middle is cut), so
        that the same pixels give the same input. Raises DataError that names a file that is no
        image, and says what another array or PIL image is.
        """
        pixels, name = _pixels(image)
        image = torch.from_numpy(_as_in_testing(pixels, name, self.size))  # (S, S, 3)
        if self.channels == 1:
            image = torch.from_numpy(cv2.cvtColor(image.numpy(), cv2.COLOR_RGB2GRAY))[..., None]
        return normalize(image.permute(2, 0, 1)[None], self)[0]


def preprocess(dataset='ImageNet', image_size=None):
    """Returns the transform, from an image to an input, of a data set's networks.

    It takes the path of a file, a PIL image, or an array, uint8 (H, W, 3), RGB. Arguments and
    errors are those of `Preprocessing.for_dataset`, the transform is its `read`: that with which the accuracy of a
    network was measured.
    """
    return Preprocessing.for_dataset(dataset, image_size)


def normalize(images, inputs, dtype=torch.float32):
    """Turns uint8 images (N, C, H, W) into inputs: scaled to [0, 1], less mean, over deviation.

    Raises ValueError for images of other channels than the inputs'.
    """
    if images.shape[1] != inputs.channels:
        raise ValueError(f'images of {images.shape[1]} channels: expected {inputs.channels}, those '
                         'of the network')
    mean, std = (
        torch.tensor(values, dtype=dtype, device=images.device).mul_(255).view(-1, 1, 1)
        for values in (inputs.mean, inputs.std)
    )
    return images.to(dtype).sub_(mean).div_(std)


class NamedErrors:
    """A context that turns an error of OpenCV into a DataError that names the file."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, cv2.error):
            why = ' '.join((error.err or 'OpenCV').split())
            raise DataError(f'{self.path}: not a readable image ({why})') from error


def _check_opencv():
    if cv2 is None:
        raise DataError('cv2 is missing: expected OpenCV, as of pip install opencv-python-headless')


def read_bytes(path):
    """Reads a file: uint8 (bytes,).

    Raises DataError that names one that cannot be read, is no ordinary file, such as a FIFO or a
    device, or has more than MAX_BYTES.
    """
    _check_opencv()
    try:
        file = os.open(path, _READ)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f'{path}: not an ordinary file')
            if status.st_size > MAX_BYTES:
                raise DataError(f'{path}: {status.st_size:,} bytes: expected at most {MAX_BYTES:,} '
                                '(MAX_BYTES)')
            return np.frombuffer(os.read(file, status.st_size), np.uint8)
        finally:
            os.close(file)
    except OSError as error:
        raise DataError(f'{path}: not readable ({error.strerror})') from error


def _check_pixels(path, height, width, what=''):
    if height < 1 or width < 1:
        raise DataError(f'{path}: not a readable image (of {width} x {height} pixels)')
    if height * width > MAX_PIXELS:
        raise DataError(f'{path}: {width} x {height} pixels{what}: expected at most '
                        f'{MAX_PIXELS:,} (MAX_PIXELS)')


def decode_image(content, path, reduction=1):
    """Makes an image of the content of a file: uint8 (H, W, 3), RGB.

    reduction: 1, or 2, 4 or 8 for an image of that part of the height and width, rounded up, which
    JPEG files give in less time. Raises DataError that names the path of an unreadable one, and of
    one of more than MAX_PIXELS, which is known before memory is taken for them. (Of kinds of files
    that `size_in_head` does not know, OpenCV itself refuses those of more than 2^30 pixels.)
    """
    size = size_in_head(content)
    if size:
        _check_pixels(path, *size)
    how = cv2.IMREAD_COLOR if reduction == 1 else getattr(cv2, f'IMREAD_REDUCED_COLOR_{reduction}')
    with NamedErrors(path):
        image = None if len(content) == 0 or is_cut(content) else cv2.imdecode(content, how)
        if image is None:
            raise DataError(f'{path}: not a readable image')
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_image(path):
    """Reads an image file: uint8 (H, W, 3), RGB. Raises DataError that names an unreadable one."""
    return decode_image(read_bytes(path), path)


def _resized(height, width, shorter):
    scale = shorter / min(height, width)
    return max(shorter, round(height * scale)), max(shorter, round(width * scale))


def resize_and_crop(image, shorter, size):
    """Resizes the shorter side to `shorter` (cubic) and cuts the middle `size` x `size` pixels."""
    height, width = image.shape[:2]
    if min(height, width) != shorter:
        height, width = _resized(height, width, shorter)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _as_in_testing(image, name, size):
    shorter = size if size <= MAX_SMALL else size * 256 // 224
    _check_pixels(name, *image.shape[:2])
    _check_pixels(name, *_resized(*image.shape[:2], shorter), ' after resizing')
    with NamedErrors(name):
        return resize_and_crop(image, shorter, size)


def read_test_image(path, size):
    """Reads an image file as it is in testing: uint8 (size, size, 3), RGB.

    Up to MAX_SMALL the shorter side is resized to `size`, above to 256 / 224 of it; the middle is
    cut. Raises DataError that names an unreadable file, and one so long and narrow that it would
    have more than MAX_PIXELS then.
    """
    return _as_in_testing(read_image(path), path, size)


def _pixels(image):
    """The pixels of a path, a PIL image or an array, and its name: uint8 (H, W, 3), RGB."""
    if isinstance(image, (str, bytes, os.PathLike)):
        return read_image(image), image
    _check_opencv()
    if hasattr(image, 'getexif'):  # of PIL, which is there then
        return _of_pil(image), 'the image'
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DataError(f'an image of {pixels.dtype} {pixels.shape}: expected a path, a PIL image '
                        'or an array, uint8 (H, W, 3)')
    return np.ascontiguousarray(pixels), 'the image'


def _of_pil(image):
    from PIL import ImageOps

    if image.mode.startswith(('I', 'F')):  # of which PIL would keep what is below 256
        raise DataError(f'a PIL image of mode {image.mode}: expected 8 bits a channel')
    return np.array(ImageOps.exif_transpose(image).convert('RGB'))  # turned, as OpenCV does
