"""An opened file of vectors, whatever its format: what fractal/data/vectors.py and fractal/data/h5ad.py make."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.base.cli import InputError, reason
from fractal.base.storage import Place
from fractal.data.parquet import ROW_GROUP, usable

CHUNK = 16_384  # rows; 8 MB of 128-d vectors
CELL_ID = "cell_id"  # the column of the cells' names, text
# Formats that people bring, and the way from there.
NOT_READ = {
    ".gz": "unpack it first (gunzip)",
    ".zip": "unpack it first",
    ".npz": "write its array as .npy with numpy.save",
    ".csv": "read it with pandas and write the numbers as .npy with numpy.save",
    ".tsv": "read it with pandas and write the numbers as .npy with numpy.save",
    ".txt": "read it with pandas and write the numbers as .npy with numpy.save",
    ".h5mu": "write one of its modalities as .h5ad with mudata.read_h5mu(...)['rna'].write_h5ad(...)",
    ".loom": "write it as .h5ad with anndata.io.read_loom(...).write_h5ad(...)",
    ".rds": "write it as .h5ad, for example with sceasy or zellkonverter",
    ".h5": "if it is AnnData, call it .h5ad",
}

Chunk = tuple[pa.Table, np.ndarray]


@dataclass(frozen=True)
class Source:
    """An opened file of `num_rows` vectors (dim,).

    `schema`: of the other columns, with the file's metadata; `cell_id`, the cells' names, is the first where known.
    """

    path: Place
    num_rows: int
    dim: int
    schema: pa.Schema
    read: Callable[[int], Iterator[Chunk]]  # what `chunks` does

    @property
    def has_ids(self) -> bool:
        """Whether the cells have names: the column `cell_id` of every chunk."""
        return CELL_ID in self.schema.names

    @staticmethod
    def ids(columns: pa.Table) -> np.ndarray | None:
        """The cells' names of a chunk's columns, (m,) str; None where they have none."""
        return columns[CELL_ID].to_numpy().astype(str) if CELL_ID in columns.column_names else None

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


def check_format(path: Place, read: str) -> None:
    """Raise InputError for a file whose name says that it is in a format of NOT_READ; `read` says what is read."""
    suffix = path.suffix.casefold()
    if suffix in NOT_READ and path.exists():
        raise InputError(f"{path}: {suffix} is not read; {NOT_READ[suffix]}. {read}")


def refuse(bad: np.ndarray, start: int, path: Place) -> None:
    """Raise InputError for the first of the `bad` rows, (m,) bool; `start` is the number of row 0."""
    if bad.any():
        raise InputError(
            f"{path}: the vector of cell {start + bad.argmax()} is zero or not finite; leave such cells out"
        )


def from_matrix(
    path: Place,
    shape: tuple[int, ...],
    dtype: Any,
    rows: Callable[[slice], np.ndarray],
    names: Callable[[slice], np.ndarray] | None = None,
) -> Source:
    """Anything with a shape, a dtype and slices of rows: a memory map, an HDF5 dataset, a TileDB array.

    `names`: slices of the cells' names. Raises InputError unless it holds floats, cells x dims.
    """
    if len(shape) != 2 or not np.issubdtype(dtype, np.floating) or 0 in shape:
        raise InputError(f"{path}: holds {dtype} of shape {shape}, expected floats, cells x dims, at least one cell")

    def chunks(size: int) -> Iterator[Chunk]:
        for start in range(0, shape[0], size):
            some = slice(start, min(start + size, shape[0]))
            try:
                vectors = np.ascontiguousarray(rows(some), np.float32)
            except OSError as error:  # a damaged block
                raise InputError(f"{path}: damaged ({reason(error)})") from error
            if names is None:
                yield pa.table({"row": np.arange(len(vectors))}).select([]), vectors  # no column, yet it has m rows
            else:
                yield pa.table({CELL_ID: pa.array(names(some).astype(object), pa.string())}), vectors

    return Source(path, *shape, pa.schema([(CELL_ID, pa.string())] if names else []), chunks)
