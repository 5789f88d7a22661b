"""Writing files so that a crash or a full disk leaves the old one or the new one, complete."""

import contextlib
import os
import tempfile
from pathlib import Path


def write(path, content):
    """Writes bytes into a new file: when this returns they are on the disk. Raises OSError."""
    with open(path, 'xb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_beside(path, content):
    """Writes bytes into the file that is to take the place of `path`: raises OSError."""
    try:
        if os.path.lexists(path + '.tmp'):  # of a run that was killed; a link is not followed
            os.remove(path + '.tmp')
        write(path + '.tmp', content)
    except OSError as error:
        if os.path.exists(path + '.tmp'):
            os.remove(path + '.tmp')
        raise OSError(f'{path} cannot be written ({error.strerror}); the last one stays') from error


@contextlib.contextmanager
def errors_that_name(path):
    """Has an OSError name the file that was asked for, in place of one on the way to it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


@contextlib.contextmanager
def folder_beside(path):
    """A temporary folder beside a file to come; folders made for one that does not come go."""
    target = Path(path).absolute().parent
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        with errors_that_name(path):
            target.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=target)
        with folder as name:
            yield name
    except BaseException:
        for folder in made:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
