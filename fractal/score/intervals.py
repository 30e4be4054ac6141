"""How sure a figure is: intervals of 95 %, over cells or over whole studies, donors or types."""

from collections.abc import Sequence

import numpy as np


def wilson_interval(k: float, n: int) -> tuple[float, float]:
    """Interval of a share: k of n cells (Wilson 1927). Honest at the edge: 100 of 100 gives [.963, 1].

    Cells must be independent draws; where whole studies or types are held out they are not (`cluster_bootstrap`).
    """
    z = 1.959964
    share, scale = k / n, 1 + z * z / n
    middle = share + z * z / (2 * n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Student's interval of the mean of (n,) independent values, such as one per donor; NaN for fewer than two."""
    from scipy.stats import t  # only here: training does without

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


def share_interval(right: np.ndarray, groups: np.ndarray | None) -> tuple[float, float] | None:
    """95 % interval of the share of (n,) bool that is True; None where there is none.

    Over cells (Wilson), or over `groups` (n,) where whole groups are held out. Where all of these agree a bootstrap
    has no width; then it is Wilson's for that many groups.
    """
    if not len(right):
        return None
    if groups is None:
        return wilson_interval(int(right.sum()), len(right))
    low, high = cluster_bootstrap(right.astype(float), groups)
    number = len(np.unique(groups))
    return (low, high) if low < high else wilson_interval(number * low, number) if low == high else None
