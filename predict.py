"""Classifies images with a trained model: prints the top five classes of each image.

    python predict.py cat.jpg dog.jpg --model logs/diracnet-28-2
    python predict.py cat.jpg --model diracnet-int8.onnx    # a file of export.py
    python predict.py cat.jpg --model diracnet18            # the authors' ImageNet model

Unreadable images are reported on stderr and skipped; the exit status is then 2.
"""

import sys

from cli import ArgumentParser, exit_on_ctrl_c, exit_on_error

PUBLISHED = ('diracnet18', 'diracnet34')


def parse_options(argv=None):
    parser = ArgumentParser.of_script('predict.py', __doc__)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file')
    parser.add_argument(
        '--model', required=True,
        help='folder of a run, checkpoint, .onnx, .safetensors or .pth file of export.py, or '
             + ' or '.join(PUBLISHED),
    )
    return parser.parse_args(argv)


if __name__ == '__main__':  # --help and errors come before the imports that take seconds
    exit_on_ctrl_c()
    parse_options()

import torch

import diracnets
from diracnets.fold import fold
from diracnets.preprocessing import DataError


def imagenet_classes():
    """Returns the names of the 1000 classes of ILSVRC2012, in the order of their WordNet IDs."""
    from torchvision.models import ResNet18_Weights

    return ResNet18_Weights.IMAGENET1K_V1.meta['categories']


def load_classifier(name):
    """Returns (folded model, Preprocessing, class names or None) of a file or published model."""
    if name in PUBLISHED:
        model = getattr(diracnets, name)(pretrained=True).eval()
        return model, diracnets.preprocess('ImageNet'), imagenet_classes()
    loaded = diracnets.load(name)
    classes = loaded.classes
    if classes is None and (loaded.preprocess.kind, loaded.num_classes) == ('ImageNet', 1000):
        classes = imagenet_classes()
    return fold(loaded.model), loaded.preprocess, classes


@torch.inference_mode()
def predict(opt):
    """Prints the predictions for all readable images and returns the number of unreadable ones."""
    model, preprocess, classes = load_classifier(opt.model)
    unreadable = 0
    for path in opt.images:
        try:
            image = preprocess(path)
        except DataError as error:
            print(f'predict.py: {error}', file=sys.stderr)
            unreadable += 1
            continue
        probabilities = model(image[None]).softmax(dim=1)[0]  # (num_classes,)
        if not probabilities.isfinite().all():
            raise RuntimeError(f'{opt.model}: its outputs are non-finite (NaN or Inf)')
        print(path)
        for p, label in zip(*probabilities.topk(min(5, len(probabilities)))):
            print(f'  {100 * p:6.2f} %  {classes[label] if classes else f"class {label}"}')
        sys.stdout.flush()  # keeps the order of stdout and stderr in a terminal
    return unreadable


def main(argv=None):
    opt = parse_options(argv)
    with exit_on_error('predict.py'):
        unreadable = predict(opt)
    if unreadable:
        sys.exit(2)


if __name__ == '__main__':
    main()
