"""Votes -> probabilities, signals of novelty -> one p-value, an error -> a threshold: what held-out cells teach.

A held-out cell was asked of an adapter and of reference cells that had seen neither it nor its study
(cross_fit.py). Isotonic regression (Zadrozny and Elkan 2002) of right or wrong on the share of the votes gives the
probability of each level's label, smoothed so that it never says more than so many cells can show. The rule of novelty
(novelty.py) takes from them what is ordinary. All studies weigh the same: a new query is a draw of studies.
"""

from dataclasses import dataclass, replace

import numpy as np
from sklearn.isotonic import isotonic_regression

from fractal.annotate.novelty import Knots, joined, sorted_knots
from fractal.annotate.votes import Ballot, Raw, Rows, count
from fractal.hierarchy.tree import Tree

FULL_WEIGHT = 50  # cells; a smaller study weighs less, as so many of these as it has
PRIOR = 2.0  # cells that are added to a step of the isotonic curve, half of them right: Laplace's rule of succession


@dataclass(frozen=True)
class HeldOut(Rows):
    """n labelled cells, and what reference cells that exclude them and their studies say of them."""

    vectors: np.ndarray  # (n, dim) float32, as they went in
    path: np.ndarray  # (n,) int64, true
    study: np.ndarray  # (n,) int64 codes, -1 where cells were held out instead of studies
    fold: np.ndarray  # (n,) int64, which of the adapters was asked
    weight: np.ndarray  # (n,) float32
    neighbour_path: np.ndarray  # (n, k) int32, see `Ballot`
    cosine: np.ndarray  # (n, k) float32
    signals: np.ndarray  # (n, 3) float32

    def __len__(self) -> int:
        return len(self.path)

    def raw(self, tree: Tree) -> Raw:
        cosine, signals = self.cosine.astype(np.float64), self.signals.astype(np.float64)
        return count(Ballot(self.neighbour_path.astype(np.int64), cosine, signals), tree)

    def restricted(self, keep: np.ndarray) -> "HeldOut":
        """The cells on the paths of a mask (P,), with the neighbours on these; those that have none are left out."""
        votes = keep[self.neighbour_path]
        cosine = np.where(votes, self.cosine, -np.inf).astype(np.float32)
        order = np.argsort(-cosine, axis=1, kind="stable")  # nearest first
        cosine, path = (np.take_along_axis(values, order, 1) for values in (cosine, self.neighbour_path))
        return replace(self, cosine=cosine, neighbour_path=path)[keep[self.path] & votes.any(1)]


def held_out_of(
    ballot: Ballot, vectors: np.ndarray, path: np.ndarray, study: np.ndarray, fold: int, weight: np.ndarray
) -> HeldOut:
    weight, cosine, signals = (values.astype(np.float32) for values in (weight, ballot.cosine, ballot.signals))
    return HeldOut(
        vectors, path, study, np.full(len(path), fold), weight, ballot.path.astype(np.int32), cosine, signals
    )


def study_weight(study: np.ndarray) -> np.ndarray:
    """Codes (n,) -> weights (n,), of mean 1, with which all studies of FULL_WEIGHT cells or more count the same."""
    if (study < 0).any():
        return np.ones(len(study))
    weight = 1 / np.maximum(np.bincount(study), FULL_WEIGHT)[study]
    return weight / weight.mean()


@dataclass(frozen=True)
class Control:
    """The confidence that keeps an error, and how that went on the held-out cells."""

    error: float
    confidence: float
    unit: str  # "cells" or "studies": the error holds for what can be exchanged with the held-out ones; "" is a target
    mean: float  # share of the held-out cells with a wrong answer, all studies weighing the same
    worst: float  # the largest of a study; of cells without studies as `mean`
    answered: float  # share of the wrong among the answered

    def __str__(self) -> str:
        text = f"at most {self.error:g} of all cells with a wrong label"
        text += f", guaranteed for {self.unit} like the held-out ones" if self.unit else ", a target for new studies"
        worst = "" if self.worst == self.mean else f", {self.worst:.3f} in the worst study"
        return f"{text}; {self.mean:.3f} of the held-out ones{worst}, {self.answered:.3f} of the answered"


@dataclass(frozen=True)
class Calibration:
    """Votes -> probability per level, how unlike all types ordinary cells are, and where their labels go wrong."""

    votes: list[Knots]  # per level: votes and probability, interpolated
    signals: list[Knots]  # per column of `Raw.signals`: of the held-out cells, and the weight of each
    ood_score: Knots  # of the held-out cells, and their weights
    wrong: np.ndarray  # (n,) the probability of the first wrong label of each, -1 where all are right
    surest: np.ndarray  # (n,) that of the first level: the cell is answered at or below this confidence
    study: np.ndarray  # (n,) see `HeldOut`
    weight: np.ndarray  # (n,)

    def control(self, error: float) -> Control:
        """Conformal risk control (Angelopoulos et al. 2024): the lowest confidence that keeps the share of all cells
        whose answer is wrong at `error`, in (0, 1).

        The loss of a cell, 1 where its deepest answered label is wrong, can only fall as the confidence rises. Its mean
        over n cells, or over n >= 1 / error - 1 studies that weigh the same, is kept at error - (1 - error) / n.
        """
        by_study = bool((self.study >= 0).all())
        studies = len(np.unique(self.study))
        enough = by_study and studies >= 1 / error - 1
        weight = 1 / np.bincount(self.study)[self.study] if by_study else self.weight.astype(np.float64)
        weight = weight / weight.sum()
        n = studies if enough else 1 / (weight**2).sum()
        order = np.argsort(-self.wrong, kind="stable")
        values, risk = self.wrong[order], np.cumsum(weight[order])
        last = np.append(values[1:] < values[:-1], True)  # of equal ones
        allowed = last & ((n * risk + 1) / (n + 1) <= error)
        # as low as keeps out the first cell that is too much
        first = int(np.flatnonzero(allowed)[-1]) + 1 if allowed.any() else 0
        too_much = values[first] if first < len(values) else -1.0
        confidence = float(np.nextafter(max(too_much, 0.0), 2.0))
        if 1 / (n + 1) > error:
            confidence = float(np.nextafter(1.0, 2.0))
        lost, answered = self.wrong >= confidence, self.surest >= confidence
        of_studies = [lost[self.study == s].mean() for s in np.unique(self.study)] if by_study else [lost @ weight]
        share = float((lost @ weight) / max(answered @ weight, 1e-12))
        unit = "studies" if enough else "" if by_study else "cells"
        return Control(error, confidence, unit, float(lost @ weight), float(max(of_studies)), share)


def calibrate(held_out: HeldOut, tree: Tree, raw: Raw | None = None) -> Calibration:
    """raw: what others than their neighbours say of the held-out cells."""
    raw = raw or held_out.raw(tree)
    weight = held_out.weight.astype(np.float64)
    right = tree.nodes[raw.path] == tree.nodes[held_out.path]
    signals = [sorted_knots(column, weight) for column in raw.signals.T]
    ood_score = sorted_knots(joined(raw.signals, signals), weight)
    probability = np.empty(raw.votes.shape)
    folds = np.unique(held_out.fold)
    for fold in folds:  # by what the other folds teach
        out = held_out.fold == fold
        teach = ~out if len(folds) > 1 else out
        probability[out] = chain(curves(raw.votes[teach], right[teach], weight[teach]), raw.votes[out])
    depth = np.minimum(right.sum(1), right.shape[1] - 1)[:, None]
    wrong = np.where(right.all(1), -1.0, np.take_along_axis(probability, depth, 1)[:, 0])
    votes = curves(raw.votes, right, weight)
    return Calibration(votes, signals, ood_score, wrong, probability[:, 0], held_out.study, weight)


def curves(votes: np.ndarray, right: np.ndarray, weight: np.ndarray) -> list[Knots]:
    """Of each level: votes (n, levels), right or wrong (n, levels), weight (n,)."""
    return [monotone(column, hits, weight) for column, hits in zip(votes.T, right.T, strict=True)]


def chain(knots: list[Knots], votes: np.ndarray) -> np.ndarray:
    """Votes (n, levels) -> probabilities (n, levels): a label is never surer than the one above it."""
    columns = [np.interp(column, *curve) for column, curve in zip(votes.T, knots, strict=True)]
    return np.minimum.accumulate(np.stack(columns, axis=1), axis=1)


def monotone(votes: np.ndarray, hits: np.ndarray, weight: np.ndarray) -> Knots:
    """votes (n,), right or wrong (n,), weight (n,) -> votes, ascending, and the probability there, from (0, 0) on.

    Each step of the isotonic regression becomes one knot, at the mean of its votes, with the share of its cells that
    are right by the rule of succession, (h + 1) / (n + 2), n being how many cells of one weight say as much (Kish
    1965). What is not monotone any more is merged.
    """
    values, of = np.unique(votes.round(6), return_inverse=True)  # shares that rounding alone tells apart are the same
    mass, squares = np.bincount(of, weight), np.bincount(of, weight**2)
    hit = np.bincount(of, weight * hits)
    fitted = isotonic_regression(hit / mass, sample_weight=mass, y_min=0, y_max=1)
    starts = np.flatnonzero(np.diff(fitted, prepend=-1) > 1e-12)
    mass, squares, hit, votes = (np.add.reduceat(x, starts) for x in (mass, squares, hit, mass * values))
    centre, right, size = votes / mass, hit / mass, mass**2 / squares
    smooth = (size * right + PRIOR / 2) / (size + PRIOR)
    smooth = isotonic_regression(smooth, sample_weight=size + PRIOR, y_min=0, y_max=1)
    return np.append(0.0, centre), np.append(0.0, smooth)
