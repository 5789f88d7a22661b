"""How long an experiment takes: counted before it is started, from its multiply-adds."""

import functools

import torch

import diracnets
from diracnets.models.registry import count_multiply_adds
from experiments.definitions import words_of
from training.augmentation import progressive_sizes
from training.options import model_options, parse_options

# multiply-adds a second of 2 CPU cores in bfloat16, by width: narrow layers do fewer at a time.
# Loading and testing are in them; what was measured is in docs/results.md.
RATES = {0.5: 2.5e10, 1: 9e10, 2: 1.3e11, 4: 1.7e11}
DIGITS, CIFAR = 1437, 50_000  # images of training
TIMED = {'cost': 0.1}  # hours of what is timed in an experiment: 3 to 7 minutes on 2 CPU cores


@functools.cache
def _multiply_adds(model, sizes, pixels):
    with torch.device('meta'):
        network = diracnets.create_model(model, 'CIFAR10', **dict(sizes))
    return count_multiply_adds(network, pixels)


def work(training, dataset):
    """Counts the multiply-adds of a training: forward and, twice that, backward."""
    opt = parse_options(words_of(training.options))
    sizes = tuple(model_options(opt).items())
    images = DIGITS if dataset == 'Digits' else CIFAR
    return 3 * images * sum(_multiply_adds(opt.model, sizes, pixels)
                            for pixels in progressive_sizes(opt.image_size, opt.grow, opt.epochs))


def seconds(training, dataset):
    """How long a training takes 2 CPU cores that do nothing else, at most: counted."""
    # at any width the speed-run's network is as wide as the others are at their largest
    wide = training.options['model'] == 'diracnet-fast'
    width = max(RATES) if wide else training.options['width']
    rate = RATES[max((w for w in RATES if w <= width), default=min(RATES))]
    return work(training, dataset) / rate


def hours_of(experiment, budget, trainings):
    """How long an experiment takes them, in hours."""
    datasets = (training.options.get('dataset', budget.dataset) for training in trainings)
    return sum(map(seconds, trainings, datasets)) / 3600 + TIMED.get(experiment, 0)
