"""The logits and the top-1 accuracy of a model on a test set."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diracnets.preprocessing import Preprocessing, normalize
from training.loader import iterate_batches, make_loader
from training.progress import Progress

BATCH = 16  # images


@torch.no_grad()
def compute_logits(
    model: Callable[[Tensor], Tensor], test: Dataset, preprocess: Preprocessing, title: str,
    batch: int = BATCH,
) -> tuple[Tensor, Tensor]:
    """Returns the logits (M, num_classes) and labels (M,) of a test set of M images.

    model: inputs (N, C, S, S) to logits (N, num_classes); test: a set of `training.data`, with
    uint8 images; title: for the progress bar; batch: the maximum N.
    """
    loader = make_loader(test, batch)
    batches = Progress(iterate_batches(loader), title, len(loader))
    logits, labels = zip(*(
        (model(normalize(images, preprocess)), batch_labels) for images, batch_labels, _ in batches
    ))
    return torch.cat(logits), torch.cat(labels)


def top1(
    model: Callable[[Tensor], Tensor], test: Dataset, preprocess: Preprocessing, title: str
) -> float:
    """Returns the top-1 accuracy in per cent; for the arguments see `compute_logits`."""
    logits, labels = compute_logits(model, test, preprocess, f'top-1, {title}')
    return 100 * (logits.argmax(1) == labels).sum().item() / len(test)
