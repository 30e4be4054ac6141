"""A file of vectors -> an index, in memory that does not grow with the file.

The source is read once. Its vectors, as float16, go to a nameless file beside the index, its columns to their place.
A sample of the vectors is clustered in two steps, as a tree: `branches` first, then each branch into its lists. A cell
is put into the nearest list of its nearest branch, which takes some 200 products in place of 8,000. Then the vectors
are gathered list by list.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from fractal import __version__
from fractal.base.cli import InputError
from fractal.base.files import atomic_folder
from fractal.data.parquet import CELL_ID
from fractal.search.folder import CENTROIDS, MAX_PARTS, NO_COLUMN, OWN_FILES, Folder, Space, part_names, write_manifest

CELLS_PER_LIST = 1_000  # a list is 256 kB of 128-d vectors
SAMPLE_PER_LIST = 64  # cells that the clustering looks at
PIECE = 65_536  # cells in memory at a time: 17 MB of 128-d float16
BUFFER = 512 << 20  # bytes of the vectors that are gathered at a time
FEW_VALUES = 0.5  # text whose first chunk has fewer distinct values than this share of its cells becomes codes

Chunks = Iterable[tuple[pa.Table, np.ndarray]]  # columns (m rows), vectors (m, dim) float32, finite and not zero


@dataclass(frozen=True)
class Cells:
    """What is to be indexed."""

    source: str  # name of the file
    num_rows: int
    space: Space
    chunks: Callable[[], Chunks]
    facts: dict[str, str]  # what the file says of itself, such as cl_release


def kmeans(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Spherical k-means -> (k, dim) float32 of length 1, fewer where there are fewer vectors."""
    k = max(1, min(k, len(vectors) // 8))
    if k == 1:
        centres = vectors.mean(0, keepdims=True)
    else:
        options = {"niter": 8, "spherical": True, "min_points_per_centroid": 1, "max_points_per_centroid": 256}
        found = faiss.Kmeans(vectors.shape[1], k, seed=seed, **options)
        found.train(np.ascontiguousarray(vectors, np.float32))
        centres = found.centroids
    norms = np.linalg.norm(centres, axis=1, keepdims=True)
    return np.ascontiguousarray(centres / np.maximum(norms, 1e-12), np.float32)


def nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest of the centres for each vector, (n,) int64."""
    index = faiss.IndexFlatIP(centres.shape[1])
    index.add(np.ascontiguousarray(centres))
    return index.search(np.ascontiguousarray(vectors, np.float32), 1)[1][:, 0]


@dataclass(frozen=True)
class Lists:
    """The tree of lists: branch b has the lists first[b] ... first[b + 1] - 1."""

    branches: np.ndarray  # (branches, dim) float32
    centroids: np.ndarray  # (lists, dim) float32
    first: np.ndarray  # (branches + 1,) int64

    @staticmethod
    def train(sample: np.ndarray, num_lists: int, seed: int) -> "Lists":
        """sample (n, dim) float32 of length 1 -> about `num_lists` lists."""
        branches = kmeans(sample, round(num_lists**0.5), seed)
        owner = nearest(sample, branches)
        parts = [
            kmeans(mine, round(num_lists * len(mine) / len(sample)), seed) if len(mine) else branches[b : b + 1]
            for b in range(len(branches))
            for mine in [sample[owner == b]]
        ]
        return Lists(branches, np.concatenate(parts), np.cumsum([0, *map(len, parts)]))

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """(n, dim) float32 -> the list of each, (n,) int32."""
        found = np.empty(len(vectors), np.int32)
        owner = nearest(vectors, self.branches)
        for b in np.unique(owner):
            mine = np.flatnonzero(owner == b)
            found[mine] = self.first[b] + nearest(vectors[mine], self.centroids[self.first[b] : self.first[b + 1]])
        return found


class Spool:
    """The vectors in the order of the source, (n, dim) float16, in a file without a name: a killed run leaves none."""

    def __init__(self, file: IO[bytes], dim: int) -> None:
        self.file, self.dim, self.cells = file, dim, 0

    def append(self, vectors: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(vectors, "<f2").data)
        self.cells += len(vectors)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors (m, dim) float16)."""
        self.file.seek(0)
        for start in range(0, self.cells, PIECE):
            piece = np.empty((min(PIECE, self.cells - start), self.dim), "<f2")
            self.file.readinto(piece.data)  # type: ignore[attr-defined]
            yield start, piece

    def sample(self, n: int, seed: int) -> np.ndarray:
        """n rows at random, (n, dim) float32."""
        rows = np.random.default_rng(seed).choice(self.cells, min(n, self.cells), replace=False)
        rows.sort()
        return np.concatenate(
            [
                piece[rows[slice(*np.searchsorted(rows, [start, start + PIECE]))] - start]
                for start, piece in self.pieces()
            ]
        ).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class ColumnWriter:
    """Appends tables to an Arrow stream; text of few distinct values as codes, each batch with names of its own."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.writer = pa.ipc.new_stream(str(path), schema)
        self.schema = schema

    @staticmethod
    def schema_of(table: pa.Table) -> pa.Schema:
        """How columns like those of the first chunk are stored."""
        fields = [pa.field(field.name, stored_type(field, table[field.name])) for field in table.schema]
        return pa.schema(fields or [pa.field(NO_COLUMN, pa.null())])

    def append(self, table: pa.Table) -> None:
        arrays = [encoded(table[f.name], f.type) if f.name != NO_COLUMN else pa.nulls(len(table)) for f in self.schema]
        self.writer.write_batch(pa.record_batch(arrays, schema=self.schema))


def stored_type(field: pa.Field, column: pa.ChunkedArray) -> pa.DataType:
    coded = pa.types.is_dictionary(field.type)
    value = field.type.value_type if coded else field.type
    if not pa.types.is_string(value) and not pa.types.is_large_string(value):
        return value
    few = coded or len(pc.unique(column)) < FEW_VALUES * len(column)
    return pa.dictionary(pa.int32(), pa.string()) if few and field.name != CELL_ID else pa.string()


def encoded(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type).dictionary_encode()
    column = column.cast(kind).combine_chunks()
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column


def spool_cells(cells: Cells, spool: Spool, path: Path) -> None:
    """The one pass over the source: its vectors go to the spool, its columns to `path`."""
    columns: ColumnWriter | None = None
    with ExitStack() as stack, tqdm(total=cells.num_rows, unit="cells", unit_scale=True, desc="index") as bar:
        for table, vectors in cells.chunks():
            if columns is None:
                columns = ColumnWriter(path, ColumnWriter.schema_of(table))
                stack.enter_context(columns.writer)
            spool.append(unit(vectors))
            columns.append(table)
            bar.update(len(vectors))


def write_lists(spool: Spool, lists: Lists, names: tuple[Path, Path]) -> None:
    """Put every cell into its list; write the sizes and the vectors."""
    owner = np.concatenate([lists.assign(piece.astype(np.float32)) for _, piece in spool.pieces()])
    sizes = np.bincount(owner, minlength=len(lists.centroids)).astype(np.int64)
    np.save(names[0], sizes)
    by_list = np.argsort(owner, kind="stable")  # rows, list after list
    ends = np.cumsum(sizes)
    place = np.empty(spool.cells, np.int64)
    place[by_list] = np.arange(spool.cells)
    most = max(1, BUFFER // (2 * spool.dim))  # cells
    with open(names[1], "wb") as file:
        first = 0
        while first < len(sizes):  # some lists at a time, at least one
            began = ends[first] - sizes[first]
            last = max(first + 1, int(np.searchsorted(ends, began + most, "right")))
            buffer = np.empty((ends[last - 1] - began, spool.dim), "<f2")
            for start, piece in spool.pieces():
                mine = place[start : start + len(piece)] - began
                here = np.flatnonzero((mine >= 0) & (mine < len(buffer)))
                buffer[mine[here]] = piece[here]
            for number in range(first, last):
                some = slice(ends[number] - sizes[number], ends[number])
                file.write(buffer[some.start - began : some.stop - began].data)
                file.write(by_list[some].astype("<i8").data)
            first = last


@contextmanager
def new_spool(folder: Path, dim: int) -> Iterator[Spool]:
    with tempfile.TemporaryFile(dir=folder) as file:
        yield Spool(file, dim)


def build(path: Path, cells: Cells, seed: int = 0) -> None:
    """Write the folder of an index, whole or not at all. Raises InputError where something else lies there."""
    with atomic_folder(path, OWN_FILES) as folder, new_spool(folder, cells.space.dim) as spool:
        sizes, vectors, columns = (folder / name for name in part_names(0))
        spool_cells(cells, spool, columns)
        num_lists = max(1, round(spool.cells / CELLS_PER_LIST))
        lists = Lists.train(spool.sample(SAMPLE_PER_LIST * num_lists, seed), num_lists, seed)
        np.save(folder / CENTROIDS, lists.centroids)
        write_lists(spool, lists, (sizes, vectors))
        space = asdict(cells.space)
        facts = {"space": space, "sources": [cells.source], "fractal": __version__, "seed": seed, "of": [cells.facts]}
        write_manifest(folder, facts, [CENTROIDS, *part_names(0)])


def add(index: Folder, cells: Cells) -> None:
    """Add cells to the lists that are there: the old files stay, the new cells are a part of their own.

    The folder is replaced by one with links to the same files, so that it is the old index or the new one, whole.
    Raises InputError for vectors of another adapter or width, or where there are MAX_PARTS parts already.
    """
    number = len(index.parts)
    if number >= MAX_PARTS:
        raise InputError(f"{index.path}: cells were added {number - 1} times, which is the most; build it anew")
    check_same_space(index, cells)
    old = list(index.facts["files"])
    with atomic_folder(index.path, OWN_FILES) as folder, new_spool(folder, index.space.dim) as spool:
        for name in old:
            link_or_copy(index.path / name, folder / name)
        sizes, vectors, columns = (folder / name for name in part_names(number))
        spool_cells(cells, spool, columns)
        one_branch = Lists(index.centroids[:1], index.centroids, np.array([0, len(index.centroids)]))
        write_lists(spool, one_branch, (sizes, vectors))
        facts = {**index.facts, "sources": [*index.facts["sources"], cells.source]}
        facts["of"] = [*index.facts.get("of", []), cells.facts]
        write_manifest(folder, facts, [*old, *part_names(number)])


def check_same_space(index: Folder, cells: Cells) -> None:
    """Raises InputError for cells that can't be compared with those of the index."""
    old, new = index.space, cells.space
    if new.dim != old.dim:
        raise InputError(f"{cells.source}: its vectors have {new.dim} numbers, those of {index.path} {old.dim}")
    if new.blocks != old.blocks or (old.adapters and not set(new.adapters) & set(old.adapters)):
        made = f"by the adapter {old.adapters[0][:12]}..." if old.adapters else "by no adapter, they are as they came"
        raise InputError(
            f"{cells.source}: its vectors can't be compared with those of {index.path}, which were made {made}; name "
            "that adapter with --reference"
        )


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the file; a copy where the file system has no such links."""
    with suppress(OSError):
        os.link(source, target)
    if not target.exists():
        shutil.copyfile(source, target)
