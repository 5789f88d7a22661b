"""The comparisons in logs/gpu/rates.csv, which experiments/gpu.py writes, for claims and tables."""

from collections import defaultdict

from experiments.results import CPU

UNCOMPILED, COMPILED = 'train.py', 'train.py --compile'  # the names in rates.csv
FORMS = UNCOMPILED, COMPILED
EAGER = 'float32, NCHW, eager'


def standard_convolutions(form):
    """Returns the stored name of the variant with W in place of W_hat."""
    return f'standard convolutions, {form}'


BASELINES = {standard_convolutions(form): form for form in FORMS}  # of the ratios


def gpu_comparisons(results, kind, is_complete=bool):
    """Returns {settings: {variant: record}} of the GPU that was measured last.

    `kind` is 'training' or 'inference'; the settings follow it in the title of a comparison, such
    as '28-10, batch 128'. GPUs without a complete comparison are left out: `--no-compile` measures
    a part of the variants.
    """
    records_of = {}  # by GPU, the last one that was measured at the end
    for record in results:
        if record['device'] != CPU and record['compared'].startswith(f'{kind} '):
            records_of[record['device']] = [*records_of.pop(record['device'], []), record]
    for records in reversed(records_of.values()):
        comparisons = defaultdict(dict)
        for record in records:
            settings = record['compared'].removeprefix(f'{kind} ')
            comparisons[settings][record['what']] = record
        complete = {settings: variants for settings, variants in comparisons.items()
                    if is_complete(variants)}
        if complete:
            return complete
    return {}


def resnet_record(variants, form):
    """Returns the record of the ResNet in a form, or None if it was left out."""
    return next((record for name, record in variants.items()
                 if name.startswith('resnet') and name.endswith(f', {form}')), None)


def training_comparisons(results):
    """Returns the complete comparisons of training; a variant may run out of memory."""
    return gpu_comparisons(results, 'training', lambda variants: (
        variants.keys() >= {EAGER, *FORMS, *BASELINES} and resnet_record(variants, COMPILED)))


def overhead_of_w_hat(variants, form):
    """Returns (median, low, high) of the extra time of a step with W_hat, in per cent.

    Newer records hold the ratio to the DiracNet in the same form. In older records both ratios are
    to the first variant: the result is then a quotient, and the interval its outer bounds.
    """
    diracnet_record, standard = variants[form], variants[standard_convolutions(form)]
    if standard['ratio_to'] == form:
        return [100 * (standard[name] - 1) for name in ('ratio', 'ratio_low', 'ratio_high')]
    return [100 * (standard[a] / diracnet_record[b] - 1) for a, b in (
        ('ratio', 'ratio'), ('ratio_low', 'ratio_high'), ('ratio_high', 'ratio_low'))]
