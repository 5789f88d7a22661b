"""Writes CIFAR-10 as JPEG files in class folders, the training data of the experiments.

    python -m experiments.jpeg ../cifar10-jpeg --dataroot .    # where CIFAR-10 is downloaded to

The files are FOLDER/train/CLASS/0000.jpg and so on, and test/, in the order of the dataset. They
have Pillow's defaults: quality 75, chroma subsampling 4:2:0. Quantization tables, subsampling and
headers equal those of the files that the results in logs/ were measured on.
"""

import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cli import ArgumentParser, exit_on_error
from training import data


def write(images, classes, folder):
    """Writes images in memory as folder/CLASS/NUMBER.jpg."""
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
    parser.add_argument('folder', type=Path, help='new folder to write')
    parser.add_argument('--dataset', choices=('CIFAR10', 'CIFAR100', 'Digits'), default='CIFAR10',
                        help='dataset to write (default: %(default)s)')
    parser.add_argument('--dataroot', default='.', help='folder of its files (default: .)')
    args = parser.parse_args(argv)
    with exit_on_error('experiments.jpeg', (ValueError, OSError)):
        if args.folder.exists():
            raise ValueError(f'{args.folder}: already exists; use another folder')
        splits = data.load_splits(args.dataset, args.dataroot)
        args.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder.parent) as temporary:
            images = Path(temporary, 'images')  # renamed when it is complete
            write(splits.train, splits.classes, images / 'train')
            write(splits.test, splits.classes, images / 'test')
            images.rename(args.folder)
    print(f'{len(splits.train):,} and {len(splits.test):,} images written to {args.folder}')


if __name__ == '__main__':
    main()
