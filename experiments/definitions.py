"""The claims of the paper as lists of runs: one short function per experiment.

Each function returns the runs of a budget; its docstring is the question. `python -m
experiments.run` trains them, `python -m experiments.figures` draws the results. SCRIPTS lists
commands that run one after another instead.
"""

import functools
from dataclasses import dataclass, field

import diracnets
from experiments.variants import multiply_adds
from training.augmentation import progressive_sizes
from training.options import model_options, parse_options

COMPARED_MODELS = ('plain', 'dirac-init', 'diracnet', 'resnet')
COMPARED_BLOCKS = {  # options of train.py; the first three share the runs of `depth`
    'base': {'model': 'plain'}, 'dirac-init': {'model': 'dirac-init'},
    'dirac': {'model': 'diracnet'},
    **{block: {'model': 'plain', 'block': block} for block in ('acb', 'dbb', 'repvgg')},
    'default-init': {'model': 'default-init'},  # with the initialization of the branches
}
REFERENCES = {  # options of train.py: networks of other papers with the papers' recipes
    'WRN-16-4': {'recipe': 'wide-resnet', 'model': 'wide-resnet', 'depth': 16, 'width': 4},
    'DenseNet-40-12': {'recipe': 'densenet', 'model': 'densenet', 'layers': 40, 'reduce': 1,
                       'bottleneck': False},
    'DenseNet-BC-100-12': {'recipe': 'densenet', 'model': 'densenet'},
}


@dataclass(frozen=True)
class RunSpec:
    """One training run: one seed of one point of a figure."""

    series: str  # the line of the figure
    x: float  # the position on the line
    seed: int
    options: dict  # of train.py
    init: str = ''  # changed initialization of the filters, see `change_init` in experiments/run.py

    @property
    def run_name(self):
        """The name of the folder: runs that experiments share have the same one."""
        options = {name: value for name, value in self.options.items()
                   if name not in ('model', 'depth', 'width', 'epochs', 'keep_every')}
        sizes = [self.options['model'], *(f'{self.options[name]:g}' for name in ('depth', 'width')
                                          if name in self.options)]
        others = [f'{name}={value}' for name, value in sorted(options.items())]
        init = [self.init] if self.init else []
        return '-'.join([*sizes, *init, *others, f'{self.options["epochs"]}ep', f's{self.seed}'])

    @property
    def title(self):
        """The name in progress lines, which --only matches."""
        return f'{self.series}, {self.x:g}, seed {self.seed}'


def command_line(options):
    """Returns options of train.py as command-line arguments."""
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f'--{name}' if value else f'--no-{name}')
        else:
            arguments += [f'--{name}', str(value)]
    return arguments


@dataclass(frozen=True)
class Budget:
    """The number of epochs of the runs, and the seeds, depths and widths to train."""

    epochs: int
    seeds: int
    options: dict = field(default_factory=dict)  # of every run
    dataset: str = 'Folder'
    depths: tuple = (10, 16, 28, 52, 100)
    deeper: tuple = (202, 400)  # with one seed
    widths: tuple = (0.5, 1, 2)
    layers: int = 28  # of models that are compared at one depth
    block_depths: tuple = (16, 28, 52)
    large: float = 4  # a width at which DiracNets may be worse than ResNets
    thousand: tuple = (100, 202, 400, 1000)  # depths on the digits
    references: dict = field(default_factory=REFERENCES.copy)
    speedrun: tuple = (8, 4, 12)  # epochs: those of the recipe first
    speedrun_seeds: int = 5

    def runs(self, series, x, init='', seeds=None, **options):
        options = {'width': 1, 'epochs': self.epochs, **self.options, **options}
        return [RunSpec(series, x, seed, options, init)
                for seed in range(1, 1 + min(self.seeds, seeds or self.seeds))]


BUDGETS = {
    # 200,000 images per run, cosine schedule
    'small': Budget(4, 3, {'lr_schedule': 'cosine', 'keep_every': 1}),
    'medium': Budget(30, 3, {'lr_schedule': 'cosine', 'keep_every': 5}, depths=(28, 52), deeper=(),
                     block_depths=(28,)),
    'paper': Budget(200, 5, {'keep_every': 20}, widths=(1, 2, 4, 10), large=10),
    # for the tests: seconds
    'tiny': Budget(
        1, 1, {'lr_schedule': 'cosine', 'batch_size': 64, 'keep_every': 1}, 'Digits',
        depths=(10,), deeper=(), widths=(0.5,), layers=10, block_depths=(10,), large=0.5,
        thousand=(10,), speedrun=(1,), speedrun_seeds=1,
        references={'WRN-10-1': {'recipe': 'wide-resnet', 'model': 'wide-resnet', 'depth': 10,
                                 'width': 1}},
    ),
}
INIT_SCALES = (1, 0.1, 0.01)

# ---------------------------------------------------------------- experiments


def depth(budget):
    """Does the accuracy of plain networks fall with depth, and that of DiracNets not?"""
    runs = [
        run for layers in budget.depths for model in COMPARED_MODELS
        for run in budget.runs(model, layers, model=model, depth=layers)
    ]
    for layers in budget.deeper:
        runs += budget.runs('diracnet', layers, seeds=1, model='diracnet', depth=layers)
    return runs


def width(budget):
    """How do depth and width change the accuracy and the number of parameters?"""
    return [
        run for layers in budget.depths[:3] for factor in budget.widths
        for run in budget.runs(
            f'depth {layers}', factor, model='diracnet', depth=layers, width=factor)
    ]


def init(budget):
    """Does the accuracy depend on the initialization of the filters?"""
    runs = [
        run for scale in INIT_SCALES for model in ('diracnet', 'plain')
        for run in budget.runs(
            model, scale, '' if scale == 1 else f'scaled-{scale:g}', model=model,
            depth=budget.layers)
    ]
    return runs + budget.runs(
        'plain, delta-orthogonal', 1, 'delta-orthogonal', model='plain', depth=budget.layers)


def alpha_beta(budget):
    """How do alpha and beta change in training, and are deep layers near the identity?"""
    return [
        run for factor in budget.widths[-2:]
        for run in budget.runs(
            f'width {factor:g}', factor, model='diracnet', depth=budget.layers, width=factor)
    ]


def _one_depth(budget, models, **options):
    return [
        run for x, model in enumerate(models)
        for run in budget.runs(model, x, model=model, depth=budget.layers, **options)
    ]


def delta(budget):
    """In channel-expanding layers, is a truncated or a tiled identity better?"""
    return _one_depth(budget, ('diracnet', 'diracnet-repeated'))


def versions(budget):
    """What does v2 change (ReLU, alpha and beta per channel)?"""
    return _one_depth(budget, ('diracnet-v1', 'diracnet'))


def large(budget):
    """Are wide DiracNets less accurate than the ResNet?"""
    return _one_depth(budget, ('plain', 'diracnet', 'resnet'), width=budget.large)


def cost(budget):
    """How much time does W_hat add to a training step, and to inference?"""
    return []  # no runs: see experiments/measures.py


def int8(budget):
    """How much accuracy does int8 quantization of the folded model lose?"""
    return _one_depth(budget, ('plain', 'diracnet', 'resnet'))


def thousand(budget):
    """Do DiracNets of up to 1,000 layers learn the digits?"""
    return [
        run for layers in budget.thousand
        for run in budget.runs(
            f'{layers} layers', layers, seeds=1, model='diracnet', depth=layers,
            dataset='Digits', batch_size=64, epochs=5 * budget.epochs)
    ]


def blocks(budget):
    """Which re-parameterization trains a plain network best?"""
    return [
        run for layers in budget.block_depths for block, options in COMPARED_BLOCKS.items()
        for run in budget.runs(block, layers, depth=layers, **options)
    ]


def reference(budget):
    """How accurate are Wide ResNets and DenseNets with the same budget?"""
    return [
        RunSpec(series, budget.epochs, 1, {**options, **budget.options, 'epochs': budget.epochs})
        for series, options in budget.references.items()
    ]


def speedrun(budget):
    """How accurate is the speed-run recipe, and does the Dirac parametrization help it?"""
    recipe = {'recipe': 'speedrun', 'model': 'diracnet-fast'}
    variants = {'full recipe': {}, 'Dirac initialization only': {'block': 'base'}}
    return [
        RunSpec(series, epochs, seed, {**recipe, **options, 'epochs': epochs})
        for epochs in budget.speedrun for series, options in variants.items()
        if epochs == budget.speedrun[0] or not options
        for seed in range(1, 1 + budget.speedrun_seeds)
    ]


EXPERIMENTS = {
    'depth': depth, 'width': width, 'init': init, 'alpha-beta': alpha_beta, 'delta': delta,
    'versions': versions, 'large': large, 'cost': cost, 'int8': int8, 'thousand': thousand,
    'blocks': blocks, 'reference': reference, 'speedrun': speedrun,
}


# ---------------------------------------------------------------- scripts


def dtype(dataroot):
    """Does bfloat16 change the accuracy? Float32 on one thread sums in another order."""
    options = {'dataset': 'Folder', 'dataroot': dataroot, 'depth': 16, 'epochs': 10,
               'lr_schedule': 'cosine', 'resume': 'auto'}
    return [
        (['train.py', *command_line({**options, 'dtype': precision, 'seed': seed,
                                     'save': f'runs/dtype/{name}-{seed}'})], environment)
        for seed in (1, 2, 3) for name, precision, environment in (
            ('float', 'float', {}), ('bfloat16', 'bfloat16', {}),
            ('float-1thread', 'float', {'OMP_NUM_THREADS': '1'}))
    ]


def ranks(dataroot):
    """Does training with two processes equal training with one? The global batch is the same.

    Rounding differs, and batch norm uses the statistics of the images of each process.
    """
    options = command_line({'dataset': 'Digits', 'depth': 10, 'batch_size': 64, 'epochs': 12,
                            'epoch_step': '[8,11]', 'dtype': 'float', 'resume': 'auto'})
    folders = {n: f'runs/ranks-{n}' for n in (1, 2)}
    return [
        *((['-m', 'torch.distributed.run', f'--nproc_per_node={n}', 'train.py', *options,
            '--save', folder], {}) for n, folder in folders.items()),
        (['plot.py', *folders.values(), '--save', 'runs/ranks.png'], {}),
    ]


def gpu(dataroot):
    """What are the results of the paper's budget, on a CUDA GPU? First 28-10, then the depths."""
    options = {'dataset': 'Folder', 'dataroot': dataroot, 'depth': 28, 'width': 10,
               'save': 'runs/gpu/diracnet-28-10', 'save_every': 3, 'resume': 'auto'}
    depths = ['-m', 'experiments.run', 'depth', '--budget', 'paper', '--dataroot', str(dataroot)]
    return [(['train.py', *command_line(options)], {})] + [
        ([*depths, '--only', models], {})
        for models in ('diracnet, 28*', 'plain, 28*', 'resnet, 28*', '*, 100*')]


SCRIPTS = {'dtype': dtype, 'ranks': ranks, 'gpu': gpu}  # lists of (arguments of python, variables)


# ---------------------------------------------------------------- estimated cost


# Multiply-adds per second of 2 CPU cores in bfloat16, by width: narrow layers are less efficient.
# They include loading and testing; docs/results.md compares the estimates with measured hours.
RATES = {0.5: 2.5e10, 1: 9e10, 2: 1.3e11, 4: 1.7e11}
# Time per multiply-add over that of base: batch norms and sums of branches (logs/blocks/steps.csv).
BRANCHES = {'acb': 1.3, 'dbb': 1.9, 'repvgg': 1.4}
DIGITS, CIFAR = 1437, 50_000  # training images
TIMING_HOURS = {'cost': 0.1, 'blocks': 0.1}  # 3 to 7 minutes on 2 CPU cores


@functools.cache
def _multiply_adds(model, sizes, pixels):
    make = functools.partial(diracnets.create_model, model, 'CIFAR10', **dict(sizes))
    return multiply_adds(make, pixels=pixels)


def training_multiply_adds(run, dataset):
    """Counts the multiply-adds of a run: forward, and twice as many backward."""
    opt = parse_options(command_line(run.options))
    sizes = tuple(model_options(opt).items())
    images = DIGITS if dataset == 'Digits' else CIFAR
    return 3 * images * sum(_multiply_adds(opt.model, sizes, pixels)
                            for pixels in progressive_sizes(opt.image_size, opt.grow, opt.epochs))


def estimated_seconds(run, dataset):
    """Estimates the seconds of a run on 2 idle CPU cores, as an upper bound."""
    # diracnet-fast is as wide, at any width, as the other models at their largest
    wide = run.options['model'] == 'diracnet-fast'
    width = max(RATES) if wide else run.options.get('width', min(RATES))
    rate = RATES[max((w for w in RATES if w <= width), default=min(RATES))]
    branches = BRANCHES.get(run.options.get('block'), 1)
    return branches * training_multiply_adds(run, dataset) / rate


def estimated_hours(experiment, budget, runs):
    """Estimates the hours of an experiment on 2 idle CPU cores, as an upper bound."""
    seconds = sum(estimated_seconds(run, run.options.get('dataset', budget.dataset))
                  for run in runs)
    return seconds / 3600 + TIMING_HOURS.get(experiment, 0)
