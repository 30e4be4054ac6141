"""A file of vectors -> an index, in memory that does not grow with the file.

The source is read once. Its vectors, as float16, go to a nameless file beside the index, its columns to their file.
A sample of the vectors is clustered in two steps, as a tree: `branches` first, then each branch into its lists. A cell
is put into the nearest list of its nearest branch, which takes about 200 products in place of 8,000. Then the vectors
are put in the order of the lists (fractal/data/reorder.py), as many lists at a time as fit into a buffer.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fractal import __version__
from fractal.base.errors import InputError
from fractal.base.files import atomic_folder, locked
from fractal.data.parquet import CELL_ID
from fractal.data.reorder import reorder
from fractal.search.exact import nearest
from fractal.search.folder import CENTROIDS, MAX_PARTS, NO_COLUMN, OWN_FILES, part_names, write_manifest
from fractal.search.index import Index, open_index
from fractal.search.source import Source

CELLS_PER_LIST = 1_000  # a list is 256 kB of 128-d vectors
SAMPLE_PER_LIST = 64  # cells that the clustering looks at,
MAX_SAMPLE = 512_000  # and in all, as many as for 8 million cells: 131 MB of 128-d float16
PIECE = 65_536  # cells in memory at a time: 17 MB of 128-d float16
BUFFER = 128 << 20  # bytes of the cells that are put in order at a time; two such are in memory
CHECKED, SAME_NUMBERS = 1_000, 0.9  # of the cells to add, which are compared with those that are there
FEW_VALUES = 0.5  # text whose first chunk has fewer distinct values than this share of its cells becomes codes
Assign = Callable[[np.ndarray], np.ndarray]  # (n, dim) float32 -> the list of each, (n,) int32


def kmeans(vectors: np.ndarray, k: int, seed: int, least: int = 8) -> np.ndarray:
    """Spherical k-means -> (k, dim) float32 of length 1, fewer where there are not `least` vectors a centre."""
    k = max(1, min(k, len(vectors) // least))
    vectors = vectors[:: -(-len(vectors) // (256 * k))].astype(np.float32)  # more do not change a centre
    if k == 1:
        centres = vectors.mean(0, keepdims=True)
    else:
        options = {"niter": 8, "spherical": True, "min_points_per_centroid": 1}
        clustering = faiss.Kmeans(vectors.shape[1], k, seed=seed, **options)
        clustering.train(vectors)
        centres = clustering.centroids
    norms = np.linalg.norm(centres, axis=1, keepdims=True)
    return np.ascontiguousarray(centres / np.maximum(norms, 1e-12), np.float32)


def nearest_centre(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The number of the nearest centre for each vector, (n,) int64."""
    bank, batches = torch.from_numpy(centres), torch.from_numpy(vectors).split(PIECE)
    return torch.cat([nearest(batch, bank, 1, unit=True)[:, 0] for batch in batches]).numpy()


def train_lists(sample: np.ndarray, num_lists: int, seed: int) -> tuple[np.ndarray, Assign]:
    """sample (n, dim) float16 of length 1 -> the centroids of about `num_lists` lists, and what puts cells into them.

    The lists are the leaves of a tree: each branch has a run of them.
    """
    branches = kmeans(sample, round(num_lists**0.5), seed)
    branch = nearest_centre(sample, branches)
    leaves = []  # per branch: centroids
    for b in range(len(branches)):
        members = sample[branch == b]
        wanted = round(num_lists * len(members) / len(sample))
        leaves.append(kmeans(members, wanted, seed) if len(members) else branches[b : b + 1])
    first = np.cumsum([0, *map(len, leaves)])

    def assign(vectors: np.ndarray) -> np.ndarray:
        lists, branch = np.empty(len(vectors), np.int32), nearest_centre(vectors, branches)
        for b in np.unique(branch):
            members = np.flatnonzero(branch == b)
            lists[members] = first[b] + nearest_centre(vectors[members], leaves[b])
        return lists

    return np.concatenate(leaves), assign


def old_lists(centroids: np.ndarray) -> Assign:
    """Puts cells to add into the nearest list of an index; centroids (lists, dim) float32 of length 1.

    It is looked for in 4 groups of lists that are near each other: .99 of the cells of an atlas find it, for a tenth of
    the products (25,000 lists).
    """
    lists, dim = centroids.shape
    groups = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, round(lists**0.5), faiss.METRIC_INNER_PRODUCT)
    groups.cp.min_points_per_centroid = 1  # else it warns
    groups.train(centroids)
    groups.add(centroids)
    groups.nprobe = 4
    return lambda vectors: groups.search(vectors, 1)[1][:, 0].astype(np.int32)


class Spool:
    """The vectors in the order of the source, (n, dim) float16, and their lists, (n,) int32.

    They are in files without a name: a killed run leaves none.
    """

    def __init__(self, vectors: IO[bytes], lists: IO[bytes], dim: int) -> None:
        self.vectors, self.lists, self.dim, self.cells = vectors, lists, dim, 0

    @staticmethod
    @contextmanager
    def open(folder: Path, dim: int) -> "Iterator[Spool]":
        with tempfile.TemporaryFile(dir=folder) as vectors, tempfile.TemporaryFile(dir=folder) as lists:
            yield Spool(vectors, lists, dim)

    def append(self, vectors: np.ndarray) -> None:
        self.vectors.write(np.ascontiguousarray(vectors, "<f2").data)
        self.cells += len(vectors)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors (m, dim) float16)."""
        self.vectors.seek(0)
        for start in range(0, self.cells, PIECE):
            yield start, np.fromfile(self.vectors, "<f2", PIECE * self.dim).reshape(-1, self.dim)

    def sample(self, n: int, seed: int) -> np.ndarray:
        """n rows at random, (n, dim) float16, fewer where one is drawn twice; all where there are no more."""
        drawn = np.random.default_rng(seed).integers(self.cells, size=n)  # a draw without repeats would hold them all
        rows = np.unique(drawn) if n < self.cells else np.arange(self.cells)
        sample = np.empty((len(rows), self.dim), "<f2")
        for start, piece in self.pieces():
            here = slice(*np.searchsorted(rows, [start, start + len(piece)]))
            sample[here] = piece[rows[here] - start]
        return sample

    def assign(self, assign: Assign, num_lists: int) -> np.ndarray:
        """Note the list of every cell -> how many each list has, (lists,) int64."""
        sizes = np.zeros(num_lists, np.int64)
        for _, piece in self.pieces():
            numbers = assign(piece.astype(np.float32))
            self.lists.write(numbers.data)
            sizes += np.bincount(numbers, minlength=len(sizes))
        return sizes

    def placed(self, sizes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (positions (m,) in the order of the lists, of these sizes; records (m,) of `record`), as pieces."""
        filled = np.cumsum(sizes) - sizes  # where the next cell of each list goes
        self.lists.seek(0)
        for start, piece in self.pieces():
            numbers = np.fromfile(self.lists, np.int32, len(piece))
            members = np.argsort(numbers, kind="stable")
            numbers = numbers[members]
            records = np.empty(len(piece), self.record)
            records["vector"], records["row"] = piece[members], members + start
            if start + len(piece) == self.cells:
                self.vectors.truncate(0)  # all are read: the disk has room for the index
            yield filled[numbers] + np.arange(len(numbers)) - np.searchsorted(numbers, numbers), records
            filled += np.bincount(numbers, minlength=len(sizes))

    @property
    def record(self) -> np.dtype:
        return np.dtype([("vector", "<f2", (self.dim,)), ("row", "<i8")])


def stored_schema(table: pa.Table) -> pa.Schema:
    """How columns like those of the first chunk are stored: text of few distinct values as codes."""
    fields = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        coded = pa.types.is_dictionary(column.type)
        kind = column.type.value_type if coded else column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            few = coded or len(pc.unique(column)) < FEW_VALUES * len(column)
            kind = pa.dictionary(pa.int32(), pa.string()) if few and name != CELL_ID else pa.string()
        fields.append((name, kind))
    return pa.schema(fields or [(NO_COLUMN, pa.null())])


def stored(table: pa.Table, schema: pa.Schema) -> pa.RecordBatch:
    """A chunk's columns as one batch; its codes have a dictionary with the values of the chunk alone."""
    if schema.names == [NO_COLUMN] and not table.column_names:
        table = pa.table([pa.nulls(len(table))], schema=schema)
    columns = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in table.columns]
    table = pa.table(columns, names=table.column_names).select(schema.names).cast(schema)
    return table.unify_dictionaries().combine_chunks().to_batches()[0]


def spool_cells(source: Source, spool: Spool, path: Path) -> None:
    """The one pass over the source: its vectors go to the spool, its columns to `path`."""
    writer, schema = None, None
    with ExitStack() as stack:
        for table, vectors in source.chunks(PIECE, progress="index"):
            if writer is None:
                schema = stored_schema(table)
                writer = stack.enter_context(pa.ipc.new_stream(str(path), schema))
            spool.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
            writer.write_batch(stored(table, schema))


def write_lists(spool: Spool, sizes: np.ndarray, names: tuple[Path, Path]) -> None:
    """Write the sizes (lists,) of the lists that every cell is in, and of each list its vectors, then its rows."""
    np.save(names[0], sizes)
    ends, most = np.cumsum(sizes), max(1, BUFFER // spool.record.itemsize)  # cells
    buckets = np.split(sizes, np.flatnonzero(np.diff((ends - 1) // most)) + 1)  # of whole lists, one at least
    last = np.cumsum([bucket.sum() for bucket in buckets])
    with open(names[1], "wb") as file:
        for bucket, records in zip(
            buckets, reorder(spool.placed(sizes), last, spool.record, names[1].parent), strict=True
        ):
            for members in np.split(records, np.cumsum(bucket)[:-1]):
                file.write(np.ascontiguousarray(members["vector"]).data)
                file.write(np.ascontiguousarray(members["row"]).data)


def build(path: Path, source: Source, seed: int = 0) -> None:
    """Write the folder of an index, whole or not at all. Raises InputError where something else lies there."""
    with atomic_folder(path, OWN_FILES) as folder, Spool.open(folder, source.space.dim) as spool:
        sizes, vectors, columns = (folder / name for name in part_names(0))
        spool_cells(source, spool, columns)
        num_lists = max(1, round(spool.cells / CELLS_PER_LIST))
        sample = spool.sample(min(MAX_SAMPLE, SAMPLE_PER_LIST * num_lists), seed)
        centroids, assign = train_lists(sample, num_lists, seed)
        np.save(folder / CENTROIDS, centroids)
        write_lists(spool, spool.assign(assign, len(centroids)), (sizes, vectors))
        about = {"sources": [source.name], "fractal": __version__, "seed": seed}
        write_manifest(folder, {"space": asdict(source.space), **about}, [CENTROIDS, *part_names(0)])


def add(path: Path, source: Source, force: bool = False) -> None:
    """Add cells to the lists that are there: the old files stay, the new cells become a further part.

    The folder is replaced by one with links to the same files, so that it is the old index or the new one, whole.
    Another run that changes the index waits until this one has ended. Raises InputError for vectors of another adapter
    or width; where there are MAX_PARTS parts already; and, unless `force` adds them, for cells that are there already.
    """
    with locked(path):
        index = open_index(path)
        number, metadata = len(index.parts), index.folder.metadata
        if number >= MAX_PARTS:
            raise InputError(f"{path}: cells were added {number - 1} times, which is the most; build it anew")
        check_same_space(index, source)
        old = list(metadata["files"])
        with atomic_folder(path, OWN_FILES) as folder, Spool.open(folder, source.space.dim) as spool:
            for name in old:
                link_or_copy(path / name, folder / name)
            sizes, vectors, columns = (folder / name for name in part_names(number))
            spool_cells(source, spool, columns)
            if not force:
                check_new(index, source.name, spool, columns)
            counts = spool.assign(old_lists(index.centroids), len(index.centroids))
            write_lists(spool, counts, (sizes, vectors))
            sources = [*metadata["sources"], source.name]
            write_manifest(folder, {**metadata, "sources": sources}, [*old, *part_names(number)])


def check_new(index: Index, name: str, spool: Spool, columns: Path) -> None:
    """Compare a sample of the cells to add with those that are there; a line on stderr where a few are the same.

    Two cells are the same if their vectors are, nearly all numbers of them (another machine rounds one now and then),
    or if they have one name in files of one name. Raises InputError where at least half of them are there.
    """
    sample = spool.sample(CHECKED, seed=0)
    stored_alike = index.vectors_of(index.search(sample, 1).cells[:, 0])
    same = int(((stored_alike == sample).mean(1) > SAME_NUMBERS).sum())
    with pa.memory_map(str(columns)) as file:
        new = next(iter(pa.ipc.open_stream(file)))
        ids = new[CELL_ID][:CHECKED] if CELL_ID in new.schema.names else pa.nulls(1, pa.string())
        known = np.zeros(len(ids), bool)
        for batch in (batch for part in index.parts if part.source == name for batch in part.batches):
            known |= pc.is_in(ids, batch.column(CELL_ID), skip_nulls=True).to_numpy(False)
    same = max(same, round(known.mean() * len(sample)))
    if 2 * same >= len(sample):
        raise InputError(
            f"{name}: {same:,} of {len(sample):,} cells that were looked at are in {index.folder.path} already, and "
            "would be among the hits twice; leave them out, build the index anew, or add them with --force"
        )
    if same:
        seen = f"{same:,} of {len(sample):,} cells that were looked at"
        print(f"warning: {name}: {seen} are in the index already", file=sys.stderr)


def check_same_space(index: Index, source: Source) -> None:
    """Raises InputError for cells that can't be compared with those of the index."""
    old, new = index.space, source.space
    if (new.dim, new.blocks) != (old.dim, old.blocks):
        made = "by an adapter; name it with --reference" if old.adapters else "by no adapter; drop --reference"
        raise InputError(
            f"{source.name}: its vectors have {new.dim} numbers in {len(new.blocks)} blocks and can't be compared with "
            f"those of {index.folder.path}, {old.dim} in {len(old.blocks)}, which were made {made}"
        )
    index.check_adapter(new.adapters, source.name)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the file; a copy where the file system has no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
