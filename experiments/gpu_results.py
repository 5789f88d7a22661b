"""Reads what `python -m experiments.gpu` timed: rows of logs/gpu/rates.csv."""

COMPILED = 'train.py --compile'
FORMS = 'train.py', COMPILED
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


PAIRED = {ordinary(form): form for form in FORMS}  # their ratios are to the DiracNet so


def resnet(sides, form):
    """The row of the ResNet, of CIFAR or torchvision's, in a form: None where it was left out."""
    return next((row for what, row in sides.items()
                 if what.startswith('resnet') and what.endswith(f', {form}')), None)


def trainings(measured):
    """The comparisons of training that are whole: a side may lack memory, or --compile be off."""
    return {of: sides for of, sides in of_last_gpu(measured, 'training').items()
            if sides.keys() >= {EAGER, *FORMS, *PAIRED} and resnet(sides, COMPILED)}


def more_for_w_hat(sides, form):
    """How much more time a step takes with W_hat than with W in its place, in per cent.

    Returns (median, low, high): over turns, where the ratio is to that form; of earlier rows, whose
    ratios are to the first side, a quotient of two, and low and high its outer bounds.
    """
    own, other = sides[form], sides[ordinary(form)]
    if other['ratio_to'] == form:
        return [100 * (other[name] - 1) for name in ('ratio', 'ratio_low', 'ratio_high')]
    return [100 * (other[a] / own[b] - 1) for a, b in (
        ('ratio', 'ratio'), ('ratio_low', 'ratio_high'), ('ratio_high', 'ratio_low'))]
