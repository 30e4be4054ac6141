"""How good a vector is: kNN accuracy, silhouette and steerability. Pure functions on tensors."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fractal.search import nearest

K = 5  # neighbours that vote, as published


def vote(labels: Tensor) -> Tensor:
    """Majority of each row's neighbours: labels (n, k), nearest first -> (n,). The nearest one breaks a tie."""
    k = labels.shape[1]
    count = (labels[:, :, None] == labels[:, None, :]).sum(2)
    winner = (count * k - torch.arange(k, device=labels.device)).argmax(1, keepdim=True)
    return labels.gather(1, winner)[:, 0]


def knn_predict(
    queries: Tensor, labels: Tensor, bank: Tensor | None = None, bank_labels: Tensor | None = None, k: int = K
) -> Tensor:
    """What the neighbours of each query vote for, per level -> (n, levels) int64.

    labels (n, levels) int64 and bank_labels (m, levels). Without a bank: leave-one-out among the queries.
    """
    return majority((labels if bank_labels is None else bank_labels)[nearest(queries, bank, k)])


def majority(neighbours: Tensor) -> Tensor:
    """What the neighbours vote for, per level: their labels (n, k, levels), nearest first -> (n, levels)."""
    return torch.stack([vote(column) for column in neighbours.unbind(2)], dim=1)


def knn_accuracy(
    queries: Tensor, labels: Tensor, bank: Tensor | None = None, bank_labels: Tensor | None = None, k: int = K
) -> list[float]:
    """Share of the queries whose neighbours vote for their own label, per level. Arguments as of `knn_predict`."""
    return (knn_predict(queries, labels, bank, bank_labels, k) == labels).float().mean(0).tolist()


def macro_accuracy(predicted: Tensor, labels: Tensor) -> list[float]:
    """Mean over the classes of the share of their cells that is right, per level; both (n, levels) int64.

    Every class counts the same, however many cells it has; scikit-learn's balanced accuracy, without its warning for
    a predicted class that no cell has.
    """
    from sklearn.metrics import recall_score  # only here: 3 s that training can do without

    columns = zip(labels.cpu().numpy().T, predicted.cpu().numpy().T, strict=True)
    return [float(recall_score(own, guess, labels=np.unique(own), average="macro")) for own, guess in columns]


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of (n,) values of which few differ, such as right and wrong.

    How often each value is drawn in a resample is multinomial, so no resample is written out.
    """
    found, counts = np.unique(values, return_counts=True)
    n = len(values)
    means = np.random.default_rng(0).multinomial(n, counts / n, size=10_000) @ found / n
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def neighbourhood_purity(vectors: Tensor, labels: Tensor, wide: int = 50) -> tuple[list[float], float]:
    """What a neighbourhood shows: labels (n, levels), the last level the finest.

    -> per level the share of the 5 nearest other cells that have a cell's own label, and how many labels of the
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
    classes, own = labels.cpu().unique(return_inverse=True)
    if len(classes) < 2:
        return None
    x = normalize(vectors.cpu().double(), dim=1)
    size = own.bincount()
    sums = torch.zeros(len(classes), x.shape[1], dtype=x.dtype).index_add_(0, own, x)
    distance = size - x @ sums.T  # (n, classes), summed over the members of a class
    inside = distance.gather(1, own[:, None])[:, 0] / (size[own] - 1).clamp(min=1)
    outside = (distance / size).scatter(1, own[:, None], torch.inf).min(1).values
    width = (outside - inside) / torch.maximum(inside, outside).clamp(min=1e-12)
    return width.where(size[own] > 1, 0.0).mean().item()  # a class of one cell has 0, by definition


def steerability(top_prefix: float, top_full: float, leaf_full: float, leaf_prefix: float) -> float:
    """S = (top level at prefix 1 - at full) + (leaf level at full - at prefix 1), in accuracies.

    Large when the first block knows the top level and only the whole vector knows the leaf. It rewards destroying
    information, so read it beside the accuracies.
    """
    return (top_prefix - top_full) + (leaf_full - leaf_prefix)
