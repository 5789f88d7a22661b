"""Measures how fast it is, each thing in turn with what it is compared with.

    python -m experiments.bench train       # epochs, against float32, NCHW, PIL; and freed memory
    python -m experiments.bench data --images FOLDER    # input pipelines; of class folders of JPEGs
    python -m experiments.bench infer       # the deployed network
    python -m experiments.bench depth       # time and memory of a step over depth
    python -m experiments.bench overhead    # what W_hat, and modules, take of a step
    python -m experiments.bench profile     # where the time of a step goes: 28-1, the speed-run
    python -m experiments.bench plot        # logs/bench.png of the last rows of each

The sides of a comparison work in turns (experiments/turns.py). Rows are appended to logs/bench.csv.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import transforms

import networks
import train
from command import Options, errors_in_one_line
from diracdeploy import deploy, native_bfloat16
from diracfold import fold
from diracimage import Inputs
from diracmodules import ModularNetwork
from diracnet import DiracNet, Network, forward, init_params, topology
from experiments.turns import Side, compare, draw, product_peak
from training import data, distributed, options
from training.batches import make_loader
from training.meters import Meters
from training.optimizers import make_optimizer
from training.run import keep_freed_memory

BATCH = 128
DEPLOYED_IMAGES = 64  # through a deployed network in one turn
STEPS = 5  # of a training in one turn, to find what W_hat takes of it
TABLE = Path(__file__).parent.parent / 'logs' / 'bench.csv'
DEPTHS = (28, 52, 100, 202, 400)
NATIVE = 'bfloat16' if native_bfloat16('cpu')[0] else 'float32'  # what train.py computes in
CIFAR, IMAGENET = Inputs.of('CIFAR10'), Inputs.of('ImageNet')


def repeated(times, prepare, *arguments):
    """Several calls a turn: the first finds its weights gone from caches that all sides use."""
    work = prepare(*arguments)

    def calls():
        for _ in range(times):
            work()

    return calls


# ---------------------------------------------------------------- training


def random_images(n):
    return torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (n,))


def diracnet(depth, width, kind='CIFAR10', **more):
    """A DiracNet for training; more: arguments of `diracnet.forward`."""
    net = topology(depth, width, kind)
    return Network(functools.partial(forward, net, **more), init_params(net))


def modular(depth, width):
    """The same network of modules."""
    return ModularNetwork.of(init_params(topology(depth, width, 'CIFAR10')))


def make_sgd(network, fused=False):
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4,
                           fused=fused)


def make_step(network, dtype=NATIVE):
    """The step of train.py, on the CPU."""
    named = {'float32': 'float', 'bfloat16': 'bfloat16'}[dtype]
    return train.make_step(network, CIFAR, named, torch.device('cpu'))


def epoch_of_train(depth, width, n, dtype=NATIVE, compiled=False):
    """An epoch of train.py, with its meters, on n images in memory."""
    keep_freed_memory()
    network = diracnet(depth, width)
    optimizer = make_sgd(network)
    step = make_step(torch.compile(network, dynamic=False) if compiled else network, dtype)
    images = data.MemoryImages(*random_images(n)).augmented(pad=4)
    loader = make_loader(images, BATCH, 0, seed=0)

    def epoch():
        meters = Meters(10, n, '', steps=0)
        train.run_epoch(step, loader, meters, lambda: None, optimizer)
        meters.figures('train')

    return epoch


def epoch_giving_memory_back(depth, width, n):
    """The same, with what a step frees going back to the system, as glibc does by itself."""
    os.environ['MALLOC_TRIM_THRESHOLD_'] = '131072'  # its default, which keep_freed_memory leaves
    return epoch_of_train(depth, width, n)


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


def multiply_adds(make, *sizes, pixels=32):
    """Counts those of one image through the network that `make(*sizes)` makes."""
    with torch.device('meta'):
        return networks.multiply_adds(make(*sizes), pixels)


def bench_train(args):
    for depth, width, steps, target in ((28, 1, 16, 3), (34, 2, 4, 3.5), (28, 4, 2, 5)):
        n = steps * BATCH
        work = 3 * multiply_adds(diracnet, depth, width)  # forward and, twice that, backward
        sizes = depth, width, n
        sides = [
            Side('float32, NCHW, images by PIL', epoch_with_pil, sizes, n, work),
            Side('train.py', epoch_of_train, sizes, n, work, NATIVE),
        ]
        if (depth, width) == (28, 1):
            sides += [
                Side('train.py --dtype float', epoch_of_train, (*sizes, 'float32'), n, work),
                Side('train.py --compile', epoch_of_train, (*sizes, NATIVE, True), n, work, NATIVE),
            ]
        compare(f'train {depth}-{width}', sides, args.pairs, TABLE, target)
        compare(f'freed memory {depth}-{width}', [
            Side('given back', epoch_giving_memory_back, sizes, n, work, NATIVE),
            Side('kept, as train.py does', epoch_of_train, sizes, n, work, NATIVE),
        ], args.pairs, TABLE)


# ---------------------------------------------------------------- input


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


def bench_data(args):
    n = 10_000
    compare('32 x 32 images', [
        Side('PIL, one at a time, 4 workers', by_pil, (n,), n),
        Side('a gather for each batch', gathered, (n,), n),
    ], args.pairs, TABLE)
    if not args.images:
        print('JPEG files: left out, as there is no --images FOLDER')
        return
    workers = min(distributed.cores(), options.MOST_WORKERS)
    n = 3 * len(data.list_images(args.images)[0])
    compare('JPEG files', [
        Side(f'ImageFolder with PIL, {workers} workers', jpegs_by_pil,
             (args.images, 3, workers), n),
        Side(f'OpenCV, {workers} workers', jpegs_by_opencv, (args.images, 3, workers), n),
    ], args.pairs, TABLE, 1.5)


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


def bench_infer(args):
    work = multiply_adds(DiracNet, 18, pixels=224)
    resnet = multiply_adds(torchvision.models.resnet18, pixels=224)
    for batch in (16, 1):

        def side(name, prepare, work=work, dtype=NATIVE, batch=batch):
            return Side(name, repeated, (DEPLOYED_IMAGES // batch, prepare, batch),
                        DEPLOYED_IMAGES, work, dtype)

        sides = [
            side('float32, NCHW, eager', eager_diracnet, dtype='float32'),
            side('deploy()', deployed_diracnet),
            side("deploy() of torchvision's resnet18, folded", deployed_resnet, resnet),
        ]
        for name, package, prepare, dtype in (
            ('ONNX Runtime', 'onnxruntime', onnx_runtime, 'float32'),
            ('OpenVINO', 'openvino', openvino, NATIVE),  # it takes bfloat16 by itself
        ):
            if importlib.util.find_spec(package):
                sides.append(side(f'{name}, {dtype}', prepare, dtype=dtype))
            else:
                print(f'{name}: left out, as {package} is not installed')
        compare(f'DiracNet-18, batch {batch}', sides, args.pairs, TABLE, 4 if batch == 16 else '')


# ---------------------------------------------------------------- depth and W_hat


def step(depth, width, make=diracnet, **more):
    """One step of a training on 128 images in memory, in the dtype of this machine."""
    keep_freed_memory()
    network = make(depth, width, **more)
    return one_step(make_sgd(network), make_step(network), BATCH)


def step_of(opt, network):
    """One step of a training with these options, on whole images."""
    keep_freed_memory()
    return one_step(make_optimizer(network, opt), make_step(network), opt.batch_size)


def one_step(optimizer, forward_step, n):
    """A function that does the step of a training on the same n random images."""
    images, labels = random_images(n)
    batch = images.permute(0, 3, 1, 2), labels, n

    def one():
        loss, _ = forward_step(batch)
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


def bench_depth(args):
    rows = compare('depth, a step of 128 images', [
        Side(f'DiracNet-{depth}-1', step, (depth, 1), BATCH,
             3 * multiply_adds(diracnet, depth, 1), NATIVE)
        for depth in DEPTHS
    ], args.pairs, TABLE)
    for name, unit in (('milliseconds', 'ms'), ('peak_memory_mb', 'MB')):
        values = [row[name] for row in rows]
        slope, base = statistics.linear_regression(DEPTHS, values)
        residuals = [value / (base + slope * depth) - 1 for depth, value in zip(DEPTHS, values)]
        print(f'{name} = {base:.0f} + {slope:.2f} x depth, in {unit}; residuals: '
              + ', '.join(f'{100 * r:+.1f} %' for r in residuals))
    compare('depth 1000 with --checkpointing', [
        Side('DiracNet-1000-1', checkpointed_step, (1000,), BATCH,
             3 * multiply_adds(diracnet, 1000, 1), NATIVE)
    ], args.pairs, TABLE)


def bench_overhead(args):
    for depth, width in ((28, 1), (34, 2)):
        work = 3 * multiply_adds(diracnet, depth, width)
        compare(f'W_hat {depth}-{width}', [
            Side('ordinary convolutions', repeated,
                 (STEPS, step_of_ordinary_convolutions, depth, width), STEPS * BATCH, work, NATIVE),
            Side('W_hat', repeated, (STEPS, step, depth, width), STEPS * BATCH, work, NATIVE),
            Side('W_hat, in modules', repeated, (STEPS, step_of_modules, depth, width),
                 STEPS * BATCH, work, NATIVE),
        ], 4 * args.pairs, TABLE)


def bench_profile(args):
    recipe = options.parse_options(['--recipe', 'speedrun'])
    fast = functools.partial(
        networks.build, recipe.model, 'CIFAR10', **options.of_model(recipe))
    for title, one, images, make in (
        ('DiracNet-28-1', step(28, 1), BATCH, functools.partial(diracnet, 28, 1)),
        ('the speed-run', step_of(recipe, fast()), recipe.batch_size, fast),
    ):
        for _ in range(10):  # until memory is laid out
            one()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(args.pairs):
                one()
        # forward and, twice that, backward; nearly all of it in convolutions
        show_profile(f'a step of {title}, {images} images', found.key_averages(),
                     3 * images * args.pairs * multiply_adds(make), args.pairs)


def show_profile(title, events, work, steps):
    """Prints where the time of steps goes; work: the multiply-adds of all their convolutions."""
    whole_step = sum(event.self_cpu_time_total for event in events)  # microseconds
    in_convolutions = sum(event.self_cpu_time_total for event in events
                          if 'convolution' in event.key)
    share = in_convolutions / whole_step
    rate = 2e-3 * work / in_convolutions / product_peak(NATIVE)
    print(f'{title}: {whole_step / 1000 / steps:.0f} ms; convolutions take {100 * share:.0f} % of '
          f'it, at {100 * rate:.0f} % of the rate of a product')
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]:
        print(f'{100 * event.self_cpu_time_total / whole_step:5.1f} %  {event.key}')


def bench_plot(args):
    draw(TABLE).savefig(TABLE.with_suffix('.png'))
    print(TABLE.with_suffix('.png'))


BENCHES = {'train': bench_train, 'data': bench_data, 'infer': bench_infer, 'depth': bench_depth,
           'overhead': bench_overhead, 'profile': bench_profile, 'plot': bench_plot}


def main(argv=None):
    parser = Options(prog='experiments.bench', description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=BENCHES, help='what to measure, or plot')
    parser.add_argument('--pairs', type=options.at_least(10, int), default=10,
                        help='turns of each side (default: %(default)s)')
    parser.add_argument('--images', default='', type=options.folder,
                        help='folder of class folders of JPEG files, for data')
    args = parser.parse_args(argv)
    with errors_in_one_line('experiments.bench'):
        BENCHES[args.what](args)


if __name__ == '__main__':
    main()
