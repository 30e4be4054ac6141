"""Questions to an index: cells of a file or an AnnData, or the means of their groups."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fractal.base.cli import InputError
from fractal.data.parquet import CELL_ID
from fractal.data.vectors import usable
from fractal.hierarchy.names import clean, is_missing
from fractal.hierarchy.ontology import CL_SLIM
from fractal.model.embedding import embed_matrix
from fractal.search import filters
from fractal.search.index import Index, open_index
from fractal.search.source import Opened

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

    from fractal.reference import Reference


class Means:
    """The mean of the unit vectors of each group; cells without a group are left out."""

    def __init__(self, dim: int) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.dim = dim

    def add(self, vectors: np.ndarray, groups: Sequence[Any]) -> None:
        """vectors (m, dim), the group of each (m,)."""
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        text = np.array(["" if is_missing(str(g)) or g is None else clean(str(g)) for g in groups], object)
        for name in sorted(set(text) - {""}):
            self.sums[name] = self.sums.get(name, np.zeros(self.dim)) + unit[text == name].sum(0, dtype=np.float64)

    def found(self, where: str) -> tuple[list[str], np.ndarray]:
        """-> the groups, sorted, and their means (groups, dim) float32. Raises InputError where there are none."""
        if not self.sums:
            raise InputError(f"{where}: no cell has a group; name another column")
        names = sorted(self.sums)
        return names, np.stack([self.sums[name] for name in names]).astype(np.float32)


def mask(index: Index, where: str | None, only: Sequence[str], obo: str | Path = CL_SLIM) -> np.ndarray | None:
    """What the filters leave, (len(index),) bool; None without filters. Raises InputError where that is nothing."""
    masks = [filters.where(index, where)] if where else []
    masks += [filters.only(index, only, obo)] if only else []
    if not masks:
        return None
    keep = np.logical_and.reduce(masks)
    if not keep.any():
        raise InputError(f"{index.folder.path}: no cell passes the filter; ask for more")
    return keep


def questions(opened: Opened, group_by: str | None, size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """The queries of a file, as (names, vectors (m, dim) float32): its cells, chunk by chunk, or its groups at once."""
    means = Means(opened.space.dim)
    start = 0
    for table, vectors in opened.chunks(size):
        if group_by is None:
            ids = table[CELL_ID].to_pylist() if CELL_ID in table.column_names else range(start, start + len(vectors))
            yield [str(name) for name in ids], vectors
        else:
            means.add(vectors, group_column(table, group_by, opened.source.path).to_pylist())
        start += len(vectors)
    if group_by is not None:
        yield means.found(str(opened.source.path))


def group_column(table: pa.Table, name: str, path: object) -> pa.ChunkedArray:
    if name not in table.column_names:
        there = ", ".join(n for n in table.column_names if n != CELL_ID) or "none"
        raise InputError(f"{path}: has no column '{name}' to group by; it has {there}")
    return table[name]


def search_anndata(
    reference: "Reference",
    adata: "AnnData",
    index: Index | str | Path,
    k: int = 10,
    *,
    prefix: int | None = None,
    where: str | None = None,
    only: Sequence[str] = (),
    group_by: str | None = None,
    columns: Sequence[str] | None = None,
    use_rep: str | None = None,
    force: bool = False,
) -> "DataFrame":
    """What `Reference.search` does; see there."""
    index = index if isinstance(index, Index) else open_index(index)
    index.check_adapter([reference.sha256], "the reference")
    vectors = reference.vectors_of(adata, use_rep, force)[0]
    if not usable(vectors).all():
        raise InputError(f"the vector of cell {int((~usable(vectors)).argmax())} is zero or not finite; leave it out")
    embedded, names = embed_matrix(reference.bundle.adapter, vectors)[0], adata.obs_names.astype(str).tolist()
    if group_by is not None:
        if group_by not in adata.obs:
            raise InputError(f"obs has no column '{group_by}'; it has {', '.join(map(str, adata.obs))}")
        means = Means(embedded.shape[1])
        means.add(embedded, adata.obs[group_by].tolist())
        names, embedded = means.found(f"obs '{group_by}'")
    hits = index.search(embedded, k, prefix, mask(index, where, only))
    return index.table(hits, names, columns).to_pandas()
