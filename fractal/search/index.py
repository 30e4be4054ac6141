"""The nearest cells of an index, by the full vector or a prefix, among all cells or those that a filter leaves.

The lists nearest to the query are opened, and every vector in them is compared. Nothing but the centroids is in memory:
faiss scans the mapped files.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch

from fractal.base.cli import InputError
from fractal.data.parquet import CELL_ID
from fractal.search.folder import NO_COLUMN, Folder, Part, read_folder

PROBES = 16  # lists that a search opens, where no other number is asked for
PREFIX_PROBES = 8  # and for a prefix: its lists are nearly alike, see docs/search.md
QUERIES = 256  # at a time, so that their products with all centroids take 8 MB
ENOUGH = 2_000  # cells that pass a filter are looked at per query, or 100 k of them, or all
RESERVED = ("query", "rank", "id", "row", "source", "similarity")  # columns of the hits that are no cell's


@dataclass(frozen=True)
class Hits:
    """The k nearest cells of n queries, best first; where there are fewer, -1 and -inf at the end."""

    cells: np.ndarray  # (n, k) int64, numbered through all parts of the index
    similarity: np.ndarray  # (n, k) float32, cosines


class Filter:
    """The cells that a search may find: a mask (cells,) bool over the whole index."""

    def __init__(self, index: "Index", mask: np.ndarray) -> None:
        self.mask = mask
        self.bits = [np.packbits(some, bitorder="little") for some in np.split(mask, index.first[1:-1])]
        self.selectors = [faiss.IDSelectorBitmap(bits) for bits in self.bits]
        self.per_list = np.zeros(len(index.centroids), np.int64)  # cells of each list that pass
        for part, some in zip(index.parts, np.split(mask, index.first[1:-1]), strict=True):
            self.per_list += [int(some[part.rows(number)].sum()) for number in range(len(part.sizes))]

    @property
    def count(self) -> int:
        return int(self.per_list.sum())


class Index:
    """An opened index; `open_index` makes it. Cells are numbered 0 ... len(index) - 1, part after part."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.space, self.parts, self.centroids = folder, folder.space, folder.parts, folder.centroids
        self.first = np.concatenate([[0], np.cumsum([part.cells for part in self.parts])])  # (parts + 1,)
        self.quantizer = faiss.IndexFlatIP(self.space.dim)
        self.quantizer.add(self.centroids)
        self.cut_centres: dict[int, np.ndarray] = {}
        self.mapped: list[Any] = []
        self.scanners = [self.scanner(part) for part in self.parts]

    def __len__(self) -> int:
        return int(self.first[-1])

    @cached_property
    def types(self) -> dict[str, pa.DataType]:
        """The cells' columns beside their id, and their types; text where two parts differ."""
        found: dict[str, pa.DataType] = {}
        for part in self.parts:
            for field in part.batches[0].schema:
                kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
                found[field.name] = kind if found.get(field.name, kind) == kind else pa.string()
        return {name: kind for name, kind in found.items() if name not in (CELL_ID, NO_COLUMN)}

    @property
    def columns(self) -> list[str]:
        return list(self.types)

    def scanner(self, part: Part) -> Any:
        """faiss's inverted lists over a part's mapped file."""
        dim, lists = self.space.dim, len(self.centroids)
        kind = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(self.quantizer, dim, lists, kind, faiss.METRIC_INNER_PRODUCT, False)
        on_disk = faiss.OnDiskInvertedLists(lists, index.code_size, str(part.path))
        on_disk.read_only = True
        sizes = part.sizes.astype(np.uint64)  # a name of its own: faiss is given its bare address
        on_disk.set_all_lists_sizes(faiss.swig_ptr(sizes))
        on_disk.totsize = int(part.starts[-1])
        on_disk.do_mmap()
        index.replace_invlists(on_disk, False)
        self.mapped.append(on_disk)  # faiss keeps a bare pointer to it
        index.ntotal, index.is_trained = part.cells, True
        return index

    def check_adapter(self, sha256s: Sequence[str], what: str) -> None:
        """Raise InputError unless one of an adapter's hashes is that of the adapter that made the indexed vectors."""
        if self.space.adapters and sha256s and not set(sha256s) & set(self.space.adapters):
            raise InputError(
                f"{what}: its adapter ({sha256s[0][:12]}...) is not that of the index {self.folder.path} "
                f"({self.space.adapters[0][:12]}...), so their vectors can't be compared; name the right one"
            )

    def search(
        self,
        queries: np.ndarray,
        k: int = 10,
        prefix: int | None = None,
        keep: np.ndarray | None = None,
        probes: int | None = None,
    ) -> Hits:
        """queries (n, dim) of any norm, in the space of the index -> their k nearest cells by cosine.

        prefix: compare the first blocks only. keep: a mask (len(index),) bool of the cells that may be found.
        probes: how many lists to open; all of them make the search exact. Raises InputError for vectors of another
        width, that are zero or not finite, and for a prefix that the vectors don't have.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.space.dim:
            raise InputError(f"queries have {queries.shape[-1]} numbers, the vectors of the index {self.space.dim}")
        width = self.space.dim if prefix is None else self.space.prefix_width(prefix)
        norms = np.linalg.norm(queries[:, :width], axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise InputError("the vector of a query is zero or not finite; leave such cells out")
        if keep is not None and keep.shape != (len(self),):
            raise InputError(f"a filter of {keep.size:,} cells, the index has {len(self):,}")
        some = None if keep is None else Filter(self, keep)
        full = width == self.space.dim
        probes = min(probes or (PROBES if full else PREFIX_PROBES), len(self.centroids))
        unit = queries[:, :width] / norms
        parts = []
        for start in range(0, len(unit), QUERIES):
            piece = unit[start : start + QUERIES]
            lists = self.lists(piece, probes, k, some)
            parts.append(self.scan(piece, lists, k, some) if full else self.scan_prefix(piece, lists, k, some))
        if not parts:
            return Hits(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
        return Hits(np.concatenate([p.cells for p in parts]), np.concatenate([p.similarity for p in parts]))

    def lists(self, unit: np.ndarray, probes: int, k: int, some: Filter | None) -> np.ndarray:
        """The lists to open for each query, best first, (n, most) int64; -1 where a query opens fewer."""
        width = unit.shape[1]
        if some is None and width == self.space.dim:
            return self.quantizer.search(unit, probes)[1]
        similarity = unit @ self.centres(width).T
        if some is None:
            best = np.argpartition(-similarity, probes - 1, axis=1)[:, :probes]
            return np.take_along_axis(best, np.argsort(-np.take_along_axis(similarity, best, 1), axis=1), 1)
        similarity[:, some.per_list == 0] = -np.inf
        order = np.argsort(-similarity, axis=1)
        seen = np.cumsum(some.per_list[order], axis=1)
        asked = min(some.count, max(ENOUGH, 100 * k))
        opened = np.maximum((seen < asked).sum(1) + 1, probes)
        opened = np.minimum(opened, (some.per_list > 0).sum())
        most = max(1, int(opened.max()))
        return np.where(np.arange(most) < opened[:, None], order[:, :most], -1)

    def centres(self, width: int) -> np.ndarray:
        """The first numbers of the centroids, of length 1, (lists, width) float32; kept, one query needs them all."""
        if width not in self.cut_centres:
            cut = self.centroids[:, :width]
            norms = np.linalg.norm(cut, axis=1, keepdims=True)
            self.cut_centres[width] = np.ascontiguousarray(cut / np.maximum(norms, 1e-12))
        return self.cut_centres[width]

    def scan(self, unit: np.ndarray, lists: np.ndarray, k: int, some: Filter | None) -> Hits:
        """Compare full vectors."""
        n = len(unit)
        lists, coarse = np.ascontiguousarray(lists, np.int64), np.zeros(lists.shape, np.float32)
        found = []
        for number, index in enumerate(self.scanners):
            similarity, rows = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
            index.nprobe = lists.shape[1]
            options = faiss.SearchParametersIVF(nprobe=lists.shape[1])
            if some is not None:
                options.sel = some.selectors[number]
            pointers = (faiss.swig_ptr(array) for array in (unit, lists, coarse, similarity, rows))
            vectors, *outputs = pointers
            index.search_preassigned_c(n, vectors, k, *outputs, False, options)
            self.parts[number].checked(rows[rows >= 0])
            found.append((np.where(rows >= 0, rows + self.first[number], -1), similarity))
        return best_of(found, k)

    def scan_prefix(self, unit: np.ndarray, lists: np.ndarray, k: int, some: Filter | None) -> Hits:
        """Compare prefixes, which are cut from the stored vectors and made unit length again."""
        width = unit.shape[1]
        found = []
        for query, numbers in zip(unit, lists, strict=True):
            rows, similarity = [], []
            for first, part in zip(self.first, self.parts, strict=False):
                for number in numbers[numbers >= 0].tolist():
                    if part.sizes[number]:
                        # torch makes float32 of float16 ten times as fast as numpy
                        vectors = torch.from_numpy(part.vectors(number)).float()[:, :width]
                        cosines = (vectors @ torch.from_numpy(query)) / vectors.norm(dim=1).clamp(min=1e-12)
                        rows.append(part.rows(number) + first)
                        similarity.append(cosines.numpy())
            cells = np.concatenate(rows) if rows else np.empty(0, np.int64)
            all_similar = np.concatenate(similarity) if rows else np.empty(0, np.float32)
            if some is not None:
                passing = some.mask[cells]
                cells, all_similar = cells[passing], all_similar[passing]
            found.append(best_of([(cells[None], all_similar[None])], k))
        return Hits(np.concatenate([h.cells for h in found]), np.concatenate([h.similarity for h in found]))

    def take(self, cells: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Cells (m,) int64 -> their id, row, source and columns (all, if none are named), in that order.

        A column that a part lacks is null there; text comes as text. Raises InputError for a column that there is not.
        """
        there = self.columns
        columns = there if columns is None else list(columns)
        if missing := [name for name in columns if name not in there]:
            raise InputError(f"{self.folder.path}: has no column '{missing[0]}'; it has {', '.join(there) or 'none'}")
        order = np.argsort(cells, kind="stable")
        tables, ascending = [], cells[order]
        for number, part in enumerate(self.parts):
            lo, hi = np.searchsorted(ascending, self.first[number : number + 2])
            rows = ascending[lo:hi] - self.first[number]
            start = 0
            for i, batch in enumerate(part.batches):
                a, b = np.searchsorted(rows, [start, start + len(batch)])
                if b > a:
                    tables.append(self.part_of(part, part.batch(i), rows[a:b], start, columns))
                start += len(batch)
        if not tables:
            fields = [("id", pa.string()), ("row", pa.int64()), ("source", pa.string())]
            return pa.schema([*fields, *((name, self.types[name]) for name in columns)]).empty_table()
        return pa.concat_tables(tables).take(pa.array(np.argsort(order, kind="stable")))

    def part_of(
        self, part: Part, batch: pa.RecordBatch, rows: np.ndarray, start: int, columns: Sequence[str]
    ) -> pa.Table:
        """Some rows of a batch that begins with row `start`."""
        chosen = pa.array(rows - start)

        def column(name: str, kind: pa.DataType) -> pa.Array:
            if name not in batch.schema.names:
                return pa.nulls(len(rows), kind)
            values = batch[name].take(chosen)
            return (values.dictionary_decode() if pa.types.is_dictionary(values.type) else values).cast(kind)

        arrays = [column(CELL_ID, pa.string()), pa.array(rows), pa.array([part.source] * len(rows), pa.string())]
        arrays += [column(name, self.types[name]) for name in columns]
        return pa.table(arrays, names=["id", "row", "source", *columns])

    def table(self, hits: Hits, names: Sequence[str] | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """A row per hit: query (its name, else its number), rank from 1, id, row, source, similarity, and the columns.

        A column of the cells that is called like one of these becomes atlas_NAME.
        """
        n, k = hits.cells.shape
        there = hits.cells.ravel() >= 0
        found = self.take(hits.cells.ravel()[there], columns)
        queries = np.repeat(np.arange(n), k)[there]
        told = {
            "query": pa.array(queries) if names is None else pa.array(np.asarray(names, object)[queries], pa.string()),
            "rank": pa.array(np.tile(np.arange(1, k + 1), n)[there]),
            "id": found["id"],
            "row": found["row"],
            "source": found["source"],
            "similarity": pa.array(hits.similarity.ravel()[there]),
        }
        others = found.column_names[3:]
        shown = [f"atlas_{name}" if name in RESERVED else name for name in others]
        return pa.table([*told.values(), *found.columns[3:]], names=[*told, *shown])

    def vectors_of(self, cells: np.ndarray) -> np.ndarray:
        """The vectors of some cells (m,) -> (m, dim) float32. Reads the rows of all lists, 8 bytes a cell."""
        wanted, back = np.unique(cells, return_inverse=True)
        found = np.empty((len(wanted), self.space.dim), np.float32)
        for first, part in zip(self.first, self.parts, strict=False):
            for number in np.flatnonzero(part.sizes).tolist():
                rows = part.rows(number) + first
                hit = np.flatnonzero(np.isin(rows, wanted))
                found[np.searchsorted(wanted, rows[hit])] = part.vectors(number)[hit]
        return found[back]

    def counts(self, column: str, keep: np.ndarray | None = None) -> Counter[str]:
        """How many cells have each value of a text column; those without one are left out. keep: see `search`."""
        found: Counter[str] = Counter()
        for values, codes, cells in self.coded(column):
            some = codes if keep is None else codes[keep[cells]]
            found.update(dict(zip(values, np.bincount(some[some >= 0], minlength=len(values)).tolist(), strict=True)))
        return +found

    def coded(self, column: str) -> Any:
        """Yield (values, codes (m,) int32 with -1 for none, slice of cells), batch by batch, for a column as text."""
        for number, part in enumerate(self.parts):
            start = int(self.first[number])
            for i, batch in enumerate(part.batches):
                if column in batch.schema.names:
                    values = part.batch(i)[column]
                    if not pa.types.is_dictionary(values.type):
                        values = values.cast(pa.string()).dictionary_encode()
                    codes = values.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
                    yield values.dictionary.to_pylist(), codes, slice(start, start + len(batch))
                start += len(batch)

    def text_columns(self) -> list[str]:
        """The columns that hold codes: text of few distinct values."""
        fields = [field for part in self.parts for field in part.batches[0].schema]
        return list(dict.fromkeys(field.name for field in fields if pa.types.is_dictionary(field.type)))


def best_of(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> Hits:
    """(cells, similarity), each (n, m), of several parts -> the k best of each row."""
    cells, similarity = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    similarity = np.where(cells >= 0, similarity, -np.inf).astype(np.float32)
    if cells.shape[1] < k:
        more = ((0, 0), (0, k - cells.shape[1]))
        cells, similarity = np.pad(cells, more, constant_values=-1), np.pad(similarity, more, constant_values=-np.inf)
    if cells.shape[1] > 4 * k:  # a sort of all is what costs
        best = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        cells, similarity = np.take_along_axis(cells, best, 1), np.take_along_axis(similarity, best, 1)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return Hits(np.take_along_axis(cells, order, 1), np.take_along_axis(similarity, order, 1))


def open_index(path: str | Path) -> Index:
    """Open the folder of `fractal index`, in well under a second. Raises InputError for a damaged one."""
    return Index(read_folder(path))
