"""Published files of parameters: fetched once, whole, and those that were meant."""

import hashlib
import re
from os.path import basename, exists, join

import torch


def check_finite(params):
    """Raises ValueError naming a tensor of flat parameters with NaN or an infinity in it."""
    for name, tensor in params.items():
        if not tensor.isfinite().all():
            raise ValueError(f'{name} holds NaN or an infinity: expected finite numbers')


def sha256(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path, expected):
    """Raises ValueError for a file whose SHA-256 begins otherwise than expected."""
    found = sha256(path)[: len(expected)]
    if found != expected:
        raise ValueError(f'its SHA-256 begins with {found}, expected {expected}')


def load_published(url, params_of):
    """Loads the parameters in a published file through torch.hub's cache, on the CPU.

    params_of: from what the file holds to a flat dict of them; raises ValueError for those of
    another network. Where the file's name ends in the start of its SHA-256, that is checked each
    time. Raises RuntimeError that says which file to put where if they cannot be had, or hold NaN.
    """
    path = join(torch.hub.get_dir(), 'checkpoints', basename(url))
    try:
        named = re.search(r'-([0-9a-f]+)\.\w+$', path)
        if named and exists(path):  # torch.hub checks what it fetches, and that alone
            check_hash(path, named[1])
        contents = torch.hub.load_state_dict_from_url(
            url, map_location='cpu', check_hash=True, weights_only=True
        )
        params = params_of(contents)
        check_finite(params)
        return params
    except Exception as error:  # damaged bytes make torch.load raise almost anything
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise RuntimeError(
            f'cannot load {url} ({reason}): put the file from there at {path}'
        ) from error
