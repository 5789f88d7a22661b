"""Atomic file replacement: after a crash the complete old or new file exists."""

import contextlib
import os
import tempfile
from pathlib import Path


def atomic_write(path, content):
    """Replaces the file at `path` by these bytes, which are synced to disk on return.

    Raises OSError, naming `path`; the previous file is unchanged then.
    """
    with replacement(path) as temporary:
        write_synced(temporary, content)
    sync_folder(os.path.dirname(path))


@contextlib.contextmanager
def replacement(path):
    """Yields the name of a temporary file next to `path`, which replaces it after the block.

    The block creates the file. An error removes it; an OSError is raised again naming `path`.
    """
    temporary, exists = f'{path}.tmp', os.path.exists(path)
    try:
        if os.path.lexists(temporary):  # left by a killed process; a link is not followed
            os.remove(temporary)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.strerror:  # else it names a file already
            kept = '; the previous file is unchanged' * exists
            raise OSError(f'{path}: cannot be written ({error.strerror}){kept}') from error
        raise


def write_synced(path, content):
    """Writes bytes to a new file and syncs it to disk. Raises OSError, also if the file exists."""
    with open(path, 'xb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def link_or_copy(source, path):
    """Makes `path` a hard link to `source`, or a synced copy on file systems without links."""
    try:
        os.link(source, path)
    except OSError:
        write_synced(path, Path(source).read_bytes())


def sync_folder(folder):
    """Syncs the file names in a folder to disk, so that renames survive a power failure."""
    descriptor = os.open(folder or '.', os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def path_in_errors(path):
    """Replaces the path of a temporary file by `path` in an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


@contextlib.contextmanager
def sibling_tempdir(path):
    """Yields a temporary folder next to a file to be written, whose parent folders it creates.

    On an error the created parent folders are removed.
    """
    target = Path(path).absolute().parent
    created = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        with path_in_errors(path):
            target.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=target)
        with folder as name:
            yield name
    except BaseException:
        for folder in created:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
