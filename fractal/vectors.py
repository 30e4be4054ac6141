"""Files of vectors, read and written a piece at a time.

Read are Parquet (an atlas, or any file with a column `embedding`), a .npy matrix, an .h5ad (fractal/h5ad.py) and the
folder of a dense TileDB array such as SCimilarity's cellsearch/cell_embedding. Parquet and .npy are written here. The
end of a file's name says what it is; where nothing else fits, it is Parquet.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa

from fractal.cli import InputError, needs, reason
from fractal.files import atomic_write
from fractal.h5ad import open_h5ad, read_h5ad
from fractal.parquet import metadata_of, open_parquet, open_writer, read_vectors, reading, row_groups, usable
from fractal.source import CELL_ID, CHUNK, Chunk, Source, check_format, from_matrix, refuse

__all__ = ["CHUNK", "Source", "open_h5ad", "refuse", "usable"]  # what users of this module need beside it

READ = "Parquet with a column 'embedding', .npy, .h5ad, and the folder of a dense TileDB array"
IDS = (CELL_ID, "obs_names", "index", "__index_level_0__")  # what the column of cell names is called, best first


def is_h5ad(path: str | Path) -> bool:
    return Path(path).suffix.casefold() == ".h5ad"


def read_parquet(path: Path, groups: Sequence[int] | None = None) -> Source:
    """An atlas, or any file with a column `embedding` of lists; a chunk lies within one row group (34 MB).

    The lists may be of fixed size or not, of 16, 32 or 64 bits, but all of one length. A column of cell names, as
    pandas writes an index, becomes `cell_id`. All other columns stay. groups: only these row groups, by number.
    Raises InputError for anything else.
    """
    file = open_parquet(path)
    some = range(file.num_row_groups) if groups is None else groups
    num_rows, schema = sum(file.metadata.row_group(i).num_rows for i in some), file.schema_arrow
    with reading(path):
        dim = read_vectors(pa.table(next(file.iter_batches(1, columns=["embedding"]))), path).shape[1]
    if dim < 1:
        raise InputError(f"{path}: its first cell has an empty vector")
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
def open_vectors(path: str | Path, obsm: str = "X_scimilarity", dim: int | None = None) -> Iterator[Source]:
    """Open a file of vectors; `obsm` is the key of an .h5ad's, `dim` the width that an adapter takes.

    Raises InputError for a file that is missing, damaged or empty, that does not hold cells x dims, or holds what an
    adapter has made where one is to be applied; while its chunks are read as well.
    """
    path = Path(path)
    opened: AbstractContextManager[Source]
    suffix = path.suffix.casefold()
    check_format(path, f"Read are {READ}")
    if path.is_dir():
        opened = read_tiledb(path)
    elif suffix == ".h5ad":
        opened = read_h5ad(path, obsm)
    else:
        opened = nullcontext(read_npy(path) if suffix == ".npy" else read_parquet(path))
    with opened as source:
        if dim not in (None, source.dim):
            raise InputError(f"{path}: its vectors have {source.dim} numbers, the adapter takes {dim}")
        made = b"checkpoint_sha256" in (source.schema.metadata or {})
        if dim is not None and (made or (suffix == ".h5ad" and obsm.startswith("X_fractal"))):
            raise InputError(f"{path}: its vectors come from embed.py; name those that they were made of")
        yield source


Append = Callable[[pa.Table, np.ndarray], None]


@contextmanager
def write_parquet(path: Path, source: Source, dim: int, dtype: np.dtype, metadata: dict[str, str]) -> Iterator[Append]:
    """`cell_id` where the cells have names, `embedding`, and the source's other columns; one row group per chunk."""
    known = metadata_of(source.schema)
    known.pop("pandas", None)  # it would tell pandas of an index that is now a column
    with open_writer(path, dim, source.schema, {**known, **metadata}, dtype) as writer:
        yield lambda columns, vectors: writer.append_table(vectors, columns)


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
