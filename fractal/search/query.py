"""The queries of a search: cells, or the means of their groups."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fractal.base.errors import InputError
from fractal.data.cells import names_of
from fractal.hierarchy.names import clean, is_missing
from fractal.search.filters import mask_of
from fractal.search.index import Index, open_index
from fractal.search.source import Source

if TYPE_CHECKING:
    from pandas import DataFrame


def means(chunks: Iterable[tuple[np.ndarray, Sequence[Any]]], where: str) -> tuple[list[str], np.ndarray]:
    """The mean of the unit vectors of each group; cells without a group are left out.

    chunks: vectors (m, dim) and the groups of their cells (m,) -> the groups, sorted, and means (groups, dim) float32.
    Raises InputError where there are none.
    """
    sums: dict[str, np.ndarray] = {}
    for vectors, groups in chunks:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        names = np.array(["" if is_missing(str(g)) or g is None else clean(str(g)) for g in groups], object)
        for name in sorted(set(names) - {""}):
            sums[name] = sums.get(name, 0) + unit[names == name].sum(0, dtype=np.float64)
    if not sums:
        raise InputError(f"{where}: no cell has a group; name another column")
    return sorted(sums), np.stack([sums[name] for name in sorted(sums)]).astype(np.float32)


def queries(source: Source, group_by: str | None, size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """The queries of a file, as (names, vectors (m, dim) float32): its cells, chunk by chunk, or its groups at once."""
    path = source.cells.path
    if group_by is not None:
        if group_by not in source.cells.column_names:
            there = ", ".join(source.cells.column_names) or "none"
            raise InputError(f"{path}: has no column '{group_by}' to group by; it has {there}")
        yield means(((vectors, table[group_by].to_pylist()) for table, vectors in source.chunks(size)), str(path))
        return
    start = 0
    for table, vectors in source.chunks(size):
        names = names_of(table)
        yield list(map(str, range(start, start + len(vectors)) if names is None else names)), vectors
        start += len(vectors)


def search_vectors(
    index: Index | str | Path,
    adapter: str,
    vectors: np.ndarray,
    names: Sequence[str],
    groups: Sequence[Any] | None = None,
    k: int = 10,
    *,
    prefix: int | None = None,
    where: str | None = None,
    only: Sequence[str] = (),
    columns: Sequence[str] | None = None,
) -> "DataFrame":
    """The nearest cells of an index -> a row per hit, as `Index.table`.

    Parameters
    ----------
    index : Index, or path of one
    adapter : str, sha256 of the one that made the vectors
    vectors : (n, dim) float32, fractal vectors
    names : n str, of the cells
    groups : n values, default none; the group of each cell: a query is the mean of one
    k, prefix : see `Index.search`
    where, only : see `fractal.search.filters`
    columns : str, default all; of the hits

    Raises
    ------
    InputError : for an index of another adapter, and for filters and columns that don't fit it.
    """
    index = index if isinstance(index, Index) else open_index(index)
    index.check_adapter([adapter], "the reference")
    if groups is not None:
        names, vectors = means([(vectors, groups)], "obs")
    hits = index.search(vectors, k, prefix, mask_of(index, where, only))
    return index.table(hits, names, columns).to_pandas()
