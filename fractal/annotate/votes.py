"""What the nearest reference cells say of new cells, and how unlike all types these are.

A cell's 30 nearest reference cells, by cosine of the full fractal vectors, vote for their path of the hierarchy. From
the coarsest level down, each level takes the label with most votes under the label above it, so the labels of an
answer always lie on one path.

Votes say nothing about types that the reference lacks: such a cell still has 30 nearest. Three signals speak for a cell
of an unknown type: the 30th of them is far (Sun et al. 2022); so is the nearest type's mean (Lee et al. 2018); or no
type is likely (Hendrycks and Gimpel 2017), the latter two in axes that discount what differs between studies
(discriminant.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fractal.annotate.discriminant import Discriminant
from fractal.annotate.neighbours import Neighbours
from fractal.hierarchy.tree import Tree
from fractal.model.adapter import Adapter, embed

NEIGHBOURS = 30
TEMPERATURE = 0.1  # a vote weighs exp(cosine / TEMPERATURE): 5 near cells of a rare type outweigh 25 far ones
COPIES, SAME = 5, 0.9995  # neighbours that may be copies of a cell, float16: their cosine is above SAME
SIGNALS = "distance of the last neighbour", "distance of the nearest mean", "-log of the largest probability"
BATCH = 65_536  # cells at a time: the more, the more of them share a list of neighbours
PIECE = 2_048  # of these, through the adapter and through the votes, 4 MB each, which stay in the cache


class Rows:
    """A dataclass of arrays with a row per cell."""

    def __getitem__(self, rows: np.ndarray) -> Self:
        return type(self)(**{name: values[rows] for name, values in vars(self).items()})

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class Ballot(Rows):
    """The nearest reference cells of n cells, nearest first, and what speaks for an unknown type."""

    path: np.ndarray  # (n, k) int64 into the tree
    cosine: np.ndarray  # (n, k) float64, -inf where there is no k-th
    signals: np.ndarray  # (n, 3) float64, see `SIGNALS`: large in unknown types


@dataclass(frozen=True)
class Raw(Rows):
    """What the reference says of n cells, before calibration."""

    path: np.ndarray  # (n,) int64, a path that runs through all its labels
    votes: np.ndarray  # (n, levels) float64, the share of the votes for each label
    signals: np.ndarray  # (n, 3) float64, as in `Ballot`
    distance: np.ndarray  # (n,) cosine distance to the nearest reference cell, in the full fractal vector
    runner_up: np.ndarray  # (n,) int64, the path with most votes beside `path`; -1 where there is none
    runner_up_votes: np.ndarray  # (n,) float64, the share of its votes


class Voters(Protocol):
    """Labelled cells that may vote in place of the reference's; as text, how many they are and whence."""

    @property
    def path(self) -> np.ndarray: ...  # (m,) integers, see `Tree`; -1 of a cell without a vote

    # (n, dim), fractal vectors -> cosines (n, k), nearest first, -inf where there are fewer voters, and rows (n, k)
    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]: ...

    def restricted(self, keep: np.ndarray) -> "Voters": ...  # only those on the paths of a mask (paths,)


class Voting:
    """Holds the reference: vectors (m, dim) float32, their path (m,) int64 into `tree`, their study (m,), the adapter.

    One copy of the reference's fractal vectors stays in memory, 512 bytes a cell at 4 x 32, and 17 MB of lists. With
    `voters` these vote; the signals are still of the reference.
    """

    def __init__(
        self,
        adapter: Adapter,
        vectors: np.ndarray,
        path: np.ndarray,
        study: np.ndarray,
        tree: Tree,
        voters: Voters | None = None,
    ) -> None:
        self.adapter, self.tree, self.voters = adapter, tree, voters
        self.device = next(adapter.parameters()).device
        self.path = torch.from_numpy(path if voters is None else voters.path)
        self.neighbours = Neighbours(embed(adapter, torch.from_numpy(vectors).to(self.device))[-1])
        self.discriminant = Discriminant(vectors, path, study)

    def __call__(self, vectors: np.ndarray) -> Raw:
        """vectors (n, dim) float32, finite and not zero."""
        return Raw.join([count(ballot, self.tree) for ballot in self.ballots(vectors)])

    def ballot(self, vectors: np.ndarray, more: int = 0) -> Ballot:
        """All at once, 500 bytes a cell, and as many neighbours more."""
        return Ballot.join(list(self.ballots(vectors, more)))

    def ballots(self, vectors: np.ndarray, more: int = 0) -> Iterator[Ballot]:
        """Of BATCH cells at a time."""
        for start in range(0, max(len(vectors), 1), BATCH):
            x = vectors[start : start + BATCH]
            with torch.inference_mode():
                pieces = torch.from_numpy(x).split(PIECE)
                full = torch.cat([self.adapter.encode(piece.to(self.device)) for piece in pieces])
            cosine, rows = self.neighbours(full, min(NEIGHBOURS, len(self.neighbours.bank)))
            far = 1 - cosine[:, -1].cpu().double().numpy()
            if self.voters is not None:
                cosine, rows = self.voters(full, min(NEIGHBOURS + more, len(self.path)))
            path = self.path[rows.cpu()].long().numpy()
            signals = np.column_stack([far, self.discriminant(x)])
            yield Ballot(path, cosine.cpu().double().numpy(), signals)


def count(ballot: Ballot, tree: Tree) -> Raw:
    """The votes of each cell's neighbours."""
    nodes = torch.from_numpy(tree.nodes)
    votes = (torch.from_numpy(ballot.cosine) / TEMPERATURE).softmax(1)
    parts = []
    for voters, piece in zip(torch.from_numpy(ballot.path).split(PIECE), votes.split(PIECE), strict=True):
        path, share = descend(voters, piece, nodes)
        parts.append((path, share, *second(voters, piece, path, len(nodes))))
    paths, shares, *runner_up = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return Raw(paths, shares, ballot.signals, (1 - ballot.cosine[:, 0]).clip(0), *runner_up)


def second(path: Tensor, votes: Tensor, chosen: Tensor, num_paths: int) -> tuple[Tensor, Tensor]:
    """Votes (n, k) for paths (n, k), and the path (n,) that each cell gets -> of the others that with most votes (n,),
    -1 where all votes are for one path, and the share of its votes (n,).
    """
    sums = votes.new_zeros(len(votes), num_paths).scatter_add_(1, path.clamp(min=0), votes)
    share, other = sums.scatter_(1, chosen[:, None], 0.0).max(1)
    return torch.where(share > 0, other, -1), share


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
