"""From an image file to the input of a network: read, resize, crop, normalise.

Images are read and resized with OpenCV, as those that the original models were trained on: other
libraries' pixels differ, and the stated accuracies need these.
"""

import numpy as np
import torch

try:
    import cv2
except ImportError:  # the networks, folded or not, do without
    cv2 = None

MAX_SMALL = 64  # pixels: up to this size inputs are whole images, above the middle of larger ones
CIFAR_NORMALISATION = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
IMAGENET_NORMALISATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALISATION = {  # by topology: mean and standard deviation of the channels of inputs in [0, 1]
    'CIFAR10': CIFAR_NORMALISATION,
    'CIFAR100': CIFAR_NORMALISATION,
    'ImageNet': IMAGENET_NORMALISATION,
}


class DataError(ValueError):
    """What is wrong with a data set, and where."""


def normalise(images, topology, dtype=torch.float32):
    """Turns uint8 images (N, 3, H, W) into inputs: scaled to [0, 1], less mean, over deviation."""
    mean, std = (
        torch.tensor(values, dtype=dtype, device=images.device).mul_(255).view(3, 1, 1)
        for values in NORMALISATION[topology]
    )
    return images.to(dtype).sub_(mean).div_(std)


def _is_cut(content):
    """Tells a JPEG file that ends too early, of which OpenCV makes grey rows without a word."""
    return content.startswith(b'\xff\xd8') and b'\xff\xd9' not in content[-1024:]


def read_file(path):
    """Reads a file: uint8 (bytes,). Raises DataError that names one that cannot be read."""
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f'{path}: not readable ({error.strerror})') from error


def decode(content, path, reduction=1):
    """Makes an image of the content of a file: uint8 (H, W, 3), RGB.

    reduction: 1, or 2, 4 or 8 for an image of that part of the height and width, rounded up, which
    JPEG files give in less time. Raises DataError that names the path of an unreadable one.
    """
    if cv2 is None:
        raise DataError('cv2 is missing: expected OpenCV, as of pip install opencv-python-headless')
    how = cv2.IMREAD_COLOR if reduction == 1 else getattr(cv2, f'IMREAD_REDUCED_COLOR_{reduction}')
    image = cv2.imdecode(content, how) if len(content) else None
    if image is None or _is_cut(content.tobytes()):
        raise DataError(f'{path}: not a readable image')
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_image(path):
    """Reads an image file: uint8 (H, W, 3), RGB. Raises DataError that names an unreadable one."""
    return decode(read_file(path), path)


def resize_and_crop(image, shorter, size):
    """Resizes the shorter side to `shorter` (cubic) and cuts the middle `size` x `size` pixels."""
    height, width = image.shape[:2]
    if min(height, width) != shorter:
        scale = shorter / min(height, width)
        height, width = max(shorter, round(height * scale)), max(shorter, round(width * scale))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def read_test_image(path, size):
    """Reads an image file as it is in testing: uint8 (size, size, 3), RGB.

    Up to MAX_SMALL the shorter side is resized to `size`, above to 256 / 224 of it; the middle is
    cut.
    """
    shorter = size if size <= MAX_SMALL else size * 256 // 224
    return resize_and_crop(read_image(path), shorter, size)


def read_input(path, dataset, size):
    """Reads an image file as the input of a network in testing: float32 (3, size, size)."""
    image = torch.from_numpy(read_test_image(path, size))  # (S, S, 3)
    return normalise(image.permute(2, 0, 1)[None], dataset)[0]
