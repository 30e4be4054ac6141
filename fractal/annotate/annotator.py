"""Labels for new cells: the votes of their nearest reference cells, calibrated, and as deep as they can be trusted.

A cell's 30 nearest reference cells, by cosine of the full fractal vectors, vote for their path of the hierarchy. From
the coarsest level down, each level takes the label with most votes under the label above it, so the labels of an
answer always lie on one path. Held-out reference cells tell how often a label with so many votes is right (isotonic
regression, Zadrozny and Elkan 2002): that is the probability. The answer stops above the first level whose probability
is below the confidence asked for.

Votes say nothing about types that the reference lacks: such a cell still has 30 nearest. Three signals speak for a cell
of an unknown type: a large Mahalanobis distance of its input vector from the predicted type's mean, under the
covariance that all types share (Lee et al. 2018); a small largest logit of the adapter's perceptron (Hendrycks et al.
2022); and a small largest probability of a path (Hendrycks and Gimpel 2017), which the adapter's class means have a say
in. They become conformal p-values, joined as Fisher did into the `ood_score`; `p_value` is the share of held-out cells,
in the natural mix of types, whose score is as high or higher.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from fractal.annotate.neighbours import Neighbours
from fractal.model.adapter import Adapter, embed

# NOVEL and CAUTION are shares of ordinary cells, which is what a p-value promises, and were tuned on no cells: 3 % of
# those that are like the held-out cells are flagged, and 5 % lose their fine labels.
NEIGHBOURS = 30
TEMPERATURE = 0.1  # a vote weighs exp(cosine / TEMPERATURE): 5 near cells of a rare type outweigh 25 far ones
COPIES, SAME = 5, 0.9995  # neighbours that may be copies of a cell, float16: their cosine is above SAME
NOVEL = 0.03  # p-value below this: the cell is flagged
CAUTION = 0.05  # p-value below this: no label below the second level
CAUTIOUS_DEPTH = 2
SIGNALS = "Mahalanobis distance", "-largest logit", "-log of the largest probability"  # large in unknown types
BATCH = 65_536  # cells asked at a time: the more, the more of them share a list of neighbours
PIECE = 4_096  # of these, through the adapter and through the votes, 7 MB for 203 paths, which stay in the cache


@dataclass(frozen=True)
class Tree:
    """The hierarchy as codes: one row per path, from the coarsest level to the finest."""

    paths: list[tuple[str, ...]]  # (P,) names
    nodes: np.ndarray  # (P, levels) int64: the node of each path at each level; two may share a name, not a parent

    @staticmethod
    def of(paths: Sequence[tuple[str, ...]]) -> "Tree":
        levels = range(1, len(paths[0]) + 1)
        position = [{p: i for i, p in enumerate(sorted({path[:k] for path in paths}))} for k in levels]
        nodes = [[position[k - 1][path[:k]] for k in levels] for path in paths]
        return Tree([tuple(path) for path in paths], np.array(nodes))


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


@dataclass(frozen=True)
class Raw:
    """What the reference says of n cells, before calibration."""

    path: np.ndarray  # (n,) int64, a path that runs through all its labels
    votes: np.ndarray  # (n, levels) float64, the share of the votes for each label
    signals: np.ndarray  # (n, 3) float64, see `SIGNALS`
    distance: np.ndarray  # (n,) cosine distance to the nearest reference cell, in the full fractal vector


class Voters(Protocol):
    """Labelled cells that may vote in place of the reference's; as text, how many they are and whence."""

    @property
    def path(self) -> np.ndarray:
        """(m,) integers, see `Tree`; -1 of a cell without a vote."""
        ...

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(n, dim), fractal vectors -> cosines (n, k), nearest first, and rows (n, k) int64 of k voters each.

        Where there are fewer, the others have the cosine -inf.
        """
        ...

    def restricted(self, keep: np.ndarray) -> "Voters":
        """Only those on the paths of a mask (paths,)."""
        ...


class Annotator:
    """Holds the reference: vectors (m, dim) float32, their path (m,) int64 into `tree`, and the adapter.

    One copy of the reference's fractal vectors stays in memory, 512 bytes a cell at 4 x 32, and 17 MB of lists; with
    `voters` neither, and these vote.
    """

    def __init__(
        self, adapter: Adapter, vectors: np.ndarray, path: np.ndarray, tree: Tree, voters: Voters | None = None
    ) -> None:
        self.adapter, self.tree = adapter, tree
        self.device = next(adapter.parameters()).device
        self.nodes = torch.from_numpy(tree.nodes)
        self.path = torch.from_numpy(path if voters is None else voters.path)
        self.neighbours = voters or Neighbours(embed(adapter, torch.from_numpy(vectors).to(self.device))[-1])
        x = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float64)
        used, row = np.unique(path, return_inverse=True)
        means = np.stack([x[row == i].mean(0) for i in range(len(used))])
        covariance = ledoit_wolf(x - means[row], assume_centered=True)[0]
        self.whiten = np.linalg.cholesky(np.linalg.pinv(covariance, hermitian=True) + 1e-9 * np.eye(x.shape[1]))
        self.means = np.zeros((len(tree.paths), x.shape[1]))
        self.means[used] = means @ self.whiten

    def __call__(self, vectors: np.ndarray, skip_copies: bool = False) -> Raw:
        """vectors (n, dim) float32, finite and not zero. `skip_copies`: a voter that is the cell itself has no vote."""
        parts = [
            self.ask(vectors[start : start + BATCH], skip_copies) for start in range(0, max(len(vectors), 1), BATCH)
        ]
        return Raw(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Raw)))

    def ask(self, vectors: np.ndarray, skip_copies: bool) -> Raw:
        fulls, surest = [], []
        with torch.inference_mode():
            for x in torch.from_numpy(vectors).split(PIECE):
                output = self.adapter(x.to(self.device))
                fulls.append(self.adapter.full(output.blocks))
                surest.append(torch.stack([output.logits.amax(1), output.probability.amax(1).log()], 1))
        k = min(NEIGHBOURS, len(self.path))
        cosine, found = self.neighbours(torch.cat(fulls), min(k + COPIES * skip_copies, len(self.path)))
        cosine, found = cosine.cpu().double(), found.cpu()  # Apple's MPS has no float64
        if skip_copies:
            cosine, column = cosine.masked_fill(cosine > SAME, -torch.inf).topk(k)
            found = found.gather(1, column)
        votes = zip(cosine.split(PIECE), found.split(PIECE), strict=True)
        said = [descend(self.path[rows].long(), (c / TEMPERATURE).softmax(1), self.nodes) for c, rows in votes]
        path, share = (torch.cat(parts).numpy() for parts in zip(*said, strict=True))
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float64)
        mahalanobis = np.linalg.norm(unit @ self.whiten - self.means[path], axis=1)
        signals = np.column_stack([mahalanobis, -torch.cat(surest).cpu().numpy()])
        return Raw(path, share, signals, (1 - cosine[:, 0]).clamp(min=0).numpy())


def descend(path: Tensor, votes: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Votes (n, k), of a sum of 1, for paths (n, k) int64; `Tree.nodes` (P, levels) -> a path (n,), and the share
    (n, levels) of its nodes.

    At every level the node with most votes among the children of the node above; the path is the last of these.
    """
    shares = []
    for level in nodes.T:
        node = level[path]
        sums = votes.new_zeros(len(votes), int(level.max()) + 1).scatter_add_(1, node, votes)
        share, best = sums.max(1)
        shares.append(share)
        votes = votes * (node == best[:, None])  # those elsewhere have no say in the levels below
    return nodes[:, -1].argsort()[best], torch.stack(shares, 1)


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


@dataclass(frozen=True)
class Answer:
    """n annotated cells. The labels of all levels are there, `depth` says how many can be trusted."""

    path: np.ndarray  # (n,) int64 into Tree.paths
    probability: np.ndarray  # (n, levels)
    confident_depth: np.ndarray  # (n,) 0 ... levels, as deep as the confidence allows
    depth: np.ndarray  # (n,) the same, less where the novelty rule withholds labels
    distance: np.ndarray  # (n,)
    ood_score: np.ndarray  # (n,)
    p_value: np.ndarray  # (n,)
    novel: np.ndarray  # (n,) bool: like nothing in the reference


NOVELTY = ("on", "flag", "off")


def answer(raw: Raw, calibration: Calibration, confidence: float = 0.8, novelty: str = "on") -> Answer:
    """Back off to the deepest level whose probability is at least `confidence`, and to the second level in odd cells.

    `novelty`: "on" flags odd cells and withholds their fine labels, "flag" only flags them, "off" does neither.
    """
    probability = calibration.probability(raw.votes)
    ood_score = calibration.score(raw.signals)
    p_value = calibration.p_value(ood_score)
    confident, depth = depths(probability, p_value, confidence, novelty)
    novel = (p_value < NOVEL) & (novelty != "off")
    return Answer(raw.path, probability, confident, depth, raw.distance, ood_score, p_value, novel)


def depths(
    probability: np.ndarray, p_value: np.ndarray, confidence: float, novelty: str
) -> tuple[np.ndarray, np.ndarray]:
    """probability (n, levels), p_value (n,) -> the depth that the confidence allows (n,), and less in odd cells."""
    confident = (probability >= confidence).sum(1)  # probabilities fall from level to level
    odd = (p_value < CAUTION) & (novelty == "on")
    return confident, np.where(odd, np.minimum(confident, CAUTIOUS_DEPTH), confident)


def majority(
    probability: np.ndarray, path: np.ndarray, groups: np.ndarray, tree: Tree
) -> tuple[np.ndarray, np.ndarray]:
    """One answer for all cells of a cluster: per level, down the tree, the label with most probability in it.

    probability (n, levels) and path (n,) of `Answer`, groups (n,) codes, -1 for cells without one, which keep theirs.
    A cell gives each of its labels that label's probability. -> path (n,), and probability (n, levels): of a label,
    the mean over the cluster of the probability that its cells gave it.
    """
    path, probability = path.copy(), probability.copy()
    for group in np.unique(groups[groups >= 0]):
        rows = np.flatnonzero(groups == group)
        allowed, mass = np.ones(len(tree.paths), bool), []
        for k, level in enumerate(tree.nodes.T):
            sums = np.bincount(level[path[rows]], probability[rows, k], minlength=level.max() + 1)
            sums[~np.isin(np.arange(len(sums)), level[allowed])] = -1.0
            chosen = int(sums.argmax())
            allowed &= level == chosen
            mass.append(sums[chosen] / len(rows))
        path[rows], probability[rows] = allowed.argmax(), np.minimum.accumulate(mass)
    return path, probability
