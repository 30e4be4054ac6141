"""What the nearest reference cells say of new cells, and how unlike all types these are.

A cell's 30 nearest reference cells, by cosine of the full fractal vectors, vote for their path of the hierarchy. From
the coarsest level down, each level takes the label with most votes under the label above it, so the labels of an
answer always lie on one path.

Votes say nothing about types that the reference lacks: such a cell still has 30 nearest. Three signals speak for a cell
of an unknown type: a large Mahalanobis distance of its input vector from the predicted type's mean, under the
covariance that all types share (Lee et al. 2018); a small largest logit of the adapter's perceptron (Hendrycks et al.
2022); and a small largest probability of a path (Hendrycks and Gimpel 2017), which the adapter's class means have a say
in.
"""

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from fractal.annotate.neighbours import Neighbours
from fractal.hierarchy.tree import Tree
from fractal.model.adapter import Adapter, embed

NEIGHBOURS = 30
TEMPERATURE = 0.1  # a vote weighs exp(cosine / TEMPERATURE): 5 near cells of a rare type outweigh 25 far ones
COPIES, SAME = 5, 0.9995  # neighbours that may be copies of a cell, float16: their cosine is above SAME
SIGNALS = "Mahalanobis distance", "-largest logit", "-log of the largest probability"  # large in unknown types
BATCH = 65_536  # cells at a time: the more, the more of them share a list of neighbours
PIECE = 4_096  # of these, through the adapter and through the votes, 7 MB for 203 paths, which stay in the cache


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


class Voting:
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
