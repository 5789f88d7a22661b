"""Gradients of the first training steps, on any number of ranks: see test_interruption.py."""

import torch
from torch.nn.parallel import DistributedDataParallel

from training import checkpoint, distributed, options
from training.compute import cross_entropy
from training.loader import make_loader
from training.setup import prepare


def write_gradients(path):
    """Writes the gradients of four steps in float64, with batch norm in evaluation mode."""
    opt = options.parse_options(['--dataset', 'Digits', '--depth', '10', '--dtype', 'double',
                                 '--save', f'{path}.run'])
    device = distributed.init()
    run = prepare(opt, device, checkpoint.Lock(opt.save))
    run.model.eval()
    network = DistributedDataParallel(run.model) if distributed.world_size() > 1 else run.model
    # 49 = 3 * 16 + 1: the last batch has one image, so the other ranks have none
    images = run.splits.train.subset(torch.arange(49)).augmented(pad=4, flip='none')
    loader = make_loader(images, 16, 0, 1, distributed.rank(), distributed.world_size())
    gradients = []
    for images, labels, global_batch_size in loader:
        run.optimizer.zero_grad()
        logits = run.forward(network, images)
        cross_entropy(logits, labels, global_batch_size).backward()
        gradients.append({name: p.grad.clone() for name, p in run.model.named_parameters()})
        run.optimizer.step()
    if distributed.rank() == 0:
        torch.save(gradients, path)
    distributed.shutdown()
