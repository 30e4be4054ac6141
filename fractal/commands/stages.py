"""The stages of the pipeline in parts, for an engine that runs them on many machines (Ray Data).

Every stage is the same: the first process reads the labels and plans; then each task calls the function of the
single-machine script on a piece of the input, a row group, and writes a part of the output, a Parquet file in its
folder. The parts in the order of their names are row for row what the script writes. A part appears whole or not at
all, and is the same however often its task runs: where a worker is killed, its tasks run again.

Cells never pass through the engine's memory, only the numbers of tasks and of cells do. What tasks must know of the
plan (an order, the cells' classes) lies in .npy files beside the output, of which a task maps its rows. So input and
output must be paths that all machines see.
"""

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.annotate.query import Origin
from fractal.annotate.run import Run
from fractal.base.errors import InputError
from fractal.base.files import atomic_folder, atomic_write
from fractal.base.storage import same_files
from fractal.commands.embed import embed_cells, num_blocks
from fractal.commands.output import write_parquet
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells, parquet_cells
from fractal.data.expression import as_texts
from fractal.data.h5ad import find_embedding, obs_names, open_h5ad
from fractal.data.ingestion import Plan, order_warning, place_cells
from fractal.data.labels import read_map
from fractal.data.parquet import ROW_GROUP, Parquet, level_columns, read_vectors, write_tables
from fractal.data.reorder import round_robin
from fractal.data.scimilarity import map_records, open_release
from fractal.hierarchy.ontology import CL_SLIM, load_graph, write_hierarchy
from fractal.reference import open_embedder, read_reference

Task = Callable[[int], int]  # the number of a part -> how many cells it has
Engine = Callable[[Task, int, str], Iterator[int]]  # runs the tasks 0 ... n - 1, in any order -> their cells
Read = Callable[[slice], tuple[np.ndarray, np.ndarray | None]]  # rows -> vectors (m, dim) float32, names (m,) or None


table_of = lru_cache(maxsize=1)(Parquet.open)  # once in each worker, as the next ones
embedder_of = lru_cache(maxsize=1)(open_embedder)


@lru_cache(maxsize=1)
def run_of(path: Path, **asked: Any) -> Run:
    return read_reference(path).run(**asked)


def part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.parquet"


@contextmanager
def parts_folder(output: Path, count: int) -> Iterator[tuple[Path, Path]]:
    """-> a folder for `count` parts, which becomes `output` once they are all there, and one for plans, removed then.

    Raises InputError for an output that holds anything but parts.
    """
    names = {part(output, i).name for i in range(count)} | {path.name for path in output.glob("part-*.parquet")}
    with atomic_folder(output, names) as folder:
        plans = folder.with_name("plans")
        plans.mkdir()
        yield folder, plans
        for leftover in [path for path in folder.iterdir() if path.name not in names]:  # of a worker that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def all_of(results: Iterator[int], expected: int, output: Path) -> int:
    """The cells of all tasks. Raises InputError where cells are missing."""
    if (cells := sum(results)) != expected:
        raise InputError(f"{output}: {cells:,} cells of {expected:,} were written; run it again")
    return cells


@contextmanager
def unchanged(*inputs: Path) -> Iterator[None]:
    """Raises InputError, at the end, for an input that has been replaced: each task opens it for itself."""
    checks = [same_files(path) for path in inputs]
    yield
    for check in checks:
        check()


# --- embed and annotate: a task for each row group --------------------------------------------------------------------


def embed(args: argparse.Namespace, engine: Engine) -> int:
    """`fractal embed` in parts -> how many cells."""
    prefix = num_blocks(args, embedder_of(args.reference))
    return for_each_group(partial(embed_part, args, prefix), args, engine)


def embed_part(args: argparse.Namespace, prefix: int, folder: Path, number: int) -> int:
    embedder, cells = embedder_of(args.reference), parquet_cells(table_of(args.input), [number])
    embed_cells(embedder, embedder.checked(cells), part(folder, number), prefix)
    return cells.num_rows


def annotate(args: argparse.Namespace, engine: Engine) -> int:
    """`fractal annotate` in parts -> how many cells."""
    asked = {name: getattr(args, name) for name in ("confidence", "error", "novelty", "obo")}
    asked |= {"only": tuple(args.only), "exclude": tuple(args.exclude)}
    for line in run_of(args.reference, **asked).lines:
        print(line)
    return for_each_group(partial(annotate_part, args, asked), args, engine)


def annotate_part(args: argparse.Namespace, asked: dict[str, Any], folder: Path, number: int) -> int:
    cells = parquet_cells(table_of(args.input), [number])
    tables = run_of(args.reference, **asked).columns(cells, Origin("", ""))
    return write_parquet(part(folder, number), ((table, {}) for table in tables), {})


def for_each_group(task: Callable[[Path, int], int], args: argparse.Namespace, engine: Engine) -> int:
    """task: folder of parts, number of a row group of the input -> how many cells its part has."""
    with embedder_of(args.reference).open(args.input, None, args.force):  # raises InputError as the command does
        table = Parquet.open(args.input)
    with parts_folder(args.output, len(table.sizes)) as (folder, _), unchanged(args.input, args.reference):
        return all_of(engine(partial(task, folder), len(table.sizes), args.stage), table.num_rows, args.output)


# --- stratify: a sort, as every engine's shuffle is one ---------------------------------------------------------------


def stratify(args: argparse.Namespace, engine: Engine) -> int:
    """stratify.py in parts -> how many cells. Memory of a task: about --memory.

    The first process draws the order from the labels alone, 70 bytes a cell. The temporary files beside the output take
    as much room as the cells.
    """
    atlas = Atlas.open(args.input)
    order = round_robin(atlas.finest[0], args.seed)
    rows = max(1, args.memory // (2 * 4 * atlas.dim) // ROW_GROUP) * ROW_GROUP  # of a part
    starts = np.arange(0, len(order) + rows, rows).clip(max=len(order))
    sizes = Parquet.open(args.input).sizes
    first = np.unique(np.searchsorted(np.cumsum([0, *sizes]), starts))  # the first row group of each run
    with parts_folder(args.output, len(starts) - 1) as (folder, plans), unchanged(args.input):
        positions = np.empty(len(order), np.int64)
        positions[order] = np.arange(len(order))
        np.save(plans / "positions.npy", positions)
        del order, positions
        runs = [plans / f"{i}.arrow" for i in range(len(first) - 1)]
        task = partial(partition_rows, args.input, first, runs)
        all_of(engine(task, len(runs), "sort"), atlas.num_rows, args.output)
        metadata = {**atlas.metadata, "stratified": level_columns(atlas.schema)[-1]}
        task = partial(merge_partition, runs, starts, atlas.schema, metadata, folder)
        return all_of(engine(task, len(starts) - 1, "merge"), atlas.num_rows, args.output)


def partition_rows(path: Path, first: np.ndarray, runs: list[Path], number: int) -> int:
    """First half of the sort: row groups -> a file of their rows, in the order of their positions."""
    groups, sizes = range(first[number], first[number + 1]), table_of(path).sizes
    table = pa.concat_tables(table_of(path).tables(groups=groups)).unify_dictionaries()
    start = sum(sizes[: groups.start])
    position = np.load(runs[number].with_name("positions.npy"), mmap_mode="r")[start : start + len(table)]
    table = table.append_column("position", pa.array(position)).take(pa.array(np.argsort(position))).combine_chunks()
    with atomic_write(runs[number]) as part, pa.ipc.new_file(str(part), table.schema) as writer:
        writer.write_table(table)
    return len(table)


def merge_partition(
    runs: list[Path], starts: np.ndarray, schema: pa.Schema, metadata: Mapping[str, str], folder: Path, number: int
) -> int:
    """Second half: the rows of one part, out of the files of all tasks of the first half."""
    start, stop = starts[number : number + 2]
    tables = []
    for run in runs:
        with pa.memory_map(str(run)) as file:
            table = pa.ipc.open_file(file).read_all()
            lo, hi = np.searchsorted(table["position"].to_numpy(), [start, stop])
            tables.append(table[lo:hi])
    table = pa.concat_tables(tables).unify_dictionaries()
    position = table["position"].to_numpy()
    order = np.argsort(position)
    if not np.array_equal(position[order], np.arange(start, stop)):
        raise InputError(f"{runs[0].parent}: rows are missing or there twice; run it again")
    table = table.take(pa.array(order))
    read_vectors(table, runs[0].parent)  # refuses cells without one
    table = table.select(schema.names)
    pieces = (table.slice(first, ROW_GROUP) for first in range(0, len(table), ROW_GROUP))
    return write_tables(part(folder, number), pieces, metadata)


# --- ingest: a task for each 65,536 cells of a release or an .h5ad ----------------------------------------------------


def ingest(args: argparse.Namespace, engine: Engine) -> int:
    """ingest.py in parts -> how many cells. Of a release the first process reads the labels in the index."""
    graph, source = load_graph(args.obo or CL_SLIM), args.h5ad or args.model_dir
    label_map = read_map(args.label_map) if args.label_map else None
    read: Read = partial(read_h5ad, source, args.use_rep)
    if args.h5ad:
        release = None
        with Cells.open(source, args.use_rep) as opened:
            labels = opened.labels(args.label_key, args.study_key, label_map, args.levels)
    else:
        release = open_release(source)
        labels = release.labels if label_map is None else release.labels.mapped(label_map, args.label_map)
    plan = place_cells(labels, graph, source, args.hierarchy, args.unmapped)
    for note in plan.hierarchy.notes:
        print(note)
    count = -(-len(plan.classes) // ROW_GROUP)
    with parts_folder(args.output, count) as (folder, plans), unchanged(source):
        if release:
            numbers = [labels for labels, _ in release.records_by_chunk(ROW_GROUP)]
            np.save(plans / "records.npy", np.argsort(np.concatenate(numbers)))
            read = partial(read_release, release.index_path, release.records.dtype, plans / "records.npy")
        for name in ("classes", "study_codes"):
            if getattr(plan, name) is not None:
                np.save(plans / f"{name}.npy", getattr(plan, name))
        small = replace(plan, classes=plan.classes[:0], study_codes=None)  # tasks map the rest
        task = partial(ingest_part, small, plans, folder, source, read)
        cells = all_of(engine(task, count, "ingest"), int((plan.classes >= 0).sum()), args.output)
    table = args.output.with_name(f"{args.output.stem}.hierarchy.tsv")
    write_hierarchy(table, plan.hierarchy.levels, plan.hierarchy.classes)
    if warning := order_warning(Atlas.open(args.output)):
        print(warning)
    return cells


def ingest_part(plan: Plan, plans: Path, folder: Path, source: Path, read: Read, number: int) -> int:
    names = ("classes", "study_codes") if plan.studies is not None else ("classes",)
    plan = replace(plan, **{name: np.load(plans / f"{name}.npy", mmap_mode="r") for name in names})
    rows = slice(number * ROW_GROUP, min((number + 1) * ROW_GROUP, len(plan.classes)))
    taken = int((plan.classes[rows] >= 0).sum())
    if taken:
        vectors, ids = read(rows)
        write_tables(part(folder, number), [plan.table(rows, vectors, ids, source)], plan.metadata)
    return taken


def read_h5ad(source: Path, obsm: str, rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
    with open_h5ad(source) as file:
        vectors, names = find_embedding(file, source, obsm)[rows], obs_names(file["obs"])[rows]
        return np.ascontiguousarray(vectors, np.float32), as_texts(names)


def read_release(index: Path, record: np.dtype, numbers: Path, rows: slice) -> tuple[np.ndarray, None]:
    """record: how a cell lies in the index; numbers: .npy with the number of each cell's record."""
    records = np.load(numbers, mmap_mode="r")[rows]
    first = int(records.min())
    return map_records(index, record, first, int(records.max()) + 1 - first)["vector"][records - first], None
