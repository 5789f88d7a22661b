"""Folders of the user's own images: layouts, class names, formats and corrupt files."""

import os
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import export
import train
from corruption import jpeg_segment, png_of
from diracnets import image_files, preprocessing
from diracnets.image_files import DataError
from diracnets.preprocessing import Preprocessing
from runs import assert_same_run, on_ranks, refused, run, stats_of, write_images, write_sets
from training import data, distributed, folders

NUMBERS = [str(number) for number in range(12)]  # as text, '10' and '11' are before '2'


def write_counted(root, classes, first=1):
    """Writes `first` + i images of the ith class."""
    for i, name in enumerate(classes):
        write_images(root, [name], n=first + i)
    return root


# ---------------------------------------------------------------- class names


@pytest.fixture(scope='module')
def numbered(tmp_path_factory):
    """A folder with i + 1 test images of class i, and a checkpoint of a model for it.

    The model predicts class number 2 for every image.
    """
    root = tmp_path_factory.mktemp('numbered')
    for split in ('train', 'test'):
        write_counted(root / split, NUMBERS)
    run(root, root / 'run', '--epochs', 1)
    model = torch.load(root / 'run' / 'model.pt7', weights_only=True)
    assert model['classes'] == NUMBERS
    model['params']['fc.weight'].zero_()
    model['params']['fc.bias'] = torch.eye(12)[2]
    return root, model


@pytest.mark.parametrize(('classes', 'options', 'n'), [
    (NUMBERS, [], 3),
    (sorted(NUMBERS), [], 11),  # of an older checkpoint: number 2 is class '10'
    (sorted(NUMBERS), ['--force'], 11),
    ([f'n{name}' for name in NUMBERS], ['--force'], 3),
    (None, [], 3),  # a bare state dict
])
def test_evaluate_matches_numbered_class_folders(numbered, tmp_path, capsys, classes, options, n):
    root, model = numbered
    model = {**model, 'classes': classes} if classes else model['params']
    torch.save(model, tmp_path / 'model.pt7')
    train.main(['--evaluate', '--dataset', 'Folder', '--dataroot', str(root), '--dtype', 'float',
                '--resume', str(tmp_path / 'model.pt7'), *options])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f'test_acc: {100 * n / 78:.2f}'
    by_position = '--force: classes are matched by position: 0 is n0, 1 is n1, 2 is n2, ...\n'
    assert (by_position in printed) == (classes is not None and classes[0] == 'n0')


def test_resume_of_a_run_with_class_numbers_sorted_as_text(numbered, tmp_path, monkeypatch):
    root, _ = numbered
    with monkeypatch.context() as patch:
        patch.setattr(folders, 'sort_classes', sorted)  # as in older versions
        run(root, tmp_path / 'whole', '--val', 20)
        run(root, tmp_path / 'run', '--val', 20, '--epochs', 1)
    run(root, tmp_path / 'run', '--val', 20, '--resume', 'auto')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')
    saved = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    assert saved['classes'] == sorted(NUMBERS)


@pytest.mark.parametrize('names', [
    ['-1', '0', '1', '2', '10'], ['007', '8', '11'], ['1', '10', '2', 'x'], ['1.0', '10', '2'],
    ['1', '10', '2', '²'], ['10', '2', '３'],
])
def test_sort_classes_is_numeric_for_integers_only(names):
    assert folders.sort_classes(names[::-1]) == names


def test_test_folder_may_have_some_of_the_classes(tmp_path, capsys):
    write_counted(tmp_path / 'train', ['ant', 'bee', 'cat'])
    write_counted(tmp_path / 'test', ['bee', 'cat'], first=4)
    splits = data.load_splits('Folder', str(tmp_path))
    assert splits.classes == ['ant', 'bee', 'cat']
    assert splits.train.labels.bincount().tolist() == [1, 2, 3]
    assert splits.test.labels.bincount().tolist() == [0, 4, 5]
    assert f'{tmp_path}/test: 2 of the 3 classes' in capsys.readouterr().err


def test_evaluate_of_a_folder_with_some_of_the_classes(numbered, tmp_path, capsys):
    root, model = numbered
    torch.save(model, tmp_path / 'model.pt7')
    write_counted(tmp_path / 'test', ['2', '11', '7'], first=4)
    options = ['--evaluate', '--dataset', 'Folder', '--dataroot', str(tmp_path), '--dtype', 'float',
               '--resume', str(tmp_path / 'model.pt7')]
    train.main(options)
    assert capsys.readouterr().out.splitlines()[-1] == f'test_acc: {100 * 4 / 15:.2f}'
    (tmp_path / 'test' / '7').rename(tmp_path / 'test' / 'seven')
    for more in ([], ['--force']):
        assert 'the dataset 3 (11 to seven)' in refused(
            capsys, *options, *more)


# ---------------------------------------------------------------- test/ and val/


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """A folder with 10 training, 6 validation and 8 test images."""
    root = tmp_path_factory.mktemp('both')
    for split, n in (('train', 5), ('val', 3), ('test', 4)):
        write_images(root / split, n=n, seed=n)
    return root


def test_val_selects_the_best_checkpoint_when_there_is_a_test_folder_too(both, tmp_path, capsys):
    run(both, tmp_path, '--epochs', 4, '--dtype', 'float')
    assert f'{both}/val selects best.pt7, {both}/test is evaluated too' in capsys.readouterr().out
    stats = stats_of(tmp_path)
    val, test = ([epoch[f'{split}_acc'] for epoch in stats] for split in ('val', 'test'))
    assert all(accuracy * 6 / 100 == pytest.approx(round(accuracy * 6 / 100)) for accuracy in val)
    assert all(accuracy * 8 / 100 == pytest.approx(round(accuracy * 8 / 100)) for accuracy in test)
    best = torch.load(tmp_path / 'best.pt7', weights_only=True)
    assert best['best'] == max(val)
    assert val[best['epoch'] - 1] == max(val)


def test_load_splits_reads_the_labeled_ones_of_test_and_val(both, tmp_path, capsys):
    def sizes(root=both, **options):
        splits = data.load_splits('Folder', str(root), **options)
        return {name: len(images) for name in ('train', 'val', 'test')
                if (images := getattr(splits, name)) is not None}

    assert sizes() == {'train': 10, 'val': 6, 'test': 8}
    assert sizes(use_val=False) == {'train': 10, 'test': 8}
    assert sizes(training=False) == {'test': 8}
    assert capsys.readouterr().out.splitlines()[1:] == [
        f'{both}/test is evaluated, {both}/val is not used'] * 2
    for layout in ('flat', 'images'):
        root = tmp_path / layout
        shutil.copytree(both, root)
        shutil.rmtree(root / 'test' / 'cat')
        (root / 'test' / 'dog').rename(root / 'test' / 'images')
        if layout == 'flat':
            for image in (root / 'test' / 'images').iterdir():
                image.rename(root / 'test' / image.name)
            (root / 'test' / 'images').rmdir()
        for expected, options in (
            ({'train': 10, 'test': 6}, {}), ({'test': 6}, {'training': False}),
            ({'test': 6}, {'training': False, 'classes': ['cat', 'dog']}),
        ):
            assert sizes(root, **options) == expected
            assert capsys.readouterr().out == (
                f'{root}/test: no class folders; {root}/val is used instead\n')
        shutil.rmtree(root / 'val')
        with pytest.raises(DataError, match='/test: [01] class folders|class folders: images'):
            sizes(root)


def test_held_out_images_take_the_place_of_val(both, tmp_path, capsys):
    run(both, tmp_path, '--epochs', 1, '--val', 3)
    assert f'{both}/test is evaluated, {both}/val is not used' in capsys.readouterr().out
    stats, = stats_of(tmp_path)
    assert stats['val_acc'] * 3 / 100 == pytest.approx(round(stats['val_acc'] * 3 / 100))
    assert stats['images_per_second'] == pytest.approx(7 / stats['train_time'])


def test_export_uses_the_test_set_that_train_evaluates(both, tmp_path):
    root = tmp_path / 'images'
    shutil.copytree(both, root)
    shutil.rmtree(root / 'test' / 'dog')  # one class folder is left, and is a class of the model
    loaded = SimpleNamespace(path='run', num_classes=2, classes=['cat', 'dog'],
                             preprocess=Preprocessing.for_dataset('Folder'))
    opt = SimpleNamespace(dataset='Folder', dataroot=str(root))
    assert export.load_test_set(opt, loaded).labels.tolist() == [0] * 4


# ---------------------------------------------------------------- listing


def test_list_images_descends_into_class_folders(tmp_path, capsys):
    """The layout of Tiny ImageNet, for one class only, and links."""
    write_images(tmp_path / 'set', n=3)
    write_images(tmp_path / 'set' / 'cat', ['images'], n=2)
    write_images(tmp_path / 'set' / 'cat' / 'images', ['deeper'], n=1)
    write_images(tmp_path / 'set' / 'cat', ['.hidden'], n=1)
    write_images(tmp_path, ['elsewhere'], n=2)
    (tmp_path / 'set' / 'dog' / 'link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere' / 'loop').symlink_to(tmp_path / 'set' / 'dog')
    (tmp_path / 'set' / 'cat' / 'boxes.txt').write_text('')
    (tmp_path / 'set' / 'cat' / 'images' / 'boxes.txt').write_text('')
    paths, labels, classes = folders.list_images(str(tmp_path / 'set'))
    assert [path.removeprefix(f'{tmp_path}/set/') for path in paths] == [
        'cat/0.png', 'cat/1.png', 'cat/2.png', 'cat/images/0.png', 'cat/images/1.png',
        'cat/images/deeper/0.png', 'dog/0.png', 'dog/1.png', 'dog/2.png', 'dog/link/0.png',
        'dog/link/1.png']
    assert (labels, classes) == ([0] * 6 + [1] * 5, ['cat', 'dog'])
    assert 'skipped 4 entries (2 .txt, 1 .hidden, 1 loop)' in capsys.readouterr().err


# ---------------------------------------------------------------- formats

SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8), (120, 90))


@pytest.mark.parametrize('extension', preprocessing.OPTIONAL_EXTENSIONS)
def test_list_images_accepts_the_formats_that_opencv_decodes(tmp_path, extension, capsys):
    if extension not in preprocessing.image_extensions():
        pytest.skip('this OpenCV has no such decoder')
    for name in ('cat', 'dog'):
        (tmp_path / 'test' / name).mkdir(parents=True)
        image = SMOOTH[..., :1] if extension in ('.pgm', '.pbm') else SMOOTH
        image = (image > 127).astype(np.uint8) * 255 if extension == '.pbm' else image
        cv2.imwrite(str(tmp_path / 'test' / name / f'image{extension.upper()}'), image)
    inputs = Preprocessing.for_dataset('Folder', 72)
    splits = data.load_splits('Folder', str(tmp_path), inputs, training=False)
    assert len(splits.test) == 2
    batch, *_ = splits.test[torch.arange(2), None, torch.arange(2)]
    predicted = inputs(splits.test.paths[0])  # as in predict.py
    assert torch.equal(predicted, preprocessing.normalize(batch, inputs)[0])
    expected = preprocessing.resize_and_crop(image[..., ::-1], 82, 72)
    error = batch[0].permute(1, 2, 0).numpy() - expected.reshape(72, 72, -1).astype(float)
    assert np.abs(error).mean() < 12  # some formats are lossy, and GIF has few colors
    assert capsys.readouterr().err == ''


def test_image_extensions_are_those_of_the_installed_opencv(monkeypatch):
    monkeypatch.setattr(cv2, 'haveImageWriter', lambda name: name == 'image.jp2')
    assert preprocessing.image_extensions.__wrapped__() == (
        *preprocessing.IMAGE_EXTENSIONS, '.jp2')


# ---------------------------------------------------------------- corrupt files


def corrupt(root, *names):
    """Cuts files off in the middle; returns their paths."""
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:-30])
    return [str(root / name) for name in names]


def small_options(size):
    """The options of `run` for images of this size."""
    large = ['--depth', 18, '--width', 0.125, '--batch_size', 4, '--nthread', 1]
    return ['--image_size', size, '--epochs', 1, '--dtype', 'float', *(large if size > 64 else [])]


@pytest.mark.parametrize('size', [32, 70])
def test_corrupt_files_are_listed_at_once_or_left_out(tmp_path, capsys, size):
    root = write_sets(tmp_path / 'images', 5, 3, (80, 80))
    clean = shutil.copytree(root, tmp_path / 'clean')
    names = ('train/cat/1.png', 'train/dog/3.png', 'test/cat/0.png')
    errors = [f'{path}: not a readable image' for path in corrupt(root, *names)]
    with pytest.raises(SystemExit) as exit_info:
        run(root, tmp_path / 'run', *small_options(size))
    assert exit_info.value.code == 2
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines == errors
    assert last.startswith(f'train.py: {root}: 3 of 16 files are corrupt; ')
    assert not (tmp_path / 'run').exists()

    run(root, tmp_path / 'run', '--skip_corrupt', *small_options(size))
    assert capsys.readouterr().err.splitlines() == [
        *errors, f'{root}/train: skipped 2 of 10 files', f'{root}/test: skipped 1 of 6 files']
    for name in names:
        (clean / name).unlink()
    run(clean, tmp_path / 'whole', *small_options(size))
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_names_of_corrupt_files_cannot_forge_lines(tmp_path, capsys):
    root = write_sets(tmp_path, 2, 1)
    os.rename(root / 'train/cat/0.png', root / 'train/cat/\x1b[31m\nall fine.png')
    corrupt(root, 'train/cat/\x1b[31m\nall fine.png', 'train/dog/1.png')
    with pytest.raises(DataError, match='2 of 6 files'):
        data.load_splits('Folder', str(root))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition('train/')[2] for line in lines] == [
        r'cat/\x1b[31m\nall fine.png: not a readable image', 'dog/1.png: not a readable image']


def test_corrupt_files_are_listed_up_to_a_limit(tmp_path, capsys):
    root = write_sets(tmp_path, 14, 1)
    paths = corrupt(root, *(f'train/{name}/{i}.png' for name in ('cat', 'dog') for i in range(14)))
    with pytest.raises(DataError, match='28 of 30 files'):
        data.load_splits('Folder', str(root))
    lines = capsys.readouterr().err.splitlines()
    listed = sorted(paths)[:20]  # in the order of the paths
    assert lines == [*(f'{path}: not a readable image' for path in listed), '... and 8 more']
    (tmp_path / 'train/dog/0.png').write_bytes((tmp_path / 'test/dog/0.png').read_bytes())
    with pytest.raises(DataError, match='train: all files of a class are corrupt'):
        data.load_splits('Folder', str(root), skip_corrupt=True)


def test_no_check_reads_no_large_file(tmp_path, monkeypatch):
    root = write_sets(tmp_path, 2, 2, (80, 80))
    corrupt(root, 'train/cat/0.png', 'test/cat/0.png')
    monkeypatch.setattr(folders, 'check_image', None)
    inputs = Preprocessing.for_dataset('Folder', 70)
    assert len(data.load_splits('Folder', str(root), inputs, check=False).train) == 4


def load_on_a_rank(root, expected):
    """Checks that a rank leaves out all corrupt files, and checks its share of the others."""
    checked, check = [], folders.check_image
    folders.check_image = lambda path: checked.append(path) or check(path)
    distributed.init()
    splits = data.load_splits('Folder', root, Preprocessing.for_dataset('Folder', 70),
                              skip_corrupt=True)
    assert [len(splits.train), len(splits.test)] == expected
    assert len(checked) == 8
    distributed.shutdown()


@pytest.mark.slow
def test_ranks_share_the_check_and_leave_out_the_same_files(tmp_path):
    root = write_sets(tmp_path / 'images', 5, 3, (80, 80))
    corrupt(root, 'train/cat/1.png', 'train/dog/2.png', 'train/dog/3.png', 'test/cat/0.png')
    on_ranks(tmp_path, 2, load_on_a_rank, str(root), [7, 5])
    errors = [(tmp_path / f'rank{rank}-of-2' / 'stderr').read_text() for rank in (0, 1)]
    assert [len(text.splitlines()) for text in errors] == [6, 0]


@pytest.mark.parametrize('extension', ['jpg', 'png', 'webp', 'bmp', 'gif'])
def test_check_image_agrees_with_read_image(tmp_path, extension, monkeypatch):
    content = cv2.imencode(f'.{extension}', SMOOTH)[1].tobytes()
    path = tmp_path / 'image'

    def error_of(read):
        try:
            read(str(path))
        except DataError as error:
            return str(error)

    if extension in ('jpg', 'png', 'webp'):
        with monkeypatch.context() as patch:
            patch.setattr(cv2, 'imdecode', None)  # complete files are not decoded
            path.write_bytes(content)
            image_files.check_image(path)
            patch.setattr(image_files, 'START_BYTES', 200)
            image_files.check_image(path)
    for cut in (0, 1, 2, 30, len(content) // 2, len(content) - 20, len(content)):
        for trailing in (b'', bytes(10), bytes(100), content + bytes(100)):
            path.write_bytes(content[: len(content) - cut] + trailing)
            error, expected = error_of(image_files.check_image), error_of(image_files.read_image)
            assert error in (None, expected)  # no false alarm
            if not trailing or not any(trailing):
                assert error == expected or extension == 'webp' and trailing
    path.unlink()
    assert error_of(image_files.check_image) == f'{path}: not readable (No such file or directory)'
    os.mkfifo(path)
    assert error_of(image_files.check_image) == f'{path}: not a regular file'


def test_check_image_limits_the_pixels_without_decoding(tmp_path):
    (tmp_path / 'image').write_bytes(png_of(100_000, 100_000))
    with pytest.raises(DataError, match='100000 x 100000 pixels: .*MAX_PIXELS'):
        image_files.check_image(tmp_path / 'image')


def test_check_image_reads_headers_after_long_exif_data(tmp_path):
    content = cv2.imencode('.jpg', SMOOTH)[1].tobytes()
    path = tmp_path / 'image.jpg'
    exif = 2 * jpeg_segment(0xE2, bytes(60_000))  # the frame header is after START_BYTES
    path.write_bytes(content[:2] + exif + content[2:])
    image_files.check_image(path)
    path.write_bytes(content[:2] + exif + content[2:-2])
    with pytest.raises(DataError, match='not a readable image'):
        image_files.check_image(path)


# ---------------------------------------------------------------- changed folders


def test_resume_rejects_a_folder_whose_images_changed(tmp_path, capsys):
    root = write_sets(tmp_path / 'images', 10, 3)
    run(root, tmp_path / 'run', '--epochs', 1)
    moved = shutil.copytree(root, tmp_path / 'moved')
    (moved / 'train' / 'cat' / '3.png').rename(moved / 'train' / 'cat' / 'x.png')
    options = ['--dataset', 'Folder', '--dataroot', moved, '--depth', 10, '--batch_size', 12,
               '--epochs', 2, '--epoch_step', '[2]', '--save', tmp_path / 'run', '--resume', 'auto']
    assert 'the images changed from 26 files, ' in refused(capsys, *options)
    (moved / 'train' / 'cat' / 'x.png').rename(moved / 'train' / 'cat' / '3.png')
    for i in range(10):
        shutil.copy(moved / 'train' / 'dog' / '1.png', moved / 'train' / 'dog' / f'more{i}.png')
    assert ' to 36 files, ' in refused(capsys, *options)
    forced = shutil.copytree(tmp_path / 'run', tmp_path / 'forced')
    run(moved, forced, '--resume', 'auto', '--force')
    assert [epoch['files'][:8] for epoch in stats_of(forced)] == ['26 files', '36 files']
    for i in range(10):
        (moved / 'train' / 'dog' / f'more{i}.png').unlink()
    run(moved, tmp_path / 'run', '--resume', 'auto')  # in another place
    run(root, tmp_path / 'whole')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_resume_accepts_checkpoints_without_the_names_of_files(tmp_path):
    root = write_sets(tmp_path / 'images', 4, 3)
    run(root, tmp_path / 'run', '--epochs', 1)
    older = torch.load(tmp_path / 'run' / 'model.pt7', weights_only=True)
    del older['args']['files']
    torch.save(older, tmp_path / 'run' / 'model.pt7')
    run(root, tmp_path / 'run', '--resume', 'auto')
    assert stats_of(tmp_path / 'run')[1]['files'].startswith('14 files, ')
