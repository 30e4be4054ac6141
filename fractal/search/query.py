"""The queries of a search: cells, or groups of cells, each by several representatives."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fractal.base.errors import InputError
from fractal.data.cells import names_of
from fractal.data.labels import coded
from fractal.search.build import kmeans, nearest_centre
from fractal.search.index import Hits, Index, best_of
from fractal.search.source import Source

CHUNK = 4_096  # queries at a time
REPRESENTATIVES = 8  # of a group
SAMPLE = 1_000  # cells of a group that are kept to find them; 512 kB of 128-d vectors


def search(
    source: Source, index: Index, k: int, group_by: str | None = None, **options: Any
) -> Iterator[tuple[list[str], Hits]]:
    """Yield the names of queries and their hits: of the source's cells, chunk by chunk, or of its groups, at once.

    Parameters
    ----------
    source : whose vectors lie in the space of the index
    index, k, options : see `Index.search`
    group_by : str, default none; a column of the source. A group has up to 8 representatives, centres of k-means: the
        mean of unlike cells is like neither. Each gives as many of the k hits as its cluster has of the group's cells.

    Raises
    ------
    InputError : for a column that is missing, or in which no cell has a group.
    """
    if group_by is not None:
        samples = sample_groups(source, group_by)
        yield list(samples), Hits.concat([group_hits(cells, index, k, **options) for cells in samples.values()])
        return
    start = 0
    for table, vectors in source.chunks(CHUNK):
        names = names_of(table)
        named = list(map(str, range(start, start + len(vectors)) if names is None else names))
        yield named, index.search(vectors, k, **options)
        start += len(vectors)


def sample_groups(source: Source, column: str) -> dict[str, np.ndarray]:
    """Up to 1,000 cells of each group, drawn at random -> their vectors (m, dim) float32 of length 1, groups sorted."""
    path, columns = source.cells.path, source.cells.column_names
    if column not in columns:
        raise InputError(f"{path}: has no column '{column}' to group by; it has {', '.join(columns) or 'none'}")
    rng, samples = np.random.default_rng(0), dict[str, tuple[np.ndarray, np.ndarray]]()
    for table, vectors in source.chunks(CHUNK):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        key = rng.random(len(unit))  # the cells with the smallest keys are a random sample
        codes, names = coded(table[column])
        for code, name in enumerate(names):
            keys, cells = samples.get(name, (np.empty(0), np.empty((0, unit.shape[1]), np.float32)))
            keys, cells = np.append(keys, key[codes == code]), np.concatenate([cells, unit[codes == code]])
            kept = np.argsort(keys)[:SAMPLE]
            samples[name] = keys[kept], cells[kept]
    if not samples:
        raise InputError(f"{path}: no cell has a group; name another column")
    return {name: samples[name][1] for name in sorted(samples)}


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
