"""What an image file says of itself before it is decoded: its size, and whether it is whole.

A size is looked up where it stands in the file's head, as a small file may declare, and a decoder
then take memory for, more pixels than there are.
"""

import re
import struct

_MARKER = re.compile(rb'\xff([^\x00\xff])')  # of a JPEG segment; before it, libjpeg skips the rest
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_WITHOUT_CONTENT = {0x01, *range(0xD0, 0xDA)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG, _JPEG_END = b'\xff\xd8', b'\xff\xd9'
_PNG, _PNG_END = b'\x89PNG\r\n\x1a\n', b'IEND\xaeB`\x82'
_SPACE = rb'(?:\s|#[^\n]*\n)+'  # between the numbers of a PPM file
_PPM = re.compile(rb'P[1-6Ff]' + _SPACE + rb'(\d{1,19})' + _SPACE + rb'(\d{1,19})\s')


def _jpeg_segments(content):
    """Yields (kind, where its length stands) of a JPEG file's segments, up to the first scan."""
    kind, at = None, len(_JPEG)
    while kind != _START_OF_SCAN and (marker := _MARKER.search(content, at)):
        kind, at = marker[1][0], marker.end()
        if kind not in _WITHOUT_CONTENT:
            yield kind, at
            at += struct.unpack_from('>H', content, at)[0]


def _jpeg_size(content):
    for kind, at in _jpeg_segments(content):
        if kind in _FRAMES:
            return struct.unpack_from('>HH', content, at + 3)
    return None


def _png_size(content):
    return struct.unpack_from('>II', content, 16)[::-1]


def _gif_size(content):
    return struct.unpack_from('<HH', content, 6)[::-1]


def _bmp_size(content):
    (length,) = struct.unpack_from('<I', content, 14)
    width, height = struct.unpack_from('<HH' if length == 12 else '<ii', content, 18)
    return abs(height), width  # rows that go down have a negative height


def _ppm_size(content):
    found = _PPM.match(content)
    return found and (int(found[2]), int(found[1]))


def _webp_size(content):
    kind = content[12:16].tobytes()
    if kind == b'VP8 ':
        width, height = struct.unpack_from('<HH', content, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b'VP8L':
        (bits,) = struct.unpack_from('<I', content, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    low, high, *rest = struct.unpack_from('<HBHB', content, 24)
    return (rest[0] | rest[1] << 16) + 1, (low | high << 16) + 1


def _tiff_size(content):
    order = '<' if content[0] == ord('I') else '>'
    (at,) = struct.unpack_from(order + 'I', content, 4)
    (count,) = struct.unpack_from(order + 'H', content, at)
    sides = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + 'HH', content, entry)
        short = order + ('H' if kind == 3 else 'I')
        sides.setdefault(tag, struct.unpack_from(short, content, entry + 8)[0])
    return (sides[257], sides[256]) if {256, 257} <= sides.keys() else None


_SIZES = (  # how a file starts, and what reads the size in its head
    (_JPEG, _jpeg_size), (_PNG[:4], _png_size), (b'BM', _bmp_size), (b'RIFF', _webp_size),
    ((b'II*\0', b'MM\0*'), _tiff_size), (b'P', _ppm_size), (b'GIF8', _gif_size),
)


def size_in_head(content):
    """Reads (height, width) from the head of an image file, uint8 (bytes,), as they stand there.

    Returns None for a cut head, and for kinds of files that are not known here.
    """
    start = content[:4].tobytes()
    try:
        for head, size in _SIZES:
            if start.startswith(head):
                return size(content)
    except struct.error:
        return None
    return None


def jpeg_size(content):
    """Reads (height, width) from the head of a JPEG file, uint8 (bytes,).

    Returns None for anything else, where Exif data may turn the image, and for an empty image.
    """
    if content[:2].tobytes() != _JPEG:
        return None
    try:
        size = _jpeg_size(content)
        turned = any(kind == _APP1 for kind, _ in _jpeg_segments(content))
    except struct.error:
        return None
    return size if size and all(size) and not turned else None


def is_cut(content):
    """Tells a JPEG or PNG file that ends too early.

    Of such a JPEG OpenCV makes grey rows without a word, of such a PNG libpng says a line of its
    own. Behind their ends whole files may have anything, and before a JPEG's first scan stand
    thumbnails, with ends of their own.
    """
    start = content[:8].tobytes()
    if start == _PNG:
        return content[-8:].tobytes() != _PNG_END and re.search(_PNG_END, content) is None
    if not start.startswith(_JPEG) or content[-2:].tobytes() == _JPEG_END:
        return False
    try:
        scan = next((at for kind, at in _jpeg_segments(content) if kind == _START_OF_SCAN), None)
    except struct.error:
        return True
    return scan is None or re.search(_JPEG_END, content[scan:]) is None
