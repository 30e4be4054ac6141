"""When a cell is novel: what it says of a cell that no type of the reference is like it.

Three signals (votes.py: the distance of the 30th neighbour, that of the nearest class mean, and how much the cell lies
between classes) become conformal p-values against the held-out cells, joined into the `ood_score`; `p_value` is the
share of held-out cells whose score is as high or higher. Below NOVEL a cell is flagged, below CAUTION its fine labels
are withheld.
"""

import numpy as np

# Shares of ordinary cells, which is what a p-value promises: 4 % of those that are like the held-out cells are flagged,
# and 5 % lose their fine labels. Chosen so that no more than 6 % are flagged in organs that nothing has seen.
NOVEL = 0.04  # p-value below this: the cell is flagged
CAUTION = 0.05  # p-value below this: no label below the second level
CAUTIOUS_DEPTH = 2
NOVELTY = ("on", "flag", "off")  # flags and withholds, only flags, does neither
Knots = tuple[np.ndarray, np.ndarray]  # values, ascending, and what belongs to each


def sorted_knots(values: np.ndarray, weight: np.ndarray) -> Knots:
    order = np.argsort(values, kind="stable")
    return values[order], weight[order]


def tail(values: np.ndarray, held_out: Knots) -> np.ndarray:
    """Conformal p-value: the share of held-out values that are at least as large, the value itself counted in.

    `held_out`: values, ascending, and their weights; the value itself has their mean weight (Tibshirani et al. 2019).
    """
    knots, weight = held_out
    at_least = np.append(np.cumsum(weight[::-1])[::-1], 0.0)  # from knot i on
    return (at_least[np.searchsorted(knots, values, "left")] + weight.mean()) / (weight.sum() + weight.mean())


def joined(signals: np.ndarray, held_out: list[Knots]) -> np.ndarray:
    """`Raw.signals` (n, 3) and those of the held-out cells, a column each -> the ood_score (n,), at least 0.

    The sum over the signals of log(p) squared: one that is striking weighs more than three that are mild. The plain sum
    of log(p), Fisher's, finds as many cells of unknown types in unseen studies, and fewer in new donors of one lab.
    """
    return np.sum([np.log(tail(column, knots)) ** 2 for column, knots in zip(signals.T, held_out, strict=True)], axis=0)
