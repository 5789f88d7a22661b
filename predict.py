"""Labels image files with a trained network: the five best, with their probabilities.

    python predict.py cat.jpg dog.jpg --model logs/diracnet-28-2
    python predict.py cat.jpg --model diracnet-int8.onnx    # any file that export.py writes
    python predict.py cat.jpg --model diracnet18            # the published network, of ImageNet

A file that is missing or no image is named on stderr, and passed over; the exit status is 2 then.
"""

import argparse
import sys

if __name__ == '__main__':  # before what takes seconds to import
    from cli import exit_on_ctrl_c

    exit_on_ctrl_c()

import torch
from torchvision.models import ResNet18_Weights

import diracnets
from cli import ArgumentParser, exit_on_error
from diracnet import diracnet18, diracnet34
from diracnets.fold import fold
from diracnets.preprocessing import DataError, Preprocessing

PUBLISHED = {'diracnet18': diracnet18, 'diracnet34': diracnet34}


def parse_options(argv=None):
    parser = ArgumentParser(
        prog='predict.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file')
    parser.add_argument(
        '--model', required=True,
        help='checkpoint, folder of a run, file of export.py, or one of '
             f'{", ".join(PUBLISHED)}',
    )
    return parser.parse_args(argv)


def imagenet_classes():
    return ResNet18_Weights.IMAGENET1K_V1.meta['categories']


def load(model):
    """Returns (folded network, Preprocessing, class names or None) of a name or file."""
    if model in PUBLISHED:
        return PUBLISHED[model](pretrained=True).eval(), Preprocessing.for_dataset('ImageNet'), imagenet_classes()
    trained = diracnets.load(model)
    classes = trained.classes
    if classes is None and (trained.preprocess.kind, trained.num_classes) == ('ImageNet', 1000):
        classes = imagenet_classes()
    return fold(trained.model), trained.preprocess, classes


@torch.inference_mode()
def predict(opt):
    """Prints the labels of the images that can be read; returns how many cannot."""
    network, inputs, classes = load(opt.model)
    unreadable = 0
    for path in opt.images:
        try:
            image = inputs(path)
        except DataError as error:
            print(f'predict.py: {error}', file=sys.stderr)
            unreadable += 1
            continue
        probabilities = network(image[None]).softmax(dim=1)[0]  # (num_classes,)
        if not probabilities.isfinite().all():
            raise RuntimeError(f'{opt.model}: its outputs are no numbers: expected finite ones')
        print(path)
        for p, label in zip(*probabilities.topk(min(5, len(probabilities)))):
            print(f'  {100 * p:6.2f} %  {classes[label] if classes else f"class {label}"}')
        sys.stdout.flush()  # so that errors stand where they belong
    return unreadable


def main(argv=None):
    opt = parse_options(argv)
    with exit_on_error('predict.py'):
        unreadable = predict(opt)
    if unreadable:
        sys.exit(2)


if __name__ == '__main__':
    main()
