"""Files of vectors, read and written a piece at a time.

Read are Parquet (an atlas, or any file or folder of files with a column `embedding`), a .npy matrix, an .h5ad or .zarr
of AnnData (fractal/data/h5ad.py), and TileDB (fractal/data/tiledb_arrays.py), all of them also at a URI
(fractal/base/storage.py). Parquet and .npy are written here. What is in a folder, and else the end of a name, says
what it is; where nothing else fits, it is Parquet.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from fractal.base.cli import InputError, reason
from fractal.base.files import atomic_stream
from fractal.base.storage import Place, Remote, asking, children, files_of, open_random, place
from fractal.data.h5ad import open_h5ad, read_h5ad
from fractal.data.parquet import (
    PARQUET,
    metadata_of,
    open_parquet,
    open_writer,
    read_vectors,
    row_groups,
    usable,
    vector_length,
)
from fractal.data.source import CELL_ID, CHUNK, Chunk, Source, check_format, from_matrix, refuse
from fractal.data.tiledb_arrays import EMBEDDING, read_tiledb

__all__ = ["CHUNK", "Source", "open_h5ad", "refuse", "usable"]  # what users of this module need beside it

READ = "Parquet with a column 'embedding', .npy, .h5ad, .zarr, and TileDB's arrays and SOMA experiments"
IDS = (CELL_ID, "obs_names", "index", "__index_level_0__")  # what the column of cell names is called, best first


def kind_of(path: str | Place) -> str:
    """What it is: "parquet", "npy", "h5ad", "zarr" (of AnnData), "soma" (a TileDB group), or "tiledb"."""
    path = place(path)
    suffix = path.suffix.casefold()
    if suffix not in (".h5ad", ".npy", ".parquet") and path.is_dir():
        names = children(path)
        if names & {"zarr.json", ".zgroup"}:
            return "zarr"
        if "__group" in names:
            return "soma"
        if names & {"__schema", "__array_schema.tdb", EMBEDDING}:
            return "tiledb"
        return "parquet" if any(file.suffix in PARQUET for file in files_of(path)) else "tiledb"
    return suffix[1:] if suffix in (".h5ad", ".npy", ".zarr") else "parquet"


def is_h5ad(path: str | Place) -> bool:
    return place(path).suffix.casefold() == ".h5ad"


def has_obs(path: str | Place) -> bool:
    """Whether it is an AnnData on disk, with an obs to read labels from."""
    return kind_of(path) in ("h5ad", "zarr")


def has_obsm(path: str | Place) -> bool:
    """Whether it may hold several vectors of a cell."""
    return kind_of(path) in ("h5ad", "zarr", "soma")


def read_parquet(path: Place, groups: Sequence[int] | None = None) -> Source:
    """An atlas, or any file with a column `embedding` of lists; a chunk lies within one row group (34 MB).

    The lists may be of fixed size or not, of 16, 32 or 64 bits, but all of one length. A column of cell names, as
    pandas writes an index, becomes `cell_id`. All other columns stay. groups: only these row groups, by number.
    Raises InputError for anything else.
    """
    file = open_parquet(path)
    some = range(file.num_row_groups) if groups is None else groups
    num_rows, schema = sum(file.metadata.row_group(i).num_rows for i in some), file.schema_arrow
    dim = vector_length(path)
    ids = next((name for name in IDS if name in schema.names), None)
    others = [name for name in schema.names if name not in ("embedding", ids)]
    fields = [pa.field(CELL_ID, pa.string())] if ids else []
    schema = pa.schema([*fields, *(schema.field(name) for name in others)], metadata=schema.metadata)

    def chunks(size: int) -> Iterator[Chunk]:
        for table in row_groups(path, size=size, groups=groups):
            vectors, columns = read_vectors(table, path), table.select(others)
            if vectors.shape[1] != dim:
                raise InputError(f"{path}: its vectors have different lengths, {dim} and {vectors.shape[1]} numbers")
            yield (columns.add_column(0, CELL_ID, as_text(table[ids])) if ids else columns), vectors

    return Source(path, num_rows, dim, schema, chunks)


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return (column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column).cast(pa.string())


def read_npy(path: Place) -> Source:
    """A matrix (n, dim) of any float type: mapped, or read piece by piece from a store."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if isinstance(path, Remote):
            return read_remote_npy(path)
        matrix = np.lib.format.open_memmap(path, mode="r")  # refuses Python objects
    except InputError:
        raise
    except Exception as error:  # whatever a damaged header makes numpy's parser raise
        raise InputError(f"{path}: not a .npy file, or damaged ({reason(error)})") from error
    return from_matrix(path, matrix.shape, matrix.dtype, matrix.__getitem__)


def read_remote_npy(path: Remote) -> Source:
    file = open_random(path)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, by_column, dtype = header[np.lib.format.read_magic(file)](file)
    if by_column:
        raise InputError(f"{path}: holds its numbers column by column; save it again with numpy.ascontiguousarray")
    first, row = file.tell(), dtype.itemsize * int(np.prod(shape[1:]))

    def rows(some: slice) -> np.ndarray:
        with asking(path):
            file.seek(first + some.start * row)
            return np.frombuffer(file.read((some.stop - some.start) * row), dtype).reshape(-1, *shape[1:])

    return from_matrix(path, shape, dtype, rows)


@contextmanager
def open_vectors(path: str | Place, obsm: str = "X_scimilarity", dim: int | None = None) -> Iterator[Source]:
    """Open a file of vectors; `obsm` is the key of an .h5ad's, `dim` the width that an adapter takes.

    Raises InputError for a file that is missing, damaged or empty, that does not hold cells x dims, or holds what an
    adapter has made where one is to be applied; while its chunks are read as well.
    """
    path = place(path)
    opened: AbstractContextManager[Source]
    check_format(path, f"Read are {READ}")
    kind = kind_of(path)
    if kind in ("tiledb", "soma"):
        opened = read_tiledb(path, obsm)
    elif kind in ("h5ad", "zarr"):
        opened = read_h5ad(path, obsm)
    else:
        opened = nullcontext(read_npy(path) if kind == "npy" else read_parquet(path))
    with opened as source:
        if dim not in (None, source.dim):
            raise InputError(f"{path}: its vectors have {source.dim} numbers, the adapter takes {dim}")
        made = b"checkpoint_sha256" in (source.schema.metadata or {})
        if dim is not None and (made or (kind in ("h5ad", "zarr") and obsm.startswith("X_fractal"))):
            raise InputError(f"{path}: its vectors come from embed.py; name those that they were made of")
        yield source


Append = Callable[[pa.Table, np.ndarray], None]


@contextmanager
def write_parquet(path: Place, source: Source, dim: int, dtype: np.dtype, metadata: dict[str, str]) -> Iterator[Append]:
    """`cell_id` where the cells have names, `embedding`, and the source's other columns; one row group per chunk."""
    known = metadata_of(source.schema)
    known.pop("pandas", None)  # it would tell pandas of an index that is now a column
    with open_writer(path, dim, source.schema, {**known, **metadata}, dtype) as writer:
        yield lambda columns, vectors: writer.append_table(vectors, columns)


def opened(part: Any) -> AbstractContextManager[IO[bytes]]:
    """Of atomic_stream's. Not mapped: a full disk would end the process."""
    return open(part, "wb") if isinstance(part, Path) else nullcontext(part)


@contextmanager
def write_npy(path: Place, source: Source, dim: int, dtype: np.dtype, metadata: dict[str, str]) -> Iterator[Append]:
    """The vectors alone, (n, dim): the format has no place for columns or metadata."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": (source.num_rows, dim)}
    with atomic_stream(path) as part, opened(part) as file:
        np.lib.format.write_array_header_1_0(file, header)

        def append(_: pa.Table, vectors: np.ndarray) -> None:
            file.write(np.ascontiguousarray(vectors, dtype).data)

        yield append


def writing_vectors(
    path: Place, source: Source, dim: int, dtype: np.dtype, metadata: dict[str, str]
) -> AbstractContextManager[Append]:
    """Write a new vector (dim,) for each row of `source`, whole or not at all; metadata where the format has some."""
    return (write_npy if path.suffix == ".npy" else write_parquet)(path, source, dim, dtype, metadata)
