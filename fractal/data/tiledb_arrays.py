"""Vectors and columns of TileDB, read a piece at a time: SCimilarity's cellsearch, and experiments of TileDB-SOMA.

    cellsearch/cell_embedding       dense, cells x dims, one attribute
    cellsearch/cell_metadata        the cells' columns: a frame with as many rows
    experiment/obs                  a frame by soma_joinid, as in CELLxGENE's census
    experiment/ms/NAME/obsm/KEY     numbers by soma_dim_0, the cell's soma_joinid, and soma_dim_1

An array may also be given by itself. SOMA is a layout of TileDB's arrays and groups, so `tiledb` reads it as well.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.base.errors import InputError, needs
from fractal.base.storage import Location, tiledb_config
from fractal.data.parquet import CELL_ID

EMBEDDING, METADATA = "cell_embedding", "cell_metadata"
IDS = (CELL_ID, "obs_names", "obs_id", "index", "soma_joinid")  # columns with the cells' names, best first
IDS_PIECE = 1 << 20  # cells whose numbers are read at once
# Shape (cells, dims), dtype, rows -> vectors, rows -> columns where there is a frame.
Arrays = tuple[tuple[int, int], np.dtype, Callable[[slice], np.ndarray], Callable[[slice], pa.Table] | None]


@contextmanager
def open_tiledb(path: Location, key: str) -> Iterator[Arrays]:
    """An array or a folder as above; `key` is the name of an experiment's vectors in obsm.

    Raises InputError for anything else, and while its chunks are read as well.
    """
    tiledb = needs("tiledb", "tiledb")
    context = tiledb.Ctx(tiledb_config(path))
    try:
        with ExitStack() as stack:
            vectors, frame = find_arrays(tiledb, context, path, key)
            arrays = [stack.enter_context(tiledb.open(uri, ctx=context)) for uri in (vectors, frame) if uri]
            yield read_arrays(path, *arrays)
    except tiledb.TileDBError as error:
        raise InputError(f"{path}: not a TileDB array, or damaged ({error})") from error


def find_arrays(tiledb: Any, context: Any, path: Location, key: str) -> tuple[str, str | None]:
    """-> URIs of the vectors and of the frame, None where there is none."""

    def is_a(kind: str, place: Location) -> bool:  # as text without a URI's options: these are in the context
        return tiledb.object_type(str(place), ctx=context) == kind

    if is_a("group", path):
        return find_in_experiment(tiledb, context, path, key)
    vectors = path / EMBEDDING if is_a("array", path / EMBEDDING) else path
    frame = vectors.parent / METADATA
    return str(vectors), str(frame) if vectors.name == EMBEDDING and is_a("array", frame) else None


def find_in_experiment(tiledb: Any, context: Any, path: Location, key: str) -> tuple[str, str]:
    def members(uri: str) -> dict[str, str]:
        with tiledb.Group(uri, ctx=context) as group:
            return {str(member.name): str(member.uri) for member in group}

    top = members(str(path))
    if not {"obs", "ms"} <= set(top):
        raise InputError(f"{path}: a TileDB group, and no SOMA experiment; it has {', '.join(top)}: name one in it")
    uris: dict[str, list[str]] = {}
    for measurement in members(top["ms"]).values():
        inside = members(measurement)
        for name, uri in (members(inside["obsm"]) if "obsm" in inside else {}).items():
            uris.setdefault(name, []).append(uri)
    if key not in uris:
        way = f"it has {', '.join(uris)}: name one with --use-rep" if uris else "it has none; add the cells' vectors"
        raise InputError(f"{path}: has no obsm '{key}'; {way}")
    if len(uris[key]) > 1:
        raise InputError(f"{path}: {len(uris[key])} measurements have an obsm '{key}'; name one array: {uris[key][0]}")
    return uris[key][0], top["obs"]


def read_arrays(path: Location, vectors: Any, frame: Any = None) -> Arrays:
    """An open array of vectors, with the columns of an open frame."""
    if vectors.schema.nattr != 1 or vectors.schema.ndim != 2:
        raise InputError(f"{path}: not a TileDB array of cells x dims with one attribute, such as {EMBEDDING}")
    ids = numbers(frame) if frame is not None and frame.schema.sparse else None
    end = vectors.nonempty_domain()
    shape = (0, 0) if end is None else (int(end[0][1]) + 1, int(end[1][1]) + 1)
    if not vectors.schema.sparse:
        shape = (shape[0], int(vectors.shape[1]))
    if ids is not None:
        shape = (len(ids), shape[1])
    read = partial(sparse_rows if vectors.schema.sparse else dense_rows, vectors, ids, shape[1])
    return shape, vectors.attr(0).dtype, read, None if frame is None else columns_of(path, shape[0], frame, ids)


def numbers(frame: Any) -> np.ndarray:
    """The cells' numbers in a sparse frame, its one dimension: (n,) int64, ascending."""
    if frame.schema.ndim != 1 or (end := frame.nonempty_domain()) is None:
        raise InputError(f"{frame.uri}: not a frame with one row per cell")
    name, (low, high) = frame.schema.domain.dim(0).name, map(int, end[0])
    query = frame.query(attrs=[], dims=[name])
    pieces = [query.multi_index[at : min(at + IDS_PIECE - 1, high)][name] for at in range(low, high + 1, IDS_PIECE)]
    return np.sort(np.concatenate(pieces).astype(np.int64))


def dense_rows(array: Any, ids: np.ndarray | None, dim: int, batch: slice) -> np.ndarray:
    """(m, dim)."""
    if ids is not None:
        first, rows = int(ids[batch][0]), ids[batch]
        return dense_rows(array, None, dim, slice(first, int(rows[-1]) + 1))[rows - first]
    values = array[batch]
    return values[array.attr(0).name] if isinstance(values, Mapping) else values  # without a name it comes bare


def sparse_rows(array: Any, ids: np.ndarray | None, dim: int, batch: slice) -> np.ndarray:
    """(m, dim), 0 where nothing is stored."""
    rows = np.arange(batch.start, batch.stop) if ids is None else ids[batch]
    values = array.multi_index[int(rows[0]) : int(rows[-1]), :]
    row, column = (values[array.schema.domain.dim(k).name] for k in range(2))
    position = np.minimum(np.searchsorted(rows, row), len(rows) - 1)
    wanted = rows[position] == row
    vectors = np.zeros((len(rows), dim), array.attr(0).dtype)
    vectors[position[wanted], column[wanted]] = values[array.attr(0).name][wanted]
    return vectors


def columns_of(path: Location, num_rows: int, frame: Any, ids: np.ndarray | None) -> Callable[[slice], pa.Table]:
    """-> a function rows -> the frame's columns. Raises InputError for another number of rows."""
    if ids is None:
        end = frame.nonempty_domain()
        rows = 0 if end is None else int(end[0][1]) + 1
        if rows != num_rows:
            raise InputError(f"{path}: {num_rows:,} vectors, and {METADATA} beside it has {rows:,} rows")

    def columns(batch: slice) -> pa.Table:
        first, last = (batch.start, batch.stop - 1) if ids is None else map(int, ids[[batch.start, batch.stop - 1]])
        table = frame.query(return_arrow=True).df[first:last]
        if len(table) != batch.stop - batch.start:
            raise InputError(
                f"{path}: damaged, rows {batch.start:,} to {batch.stop:,} of its columns are not all there"
            )
        return plain(table, frame)

    return columns


def plain(table: pa.Table, frame: Any) -> pa.Table:
    """The cells' names first, as text; booleans as such, which TileDB gives as numbers; no marks of pandas."""
    name = next((name for name in IDS if name in table.column_names), None)
    arrays: dict[str, pa.ChunkedArray] = {} if name is None else {CELL_ID: table[name].cast(pa.string())}
    for other in table.column_names:
        if other not in (name, "__tiledb_rows"):
            is_bool = frame.schema.has_attr(other) and frame.attr(other).dtype == np.bool_
            kind = pa.bool_() if is_bool else pa.string() if pa.types.is_large_string(table[other].type) else None
            arrays[other] = table[other] if kind is None else table[other].cast(kind)
    return pa.table(arrays)
