"""Intervals of 95 % of means of differences, over cells or over whole donors, studies or types."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import t


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Student's interval of the mean of (n,) independent values, such as one per donor; NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    mean = float(np.mean(values))
    return mean - half, mean + half


def cluster_bootstrap(values: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Bootstrap interval of the (weighted) mean of (n,) values that resamples whole groups: donors, studies or types.

    groups (n,) of any type, weights (n,) above 0. Percentiles of 10,000 resamples. NaN for fewer than two groups; too
    narrow for fewer than about six.
    """
    weights = np.ones(len(values)) if weights is None else weights
    number = np.unique(groups, return_inverse=True)[1]
    size, total = np.bincount(number, weights), np.bincount(number, weights * values)
    if len(size) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).multinomial(len(size), np.full(len(size), 1 / len(size)), size=10_000)
    low, high = np.quantile(drawn @ total / (drawn @ size), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (n,) values of which few differ, such as differences of -1, 0, 1.

    How often each value is drawn in a resample is multinomial, so no resample is written out.
    """
    distinct, counts = np.unique(values, return_counts=True)
    n = len(values)
    means = np.random.default_rng(0).multinomial(n, counts / n, size=10_000) @ distinct / n
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
