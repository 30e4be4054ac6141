"""The nearest cells of an index, by the full vector or a prefix, among all cells or those that a filter leaves.

The lists nearest to the query are opened, and every vector in them is compared. Nothing but the centroids is in memory.
faiss scans the mapped files, query by query. Where so many queries come at once that they share lists, and for a
prefix, each list is read once and compared with all queries that open it, in one matrix product.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fractal.base.errors import InputError
from fractal.base.files import read_whole
from fractal.data.parquet import CELL_ID
from fractal.search.folder import NO_COLUMN, Folder, Part, disk_blocks, open_folder

PROBES = 16  # lists that a search opens, where no other number is given
PREFIX_PROBES = 8  # and for a prefix: its lists are nearly alike, see docs/search.md
SURE = 4  # lists that are opened wherever their centres are: one alone may have fewer than k cells
QUERIES = 256  # at a time, so that their products with all centroids take 8 MB
SHARED = 2  # queries a list, from which on it pays to read each list once
IN_THREADS = 256  # lists, from which on it pays to scan them in threads
PAIRS = 1 << 21  # of a query and a list that it opens, at a time: of 65,536 queries with 32 lists, 50 MB
ENOUGH = 2_000  # cells that pass a filter are looked at per query, or 100 k of them, or all
HIT_COLUMNS = ("query", "rank", "id", "row", "source", "similarity")  # of the table of hits, before the cells' columns


@dataclass(frozen=True)
class Hits:
    """The k nearest cells of n queries, best first; where there are fewer, -1 and -inf at the end."""

    cells: np.ndarray  # (n, k) int64, numbered through all parts of the index
    similarity: np.ndarray  # (n, k) float32, cosines

    @staticmethod
    def concat(hits: "Sequence[Hits]") -> "Hits":
        return Hits(np.concatenate([h.cells for h in hits]), np.concatenate([h.similarity for h in hits]))


def in_threads(work: Callable[[np.ndarray], Hits], lists: np.ndarray) -> list[Hits]:
    """The work on slices of the lists (m, ...), in as many threads as torch has.

    In each torch computes alone: its own threads and those of faiss would wait for each other on the same cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, np.array_split(lists, threads)))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_faiss_thread() -> Iterator[None]:
    """See `in_threads`. Holds for the calling thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


class Filter:
    """The cells that a search may return: a mask (cells,) bool over the whole index."""

    def __init__(self, parts: Sequence[Part], mask: np.ndarray) -> None:
        self.mask = mask
        masks = [mask[part.first : part.first + part.cells] for part in parts]
        self.bits = [np.packbits(mask, bitorder="little") for mask in masks]  # faiss keeps a bare pointer to them
        self.selectors = [faiss.IDSelectorBitmap(bits) for bits in self.bits]
        per_list = [
            [mask[part.rows(i)].sum() for i in range(len(part.sizes))] for part, mask in zip(parts, masks, strict=True)
        ]
        self.per_list = np.array(per_list, np.int64).sum(0)  # (lists,) cells that pass
        self.count = int(self.per_list.sum())


class Index:
    """An opened index; `open_index` makes it. Cells are numbered 0 ... len(index) - 1, part after part."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.space, self.parts, self.centroids = folder, folder.space, folder.parts, folder.centroids
        self.batches = [batch for part in folder.parts for batch in part.batches]  # of columns
        self.quantizer = faiss.IndexFlatIP(self.space.dim)
        self.quantizer.add(self.centroids)
        self.cut_centres = {self.space.dim: self.centroids}
        self.mapped: list[Any] = []
        self.disk_blocks = -1  # see `read_ahead`
        self.scanners = [self.scanner(part) for part in self.parts]

    def __len__(self) -> int:
        return self.folder.cells

    def scanner(self, part: Part) -> Any:
        """faiss's inverted lists over a part's mapped file."""
        dim, lists = self.space.dim, len(self.centroids)
        kind = faiss.ScalarQuantizer.QT_fp16
        scanner = faiss.IndexIVFScalarQuantizer(self.quantizer, dim, lists, kind, faiss.METRIC_INNER_PRODUCT, False)
        on_disk = faiss.OnDiskInvertedLists(lists, scanner.code_size, str(part.path))
        on_disk.read_only = True
        sizes = part.sizes.astype(np.uint64)  # has a name: faiss is given its bare address
        on_disk.set_all_lists_sizes(faiss.swig_ptr(sizes))
        on_disk.totsize = int(part.starts[-1])
        on_disk.do_mmap()
        scanner.replace_invlists(on_disk, False)
        self.mapped.append(on_disk)  # faiss keeps a bare pointer to it
        scanner.ntotal, scanner.is_trained = part.cells, True
        return scanner

    def check_adapter(self, sha256s: Sequence[str], what: str) -> None:
        """Raise InputError unless one of an adapter's hashes is that of the adapter that made the indexed vectors."""
        if self.space.adapters and sha256s and not set(sha256s) & set(self.space.adapters):
            raise InputError(
                f"{what}: its adapter ({sha256s[0][:12]}...) is not that of the index {self.folder.path} "
                f"({self.space.adapters[0][:12]}...), so their vectors can't be compared; name the right one"
            )

    # --- vectors ------------------------------------------------------------------------------------------------------

    def search(
        self,
        queries: np.ndarray,
        k: int = 10,
        prefix: int | None = None,
        keep: np.ndarray | None = None,
        probes: int | None = None,
        reach: float = np.inf,
    ) -> Hits:
        """The k nearest cells of each query by cosine.

        Parameters
        ----------
        queries : (n, dim) float, of any norm, in the space of the index
        k : int, default 10
        prefix : int, default all; compare so many first blocks only
        keep : (len(index),) bool, default all; the cells that may be returned
        probes : int, default 16, of a prefix 8; how many lists to open. All of them make the search exact
        reach : float, default no limit; leave lists unopened (but for the best SURE) whose centre is, by cosine
            distance, more than so many times as far as the nearest: a query in the middle of a list needs few
            (Chen et al., SPANN, 2021, https://arxiv.org/abs/2111.08566)

        Raises
        ------
        InputError : for vectors of another width, that are zero or not finite; for a prefix that they don't have; for
            k below 1.
        """
        if k < 1:
            raise InputError(f"k is {k}: ask for one hit or more")
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.space.dim:
            raise InputError(f"queries have {queries.shape[-1]} numbers, the vectors of the index {self.space.dim}")
        width = self.space.dim if prefix is None else self.space.prefix_width(prefix)
        norms = np.linalg.norm(queries[:, :width], axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise InputError("the vector of a query is zero or not finite; leave such cells out")
        if keep is not None and keep.shape != (len(self),):
            raise InputError(f"a filter of {keep.size:,} cells, the index has {len(self):,}")
        only = None if keep is None else Filter(self.parts, keep)
        probes = min(probes or (PROBES if width == self.space.dim else PREFIX_PROBES), len(self.centroids))
        unit, shared = queries[:, :width] / norms, len(queries) * probes >= SHARED * len(self.centroids)
        # so many queries at a time that there are `pairs` of one and a list that it opens, or all
        scan, pairs = (self.scan, 1) if not shared and width == self.space.dim else (self.scan_by_list, PAIRS)
        step = max(QUERIES, PAIRS // probes) if shared and width == self.space.dim and only is None else QUERIES
        hits, lists, first = [Hits(np.empty((0, k), np.int64), np.empty((0, k), np.float32))], list[np.ndarray](), 0
        for start in range(0, len(unit), step):
            end = min(start + step, len(unit))
            lists.append(self.lists(unit[start:end], probes, k, only, reach))
            if not shared:
                self.read_ahead(lists[-1])
            if end == len(unit) or sum(opened.size for opened in lists) >= pairs:
                hits.append(scan(unit[first:end], lists, k, only))
                lists, first = [], end
        return Hits.concat(hits)

    def read_ahead(self, lists: np.ndarray) -> None:
        """Have the system read the lists (n, most) at once, if this process has been reading from the disk.

        One after the other, as they are scanned, 16 lists of an index that is not in memory take five times as long.
        """
        before, self.disk_blocks = self.disk_blocks, disk_blocks()
        if self.disk_blocks != before:
            for part, number in product(self.parts, np.unique(lists[lists >= 0]).tolist()):
                part.read_ahead(number)

    def lists(self, unit: np.ndarray, probes: int, k: int, only: Filter | None, reach: float = np.inf) -> np.ndarray:
        """The lists to open for each query, best first, (n, most) int64; -1 where a query opens fewer."""
        if only is None and unit.shape[1] == self.space.dim:
            cosine, order = self.quantizer.search(unit, probes)
            return within(cosine, order, reach)
        similarity = torch.from_numpy(unit) @ torch.from_numpy(self.centres(unit.shape[1])).T
        if only is None:
            return within(*topk(similarity, probes), reach)
        similarity[:, only.per_list == 0] = -2  # below any cosine
        enough, most = min(only.count, max(ENOUGH, 100 * k)), probes
        while True:
            cosine, order = topk(similarity, most)
            seen = np.cumsum(only.per_list[order], axis=1)
            if most == len(self.centroids) or (seen[:, -1] >= enough).all():
                break
            most = min(4 * most, len(self.centroids))
        probed = (within(cosine[:, :probes], order[:, :probes], reach) >= 0).sum(1)
        opened = np.minimum(np.maximum((seen < enough).sum(1) + 1, probed), (only.per_list > 0).sum())
        most = max(1, int(opened.max()))
        return np.where(np.arange(most) < opened[:, None], order[:, :most], -1)

    def centres(self, width: int) -> np.ndarray:
        """The first numbers of the centroids, of length 1, (lists, width) float32; kept, one query needs them all."""
        if width not in self.cut_centres:
            cut = torch.from_numpy(self.centroids[:, :width])
            self.cut_centres[width] = torch.nn.functional.normalize(cut, dim=1).numpy()
        return self.cut_centres[width]

    def scan(self, unit: np.ndarray, batches: Sequence[np.ndarray], k: int, only: Filter | None) -> Hits:
        """Compare full vectors, query by query. batches: one batch of `lists`."""
        n = len(unit)
        lists = np.ascontiguousarray(batches[0], np.int64)
        coarse = np.zeros(lists.shape, np.float32)
        best = []
        for number, (scanner, part) in enumerate(zip(self.scanners, self.parts, strict=True)):
            similarity, rows = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
            scanner.nprobe = lists.shape[1]
            options = faiss.SearchParametersIVF(nprobe=lists.shape[1])
            if only is not None:
                options.sel = only.selectors[number]
            vectors, *pointers = map(faiss.swig_ptr, (unit, lists, coarse, similarity, rows))
            scanner.search_preassigned_c(n, vectors, k, *pointers, False, options)
            part.checked(rows[rows >= 0])
            best.append((np.where(rows >= 0, rows + part.first, -1), similarity))
        return best_of(best, k)

    def scan_by_list(self, unit: np.ndarray, batches: Sequence[np.ndarray], k: int, only: Filter | None) -> Hits:
        """Compare full vectors, or prefixes, which are cut from the stored vectors and made unit length again.

        batches: of `lists`, in the order of the queries.
        """
        first = np.cumsum([0, *map(len, batches)])
        query = np.concatenate(
            [np.nonzero(lists >= 0)[0] + start for lists, start in zip(batches, first, strict=False)]
        )
        number = np.concatenate([lists[lists >= 0] for lists in batches])
        order = np.argsort(number, kind="stable")
        query, number = query[order], number[order]
        bounds = np.flatnonzero(np.diff(number, prepend=-1, append=-1))
        opened = np.column_stack([number[bounds[:-1]], bounds[:-1], bounds[1:]])
        scan = partial(self.scan_opened, unit, query, k, only)
        hits = in_threads(scan, opened) if len(opened) >= IN_THREADS else [scan(opened)]
        return best_of([(found.cells, found.similarity) for found in hits], k)

    @one_faiss_thread()
    def scan_opened(self, unit: np.ndarray, query: np.ndarray, k: int, only: Filter | None, opened: np.ndarray) -> Hits:
        """query (pairs,): the queries that open a list, list by list; opened (m, 3): lists, and their slices of it."""
        width = unit.shape[1]
        best, queries = faiss.ResultHeap(len(unit), k, keep_max=True), torch.from_numpy(unit)
        for number, start, end in opened.tolist():
            members = query[start:end]
            for part in self.parts:
                rows = part.rows(number) + part.first
                # torch makes float32 of float16 ten times as fast as numpy, and takes no array that is read-only
                vectors = torch.from_numpy(np.array(part.vectors(number)[:, :width])).float()
                if only is not None:
                    passing = only.mask[rows]
                    rows, vectors = rows[passing], vectors[torch.from_numpy(passing)]
                similarity = queries[members] @ vectors.T
                if width < self.space.dim:
                    similarity /= vectors.norm(dim=1).clamp(min=1e-12)
                best.add_result_subset(members, similarity.numpy(), rows)
        best.finalize()
        return Hits(best.I, np.where(best.I < 0, np.float32(-np.inf), best.D))

    def vectors_of(self, cells: np.ndarray) -> np.ndarray:
        """The stored vectors of cells (m,), (m, dim) float32 of length 1. Looks through the rows of all lists."""
        wanted, back = np.unique(cells, return_inverse=True)
        vectors = np.empty((len(wanted), self.space.dim), np.float32)
        for part in self.parts:
            for number in np.flatnonzero(part.sizes).tolist():
                rows = part.rows(number) + part.first
                hit = np.flatnonzero(np.isin(rows, wanted))
                vectors[np.searchsorted(wanted, rows[hit])] = part.vectors(number)[hit]
        return vectors[back]

    # --- columns ------------------------------------------------------------------------------------------------------

    @cached_property
    def types(self) -> dict[str, pa.DataType]:
        """The cells' columns beside their id, and their types; text where two parts differ."""
        types: dict[str, pa.DataType] = {}
        for field in self.fields():
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            types[field.name] = kind if types.get(field.name, kind) == kind else pa.string()
        types.pop(CELL_ID, None)
        return types

    @property
    def columns(self) -> list[str]:
        return list(self.types)

    def fields(self) -> list[pa.Field]:
        """The columns of all parts, as they are stored."""
        schemas = [part.batches[0].data.schema for part in self.parts]
        none = pa.schema([(NO_COLUMN, pa.null())])
        return [field for schema in schemas if not schema.equals(none) for field in schema]

    @property
    def text_columns(self) -> list[str]:
        """The columns that hold codes: text of few distinct values."""
        return list(dict.fromkeys(field.name for field in self.fields() if pa.types.is_dictionary(field.type)))

    def check_columns(self, names: Sequence[str]) -> None:
        """Raises InputError for a column that there is not."""
        if missing := [name for name in names if name not in self.types]:
            there = ", ".join(self.columns) or "none"
            raise InputError(f"{self.folder.path}: has no column '{missing[0]}'; it has {there}")

    def take(self, cells: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Columns, `cell_id` among them, of cells (m,) int64, in that order; null where a part lacks one."""
        schema = pa.schema([(name, self.types.get(name, pa.string())) for name in columns])
        order = np.argsort(cells, kind="stable")
        tables, ascending = [schema.empty_table()], cells[order]
        for batch in self.batches:
            here = slice(*np.searchsorted(ascending, [batch.cells.start, batch.cells.stop]))
            if rows := (ascending[here] - batch.first).tolist():
                taken = {f.name: batch.column(f.name, f.type).take(pa.array(rows)).cast(f.type) for f in schema}
                tables.append(pa.table(taken, schema=schema))
        return pa.concat_tables(tables).take(pa.array(np.argsort(order, kind="stable")))

    def table(self, hits: Hits, names: Sequence[str] | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """A row per hit: query (its name, else its number), rank from 1, id, row, source, similarity, and the columns.

        Parameters
        ----------
        hits : of n queries
        names : n str, default their numbers
        columns : str, default all; one that is named like the first six becomes atlas_NAME

        Raises
        ------
        InputError : for a column that there is not.
        """
        columns = self.columns if columns is None else list(columns)
        self.check_columns(columns)
        queries, ranks = np.nonzero(hits.cells >= 0)
        cells = hits.cells[queries, ranks]
        first = np.array([part.first for part in self.parts], np.int64)
        part = np.searchsorted(first, cells, "right") - 1
        sources = np.array([part.source for part in self.parts], object)
        taken = self.take(cells, [CELL_ID, *columns])
        arrays = [
            pa.array(queries) if names is None else pa.array(np.asarray(names, object)[queries], pa.string()),
            pa.array(ranks + 1),
            taken[CELL_ID],
            pa.array(cells - first[part]),
            pa.array(sources[part], pa.string()),
            pa.array(hits.similarity[queries, ranks]),
        ]
        renamed = [hit_name(name, columns) for name in columns]
        return pa.table([*arrays, *(taken[name] for name in columns)], names=[*HIT_COLUMNS, *renamed])

    def counts(self, column: str, keep: np.ndarray | None = None) -> Counter[str]:
        """How many cells have each value of a text column; those without one are left out. keep: see `search`."""
        counts: Counter[str] = Counter()
        for values, codes, cells in self.coded(column):
            kept = codes if keep is None else codes[keep[cells]]
            counts.update(dict(zip(values, np.bincount(kept[kept >= 0], minlength=len(values)).tolist(), strict=True)))
        return +counts

    def coded(self, column: str) -> Iterator[tuple[list[str], np.ndarray, slice]]:
        """Yield (values, codes (m,) int32 with -1 for none, slice of cells), batch by batch, for a column as text."""
        for batch in self.batches:
            values = batch.column(column)
            if not pa.types.is_dictionary(values.type):
                values = values.cast(pa.string()).dictionary_encode()
            codes = values.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
            yield values.dictionary.to_pylist(), codes, batch.cells


def topk(similarity: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    values, columns = similarity.topk(k, dim=1)
    return values.numpy(), columns.numpy()


def within(cosine: np.ndarray, lists: np.ndarray, reach: float) -> np.ndarray:
    """Lists and the cosines of their centres, both (n, probes), best first -> the lists, -1 for those out of reach."""
    distance = 1 - cosine
    near = distance <= reach * distance[:, :1].clip(1e-12)
    near[:, :SURE] = True
    return np.where(near, lists, -1)


def hit_name(name: str, columns: Sequence[str]) -> str:
    """What a column of the cells is called in the table of hits: no two of its columns have one name."""
    new = name
    while new.casefold() in HIT_COLUMNS or (new != name and new in columns):
        new = f"atlas_{new}"
    return new


def best_of(candidates: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> Hits:
    """(cells, similarity), each (n, m), of several parts -> the k best of each row."""
    cells, similarity = (np.concatenate(arrays, axis=1) for arrays in zip(*candidates, strict=True))
    similarity = np.where(cells >= 0, similarity, -np.inf).astype(np.float32)
    if (lacking := k - cells.shape[1]) > 0:
        pad = ((0, 0), (0, lacking))
        cells, similarity = np.pad(cells, pad, constant_values=-1), np.pad(similarity, pad, constant_values=-np.inf)
    if cells.shape[1] > 4 * k:  # a sort of all is what costs
        best = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        cells, similarity = np.take_along_axis(cells, best, 1), np.take_along_axis(similarity, best, 1)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return Hits(np.take_along_axis(cells, order, 1), np.take_along_axis(similarity, order, 1))


def open_index(path: str | Path) -> Index:
    """Open the folder of `fractal index`, in well under a second, also while another run replaces it.

    Raises InputError for a damaged one.
    """
    return read_whole(Path(path), lambda path: Index(open_folder(path)))
