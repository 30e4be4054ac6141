"""The Parquet contract between the scripts: what the columns are, how rows are written and read.

    cell_id                                     string, where the cells have names
    embedding                                   fixed_size_list<float32>[dim]
    level1_system ... level4_subtype            dictionary<string>; with another tree level1_NAME, ..., 2 to 6 of them
    study                                       dictionary<string>, where the release names studies

The schema's metadata carry `cl_release`, `anchors_sha256`, `source` and `dim`; those of stratify.py's output also
`stratified`, the name of the column that its order balances.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fractal.base.cli import InputError, reason
from fractal.base.files import atomic_stream
from fractal.base.prefetch import prefetch_calls
from fractal.base.storage import Place, asking, file_system, files_of, pieces, place, sizes_below
from fractal.hierarchy.levels import LEVELS, column_names

ROW_GROUP = 65_536  # rows; 34 MB of 128-d vectors, so that reading streams
PARQUET = (".parquet", ".pq")
CELL_ID = "cell_id"  # the column of the cells' names, text
PART = 1 << 20  # cells of a file where the output is a folder of them; 540 MB of 128-d vectors
AHEAD, AHEAD_BYTES = 8, 128 << 20  # row groups of a folder or a store that are read meanwhile; at most so many bytes


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


def check_format(path: Place, read: str) -> None:
    """Raise InputError for a file whose name says that it is in a format of NOT_READ; `read` says what is read."""
    suffix = path.suffix.casefold()
    if suffix in NOT_READ and path.exists():
        raise InputError(f"{path}: {suffix} is not read; {NOT_READ[suffix]}. {read}")


class Writer:
    """Appends rows to an open Parquet file; see `writing` and `open_writer`."""

    def __init__(self, file: pq.ParquetWriter, schema: pa.Schema) -> None:
        self.file, self.schema = file, schema
        self.dtype = schema.field("embedding").type.value_type.to_pandas_dtype()

    def append(
        self,
        vectors: np.ndarray,
        columns: Sequence[tuple[np.ndarray, list[str]]],
        ids: Sequence[str] | np.ndarray | pa.Array | None = None,
    ) -> None:
        """Write one row group of an atlas: vectors (m, dim) of any float type; per text column its (m,) codes and their
        names; ids (m,) text where the file has a column `cell_id`."""
        arrays = [pa.DictionaryArray.from_arrays(codes.astype(np.int32), names) for codes, names in columns]
        names = [name for name in self.schema.names if name not in ("cell_id", "embedding")]
        if ids is not None:
            arrays, names = [pa.array(ids, pa.string()), *arrays], ["cell_id", *names]
        self.append_table(vectors, pa.table(arrays, names=names))

    def append_table(self, vectors: np.ndarray, others: pa.Table) -> None:
        """Write one row group: vectors (m, dim) of any float type, and m rows of the other columns as they are."""
        flat = pa.array(np.ascontiguousarray(vectors, self.dtype).reshape(-1))
        embedding = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        columns = [embedding if name == "embedding" else others[name] for name in self.schema.names]
        table = pa.table(columns, names=self.schema.names).cast(self.schema)
        self.file.write_table(table, row_group_size=len(vectors))


class PartsWriter(Writer):
    """Goes on with the next file, which `open_next` makes, when one has PART cells."""

    def __init__(self, open_next: Callable[[], pq.ParquetWriter], schema: pa.Schema) -> None:
        super().__init__(open_next(), schema)
        self.open_next, self.cells = open_next, 0

    def append_table(self, vectors: np.ndarray, others: pa.Table) -> None:
        if self.cells and self.cells + len(vectors) > PART:
            self.file.close()
            self.file, self.cells = self.open_next(), 0
        super().append_table(vectors, others)
        self.cells += len(vectors)


@contextmanager
def open_writer(
    path: str | Place, dim: int, others: pa.Schema, metadata: dict[str, str], dtype: Any = np.float32
) -> Iterator[Writer]:
    """Write `embedding`, vectors (dim,) of any float type, and other columns to `path`, whole or not at all.

    `cell_id`, where it is one of the others, comes first; then `embedding`, then the rest. A name with {} in it, such
    as folder/part-{}.parquet, is one file for each million cells; they appear at the end, one after the other.
    """
    field = pa.field("embedding", pa.list_(pa.from_numpy_dtype(dtype), dim), nullable=False)
    fields = sorted([field, *others], key=lambda f: (f.name != "cell_id", f.name != "embedding"))
    schema = pa.schema(fields, metadata={**metadata, "dim": str(dim)})
    names = [name for name in schema.names if name != "embedding"]
    # Vectors are stored as they are: zstd saves 8 %, after byte-stream-split 16 %, and takes nearly twice as long to
    # write (benchmarks/encodings.py). Nobody asks for their minima and maxima. Labels compress well.
    new_file = partial(
        pq.ParquetWriter,
        schema=schema,
        use_dictionary=[name for name in names if name != "cell_id"],  # no two cells share a name
        write_statistics=names,
        compression={"embedding.list.element": "none"} | dict.fromkeys(names, "zstd"),
    )
    path, numbers = place(path), count()
    with ExitStack() as files:

        def open_next() -> pq.ParquetWriter:
            here = path.with_name(path.name.replace("{}", f"{next(numbers):05}"))
            return files.enter_context(new_file(files.enter_context(atomic_stream(here))))

        if in_parts(path):
            check_parts(path)
            yield PartsWriter(open_next, schema)
        else:
            yield Writer(open_next(), schema)


def in_parts(path: Place) -> bool:
    return "{}" in path.name


def written(path: Place) -> Place:
    """What is read of what was written to `path`: of folder/part-{}.parquet the folder."""
    return path.parent if in_parts(path) else path


def check_parts(path: Place) -> None:
    """Raises InputError where files of another run would be taken for parts of this one."""
    if path.parent.is_dir() and (others := [file for file in files_of(path.parent) if file.suffix in PARQUET]):
        raise InputError(f"{path.parent}: holds {others[0].name} already; name another folder, or remove what is in it")


def writing(
    path: str | Place,
    dim: int,
    has_study: bool,
    metadata: dict[str, str],
    levels: Sequence[str] = LEVELS,
    has_ids: bool = False,
) -> AbstractContextManager[Writer]:
    """Write an atlas with these levels to `path`, whole or not at all."""
    text = pa.dictionary(pa.int32(), pa.string())
    names = [*column_names(levels), *(["study"] if has_study else [])]
    fields = [pa.field("cell_id", pa.string(), nullable=False)] if has_ids else []
    fields += [pa.field(name, text, nullable=False) for name in names]
    return open_writer(path, dim, pa.schema(fields), metadata)


def level_columns(schema: pa.Schema) -> tuple[str, ...]:
    """The columns level1_NAME, level2_NAME, ... of an atlas, coarse to fine."""
    return tuple(sorted(name for name in schema.names if re.match(r"level[1-9]_.", name)))


@contextmanager
def table_writer(path: str | Place) -> Iterator[Callable[[pa.Table], None]]:
    """Write tables to a Parquet file as they come; their columns are those of the first."""
    writers: list[pq.ParquetWriter] = []

    def write(table: pa.Table) -> None:
        if not writers:
            writers.append(pq.ParquetWriter(path, table.schema))
        writers[0].write_table(table)

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()


@contextmanager
def reading(path: str | Place) -> Iterator[None]:
    """Turn whatever Arrow says of a damaged file, or of a store, into one line that names it."""
    try:
        with asking(place(path)):
            yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a Parquet file, or damaged ({reason(error)})") from error


class ManyFiles:
    """The Parquet files of a folder as one, or a file of a store, with what is used here of pq.ParquetFile.

    The files are in the order of their names. Folders called NAME=VALUE, as Spark and Arrow write them, are columns of
    text. A row group is opened, read and let go of by itself.
    """

    def __init__(self, path: Place) -> None:
        import pyarrow.dataset as ds  # it loads pandas, .8 s, which one file does not need

        system, base = file_system(path)
        sizes = {name: size for name, size in sizes_below(path).items() if not name or name.endswith(PARQUET)}
        if not sizes:
            raise InputError(f"{path}: holds no Parquet files (their names end in .parquet)")
        keys = [part.partition("=")[0] for part in next(iter(sizes)).split("/")[:-1] if "=" in part]
        plain = ds.partitioning(pa.schema([(key, pa.string()) for key in keys]), flavor="hive")
        said = [ds.get_partition_keys(plain.parse(name)) for name in sizes]
        values = {key: pa.array(sorted({str(found[key]) for found in said if key in found})) for key in keys}
        columns = pa.schema([(key, pa.dictionary(pa.int32(), pa.string())) for key in keys])
        hive = ds.partitioning(columns, flavor="hive", dictionaries=values)
        kind = ds.ParquetFileFormat()
        files = [  # which know their size: else each is asked for it whenever it is opened
            kind.make_fragment(f"{base}/{name}".rstrip("/"), system, hive.parse(name), file_size=size)
            for name, size in sizes.items()
        ]
        schema = files[0].physical_schema
        self.schema_arrow = pa.schema([*schema, *columns], metadata=schema.metadata)
        self.data = ds.FileSystemDataset(files, self.schema_arrow, kind, system)
        split = [partial(file.split_by_row_group, schema=self.schema_arrow) for file in files]
        self.groups = list(chain.from_iterable(prefetch_calls(split, AHEAD)))  # reads the end of each file

    @property
    def metadata(self) -> "ManyFiles":
        return self

    @property
    def num_row_groups(self) -> int:
        return len(self.groups)

    @property
    def num_rows(self) -> int:
        return sum(self.row_group(i).num_rows for i in range(len(self.groups)))

    def row_group(self, i: int) -> Any:
        """With `num_rows` and `total_byte_size`."""
        return self.groups[i].row_groups[0]

    def read_row_group(self, i: int, columns: list[str] | None = None) -> pa.Table:
        return self.groups[i].to_table(schema=self.schema_arrow, columns=columns)

    def read(self, columns: list[str]) -> pa.Table:
        return self.data.to_table(columns=columns)


def open_file(path: Place) -> pq.ParquetFile | ManyFiles:
    """Raises InputError for what is not there, or is no Parquet."""
    if isinstance(path, Path) and path.is_file():
        with reading(path):
            return pq.ParquetFile(path, memory_map=True)
    if not path.exists():
        raise InputError(f"{path}: no such file; make it with ingest.py and stratify.py")
    with reading(path):
        return ManyFiles(path)


def open_parquet(path: str | Place) -> pq.ParquetFile | ManyFiles:
    """Open a Parquet file with an `embedding`, whatever else it holds; or a folder of them, or one at a URI.

    Raises InputError that says what is wrong.
    """
    file = open_file(place(path))
    with reading(path):
        schema, groups = file.schema_arrow, [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        names = schema.names
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InputError(f"{path}: has several columns called {', '.join(twice)}; rename or drop all but one")
    if "embedding" not in names:
        raise InputError(f"{path}: lacks the column embedding; make it with ingest.py")
    kind = schema.field("embedding").type
    if not is_list(kind) or not pa.types.is_floating(kind.value_type):
        raise InputError(f"{path}: 'embedding' is {kind}, expected a list of floats in each row")
    if file.metadata.num_rows == 0:
        raise InputError(f"{path}: holds no cells")
    if file.metadata.num_rows != sum(group.num_rows for group in groups):
        raise InputError(f"{path}: damaged, its row groups do not add up to its number of rows; make it again")
    # Not by the columns' own metadata: where these are damaged, Arrow may end the process.
    if pa.types.is_fixed_size_list(kind) and kind.list_size > sum(group.total_byte_size for group in groups):
        raise InputError(
            f"{path}: damaged, it is too short for one vector of {kind.list_size:,} numbers; make it again"
        )
    return file


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return (column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column).cast(pa.string())


def is_text(kind: pa.DataType) -> bool:
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in (pa.string(), pa.large_string())


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def metadata_of(schema: pa.Schema) -> dict[str, str]:
    """The metadata of a Parquet file's schema as text; bytes that are no UTF-8 are replaced."""
    return {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (schema.metadata or {}).items()}


def read_vectors(table: pa.Table, path: str | Place) -> np.ndarray:
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


def read_ahead(
    file: pq.ParquetFile | ManyFiles, groups: Iterable[int], columns: list[str] | None
) -> Iterator[pa.Table]:
    """The given row groups, one after the other; of a folder or a store, the next ones are read meanwhile."""
    reads = (partial(file.read_row_group, group, columns=columns) for group in groups)
    if not isinstance(file, ManyFiles):
        return (read() for read in reads)
    largest = max(file.row_group(i).total_byte_size for i in range(file.num_row_groups))
    return prefetch_calls(reads, max(1, min(AHEAD, AHEAD_BYTES // max(1, largest))))


def row_groups(
    path: str | Place, columns: list[str] | None = None, size: int = ROW_GROUP, groups: Sequence[int] | None = None
) -> Iterator[pa.Table]:
    """The given columns (None: all) in the order of the file, at most `size` rows at a time, in flat memory.

    groups: only these row groups, by number (None: all).
    """
    opened = open_parquet(path)
    some = range(opened.num_row_groups) if groups is None else groups
    with reading(path):
        if isinstance(opened, ManyFiles):
            for table in read_ahead(opened, some, columns):
                yield from (table.slice(start, size) for start in range(0, len(table), size))
            return
        for group in some:
            # Arrow keeps what it has read for as long as a file is open, be it in memory or in the file's map. A map
            # for each row group lets go of it, and is no burden where a foreign file is one huge row group.
            file = pq.ParquetFile(path, metadata=opened.metadata, memory_map=True)
            for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                yield pa.Table.from_batches([batch])


def vector_length(path: str | Place) -> int:
    """Of the first cell, where the column does not say it of all. Raises InputError for an empty vector."""
    file = open_parquet(path)
    kind = file.schema_arrow.field("embedding").type
    if isinstance(file, ManyFiles) and pa.types.is_fixed_size_list(kind):
        length = kind.list_size
    else:
        with reading(path):
            length = read_vectors(next(row_groups(path, ["embedding"], 1)), path).shape[1]
    if length < 1:
        raise InputError(f"{path}: its first cell has an empty vector")
    return length


def text_codes(table: pa.Table, name: str, path: str | Place) -> tuple[np.ndarray, list[str]]:
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


def fingerprint(path: str | Place) -> str:
    """sha256 of a whole file, or of all of a folder (3 s for 4 GB): it changes with any cell, and with their order."""
    path = place(path)
    if isinstance(path, Path) and not path.is_dir():
        with open(path, "rb") as file:  # Python's own error names a file that is missing, Arrow's does not
            return hashlib.file_digest(file, "sha256").hexdigest()
    found = hashlib.sha256()
    for piece in chain.from_iterable(pieces(file) for file in (files_of(path) if path.is_dir() else [path])):
        found.update(piece)
    return found.hexdigest()
