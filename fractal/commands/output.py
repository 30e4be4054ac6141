"""Where the results of a command go: .tsv, .parquet, .npy or .h5ad, filled chunk by chunk, there whole or not at all.

A chunk is a table, a row per cell, and arrays of vectors by name. A .tsv holds the table alone, .npy the vectors alone,
Parquet both. An .h5ad is a copy of the one that was read, whose obs gets the table's columns and obsm the vectors, or,
where none was read, a new AnnData.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from fractal.base.errors import needs
from fractal.base.files import atomic_write
from fractal.base.storage import Location
from fractal.data.outputs import add_obs, add_obsm, h5ad_copy, npy_writer, obs_of
from fractal.data.parquet import CELL_ID, metadata_of, open_writer, table_writer, vector_list

if TYPE_CHECKING:
    from fractal.data.cells import Cells

NO_VECTORS: Mapping[str, np.ndarray] = {}


class Write(Protocol):
    """Takes the next cells: a table of m rows, and arrays (m, dims) by name."""

    def __call__(self, table: pa.Table, vectors: Mapping[str, np.ndarray] = NO_VECTORS) -> None: ...


@contextmanager
def open_output(
    path: Location | None,
    source: "Cells | None" = None,
    *,
    metadata: Mapping[str, str] | None = None,
    uns: Mapping[str, Any] | None = None,
    prefix: str = "",
    replaces: Callable[[str], bool] = lambda name: False,
    dtype: str = "float32",
) -> Iterator[Write]:
    """Open the output for writing; what is written appears at the end, or, after an error, not at all.

    Parameters
    ----------
    path : path or URI; its suffix says which format, and any other than the three below is Parquet. None: nothing is
        written.
    source : the cells that were read; an .h5ad is a copy of theirs, a .npy has as many rows.
    metadata : of Parquet, beside that of the source.
    uns : of a copied .h5ad: entries of uns; a dict's go beside those that are there. A function makes `X_colors` of the
        categories of column X of obs.
    prefix : of a copied .h5ad: what the names of columns begin with in obs.
    replaces : of a copied .h5ad: which names in obs and obsm are results of an earlier run, and go.
    dtype : of the vectors in Parquet and .npy, float32 or float16.
    """
    with ExitStack() as stack:
        if path is None:
            yield lambda table, vectors=NO_VECTORS: None
        elif path.suffix == ".tsv":
            yield stack.enter_context(tsv(path))
        elif path.suffix == ".npy":
            assert source is not None
            yield npy(path, source, np.dtype(dtype), stack)
        elif path.suffix.casefold() != ".h5ad":
            known = metadata_of(source.schema) if source else {}
            known.pop("pandas", None)  # it would tell pandas of an index that is now a column
            yield parquet(path, {**known, **(metadata or {})}, np.dtype(dtype), stack)
        elif source is None:
            yield stack.enter_context(new_h5ad(path))
        else:
            yield stack.enter_context(copied_h5ad(path, source, uns or {}, prefix, replaces))


@contextmanager
def tsv(path: Location) -> Iterator[Write]:
    """Numbers with six digits; a header of the columns' names."""
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")

        def write(table: pa.Table, vectors: Mapping[str, np.ndarray] = NO_VECTORS) -> None:
            if file.tell() == 0:
                writer.writerow(table.column_names)
            columns = [
                [f"{value:.6g}" for value in column.to_numpy()]
                if pa.types.is_floating(column.type)
                else column.to_pylist()
                for column in table.columns
            ]
            writer.writerows(zip(*columns, strict=True))

        yield write


def npy(path: Location, source: "Cells", dtype: np.dtype, stack: ExitStack) -> Write:
    """The format takes one matrix (cells, dims)."""
    opened = list[Any]()

    def write(table: pa.Table, vectors: Mapping[str, np.ndarray] = NO_VECTORS) -> None:
        (values,) = vectors.values()
        if not opened:
            opened.append(stack.enter_context(npy_writer(path, (source.num_rows, values.shape[1]), dtype)))
        opened[0](values)

    return write


def parquet(path: Location, metadata: Mapping[str, str], dtype: np.dtype, stack: ExitStack) -> Write:
    """The vectors as lists of fixed size, after the table's columns; `embedding` as an atlas has it."""
    opened = list[Any]()

    def write(table: pa.Table, vectors: Mapping[str, np.ndarray] = NO_VECTORS) -> None:
        for name, values in vectors.items():
            if name != "embedding":
                table = table.append_column(name, vector_list(values, values.dtype))
        embedding = vectors.get("embedding")
        if embedding is None:
            if not opened:
                opened.append(stack.enter_context(table_writer(stack.enter_context(atomic_write(path)))))
            opened[0](table.replace_schema_metadata(metadata))
            return
        if not opened:
            schema = table.schema.remove_metadata()
            opened.append(stack.enter_context(open_writer(path, embedding.shape[1], schema, dict(metadata), dtype)))
        opened[0].append_table(embedding, table)

    return write


@contextmanager
def copied_h5ad(
    path: Location, source: "Cells", uns: Mapping[str, Any], prefix: str, replaces: Callable[[str], bool]
) -> Iterator[Write]:
    """Vectors go into the file as they come; columns, which are small, at the end."""
    io = needs("anndata", "h5ad").io
    tables, arrays = list[pa.Table](), dict[str, Any]()
    start = 0
    with h5ad_copy(source.path, path) as file:
        for name in [name for name in file.get("obsm", {}) if replaces(name)]:
            del file["obsm"][name]

        def write(table: pa.Table, vectors: Mapping[str, np.ndarray] = NO_VECTORS) -> None:
            nonlocal start
            for name, values in vectors.items():
                if name not in arrays:
                    arrays[name] = add_obsm(file, name, source.num_rows, values.shape[1])
                arrays[name][start : start + len(values)] = values
            start += len(table) or max(map(len, vectors.values()), default=0)
            if names := [name for name in table.column_names if name != CELL_ID]:
                tables.append(compact(table.select(names)))

        yield write
        if tables:
            frame = pa.concat_tables(tables).unify_dictionaries().to_pandas()
            for name in frame.select_dtypes("category"):
                if not frame[name].cat.ordered:
                    used = frame[name].cat.remove_unused_categories().cat
                    frame[name] = used.reorder_categories(sorted(used.categories))
            columns = {f"{prefix}{name}": column.values for name, column in frame.items()}
            add_obs(file, columns, replaces)
        if "uns" not in file:
            file.create_group("uns").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        for key, value in uns.items():
            if callable(value):
                value = np.array(value(columns[key.removesuffix("_colors")].categories.tolist()), object)
            elif key in file["uns"]:
                known = io.read_elem(file["uns"][key])
                value = {**(known if isinstance(known, dict) else {}), **value}
            io.write_elem(file["uns"], key, value)


def compact(table: pa.Table) -> pa.Table:
    """Text as codes of a dictionary, which pandas takes for categories."""
    columns = [
        column.dictionary_encode() if pa.types.is_string(column.type) else column for column in table.combine_chunks()
    ]
    return pa.table(columns, names=table.column_names)


@contextmanager
def new_h5ad(path: Location) -> Iterator[Write]:
    """obs is the table; its first two columns, as CELL-1, name the rows; text that is missing becomes ""."""
    anndata = needs("anndata", "h5ad")
    tables, arrays = list[pa.Table](), dict[str, list[np.ndarray]]()

    def write(table: pa.Table, vectors: Mapping[str, np.ndarray] = NO_VECTORS) -> None:
        tables.append(table)
        for name, values in vectors.items():
            arrays.setdefault(name, []).append(values)

    with atomic_write(path) as part:
        yield write
        obs = obs_of(pa.concat_tables(tables)).to_pandas()
        text = obs.select_dtypes("object").columns
        obs[text] = obs[text].fillna("").astype(str)  # HDF5 has no text that is missing
        obs.index = obs.iloc[:, 0].astype(str) + "-" + obs.iloc[:, 1].astype(str)
        obsm = {name: np.concatenate(parts) for name, parts in arrays.items()}
        anndata.AnnData(obs=obs, obsm=obsm).write_h5ad(part)
