"""The paper's claims as lists of trainings: one short function an experiment.

Each returns the trainings of a budget; its docstring says what is asked.
`python -m experiments.run` trains them (and counts their hours: --list), `python -m
experiments.figures` draws what came out.
"""

from dataclasses import dataclass, field

COMPARED_MODELS = ('plain', 'dirac-init', 'diracnet', 'resnet')


@dataclass(frozen=True)
class RunSpec:
    """One training: a point of a figure, for one seed."""

    series: str  # the line of the figure that it belongs to
    x: float  # where it stands on that line
    seed: int
    options: dict  # of train.py
    start: str = ''  # what the filters are before it, where not as drawn: see experiments/starts.py

    @property
    def run(self):
        """The name of its folder: the same for the same training in another experiment."""
        options = {name: value for name, value in self.options.items()
                   if name not in ('model', 'depth', 'width', 'epochs', 'keep_every')}
        sizes = [self.options['model'], *(f'{self.options[name]:g}' for name in ('depth', 'width')
                                          if name in self.options)]
        others = [f'{name}={value}' for name, value in sorted(options.items())]
        start = [self.start] if self.start else []
        return '-'.join([*sizes, *start, *others, f'{self.options["epochs"]}ep', f's{self.seed}'])

    @property
    def name(self):
        """What --only and the table say of it."""
        return f'{self.series}, {self.x:g}, seed {self.seed}'


def words_of(options):
    """Options of train.py as words."""
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f'--{name}' if value else f'--no-{name}')
        else:
            words += [f'--{name}', str(value)]
    return words


@dataclass(frozen=True)
class Budget:
    """How long each training is, and how many there are."""

    epochs: int
    seeds: int
    options: dict = field(default_factory=dict)  # of every training
    dataset: str = 'Folder'
    depths: tuple = (10, 16, 28, 52, 100)
    deeper: tuple = (202, 400)  # with one seed
    widths: tuple = (0.5, 1, 2)
    layers: int = 28  # of the networks that are compared at one depth
    large: float = 4  # a width at which DiracNets may lag behind
    thousand: tuple = (100, 202, 400, 1000)  # depths on the digits
    speedrun: tuple = (  # epochs, which of VARIANTS, seeds: the recipe's own epochs first
        (8, slice(2), 5), (4, slice(1), 3), (4, slice(2, None), 3))

    def trainings(self, series, x, start='', seeds=None, **options):
        options = {'width': 1, 'epochs': self.epochs, **self.options, **options}
        return [RunSpec(series, x, seed, options, start)
                for seed in range(1, 1 + min(self.seeds, seeds or self.seeds))]


BUDGETS = {
    # 200,000 images a training, the learning rate falling to zero over them
    'small': Budget(4, 3, {'lr_schedule': 'cosine', 'keep_every': 1}),
    'paper': Budget(200, 5, {'keep_every': 20}, widths=(1, 2, 4, 10), large=10),
    # for the tests: seconds
    'tiny': Budget(
        1, 1, {'lr_schedule': 'cosine', 'batch_size': 64, 'keep_every': 1}, 'Digits',
        depths=(10,), deeper=(), widths=(0.5,), layers=10, large=0.5, thousand=(10,),
        speedrun=((1, slice(2), 1),),
    ),
}
INIT_SCALES = (1, 0.1, 0.01)
VARIANTS = {  # of the recipe of the speed-run: one thing changed at a time
    'the recipe': {},
    'filters start at the identity alone': {'block': 'base'},
    'ReLU': {'activation': 'relu'},
    'flips at random': {'flip': 'horizontal'},
    'whole images from the beginning': {'grow': '[]'},
    'a first convolution that learns': {'whiten': False},
    'SGD for all': {'optimizer': 'sgd', 'lr': 0.1},
    'labels not smoothed': {'label_smoothing': 0},
    'a cosine from the beginning': {'lr_schedule': 'cosine'},
    'batches of 250': {'batch_size': 250},
    'width 0.75': {'width': 0.75},
}


def depth(budget):
    """Do plain networks get worse with depth, and DiracNets not?"""
    trainings = [
        training for layers in budget.depths for model in COMPARED_MODELS
        for training in budget.trainings(model, layers, model=model, depth=layers)
    ]
    for layers in budget.deeper:
        trainings += budget.trainings('diracnet', layers, seeds=1, model='diracnet', depth=layers)
    return trainings


def width(budget):
    """What do depth and width give, and what do they cost in parameters?"""
    return [
        training for layers in budget.depths[:3] for factor in budget.widths
        for training in budget.trainings(
            f'depth {layers}', factor, model='diracnet', depth=layers, width=factor)
    ]


def init(budget):
    """Does it matter how the filters are started?"""
    trainings = [
        training for scale in INIT_SCALES for model in ('diracnet', 'plain')
        for training in budget.trainings(
            model, scale, '' if scale == 1 else f'scaled-{scale:g}', model=model,
            depth=budget.layers)
    ]
    return trainings + budget.trainings(
        'plain, delta-orthogonal', 1, 'delta-orthogonal', model='plain', depth=budget.layers)


def alpha_beta(budget):
    """Where do alpha and beta go, and is a deep layer near the identity?"""
    return [
        training for factor in budget.widths[-2:]
        for training in budget.trainings(
            f'width {factor:g}', factor, model='diracnet', depth=budget.layers, width=factor)
    ]


def _one_depth(budget, models, **options):
    return [
        training for x, model in enumerate(models)
        for training in budget.trainings(model, x, model=model, depth=budget.layers, **options)
    ]


def delta(budget):
    """Where channels grow: does delta pass the first ones only, or is it repeated?"""
    return _one_depth(budget, ('diracnet', 'diracnet-repeated'))


def versions(budget):
    """What did the second version (ReLU, alpha and beta for each channel) change?"""
    return _one_depth(budget, ('diracnet-v1', 'diracnet'))


def large(budget):
    """Does a DiracNet lag behind the ResNet where networks are wide?"""
    return _one_depth(budget, ('plain', 'diracnet', 'resnet'), width=budget.large)


def cost(budget):
    """What does W_hat take of a training step, and of inference?"""
    return []  # nothing is trained: see experiments/measures.py


def int8(budget):
    """What does int8 take of the accuracy, folded?"""
    return _one_depth(budget, ('plain', 'diracnet', 'resnet'))


def thousand(budget):
    """Do DiracNets of up to a thousand layers learn the digits?"""
    return [
        training for layers in budget.thousand
        for training in budget.trainings(
            f'{layers} layers', layers, seeds=1, model='diracnet', depth=layers,
            dataset='Digits', batch_size=64, epochs=5 * budget.epochs)
    ]


def speedrun(budget):
    """What makes a network accurate in few epochs?"""
    return [
        RunSpec(series, epochs, seed, {
            'recipe': 'speedrun', 'model': 'diracnet-fast', **VARIANTS[series], 'epochs': epochs})
        for epochs, chosen, seeds in budget.speedrun
        for series in list(VARIANTS)[chosen] for seed in range(1, 1 + seeds)
    ]


EXPERIMENTS = {
    'depth': depth, 'width': width, 'init': init, 'alpha-beta': alpha_beta, 'delta': delta,
    'versions': versions, 'large': large, 'cost': cost, 'int8': int8, 'thousand': thousand,
    'speedrun': speedrun,
}
