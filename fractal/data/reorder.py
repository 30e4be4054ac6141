"""Rows in another order: the balanced one of stratify.py, and any one in flat memory."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

PIECE = 65_536  # rows that are read back at once; 34 MB of 128-d vectors


def reorder(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]], ends: np.ndarray, row: np.dtype, folder: str | Path | None
) -> Iterator[np.ndarray]:
    """Yield the rows 0 .. ends[-1] - 1, one bucket (m,) of dtype `row` after the other, from chunks in any order.

    A chunk is (positions (m,) integers, rows (m,) of `row`): its row i belongs at positions[i]. All positions together
    must be the numbers 0 .. ends[-1] - 1, each once; the caller sees to that. ends (buckets,) int64, ascending: bucket
    b has the rows ends[b - 1] .. ends[b] - 1.

    This is distribution sort (Knuth, The Art of Computer Programming 3, 5.2.5) with one bucket in memory, as a hybrid
    hash join has it: rows of the bucket that is due go straight to their position, rows of later ones are appended to
    their bucket's stretch of a file in `folder` (None: the system's folder for such files). Rows that come nearly in
    order never touch the disk; rows in random order are written and read once more, with 8 bytes each for the position.
    Memory: the bucket that is due and the one that the caller still has, and a chunk. The file has no name, so even a
    killed process leaves none behind.
    """
    starts, record = ends - np.diff(ends, prepend=0), np.dtype([("position", "<i8"), ("row", row)])
    waiting = np.zeros(len(ends), np.int64)  # rows in the file, per bucket
    with tempfile.TemporaryFile(dir=folder) as file:
        source = parts(chunks, ends)
        for due, (first, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            ready = np.empty(end - first, row)
            file.seek(first * record.itemsize)
            for start in range(0, waiting[due], PIECE):
                records = np.empty(min(PIECE, waiting[due] - start), record)
                file.readinto(records.view(np.uint8).data)
                ready[records["position"] - first] = records["row"]
            missing = len(ready) - waiting[due]
            while missing:
                owner, positions, rows = next(source)
                if owner == due:
                    ready[positions - first] = rows
                    missing -= len(positions)
                else:
                    records = np.empty(len(positions), record)
                    records["position"], records["row"] = positions, rows
                    file.seek((starts[owner] + waiting[owner]) * record.itemsize)
                    file.write(records.view(np.uint8).data)
                    waiting[owner] += len(positions)
            yield ready


def equal_buckets(num_rows: int, size: int) -> np.ndarray:
    """The ends of buckets of `size` rows, (buckets,) int64; the last one is what is left."""
    return np.minimum(np.arange(size, num_rows + size, size), num_rows)


def parts(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]], ends: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Split each chunk by bucket, the first bucket first, so that it may be complete when the next one's rows come."""
    for positions, rows in chunks:
        owner = np.searchsorted(ends, positions, "right")
        by_owner = np.argsort(owner, kind="stable")
        owners, starts = np.unique(owner[by_owner], return_index=True)
        if len(owners) == 1:  # the usual chunk of rows that come nearly in order: no copy
            yield int(owners[0]), positions, rows
            continue
        for number, mine in zip(owners.tolist(), np.split(by_owner, starts[1:]), strict=True):
            yield number, positions[mine], rows[mine]


def round_robin(labels: np.ndarray, seed: int) -> np.ndarray:
    """The balanced order of n rows with these labels (n,) int -> (n,) int64 row numbers.

    The k-th row of every label comes before the (k+1)-th of any; which one it is, and the order within a round, are
    drawn with the seed.
    """
    from pandas import Series  # half a second, which readers of an atlas need not wait for

    shuffled = np.random.default_rng(seed).permutation(len(labels))
    drawn = Series(labels[shuffled])
    turn = drawn.groupby(drawn).cumcount().to_numpy()  # a row with turn k is the k-th of its label
    return shuffled[np.argsort(turn, kind="stable")]
