"""Measures how fast it is, each thing in turn with what it is compared with.

    python bench.py train                   # epochs, against float32, NCHW, PIL; and freed memory
    python bench.py data --images FOLDER    # input pipelines; FOLDER of class folders of JPEG files
    python bench.py infer                   # the deployed network
    python bench.py depth                   # time and memory of a step over depth
    python bench.py overhead                # what computing W_hat takes of a step
    python bench.py profile                 # where the time of a step goes, at 28-1
    python bench.py plot                    # logs/bench.png of the last rows of each

The sides of a comparison work in turns (turns.py). Rows are appended to logs/bench.csv.
"""

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

import baselines
import data
import diracnet
import options
import train
from command import Options, errors_in_one_line
from diracdeploy import deploy, native_bfloat16
from diracfold import fold
from diracimage import CIFAR_NORMALISATION, IMAGENET_NORMALISATION
from diracnet import DiracNet
from run import Run, automatic_dtype, keep_freed_memory, make_optimizer
from turns import Side, compare, draw

BATCH = 128
DEPLOYED_IMAGES = 64  # through a deployed network in one turn
STEPS = 5  # of a training in one turn, to find what W_hat takes of it
TABLE = Path(__file__).parent / 'logs' / 'bench.csv'
DEPTHS = (28, 52, 100, 202, 400)
NATIVE = 'bfloat16' if native_bfloat16('cpu')[0] else 'float32'  # what train.py computes in


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


def epoch_of_train(flags, n):
    """An epoch of train.py, with its meters, on n images in memory."""
    keep_freed_memory()
    opt = options.parse_options(['--batch_size', str(BATCH), '--lr', '0.01', *flags])
    sets = data.Data(data.MemoryImages(*random_images(n), pad=4, flip=True), None, list(range(10)))
    if opt.dtype == 'auto':
        opt.dtype, _ = automatic_dtype(torch.device('cpu'), None)
    network = baselines.build(opt.model, 'CIFAR10', **options.of_model(opt))
    run = Run(opt, sets, network, make_optimizer(network, opt))
    loader = data.loader(sets.train, BATCH, 0, seed=0)
    trained = torch.compile(network, dynamic=False) if opt.compile else network
    process = train.make_process(trained, opt, torch.device('cpu'))
    return lambda: train.train_epoch(run, process, loader, '', lambda: None)


def epoch_giving_memory_back(flags, n):
    """The same, with what a step frees going back to the system, as glibc does by itself."""
    os.environ['MALLOC_TRIM_THRESHOLD_'] = '131072'  # its default, which keep_freed_memory leaves
    return epoch_of_train(flags, n)


class PilImages(Dataset):
    """Small images, one at a time, augmented with PIL as in the reference scripts of 2017."""

    def __init__(self, n):
        images, self.labels = random_images(n)
        self.images = [transforms.functional.to_pil_image(i.permute(2, 0, 1)) for i in images]
        self.transform = transforms.Compose([
            transforms.Pad(4, padding_mode='reflect'), transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32), transforms.ToTensor(),
            transforms.Normalize(*CIFAR_NORMALISATION),
        ])  # fmt: skip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def pil_loader(n):
    return DataLoader(PilImages(n), BATCH, shuffle=True, num_workers=4, persistent_workers=True)


def epoch_with_pil(depth, width, n):
    """The same training in float32 and NCHW, each image transformed by PIL in 4 workers."""
    network = baselines.build('diracnet', 'CIFAR10', depth=depth, width=width)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = pil_loader(n)

    def epoch():
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), labels).backward()
            optimizer.step()

    return epoch


def multiply_adds(name, depth, width=1):
    with torch.device('meta'):
        return baselines.multiply_adds(
            baselines.build(name, 'CIFAR10', depth=depth, width=width), 32)


def bench_train(args):
    for depth, width, steps, target in ((28, 1, 16, 3), (34, 2, 4, 3.5), (28, 4, 2, 5)):
        n = steps * BATCH
        work = 3 * multiply_adds('diracnet', depth, width)  # forward and, twice that, backward
        flags = ['--depth', str(depth), '--width', str(width)]
        sides = [
            Side('float32, NCHW, images by PIL', epoch_with_pil, (depth, width, n), n, work),
            Side('train.py', epoch_of_train, (flags, n), n, work, NATIVE),
        ]
        for name, its, flag in (('--dtype float', 'float32', ['--dtype', 'float']),
                                ('--compile', NATIVE, ['--compile'])):
            if (depth, width) == (28, 1):
                sides.append(Side(f'train.py {name}', epoch_of_train, ([*flags, *flag], n), n, work,
                                  its))  # fmt: skip
        compare(f'train {depth}-{width}', sides, args.pairs, TABLE, target)
        compare_memory(depth, width, n, work, args.pairs)


def compare_memory(depth, width, n, work, pairs):
    arguments = ['--depth', str(depth), '--width', str(width)], n
    compare(f'freed memory {depth}-{width}', [
        Side('given back', epoch_giving_memory_back, arguments, n, work, NATIVE),
        Side('kept, as train.py does', epoch_of_train, arguments, n, work, NATIVE),
    ], pairs, TABLE)  # fmt: skip


# ---------------------------------------------------------------- input


def whole(loader):
    def epoch():
        for _ in loader:
            pass

    return epoch


def gathered(n):
    images = data.MemoryImages(*random_images(n), pad=4, flip=True)
    return whole(data.loader(images, BATCH, 0, seed=0))


def by_pil(n):
    return whole(pil_loader(n))


def jpegs_by_opencv(folder, repeats, workers):
    paths, labels, _ = data.list_images(folder)
    images = data.ImageFiles(paths * repeats, labels * repeats, 224)
    return whole(data.loader(images, 50, workers, seed=0))


def jpegs_by_pil(folder, repeats, workers):
    images = torchvision.datasets.ImageFolder(folder, transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(*IMAGENET_NORMALISATION),
    ]))  # fmt: skip
    return whole(DataLoader(ConcatDataset([images] * repeats), 50, shuffle=True,
                            num_workers=workers, persistent_workers=workers > 0))  # fmt: skip


def bench_data(args):
    n = 10_000
    compare('32 x 32 images', [
        Side('PIL, one at a time, 4 workers', by_pil, (n,), n),
        Side('a gather for each batch', gathered, (n,), n),
    ], args.pairs, TABLE)  # fmt: skip
    if not args.images:
        print('JPEG files: left out, as there is no --images FOLDER')
        return
    workers = options.parse_options([]).nthread
    n = 3 * len(data.list_images(args.images)[0])
    compare('JPEG files', [
        Side(f'ImageFolder with PIL, {workers} workers', jpegs_by_pil,
             (args.images, 3, workers), n),
        Side(f'OpenCV, {workers} workers', jpegs_by_opencv, (args.images, 3, workers), n),
    ], args.pairs, TABLE, 1.5)  # fmt: skip


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
                      input_names=['inputs'], verbose=False)  # fmt: skip
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
    with torch.device('meta'):
        work = baselines.multiply_adds(DiracNet(18), 224)
        resnet = baselines.multiply_adds(torchvision.models.resnet18(), 224)
    for batch in (16, 1):

        def side(name, prepare, work=work, dtype=NATIVE, batch=batch):
            return Side(name, repeated, (DEPLOYED_IMAGES // batch, prepare, batch),
                        DEPLOYED_IMAGES, work, dtype)  # fmt: skip

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


def step(name, depth, width, **more):
    """One step of a training on 128 images in memory, in the dtype of this machine."""
    keep_freed_memory()
    network = baselines.build(name, 'CIFAR10', depth=depth, width=width, **more)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    inputs = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))

    def one():
        with torch.autocast('cpu', torch.bfloat16, enabled=NATIVE == 'bfloat16'):
            logits = network(inputs)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return one


def checkpointed_step(depth):
    return step('diracnet', depth, 1, checkpointing=True)


def bench_depth(args):
    rows = compare('depth, a step of 128 images', [
        Side(f'DiracNet-{depth}-1', step, ('diracnet', depth, 1), BATCH,
             3 * multiply_adds('diracnet', depth), NATIVE)
        for depth in DEPTHS
    ], args.pairs, TABLE)  # fmt: skip
    for name, unit in (('milliseconds', 'ms'), ('peak_memory_mb', 'MB')):
        values = [row[name] for row in rows]
        slope, base = statistics.linear_regression(DEPTHS, values)
        residuals = [value / (base + slope * depth) - 1 for depth, value in zip(DEPTHS, values)]
        print(f'{name} = {base:.0f} + {slope:.2f} x depth, in {unit}; residuals: '
              + ', '.join(f'{100 * r:+.1f} %' for r in residuals))  # fmt: skip
    compare('depth 1000 with --checkpointing', [
        Side('DiracNet-1000-1', checkpointed_step, (1000,), BATCH,
             3 * multiply_adds('diracnet', 1000), NATIVE)
    ], args.pairs, TABLE)  # fmt: skip


def step_of_ordinary_convolutions(depth, width):
    """The same step, with W itself in place of W_hat."""
    diracnet.w_hats = lambda params, names: {}  # in this process alone
    return step('diracnet', depth, width)


def bench_overhead(args):
    for depth, width in ((28, 1), (34, 2)):
        work = 3 * multiply_adds('plain', depth, width)
        compare(f'W_hat {depth}-{width}', [
            Side('ordinary convolutions', repeated,
                 (STEPS, step_of_ordinary_convolutions, depth, width), STEPS * BATCH, work, NATIVE),
            Side('W_hat', repeated, (STEPS, step, 'diracnet', depth, width), STEPS * BATCH, work,
                 NATIVE),
        ], 4 * args.pairs, TABLE)  # fmt: skip


def bench_profile(args):
    one = step('diracnet', 28, 1)
    for _ in range(10):  # until memory is laid out
        one()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(args.pairs):
            one()
    events = found.key_averages()
    whole_step = sum(event.self_cpu_time_total for event in events)
    print(f'a step of DiracNet-28-1, 128 images: {whole_step / 1000 / args.pairs:.0f} ms')
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]:
        print(f'{100 * event.self_cpu_time_total / whole_step:5.1f} %  {event.key}')


def bench_plot(args):
    draw(TABLE).savefig(TABLE.with_suffix('.png'))
    print(TABLE.with_suffix('.png'))


BENCHES = {'train': bench_train, 'data': bench_data, 'infer': bench_infer, 'depth': bench_depth,
           'overhead': bench_overhead, 'profile': bench_profile, 'plot': bench_plot}  # fmt: skip


def main(argv=None):
    parser = Options(prog='bench.py', description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=BENCHES, help='what to measure, or plot')
    parser.add_argument('--pairs', type=options.at_least(10, int), default=10,
                        help='turns of each side (default: %(default)s)')  # fmt: skip
    parser.add_argument('--images', default='', type=options.folder,
                        help='folder of class folders of JPEG files, for data')  # fmt: skip
    args = parser.parse_args(argv)
    with errors_in_one_line('bench.py'):
        BENCHES[args.what](args)


if __name__ == '__main__':
    main()
