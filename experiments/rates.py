"""Reads what `python -m experiments.gpu` timed: rows of logs/gpu/rates.csv."""

FORMS = ('train.py', 'train.py --compile')
EAGER = 'float32, NCHW, eager'


def of_last_gpu(measured, compared):
    """The last rows of what begins so, of the GPU that was timed last: {of: {what: row}}.

    compared: 'training' or 'inference'; of: what follows it, such as '28-10, batch 128'.
    """
    rows = [row for row in measured if row['device'] != 'CPU']
    found = {}
    for row in rows:
        if row['device'] == rows[-1]['device'] and row['compared'].startswith(f'{compared} '):
            found.setdefault(row['compared'].removeprefix(f'{compared} '), {})[row['what']] = row
    return found


def ordinary(form):
    return f'ordinary convolutions, {form}'


def resnet(sides, form):
    """The row of the ResNet, of CIFAR or torchvision's, in a form: None where it was left out."""
    return next((row for what, row in sides.items()
                 if what.startswith('resnet') and what.endswith(f', {form}')), None)


def trainings(measured):
    """The comparisons of training that are whole: a side may lack memory, or --compile be off."""
    return {of: sides for of, sides in of_last_gpu(measured, 'training').items()
            if sides.keys() >= {EAGER, *FORMS, *map(ordinary, FORMS)} and resnet(sides, FORMS[1])}


def more_for_w_hat(sides, form):
    """How much more time a step takes with W_hat than with W in its place, in per cent.

    Returns (median, low, high): by turns where the two were timed in turns with each other, which
    train.py's own form was with all; of other forms a quotient, and low and high its outer bounds.
    """
    own, other = sides[form], sides[ordinary(form)]
    return [100 * (other[a] / own[b] - 1) for a, b in (
        ('ratio', 'ratio'), ('ratio_low', 'ratio_high'), ('ratio_high', 'ratio_low'))]
