"""Votes -> probabilities, and signals of unknown types -> one p-value: what held-out cells teach.

Isotonic regression (Zadrozny and Elkan 2002) of right or wrong on the share of the votes gives the probability of each
level's label. The signals become conformal p-values, joined as Fisher did into the `ood_score`; `p_value` is the share
of held-out cells, in the natural mix of types, whose score is as high or higher.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.isotonic import IsotonicRegression

from fractal.annotate.votes import Raw
from fractal.hierarchy.tree import Tree

Knots = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Calibration:
    """What held-out cells taught: votes -> probability per level, and how odd ordinary cells are."""

    votes: list[Knots]  # per level: votes and probability, ascending, interpolated
    signals: list[Knots]  # per column of `Raw.signals`: of the held-out cells, ascending, and the weight of each
    ood_score: Knots  # of the held-out cells

    def probability(self, votes: np.ndarray) -> np.ndarray:
        """Votes of the predicted labels (n, levels) -> (n, levels): a label is never surer than the one above it."""
        columns = [np.interp(column, *knots) for column, knots in zip(votes.T, self.votes, strict=True)]
        return np.minimum.accumulate(np.stack(columns, axis=1), axis=1)

    def score(self, signals: np.ndarray) -> np.ndarray:
        """`Raw.signals` (n, 3) -> the ood_score (n,), at least 0."""
        return fisher(signals, self.signals)

    def p_value(self, ood_score: np.ndarray) -> np.ndarray:
        """(n,) -> (n,) in (0, 1]."""
        return tail(ood_score, self.ood_score)


def sorted_knots(values: np.ndarray, weight: np.ndarray) -> Knots:
    order = np.argsort(values, kind="stable")
    return values[order].tolist(), weight[order].tolist()


def tail(values: np.ndarray, held_out: Knots) -> np.ndarray:
    """Conformal p-value: the share of held-out values that are at least as large, the value itself counted in.

    `held_out`: values, ascending, and their weights; the value itself has their mean weight (Tibshirani et al. 2019).
    """
    knots, weight = np.asarray(held_out[0]), np.asarray(held_out[1])
    if knots.shape != weight.shape:  # of a damaged file
        raise ValueError("as many weights as values are needed")
    at_least = np.append(np.cumsum(weight[::-1])[::-1], 0.0)  # from knot i on
    return (at_least[np.searchsorted(knots, values, "left")] + weight.mean()) / (weight.sum() + weight.mean())


def fisher(signals: np.ndarray, held_out: list[Knots]) -> np.ndarray:
    return -np.sum([np.log(tail(column, knots)) for column, knots in zip(signals.T, held_out, strict=True)], axis=0)


def calibrate(raw: Raw, true_path: np.ndarray, tree: Tree, weight: np.ndarray | None = None) -> Calibration:
    """Fit on held-out cells with these true paths (n,); `weight` (n,) makes a balanced draw count as the whole file."""
    weight = np.ones(len(true_path)) if weight is None else weight
    right = tree.nodes[raw.path] == tree.nodes[true_path]
    knots = []
    for votes, hits in zip(raw.votes.T, right.T, strict=True):
        fit = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(votes, hits, weight)
        knots.append((fit.X_thresholds_.tolist(), fit.y_thresholds_.tolist()))
    signals = [sorted_knots(column, weight) for column in raw.signals.T]
    return Calibration(knots, signals, sorted_knots(fisher(raw.signals, signals), weight))
