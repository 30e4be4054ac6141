"""The queries of a search: cells, or groups of cells, each by several representatives."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fractal.base.errors import InputError
from fractal.data.cells import names_of
from fractal.hierarchy.names import clean, is_missing
from fractal.search.build import kmeans, nearest_centre
from fractal.search.filters import mask_of
from fractal.search.index import Hits, Index, best_of, open_index
from fractal.search.source import Source

if TYPE_CHECKING:
    from pandas import DataFrame

REPRESENTATIVES = 8  # of a group
SAMPLE = 1_000  # cells of a group that are kept to find them; 512 kB of 128-d vectors

Queries = Iterator[tuple[list[str], Hits]]  # names of queries, and their hits


def search_cells(source: Source, index: Index, k: int, **options: Any) -> Queries:
    """The hits of a file's cells, 4,096 at a time. options: of `Index.search`."""
    start = 0
    for table, vectors in source.chunks(4_096):
        names = names_of(table)
        named = list(map(str, range(start, start + len(vectors)) if names is None else names))
        yield named, index.search(vectors, k, **options)
        start += len(vectors)


def search_groups(
    chunks: Iterable[tuple[np.ndarray, Sequence[Any]]], where: str, index: Index, k: int, **options: Any
) -> tuple[list[str], Hits]:
    """The hits of groups of cells.

    A group has up to 8 representatives, centres of k-means: the mean of unlike cells is like neither. Each gives as
    many of the k hits as its cluster has of the group's cells.

    Parameters
    ----------
    chunks : of vectors (m, dim) and the groups of their cells (m,); cells without a group are left out
    where : str, what messages call the cells
    index, k, options : see `Index.search`

    Returns the groups, sorted, and their hits. Raises InputError where no cell has a group.
    """
    rng, samples = np.random.default_rng(0), dict[str, tuple[np.ndarray, np.ndarray]]()  # keys and cells of each group
    for vectors, groups in chunks:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        key = rng.random(len(unit))  # the cells with the smallest keys are a random sample
        group = np.array(["" if is_missing(str(g)) or g is None else clean(str(g)) for g in groups], object)
        for name in sorted(set(group) - {""}):
            keys, cells = samples.get(name, (np.empty(0), np.empty((0, unit.shape[1]), np.float32)))
            keys, cells = np.append(keys, key[group == name]), np.concatenate([cells, unit[group == name]])
            kept = np.argsort(keys)[:SAMPLE]
            samples[name] = keys[kept], cells[kept]
    if not samples:
        raise InputError(f"{where}: no cell has a group; name another column")
    names = sorted(samples)
    return names, Hits.concat([group_hits(samples[name][1], index, k, **options) for name in names])


def group_hits(cells: np.ndarray, index: Index, k: int, **options: Any) -> Hits:
    """Cells (n, dim) of one group -> its k hits, as of one query."""
    centres = cells if len(cells) <= REPRESENTATIVES else kmeans(cells, REPRESENTATIVES, seed=0, least=1)
    size = np.bincount(nearest_centre(cells, centres), minlength=len(centres))
    hits = index.search(centres, k, **options)
    share = np.diff(np.round(np.cumsum(size) / size.sum() * k).astype(int), prepend=0)
    chosen, similarity = np.empty(0, np.int64), np.empty(0, np.float32)
    for row, n in zip(range(len(centres)), share, strict=True):
        new = np.flatnonzero((hits.cells[row] >= 0) & ~np.isin(hits.cells[row], chosen))[:n]
        chosen, similarity = np.append(chosen, hits.cells[row, new]), np.append(similarity, hits.similarity[row, new])
    return best_of([(chosen[None], similarity[None])], k)


def search_file(source: Source, group_by: str | None, index: Index, k: int, **options: Any) -> Queries:
    """The hits of a file's cells, chunk by chunk, or of its groups at once. Raises InputError for a missing column."""
    if group_by is None:
        yield from search_cells(source, index, k, **options)
        return
    path, columns = source.cells.path, source.cells.column_names
    if group_by not in columns:
        raise InputError(f"{path}: has no column '{group_by}' to group by; it has {', '.join(columns) or 'none'}")
    chunks = ((vectors, table[group_by].to_pylist()) for table, vectors in source.chunks(65_536))
    yield search_groups(chunks, str(path), index, k, **options)


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
    groups : n values, default none; the group of each cell: the queries are the groups then
    k, prefix : see `Index.search`
    where, only : see `fractal.search.filters`
    columns : str, default all; of the hits

    Raises
    ------
    InputError : for an index of another adapter, and for filters and columns that don't fit it.
    """
    index = index if isinstance(index, Index) else open_index(index)
    index.check_adapter([adapter], "the reference")
    options: dict[str, Any] = {"prefix": prefix, "keep": mask_of(index, where, only)}
    if groups is not None:
        names, hits = search_groups([(vectors, groups)], "obs", index, k, **options)
    else:
        hits = index.search(vectors, k, **options)
    return index.table(hits, names, columns).to_pandas()
