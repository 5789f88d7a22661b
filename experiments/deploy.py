"""Compares a deployed network with the plain one on test images: accuracy, labels, logits.

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
from training.options import DATASETS

BATCH = 500


@torch.no_grad()
def compare(args):
    trained = diracnets.load(args.run)
    size = trained.preprocess.size
    test = data.load_splits(args.dataset, args.dataroot, trained.preprocess, training=False).test
    network = fold(trained.model)
    run = deploy(network, (BATCH, 3, size, size))
    plain, deployed, labels = [], [], []
    for batch in tqdm(torch.arange(len(test)).split(BATCH), 'testing', disable=None, leave=False):
        images, truth, _ = test[batch, None, torch.arange(len(batch))]
        inputs = normalize(images, trained.preprocess)
        plain.append(network(inputs))
        filled = inputs.new_zeros(BATCH, *inputs.shape[1:])  # as the last batch may be smaller
        filled[: len(inputs)] = inputs
        deployed.append(run(filled)[: len(inputs)])
        labels.append(truth)
    plain, deployed, labels = map(torch.cat, (plain, deployed, labels))
    for name, logits in (('plain', plain), ('deployed', deployed)):
        print(f'{name}: {100 * (logits.argmax(1) == labels).double().mean():.2f} % top-1')
    same = (plain.argmax(1) == deployed.argmax(1)).sum()
    difference = (plain - deployed).abs().max() / plain.abs().max()
    print(f'the same label: {same:,} of {len(labels):,}; largest difference of logits: '
          f'{100 * difference:.1f} % of the largest')


def main():
    parser = ArgumentParser(prog='experiments.deploy', description=__doc__.splitlines()[0])
    parser.add_argument('run', help='folder of a run of train.py, or a checkpoint')
    parser.add_argument('--dataset', choices=DATASETS, default='CIFAR10',
                        help='whose test images (default: %(default)s)')
    parser.add_argument('--dataroot', default='.',
                        help='folder of its files (default: %(default)s)')
    args = parser.parse_args()
    with exit_on_error('experiments.deploy'):
        compare(args)


if __name__ == '__main__':
    main()
