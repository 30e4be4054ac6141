"""An atlas: labelled cells, in the Parquet file of ingest.py or stratify.py, or in memory.

    atlas = Atlas.open("data/stratified.parquet")            # a file, a folder of files, a URI
    atlas = Atlas.of_table(atlas_table(vectors, columns))    # what `fractal.fit` makes of an AnnData
    atlas.num_rows, atlas.dim, atlas.levels, atlas.metadata, atlas.fingerprint
    codes, names = atlas.codes("level4_subtype")             # (num_rows,) int32, and the names, sorted
    atlas.finest, atlas.studies                              # the same of the finest level, and of the studies
    atlas.first_copies                                       # (num_rows,) int64, the first row with the same vector
    cells = atlas.read(rows)                                 # LabelledVectors: vectors, labels, classes, levels
    atlas.balanced_rows(rows, 50_000, seed=0), atlas.path_counts(keep)
    for vectors in atlas.vectors(): ...                      # all of them in order, (m, dim) float32

A file is opened once. Its columns of codes are read when they are first asked for and kept, 4 bytes a cell each; its
vectors are not.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from fractal.base.errors import InputError
from fractal.base.storage import Location
from fractal.data.labels import Codes, dictionary_of, renumbered
from fractal.data.parquet import Parquet, fingerprint, is_text, level_columns, metadata_of, read_vectors, reading
from fractal.data.reorder import round_robin
from fractal.data.vectors import first_equal, usable, vector_hashes
from fractal.hierarchy.levels import LEVEL_COLUMNS, LEVELS, MAX_LEVELS, MIN_LEVELS, column_names


@dataclass(frozen=True)
class LabelledVectors:
    """Some rows of an atlas: vectors (n, dim) float32, labels (n, levels) int64 and the names behind the labels."""

    vectors: np.ndarray
    labels: np.ndarray
    classes: list[list[str]]  # per level, sorted; label c of level k is classes[k][c]
    levels: tuple[str, ...] = LEVELS  # names of the levels, coarse to fine

    def split(self, n: int, held: int | None = None) -> tuple["LabelledVectors", "LabelledVectors"]:
        """The first n cells, of which `held` (None: all) have their vectors here, and the others; with common codes."""
        m = n if held is None else held
        return (
            replace(self, vectors=self.vectors[:m], labels=self.labels[:n]),
            replace(self, vectors=self.vectors[m:], labels=self.labels[n:]),
        )


class Atlas:
    """`num_rows` labelled cells; `Atlas.open` and `Atlas.of_table` make one.

    Raises InputError that says which column is missing, or is of another type.
    """

    def __init__(self, data: Parquet, in_memory: bool = False) -> None:
        self.in_memory = in_memory
        # The path is what messages call it: Path("adata") for cells in memory.
        self.path, self.data, self.schema, self.num_rows = data.path, data, data.schema, data.num_rows
        check_columns(self.schema, self.path)
        self.dim = self.schema.field("embedding").type.list_size
        self.levels = tuple(name.split("_", 1)[1] for name in level_columns(self.schema))
        self.metadata = metadata_of(self.schema)
        self.known: dict[str, Codes] = {}

    @staticmethod
    def open(path: str | Location) -> "Atlas":
        """A Parquet file, a folder of such files, or one at a URI."""
        return Atlas(Parquet.open(path))

    @staticmethod
    def of_table(table: pa.Table) -> "Atlas":
        """Cells in memory, of `atlas_table`."""
        return Atlas(Parquet.of_table(table), in_memory=True)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 that changes with any cell, and with their order."""
        if not self.in_memory:
            return fingerprint(self.path)
        digest = hashlib.sha256()
        for batch in self.data.read(self.schema.names).to_batches():
            digest.update(batch.serialize())
        return digest.hexdigest()

    def codes(self, column: str) -> Codes:
        """A column of text -> its codes and names."""
        if column not in self.known:
            self.known[column] = text_codes(self.data.read([column]), column, self.path)
        return self.known[column]

    @property
    def finest(self) -> Codes:
        return self.codes(column_names(self.levels)[-1])

    @property
    def has_studies(self) -> bool:
        return "study" in self.schema.names

    @property
    def studies(self) -> Codes:
        """Raises InputError for an atlas without studies."""
        if not self.has_studies:
            raise InputError(f"{self.path}: has no column 'study', so no study can be held out; hold out cells instead")
        return self.codes("study")

    def column(self, name: str) -> pa.Array:
        """A whole column (num_rows,); text that has few names as a dictionary of those that occur, sorted."""
        if name in (*column_names(self.levels), "study"):
            return pa.DictionaryArray.from_arrays(*self.codes(name)).cast(self.schema.field(name).type)
        return self.data.read([name])[name].unify_dictionaries()

    @property
    def is_stratified(self) -> bool:
        """Does it say that its rows are in the order of stratify.py, so that its first n rows are balanced?"""
        return self.metadata.get("stratified") == column_names(self.levels)[-1]

    def vectors(self) -> Iterator[np.ndarray]:
        """All vectors in their order, (m, dim) float32 with m <= ROW_GROUP, in flat memory."""
        for table in self.data.tables(["embedding"]):
            yield read_vectors(table, self.path)

    @property
    def num_copies(self) -> int:
        """Cells that have the vector of an earlier one."""
        return int((self.first_copies != np.arange(self.num_rows)).sum())

    @cached_property
    def first_copies(self) -> np.ndarray:
        """(num_rows,) int64, for each row the first row that has exactly its vector: itself where there is none.

        One pass over the vectors; memory: 24 bytes a row.
        """
        return first_equal(np.concatenate([vector_hashes(vectors) for vectors in self.vectors()]))

    def read(self, rows: np.ndarray, held: np.ndarray | None = None) -> LabelledVectors:
        """The given rows, in the given order. Raises InputError for vectors that are zero or not finite.

        held: the rows whose vectors are read, where other processes hold those of the others (None: all).
        """
        labels, classes = np.empty((len(rows), len(self.levels)), np.int64), []
        for k, column in enumerate(column_names(self.levels)):
            codes, names = self.codes(column)
            used, labels[:, k] = np.unique(codes[rows], return_inverse=True)
            classes.append([names[code] for code in used])
        return LabelledVectors(self.vectors_of(rows if held is None else held), labels, classes, self.levels)

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """(m, dim) float32; only row groups that hold one of the rows are touched, one at a time."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        vectors, starts = np.empty((len(rows), self.dim), np.float32), np.cumsum([0, *self.data.sizes])
        bounds = np.searchsorted(ascending, starts)
        touched = np.flatnonzero(np.diff(bounds)).tolist()
        whole = self.data.tables(["embedding"], self.num_rows, touched)
        for group, table in zip(touched, whole, strict=True):
            lo, hi = bounds[group : group + 2]
            chosen = read_vectors(table, self.path)[ascending[lo:hi] - starts[group]]
            if not usable(chosen).all():
                raise InputError(f"{self.path}: embeddings are zero or not finite; make it again with ingest.py")
            vectors[order[lo:hi]] = chosen
        return vectors

    def path_counts(self, keep: np.ndarray) -> dict[tuple[str, ...], int]:
        """How many of the kept rows, a mask (num_rows,), lie on each path: (system, ..., subtype) -> count."""
        columns = column_names(self.levels)
        table = pa.table({column: self.codes(column)[0][keep] for column in columns})
        counts = table.group_by(columns).aggregate([([], "count_all")])
        labels = [[self.codes(column)[1][code] for code in counts[column].to_pylist()] for column in columns]
        return dict(zip(zip(*labels, strict=True), counts["count_all"].to_pylist(), strict=True))

    def balanced_rows(self, rows: np.ndarray, n: int, seed: int) -> np.ndarray:
        """n of the given rows (m,), ascending, of every finest label as many as sizes allow; all where n is no fewer.

        The first n of a stratified atlas; of any other order (an atlas sorted by type, say) those that stratify.py
        would have put first, drawn with the seed.
        """
        if n >= len(rows):
            return np.sort(rows)
        if self.is_stratified:
            return np.sort(rows)[:n]
        return np.sort(rows[round_robin(self.finest[0][rows], seed)[:n]])


def check_columns(schema: pa.Schema, path: Location) -> None:
    """Raise InputError that says which column of an atlas is missing, or is of another type."""
    columns = level_columns(schema)
    if not MIN_LEVELS <= len(columns) <= MAX_LEVELS:
        raise InputError(
            f"{path}: lacks the columns of its levels, level1_NAME, level2_NAME, ... ({MIN_LEVELS} to {MAX_LEVELS}), "
            f"such as {', '.join(LEVEL_COLUMNS)}; make it with ingest.py"
        )
    levels = [name.split("_", 1)[1] for name in columns]
    if columns != column_names(levels) or len(set(levels)) < len(levels):
        raise InputError(f"{path}: its levels are {', '.join(columns)}, expected level1_NAME, level2_OTHER, ...")
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32():
        raise InputError(f"{path}: 'embedding' is {kind}, expected fixed_size_list<float32>")
    for name in (*columns, *(name for name in ("cell_id", "study") if name in schema.names)):
        if not is_text(schema.field(name).type):
            raise InputError(f"{path}: '{name}' is {schema.field(name).type}, expected text; make it with ingest.py")


def text_codes(table: pa.Table, name: str, path: str | Location) -> Codes:
    """A text column of a table -> its (n,) int32 codes and their names, sorted, without those that do not occur."""
    if table[name].null_count:
        raise InputError(f"{path}: {table[name].null_count} cells have no {name}; make it again with ingest.py")
    with reading(path):
        array = dictionary_of(table[name])
        codes, names = array.indices.to_numpy(), array.dictionary.to_pylist()
    if not ((codes >= 0) & (codes < len(names))).all():  # Arrow does not look
        raise InputError(f"{path}: damaged, the {name} of a cell is none of the column's names; make it again")
    used = sorted(names[code] for code in np.flatnonzero(np.bincount(codes, minlength=len(names))))
    return renumbered(codes, names, used).astype(np.int32), used
