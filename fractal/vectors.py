"""Files of vectors, read and written a piece at a time.

Read are an atlas (Parquet), a .npy matrix, an array of an .h5ad's obsm, and the folder of a dense TileDB array such as
SCimilarity's cellsearch/cell_embedding. Parquet and .npy are written here, .h5ad by fractal.h5ad. The end of a
file's name says what it is; where nothing else fits, it is Parquet.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fractal.atlas import ROW_GROUP, open_atlas, read_vectors, reading, usable
from fractal.cli import InputError, needs, reason
from fractal.files import atomic_write

CHUNK = 16_384  # rows; 8 MB of 128-d vectors

Chunk = tuple[pa.Table, np.ndarray]


@dataclass(frozen=True)
class Source:
    """An opened file of `num_rows` vectors (dim,). `schema`: of the other columns, with the file's metadata."""

    path: Path
    num_rows: int
    dim: int
    schema: pa.Schema
    read: Callable[[int], Iterator[Chunk]]  # what `chunks` does

    def chunks(self, size: int = ROW_GROUP, strict: bool = False) -> Iterator[Chunk]:
        """Yield (columns, vectors) of at most `size` rows, in the order of the file.

        vectors (m, dim) float32; columns is a table of m rows, without columns where the format has none. `strict`
        raises InputError for vectors that are not `usable`.
        """
        start = 0
        for columns, vectors in self.read(size):
            if strict:
                refuse(~usable(vectors), start, self.path)
            yield columns, vectors
            start += len(vectors)


def refuse(bad: np.ndarray, start: int, path: Path) -> None:
    """Raise InputError for the first of the `bad` rows, (m,) bool; `start` is the number of row 0."""
    if bad.any():
        raise InputError(
            f"{path}: the vector of cell {start + bad.argmax()} is zero or not finite; leave such cells out"
        )


def read_parquet(path: Path) -> Source:
    """An atlas of ingest.py or stratify.py; a chunk lies within one row group (34 MB)."""
    metadata, schema = (atlas := open_atlas(path)).metadata, atlas.schema_arrow

    def chunks(size: int) -> Iterator[Chunk]:
        with reading(path):
            for group in range(metadata.num_row_groups):
                # Opened anew, since Arrow keeps what it has read for as long as a file is open. Not mapped: pages of
                # a map count as memory of the process.
                file = pq.ParquetFile(path, metadata=metadata)
                for batch in file.iter_batches(size, row_groups=[group]):
                    table = pa.Table.from_batches([batch])
                    yield table.drop_columns("embedding"), read_vectors(table, path)

    dim = schema.field("embedding").type.list_size
    return Source(path, metadata.num_rows, dim, schema.remove(schema.get_field_index("embedding")), chunks)


def from_matrix(path: Path, shape: tuple[int, ...], dtype: Any, rows: Callable[[slice], np.ndarray]) -> Source:
    """Anything with a shape, a dtype and slices of rows: a memory map, an HDF5 dataset, a TileDB array."""
    if len(shape) != 2 or not np.issubdtype(dtype, np.floating) or 0 in shape:
        raise InputError(f"{path}: holds {dtype} of shape {shape}, expected floats, cells x dims, at least one cell")

    def chunks(size: int) -> Iterator[Chunk]:
        for start in range(0, shape[0], size):
            try:
                vectors = np.ascontiguousarray(rows(slice(start, min(start + size, shape[0]))), np.float32)
            except OSError as error:  # a damaged block of an .h5ad
                raise InputError(f"{path}: damaged ({reason(error)})") from error
            yield pa.table({"row": np.arange(len(vectors))}).select([]), vectors  # no column, yet it has m rows

    return Source(path, *shape, pa.schema([]), chunks)


def read_npy(path: Path) -> Source:
    """A matrix (n, dim) of any float type, mapped."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        matrix = np.lib.format.open_memmap(path, mode="r")  # refuses Python objects
    except Exception as error:  # whatever a damaged header makes numpy's parser raise
        raise InputError(f"{path}: not a .npy file, or damaged ({reason(error)})") from error
    return from_matrix(path, matrix.shape, matrix.dtype, matrix.__getitem__)


@contextmanager
def read_tiledb(path: Path) -> Iterator[Source]:
    """The one attribute of a dense TileDB array, as far as it is written."""
    tiledb = needs("tiledb", "tiledb")
    try:
        with tiledb.open(str(path)) as array:
            if array.schema.sparse or array.schema.nattr != 1:
                raise InputError(f"{path}: not a dense TileDB array with one attribute, such as cell_embedding")
            attribute, written = array.attr(0), array.nonempty_domain()

            def rows(some: slice) -> np.ndarray:
                found = array[some]
                return found[attribute.name] if isinstance(found, Mapping) else found  # without a name it comes bare

            shape = (0 if written is None else int(written[0][1]) + 1, *map(int, array.shape[1:]))
            yield from_matrix(path, shape, attribute.dtype, rows)
    except tiledb.TileDBError as error:
        raise InputError(f"{path}: not a TileDB array, or damaged ({error})") from error


@contextmanager
def open_h5ad(path: Path, mode: str = "r") -> Iterator[Any]:
    """The h5py.File of an .h5ad. Raises InputError if it is damaged, or written by an AnnData older than 0.7."""
    h5py = needs("h5py", "h5ad")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        file = h5py.File(path, mode)
    except OSError as error:
        raise InputError(f"{path}: not an .h5ad file, or damaged ({error})") from error
    with file:
        groups = [file.get(name) for name in ("obs", "obsm")]
        if not all(isinstance(group, h5py.Group) for group in groups) or "column-order" not in groups[0].attrs:
            raise InputError(
                f"{path}: not an .h5ad file, or written by an AnnData before 0.7; "
                "write it again with anndata.read_h5ad(...).write_h5ad(...)"
            )
        yield file


def from_obsm(file: Any, path: Path, key: str) -> Source:
    """An array of the obsm of an open .h5ad."""
    found = file["obsm"].get(key)
    if found is None:
        raise InputError(
            f"{path}: has no obsm '{key}'; it has {', '.join(file['obsm']) or 'none'}: name one with --obsm"
        )
    if not hasattr(found, "shape"):  # a data frame or a sparse matrix
        raise InputError(f"{path}: obsm '{key}' is not a dense array; write it again with .to_numpy() or .toarray()")
    return from_matrix(path, found.shape, found.dtype, found.__getitem__)


@contextmanager
def read_h5ad(path: Path, obsm: str) -> Iterator[Source]:
    with open_h5ad(path) as file:
        yield from_obsm(file, path, obsm)


@contextmanager
def open_vectors(path: str | Path, obsm: str = "X_scimilarity", dim: int | None = None) -> Iterator[Source]:
    """Open a file of vectors; `obsm` is the key of an .h5ad's, `dim` the width that an adapter takes.

    Raises InputError for a file that is missing, damaged or empty, that does not hold cells x dims, or holds what an
    adapter has made where one is to be applied; while its chunks are read as well.
    """
    path = Path(path)
    opened: AbstractContextManager[Source]
    if path.is_dir():
        opened = read_tiledb(path)
    elif path.suffix == ".h5ad":
        opened = read_h5ad(path, obsm)
    else:
        opened = nullcontext(read_npy(path) if path.suffix == ".npy" else read_parquet(path))
    with opened as source:
        if dim not in (None, source.dim):
            raise InputError(f"{path}: its vectors have {source.dim} numbers, the adapter takes {dim}")
        made = b"checkpoint_sha256" in (source.schema.metadata or {})
        if dim is not None and (made or (path.suffix == ".h5ad" and obsm.startswith("X_fractal"))):
            raise InputError(f"{path}: its vectors come from embed.py; name those that they were made of")
        yield source


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
        atomic_write(path) as part,
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
    header = {"descr": dtype.str, "fortran_order": False, "shape": (source.num_rows, dim)}
    with atomic_write(path) as part, open(part, "wb") as file:  # not mapped: a full disk would end the process
        np.lib.format.write_array_header_1_0(file, header)

        def append(_: pa.Table, vectors: np.ndarray) -> None:
            file.write(np.ascontiguousarray(vectors, dtype).data)

        yield append


def writing_vectors(
    path: Path, source: Source, dim: int, dtype: np.dtype, metadata: dict[str, str]
) -> AbstractContextManager[Append]:
    """Write a new vector (dim,) for each row of `source`, whole or not at all; metadata where the format has some."""
    return (write_npy if path.suffix == ".npy" else write_parquet)(path, source, dim, dtype, metadata)
