"""Compares a deployed network with the plain one on test images: accuracy, labels, logits.

    python -m experiments.deploy RUN --dataset Folder --dataroot FOLDER
"""

import torch
from tqdm import tqdm

import networks
from command import Options, errors_in_one_line
from diracdeploy import deploy
from diracfold import fold
from diracimage import normalise
from training import data
from training.options import DATASETS

BATCH = 500


@torch.no_grad()
def compare(args):
    trained = networks.load(args.run)
    size = trained.inputs.size
    test = data.load(args.dataset, args.dataroot, trained.inputs, training=False).test
    network = fold(trained.network)
    run = deploy(network, (BATCH, 3, size, size))
    plain, deployed, labels = [], [], []
    for batch in tqdm(torch.arange(len(test)).split(BATCH), 'testing', disable=None, leave=False):
        images, truth, _ = test[batch, None, torch.arange(len(batch))]
        inputs = normalise(images, trained.inputs)
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
    parser = Options(prog='experiments.deploy', description=__doc__.splitlines()[0])
    parser.add_argument('run', help='folder of a run of train.py, or a checkpoint')
    parser.add_argument('--dataset', choices=DATASETS, default='CIFAR10',
                        help='whose test images (default: %(default)s)')
    parser.add_argument('--dataroot', default='.',
                        help='folder of its files (default: %(default)s)')
    args = parser.parse_args()
    with errors_in_one_line('experiments.deploy'):
        compare(args)


if __name__ == '__main__':
    main()
