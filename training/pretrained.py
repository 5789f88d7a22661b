"""Fine-tuning: initializes a model from another run, a file, or the published weights."""

from cli import say
from diracnet import check_params, is_folded
from diracnets.checkpoint import make_contents, pretrained_params, read_checkpoint
from diracnets.loading import file_preprocess
from diracnets.preprocessing import MAX_SMALL, Preprocessing
from training import options
from training.distributed import rank, rank_zero_first
from training.freezing import last_layer_params

NO_PARAMETERS = {'checkpointing', 'droprate'}  # model options that do not change the parameters


def load_pretrained(model, opt, preprocess, classes):
    """Loads --pretrained into the model and prints whether its last layer was loaded too.

    The last layer is loaded for equal class names, or an equal number of classes if the file does
    not name them; otherwise it stays randomly initialized. classes: the class names of the training
    set. Raises ValueError if other parameters do not fit, OSError if published weights are not
    available.
    """
    contents, file_inputs = _read(opt.pretrained)
    expected = model.state_dict()
    last = last_layer_params(model)
    params = contents.params
    num_classes = max(params[last[0]].shape[:1], default=0) if last[0] in params else len(classes)
    same_classes, reason = _compare_classes(num_classes, contents.classes, classes)
    if not same_classes:
        params = {**params, **{name: expected[name] for name in last}}
    try:
        check_params(params, expected)
    except ValueError as error:
        differences = '; '.join(_differences(contents, opt, preprocess))
        raise ValueError(f'--pretrained {contents.path}: {differences or error}') from error
    model.load_state_dict(params)
    if rank() == 0:
        action = 'loaded' if same_classes else 'randomly initialized'
        say(f'--pretrained {contents.path}: last layer ({num_classes} classes) {action}: {reason}')
        before, now = _normalization(file_inputs or preprocess), _normalization(preprocess)
        if before != now:
            say(f'--pretrained {contents.path}: inputs were normalized by {before}, now by {now}; '
                f'for the same normalization use --normalize {before}')


def _normalization(preprocess):
    """Formats means and stds as a value of --normalize."""
    return '[' + ','.join(f'{value:.5g}' for value in (*preprocess.mean, *preprocess.std)) + ']'


def _read(source):
    """Returns the contents of --pretrained, and the preprocessing that they name or None."""
    if source in ('18', '34'):
        try:
            params = rank_zero_first(lambda: pretrained_params(int(source)))
        except RuntimeError as error:
            raise OSError(str(error)) from error
        args = {'model': 'diracnet', 'depth': int(source), 'width': 1, 'dataset': 'ImageNet'}
        contents = make_contents(source, {'args': args}, params)
    else:
        contents = read_checkpoint(source)
    try:
        return contents, file_preprocess(contents)
    except ValueError as error:
        raise ValueError(f'--pretrained {source}: {error}') from error


def _compare_classes(num_classes, file_classes, classes):
    """Returns whether the classes of a file are those of the training set, and the reason.

    num_classes, file_classes: number and names of the file's classes; the names may be None.
    """
    if num_classes != len(classes):
        return False, f'the training set has {len(classes)} classes'
    if not file_classes or len(file_classes) != num_classes:
        return True, 'the file has no class names'
    for number, (before, now) in enumerate(zip(file_classes, classes)):
        if before != now:
            return False, f'class {number} is {before} in the file, {now} in the dataset'
    return True, 'same classes'


def _differences(contents, opt, preprocess):
    """Lists the known differences between the model in a file and the model to train."""
    if is_folded(contents.params):
        return ['contains a folded network; use the checkpoint that it was folded from']
    file_args, args = dict(contents.args), {'model': opt.model, **options.model_options(opt)}
    kind = Preprocessing.from_args(file_args).kind if 'dataset' in file_args else None
    if file_args.get('model', 'diracnet') == 'diracnet':
        try:
            topology = contents.topology()
        except ValueError:  # another architecture, without metadata
            return []
        file_args = {'model': 'diracnet', 'depth': topology.depth, 'width': topology.width,
                     **file_args}
        kind = topology.kind
    differences = [f'{name} {_format(file_args[name])}, expected {_format(value)}'
                   for name, value in args.items()
                   if name not in NO_PARAMETERS and file_args.get(name, value) != value]
    if kind and (kind == 'ImageNet') != (preprocess.kind == 'ImageNet'):
        differences.append(f'for images {_pixels(kind)}, expected {_pixels(preprocess.kind)}')
    return differences


def _format(value):
    return f'{value:g}' if isinstance(value, float) else value


def _pixels(kind):
    return f'{"above" if kind == "ImageNet" else "up to"} {MAX_SMALL} pixels'
