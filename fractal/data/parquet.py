"""The Parquet contract between the scripts: what the columns are, how rows are read and written.

    cell_id                                     string, where the cells have names
    embedding                                   fixed_size_list<float32>[dim]
    level1_system ... level4_subtype            dictionary<string>; with another tree level1_NAME, ..., 2 to 6 of them
    study                                       dictionary<string>, where the release names studies

The schema's metadata carry `cl_release`, `anchors_sha256`, `source` and `dim`; those of stratify.py's output also
`stratified`, the name of the column that its order balances.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from fractal.base.errors import InputError, reason
from fractal.base.files import atomic_stream
from fractal.base.prefetch import prefetch_calls
from fractal.base.storage import Location, file_system, locate, names_below, pieces, same_files, store_errors
from fractal.hierarchy.levels import LEVELS, column_names

ROW_GROUP = 65_536  # rows; 34 MB of 128-d vectors, so that reading streams
PARQUET = (".parquet", ".pq")
CELL_ID = "cell_id"  # the column of the cells' names, text
PART = 1 << 20  # cells of a file where the output is a folder of them; 540 MB of 128-d vectors
TEXT = pa.dictionary(pa.int32(), pa.string())  # of labels, which repeat
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"  # in the name of a folder: a missing value
AHEAD, AHEAD_BYTES = 8, 128 << 20  # row groups of a folder or a store that are read meanwhile; at most so many bytes
LARGE = 4 * ROW_GROUP  # rows of a row group that is read a piece at a time: a few bytes may hold millions of equal ones

MAX_TEXT = 1 << 20  # bytes of a text beside the vectors; what is done with labels takes copies of them
MAX_ROW = 1 << 16  # bytes of a row on average, once there are more than a quarter of MAX_TEXTS
MAX_TEXTS = 1 << 30  # bytes of a column in one piece: a few bytes of the file may hold a long text for each row

# Formats that people bring, and the way from there.
AS_NPY = "read it with pandas and write the numbers as .npy with numpy.save"
NOT_READ = {
    ".gz": "unpack it first (gunzip)",
    ".zip": "unpack it first",
    ".npz": "write its array as .npy with numpy.save",
    ".csv": AS_NPY,
    ".tsv": AS_NPY,
    ".txt": AS_NPY,
    ".h5mu": "write one of its modalities as .h5ad with mudata.read_h5mu(...)['rna'].write_h5ad(...)",
    ".loom": "write it as .h5ad with anndata.io.read_loom(...).write_h5ad(...)",
    ".rds": "write it as .h5ad, for example with sceasy or zellkonverter",
    ".h5": "if it is AnnData, call it .h5ad",
}


def check_format(path: Location, read: str) -> None:
    """Raise InputError for a file whose name says that it is in a format of NOT_READ; `read` says what is read."""
    suffix = path.suffix.casefold()
    if suffix in NOT_READ and path.exists():
        raise InputError(f"{path}: {suffix} is not read; {NOT_READ[suffix]}. {read}")


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: str | Location) -> Iterator[None]:
    """Turn whatever Arrow says of a damaged file, or of a store, into one line that names it."""
    try:
        with store_errors(locate(path)):
            yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a Parquet file, or damaged ({reason(error)})") from error


@dataclass(frozen=True)
class RowGroup:
    """Some rows of a table, of a Parquet file or in memory."""

    num_rows: int
    num_bytes: int
    read: Callable[[list[str] | None, int], Iterator[pa.Table]]  # columns (None: all), rows at a time


class ParquetFile:
    """One file of an atlas. Folders above it called NAME=VALUE, as Spark and Arrow write them, are columns of text."""

    def __init__(self, path: Location, name: str) -> None:
        self.system, base = file_system(path)
        self.path = f"{base}/{name}".rstrip("/")
        folders = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
        self.values = {key: None if value == HIVE_NULL else unquote(value) for key, _, value in folders}
        with self.system.open_input_file(self.path) as source:
            file = pq.ParquetFile(source)
            self.metadata, schema = file.metadata, file.schema_arrow
        fields = [field for field in schema if field.name not in self.values]
        self.schema = pa.schema([*fields, *((name, TEXT) for name in self.values)], schema.metadata)

    def row_groups(self, schema: pa.Schema) -> Iterator[RowGroup]:
        """Its row groups, whose tables get the columns and types of `schema`."""
        for number in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(number)
            yield RowGroup(group.num_rows, group.total_byte_size, partial(self.read, schema, number))

    def read(self, schema: pa.Schema, number: int, columns: list[str] | None, size: int) -> Iterator[pa.Table]:
        """One row group. It opens the file for itself, as Arrow keeps what it reads for as long as a file is open."""
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        inside = [name for name in wanted.names if name not in self.values]
        texts = [name for name in inside if is_text(self.schema.field(name).type)]  # read as codes and distinct texts
        whole = size >= self.metadata.row_group(number).num_rows
        ahead = whole and not isinstance(self.system, LocalFileSystem)
        with self.system.open_input_file(self.path) as source:
            file = pq.ParquetFile(source, metadata=self.metadata, pre_buffer=ahead, read_dictionary=texts)
            for batch in [file.read_row_group(number, inside)] if whole else file.iter_batches(size, [number], inside):
                arrays = {name: batch[name] for name in inside}
                for name in texts:
                    check_texts(arrays[name], f"{self.path}: column '{name}'")
                for name, value in self.values.items():
                    arrays[name] = pa.repeat(pa.scalar(value, pa.string()), len(batch)).cast(TEXT)
                yield pa.table({name: arrays[name] for name in wanted.names}).cast(wanted)


def check_texts(column: pa.Array | pa.ChunkedArray, where: str) -> None:
    """Raise InputError for a column, as codes and texts, that holds a longer text than any label, or too much text."""
    total = 0
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        lengths = pc.binary_length(chunk.dictionary)
        if (longest := pc.max(lengths).as_py() or 0) > MAX_TEXT:
            raise InputError(f"{where} has a text of {longest:,} bytes; cut it, or drop the column")
        total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    if total > MAX_TEXTS:
        raise InputError(f"{where} has {total:,} bytes of text in one piece; drop it, or write smaller row groups")


def one_schema(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """The columns of files that are read as one. Raises InputError that names a file with other ones.

    Numbers of several types become the widest; a column without values has any type.
    """
    first = next(iter(schemas))
    for name, schema in schemas.items():
        if twice := sorted(column for column, count in Counter(schema.names).items() if count > 1):
            raise InputError(f"{name}: has several columns called {', '.join(twice)}; rename or drop all but one")
        for other, there in (name, first), (first, name):
            if lacks := sorted(set(schemas[there].names) - set(schemas[other].names)):
                raise InputError(f"{other}: lacks the column {lacks[0]}, which {there} has; make the folder again")
        kinds = [s.field("embedding").type for s in (schema, schemas[first]) if "embedding" in s.names]
        if len(set(kinds)) > 1:
            raise InputError(f"{name}: its embedding is {kinds[0]}, that of {first} {kinds[1]}; make it again")
        try:
            pa.unify_schemas([schemas[first], schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"{name}: has columns of other types than {first} ({reason(error)})") from error
    return pa.unify_schemas(list(schemas.values()), promote_options="permissive")


@dataclass(frozen=True)
class Parquet:
    """An open table with a column `embedding`, whatever else it holds: a Parquet file, a folder, or in memory."""

    path: Location  # what messages call it
    schema: pa.Schema
    groups: list[RowGroup]
    ahead: int = 0  # row groups that threads read meanwhile
    check_same: Callable[[], None] = lambda: None  # raises InputError where a file has been replaced since then

    def __post_init__(self) -> None:
        path, schema, groups = self.path, self.schema, self.groups
        if "embedding" not in schema.names:
            raise InputError(f"{path}: lacks the column embedding; make it with ingest.py")
        kind = schema.field("embedding").type
        if not is_list(kind) or not pa.types.is_floating(kind.value_type):
            raise InputError(f"{path}: 'embedding' is {kind}, expected a list of floats in each row")
        if self.num_rows == 0:
            raise InputError(f"{path}: holds no cells")
        for group in groups:
            if group.num_bytes > MAX_TEXTS // 4 + MAX_ROW * group.num_rows:
                what = f"{group.num_rows:,} rows take {group.num_bytes:,} bytes"
                raise InputError(f"{path}: {what}, so some text in it is no label; drop its column")
        # Not by the columns' metadata: where these are damaged, Arrow may end the process.
        if pa.types.is_fixed_size_list(kind) and kind.list_size > sum(group.num_bytes for group in groups):
            raise InputError(
                f"{path}: damaged, it is too short for one vector of {kind.list_size:,} numbers; make it again"
            )

    @property
    def sizes(self) -> list[int]:
        """The rows of each row group."""
        return [group.num_rows for group in self.groups]

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)

    @staticmethod
    def open(path: str | Location) -> "Parquet":
        """A file, or all files of a folder in the order of their names. Raises InputError that says what is wrong."""
        path = locate(path)
        if not path.exists():
            raise InputError(f"{path}: no such file; make it with ingest.py and stratify.py")
        check_same = same_files(path)
        names = [name for name in names_below(path) if not name or name.endswith(PARQUET)]
        if not names:
            raise InputError(f"{path}: holds no Parquet files (their names end in .parquet)")
        with reading(path):
            files = list(prefetch_calls([partial(ParquetFile, path, name) for name in names], AHEAD))
        schema = one_schema({str(path / name): file.schema for name, file in zip(names, files, strict=True)})
        groups = list(chain.from_iterable(file.row_groups(schema) for file in files))
        if sum(group.num_rows for group in groups) != sum(file.metadata.num_rows for file in files):
            raise InputError(f"{path}: damaged, its row groups do not add up to its number of rows; make it again")
        ahead, one_here = 0, names == [""] and isinstance(path, Path)
        if not one_here and groups and max(group.num_rows for group in groups) <= LARGE:
            largest = max(group.num_bytes for group in groups)
            ahead = max(1, min(AHEAD, AHEAD_BYTES // max(1, largest)))
        return Parquet(path, schema, groups, ahead, check_same)

    @staticmethod
    def of_table(table: pa.Table) -> "Parquet":
        """A table in memory, as one row group."""

        def read(columns: list[str] | None, size: int) -> Iterator[pa.Table]:
            chosen = table if columns is None else table.select(columns)
            yield from (chosen.slice(start, size) for start in range(0, len(table), size))

        return Parquet(Path("adata"), table.schema, [RowGroup(len(table), table.nbytes, read)])

    @cached_property
    def dim(self) -> int:
        """The length of the first cell's vector. Raises InputError for an empty one."""
        kind = self.schema.field("embedding").type
        if self.ahead and pa.types.is_fixed_size_list(kind):
            length = kind.list_size
        else:  # a damaged file may claim any length
            length = read_vectors(next(self.tables(["embedding"], 1)), self.path).shape[1]
        if length < 1:
            raise InputError(f"{self.path}: its first cell has an empty vector")
        return length

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Whole columns."""
        return pa.concat_tables(self.tables(list(columns), self.num_rows))

    def tables(
        self, columns: list[str] | None = None, size: int = ROW_GROUP, groups: Iterable[int] | None = None
    ) -> Iterator[pa.Table]:
        """The given columns (None: all) in the order of the file, at most `size` rows at a time, in flat memory.

        A table lies within one row group. groups: only these row groups, by number (None: all). Raises InputError
        before the last one if a file has been replaced.
        """
        chosen = self.groups if groups is None else [self.groups[number] for number in groups]
        pieces: Iterator[pa.Table] = chain.from_iterable(group.read(columns, size) for group in chosen)
        if self.ahead:
            reads = (partial(next, group.read(columns, group.num_rows)) for group in chosen)
            whole = prefetch_calls(reads, self.ahead)
            pieces = (table.slice(start, size) for table in whole for start in range(0, len(table), size))
        left = sum(group.num_rows for group in chosen)
        with reading(self.path):
            for table in pieces:
                left -= len(table)
                if left <= 0:
                    self.check_same()
                yield table


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return (column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column).cast(pa.string())


def is_text(kind: pa.DataType) -> bool:
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in (pa.string(), pa.large_string())


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def metadata_of(schema: pa.Schema) -> dict[str, str]:
    """The metadata of a Parquet file's schema as text; bytes that are no UTF-8 are replaced."""
    return {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (schema.metadata or {}).items()}


def read_vectors(table: pa.Table, path: str | Location) -> np.ndarray:
    """The embedding column of a table -> (n, dim) float32, a view without a copy where it is one chunk of float32.

    Raises InputError for missing values, and for vectors of different lengths.
    """
    column = table["embedding"].combine_chunks()
    if column.null_count:
        raise InputError(f"{path}: {column.null_count} cells have no embedding; make it again with ingest.py")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1:
        raise InputError(f"{path}: its vectors have different lengths, {min(lengths)} to {max(lengths)} numbers")
    numbers = column.flatten()
    if numbers.null_count:
        raise InputError(f"{path}: {numbers.null_count} numbers of the embeddings are missing; make it again")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which is refused where it is used
        return numbers.to_numpy().astype(np.float32, copy=False).reshape(len(column), lengths[0] if lengths else -1)


def level_columns(schema: pa.Schema) -> tuple[str, ...]:
    """The columns level1_NAME, level2_NAME, ... of an atlas, coarse to fine."""
    return tuple(sorted(name for name in schema.names if re.match(r"level[1-9]_.", name)))


def fingerprint(path: str | Location) -> str:
    """sha256 of a whole file, or of all of a folder (3 s for 4 GB): it changes with any cell, and with their order."""
    path = locate(path)
    if isinstance(path, Path) and not path.is_dir():
        with open(path, "rb") as file:  # Python's error names a file that is missing, Arrow's does not
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for name in names_below(path) if path.is_dir() else [""]:
        for piece in pieces(path / name if name else path):
            digest.update(piece)
    return digest.hexdigest()


# --- writing ----------------------------------------------------------------------------------------------------------


def vector_list(vectors: np.ndarray, dtype: Any = np.float32) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(vectors, dtype).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def atlas_table(
    vectors: np.ndarray,
    columns: Sequence[tuple[np.ndarray, list[str]]],
    levels: Sequence[str] = LEVELS,
    cell_ids: np.ndarray | None = None,
) -> pa.Table:
    """Cells as an atlas has them: vectors (n, dim) of any float type, cell_ids (n,) text or None.

    columns: of each level, coarse to fine, and of the studies if there are any, codes (n,) int and what they stand for.
    """
    names = [*column_names(levels), "study"][: len(columns)]
    arrays: dict[str, pa.Array] = {} if cell_ids is None else {CELL_ID: pa.array(cell_ids, pa.string())}
    arrays["embedding"] = vector_list(vectors)
    for name, (codes, texts) in zip(names, columns, strict=True):
        arrays[name] = pa.DictionaryArray.from_arrays(codes.astype(np.int32), pa.array(texts, pa.string()))
    schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in arrays.items()])
    return pa.table(arrays, schema)


def write_tables(path: str | Location, tables: Iterable[pa.Table], metadata: Mapping[str, str]) -> int:
    """Write tables, whose columns are those of the first, to `path`, whole or not at all -> how many rows.

    A name with {} in it, such as folder/part-{}.parquet, is one file for each million rows; they appear at the end, one
    after the other. Raises InputError where files of another run would be taken for parts of this one.
    """
    path, most = locate(path), math.inf
    if in_parts(path):
        most, folder = PART, path.parent
        there = [name for name in names_below(folder) if name.endswith(PARQUET)] if folder.is_dir() else []
        if there:
            raise InputError(f"{folder}: holds {there[0]} already; name another folder, or remove what is in it")
    with ExitStack() as files:
        names = (path.with_name(path.name.replace("{}", f"{number:05}")) for number in count())
        targets = (files.enter_context(atomic_stream(name)) for name in names)
        target = next(targets)  # before any table is made
        schema: pa.Schema | None = None
        writer: Any = None
        rows = total = 0
        for table in tables:
            if rows and rows + len(table) > most:
                writer.close()
                target, writer, rows = next(targets), None, 0
            schema = schema or file_schema(table.schema, metadata)
            writer = writer or files.enter_context(new_file(target, schema))
            writer.write_table(table.cast(schema))
            rows, total = rows + len(table), total + len(table)
    return total


def file_schema(schema: pa.Schema, metadata: Mapping[str, str]) -> pa.Schema:
    """Of a file of such tables; that of vectors says how wide they are."""
    if "embedding" in schema.names and pa.types.is_fixed_size_list(kind := schema.field("embedding").type):
        at, metadata = schema.get_field_index("embedding"), {**metadata, "dim": str(kind.list_size)}
        schema = schema.set(at, pa.field("embedding", kind, nullable=False))
    return schema.with_metadata(metadata)


def new_file(target: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """Vectors are stored as they are: zstd saves 8 %, after byte-stream-split 16 %, and takes nearly twice as long to
    write (benchmarks/encodings.py). Nobody asks for their minima and maxima. Labels compress well."""
    names = [name for name in schema.names if name != "embedding"]
    coded = [name for name in names if name != CELL_ID]  # no two cells share a name
    compression = {"embedding.list.element": "none"} | dict.fromkeys(names, "zstd")
    return pq.ParquetWriter(target, schema, use_dictionary=coded, write_statistics=names, compression=compression)


def in_parts(path: Location) -> bool:
    return "{}" in path.name
