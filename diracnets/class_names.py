"""Matching the class names of a dataset with those of a model, and the names of ImageNet."""

from collections.abc import Sequence


def class_positions(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Returns the position of each name in `classes`, None if one is missing or not unique."""
    if list(names) == list(classes):
        return list(range(len(classes)))
    positions = {name: position for position, name in enumerate(classes)}
    unique = len(positions) == len(classes) and len(set(names)) == len(names)
    if not unique or not positions.keys() >= set(names):
        return None
    return [positions[name] for name in names]


def match_classes(path: str, num_classes: int, classes: list[str] | None,
                  dataset_classes: list[str], by_position: bool = False) -> list[int]:
    """Returns the model's class index for each class of a dataset.

    Classes match by name, also in another order and if the dataset has some of them only. They
    match by position if the file contains no names, or with `by_position` if names differ; the
    numbers of classes must then be equal. Otherwise raises ValueError.
    """
    positions = classes and class_positions(dataset_classes, classes)
    if not positions:
        check_classes(path, num_classes, None if by_position else classes, dataset_classes)
    return positions or list(range(num_classes))


def check_classes(path: str, num_classes: int, classes: list[str] | None,
                  dataset_classes: list[str]) -> None:
    """Raises ValueError unless the classes of a dataset are those of the model in a file.

    num_classes and classes are the model's; classes is None if the file does not contain names.
    """
    if len(dataset_classes) != num_classes or classes not in (None, dataset_classes):
        raise ValueError(
            f'{path}: classes differ: the model has {_summary(num_classes, classes)}, the dataset '
            f'{_summary(len(dataset_classes), dataset_classes)}'
        )


def _summary(number, names):
    return f'{number} ({names[0]} to {names[-1]})' if names else str(number)


def imagenet_classes() -> list[str]:
    """Returns the names of the 1000 classes of ILSVRC2012, in the order of their WordNet IDs.

    Raises ValueError if torchvision, which contains the names, is not installed.
    """
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError as error:
        raise ValueError('torchvision is not installed; pip install torchvision') from error
    return ResNet18_Weights.IMAGENET1K_V1.meta['categories']
