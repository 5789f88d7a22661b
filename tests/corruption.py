"""Corrupt and malicious files, and the errors that reading them must raise."""

import os
import pickle
import struct
import zipfile
import zlib

import onnx
import torch
from safetensors.torch import load_file, save_file

from diracnets.folding import fold


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damaged(kind, params, tmp_path):
    """Writes a file of DAMAGES and returns its path."""
    path = tmp_path / f'{kind}.pt7'
    params = dict(params)
    if kind.startswith('pickle'):
        contents = {'params': Evil(str(tmp_path / 'ran'))}
        path.write_bytes(pickle.dumps(contents, protocol=2 if kind == 'pickle' else None))
        return str(path)
    if kind == 'truncated.safetensors':
        path = tmp_path / kind
        save_file(params, path)
    contents = {'params': params, 'args': {'depth': 10, 'width': 0.5}}
    if kind == 'malicious':
        contents['optimizer'] = Evil(str(tmp_path / 'ran'))
    if kind == 'missing':
        del params['group1.block0.conv']
    if kind == 'shape':
        params['group1.block0.alpha'] = torch.ones(3)
    if kind == 'unknown':
        params['group1.block0.gamma'] = torch.ones(3)
    if kind == 'depth':
        contents['args']['depth'] = 16
    if kind == 'blocks':
        contents['params'] = {k: t for k, t in params.items() if 'group2.block1' not in k}
    if kind == 'folded':
        contents = fold(params).state_dict()
    if kind == 'list':
        contents = [1, 2]
    if kind == 'other':
        contents = {'weight': torch.ones(2)}
    if not kind.endswith('.safetensors'):
        torch.save(contents, path)
    if kind.startswith('truncated'):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if kind == 'compressed':
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    if kind == 'altered':
        number = params['fc.bias'].numpy().tobytes()
        path.write_bytes(path.read_bytes().replace(number, bytes(len(number))))
    return str(path)


DAMAGES = {
    'malicious': r'refused, because its pickle would call \S*mkdir',
    'pickle': r'refused, because its pickle would call \S*mkdir',
    'pickle of today': 'corrupt, or not a file that torch.load reads with weights_only=True',
    'truncated': 'corrupt, or not a file that torch.load reads',
    'compressed': 'corrupt, or not a file that torch.load reads',
    'altered': 'corrupt, or not a file that torch.load reads',
    'truncated.safetensors': 'corrupt, or not a safetensors file',
    'missing': 'group1.block0.conv',
    'shape': r'group1.block0.alpha.*\(3,\).*\(16,\)',
    'unknown': 'group1.block0.gamma',
    'depth': 'depth 16, width 0.5, but its parameters have depth 10, width 0.5',
    'blocks': '2, 2, 1',
    'folded': 'contains a folded network',
    'list': 'contains a list',
    'other': r'\bconv\b',
}


def with_metadata(path, text, tmp_path):
    """Copies an exported file with `text`, or nothing, as its metadata: returns the new path."""
    to = tmp_path / f'changed-{path.name}'
    metadata = {} if text is None else {'diracnets': text}
    if path.suffix == '.onnx':
        model = onnx.load(path)
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, to)
    elif path.suffix == '.safetensors':
        save_file(load_file(path), to, metadata)
    else:
        state = torch.load(path, weights_only=True)
        state._metadata.update(metadata)
        torch.save(state, to)
    return to


def png_of(width, height):
    """Returns a PNG file of 69 bytes without pixels whose header contains this size."""
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    chunks = [(b'IHDR', header), (b'IDAT', bytes(12)), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(content)) + kind + content
        + struct.pack('>I', zlib.crc32(kind + content)) for kind, content in chunks
    )


def jpeg_segment(kind, content):
    return bytes([0xFF, kind]) + struct.pack('>H', len(content) + 2) + content


def jpeg_parts(jpeg):
    """Splits a JPEG file into (start, frame header, tables, scans)."""
    frame = min(at for at in map(jpeg.find, (b'\xff\xc0', b'\xff\xc2')) if at > 0)
    end = frame + 2 + struct.unpack_from('>H', jpeg, frame + 2)[0]
    scan = jpeg.index(b'\xff\xda')
    return jpeg[:frame], jpeg[frame:end], jpeg[end:scan], jpeg[scan:]


# EXIF data with an orientation of 90 degrees
ROTATED = jpeg_segment(0xE1, b'Exif\0\0MM\0*\0\0\0\x08\0\x01' + struct.pack(
    '>HHIHHI', 0x112, 3, 1, 6, 0, 0))
