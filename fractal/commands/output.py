"""Where the results of a command go: .tsv, .parquet, .npy or .h5ad, written chunk by chunk, whole or not at all.

A chunk is a table, a row per cell, and arrays of vectors by name. A .tsv holds the table alone, .npy the vectors alone,
Parquet both. An .h5ad is a copy of the one that was read, whose obs gets the table's columns and obsm the vectors;
`write_new_h5ad` makes one of a whole table.
"""

import csv
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fractal.base.errors import warn
from fractal.base.files import atomic_stream, atomic_write
from fractal.base.storage import Location
from fractal.data.cells import Cells
from fractal.data.parquet import CELL_ID, metadata_of, vector_list, write_tables
from fractal.data.writers import add_obs, add_obsm, h5ad_copy, obs_of, updated

Chunks = Iterable[tuple[pa.Table, Mapping[str, np.ndarray]]]  # a table of m rows, and arrays (m, dims) by name


def write_output(
    path: Location,
    chunks: Chunks,
    source: Cells,
    *,
    metadata: Mapping[str, str] | None = None,
    uns: Callable[[], Mapping[str, Any]] = dict,
    prefix: str = "",
    replaces: Collection[str] = (),
) -> None:
    """Write the results for the cells that were read.

    Parameters
    ----------
    path : path or URI; its suffix says which format, and any other than the three below is Parquet
    chunks : in the order of the cells; vectors are float32, or, for Parquet and .npy, float16
    source : the cells; an .h5ad is a copy of theirs, .npy has as many rows
    metadata : of Parquet
    uns : of .h5ad: after all chunks, gives the entries of uns; a dict's go beside those that are there, see `updated`
    prefix : of .h5ad: what the names of columns begin with in obs
    replaces : of .h5ad: which names in obs and obsm are results of an earlier run, and go
    """
    suffix = path.suffix.casefold()
    if suffix == ".tsv":
        write_tsv(path, (table for table, _ in chunks))
    elif suffix == ".npy":
        write_npy(path, chunks, source.num_rows)
    elif suffix == ".h5ad":
        write_h5ad_copy(path, chunks, source, uns, prefix, replaces)
    else:
        write_parquet(path, chunks, metadata or {})


def kept_metadata(source: Cells) -> dict[str, str]:
    """Of a file, what its copies keep."""
    known = metadata_of(source.schema)
    known.pop("pandas", None)  # it would tell pandas of an index that is now a column
    return known


def write_tsv(path: Location, tables: Iterable[pa.Table]) -> None:
    """Numbers with six digits; a header of the columns' names. Warns of cells with the same name."""
    names = list[pa.Array]()
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        for number, table in enumerate(tables):
            if number == 0:
                writer.writerow(table.column_names)
            writer.writerows(zip(*map(cells_of, table.columns), strict=True))
            names += table[CELL_ID].chunks if CELL_ID in table.column_names else []
    all_names = pa.chunked_array(names, pa.string())
    if twice := len(all_names) - pc.count_distinct(all_names).as_py():
        warn(f"{path}: {twice:,} rows repeat the {CELL_ID} of another: join it by the order of rows, not by {CELL_ID}")


def cells_of(column: pa.ChunkedArray) -> list[Any]:
    """What a .tsv holds of a column: numbers with six digits, None where a value is missing."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        return list(map("{:.6g}".format, column.to_numpy().tolist()))
    if pa.types.is_string(column.type):
        return column.to_numpy().tolist()  # a tenth of the time of to_pylist
    return column.to_pylist()


def write_npy(path: Location, chunks: Chunks, num_rows: int) -> None:
    """One matrix (cells, dims), by rows. Not mapped: a full disk would end the process."""
    with atomic_stream(path) as part, open(part, "wb") if isinstance(part, Path) else nullcontext(part) as file:
        for number, (_, vectors) in enumerate(chunks):
            (values,) = vectors.values()
            if number == 0:
                shape = (num_rows, values.shape[1])
                header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(values).data)


def write_parquet(path: Location, chunks: Chunks, metadata: Mapping[str, str]) -> int:
    """The vectors as lists of fixed size; `embedding` where an atlas has it, others after the columns -> the cells."""

    def tables() -> Iterator[pa.Table]:
        for table, vectors in chunks:
            for name, values in vectors.items():
                at = int(CELL_ID in table.column_names) if name == "embedding" else table.num_columns
                table = table.add_column(at, name, vector_list(values, values.dtype))
            yield table

    return write_tables(path, tables(), metadata)


def write_h5ad_copy(
    path: Location,
    chunks: Chunks,
    source: Cells,
    uns: Callable[[], Mapping[str, Any]],
    prefix: str,
    replaces: Collection[str],
) -> None:
    """Vectors go into the file as they come; columns, which are small, at the end."""
    from anndata import io  # half a second

    tables, arrays, start = list[pa.Table](), dict[str, Any](), 0
    with h5ad_copy(source.path, path) as file:
        source.check_same()  # the copy is of the file that was opened
        for name in [name for name in file.get("obsm", {}) if name in replaces]:
            del file["obsm"][name]
        for table, vectors in chunks:
            for name, values in vectors.items():
                if name not in arrays:
                    arrays[name] = add_obsm(file, name, source.num_rows, values.shape[1])
                arrays[name][start : start + len(values)] = values
            start += len(table)
            tables.append(compact(table.drop_columns(CELL_ID)))
        frame = pa.concat_tables(tables).unify_dictionaries().to_pandas()
        for name in frame.select_dtypes("category"):
            if not frame[name].cat.ordered:
                used = frame[name].cat.remove_unused_categories().cat
                frame[name] = used.reorder_categories(sorted(used.categories))
        if columns := {f"{prefix}{name}": column.values for name, column in frame.items()}:
            add_obs(file, columns, replaces)
        if "uns" not in file:
            file.create_group("uns").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        for key, value in uns().items():
            known = io.read_elem(file["uns"][key]) if key in file["uns"] else None
            io.write_elem(file["uns"], key, updated(known, value) if isinstance(value, Mapping) else value)


def compact(table: pa.Table) -> pa.Table:
    """Text as codes of a dictionary, which pandas takes for categories."""
    columns = [
        column.dictionary_encode() if pa.types.is_string(column.type) else column for column in table.combine_chunks()
    ]
    return pa.table(columns, names=table.column_names)


def write_new_h5ad(path: Location, table: pa.Table, vectors: Mapping[str, np.ndarray]) -> None:
    """obs is the table; its first two columns, as CELL-1, name the rows; text that is missing becomes ""."""
    from anndata import AnnData  # half a second

    obs = obs_of(table).to_pandas()
    text = obs.select_dtypes("object").columns
    obs[text] = obs[text].fillna("").astype(str)  # HDF5 has no text that is missing
    obs.index = obs.iloc[:, 0].astype(str) + "-" + obs.iloc[:, 1].astype(str)
    with atomic_write(path) as part:
        AnnData(obs=obs, obsm=dict(vectors)).write_h5ad(part)
