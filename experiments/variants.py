"""The timed work: each function prepares a variant and returns a function that runs it.

experiments/bench.py, measures.py and gpu.py define the comparisons.
"""

import functools
import os
import tempfile

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import transforms

import diracnets
from diracconv import DiracConv2d
from diracnet import DiracNet, define_diracnet
from diracnets.deployment import deploy, native_bfloat16
from diracnets.folding import fold
from diracnets.models.registry import count_multiply_adds
from diracnets.network import Network
from diracnets.preprocessing import Preprocessing, normalize
from training import data, folders
from training.compilation import compile_model
from training.compute import Forward, cross_entropy, keep_freed_memory
from training.loader import make_loader
from training.meters import Meters
from training.optimizers import make_optimizer

BATCH = 128
NATIVE = 'bfloat16' if native_bfloat16('cpu')[0] else 'float32'  # the default dtype of train.py
CIFAR, IMAGENET = Preprocessing.for_dataset('CIFAR10'), Preprocessing.for_dataset('ImageNet')


def repeated(times, prepare, *arguments):
    """Repeats the work `times` times per repetition, because the first one has cold caches."""
    work = prepare(*arguments)

    def run():
        for _ in range(times):
            work()

    return run


# ---------------------------------------------------------------- models


def diracnet(depth, width, dataset='CIFAR10', checkpointing=False):
    """Makes a DiracNet for training."""
    f, params = define_diracnet(depth, width, dataset)
    return Network(f, params, checkpointing)


def with_layers(network, layer_type):
    """Changes the class of the DiracConv2d layers of a model in place; returns the model."""
    for layer in network.modules():
        if isinstance(layer, DiracConv2d):
            layer.__class__ = layer_type
    return network


def standard(depth, width, dataset='CIFAR10'):
    """Makes the same network with W in place of W_hat; alpha and beta are unused."""
    return with_layers(diracnet(depth, width, dataset), nn.Conv2d)


class LayerDiracConv2d(DiracConv2d):
    """A DiracConv2d that computes its own W_hat: `Network` groups no subclasses."""


def layer_by_layer(depth, width):
    """Makes a DiracNet that computes W_hat in each layer."""
    return with_layers(diracnet(depth, width), LayerDiracConv2d)


def multiply_adds(make, *sizes, pixels=32):
    """Counts the multiply-adds of one image of pixels x pixels in the model `make(*sizes)`.

    Counting on the CPU takes half of the time that it takes on the meta device.
    """
    return count_multiply_adds(make(*sizes), pixels)


# ---------------------------------------------------------------- input


def random_images(n):
    return torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (n,))


class PilImages(Dataset):
    """Small images, augmented one at a time with PIL as in the reference scripts of 2017."""

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


def iterate(loader):
    def epoch():
        for _ in loader:
            pass

    return epoch


def iterate_and_normalize(loader, preprocess):
    """Prepares an epoch of a loader of uint8 images, normalized as by train.py."""
    def epoch():
        for images, _, _ in loader:
            normalize(images, preprocess)

    return epoch


def gathered(n):
    keep_freed_memory()
    images = data.MemoryImages(*random_images(n)).augmented(pad=4)
    return iterate_and_normalize(make_loader(images, BATCH, 0, seed=0), CIFAR)


def by_pil(n):
    return iterate(pil_loader(n))


def jpeg_loader(folder, repeats, workers, batch=50):
    """Makes a loader of JPEG files: decoded and cropped, in uint8 batches."""
    paths, labels, _ = folders.list_images(folder)
    images = folders.ImageFiles(paths * repeats, labels * repeats, 224).augmented()
    return make_loader(images, batch, workers, seed=0)


def jpegs_by_opencv(folder, repeats, workers):
    keep_freed_memory()
    return iterate_and_normalize(jpeg_loader(folder, repeats, workers), IMAGENET)


def jpegs_for_gpu(folder, repeats, workers, batch):
    """Prepares an epoch of uint8 images, which training normalizes on the GPU."""
    return iterate(jpeg_loader(folder, repeats, workers, batch))


def jpegs_by_pil(folder, repeats, workers):
    images = torchvision.datasets.ImageFolder(folder, transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(IMAGENET.mean, IMAGENET.std),
    ]))
    return iterate(DataLoader(ConcatDataset([images] * repeats), 50, shuffle=True,
                              num_workers=workers, persistent_workers=workers > 0))


# ---------------------------------------------------------------- a training step


def make_sgd(model, fused=False):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4,
                           fused=fused)


def make_forward(dtype=NATIVE):
    """Makes the forward pass of train.py on the CPU."""
    return Forward(CIFAR, {'float32': 'float', 'bfloat16': 'bfloat16'}[dtype], torch.device('cpu'))


def step(depth, width, make=diracnet, **options):
    """Prepares a training step on 128 images in memory, in the native dtype of the machine."""
    keep_freed_memory()
    model = make(depth, width, **options)
    return functools.partial(
        train_step, make_sgd(model), model, make_forward(), *random_batch(BATCH))


def step_of(opt, model):
    """Prepares a training step with the options of train.py, on full-size images."""
    keep_freed_memory()
    batch = random_batch(opt.batch_size)
    return functools.partial(
        train_step, make_optimizer(model, opt), model, make_forward(), *batch)


def random_batch(n):
    images, labels = random_images(n)
    return images.permute(0, 3, 1, 2), labels, n


def train_step(optimizer, model, forward, images, labels, batch_size):
    """Does a training step on a batch; returns the loss and the logits."""
    logits = forward(model, images)
    loss = cross_entropy(logits, labels, batch_size)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss, logits


checkpointed_step = functools.partial(step, checkpointing=True)
standard_step = functools.partial(step, make=standard)
layer_by_layer_step = functools.partial(step, make=layer_by_layer)


def densenet_step(checkpointing):
    """Prepares forward and backward of DenseNet-BC-100-12 on 64 images (N, 3, 32, 32), float32."""
    model = diracnets.create_model('densenet', 'CIFAR10', checkpointing=checkpointing)
    inputs, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    return lambda: F.cross_entropy(model(inputs), labels).backward()


# ---------------------------------------------------------------- an epoch


def epoch_of_train(depth, width, n, dtype=NATIVE, to_compile=False):
    """Prepares an epoch of train.py, with its meters, on n images in memory."""
    keep_freed_memory()
    model = diracnet(depth, width)
    optimizer = make_sgd(model)
    compiled = compile_model(model, torch.device('cpu')) if to_compile else model
    forward = make_forward(dtype)
    images = data.MemoryImages(*random_images(n)).augmented(pad=4)
    loader = make_loader(images, BATCH, 0, seed=0)

    def epoch():
        meters = Meters(10, n, '', steps=0)
        with meters.bar:
            for images, labels, batch_size in loader:
                loss, logits = train_step(
                    optimizer, compiled, forward, images, labels, batch_size)
                meters.update(loss, logits, labels, batch_size)
        meters.summary('train')

    return epoch


def epoch_returning_memory(depth, width, n):
    """Prepares `epoch_of_train`, but glibc returns freed memory to the system, as by default."""
    os.environ['MALLOC_TRIM_THRESHOLD_'] = '131072'  # the default; keep_freed_memory respects it
    return epoch_of_train(depth, width, n)


def epoch_with_pil(depth, width, n):
    """Prepares an epoch in float32 and NCHW, with PIL transforms in 4 workers."""
    model = diracnet(depth, width)
    optimizer = make_sgd(model)
    loader = pil_loader(n)

    def epoch():
        for inputs, labels in loader:
            train_step(optimizer, model, torch.nn.Module.__call__, inputs, labels, len(labels))

    return epoch


# ---------------------------------------------------------------- deployed


def folded_resnet(depth):
    return fold(torchvision.models.get_model(f'resnet{depth}').eval())


def inference(make, batch, form, device='cpu'):
    """Prepares the logits of a (N, 3, 224, 224) batch by a folded model, deployed or eager."""
    model, shape = make().to(device).eval(), (batch, 3, 224, 224)
    inputs = torch.randn(shape, device=device)
    run = deploy(model, shape) if form == 'deploy()' else torch.no_grad()(model)
    return lambda: run(inputs)


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
