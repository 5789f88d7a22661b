"""The top-1 accuracy of a model on a test set."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.data import Dataset

from diracnets.preprocessing import Preprocessing, normalize
from training.loader import make_loader

BATCH = 16  # images


def top1(model: Callable[[Tensor], Tensor], test: Dataset, preprocess: Preprocessing,
         title: str) -> float:
    """Returns the top-1 accuracy in per cent.

    model: inputs (N, C, S, S) to logits (N, num_classes); test: a set of `training.data`, with
    uint8 images; title: for the progress bar.
    """
    from tqdm import tqdm

    batches = tqdm(make_loader(test, BATCH), f'top-1, {title}', disable=None, leave=False)
    correct = sum(
        (model(normalize(images, preprocess)).argmax(1) == labels).sum().item()
        for images, labels, _ in batches
    )
    return 100 * correct / len(test)
