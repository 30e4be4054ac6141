"""Files of vectors, read and written a piece at a time: an atlas (Parquet) or a bare .npy matrix.

A reader is a generator of (columns, vectors): vectors (m, dim) float32 of consecutive rows, finite and not zero, and
their other columns, a table of m rows (without columns where the format has none). `READERS` and `WRITERS` choose by
the end of the file's name; Parquet is read where nothing else fits.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fractal.atlas import ROW_GROUP, open_atlas, read_vectors, reading
from fractal.cli import InputError
from fractal.files import replacing

Chunk = tuple[pa.Table, np.ndarray]


@dataclass(frozen=True)
class Source:
    """An opened file of `num_rows` vectors (dim,). `schema`: of the other columns, with the file's metadata."""

    num_rows: int
    dim: int
    schema: pa.Schema
    chunks: Callable[[], Iterator[Chunk]]


def checked(vectors: np.ndarray, start: int, path: Path) -> np.ndarray:
    """The same vectors. Raises InputError for NaN, inf or zero vectors; `start` is the number of the first row."""
    norm = np.einsum("ij,ij->i", vectors, vectors)
    bad = np.flatnonzero(~np.isfinite(norm) | (norm == 0))
    if len(bad):
        raise InputError(f"{path}: the vector of cell {start + bad[0]} is zero or not finite; leave such cells out")
    return vectors


def read_parquet(path: Path) -> Source:
    """An atlas of ingest.py or stratify.py, one row group (34 MB) at a time."""
    checked_file = open_atlas(path)
    schema, num_rows = checked_file.schema_arrow, checked_file.metadata.num_rows
    # Not mapped, as open_atlas does: pages of a mapped file count as memory of the process until they are needed.
    file = pq.ParquetFile(path)

    def chunks() -> Iterator[Chunk]:
        start = 0
        for group in range(file.num_row_groups):
            with reading(path):
                table = file.read_row_group(group)
            yield table.drop_columns("embedding"), checked(read_vectors(table, path), start, path)
            start += len(table)

    dim = schema.field("embedding").type.list_size
    return Source(num_rows, dim, schema.remove(schema.get_field_index("embedding")), chunks)


def read_npy(path: Path) -> Source:
    """A matrix (n, dim) of any float type, mapped."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a .npy file, or damaged ({str(error).splitlines()[0]})") from error
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating) or 0 in matrix.shape:
        raise InputError(f"{path}: holds {matrix.dtype} of shape {matrix.shape}, expected a float matrix (cells, dim)")

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(matrix), ROW_GROUP):
            vectors = np.ascontiguousarray(matrix[start : start + ROW_GROUP], np.float32)
            no_columns = pa.table({"row": np.arange(len(vectors))}).select([])  # but it knows how many rows it has
            yield no_columns, checked(vectors, start, path)

    return Source(len(matrix), matrix.shape[1], pa.schema([]), chunks)


Append = Callable[[pa.Table, np.ndarray], None]


@contextmanager
def write_parquet(path: Path, source: Source, dim: int, dtype: np.dtype, metadata: dict[str, str]) -> Iterator[Append]:
    """The columns of the source and `embedding`, which comes first; one row group per chunk."""
    others = source.schema.names
    field = pa.field("embedding", pa.list_(pa.from_numpy_dtype(dtype), dim), nullable=False)
    known = {key.decode(): value.decode() for key, value in (source.schema.metadata or {}).items()}
    schema = pa.schema([field, *source.schema], metadata={**known, **metadata, "dim": str(dim)})
    compression = {"embedding.list.element": "none"} | dict.fromkeys(others, "zstd")  # as fractal.atlas.writing
    with (
        replacing(path) as part,
        pq.ParquetWriter(part, schema, use_dictionary=others, compression=compression) as file,
    ):

        def append(columns: pa.Table, vectors: np.ndarray) -> None:
            flat = pa.array(np.ascontiguousarray(vectors, dtype).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, dim)
            file.write_table(columns.add_column(0, field, column).cast(schema), row_group_size=len(vectors))

        yield append


@contextmanager
def write_npy(path: Path, source: Source, dim: int, dtype: np.dtype, metadata: dict[str, str]) -> Iterator[Append]:
    """The vectors alone, (n, dim): the format has no place for columns or metadata."""
    with replacing(path) as part:
        matrix = np.lib.format.open_memmap(part, "w+", dtype, (source.num_rows, dim))
        rows = 0

        def append(_: pa.Table, vectors: np.ndarray) -> None:
            nonlocal rows
            matrix[rows : rows + len(vectors)] = vectors
            rows += len(vectors)

        yield append
        matrix.flush()


READERS: dict[str, Callable[[Path], Source]] = {".npy": read_npy}
WRITERS: dict[str, Callable[[Path, Source, int, np.dtype, dict[str, str]], AbstractContextManager[Append]]] = {
    ".npy": write_npy
}


def open_vectors(path: Path) -> Source:
    """Open a file of vectors. Raises InputError for a file that can't be read, here or while its chunks are."""
    return READERS.get(path.suffix, read_parquet)(path)


def writing_vectors(
    path: Path, source: Source, dim: int, dtype: np.dtype, metadata: dict[str, str]
) -> AbstractContextManager[Append]:
    """Write a new vector (dim,) for each row of `source`, whole or not at all; metadata where the format has some."""
    return WRITERS.get(path.suffix, write_parquet)(path, source, dim, dtype, metadata)
