"""The votes of all cells of an index, in place of those of a reference's (at most some 50,000) cells."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fractal.base.errors import InputError
from fractal.data.parquet import level_columns
from fractal.hierarchy.tree import Tree
from fractal.search.index import Index, open_index

LISTS = 32  # opened per cell: of 7.9 million cells, 16 give another answer than all lists to 12 in 1,000, 64 to 4


@dataclass(frozen=True)
class IndexVoters:
    """The cells of an index with a path; see `fractal.annotate.votes.Voters`."""

    index: Index
    path: np.ndarray  # (len(index),) int32, -1 of a cell without a vote
    least: int  # how many must vote

    def __str__(self) -> str:
        return f"{int((self.path >= 0).sum()):,} of {len(self.path):,} cells of {self.index.folder.path}"

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See there."""
        voting = self.path >= 0
        hits = self.index.search(queries.cpu().numpy(), k, keep=None if voting.all() else voting, probes=LISTS)
        return torch.from_numpy(hits.similarity), torch.from_numpy(np.maximum(hits.cells, 0))

    def restricted(self, keep: np.ndarray) -> "IndexVoters":
        """Only the cells on the paths of a mask (paths,). Raises InputError where they are too few."""
        path = np.where(np.append(keep, False)[self.path], self.path, -1).astype(np.int32)
        check_enough(path, self.index, self.least)
        return replace(self, path=path)


def check_enough(path: np.ndarray, index: Index, least: int) -> None:
    voting = int((path >= 0).sum())
    if voting < least:
        raise InputError(f"{index.folder.path}: {voting} of its cells may vote, too few (it takes {least})")


def index_voters(
    index: Index | str | Path, adapter: str, tree: Tree, labels: str | None = None, least: int = 1
) -> IndexVoters:
    """The cells of an index as voters in place of a reference's.

    adapter: sha256 of the reference's. labels: a column of the index with the finest labels of the tree (default: the
    columns of its levels, as ingest.py writes them). Cells on a path that the tree does not have do not vote. Raises
    InputError for vectors of another adapter, labels of another hierarchy, and fewer voters than `least`.
    """
    index = index if isinstance(index, Index) else open_index(index)
    if not index.space.adapters:
        raise InputError(f"{index.folder.path}: its vectors were made by no adapter; make it with --reference")
    index.check_adapter([adapter], "the reference")
    path = paths_of(index, tree, labels)
    check_enough(path, index, least)
    return IndexVoters(index, path, least)


def paths_of(index: Index, tree: Tree, labels: str | None) -> np.ndarray:
    """The path of each cell in the reference's tree, (len(index),) int32, -1 where it has none."""
    where = index.folder.path
    if labels is None:
        columns = level_columns(pa.schema(index.types))
        levels = tuple(name.split("_", 1)[1] for name in columns)
        if levels != tree.levels:
            has = f"the levels {', '.join(levels)}" if levels else "no columns of levels"
            raise InputError(
                f"{where}: has {has}, and the reference {', '.join(tree.levels)}; name the column of its labels with "
                "--index-labels, or index the output of ingest.py"
            )
    else:
        columns = (labels,)
        index.check_columns(columns)
    number: dict[tuple[str | None, ...], int] = {path[-len(columns) :]: i for i, path in enumerate(tree.paths)}
    paths = np.full(len(index), -1, np.int32)
    for coded in zip(*(index.coded(column) for column in columns), strict=True):
        values, codes, cells = zip(*coded, strict=True)
        shape = [len(names) + 1 for names in values]  # code 0: of a cell without a label
        combined = np.ravel_multi_index([of + 1 for of in codes], shape)
        distinct, inverse = np.unique(combined, return_inverse=True)
        found = [
            number.get(tuple(names[i - 1] if i else None for names, i in zip(values, row, strict=True)), -1)
            for row in zip(*np.unravel_index(distinct, shape), strict=True)
        ]
        paths[cells[0]] = np.array(found, np.int32)[inverse]
    voting = int((paths >= 0).sum())
    if voting < len(paths) / 2:
        raise InputError(
            f"{where}: its labels are of another hierarchy than the reference's, which knows those of {voting:,} of "
            f"{len(paths):,} cells"
        )
    return paths
