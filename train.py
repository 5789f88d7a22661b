"""Trains a DiracNet, or tests a trained one.

CIFAR-10, the paper's recipe:
    python train.py --save ./logs/diracnets_$RANDOM$RANDOM --depth 34 --width 2

ImageNet, with train/ and val/ under --dataroot:
    python train.py --dataroot ~/ILSVRC2012/ --dataset ImageNet --depth 18 \
        --save ./logs/diracnet_$RANDOM$RANDOM --batchSize 256 --epoch_step [30,60,90] \
        --epochs 100 --weightDecay 0.0001 --lr_decay_ratio 0.1

Your own small images, in train/CLASS/ and test/CLASS/ under --dataroot:
    python train.py --dataset Folder --dataroot ~/images --save ./logs/mine

Going on where a run stopped, and testing it:
    python train.py --save ./logs/mine --resume ./logs/mine --depth 16 ...
    python train.py --evaluate --resume ./logs/mine --depth 16 ...
"""

import argparse
import json
import os
import pickle
import sys
import time

import torch
import torch.nn.functional as F
from torchnet.engine import Engine
from torchnet.meter import AverageValueMeter, ClassErrorMeter
from tqdm import tqdm

import data
from diracnet import Network, define_diracnet

DTYPES = ('float', 'bfloat16', 'double')
CHECKPOINT_KEYS = ('params', 'optimizer', 'epoch', 'best', 'args')
STEPS_PER_READING = 20  # meters are read, which waits for a GPU, once in so many steps


class Options(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f'{self.prog}: {message}\n')  # one line, without the usage


def at_least(least, kind):
    def read(text):
        number = kind(text)
        if not least <= number < float('inf'):
            raise argparse.ArgumentTypeError(f'{text}: expected a number of at least {least}')
        return number

    read.__name__ = kind.__name__  # for argparse's own message
    return read


def epoch_list(text):
    try:
        epochs = json.loads(text)
        if all(type(epoch) is int and epoch > 0 for epoch in epochs):
            return epochs
    except (TypeError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f'{text}: expected a list of epochs, such as [60,120,160]')


def folder(text):
    return os.path.expanduser(text)


def parse_options(argv=None):
    parser = Options(prog='train.py', description=__doc__.splitlines()[0])

    def add(*names, default, help, **kwargs):
        shown = '' if default in ('', False) else ' (default: %(default)s)'
        parser.add_argument(*names, default=default, help=help + shown, **kwargs)

    add('--model', default='diracnet', choices=['diracnet'], help='family of networks')
    add('--depth', default=16, type=int, help='layers: 6n + 4, or 18 and 34 on ImageNet')
    add('--width', default=1, type=at_least(0, float), help='factor on the numbers of channels')
    add('--dataset', default='CIFAR10', choices=data.DATASETS, help='what to train on')
    add('--dataroot', '--imagenetpath', default='.', type=folder, help='folder of its files')
    add('--image_size', default=32, type=at_least(8, int), help='pixels, for --dataset Folder')
    add('--randomcrop_pad', default=4, type=at_least(0, int), help='pixels, for small images')
    add('--dtype', default='float', choices=DTYPES, help='bfloat16 is autocast from float')
    add('--nthread', default=4, type=at_least(0, int), help='threads or processes that read images')
    add('--batch_size', '--batchSize', default=128, type=at_least(1, int), help='images in a step')
    add('--lr', default=0.1, type=at_least(0, float), help='learning rate at the start')
    add('--epochs', default=200, type=at_least(1, int), help='epochs in all, resumed ones counted')
    add('--weight_decay', '--weightDecay', default=5e-4, type=at_least(0, float),
        help='of tensors of two or more dimensions; none on alpha, beta, biases and batch norm')
    add('--epoch_step', default='[60,120,160]', type=epoch_list,
        help='epochs, counted from 1, at whose start the learning rate drops')
    add('--lr_decay_ratio', default=0.2, type=at_least(0, float), help='factor of such a drop')
    add('--resume', default='', type=folder, help='checkpoint, or its folder, to go on from')
    add('--evaluate', default=False, action='store_true',
        help='test the --resume checkpoint and write nothing')
    add('--seed', default=1, type=at_least(0, int), help='of parameters, order and augmentation')
    add('--save', default='checkpoints', type=folder, help='folder for checkpoints and log')
    add('--gpu_id', default='', help='CUDA devices to use, such as 0; all if not given')
    add('--ngpu', default=1, type=int, choices=[1], help='number of GPUs')
    opt = parser.parse_args(argv)
    if opt.evaluate and not opt.resume:
        parser.error('--evaluate: expected --resume with a checkpoint to test')
    return opt


class Meters:
    """Loss and top-k accuracies of one epoch, shown in a bar."""

    def __init__(self, num_classes, length, description):
        self.topk = [1, 5] if num_classes >= 100 else [1]
        self.loss = AverageValueMeter()
        self.accuracy = ClassErrorMeter(topk=self.topk, accuracy=True)
        self.unread = []
        self.bar = tqdm(total=length, desc=description, unit='img', disable=None, leave=False)
        self.start = time.perf_counter()

    def on_forward(self, state):
        labels = state['sample'][1]
        self.unread.append((state['loss'].detach() * len(labels), state['output'].detach(), labels))
        if len(self.unread) >= STEPS_PER_READING:
            self.read()

    def read(self):
        if not self.unread:
            return
        losses, logits, labels = zip(*self.unread)
        self.unread = []
        labels = torch.cat(labels)
        self.loss.add(torch.stack(losses).sum().item(), len(labels))
        self.accuracy.add(torch.cat(logits), labels)
        self.bar.set_postfix_str(
            f'loss {self.loss.value()[0]:.3f}, acc {self.accuracy.value(1):.2f} %', refresh=False
        )
        self.bar.update(len(labels))

    def figures(self, prefix):
        """Ends the epoch: returns its figures, accuracies in per cent and time in seconds."""
        self.read()
        self.bar.close()
        figures = {f'{prefix}_loss': self.loss.value()[0]}
        for k in self.topk:
            figures[f'{prefix}_acc' + str(k) * (k > 1)] = self.accuracy.value(k)
        figures[f'{prefix}_time'] = time.perf_counter() - self.start
        return figures


def make_optimizer(network, opt):
    """SGD; the decay leaves one-dimensional tensors (alpha, beta, biases, batch norm) alone."""
    params = list(network.parameters())
    groups = [
        {'params': [p for p in params if p.dim() > 1], 'weight_decay': opt.weight_decay},
        {'params': [p for p in params if p.dim() <= 1], 'weight_decay': 0.0},
    ]
    return torch.optim.SGD(groups, lr=opt.lr, momentum=0.9)


def set_learning_rate(optimizer, opt, epoch):
    """The rate of an epoch, counted from 1; the momentum stays (the original lost it at drops)."""
    lr = opt.lr * opt.lr_decay_ratio ** sum(step <= epoch for step in opt.epoch_step)
    for group in optimizer.param_groups:
        group['lr'] = lr
    return lr


def read_checkpoint(path):
    """Reads a checkpoint file, or the model.pt7 of a folder. Raises ValueError for a bad one."""
    path = os.path.join(path, 'model.pt7') if os.path.isdir(path) else path
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        checkpoint = {name: checkpoint[name] for name in CHECKPOINT_KEYS}
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        reason = str(error).split('\n')[0]
        raise ValueError(f'{path}: not a checkpoint of train.py ({reason})') from error
    return checkpoint


def check_fit(params, expected):
    """Raises ValueError naming the keys and shapes in which a checkpoint's params differ."""
    differ = [f'{name} is missing' for name in expected.keys() - params.keys()]
    differ += [f'{name} is unknown' for name in params.keys() - expected.keys()]
    differ += [
        f'{name} is {tuple(params[name].shape)}, expected {tuple(expected[name].shape)}'
        for name in expected.keys() & params.keys()
        if params[name].shape != expected[name].shape
    ]
    if differ:
        more = f', and {len(differ) - 5} more' if len(differ) > 5 else ''
        raise ValueError(
            f'the checkpoint does not fit the network: {", ".join(sorted(differ)[:5])}{more}'
        )


def save_checkpoint(path, checkpoint):
    torch.save(checkpoint, path + '.tmp')
    os.replace(path + '.tmp', path)  # a save that is cut short leaves the last one whole


def print_options_and_parameters(opt, params):
    for name, value in vars(opt).items():
        print(f'  {name:<16}{value}')
    print(f'\n  {"parameter":<32}{"shape":<20}{"size":>12}')
    for name, tensor in params.items():
        print(f'  {name:<32}{str(tuple(tensor.shape)):<20}{tensor.numel():>12,}')
    print(f'  {"total":<52}{sum(p.numel() for p in params.values()):>12,}\n')


def make_process(network, topology, device, dtype):
    """Returns what torchnet's engine calls with each batch: (images, labels) to (loss, logits)."""
    precision = torch.float64 if dtype == 'double' else torch.float32

    def process(batch):
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        inputs = data.normalise(images, topology, precision)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16'):
            logits = network(inputs)
        logits = logits.to(precision)
        return F.cross_entropy(logits, labels), logits

    return process


def prepare(opt, device):
    """Loads data and network: returns (data, network, optimizer, finished epochs, best accuracy).

    Raises ValueError or OSError for what the user can mend.
    """
    model_file = os.path.join(opt.save, 'model.pt7')
    if not opt.resume and os.path.exists(model_file):
        raise ValueError(f'{model_file} exists: expected --resume {opt.save}, or another --save')
    if opt.resume:
        checkpoint = read_checkpoint(opt.resume)  # before the data: an error should come at once
    sets = data.load(opt.dataset, opt.dataroot, opt.image_size, opt.randomcrop_pad, opt.nthread)
    torch.manual_seed(opt.seed)
    network = Network(*define_diracnet(opt.depth, opt.width, sets.topology, len(sets.classes)))
    network.to(device, torch.float64 if opt.dtype == 'double' else torch.float32)
    optimizer = make_optimizer(network, opt)
    if not opt.resume:
        return sets, network, optimizer, 0, 0.0
    check_fit(checkpoint['params'], network.state_dict())
    network.load_state_dict(checkpoint['params'])
    optimizer.load_state_dict(checkpoint['optimizer'])
    return sets, network, optimizer, checkpoint['epoch'], checkpoint['best']


def run_epoch(process, loader, meters, optimizer=None):
    """Trains with an optimizer, tests without; the meters take what comes out."""
    engine = Engine()
    engine.hooks['on_forward'] = meters.on_forward
    if optimizer:
        engine.train(process, loader, 1, optimizer)
    else:
        with torch.no_grad():
            engine.test(process, loader)


def train(opt, sets, network, optimizer, process, epoch, best):
    """Runs the epochs after `epoch`; writes log.txt, model.pt7 and best.pt7 into opt.save."""
    train_loader = data.loader(sets.train, opt.batch_size, opt.nthread, opt.seed)
    test_loader = data.loader(sets.test, opt.batch_size, opt.nthread)
    n_parameters = sum(p.numel() for p in network.parameters())
    os.makedirs(opt.save, exist_ok=True)
    first, start = epoch, time.perf_counter()
    while epoch < opt.epochs:
        done = epoch - first
        left = (time.perf_counter() - start) / done * (opt.epochs - epoch) if done else None
        epoch += 1
        title = f'epoch {epoch}/{opt.epochs}'
        title += f', {left / 60:.0f} min left' if left else ''

        lr = set_learning_rate(optimizer, opt, epoch)
        train_loader.sampler.set_epoch(epoch)
        network.train()
        meters = Meters(len(sets.classes), len(sets.train), title)
        run_epoch(process, train_loader, meters, optimizer)
        stats = {**vars(opt), 'epoch': epoch, 'lr': lr, **meters.figures('train')}
        stats['images_per_second'] = len(sets.train) / stats['train_time']

        network.eval()
        meters = Meters(len(sets.classes), len(sets.test), title + ', test')
        run_epoch(process, test_loader, meters)
        stats.update(
            meters.figures('test'), num_classes=len(sets.classes), n_parameters=n_parameters
        )

        with open(os.path.join(opt.save, 'log.txt'), 'a') as log:
            log.write(f'json_stats: {json.dumps(stats)}\n')
        improved = stats['test_acc'] >= best
        best = max(best, stats['test_acc'])
        checkpoint = {
            'params': network.state_dict(), 'optimizer': optimizer.state_dict(),
            'epoch': epoch, 'best': best, 'args': vars(opt),
        }
        save_checkpoint(os.path.join(opt.save, 'model.pt7'), checkpoint)
        if improved:
            save_checkpoint(os.path.join(opt.save, 'best.pt7'), checkpoint)
        print(f'==> id: {opt.save} ({epoch}/{opt.epochs}), test_acc: {stats["test_acc"]:.2f}',
              flush=True)
    print(f'best test_acc {best:.2f}; log and checkpoints in {opt.save}')


def evaluate(opt, sets, network, process):
    network.eval()
    meters = Meters(len(sets.classes), len(sets.test), 'test')
    run_epoch(process, data.loader(sets.test, opt.batch_size, opt.nthread), meters)
    figures = meters.figures('test')
    print(f'test_loss: {figures["test_loss"]:.4f}')
    print(f'test_acc: {figures["test_acc"]:.2f}')


def stop(error):
    """Ends with one line and status 2: the last line, as a reading process sends its traceback."""
    print(f'train.py: {str(error).strip().splitlines()[-1]}', file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    opt = parse_options(argv)
    if opt.gpu_id:
        os.environ['CUDA_VISIBLE_DEVICES'] = opt.gpu_id  # read at the first use of CUDA
    cuda = torch.cuda.is_available()
    device = torch.device('cuda' if cuda else 'cpu')
    torch.backends.cudnn.benchmark = cuda
    try:
        sets, network, optimizer, epoch, best = prepare(opt, device)
        process = make_process(network, sets.topology, device, opt.dtype)
        print_options_and_parameters(opt, dict(network.named_parameters()))
        print(f'{opt.dataset}: {len(sets.train)} training and {len(sets.test)} test images, '
              f'{len(sets.classes)} classes; computing on {device} in {opt.dtype}', flush=True)
    except (ValueError, OSError) as error:
        stop(error)
    try:
        if opt.evaluate:
            evaluate(opt, sets, network, process)
        else:
            train(opt, sets, network, optimizer, process, epoch, best)
    except data.DataError as error:  # an image that is read only now, and cannot be
        stop(error)


if __name__ == '__main__':
    main()
