"""How good vectors and probabilities are. Pure functions on tensors and arrays."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fractal.search.exact import nearest

K = 5  # neighbours that vote, as published


def knn_predict(
    queries: Tensor, labels: Tensor, bank: Tensor | None = None, bank_labels: Tensor | None = None
) -> Tensor:
    """What the 5 neighbours of each query vote for, per level -> (n, levels) int64.

    labels (n, levels) int64 and bank_labels (m, levels). Without a bank: leave-one-out among the queries.
    """
    return majority((labels if bank_labels is None else bank_labels)[nearest(queries, bank, K)])


def majority(neighbours: Tensor) -> Tensor:
    """What the neighbours vote for, per level: their labels (n, k, levels), nearest first -> (n, levels).

    The nearest one breaks a tie.
    """
    k = neighbours.shape[1]
    count = (neighbours[:, :, None] == neighbours[:, None]).sum(2)
    winner = (count * k - torch.arange(k, device=neighbours.device)[:, None]).argmax(1, keepdim=True)
    return neighbours.gather(1, winner)[:, 0]


def knn_accuracy(
    queries: Tensor, labels: Tensor, bank: Tensor | None = None, bank_labels: Tensor | None = None
) -> list[float]:
    """Share of the queries whose neighbours vote for the right label, per level. Arguments as of `knn_predict`."""
    return (knn_predict(queries, labels, bank, bank_labels) == labels).float().mean(0).tolist()


def macro_scores(predicted: np.ndarray, labels: np.ndarray) -> tuple[float | None, float | None]:
    """-> accuracy and F1 of labels (n,), both as means over the classes that have cells; None without cells.

    Every class counts the same, however many cells it has: scikit-learn's balanced accuracy and macro F1.
    """
    from sklearn.metrics import precision_recall_fscore_support  # only here: 3 s that training can do without

    if not len(labels):
        return None, None
    classes = np.unique(labels)
    _, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=classes, average="macro", zero_division=0
    )
    return float(recall), float(f1)


def hierarchical_f1(predicted: np.ndarray, labels: np.ndarray, ancestors: np.ndarray) -> float | None:
    """F1 over ancestors: a wrong type that shares most of its ancestors with the true one is nearly right.

    predicted and labels (n,) codes; ancestors (classes, terms) bool, a class's term and all above it. Precision is
    the share of the predicted terms that are true, recall the share of the true ones that are predicted, both over all
    cells together (Kiritchenko et al. 2006). Cells whose true or predicted class has no term are left out; None if no
    cell is left.
    """
    known = ancestors.sum(1) > 0
    use = known[predicted] & known[labels]
    guess, truth = ancestors[predicted[use]], ancestors[labels[use]]
    return float(2 * (guess & truth).sum() / (guess.sum() + truth.sum())) if use.any() else None


def triplet_agreement(vectors: Tensor, labels: Tensor, seen: Tensor) -> tuple[float | None, float | None]:
    """Does the tree of the types' centroids agree with the hierarchy? -> for seen types, and for unseen ones.

    A triplet is two types and a third one that leaves their path of labels at a coarser level than they leave each
    other. It agrees if the centroids (means of unit vectors) of the two are closer, by cosine, to each other than
    either is to the third. The share of those that agree; by chance 1/3. The first figure takes triplets of seen types
    alone, the second those with an unseen type among the two. vectors (n, dim), labels (n, levels) int64, the last
    level the types; seen (n,) bool. None where there is no triplet.
    """
    types, type_of = labels[:, -1].cpu().unique(return_inverse=True)
    paths = torch.zeros(len(types), labels.shape[1], dtype=torch.int64).index_copy_(0, type_of, labels.cpu())
    known = torch.zeros(len(types), dtype=torch.bool).index_copy_(0, type_of, seen.cpu())
    x = normalize(vectors.cpu().double(), dim=1)
    centroids = normalize(torch.zeros(len(types), x.shape[1], dtype=x.dtype).index_add_(0, type_of, x), dim=1)
    cosine = centroids @ centroids.T
    shared = (paths[:, None] == paths[None]).int().cumprod(2).sum(2)  # how many levels two paths have in common
    counts = torch.zeros(2, 2, dtype=torch.int64)  # seen, unseen x triplets, those that agree
    for a in range(len(types)):  # (b, c): the second of the two, and the third
        apart = (shared[a, :, None] > shared[a]) & (shared[a, :, None] > shared)
        apart[: a + 1] = False  # b after a: every pair once
        right = apart & (cosine[a, :, None] > cosine[a]) & (cosine[a, :, None] > cosine)
        both = known[a] & known
        for i, use in enumerate(((both[:, None] & known), ~both[:, None].expand_as(apart))):
            counts[i] += torch.stack([(apart & use).sum(), (right & use).sum()])
    seen_share, unseen_share = (int(right) / int(of) if of else None for of, right in counts)
    return seen_share, unseen_share


# How far a probability is from the share that is right.


def probability_bins(probability: np.ndarray, bins: int) -> np.ndarray:
    """(n,) -> (n,) bin numbers: bins of about equal numbers of cells that never part equal probabilities.

    All cells of one probability go where the middle one of them belongs, so the order of the cells is of no matter.
    """
    _, tie, size = np.unique(probability, return_inverse=True, return_counts=True)
    return ((2 * size.cumsum() - size) * bins // (2 * len(probability)))[tie]


def reliability(probability: np.ndarray, right: np.ndarray, bins: int = 15) -> list[dict[str, Any]]:
    """The reliability curve: (n,) and (n,) bool -> per bin, by rising probability, its means and its size."""
    number = probability_bins(probability, bins)
    size = np.bincount(number, minlength=bins)
    sums = np.bincount(number, probability, bins), np.bincount(number, right, bins)
    return [
        {"probability": float(p / n), "accuracy": float(r / n), "cells": int(n)}
        for p, r, n in zip(*sums, size, strict=True)
        if n
    ]


def expected_calibration_error(probability: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """How far probability and accuracy are apart, mean over cells: (n,) and (n,) bool (Naeini et al. 2015).

    Never 0, even for perfect probabilities: read it beside `calibration_noise_floor`.
    """
    number = probability_bins(probability, bins)
    return float(np.abs(np.bincount(number, probability - right)).sum() / len(probability))


def calibration_noise_floor(probability: np.ndarray, bins: int = 15, rng: np.random.Generator | None = None) -> float:
    """The mean `expected_calibration_error` of perfectly calibrated cells with these probabilities (n,).

    Whether each cell is right is drawn anew with its probability, 100 times.
    """
    rng = rng or np.random.default_rng(0)
    p = np.asarray(probability, float)
    return float(np.mean([expected_calibration_error(p, rng.random(len(p)) < p, bins) for _ in range(100)]))


def neighbourhood_purity(vectors: Tensor, labels: Tensor, wide: int = 50) -> tuple[list[float], float]:
    """What a neighbourhood shows: labels (n, levels), the last level the finest.

    -> per level the share of the 5 nearest other cells that have a cell's label, and how many labels of the
    finest level occur among the `wide` nearest, both as means over the cells.
    """
    neighbours = labels[nearest(vectors, k=wide)]  # (n, wide, levels)
    agree = (neighbours[:, :K] == labels[:, None]).float().mean((0, 1)).tolist()
    finest = neighbours[:, :, -1].sort(1).values
    return agree, (1 + (finest.diff(dim=1) != 0).sum(1).float()).mean().item()


def silhouette(vectors: Tensor, labels: Tensor) -> float | None:
    """Mean cosine silhouette, equal to scikit-learn's `silhouette_score`; None for fewer than two classes.

    The mean cosine distance from a cell to a class is 1 minus its product with the class's mean unit vector, so
    class sums do: O(n x classes), no n x n matrix. vectors (n, dim), labels (n,) int64. Rousseeuw 1987.
    """
    classes, code = labels.cpu().unique(return_inverse=True)
    if len(classes) < 2:
        return None
    x = normalize(vectors.cpu().double(), dim=1)
    size = code.bincount()
    sums = torch.zeros(len(classes), x.shape[1], dtype=x.dtype).index_add_(0, code, x)
    distance = size - x @ sums.T  # (n, classes), summed over the members of a class
    inside = distance.gather(1, code[:, None])[:, 0] / (size[code] - 1).clamp(min=1)
    outside = (distance / size).scatter(1, code[:, None], torch.inf).min(1).values
    width = (outside - inside) / torch.maximum(inside, outside).clamp(min=1e-12)
    return width.where(size[code] > 1, 0.0).mean().item()  # a class of one cell has 0, by definition
