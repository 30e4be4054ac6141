"""The stages of the pipeline in pieces, for an engine that runs them on many machines (Ray Data).

Every stage is the same: the first process reads the labels and plans; then each task reads a piece of the input, a row
group, and writes a part of the output, a Parquet file in the output's folder. The parts in the order of their names are
row for row what the single-machine script writes into one file. A part appears whole or not at all, and is the same
however often its task runs: where a worker is killed, its tasks run again, nothing is lost and nothing is there twice.

Cells never pass through the engine's own memory, only the numbers of tasks and of cells do. What tasks must know of the
plan (an order, the cells' classes) lies in .npy files beside the output, of which a task maps its rows. So input and
output must be paths that all machines see.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fractal.annotate.bundle import Bundle, read_bundle
from fractal.base.cli import InputError
from fractal.base.files import atomic_folder, atomic_write
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells, parquet_cells
from fractal.data.h5ad import find_embedding, obs_names, open_h5ad
from fractal.data.ingestion import Plan
from fractal.data.outputs import write_parquet
from fractal.data.parquet import (
    CELL_ID,
    ROW_GROUP,
    level_columns,
    metadata_of,
    open_parquet,
    open_writer,
    read_vectors,
    reading,
    table_writer,
)
from fractal.data.reorder import round_robin
from fractal.data.scimilarity import Release, map_records
from fractal.data.vectors import CHUNK, refuse, usable
from fractal.model.embedding import Embedder, embed_matrix

Task = Callable[[int], int]  # the number of a part -> how many cells it has
Engine = Callable[[Task, int, str], Iterator[int]]  # runs the tasks 0 ... n - 1, in any order -> their cells


def one_by_one(task: Task, count: int, _: str = "") -> Iterator[int]:
    """The engine for one process."""
    return map(task, range(count))


@dataclass(frozen=True)
class Pieces:
    """The row groups of a Parquet file, or of the files of a folder by name."""

    groups: list[tuple[Path, int]]  # file, and number of the row group in it
    starts: np.ndarray  # (groups + 1,) int64: the number of each one's first row, and of all rows

    @staticmethod
    def of(path: Path) -> "Pieces":
        """Raises InputError for a folder without Parquet files, and for files with different columns."""
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: holds no .parquet files")
        opened = [open_parquet(file) for file in files]
        for file, other in zip(files, opened, strict=True):
            if other.schema_arrow != opened[0].schema_arrow:
                raise InputError(f"{file}: has other columns than {files[0]}; make the folder again")
        groups = [(path, i) for path, file in zip(files, opened, strict=True) for i in range(file.num_row_groups)]
        sizes = [file.metadata.row_group(i).num_rows for file in opened for i in range(file.num_row_groups)]
        return Pieces(groups, np.cumsum([0, *sizes]))

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    @property
    def schema(self) -> pa.Schema:
        return open_parquet(self.groups[0][0]).schema_arrow

    def source(self, number: int) -> Cells:
        """One of them, as `fractal embed` opens a whole file."""
        path, group = self.groups[number]
        return parquet_cells(path, [group])

    def read(self, number: int) -> pa.Table:
        path, group = self.groups[number]
        with reading(path):
            return pq.ParquetFile(path).read_row_group(group)


def part_name(number: int) -> str:
    return f"part-{number:06}.parquet"


@contextmanager
def parts_folder(output: Path, count: int) -> Iterator[tuple[Path, Path]]:
    """-> a folder for `count` parts, which becomes `output` once they are all there, and one for plans, removed then.

    Raises InputError for an output that holds anything but parts.
    """
    names = {part_name(i) for i in range(count)} | {path.name for path in output.glob("part-*.parquet")}
    with atomic_folder(output, names) as folder:
        plans = folder.with_name("plans")
        plans.mkdir()
        yield folder, plans
        for leftover in set(folder.iterdir()) - {folder / name for name in names}:
            shutil.rmtree(leftover)  # of a worker that was killed, on a file system without locks


# --- embed and annotate: a task for each row group --------------------------------------------------------------------


@lru_cache(maxsize=1)  # once in each worker
def open_embedder(path: Path) -> Embedder:
    return Embedder.open(path)


@dataclass(frozen=True)
class Embed:
    """A row group of a Parquet file -> the same cells with their fractal vectors."""

    pieces: Pieces
    folder: Path
    model: Path
    prefix: int | None
    metadata: Mapping[str, str]

    def __call__(self, number: int) -> int:
        source = self.pieces.source(number)
        adapter = open_embedder(self.model).adapter
        dim = (self.prefix or adapter.num_levels) * adapter.scale_dim
        part = self.folder / part_name(number)
        with write_parquet(part, source, dim, np.dtype(np.float32), dict(self.metadata)) as write:
            for columns, vectors in source.chunks(ROW_GROUP, strict=True):
                write(columns, embed_matrix(adapter, vectors, self.prefix)[0])
        return source.num_rows


def embed(
    pieces: Pieces, model: Path, output: Path, prefix: int | None, metadata: Mapping[str, str], engine: Engine
) -> int:
    """`fractal embed` in parts -> how many cells."""
    with parts_folder(output, len(pieces.groups)) as (folder, _):
        return sum(engine(Embed(pieces, folder, model, prefix, metadata), len(pieces.groups), "embed"))


@lru_cache(maxsize=1)
def open_bundle(path: Path, keep: bytes | None) -> Bundle:
    bundle = read_bundle(path)
    return bundle if keep is None else bundle.restricted(np.frombuffer(keep, bool))


@dataclass(frozen=True)
class Annotate:
    """A row group of a Parquet file -> a table of answers, as `fractal annotate` writes it."""

    pieces: Pieces
    folder: Path
    reference: Path
    keep: bytes | None  # mask of the reference's paths, where --only and --exclude leave some out
    confidence: float
    novelty: str

    def __call__(self, number: int) -> int:
        source = self.pieces.source(number)
        bundle = open_bundle(self.reference, self.keep)
        with atomic_write(self.folder / part_name(number)) as part, table_writer(part) as write:
            for table, chunk in source.chunks(CHUNK):
                good = usable(chunk)
                some = chunk[good]
                answer = bundle.answer(some, self.confidence, self.novelty)
                columns = bundle.columns(answer, good, bundle.best_excluded(some))
                ids = {CELL_ID: table[CELL_ID]} if source.has_names else {}
                write(pa.table(ids | {name: pa.array(values) for name, values in columns.items()}))
        return source.num_rows


def annotate(
    pieces: Pieces,
    reference: Path,
    output: Path,
    keep: np.ndarray | None,
    confidence: float,
    novelty: str,
    engine: Engine,
) -> int:
    """`fractal annotate` in parts -> how many cells."""
    mask = None if keep is None else keep.tobytes()
    with parts_folder(output, len(pieces.groups)) as (folder, _):
        task = Annotate(pieces, folder, reference, mask, confidence, novelty)
        return sum(engine(task, len(pieces.groups), "annotate"))


# --- stratify: a sort, as every engine's shuffle is one ---------------------------------------------------------------


@dataclass(frozen=True)
class Deal:
    """First half of the sort: some row groups -> a file of their rows, in the order of their places."""

    pieces: Pieces
    places: Path  # .npy: the place of each row in the output, (num_rows,) int64
    runs: Path
    first: np.ndarray  # (tasks + 1,): the first row group of each task

    def __call__(self, number: int) -> int:
        groups = range(self.first[number], self.first[number + 1])
        start, stop = self.pieces.starts[groups.start], self.pieces.starts[groups.stop]
        place = np.load(self.places, mmap_mode="r")[start:stop]
        order = np.argsort(place)
        table = pa.concat_tables([self.pieces.read(group) for group in groups]).unify_dictionaries()
        table = table.append_column("place", pa.array(place)).take(pa.array(order)).combine_chunks()
        with atomic_write(self.runs / f"{number}.arrow") as path, pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        return len(place)


@dataclass(frozen=True)
class Gather:
    """Second half: the rows of one part, out of the files of all tasks of the first half."""

    runs: Path
    folder: Path
    rows_per_part: int
    num_rows: int
    num_runs: int
    others: pa.Schema
    metadata: Mapping[str, str]

    def __call__(self, number: int) -> int:
        start = number * self.rows_per_part
        stop = min(start + self.rows_per_part, self.num_rows)
        found = []
        for run in range(self.num_runs):
            with pa.memory_map(str(self.runs / f"{run}.arrow")) as file:
                table = pa.ipc.open_file(file).read_all()
                lo, hi = np.searchsorted(table["place"].to_numpy(), [start, stop])
                found.append(table[lo:hi])
        table = pa.concat_tables(found).unify_dictionaries()
        place = table["place"].to_numpy()
        order = np.argsort(place)
        if not np.array_equal(place[order], np.arange(start, stop)):
            raise InputError(f"{self.runs}: rows are missing or there twice; run it again")
        table = table.take(pa.array(order))
        vectors = read_vectors(table, self.runs)
        part = self.folder / part_name(number)
        with open_writer(part, vectors.shape[1], self.others, dict(self.metadata)) as writer:
            for first in range(0, len(vectors), ROW_GROUP):
                some = slice(first, first + ROW_GROUP)
                writer.append_table(vectors[some], table[some].select(self.others.names))
        return len(vectors)


def stratify(pieces: Pieces, output: Path, seed: int, rows_per_task: int, engine: Engine) -> int:
    """stratify.py in parts -> how many cells. Memory of a task: about twice `rows_per_task` rows.

    The first process draws the order from the labels alone, 70 bytes a cell. The temporary files beside the output take
    as much room as the cells.
    """
    schema = pieces.schema
    finest = level_columns(schema)[-1]
    order = round_robin(read_labels(pieces, finest), seed)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    others = schema.remove(schema.get_field_index("embedding"))
    rows_per_part = max(1, rows_per_task // ROW_GROUP) * ROW_GROUP
    owner = pieces.starts[:-1] // rows_per_part
    first = np.append(np.flatnonzero(np.diff(owner, prepend=-1)), len(owner))
    count = -(-len(order) // rows_per_part)
    with parts_folder(output, count) as (folder, plans):
        np.save(plans / "places.npy", place)
        del order, place
        deal = Deal(pieces, plans / "places.npy", plans, first)
        if sum(engine(deal, len(first) - 1, "deal")) != pieces.num_rows:
            raise InputError(f"{output}: rows were lost on the way; run it again")
        metadata = {**metadata_of(schema), "stratified": finest}
        gather = Gather(plans, folder, rows_per_part, pieces.num_rows, len(first) - 1, others, metadata)
        return sum(engine(gather, count, "gather"))


def read_labels(pieces: Pieces, column: str) -> np.ndarray:
    """(num_rows,) int codes of a text column over all files, numbered by the names that occur in any, sorted."""
    found = [Atlas.open(path).codes(column) for path in dict.fromkeys(path for path, _ in pieces.groups)]
    names = sorted(set().union(*(names for _, names in found)))
    return np.concatenate([np.searchsorted(names, own).astype(np.int32)[codes] for codes, own in found])


# --- ingest: a task for each 65,536 cells of a release or an .h5ad ----------------------------------------------------


@dataclass(frozen=True)
class Ingest:
    """Cells of a release, or of an .h5ad, in the order of their labels -> a part of an atlas."""

    plan: Plan  # without the arrays of all cells, which are mapped
    plans: Path
    folder: Path
    source: Path  # the release's index, or the .h5ad
    obsm: str  # of an .h5ad
    record: np.dtype | None  # of a release's index: how a cell lies there

    def cells(self, rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """-> (m, dim) float32, and the cells' names of an .h5ad."""
        if self.record is not None:
            numbers = np.load(self.plans / "records.npy", mmap_mode="r")[rows]
            first = int(numbers.min())
            records = map_records(self.source, self.record, first, int(numbers.max()) + 1 - first)
            return records["vector"][numbers - first], None
        with open_h5ad(self.source) as file:
            array = find_embedding(file.get("obsm", {}), file.get("X"), self.source, self.obsm)
            return np.ascontiguousarray(array[rows], np.float32), obs_names(file, self.source)(rows)

    def __call__(self, number: int) -> int:
        start = number * ROW_GROUP
        classes = np.load(self.plans / "classes.npy", mmap_mode="r")[start : start + ROW_GROUP]
        if not (classes >= 0).any():
            return 0
        path, studies = self.plans / "studies.npy", None
        if self.plan.studies is not None:
            studies = np.load(path, mmap_mode="r")[start : start + ROW_GROUP]
        plan = replace(self.plan, classes=classes, study_codes=studies)
        vectors, names = self.cells(slice(start, start + len(classes)))
        refuse((classes >= 0) & ~usable(vectors), start, self.source)  # by its number among all cells
        with plan.open(self.folder / part_name(number), vectors.shape[1], names is not None) as writer:
            plan.append(writer, slice(0, len(classes)), vectors, names, self.source)
        return int((classes >= 0).sum())


def ingest(plan: Plan, source: Path, obsm: str, output: Path, engine: Engine, release: Release | None = None) -> int:
    """ingest.py in parts -> how many cells."""
    count = -(-len(plan.classes) // ROW_GROUP)
    with parts_folder(output, count) as (folder, plans):
        np.save(plans / "classes.npy", plan.classes)
        if plan.study_codes is not None:
            np.save(plans / "studies.npy", plan.study_codes)
        if release:
            np.save(plans / "records.npy", record_numbers(release))
        small = replace(plan, classes=plan.classes[:0], study_codes=None)
        record = release.records.dtype if release else None
        return sum(engine(Ingest(small, plans, folder, source, obsm, record), count, "ingest"))


def ingest_release(plan: Plan, release: Release, output: Path, engine: Engine) -> int:
    """The first process reads the labels in the index, which takes one pass over the file."""
    return ingest(plan, release.index_path, "", output, engine, release)


def record_numbers(release: Release) -> np.ndarray:
    """(n,) int64: the number of the record of each cell, in the order of the label file."""
    found, start = np.empty(len(release), np.int64), 0
    for labels, _ in release.records_by_chunk(ROW_GROUP):
        found[labels] = np.arange(start, start + len(labels))
        start += len(labels)
    return found
