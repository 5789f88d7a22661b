"""What is timed: each function prepares a piece of work, and returns a function that does it.

experiments/bench.py and others say what is compared with what.
"""

import functools
import os
import tempfile

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import transforms

from diracnet import DiracNet, Network, forward, init_params, make_topology
from diracnets.deploy import deploy, native_bfloat16
from diracnets.fold import fold
from diracnets.models.registry import count_multiply_adds
from diracnets.modular import ModularNetwork
from diracnets.preprocessing import Preprocessing
from training import data
from training.compute import Forward, compile_model, cross_entropy, keep_freed_memory
from training.loader import make_loader
from training.meters import Meters
from training.optimizers import make_optimizer

BATCH = 128
NATIVE = 'bfloat16' if native_bfloat16('cpu')[0] else 'float32'  # what train.py computes in
CIFAR, IMAGENET = Preprocessing.for_dataset('CIFAR10'), Preprocessing.for_dataset('ImageNet')


def repeated(times, prepare, *arguments):
    """Several calls a turn: the first finds its weights gone from caches that all sides use."""
    work = prepare(*arguments)

    def calls():
        for _ in range(times):
            work()

    return calls


# ---------------------------------------------------------------- networks


def diracnet(depth, width, kind='CIFAR10', **more):
    """A DiracNet for training; more: arguments of `diracnet.forward`."""
    net = make_topology(depth, width, kind)
    return Network(functools.partial(forward, net, **more), init_params(net))


def modular(depth, width):
    """The same network of modules."""
    return ModularNetwork.from_params(init_params(make_topology(depth, width, 'CIFAR10')))


def multiply_adds(make, *sizes, pixels=32):
    """Counts those of one image through the network that `make(*sizes)` makes."""
    with torch.device('meta'):
        return count_multiply_adds(make(*sizes), pixels)


# ---------------------------------------------------------------- input


def random_images(n):
    return torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (n,))


class PilImages(Dataset):
    """Small images, one at a time, augmented with PIL as in the reference scripts of 2017."""

    def __init__(self, n):
        images, self.labels = random_images(n)
        self.images = [transforms.functional.to_pil_image(i.permute(2, 0, 1)) for i in images]
        self.transform = transforms.Compose([
            transforms.Pad(4, padding_mode='reflect'), transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32), transforms.ToTensor(),
            transforms.Normalize(CIFAR.mean, CIFAR.std),
        ])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def pil_loader(n):
    return DataLoader(PilImages(n), BATCH, shuffle=True, num_workers=4, persistent_workers=True)


def whole(loader):
    def epoch():
        for _ in loader:
            pass

    return epoch


def gathered(n):
    images = data.MemoryImages(*random_images(n)).augmented(pad=4)
    return whole(make_loader(images, BATCH, 0, seed=0))


def by_pil(n):
    return whole(pil_loader(n))


def jpegs_by_opencv(folder, repeats, workers, batch=50):
    """One pass over JPEG files, decoded, cropped and in batches, without a network."""
    paths, labels, _ = data.list_images(folder)
    images = data.ImageFiles(paths * repeats, labels * repeats, 224).augmented()
    return whole(make_loader(images, batch, workers, seed=0))


def jpegs_by_pil(folder, repeats, workers):
    images = torchvision.datasets.ImageFolder(folder, transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(IMAGENET.mean, IMAGENET.std),
    ]))
    return whole(DataLoader(ConcatDataset([images] * repeats), 50, shuffle=True,
                            num_workers=workers, persistent_workers=workers > 0))


# ---------------------------------------------------------------- a step of a training


def make_sgd(network, fused=False):
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4,
                           fused=fused)


def make_forward(dtype=NATIVE):
    """The forward pass of train.py, on the CPU."""
    return Forward(CIFAR, {'float32': 'float', 'bfloat16': 'bfloat16'}[dtype], torch.device('cpu'))


def step(depth, width, make=diracnet, **more):
    """One step of a training on 128 images in memory, in the dtype of this machine."""
    keep_freed_memory()
    network = make(depth, width, **more)
    return one_step(make_sgd(network), network, make_forward(), random_batch(BATCH))


def step_of(opt, network):
    """One step of a training with these options, on whole images."""
    keep_freed_memory()
    return one_step(make_optimizer(network, opt), network, make_forward(),
                    random_batch(opt.batch_size))


def random_batch(n):
    images, labels = random_images(n)
    return images.permute(0, 3, 1, 2), labels, n


def one_step(optimizer, model, forward, batch):
    """Return a function that runs one training step, always on the same batch."""
    images, labels, n = batch

    def one():
        loss = cross_entropy(forward(model, images), labels, n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return one


def checkpointed_step(depth):
    return step(depth, 1, checkpointing=True)


def step_of_ordinary_convolutions(depth, width):
    """The same step, with W itself in place of W_hat."""
    return step(depth, width, dirac=False)


def step_of_modules(depth, width):
    return step(depth, width, modular)


# ---------------------------------------------------------------- an epoch


def epoch_of_train(depth, width, n, dtype=NATIVE, to_compile=False):
    """An epoch of train.py, with its meters, on n images in memory."""
    keep_freed_memory()
    network = diracnet(depth, width)
    optimizer = make_sgd(network)
    model = compile_model(network, torch.device('cpu')) if to_compile else network
    forward = make_forward(dtype)
    images = data.MemoryImages(*random_images(n)).augmented(pad=4)
    loader = make_loader(images, BATCH, 0, seed=0)

    def epoch():
        meters = Meters(10, n, '', steps=0)
        with meters.bar:
            for images, labels, batch_size in loader:
                logits = forward(model, images)
                loss = cross_entropy(logits, labels, batch_size)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                meters.update(loss, logits, labels, batch_size)
        meters.summary('train')

    return epoch


def epoch_giving_memory_back(depth, width, n):
    """The same, with what a step frees going back to the system, as glibc does by itself."""
    os.environ['MALLOC_TRIM_THRESHOLD_'] = '131072'  # its default, which keep_freed_memory leaves
    return epoch_of_train(depth, width, n)


def epoch_with_pil(depth, width, n):
    """The same training in float32 and NCHW, each image transformed by PIL in 4 workers."""
    network = diracnet(depth, width)
    optimizer = make_sgd(network)
    loader = pil_loader(n)

    def epoch():
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), labels).backward()
            optimizer.step()

    return epoch


# ---------------------------------------------------------------- deployed


def eager(network, batch):
    inputs, network = torch.randn(batch, 3, 224, 224), network.eval()

    @torch.no_grad()
    def run():
        network(inputs)

    return run


def eager_diracnet(batch):
    return eager(DiracNet(18), batch)


def deployed(network, batch):
    run, inputs = deploy(network, (batch, 3, 224, 224)), torch.randn(batch, 3, 224, 224)
    return lambda: run(inputs)


def deployed_diracnet(batch):
    return deployed(DiracNet(18), batch)


def deployed_resnet(batch):
    return deployed(fold(torchvision.models.resnet18()), batch)


def onnx_file(batch, folder):
    path = os.path.join(folder, 'diracnet18.onnx')
    torch.onnx.export(DiracNet(18).eval(), (torch.randn(batch, 3, 224, 224),), path, dynamo=True,
                      input_names=['inputs'], verbose=False)
    return path


def onnx_runtime(batch):
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(
            onnx_file(batch, folder), providers=['CPUExecutionProvider'])
    inputs = torch.randn(batch, 3, 224, 224).numpy()
    return lambda: session.run(None, {'inputs': inputs})


def openvino(batch):
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        model = openvino.Core().compile_model(onnx_file(batch, folder), 'CPU')
    inputs = torch.randn(batch, 3, 224, 224).numpy()
    return lambda: model([inputs])
