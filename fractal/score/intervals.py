"""How sure a share is: intervals of 95 %, over cells or over whole studies, donors or types."""

from functools import lru_cache

import numpy as np
from scipy.special import betaln

MEANS, CORRELATIONS = 160, 24  # points of the grid of `grouped_interval`; twice as many change it by less than .002


def wilson_interval(k: float, n: int) -> tuple[float, float]:
    """Interval of a share: k of n cells (Wilson 1927). Honest at the edge: 100 of 100 gives [.963, 1].

    Cells must be independent draws; where whole studies or types are held out they are not (`grouped_interval`).
    """
    z = 1.959964
    share, scale = k / n, 1 + z * z / n
    middle = share + z * z / (2 * n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@lru_cache(maxsize=1)
def grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Beta distributions of the shares of groups -> their a and b (means, correlations), and the edges of the means.

    All are equally likely before anything is known: the points are evenly spaced in arcsin(sqrt(x)), so that mean and
    correlation within groups have Jeffreys' prior of a share, Beta(1/2, 1/2).
    """
    means = (np.arange(MEANS) + 0.5) / MEANS * np.pi / 2
    correlations = (np.arange(CORRELATIONS) + 0.5) / CORRELATIONS * np.pi / 2
    mean, size = np.sin(means)[:, None] ** 2, np.tan(correlations)[None] ** -2  # size: 1 / correlation - 1
    edges = np.sin(np.linspace(0, np.pi / 2, MEANS + 1)) ** 2
    return mean * size, (1 - mean) * size, edges


def grouped_interval(hits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Interval of a share that differs from group to group: hits (g,) of sizes (g,) cells, g >= 2.

    Each group's share is a draw of one beta distribution, whose mean is looked for (a beta-binomial model). The
    interval is that of 95 % of the mean's probability, given the groups; it holds the share of all cells.
    Of such groups it covers .9 and more (benchmarks/coverage.py); of two it is half as wide as all that is possible.
    It covers down to .81 where groups differ in another way: a few of twenty are all wrong, the others nearly all right
    (normal logits, standard deviation 3). Those few, or none of them, decide the share.
    """
    a, b, edges = grid()
    log_likelihood = -len(hits) * betaln(a, b)
    for k, n in zip(hits, sizes, strict=True):
        log_likelihood = log_likelihood + betaln(a + k, b + n - k)
    density = np.exp(log_likelihood - log_likelihood.max()).sum(1)  # of the means
    low, high = np.interp([0.025, 0.975], np.append(0, density.cumsum() / density.sum()), edges)
    share = hits.sum() / sizes.sum()
    return float(min(low, share)), float(max(high, share))


def share_interval(right: np.ndarray, groups: np.ndarray | None) -> tuple[float, float] | None:
    """95 % interval of the share of (n,) bool that is True; None where there is none.

    Over cells (Wilson), or over `groups` (n,) where whole groups are held out; one group says nothing of others.
    """
    if not len(right):
        return None
    if groups is None:
        return wilson_interval(int(right.sum()), len(right))
    number = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(number)
    return grouped_interval(np.bincount(number, right), sizes) if len(sizes) > 1 else None
