"""Welch's interval of a difference of means, and the rule that decides a claim by it."""

import math
import statistics
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, which is infinite if a group has a single value."""

    value: float
    low: float
    high: float


def welch(*terms: tuple) -> Estimate:
    """Returns a weighted sum of means with its 95 % Welch interval.

    terms: pairs of a weight and the values of a group. `welch((1, a), (-1, b))` is the difference
    of two means; one term gives the interval of Student's t. Groups may differ in variance and
    size. The interval is infinite if a group has a single value.
    """
    value = sum(weight * statistics.mean(values) for weight, values in terms)
    if any(len(values) < 2 for _, values in terms):
        return Estimate(value, -math.inf, math.inf)
    variances = [weight**2 * statistics.variance(values) / len(values) for weight, values in terms]
    total = sum(variances)
    if not total:
        return Estimate(value, value, value)
    # Welch-Satterthwaite
    freedom = total**2 / sum(variance**2 / (len(values) - 1)
                             for variance, (_, values) in zip(variances, terms))
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total)  # two-sided, 95 %
    return Estimate(value, value - half, value + half)


def verdict_above(estimates: list[Estimate], margin: float) -> str:
    """Decides whether all estimates are above a margin: 'yes', 'no' or 'inconclusive'.

    yes: all intervals are above the margin; no: one of them is below it.
    """
    if any(estimate.high < margin for estimate in estimates):
        return 'no'
    return 'yes' if all(estimate.low > margin for estimate in estimates) else 'inconclusive'


def verdict_at_most(estimates: list[Estimate], margin: float) -> str:
    """Decides whether no estimate is above a margin: 'yes', 'no' or 'inconclusive'."""
    return verdict_above([Estimate(-e.value, -e.high, -e.low) for e in estimates], -margin)
