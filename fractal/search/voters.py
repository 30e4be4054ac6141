"""The votes of all cells of an index, in place of those of a reference's (at most some 50,000) cells."""

from dataclasses import dataclass, replace
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fractal.base.errors import InputError
from fractal.data.parquet import level_columns
from fractal.hierarchy.tree import Labels, Tree
from fractal.search.index import Index, open_index

LISTS = 32  # opened per cell at most: of 7.9 million cells, 16 answer 12 in 1,000 otherwise than all lists, 64 4
REACH = 1.7  # see `Index.search`: 12 lists in the mean, with the answer of all 32 for .9995 of 6,000 cells


@dataclass(frozen=True)
class IndexVoters:
    """The cells of an index with a path; see `fractal.annotate.votes.Voters`. Raises InputError for too few."""

    index: Index
    path: np.ndarray  # (len(index),) int32, -1 of a cell without a vote
    least: int  # how many must vote

    def __post_init__(self) -> None:
        if (voting := int((self.path >= 0).sum())) < self.least:
            where = self.index.folder.path
            raise InputError(f"{where}: {voting} of its cells may vote, too few (it takes {self.least})")

    def __str__(self) -> str:
        return f"{int((self.path >= 0).sum()):,} of {len(self.path):,} cells of {self.index.folder.path}"

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        voting = self.path >= 0
        keep = None if voting.all() else voting
        hits = self.index.search(queries.cpu().numpy(), k, keep=keep, probes=LISTS, reach=REACH)
        return torch.from_numpy(hits.similarity), torch.from_numpy(np.maximum(hits.cells, 0))

    def restricted(self, keep: np.ndarray) -> "IndexVoters":
        """Only the cells on the paths of a mask (paths,)."""
        return replace(self, path=np.where(np.append(keep, False)[self.path], self.path, -1).astype(np.int32))


def index_voters(
    index: Index | str | Path,
    adapter: str,
    tree: Tree,
    graph: nx.DiGraph | None,
    labels: str | None = None,
    least: int = 1,
) -> IndexVoters:
    """The cells of an index as voters in place of a reference's.

    adapter: sha256 of the reference's. labels: a column of the index with the finest labels of the tree, also as the
    Cell Ontology `graph` knows them (default: the columns of its levels, as ingest.py writes them). Cells on a path
    that the tree does not have do not vote. Raises InputError for vectors of another adapter, labels of another
    hierarchy, and fewer voters than `least`.
    """
    index = index if isinstance(index, Index) else open_index(index)
    if not index.space.adapters:
        raise InputError(f"{index.folder.path}: its vectors were made by no adapter; make it with --reference")
    index.check_adapter([adapter], "the reference")
    return IndexVoters(index, paths_of(index, tree, graph, labels), least)


def paths_of(index: Index, tree: Tree, graph: nx.DiGraph | None, labels: str | None) -> np.ndarray:
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
    position: dict[Labels | None, int] = {path: i for i, path in enumerate(tree.paths)}
    paths = np.full(len(index), -1, np.int32)
    for coded in zip(*(index.coded(column) for column in columns), strict=True):
        names = [np.array([None, *values], object) for values, _, _ in coded]  # number 0: of a cell without a label
        shape = tuple(map(len, names))
        numbers = np.ravel_multi_index([codes + 1 for _, codes, _ in coded], shape)
        distinct, inverse = np.unique(numbers, return_inverse=True)
        by_level = [column[i] for column, i in zip(names, np.unravel_index(distinct, shape), strict=True)]
        # another spelling of a term, or another place of it, is the same type; labels of no ontology are their path
        meant = tree.find([name or "" for name in by_level[-1]], graph) if graph is not None else [None] * len(distinct)
        labelled = zip(zip(*by_level, strict=True), meant, strict=True)
        found = [number.get(path, position.get(other, -1)) for path, other in labelled]
        paths[coded[0][2]] = np.array(found, np.int32)[inverse]
    voting = int((paths >= 0).sum())
    if voting < len(paths) / 2:
        raise InputError(
            f"{where}: its labels are of another hierarchy than the reference's, which knows those of {voting:,} of "
            f"{len(paths):,} cells"
        )
    return paths
