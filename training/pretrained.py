"""What fine-tuning starts from: the parameters of another training, or the published ones."""

from cli import say
from diracnet import check_params, is_folded
from diracnets.checkpoint import make_contents, pretrained_params, read_checkpoint
from diracnets.loading import file_preprocessing
from diracnets.preprocessing import MAX_SMALL, Preprocessing
from training import options
from training.distributed import rank

NO_PARAMETERS = {'checkpointing', 'droprate'}  # options of a network that add none


def load_pretrained(network, opt, inputs, classes):
    """Starts the network from --pretrained, and prints what becomes of its last layer.

    It is kept for the same classes, and for as many where the file does not name them; for others
    the newly drawn one stays. classes: the names of those to be learnt. Raises ValueError for
    parameters that do not fit otherwise, OSError for published ones that cannot be had.
    """
    saved, expected = _read(opt.pretrained), network.state_dict()
    names = [name for name, _ in network.named_parameters()]
    layer = names[-1].rpartition('.')[0]  # with or without a bias
    last = [name for name in names if name.rpartition('.')[0] == layer]
    before = (max(saved.params[last[0]].shape[:1], default=0) if last[0] in saved.params
              else len(classes))
    kept, said = _last_layer(before, saved.classes, classes)
    params = saved.params if kept else {**saved.params, **{name: expected[name] for name in last}}
    try:
        told = file_preprocessing(saved)
        check_params(params, expected)
    except ValueError as error:
        differ = '; '.join(_differences(saved, opt, inputs))
        raise ValueError(f'--pretrained {saved.path}: {differ or error}') from error
    network.load_state_dict(params)
    if rank() == 0:
        say(f'--pretrained {saved.path}: the last layer, of {before} classes, {said}')
        was, now = _normalisation(told or inputs), _normalisation(inputs)
        if was != now:
            say(f'--pretrained {saved.path}: inputs were normalised by {was}, and are by {now} '
                f'here: --normalise {was} keeps what they were')


def _normalisation(inputs):
    """The means and deviations of inputs, as --normalise takes them."""
    return '[' + ','.join(f'{value:.5g}' for value in (*inputs.mean, *inputs.std)) + ']'


def _read(source):
    if source not in ('18', '34'):
        return read_checkpoint(source)
    try:
        params = pretrained_params(int(source))
    except RuntimeError as error:
        raise OSError(str(error)) from error
    args = {'model': 'diracnet', 'depth': int(source), 'width': 1, 'dataset': 'ImageNet'}
    return make_contents(source, {'args': args}, params)


def _last_layer(before, known, names):
    """Whether the last layer is kept, and how that is said.

    before: the number of its classes; known: their names, or None; names: of those to be learnt.
    """
    if before != len(names):
        return False, f'is replaced by a new one of {len(names)}'
    if not known or len(known) != before:
        return True, 'is kept: the file does not say which they are'
    for number, (was, now) in enumerate(zip(known, names)):
        if was != now:
            return False, f'is replaced by a new one: class {number} was {was}, is {now}'
    return True, 'is kept: they are the same'


def _differences(saved, opt, inputs):
    """Lists in what the network of a file, as far as that is known, is another than is trained."""
    if is_folded(saved.params):
        return ['holds a folded network: expected the parameters it was folded from']
    found, asked = dict(saved.args), {'model': opt.model, **options.model_options(opt)}
    kind = Preprocessing.from_args(found).kind if 'dataset' in found else None
    if found.get('model', 'diracnet') == 'diracnet':
        try:
            net = saved.topology()
        except ValueError:  # of another family, and says nothing of itself
            return []
        found = {'model': 'diracnet', 'depth': net.depth, 'width': net.width, **found}
        kind = net.kind
    differ = [f'{name} {_shown(found[name])}, expected {_shown(value)}'
              for name, value in asked.items()
              if name not in NO_PARAMETERS and found.get(name, value) != value]
    if kind and (kind == 'ImageNet') != (inputs.kind == 'ImageNet'):
        differ.append(f'for images {_sizes(kind)}, expected {_sizes(inputs.kind)}')
    return differ


def _shown(value):
    return f'{value:g}' if isinstance(value, float) else value


def _sizes(kind):
    return f'{"above" if kind == "ImageNet" else "up to"} {MAX_SMALL} pixels'
