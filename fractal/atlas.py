"""The Parquet contract between the scripts: what the columns are, how rows are written, read and split.

    embedding                                   fixed_size_list<float32>[dim]
    level1_system ... level4_subtype            dictionary<string>
    study                                       dictionary<string>, where the release names studies

The schema's metadata carry `cl_release`, `anchors_sha256`, `source` and `dim`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fractal.cli import InputError, reason
from fractal.files import atomic_write

LEVELS = ("system", "lineage", "type", "subtype")  # coarse to fine, in the words of tables and JSON
LEVEL_COLUMNS = ("level1_system", "level2_lineage", "level3_type", "level4_subtype")
ROW_GROUP = 65_536  # rows; 34 MB of 128-d vectors, so that reading streams


class Writer:
    """Appends rows to an open Parquet file; see `writing`."""

    def __init__(self, file: pq.ParquetWriter, schema: pa.Schema) -> None:
        self.file, self.schema = file, schema

    def append(self, vectors: np.ndarray, columns: Sequence[tuple[np.ndarray, list[str]]]) -> None:
        """Write one row group: vectors (m, dim) float32, and per text column its (m,) codes and their names."""
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
        arrays = [pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])]
        arrays += [pa.DictionaryArray.from_arrays(codes.astype(np.int32), names) for codes, names in columns]
        self.file.write_table(pa.Table.from_arrays(arrays, schema=self.schema), row_group_size=len(vectors))


@contextmanager
def writing(path: str | Path, dim: int, has_study: bool, metadata: dict[str, str]) -> Iterator[Writer]:
    """Write an atlas to `path`, whole or not at all."""
    text = pa.dictionary(pa.int32(), pa.string())
    fields = [pa.field("embedding", pa.list_(pa.float32(), dim), nullable=False)]
    fields += [pa.field(name, text, nullable=False) for name in LEVEL_COLUMNS + (("study",) if has_study else ())]
    schema = pa.schema(fields, metadata={**metadata, "dim": str(dim)})
    labels = [field.name for field in fields[1:]]
    with (
        atomic_write(path) as part,
        # Vectors are stored as they are: zstd saves 8 %, after byte-stream-split 16 %, and takes nearly twice as long
        # to write (benchmarks/encodings.py). Nobody asks for their minima and maxima. Labels compress well.
        pq.ParquetWriter(
            part,
            schema,
            use_dictionary=labels,
            write_statistics=labels,
            compression={"embedding.list.element": "none"} | dict.fromkeys(labels, "zstd"),
        ) as file,
    ):
        yield Writer(file, schema)


@dataclass(frozen=True)
class Cells:
    """Some rows of an atlas: vectors (n, dim) float32, labels (n, 4) int64 and the names behind the labels."""

    vectors: np.ndarray
    labels: np.ndarray
    classes: list[list[str]]  # per level, sorted; label c of level k is classes[k][c]


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever Arrow says of a damaged file into one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a Parquet file, or damaged ({reason(error)})") from error


def open_atlas(path: str | Path) -> pq.ParquetFile:
    """Open an atlas and check its columns. Raises InputError that says what is missing."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; make it with ingest.py and stratify.py")
    with reading(path):
        file = pq.ParquetFile(path, memory_map=True)
    schema = file.schema_arrow
    missing = [name for name in ("embedding", *LEVEL_COLUMNS) if name not in schema.names]
    if missing:
        raise InputError(f"{path}: lacks the columns {', '.join(missing)}; make it with ingest.py")
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32():
        raise InputError(f"{path}: 'embedding' is {kind}, expected fixed_size_list<float32>")
    dim, groups = kind.list_size, [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    for name in (*LEVEL_COLUMNS, *(["study"] if "study" in schema.names else [])):
        kind = schema.field(name).type
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if text not in (pa.string(), pa.large_string()):
            raise InputError(f"{path}: '{name}' is {kind}, expected text; make it with ingest.py")
    if file.metadata.num_rows == 0:
        raise InputError(f"{path}: holds no cells")
    if file.metadata.num_rows != sum(group.num_rows for group in groups):
        raise InputError(f"{path}: damaged, its row groups do not add up to its number of rows; make it again")
    # Not by the columns' own metadata: where these are damaged, Arrow may end the process.
    if dim > sum(group.total_byte_size for group in groups):
        raise InputError(f"{path}: damaged, it is too short for one vector of {dim:,} numbers; make it again")
    return file


def read_vectors(table: pa.Table, path: str | Path) -> np.ndarray:
    """The embedding column of a table -> (n, dim) float32, a view without a copy where it is one chunk."""
    column = table["embedding"].combine_chunks()
    if column.null_count:
        raise InputError(f"{path}: {column.null_count} cells have no embedding; make it again with ingest.py")
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    numbers = column.flatten()
    if numbers.null_count:
        raise InputError(f"{path}: {numbers.null_count} numbers of the embeddings are missing; make it again")
    return numbers.to_numpy().reshape(len(column), column.type.list_size)


def usable(vectors: np.ndarray) -> np.ndarray:
    """(n,) bool: finite and not zero, and so is the square of the length."""
    norm = np.einsum("ij,ij->i", vectors, vectors)
    return np.isfinite(norm) & (norm > 0)


def iter_vectors(path: str | Path) -> Iterator[np.ndarray]:
    """The whole embedding column in the order of the file, (m, dim) float32 with m <= ROW_GROUP, in flat memory."""
    metadata = open_atlas(path).metadata
    with reading(path):
        for group in range(metadata.num_row_groups):
            # Arrow keeps what it has read for as long as a file is open, be it in memory or in the file's map. A map
            # for each row group lets go of it, and is no burden where a foreign file is one huge row group.
            file = pq.ParquetFile(path, metadata=metadata, memory_map=True)
            for batch in file.iter_batches(ROW_GROUP, row_groups=[group], columns=["embedding"]):
                yield read_vectors(pa.Table.from_batches([batch]), path)


def text_codes(table: pa.Table, name: str, path: str | Path) -> tuple[np.ndarray, list[str]]:
    """A text column of a table -> its (n,) int32 codes and their names, sorted, without those that do not occur."""
    column = table[name]
    if column.null_count:
        raise InputError(f"{path}: {column.null_count} cells have no {name}; make it again with ingest.py")
    with reading(path):
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        column = column.unify_dictionaries().combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        codes, names = column.indices.to_numpy(), column.dictionary.to_pylist()
    if not ((codes >= 0) & (codes < len(names))).all():  # Arrow does not look
        raise InputError(f"{path}: damaged, some cells' {name} is none of the column's names; make it again")
    used = np.flatnonzero(np.bincount(codes, minlength=len(names))).tolist()
    used.sort(key=names.__getitem__)
    renumber = np.zeros(len(names), np.int32)
    renumber[used] = np.arange(len(used))
    return renumber[codes], [names[code] for code in used]


def read_rows(path: str | Path, rows: np.ndarray) -> Cells:
    """Read the given rows, in the given order; only row groups that hold one of them are touched.

    Memory is that of the result and one row group. Raises InputError for vectors that are zero or not finite.
    """
    file = open_atlas(path)
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    vectors = np.empty((len(rows), file.schema_arrow.field("embedding").type.list_size), np.float32)
    tables, start = [], 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        lo, hi = np.searchsorted(ascending, [start, stop])
        if hi > lo:
            with reading(path):
                table = file.read_row_group(group, columns=["embedding", *LEVEL_COLUMNS])
            chosen = ascending[lo:hi] - start
            found = read_vectors(table, path)[chosen]
            if not usable(found).all():
                raise InputError(f"{path}: some embeddings are zero or not finite; make it again with ingest.py")
            vectors[order[lo:hi]] = found
            tables.append(table.select(LEVEL_COLUMNS).take(pa.array(chosen)))
        start = stop
    back = np.argsort(order)  # from ascending to the order asked for
    columns = [text_codes(pa.concat_tables(tables), name, path) for name in LEVEL_COLUMNS]
    labels = np.stack([codes[back] for codes, _ in columns], axis=1).astype(np.int64)
    return Cells(vectors, labels, [names for _, names in columns])


def path_counts(path: str | Path, keep: np.ndarray) -> dict[tuple[str, ...], int]:
    """How many of the kept rows, a mask (num_rows,), lie on each path of labels: (system, ..., subtype) -> count."""
    with reading(path):
        labels = open_atlas(path).read(columns=list(LEVEL_COLUMNS)).unify_dictionaries()
        counts = labels.filter(pa.array(keep)).group_by(LEVEL_COLUMNS).aggregate([([], "count_all")])
    columns = [counts[name].to_pylist() for name in (*LEVEL_COLUMNS, "count_all")]
    return {tuple(names): count for *names, count in zip(*columns, strict=True)}


def fingerprint(path: str | Path) -> str:
    """sha256 of the whole file (3 s for 4 GB): it changes with any cell, and with the order of the rows."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_codes(path: str | Path, name: str) -> tuple[np.ndarray, list[str]]:
    """-> the (num_rows,) int32 codes of a text column and their names, sorted."""
    file = open_atlas(path)
    with reading(path):
        return text_codes(file.read(columns=[name]), name, path)


def study_codes(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """-> the study of every row (num_rows,) and the studies' names. Raises InputError for an atlas without studies."""
    if "study" not in open_atlas(path).schema_arrow.names:
        raise InputError(f"{path}: has no column 'study', so no study can be held out; hold out cells instead")
    return read_codes(path, "study")
