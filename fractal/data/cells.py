"""Cells to read: vectors, names and columns of an .h5ad, .zarr, Parquet, .npy, TileDB or SOMA, or of an AnnData.

    with Cells.open("new.h5ad", use_rep="X_scVI") as cells:  # a path, a URI (fractal/base/storage.py) or an AnnData
        cells.num_rows, cells.dim, cells.names, cells.column_names
        for columns, vectors in cells.chunks():  # a pyarrow.Table of m rows, and (m, dim) float32
            ...
        donors = cells.column("donor")           # a pyarrow.ChunkedArray of all rows
        codes, names = cells.codes("cell_type")  # the same as codes of cleaned names, -1 where one is missing
        labels = cells.labels("cell_type", "donor")
    both = Cells.chain([some, others])           # several files as one

Vectors stream: one chunk of them is in memory. What is in a folder, and else the end of a name, says what the format
is; where nothing else fits, it is Parquet. A column that mixes types, as AnnData allows, is text for all who read it.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from fractal.base.errors import InputError, reason
from fractal.base.storage import Location, Remote, listed, locate, names_below, open_random, same_files, store_errors
from fractal.data.h5ad import (
    find_embedding,
    fractal_uns,
    obs_columns,
    obs_names,
    obs_table,
    open_anndata,
    reading_h5ad,
    rows_of,
)
from fractal.data.labels import Codes, coded, read_labels
from fractal.data.parquet import CELL_ID, PARQUET, ROW_GROUP, Parquet, as_text, check_format, metadata_of, read_vectors
from fractal.data.tiledb_arrays import EMBEDDING, open_tiledb
from fractal.data.vectors import CHUNK, refuse, usable

READ = "Parquet with a column 'embedding', .npy, .h5ad, .zarr, and TileDB's arrays and SOMA experiments"
IDS = (CELL_ID, "obs_names", "index", "__index_level_0__")  # columns of Parquet that hold the cells' names, best first
MAX_NAME = 1_000  # letters of a cell's name
Chunk = tuple[pa.Table, np.ndarray]


def kind_of(path: str | Location) -> str:
    """What it is: "parquet", "npy", "h5ad", "zarr" (of AnnData), "soma" (a TileDB group), or "tiledb"."""
    path = locate(path)
    suffix = path.suffix.casefold()
    if suffix not in (".h5ad", ".npy", ".parquet") and path.is_dir():
        names = {info.base_name for info in listed(path, recursive=False)}
        if names & {"zarr.json", ".zgroup"}:
            return "zarr"
        if "__group" in names:
            return "soma"
        if names & {"__schema", "__array_schema.tdb", EMBEDDING}:
            return "tiledb"
        return "parquet" if any(name.endswith(PARQUET) for name in names_below(path)) else "tiledb"
    return suffix[1:] if suffix in (".h5ad", ".npy", ".zarr") else "parquet"


def is_h5ad(path: str | Location) -> bool:
    return locate(path).suffix.casefold() == ".h5ad"


def has_obs(path: str | Location) -> bool:
    """Whether it is an AnnData on disk, with an obs to read labels from."""
    return kind_of(path) in ("h5ad", "zarr")


def has_obsm(path: str | Location) -> bool:
    """Whether it may hold several vectors of a cell."""
    return kind_of(path) in ("h5ad", "zarr", "soma")


@dataclass(frozen=True)
class Cells:
    """`num_rows` cells, each with a vector (dim,) float32; `Cells.open` makes them."""

    path: Location  # as messages say it; Path("adata") for an AnnData in memory
    num_rows: int
    dim: int
    schema: pa.Schema  # of what every chunk brings, with the file's metadata; the names, `cell_id`, come first
    column_names: tuple[str, ...]  # all columns but the names: those of the chunks, or of obs
    read: Callable[[int], Iterator[Chunk]]  # what `chunks` does
    read_columns: Callable[[Sequence[str]], pa.Table]  # what `table` does
    read_names: Callable[[], pa.Table] | None = None  # what `names` does
    facts: Callable[[], Mapping[str, Any]] = dict  # what made the vectors says of them: metadata, or uns["fractal"]
    check_same: Callable[[], None] = lambda: None  # raises InputError where another file has taken its name
    parts: "tuple[Cells, ...]" = ()  # those that `chain` made it of

    @staticmethod
    @contextmanager
    def open(cells: Any, use_rep: str = "X_scimilarity", dim: int | None = None) -> "Iterator[Cells]":
        """Open cells, whatever holds them: a str, path, Remote or AnnData.

        use_rep: key of obsm, or "X", of what may hold several vectors of a cell; dim: the width that an adapter takes;
        then what `fractal embed` has made is refused too.
        Raises InputError for what is missing, damaged or empty, and does not hold cells x dims; also while it is read.
        """
        in_memory = hasattr(cells, "obsm")
        if not in_memory:
            cells = locate(cells)
            check_format(cells, f"Read are {READ}")
        kind = "h5ad" if in_memory else kind_of(cells)
        with OPENERS[kind](cells, use_rep) as opened:
            if dim not in (None, opened.dim):
                raise InputError(f"{opened.path}: its vectors have {opened.dim} numbers, the adapter takes {dim}")
            made = b"checkpoint_sha256" in (opened.schema.metadata or {})
            made = made or (kind in ("h5ad", "zarr") and use_rep.startswith("X_fractal"))
            if dim is not None and made:
                raise InputError(f"{opened.path}: its vectors come from embed.py; name those that they were made of")
            yield opened

    @staticmethod
    def chain(parts: "Sequence[Cells]") -> "Cells":
        """Several as one, in this order. Columns are text, as types may differ; names, which may recur, are left out.

        Raises InputError for vectors of different widths; where it is read, for a column that one of them lacks.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        if other := next((part for part in parts if part.dim != first.dim), None):
            raise InputError(f"{other.path}: its vectors have {other.dim} numbers, those of {first.path} {first.dim}")

        def chunks(size: int) -> Iterator[Chunk]:
            for part in parts:
                for columns, vectors in part.read(size):
                    yield columns.select([]), vectors

        def texts(part: Cells, name: str) -> pa.DictionaryArray:
            codes, names = part.codes(name)
            indices = pa.array(codes.astype(np.int32), mask=codes < 0)
            return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()))

        def columns(names: Sequence[str]) -> pa.Table:
            return pa.table({name: pa.chunked_array([texts(part, name) for part in parts]) for name in names})

        path, rows = Path(", ".join(part.path.name for part in parts)), sum(part.num_rows for part in parts)
        keys = tuple(dict.fromkeys(name for part in parts for name in part.column_names))
        return Cells(path, rows, first.dim, pa.schema([]), keys, chunks, columns, parts=tuple(parts))

    @property
    def has_names(self) -> bool:
        """Whether the cells have names: the column `cell_id` of every chunk."""
        return CELL_ID in self.schema.names

    @property
    def names(self) -> np.ndarray | None:
        """The cells' names, (num_rows,) objects of text; None where they have none."""
        return names_of(self.read_names()) if self.has_names and self.read_names else None

    def chunks(
        self, size: int = ROW_GROUP, strict: bool = False, obs: bool = False, progress: str = ""
    ) -> Generator[Chunk, None, None]:
        """Yield (columns, vectors) of at most `size` rows, in the order of the file. progress: the title of a bar.

        vectors (m, dim) float32; columns is a table of m rows, without columns where the format has none. `strict`
        raises InputError for vectors that are not `usable`. `obs` brings all columns, also those of an AnnData's obs,
        which are read at once; one that is called `cell_id`, as the cells' names are here, becomes `obs_cell_id`,
        unless it repeats the names.
        """
        brought = tuple(name for name in self.schema.names if name != CELL_ID)
        more = self.obs_beside_names() if obs and self.column_names != brought else {}
        start = 0
        with tqdm(total=self.num_rows, unit="cells", unit_scale=True, desc=progress, disable=not progress) as bar:
            for columns, vectors in self.read(size):
                if strict:
                    refuse(~usable(vectors), start, self.path)
                for name, column in more.items():
                    columns = columns.append_column(name, column.slice(start, len(vectors)))
                yield columns, vectors
                start += len(vectors)
                bar.update(len(vectors))

    def take(self, rows: np.ndarray, obs: bool = False) -> tuple[np.ndarray, pa.Table]:
        """These rows, ascending -> vectors (m, dim) float32 and the columns that come with them; `obs`: all columns."""
        vectors, tables, start = list[np.ndarray](), list[pa.Table](), 0
        for table, chunk in self.chunks(CHUNK, obs=obs, progress="read"):
            here = rows[slice(*np.searchsorted(rows, [start, start + len(chunk)]))] - start
            vectors.append(chunk[here])
            tables.append(table.take(here))
            start += len(chunk)
        return np.concatenate(vectors), pa.concat_tables(tables)

    def obs_beside_names(self) -> dict[str, pa.ChunkedArray]:
        """The columns of obs, under names that none of them shares with the cells' names."""
        table = self.table()
        columns = dict(zip(table.column_names, table.columns, strict=True))
        if CELL_ID in columns and self.names is not None:
            column = columns.pop(CELL_ID)
            if as_text(column).to_pylist() != self.names.tolist():
                if f"obs_{CELL_ID}" in columns:
                    raise InputError(f"{self.path}: obs has both {CELL_ID} and obs_{CELL_ID}; rename one")
                columns[f"obs_{CELL_ID}"] = column
        return columns

    def table(self, names: Sequence[str] | None = None) -> pa.Table:
        """The named columns, or all but the cells' names, of all rows. Raises InputError for one that is not there."""
        names = self.column_names if names is None else names
        if unknown := [name for name in names if name not in self.column_names]:
            what = "it" if set(self.column_names) & set(self.schema.names) else "obs"
            there = ", ".join(self.column_names) or "none"
            raise InputError(f"{self.path}: {what} has no column '{unknown[0]}'; it has {there}")
        table = self.read_columns(names)
        if len(table) != self.num_rows and names:
            raise InputError(f"{self.path}: damaged, {self.num_rows:,} vectors and {len(table):,} rows of columns")
        return table

    def column(self, name: str) -> pa.ChunkedArray:
        return self.table([name])[name]

    def codes(self, name: str) -> Codes:
        """A column -> its (num_rows,) codes, -1 where a value is missing, and their names, cleaned and sorted."""
        return coded(self.column(name))

    labels = read_labels  # of a column, or of several levels -> Labels

    @staticmethod
    def from_matrix(
        path: Location,
        shape: tuple[int, ...],
        dtype: Any,
        rows: Callable[[slice], np.ndarray],
        columns: Callable[[slice], pa.Table] | None = None,
    ) -> "Cells":
        """Anything with a shape, a dtype and slices of rows: a memory map, an HDF5 dataset, a TileDB array.

        columns: rows -> their names (`cell_id`) and other columns.
        Raises InputError unless it holds floats, cells x dims.
        """
        if len(shape) != 2 or not np.issubdtype(dtype, np.floating) or 0 in shape:
            raise InputError(
                f"{path}: holds {dtype} of shape {shape}, expected floats, cells x dims, at least one cell"
            )
        brings = columns or (lambda rows: no_columns(rows.stop - rows.start))

        def chunks(size: int) -> Iterator[Chunk]:
            for start in range(0, shape[0], size):
                batch = slice(start, min(start + size, shape[0]))
                vectors = np.ascontiguousarray(rows(batch), np.float32)
                yield brings(batch), vectors

        def all_rows(names: Sequence[str]) -> pa.Table:
            return brings(slice(0, shape[0])).select(names)

        schema = brings(slice(0, 1)).schema
        names = tuple(name for name in schema.names if name != CELL_ID)
        return Cells(path, *shape, schema, names, chunks, all_rows, lambda: all_rows([CELL_ID]))


def no_columns(num_rows: int) -> pa.Table:
    return pa.table({"row": pa.nulls(num_rows)}).select([])


def names_of(columns: pa.Table) -> np.ndarray | None:
    """The cells' names in the columns of a chunk, (m,) objects of text; None where they have none.

    No numpy array of text: there each name takes as much memory as the longest.
    """
    return columns[CELL_ID].fill_null("").to_numpy() if CELL_ID in columns.column_names else None


# --- one function per format ------------------------------------------------------------------------------------------


@contextmanager
def open_anndata_cells(cells: Any, use_rep: str) -> Iterator[Cells]:
    """The cells of an AnnData, in memory or the path of an .h5ad or .zarr."""
    with open_anndata(cells) as (file, path):
        with reading_h5ad(path):
            array = find_embedding(file, path, use_rep)
        yield anndata_cells(file, path, array.shape, array.dtype, rows_of(array, path))


def anndata_cells(
    file: Any, path: Location, shape: tuple[int, ...], dtype: Any, rows: Callable[[slice], np.ndarray]
) -> Cells:
    """The cells of `open_anndata` with these vectors, of its obsm or made for them; see `Cells.from_matrix`."""
    obs = file["obs"]
    with reading_h5ad(path):
        names, keys = obs_names(obs), obs_columns(obs)
    read = rows_of(names, path)

    def names_column(batch: slice) -> pa.Table:
        texts = [str(name) for name in read(batch)]
        if (longest := max(map(len, texts), default=0)) > MAX_NAME:  # no barcode: a damaged file
            raise InputError(f"{path}: obs has a cell's name of {longest:,} letters; give the cells shorter names")
        return pa.table({CELL_ID: pa.array(texts, pa.string())})

    cells = Cells.from_matrix(path, shape, dtype, rows, names_column)
    if len(names) != cells.num_rows:
        raise InputError(f"{path}: damaged, {cells.num_rows:,} vectors, and obs has {len(names):,} cells")
    columns, facts = partial(obs_table, obs, path), partial(fractal_uns, file, path)
    check_same = same_files(path) if path.is_file() else cells.check_same
    return replace(cells, column_names=keys, read_columns=columns, facts=facts, check_same=check_same)


@contextmanager
def open_tiledb_cells(path: Location, use_rep: str) -> Iterator[Cells]:
    with open_tiledb(path, use_rep) as arrays:
        yield Cells.from_matrix(path, *arrays)


def parquet_cells(source: Location | Parquet, groups: Sequence[int] | None = None) -> Cells:
    """An atlas, or any file with a column `embedding` of lists; a chunk lies within one row group (34 MB).

    The lists may be of fixed size or not, of 16, 32 or 64 bits, but all of one length. A column of cell names, as
    pandas writes an index, becomes `cell_id`. All other columns stay. groups: only these row groups, by number.
    Raises InputError for anything else.
    """
    file = source if isinstance(source, Parquet) else Parquet.open(source)
    path = file.path
    num_rows = sum(file.sizes[i] for i in (range(len(file.sizes)) if groups is None else groups))
    ids = next((name for name in IDS if name in file.schema.names), "")
    others = [name for name in file.schema.names if name not in ("embedding", ids)]
    fields = [pa.field(CELL_ID, pa.string())] if ids else []
    schema = pa.schema([*fields, *(file.schema.field(name) for name in others)], metadata=file.schema.metadata)

    def named(table: pa.Table) -> pa.Table:
        columns = table.select([name for name in table.column_names if name not in ("embedding", ids)])
        return columns.add_column(0, CELL_ID, as_text(table[ids])) if ids in table.column_names else columns

    def chunks(size: int) -> Iterator[Chunk]:
        for table in file.tables(size=size, groups=groups):
            vectors = read_vectors(table, path)
            if vectors.shape[1] != file.dim:
                lengths = f"{file.dim} and {vectors.shape[1]}"
                raise InputError(f"{path}: its vectors have different lengths, {lengths} numbers")
            yield named(table), vectors

    def names() -> pa.Table:
        return named(file.read([ids]))

    return Cells(path, num_rows, file.dim, schema, tuple(others), chunks, file.read, names, lambda: metadata_of(schema))


def npy_cells(path: Location) -> Cells:
    """A matrix (n, dim) of any float type: mapped, or read piece by piece from a store."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if isinstance(path, Remote):
            return remote_npy_cells(path)
        matrix = np.lib.format.open_memmap(path, mode="r")  # refuses Python objects
        return Cells.from_matrix(path, matrix.shape, matrix.dtype, matrix.__getitem__)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged header makes numpy's parser raise
        raise InputError(f"{path}: not a .npy file, or damaged ({reason(error)})") from error


def remote_npy_cells(path: Remote) -> Cells:
    file = open_random(path)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, by_column, dtype = header[np.lib.format.read_magic(file)](file)
    if by_column:
        raise InputError(f"{path}: holds its numbers column by column; save it again with numpy.ascontiguousarray")
    first, row = file.tell(), dtype.itemsize * int(np.prod(shape[1:]))
    if path.info.size < (needed := first + row * shape[0]):
        raise InputError(f"{path}: cut short, {path.info.size:,} bytes of {needed:,}; upload it again")

    def rows(batch: slice) -> np.ndarray:
        with store_errors(path):
            file.seek(first + batch.start * row)
            return np.frombuffer(file.read((batch.stop - batch.start) * row), dtype).reshape(-1, *shape[1:])

    return Cells.from_matrix(path, shape, dtype, rows)


OPENERS: dict[str, Callable[[Any, str], AbstractContextManager[Cells]]] = {
    "parquet": lambda path, _: nullcontext(parquet_cells(path)),
    "npy": lambda path, _: nullcontext(npy_cells(path)),
    "h5ad": open_anndata_cells,
    "zarr": open_anndata_cells,
    "tiledb": open_tiledb_cells,
    "soma": open_tiledb_cells,
}
