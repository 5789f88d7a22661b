"""DiracNets through torch.hub; from a clone of this repository:

    net = torch.hub.load('.', 'diracnet18', source='local', pretrained=True)
"""

import diracnet

dependencies = ['torch']


def diracnet18(pretrained=False):
    """DiracNet-18 for ImageNet, folded to plain convolutions: 11.5 million parameters.

    Inputs (N, 3, 224, 224): RGB in [0, 1], the middle of images whose shorter side OpenCV resized
    to 256 (cubic), less mean (0.485, 0.456, 0.406), over deviation (0.229, 0.224, 0.225);
    `diracimage.preprocess()` makes them of files. Outputs: logits of the 1000 classes of
    ILSVRC2012, in the order of their WordNet numbers.

    pretrained: with the weights that the authors published (fetched once, hash checked each
    time). Their top-1 and top-5 errors on the validation set, 30.37 and 10.88 %, are the authors'
    figures (arXiv 1706.00388), not measured here.
    """
    return diracnet.diracnet18(pretrained)


def diracnet34(pretrained=False):
    """DiracNet-34 for ImageNet, folded to plain convolutions: 21.6 million parameters.

    Inputs (N, 3, 224, 224): RGB in [0, 1], the middle of images whose shorter side OpenCV resized
    to 256 (cubic), less mean (0.485, 0.456, 0.406), over deviation (0.229, 0.224, 0.225);
    `diracimage.preprocess()` makes them of files. Outputs: logits of the 1000 classes of
    ILSVRC2012, in the order of their WordNet numbers.

    pretrained: with the weights that the authors published (fetched once, hash checked each
    time). Their top-1 error on the validation set is 27.79 %, as the RepVGG paper quotes it, the
    top-5 error 9.34 %, which is unverified. These figures were not measured here.
    """
    return diracnet.diracnet34(pretrained)


def diracnet_cifar(depth=28, width=1, num_classes=10):
    """DiracNet for CIFAR-like images, to be trained; `diracfold.fold` makes it plain afterwards.

    depth: 6n + 4; width: the factor on 16, 32, 64 channels; num_classes: 10 for CIFAR-10, 100 for
    CIFAR-100. Inputs (N, 3, 32, 32), or any square of 4 pixels or more: RGB in [0, 1], less mean
    (125.3, 123.0, 113.9) / 255, over deviation (63.0, 62.1, 66.7) / 255. Outputs: logits of
    num_classes.

    Parameters are newly drawn: there are no published weights, and so no figures. What this
    repository trained, and with which result, is in its docs/results.md.
    """
    f, params = diracnet.define_diracnet(depth, width, 'CIFAR10', num_classes)
    return diracnet.Network(f, params)
