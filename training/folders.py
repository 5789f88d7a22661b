"""Image files in class folders: listing, checking and reading them."""

import hashlib
import os
import re
import threading
from collections import Counter
from multiprocessing.pool import ThreadPool

import numpy as np

from cli import say, warn
from diracnets.class_names import class_positions
from diracnets.image_files import DataError, check_image
from diracnets.preprocessing import MAX_SMALL, image_extensions, list_files, read_test_image
from training.datasets import ImageFiles, MemoryImages
from training.distributed import merge_dicts, rank, world_size
from training.progress import Progress

MAX_LISTED = 20  # corrupt files


def class_folders(folder):
    """Returns the names of the class folders in a folder, sorted, without hidden folders."""
    entries = os.scandir(folder) if os.path.isdir(folder) else ()
    return sorted(entry.name for entry in entries
                  if entry.is_dir() and not entry.name.startswith('.'))


def sort_classes(names):
    """Sorts class names: as numbers if all are integers ('2' before '10'), else as text."""
    numeric = all(re.fullmatch('-?[0-9]+', name) for name in names)
    return sorted(names, key=int if numeric else None)


def list_images(folder, min_classes=2):
    """Lists a folder of class folders: returns (paths, labels, class names).

    Class folders are searched with all their subfolders. The order is that of the paths, in each
    folder the files first; that of the classes is `sort_classes`. Hidden entries and files with
    other extensions are skipped, and counted on stderr; files outside the class folders are
    ignored. Raises DataError for a missing folder, fewer than `min_classes` classes, or a class
    without images.
    """
    if not os.path.isdir(folder):
        raise DataError(f'{folder}: no such folder; expected one folder of images for each class')
    names = class_folders(folder)
    if len(names) < min_classes:
        raise DataError(f'{folder}: {len(names)} class folders, expected {min_classes} or more')
    classes = sort_classes(names)
    label_of = {name: label for label, name in enumerate(classes)}
    extensions = image_extensions()
    paths, labels = [], []
    skipped = [entry.name for entry in os.scandir(folder)
               if entry.is_dir() and entry.name.startswith('.')]
    for name in names:
        files, others = list_files(os.path.join(folder, name))
        if not files:
            counts = f', only {_count_by_extension(others)}' if others else ''
            raise DataError(f'{os.path.join(folder, name)}: a class folder without images{counts}: '
                            f'expected {", ".join(extensions)}')
        paths += files
        labels += [label_of[name]] * len(files)
        skipped += others
    if skipped and rank() == 0:
        entries = 'entry' if len(skipped) == 1 else 'entries'
        warn(f'{folder}: skipped {len(skipped)} {entries} ({_count_by_extension(skipped)}): '
             f'expected {", ".join(extensions)}')
    return paths, labels, classes


def _count_by_extension(names):
    """Counts names by extension, the most frequent first: '2 .txt, 1 .heic, 1 README'."""
    counts = Counter(
        name if name.startswith('.') else os.path.splitext(name)[1].lower() or name
        for name in names
    ).most_common()
    rest = f', {sum(count for _, count in counts[5:])} others' if counts[5:] else ''
    return ', '.join(f'{count} {extension}' for extension, count in counts[:5]) + rest


# ---------------------------------------------------------------- reading and checking


def _find_corrupt(numbers, read, title, nthread):
    """Calls read(i) for each of `numbers` in threads, with a progress bar: returns {i: error}.

    The errors are the messages of DataErrors. Every rank returns those of all ranks.
    """
    stopped = threading.Event()

    def error_of(i):
        try:
            if not stopped.is_set():
                read(i)
        except DataError as error:
            return i, str(error)

    pool = ThreadPool(max(1, nthread))
    try:
        done = pool.imap_unordered(error_of, numbers, chunksize=64)
        errors = dict(filter(None, Progress(done, title, len(numbers), 'img')))
    finally:  # a thread that reads while the interpreter exits would abort the process
        stopped.set()
        pool.terminate()
        pool.join()
    return merge_dicts(errors)


def _read_images(folder, paths, labels, size, nthread, check):
    """Reads small images into memory, and checks the files of large ones.

    Returns (BatchDataset, {index of a corrupt file: error}).
    """
    if size > MAX_SMALL:
        share = range(rank(), len(paths), world_size()) if check else ()
        return ImageFiles(paths, labels, size), _find_corrupt(
            share, lambda i: check_image(paths[i]), f'checking {folder}', nthread)
    pixels = np.empty((len(paths), size, size, 3), np.uint8)

    def read(i):
        pixels[i] = read_test_image(paths[i], size)

    errors = _find_corrupt(range(len(paths)), read, f'reading {folder}', nthread)
    return MemoryImages(pixels, labels), errors


def _report_corrupt(root, errors, total, skip_corrupt):
    """Lists corrupt files on stderr; raises DataError unless they are skipped."""
    if len(errors) == 1 and not skip_corrupt:
        raise DataError(errors[0])
    if errors and rank() == 0:
        more = [f'... and {len(errors) - MAX_LISTED} more'] * (len(errors) > MAX_LISTED)
        for line in errors[:MAX_LISTED] + more:
            warn(line)
    if errors and not skip_corrupt:
        raise DataError(f'{root}: {len(errors)} of {total} files are corrupt; repair or remove '
                        'them, or skip them with train.py --skip_corrupt')


def _without_corrupt(folder, images, errors):
    """Returns images without the corrupt ones; raises DataError if a class has no others."""
    rest = images.subset([i for i in range(len(images)) if i not in errors])
    if len(rest.labels.unique()) < len(images.labels.unique()):
        raise DataError(f'{folder}: all files of a class are corrupt')
    if rank() == 0:
        warn(f'{folder}: skipped {len(errors)} of {len(images)} files')
    return rest


# ---------------------------------------------------------------- splits


def _test_folders(folders, classes, training, use_val):
    """Returns {split: folder} of the labeled ones among `folders`; prints the use of each folder.

    folders: with images for testing, in order of preference, the one for validation last.
    """
    folders = [folder for folder in folders if os.path.isdir(folder)] or folders[:1]
    names = {folder: class_folders(folder) for folder in folders}
    # one folder that is no class contains unlabeled images, such as test/images/
    labeled = [folder for folder in folders if names[folder][1:] or {*names[folder]} & {*classes}]
    test, *others = labeled or folders[:1]
    lines = [f'{folder}: no class folders; {test} is used instead'
             for folder in folders if labeled and folder not in labeled]
    splits = {'test': test}
    if others and training and use_val:
        splits['val'] = others[0]
        lines.append(f'{others[0]} selects best.pt7, {test} is evaluated too')
    elif others:
        lines.append(f'{test} is evaluated, {others[0]} is not used')
    if lines and rank() == 0:
        say(*lines)
    return splits


def load_folder(root, test_folders, size, nthread=4, training=True, classes=(), use_val=True,
                check=True, skip_corrupt=False):
    """Loads class folders of a dataset: returns the fields of DataSplits.

    test_folders: their names, in order of preference; the first with class folders is the test set,
    another one the validation set, if `use_val`. training: False loads the test set only; classes:
    class names of the model to test. A test set may have some of the training set's classes. check:
    check large image files, which are read on demand. skip_corrupt: skip corrupt files; otherwise
    they are listed and raise DataError.
    """
    listed, classes = _list_splits(root, test_folders, training, classes, use_val)
    read = {split: _read_images(*files, size, nthread, check) for split, files in listed.items()}
    errors_of = {split: errors for split, (_, errors) in read.items()}
    _report_corrupt(root, [errors[i] for errors in errors_of.values() for i in sorted(errors)],
                    sum(len(images) for images, _ in read.values()), skip_corrupt)
    splits = {split: _without_corrupt(listed[split][0], images, errors) if errors else images
              for split, (images, errors) in read.items()}
    return {**splits, 'classes': classes, 'files': _fingerprint(listed, errors_of)}


def _list_splits(root, test_folders, training, classes, use_val):
    """Returns ({split: (folder, paths, labels)}, class names) of a dataset, see `load_folder`."""
    listed, train_folder = {}, os.path.join(root, 'train')
    if training:
        *files, classes = list_images(train_folder)
        listed['train'] = train_folder, *files
    folders = [os.path.join(root, name) for name in test_folders]
    for split, folder in _test_folders(folders, classes, training, use_val).items():
        paths, labels, names = list_images(folder, min_classes=1)
        if training:
            positions = _positions(folder, names, train_folder, classes)
            labels = [positions[label] for label in labels]
        listed[split] = folder, paths, labels
    return listed, classes if training else names


def files_of(root, test_folders):
    """Returns the entry `files` of the log of a run on these class folders, if none is corrupt."""
    listed, _ = _list_splits(root, test_folders, True, (), True)
    return _fingerprint(listed, dict.fromkeys(listed, ()))


def _fingerprint(listed, corrupt):
    """Returns the number of files and a hash of their sorted names, as text.

    listed: as of `_list_splits`; corrupt: the indices of the files to leave out, by split.
    """
    names = sorted(f'{split}{path.removeprefix(folder)}'
                   for split, (folder, paths, _) in listed.items()
                   for i, path in enumerate(paths) if i not in corrupt[split])
    digest = hashlib.sha256(os.fsencode('\0'.join(names))).hexdigest()
    return f'{len(names)} files, hash {digest[:16]}'


def _positions(folder, names, train_folder, classes):
    """Returns the position of each class folder of a test set among those of the training set."""
    positions = class_positions(names, classes)
    if positions is None:
        others = ', '.join(sorted({*names} - {*classes})[:5])
        raise DataError(f'{train_folder} and {folder}: different class folders: {others}')
    if len(names) < len(classes) and rank() == 0:
        warn(f'{folder}: {len(names)} of the {len(classes)} classes')
    return positions
