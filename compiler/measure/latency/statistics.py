"""Distribution-free confidence intervals: latencies have long tails, several peaks, and noise of other processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Confidence level of a quantile."""

RATIO_LEVEL = 0.99
"""Confidence level of a ratio; it is higher because a ratio is evaluated several times before it is decided."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval; the high end is infinite if there are too few samples."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half of the width relative to the value; infinite if an end is infinite."""
        return (self.high - self.low) / 2 / self.value if self.value > 0 else math.inf


def quantile(samples: Sequence[float], share: float) -> Interval:
    """A quantile with the interval between two order statistics (Conover, Practical Nonparametric Statistics, 3.2).

    Args:
        samples: At least one sample.
        share: The quantile; 0.5 is the median.

    Returns:
        The interval; its high end is infinite if there are too few samples for the quantile.
    """
    ordered, tail = np.sort(samples), (1 - LEVEL) / 2
    below = int(stats.binom.ppf(tail, len(ordered), share))
    above = int(stats.binom.ppf(1 - tail, len(ordered), share))
    low = float(ordered[below - 1]) if below else 0.0
    high = float(ordered[above]) if above < len(ordered) else math.inf
    return Interval(float(np.quantile(ordered, share)), low, high)


def samples_needed(share: float) -> int:
    """Smallest number of samples for which the interval of a quantile has two finite ends."""
    tail = (1 - LEVEL) / 2
    return math.ceil(math.log(tail) / math.log(max(share, 1 - share)))


def paired_ratio(ratios: Sequence[float]) -> Interval:
    """The location of ratios that were measured in pairs: the Hodges-Lehmann estimate of their logarithms.

    This is the median of the means of all pairs of logarithms, with the interval of the signed rank test (Hollander,
    Wolfe and Chicken, Nonparametric Statistical Methods, 3.1 to 3.3). The interval is almost as narrow as that of a
    mean, and robust against a few disturbed samples.

    Args:
        ratios: Positive ratios.

    Returns:
        The interval; it is from 0 to infinity if there are too few ratios (ten are needed for the level 0.99).
    """
    logs = np.log(np.asarray(ratios))
    count = len(logs)
    rows, columns = np.triu_indices(count)
    means = np.sort((logs[rows] + logs[columns]) / 2)
    expected, deviation = len(means) / 2, math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
    outside = math.floor(expected - float(stats.norm.ppf((1 + RATIO_LEVEL) / 2)) * deviation)
    value = math.exp(float(np.median(means)))
    if outside < 1:
        return Interval(value, 0.0, math.inf)
    return Interval(value, math.exp(means[outside - 1]), math.exp(means[len(means) - outside]))
