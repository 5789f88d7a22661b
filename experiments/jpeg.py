"""Writes CIFAR-10 as JPEG files in class folders, as the experiments are trained on.

    python -m experiments.jpeg ../cifar10-jpeg --dataroot .    # which CIFAR-10 is fetched into

FOLDER/train/CLASS/0000.jpg and so on, and test/: of each class in the order of the data set, with
Pillow's defaults, which are quality 75 and colours at half the resolution. Of the files that the
rows in logs/ are of, the quantisation tables, the sampling and the headers are the same.
"""

import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cli import ArgumentParser, exit_on_error
from training import data


def write(images, classes, folder):
    """Writes a set of images in memory as folder/CLASS/NUMBER.jpg."""
    for name in classes:
        (folder / name).mkdir(parents=True)
    written = Counter()
    pairs = zip(images.images.numpy(), images.labels.tolist())
    for pixels, label in tqdm(pairs, folder.name, len(images), disable=None, leave=False):
        name = classes[label]
        Image.fromarray(pixels).save(folder / name / f'{written[name]:04}.jpg')
        written[name] += 1


def main(argv=None):
    parser = ArgumentParser(prog='experiments.jpeg', description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='to write, which is not there yet')
    parser.add_argument('--dataset', choices=('CIFAR10', 'CIFAR100', 'Digits'), default='CIFAR10',
                        help='what to write (default: %(default)s)')
    parser.add_argument('--dataroot', default='.', help='folder of its files (default: .)')
    args = parser.parse_args(argv)
    with exit_on_error('experiments.jpeg', (ValueError, OSError)):
        if args.folder.exists():
            raise ValueError(f'{args.folder}: is there already: expected a new folder')
        sets = data.load_splits(args.dataset, args.dataroot)
        args.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder.parent) as beside:  # whole or not at all
            write(sets.train, sets.classes, Path(beside, 'images', 'train'))
            write(sets.test, sets.classes, Path(beside, 'images', 'test'))
            Path(beside, 'images').rename(args.folder)
    print(f'{len(sets.train):,} and {len(sets.test):,} images written to {args.folder}')


if __name__ == '__main__':
    main()
