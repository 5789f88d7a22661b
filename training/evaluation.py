"""The accuracy of a model on a set of images."""

from tqdm import tqdm

from diracnets.preprocessing import normalize
from training.loader import make_loader

BATCH = 16  # images


def top1(network, test, inputs, title):
    """Returns the accuracy on the test set in per cent."""
    loader = make_loader(test, BATCH)
    right = sum(
        (network(normalize(images, inputs)).argmax(1) == labels).sum().item()
        for images, labels, _ in tqdm(loader, f'top-1, {title}', disable=None, leave=False)
    )
    return 100 * right / len(test)
