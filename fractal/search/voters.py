"""The votes of all cells of an index, in place of those of a reference's (at most some 50,000) cells."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fractal.annotate.annotator import COPIES, NEIGHBOURS
from fractal.annotate.bundle import Bundle, calibration_of
from fractal.base.errors import InputError
from fractal.data.parquet import level_columns
from fractal.search.index import Index, open_index

LISTS = 32  # opened per cell: of 7.9 million cells, 16 give another answer than all lists to 12 in 1,000, 64 to 4


@dataclass(frozen=True)
class IndexVoters:
    """The cells of an index with a path; see `fractal.annotate.annotator.Voters`."""

    index: Index
    path: np.ndarray  # (len(index),) int32, -1 of a cell without a vote

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
        check_enough(path, self.index)
        return replace(self, path=path)


def check_enough(path: np.ndarray, index: Index) -> None:
    voting = int((path >= 0).sum())
    if voting < NEIGHBOURS + COPIES:
        raise InputError(
            f"{index.folder.path}: {voting} of its cells may vote, too few (it takes {NEIGHBOURS + COPIES})"
        )


def with_index(bundle: Bundle, index: Index | str | Path, labels: str | None = None) -> Bundle:
    """A reference whose votes are those of an index's cells, calibrated anew with these.

    labels: a column of the index with the reference's finest labels (default: the columns of its levels, as ingest.py
    writes them). Cells on a path that the reference does not have do not vote. Votes of eight million cells in their
    natural mix are not those of 50,000 balanced ones, so the validation cells are asked again; where one is in the
    index itself, it does not vote for itself. Raises InputError for vectors of another adapter, and for labels of
    another hierarchy.
    """
    index = index if isinstance(index, Index) else open_index(index)
    if not index.space.adapters:
        raise InputError(f"{index.folder.path}: its vectors were made by no adapter; make it with --reference")
    index.check_adapter([bundle.sha256], "the reference")
    path = paths_of(index, bundle, labels)
    told = replace(bundle, voters=IndexVoters(index, path))
    return replace(told, calibration=calibration_of(told))


def paths_of(index: Index, bundle: Bundle, labels: str | None) -> np.ndarray:
    """The path of each cell in the reference's tree, (len(index),) int32, -1 where it has none."""
    where, tree = index.folder.path, bundle.tree
    if labels is None:
        columns = level_columns(pa.schema(index.types))
        levels = tuple(name.split("_", 1)[1] for name in columns)
        if levels != bundle.levels:
            has = f"the levels {', '.join(levels)}" if levels else "no columns of levels"
            raise InputError(
                f"{where}: has {has}, and the reference {', '.join(bundle.levels)}; name the column of its labels with "
                "--index-labels, or index the output of ingest.py"
            )
        steps = [(name, [path[k] for path in tree.paths], tree.nodes[:, k]) for k, name in enumerate(columns)]
    elif labels in index.columns:
        steps = [(labels, [path[-1] for path in tree.paths], tree.nodes[:, -1])]
    else:
        raise InputError(f"{where}: has no column '{labels}'; it has {', '.join(index.columns) or 'none'}")
    above, node = np.zeros(len(tree.paths), np.int64), np.zeros(len(index), np.int32)  # the root
    for column, names, below in steps:
        found = np.full(len(index), -1, np.int32)
        for values, codes, cells in index.coded(column):
            place = {value: i for i, value in enumerate(values)}
            children = np.full((above.max() + 2, len(values) + 1), -1, np.int32)  # the last row and column: of none
            for name, parent, child in zip(names, above, below, strict=True):
                if name in place:
                    children[parent, place[name]] = child
            found[cells] = children[node[cells], codes]
        above, node = below, found
    voting = int((node >= 0).sum())
    if voting < len(node) / 2:
        raise InputError(
            f"{where}: its labels are of another hierarchy than the reference's, which knows those of {voting:,} of "
            f"{len(node):,} cells"
        )
    path = np.append(tree.nodes[:, -1].argsort(), -1).astype(np.int32)[node]
    check_enough(path, index)
    return path
