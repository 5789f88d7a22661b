"""Compares the deployed with the eager model on test images: accuracy, predictions, logits.

    python -m experiments.deploy RUN --dataset Folder --dataroot FOLDER
"""

import torch
from tqdm import tqdm

import diracnets
from cli import ArgumentParser, exit_on_error
from diracnets.deploy import deploy
from diracnets.fold import fold
from diracnets.preprocessing import normalize
from training import data
from training.loader import iterate_batches, make_loader
from training.options import DATASETS

BATCH = 500


@torch.no_grad()
def compare(run, dataset, dataroot):
    """Prints the accuracies of both forms and how far their predictions and logits agree."""
    loaded = diracnets.load(run)
    test = data.load_splits(dataset, dataroot, loaded.preprocess, training=False).test
    model = fold(loaded.model)
    deployed = deploy(model, (BATCH, *loaded.preprocess.shape))
    eager_logits, deployed_logits, labels = [], [], []
    batches = iterate_batches(make_loader(test, BATCH))
    for images, batch_labels, _ in tqdm(batches, 'testing', disable=None, leave=False):
        inputs = normalize(images, loaded.preprocess)
        padded = inputs.new_zeros(BATCH, *inputs.shape[1:])  # the last batch may be smaller
        padded[: len(inputs)] = inputs
        eager_logits.append(model(inputs))
        deployed_logits.append(deployed(padded)[: len(inputs)].clone())
        labels.append(batch_labels)
    eager, fast, labels = map(torch.cat, (eager_logits, deployed_logits, labels))
    for name, logits in (('eager', eager), ('deployed', fast)):
        print(f'{name}: {100 * (logits.argmax(1) == labels).double().mean():.2f} % top-1')
    equal = (eager.argmax(1) == fast.argmax(1)).sum()
    difference = 100 * (eager - fast).abs().max() / eager.abs().max()
    print(f'same prediction: {equal:,} of {len(labels):,}; maximum difference of logits: '
          f'{difference:.1f} % of the largest logit')


def main():
    parser = ArgumentParser(prog='experiments.deploy', description=__doc__.splitlines()[0])
    parser.add_argument('run', help='folder of a run of train.py, or a checkpoint')
    parser.add_argument('--dataset', choices=DATASETS, default='CIFAR10',
                        help='dataset of the test images (default: %(default)s)')
    parser.add_argument('--dataroot', default='.',
                        help='folder of its files (default: %(default)s)')
    args = parser.parse_args()
    with exit_on_error('experiments.deploy'):
        compare(args.run, args.dataset, args.dataroot)


if __name__ == '__main__':
    main()
