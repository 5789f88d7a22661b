"""Reads image files: checks header and completeness, and decodes with OpenCV.

Pillow reads the headers, except those of JPEG and PNG files. Its JPEG parser takes as long as
decoding 32 x 32 pixels. Errors are DataErrors that name the file.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import stat
import struct
import threading
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 2**28 // 3  # of an image, decoded or resized: 256 MiB, the limit of Pillow
MAX_BYTES = 2**30  # of an image file
START_BYTES, END_BYTES = 2**16, 64  # bytes that `check_image` reads; EXIF data take up to 2^16
_OPEN_FLAGS = os.O_RDONLY | getattr(os, 'O_BINARY', 0) | getattr(os, 'O_NONBLOCK', 0)  # for FIFOs


class DataError(ValueError):
    """An error in a dataset or an image; the message names the file or item."""


@functools.cache
def import_opencv():
    """Imports and returns cv2; raises DataError if OpenCV is not installed.

    OpenCV's log is silenced unless OPENCV_LOG_LEVEL is set: a DataError reports each problem once.
    """
    try:
        import cv2
    except ImportError as error:
        raise DataError('OpenCV is missing; install opencv-python-headless') from error
    if 'OPENCV_LOG_LEVEL' not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


@contextlib.contextmanager
def opencv_errors(path):
    """Turns an error of OpenCV into a DataError that names the file."""
    try:
        yield
    except import_opencv().error as error:
        reason = ' '.join((error.err or 'OpenCV').split())
        raise DataError(f'{path}: not a readable image ({reason})') from error


@contextlib.contextmanager
def _open_file(path):
    """Opens a file: yields (descriptor, size in bytes). Errors are those of `read_bytes`."""
    try:
        file = os.open(path, _OPEN_FLAGS)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f'{path}: not a regular file')
            if status.st_size > MAX_BYTES:
                raise DataError(f'{path}: {status.st_size:,} bytes: expected at most {MAX_BYTES:,} '
                                '(MAX_BYTES)')
            yield file, status.st_size
        finally:
            os.close(file)
    except OSError as error:
        raise DataError(f'{path}: not readable ({error.strerror})') from error


def read_bytes(path: str | bytes | os.PathLike) -> bytes:
    """Returns the content of a file.

    Raises DataError that names the path if the file cannot be read, is not a regular file (a FIFO
    or a device), or has more than MAX_BYTES.
    """
    with _open_file(path) as (file, size):
        return os.read(file, size)


def check_pixels(path, height, width, suffix=''):
    if height < 1 or width < 1:
        raise DataError(f'{path}: not a readable image (of {width} x {height} pixels)')
    if height * width > MAX_PIXELS:
        raise DataError(f'{path}: {width} x {height} pixels{suffix}: expected at most '
                        f'{MAX_PIXELS:,} (MAX_PIXELS)')


_JPEG_START, _JPEG_END = b'\xff\xd8', b'\xff\xd9'
_PNG_START, _PNG_END = b'\x89PNG\r\n\x1a\n', b'IEND\xaeB`\x82'
_PNM_HEADER = re.compile(rb'P[56]' + 3 * rb'(?:\s|#[^\n]*\n)+(\d{1,9})')  # width, height, maximum
_JPEG_MARKER = re.compile(rb'\xff([^\x00\xff])')
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_STANDALONE = {0x01, *range(0xD0, 0xDA)}  # markers without a segment: TEM, RST0-7, SOI, EOI
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # without DHT, JPG, DAC


def _find_segment(content, kinds):
    """Returns the position of a JPEG file's first segment of these kinds, up to the first scan.

    The position is that of the segment's length. Returns None if there is no such segment.
    """
    kind, position = None, len(_JPEG_START)
    while kind != _START_OF_SCAN and (marker := _JPEG_MARKER.search(content, position)):
        kind, position = marker[1][0], marker.end()
        if kind in kinds:
            return position
        if kind not in _STANDALONE:
            position += int.from_bytes(content[position : position + 2], 'big')
    return None


def _frame_size(content):
    """Returns the (height, width) in the frame header of a JPEG file, or None."""
    position = _find_segment(content, _START_OF_FRAME)
    if position is None or position + 7 > len(content):
        return None
    return struct.unpack_from('>HH', content, position + 3)


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Returns the (height, width) of a JPEG file, None for other files and empty images.

    Returns None for a JPEG file with EXIF data too: its orientation may swap height and width.
    """
    if not content.startswith(_JPEG_START) or _find_segment(content, {_APP1}) is not None:
        return None
    size = _frame_size(content)
    return size if size and all(size) else None


_WARNING_FILTERS = threading.Lock()  # catch_warnings is not thread-safe


def _pillow_size(content, path):
    """Returns the (height, width) in a file's header, or None for a format unknown to Pillow.

    Raises DataError for an image beyond Pillow's limit, twice MAX_PIXELS by default.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f'{path}: Pillow is missing; install pillow') from error
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # DecompressionBombWarning: MAX_PIXELS is checked anyway
        try:
            with Image.open(io.BytesIO(content)) as image:
                return image.size[::-1]
        except Image.DecompressionBombError as error:
            raise DataError(f'{path}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: expected at '
                            f'most {MAX_PIXELS:,} (MAX_PIXELS)') from error
        except Exception:  # Pillow raises many types for a corrupt header: OpenCV decides
            return None


def _read_header(content, path):
    """Returns ((height, width) or None, whether the file is truncated).

    OpenCV decodes missing parts of a JPEG file as gray rows; for PNG files libpng prints a message.
    Complete files may have trailing data, and JPEG segments before the first scan may contain
    thumbnails with end markers of their own. Errors are those of `_pillow_size`.
    """
    if content.startswith(_JPEG_START):
        is_truncated = not content.endswith(_JPEG_END)
        if is_truncated:
            scan = _find_segment(content, {_START_OF_SCAN})
            is_truncated = scan is None or content.find(_JPEG_END, scan) < 0
        return _frame_size(content), is_truncated
    if content.startswith(_PNG_START):  # Pillow rejects chunks that libpng ignores
        height, width = (int.from_bytes(content[i : i + 4], 'big') for i in (20, 16))
        return (height, width), content.rfind(_PNG_END) < 0
    pnm = _PNM_HEADER.match(content)
    if pnm and int(pnm[3]) not in (255, 65535):  # OpenCV ignores it
        raise DataError(f'{path}: the maximum of its pixels is {int(pnm[3])}: expected 255 or '
                        '65535; convert the file')
    return _pillow_size(content, path), False


def decode_image(content: bytes, path: str | os.PathLike, reduction: int = 1) -> np.ndarray:
    """Decodes the content of an image file: returns uint8 (H, W, 3), RGB.

    reduction: 1, or 2, 4 or 8 to divide height and width by (rounded up), which takes less time for
    JPEG files. Raises DataError that names the path for an unreadable image, and for one of more
    than MAX_PIXELS before memory is allocated. For formats that Pillow does not identify, the limit
    is that of OpenCV, 2^30 pixels.
    """
    cv2 = import_opencv()
    import numpy as np

    size, is_truncated = _read_header(content, path)
    if size:
        check_pixels(path, *size)
    mode = cv2.IMREAD_COLOR if reduction == 1 else getattr(cv2, f'IMREAD_REDUCED_COLOR_{reduction}')
    with opencv_errors(path):
        image = None
        if content and not is_truncated:
            image = cv2.imdecode(np.frombuffer(content, np.uint8), mode)
        if image is None:
            raise DataError(f'{path}: not a readable image')
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_image(path: str | bytes | os.PathLike) -> np.ndarray:
    """Reads an image file: returns uint8 (H, W, 3), RGB. Raises DataError that names the path."""
    import_opencv()  # a missing package is reported before a missing file
    return decode_image(read_bytes(path), path)


def check_image(path: str | os.PathLike) -> None:
    """Raises DataError for an image that `read_image` cannot read, if possible without decoding it.

    JPEG, PNG and WebP files are decoded only if their start and end do not show that they are
    complete, as when other data follow the image; files of other formats are always decoded.
    """
    with _open_file(path) as (file, size):
        start = os.pread(file, START_BYTES, 0)
        end = os.pread(file, END_BYTES, max(0, size - END_BYTES))
    is_complete = False
    if start.startswith((_JPEG_START, _PNG_START)):
        shape, is_truncated = _read_header(start + b'\0' + end, path)
        is_complete = shape and not is_truncated
        if is_complete:
            check_pixels(path, *shape)
    elif start[:4] == b'RIFF' and start[8:12] == b'WEBP':
        is_complete = int.from_bytes(start[4:8], 'little') + 8 <= size
    if not is_complete:
        read_image(path)
