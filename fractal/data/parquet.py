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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fractal.base.errors import InputError, reason
from fractal.base.files import atomic_stream
from fractal.base.prefetch import prefetch_calls
from fractal.base.storage import Location, file_system, files_of, locate, pieces, same_files, sizes_below, store_errors
from fractal.hierarchy.levels import LEVELS, column_names

ROW_GROUP = 65_536  # rows; 34 MB of 128-d vectors, so that reading streams
PARQUET = (".parquet", ".pq")
CELL_ID = "cell_id"  # the column of the cells' names, text
PART = 1 << 20  # cells of a file where the output is a folder of them; 540 MB of 128-d vectors
AHEAD, AHEAD_BYTES = 8, 128 << 20  # row groups of a folder or a store that are read meanwhile; at most so many bytes
LARGE = 4 * ROW_GROUP  # rows of a row group that is read a piece at a time: a few bytes may hold millions of equal ones

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


class ManyFiles:
    """The Parquet files of a folder as one, or a file of a store, with what is used here of pq.ParquetFile.

    The files are in the order of their names. Folders called NAME=VALUE, as Spark and Arrow write them, are columns of
    text. A row group is opened, read and let go of by itself. Raises InputError for a file with other columns.
    """

    def __init__(self, path: Location) -> None:
        import pyarrow.dataset as ds  # it loads pandas, .8 s, which one file does not need

        system, base = file_system(path)
        sizes = {name: size for name, size in sizes_below(path).items() if not name or name.endswith(PARQUET)}
        if not sizes:
            raise InputError(f"{path}: holds no Parquet files (their names end in .parquet)")
        keys = [part.partition("=")[0] for part in next(iter(sizes)).split("/")[:-1] if "=" in part]
        plain = ds.partitioning(pa.schema([(key, pa.string()) for key in keys]), flavor="hive")
        parts = [ds.get_partition_keys(plain.parse(name)) for name in sizes]
        values = {key: pa.array(sorted({str(part[key]) for part in parts if key in part})) for key in keys}
        columns = pa.schema([(key, pa.dictionary(pa.int32(), pa.string())) for key in keys])
        hive = ds.partitioning(columns, flavor="hive", dictionaries=values)
        kind = ds.ParquetFileFormat()
        files = [  # which know their size: else each is asked for it whenever it is opened
            kind.make_fragment(f"{base}/{name}".rstrip("/"), system, hive.parse(name), file_size=size)
            for name, size in sizes.items()
        ]
        schemas = list(prefetch_calls([partial(getattr, file, "physical_schema") for file in files], AHEAD))
        schema = one_schema({f"{path}/{name}": schema for name, schema in zip(sizes, schemas, strict=True)})
        self.schema_arrow = pa.schema([*schema, *columns], metadata=schemas[0].metadata)
        self.data = ds.FileSystemDataset(files, self.schema_arrow, kind, system)
        split = [partial(file.split_by_row_group, schema=self.schema_arrow) for file in files]
        self.groups = list(chain.from_iterable(prefetch_calls(split, AHEAD)))
        self.num_row_groups = len(self.groups)
        self.num_rows = sum(self.row_group(i).num_rows for i in range(len(self.groups)))
        self.metadata = self

    def row_group(self, i: int) -> Any:
        """With `num_rows` and `total_byte_size`."""
        return self.groups[i].row_groups[0]

    def read_row_group(self, i: int, columns: list[str] | None = None) -> pa.Table:
        return self.groups[i].to_table(schema=self.schema_arrow, columns=columns)

    def batches(self, i: int, columns: list[str] | None, size: int) -> Iterator[pa.Table]:
        """A row group, `size` rows at a time; Arrow's datasets would decode all of it at once."""
        import pyarrow.dataset as ds

        group, names = self.groups[i], columns or self.schema_arrow.names
        values = ds.get_partition_keys(group.partition_expression)
        inside = [name for name in names if name not in values]
        with group.open() as source:
            for batch in pq.ParquetFile(source).iter_batches(size, [group.row_groups[0].id], inside):
                columns_of = {name: batch[name] for name in inside}
                for name in values.keys() & set(names):
                    columns_of[name] = pa.DictionaryArray.from_arrays(np.zeros(len(batch), np.int32), [values[name]])
                yield pa.table({name: columns_of[name] for name in names})

    def read(self, columns: list[str]) -> pa.Table:
        return self.data.to_table(columns=columns)


def one_schema(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """The columns of files that are read as one. Raises InputError that names a file with other ones.

    Numbers of several types become the widest; a column without values has any type.
    """
    first = next(iter(schemas))
    for name, schema in schemas.items():
        for other, there, missing in (name, first, schemas[first].names), (first, name, schema.names):
            if lacks := sorted(set(missing) - set(schemas[other].names)):
                raise InputError(f"{other}: lacks the column {lacks[0]}, which {there} has; make the folder again")
        for column in {"embedding"} & set(schema.names):
            kinds = [s.field(column).type for s in (schema, schemas[first])]
            if kinds[0] != kinds[1]:
                raise InputError(f"{name}: its {column} is {kinds[0]}, that of {first} {kinds[1]}; make it again")
        try:
            pa.unify_schemas([schemas[first], schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"{name}: has columns of other types than {first} ({reason(error)})") from error
    return pa.unify_schemas(list(schemas.values()), promote_options="permissive")


class TableFile:
    """A table in memory, with what is used here of pq.ParquetFile: one row group."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.schema_arrow, self.metadata, self.num_row_groups = table, table.schema, self, 1
        self.num_rows, self.total_byte_size = len(table), table.nbytes

    def row_group(self, _: int) -> "TableFile":
        return self

    def read_row_group(self, _: int, columns: list[str] | None = None) -> pa.Table:
        return self.table if columns is None else self.table.select(columns)

    def read(self, columns: list[str]) -> pa.Table:
        return self.table.select(columns)


class Parquet:
    """An open table with a column `embedding`, whatever else it holds: a Parquet file, a folder, one at a URI.

    `sizes` are the rows of its row groups. Raises InputError that says what is wrong with it.
    """

    def __init__(self, path: Location, file: pq.ParquetFile | ManyFiles | TableFile) -> None:
        self.path, self.file = path, file
        self.check_same = (lambda: None) if isinstance(file, TableFile) else same_files(path)
        with reading(path):
            self.schema = file.schema_arrow
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        self.sizes, self.num_rows = [group.num_rows for group in groups], file.metadata.num_rows
        self.largest = max((group.total_byte_size for group in groups), default=0)
        if twice := sorted(name for name, count in Counter(self.schema.names).items() if count > 1):
            raise InputError(f"{path}: has several columns called {', '.join(twice)}; rename or drop all but one")
        if "embedding" not in self.schema.names:
            raise InputError(f"{path}: lacks the column embedding; make it with ingest.py")
        kind = self.schema.field("embedding").type
        if not is_list(kind) or not pa.types.is_floating(kind.value_type):
            raise InputError(f"{path}: 'embedding' is {kind}, expected a list of floats in each row")
        if self.num_rows == 0:
            raise InputError(f"{path}: holds no cells")
        if self.num_rows != sum(self.sizes):
            raise InputError(f"{path}: damaged, its row groups do not add up to its number of rows; make it again")
        # Not by the columns' metadata: where these are damaged, Arrow may end the process.
        if pa.types.is_fixed_size_list(kind) and kind.list_size > sum(group.total_byte_size for group in groups):
            raise InputError(
                f"{path}: damaged, it is too short for one vector of {kind.list_size:,} numbers; make it again"
            )

    @staticmethod
    def open(path: str | Location) -> "Parquet":
        path = locate(path)
        is_file = isinstance(path, Path) and path.is_file()
        if not is_file and not path.exists():
            raise InputError(f"{path}: no such file; make it with ingest.py and stratify.py")
        with reading(path):
            file = pq.ParquetFile(path, memory_map=True) if is_file else ManyFiles(path)
        return Parquet(path, file)

    @cached_property
    def dim(self) -> int:
        """The length of the first cell's vector. Raises InputError for an empty one."""
        kind = self.schema.field("embedding").type
        if not isinstance(self.file, pq.ParquetFile) and pa.types.is_fixed_size_list(kind):
            length = kind.list_size
        else:  # a damaged file may claim any length
            length = read_vectors(next(self.tables(["embedding"], 1)), self.path).shape[1]
        if length < 1:
            raise InputError(f"{self.path}: its first cell has an empty vector")
        return length

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Whole columns."""
        with reading(self.path):
            table = self.file.read(columns=list(columns))
        self.check_same()
        return table

    def groups(self, numbers: Iterable[int], columns: list[str] | None) -> Iterator[pa.Table]:
        """Row groups, one after the other; of a folder or a store, the next ones are read meanwhile."""
        numbers = list(numbers)
        reads = (partial(self.file.read_row_group, number, columns=columns) for number in numbers)
        ahead = max(1, min(AHEAD, AHEAD_BYTES // max(1, self.largest)))
        tables = prefetch_calls(reads, ahead) if isinstance(self.file, ManyFiles) else (read() for read in reads)
        with reading(self.path):
            yield from self.checked(tables, sum(self.sizes[number] for number in numbers))

    def checked(self, tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
        """The same tables of `num_rows` rows. Raises InputError before the last one if the file has been replaced."""
        rows = 0
        for table in tables:
            rows += len(table)
            if rows >= num_rows:
                self.check_same()
            yield table

    def tables(
        self, columns: list[str] | None = None, size: int = ROW_GROUP, groups: Sequence[int] | None = None
    ) -> Iterator[pa.Table]:
        """The given columns (None: all) in the order of the file, at most `size` rows at a time, in flat memory.

        groups: only these row groups, by number (None: all).
        """
        numbers = range(len(self.sizes)) if groups is None else groups
        if isinstance(self.file, TableFile) or (isinstance(self.file, ManyFiles) and max(self.sizes) <= LARGE):
            for table in self.groups(numbers, columns):
                yield from (table.slice(start, size) for start in range(0, len(table), size))
            return
        with reading(self.path):
            yield from self.checked(self.batches(columns, size, numbers), sum(self.sizes[i] for i in numbers))

    def batches(self, columns: list[str] | None, size: int, numbers: Iterable[int]) -> Iterator[pa.Table]:
        if isinstance(self.file, ManyFiles):
            yield from chain.from_iterable(self.file.batches(number, columns, size) for number in numbers)
            return
        # Arrow keeps what it has read for as long as a file is open, be it in memory or in the file's map. A map for
        # each row group lets go of it, and is no burden where a foreign file is one huge row group.
        for number in numbers:
            file = pq.ParquetFile(self.path, metadata=self.file.metadata, memory_map=True)
            for batch in file.iter_batches(size, row_groups=[number], columns=columns):
                yield pa.Table.from_batches([batch])

    def vectors(self) -> Iterator[np.ndarray]:
        """All vectors in the order of the file, (m, dim) float32 with m <= ROW_GROUP, in flat memory."""
        for table in self.tables(["embedding"]):
            yield read_vectors(table, self.path)


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
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1:
        raise InputError(f"{path}: its vectors have different lengths, {min(lengths)} to {max(lengths)} numbers")
    numbers = column.flatten()
    if numbers.null_count:
        raise InputError(f"{path}: {numbers.null_count} numbers of the embeddings are missing; make it again")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which is refused where it is used
        return numbers.to_numpy().astype(np.float32, copy=False).reshape(len(column), lengths[0] if lengths else -1)


def text_codes(table: pa.Table, name: str, path: str | Location) -> tuple[np.ndarray, list[str]]:
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
        raise InputError(f"{path}: damaged, the {name} of a cell is none of the column's names; make it again")
    used = np.flatnonzero(np.bincount(codes, minlength=len(names))).tolist()
    used.sort(key=names.__getitem__)
    renumber = np.zeros(len(names), np.int32)
    renumber[used] = np.arange(len(used))
    return renumber[codes], [names[code] for code in used]


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
    for piece in chain.from_iterable(pieces(file) for file in (files_of(path) if path.is_dir() else [path])):
        digest.update(piece)
    return digest.hexdigest()


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Appends rows to a Parquet file that `open_next` opens, or to the next one when one has `part` cells."""

    def __init__(self, open_next: Callable[[], pq.ParquetWriter], schema: pa.Schema, part: float) -> None:
        self.file, self.open_next, self.schema, self.part, self.cells = open_next(), open_next, schema, part, 0
        self.dtype = schema.field("embedding").type.value_type.to_pandas_dtype()

    def append(
        self,
        vectors: np.ndarray,
        columns: Sequence[tuple[np.ndarray, list[str]]],
        names: Sequence[str] | np.ndarray | None = None,
    ) -> None:
        """Write one row group of an atlas.

        vectors (m, dim) of any float type; per text column its (m,) codes and what they stand for; names (m,) text
        where the file has a column `cell_id`.
        """
        arrays = [pa.DictionaryArray.from_arrays(codes.astype(np.int32), texts) for codes, texts in columns]
        others = [name for name in self.schema.names if name not in (CELL_ID, "embedding")]
        if names is not None:
            arrays, others = [pa.array(names, pa.string()), *arrays], [CELL_ID, *others]
        self.append_table(vectors, pa.table(arrays, names=others))

    def append_table(self, vectors: np.ndarray, others: pa.Table) -> None:
        """Write one row group: vectors (m, dim) of any float type, and m rows of the other columns as they are."""
        if self.cells and self.cells + len(vectors) > self.part:
            self.file.close()
            self.file, self.cells = self.open_next(), 0
        columns = [vector_list(vectors, self.dtype) if n == "embedding" else others[n] for n in self.schema.names]
        table = pa.table(columns, names=self.schema.names).cast(self.schema)
        self.file.write_table(table, row_group_size=len(vectors))
        self.cells += len(vectors)


def vector_list(vectors: np.ndarray, dtype: Any = np.float32) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(vectors, dtype).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


@contextmanager
def open_writer(
    path: str | Location, dim: int, others: pa.Schema, metadata: Mapping[str, str], dtype: Any = np.float32
) -> Iterator[Writer]:
    """Write `embedding`, vectors (dim,) of any float type, and other columns to `path`, whole or not at all.

    `cell_id`, where it is one of the others, comes first; then `embedding`, then the rest. A name with {} in it, such
    as folder/part-{}.parquet, is one file for each million cells; they appear at the end, one after the other. Raises
    InputError where files of another run would be taken for parts of this one.
    """
    field = pa.field("embedding", pa.list_(pa.from_numpy_dtype(dtype), dim), nullable=False)
    fields = sorted([field, *others], key=lambda f: (f.name != CELL_ID, f.name != "embedding"))
    schema = pa.schema(fields, metadata={**metadata, "dim": str(dim)})
    names = [name for name in schema.names if name != "embedding"]
    # Vectors are stored as they are: zstd saves 8 %, after byte-stream-split 16 %, and takes nearly twice as long to
    # write (benchmarks/encodings.py). Nobody asks for their minima and maxima. Labels compress well.
    new_file = partial(
        pq.ParquetWriter,
        schema=schema,
        use_dictionary=[name for name in names if name != CELL_ID],  # no two cells share a name
        write_statistics=names,
        compression={"embedding.list.element": "none"} | dict.fromkeys(names, "zstd"),
    )
    path, numbers = locate(path), count()
    folder = path.parent
    if in_parts(path) and folder.is_dir() and (there := [f for f in files_of(folder) if f.suffix in PARQUET]):
        raise InputError(f"{folder}: holds {there[0].name} already; name another folder, or remove what is in it")
    with ExitStack() as files:

        def open_next() -> pq.ParquetWriter:
            here = path.with_name(path.name.replace("{}", f"{next(numbers):05}"))
            return files.enter_context(new_file(files.enter_context(atomic_stream(here))))

        yield Writer(open_next, schema, PART if in_parts(path) else math.inf)


def in_parts(path: Location) -> bool:
    return "{}" in path.name


def writing(
    path: str | Location,
    dim: int,
    has_study: bool,
    metadata: Mapping[str, str],
    levels: Sequence[str] = LEVELS,
    has_ids: bool = False,
) -> AbstractContextManager[Writer]:
    """Write an atlas with these levels to `path`, whole or not at all."""
    text = pa.dictionary(pa.int32(), pa.string())
    names = [*column_names(levels), *(["study"] if has_study else [])]
    fields = [pa.field(CELL_ID, pa.string(), nullable=False)] if has_ids else []
    return open_writer(path, dim, pa.schema([*fields, *(pa.field(n, text, nullable=False) for n in names)]), metadata)


@contextmanager
def table_writer(path: str | Location) -> Iterator[Callable[[pa.Table], None]]:
    """Write tables to a Parquet file as they come; their columns are those of the first."""
    with ExitStack() as stack:
        opened = list[pq.ParquetWriter]()

        def write(table: pa.Table) -> None:
            if not opened:
                opened.append(stack.enter_context(pq.ParquetWriter(path, table.schema)))
            opened[0].write_table(table)

        yield write
