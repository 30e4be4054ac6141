"""Labels for new cells: the votes of their nearest reference cells, calibrated, and as deep as they can be trusted.

A cell's 30 nearest reference cells, by cosine of the full fractal vectors, vote for their path of the hierarchy. From
the system down, each level takes the label with most votes under the label above it, so the four labels of an answer
always lie on one path. Held-out reference cells tell how often a label with so many votes is right (isotonic
regression, Zadrozny and Elkan 2002): that is the probability. The answer stops above the first level whose probability
is below the confidence asked for.

Votes say nothing about types that the reference lacks: such a cell still has 30 nearest. So a cell is also compared
with the predicted type in two ways: the Mahalanobis distance of its input vector from the type's mean, under the
covariance that all types share (Lee et al. 2018), and the largest logit that the adapter has for any path (Hendrycks et
al. 2022): unknown cells get a low one. Both become conformal p-values, joined as Fisher did; `typicality` is the share
of held-out cells that are as odd or odder. Distances between fractal vectors say less: the adapter squeezes unknown
cells into known types.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.isotonic import IsotonicRegression

from fractal.adapter import Adapter, embed
from fractal.atlas import LEVELS
from fractal.metrics import nearest

# Chosen on other draws of donors (10 and 11, CAUTION also on 0 to 2) than those that benchmarks/annotation.py reports.
NEIGHBOURS = 30
TAU = 0.1  # a vote's weight is exp(cosine / TAU), so that 5 near cells of a rare type outweigh 25 far ones
NOVEL = 0.035  # typicality below this: the cell is flagged
CAUTION = 0.12  # typicality below this: no label deeper than the lineage
CHUNK = 4_096  # cells whose neighbours' vectors are held at a time: 63 MB at 4 x 32


@dataclass(frozen=True)
class Tree:
    """The hierarchy as codes: one row per path, from system to subtype."""

    paths: list[tuple[str, ...]]  # (P,) names
    nodes: np.ndarray  # (P, 4) int64: the node of each path at each level; two nodes may share a name, not a parent

    @staticmethod
    def of(paths: Sequence[tuple[str, ...]]) -> "Tree":
        levels = range(1, len(LEVELS) + 1)
        position = [{p: i for i, p in enumerate(sorted({path[:k] for path in paths}))} for k in levels]
        nodes = [[position[k - 1][path[:k]] for k in levels] for path in paths]
        return Tree([tuple(path) for path in paths], np.array(nodes))


@dataclass(frozen=True)
class Calibration:
    """What held-out cells taught: votes -> probability per level, and how odd ordinary cells are."""

    votes: list[tuple[list[float], list[float]]]  # per level: knots (votes, probability), ascending, interpolated
    mahalanobis: list[float]  # of the held-out cells, ascending
    neg_max_logit: list[float]
    ood_score: list[float]  # both joined

    def probability(self, votes: np.ndarray) -> np.ndarray:
        """Votes of the predicted labels (n, 4) -> (n, 4): a label is never surer than the one above it."""
        columns = [np.interp(column, *knots) for column, knots in zip(votes.T, self.votes, strict=True)]
        return np.minimum.accumulate(np.stack(columns, axis=1), axis=1)

    def typicality(self, mahalanobis: np.ndarray, neg_max_logit: np.ndarray) -> np.ndarray:
        """(n,) and (n,) -> (n,) in (0, 1]."""
        return tail(
            fisher(tail(mahalanobis, self.mahalanobis), tail(neg_max_logit, self.neg_max_logit)), self.ood_score
        )


def tail(values: np.ndarray, held_out: Sequence[float] | np.ndarray) -> np.ndarray:
    """Conformal p-value: the share of held-out values that are at least as large, the value itself counted in."""
    n = len(held_out)
    return (n - np.searchsorted(held_out, values, "left") + 1) / (n + 1)


def fisher(*p_values: np.ndarray) -> np.ndarray:
    return -np.sum([np.log(p) for p in p_values], axis=0)


@dataclass(frozen=True)
class Raw:
    """What the reference says of n cells, before calibration."""

    path: np.ndarray  # (n,) int64, a path that runs through all four labels
    votes: np.ndarray  # (n, 4) float64, the share of the votes for each label
    mahalanobis: np.ndarray  # (n,) from the predicted subtype's mean
    neg_max_logit: np.ndarray  # (n,) minus the largest logit
    distance: np.ndarray  # (n,) cosine distance to the nearest reference cell, in the full fractal vector


class Annotator:
    """Holds the reference: vectors (m, dim) float32, their path (m,) int64 into `tree`, and the adapter.

    One copy of the reference's fractal vectors stays in memory, 512 bytes a cell at 4 x 32.
    """

    def __init__(self, adapter: Adapter, vectors: np.ndarray, path: np.ndarray, tree: Tree) -> None:
        self.adapter, self.tree = adapter, tree
        self.device = next(adapter.parameters()).device
        self.path = torch.from_numpy(path)
        self.bank = embed(adapter, torch.from_numpy(vectors).to(self.device))[-1]
        x = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float64)
        used, row = np.unique(path, return_inverse=True)
        means = np.stack([x[row == i].mean(0) for i in range(len(used))])
        covariance = ledoit_wolf(x - means[row], assume_centered=True)[0]
        self.whiten = np.linalg.cholesky(np.linalg.pinv(covariance, hermitian=True) + 1e-9 * np.eye(x.shape[1]))
        self.means = np.zeros((len(tree.paths), x.shape[1]))
        self.means[used] = means @ self.whiten

    def __call__(self, vectors: np.ndarray) -> Raw:
        """vectors (n, dim) float32, finite and not zero."""
        parts = [self.ask(vectors[start : start + CHUNK]) for start in range(0, max(len(vectors), 1), CHUNK)]
        return Raw(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Raw)))

    def ask(self, vectors: np.ndarray) -> Raw:
        x = torch.from_numpy(vectors).to(self.device)
        with torch.inference_mode():
            logits, blocks = self.adapter.logits_and_blocks(x)
            full, neg_max_logit = self.adapter.full(blocks), -logits.max(1).values
        k = min(NEIGHBOURS, len(self.bank))
        found = nearest(full, self.bank, k) if len(x) else torch.zeros(0, k, dtype=torch.int64)
        cosine = torch.einsum("nd,nkd->nk", full, self.bank[found]).cpu().double()  # Apple's MPS has no float64
        votes = torch.zeros(len(x), len(self.tree.paths), dtype=torch.float64)
        votes.scatter_add_(1, self.path[found.cpu()], (cosine / TAU).softmax(1))
        path, share = descend(votes.numpy(), self.tree.nodes)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float64)
        mahalanobis = np.linalg.norm(unit @ self.whiten - self.means[path], axis=1)
        return Raw(path, share, mahalanobis, neg_max_logit.cpu().numpy(), (1 - cosine[:, 0]).clamp(min=0).numpy())


def descend(votes: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Votes per path (n, P), which sum to 1, and `Tree.nodes` -> a path (n,), and the share (n, 4) of its nodes.

    At every level the node with most votes among the children of the node above; the path is the last of these.
    """
    allowed = np.ones(votes.shape, bool)
    shares = []
    for level in nodes.T:
        sums = (votes * allowed) @ np.eye(level.max() + 1)[level]
        chosen = sums.argmax(1)
        allowed &= level == chosen[:, None]
        shares.append(sums[np.arange(len(votes)), chosen])
    return allowed.argmax(1), np.stack(shares, axis=1)


def calibrate(raw: Raw, true_path: np.ndarray, tree: Tree, weight: np.ndarray | None = None) -> Calibration:
    """Fit on held-out cells with these true paths (n,); `weight` (n,) makes a balanced draw count as the whole file."""
    right = tree.nodes[raw.path] == tree.nodes[true_path]
    knots = []
    for k in range(len(LEVELS)):
        fit = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(raw.votes[:, k], right[:, k], weight)
        knots.append((fit.X_thresholds_.tolist(), fit.y_thresholds_.tolist()))
    mahalanobis, neg_max_logit = np.sort(raw.mahalanobis), np.sort(raw.neg_max_logit)
    ood_score = np.sort(fisher(tail(raw.mahalanobis, mahalanobis), tail(raw.neg_max_logit, neg_max_logit)))
    return Calibration(knots, mahalanobis.tolist(), neg_max_logit.tolist(), ood_score.tolist())


@dataclass(frozen=True)
class Answer:
    """n annotated cells. The labels of all four levels are there, `depth` says how many can be trusted."""

    path: np.ndarray  # (n,) int64 into Tree.paths
    probability: np.ndarray  # (n, 4)
    depth: np.ndarray  # (n,) 0 ... 4
    distance: np.ndarray  # (n,)
    typicality: np.ndarray  # (n,)
    unlike: np.ndarray  # (n,) bool: like nothing in the reference


def answer(raw: Raw, calibration: Calibration, confidence: float = 0.8) -> Answer:
    """Back off to the deepest level whose probability is at least `confidence`, and to the lineage in odd cells."""
    probability = calibration.probability(raw.votes)
    typicality = calibration.typicality(raw.mahalanobis, raw.neg_max_logit)
    depth = (probability >= confidence).sum(1)  # probabilities fall from level to level
    depth = np.where(typicality < CAUTION, np.minimum(depth, 2), depth)
    return Answer(raw.path, probability, depth, raw.distance, typicality, typicality < NOVEL)


def reliability(probability: np.ndarray, right: np.ndarray, bins: int = 15) -> list[dict[str, Any]]:
    """The reliability curve: (n,) and (n,) bool -> per bin of equal numbers of cells, its means and its size."""
    order = np.argsort(probability, kind="stable")
    return [
        {"probability": float(probability[rows].mean()), "accuracy": float(right[rows].mean()), "cells": len(rows)}
        for rows in np.array_split(order, bins)
        if len(rows)
    ]


def calibration_error(probability: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: how far probability and accuracy are apart, mean over cells (Naeini et al. 2015)."""
    curve = reliability(probability, right, bins)
    return sum(abs(b["probability"] - b["accuracy"]) * b["cells"] for b in curve) / len(probability)
