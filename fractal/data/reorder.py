"""Rows in another order: the balanced one of stratify.py, and any one in flat memory."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

PIECE = 65_536  # rows that are read back at once; 34 MB of 128-d vectors


def reorder(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]], num_rows: int, dim: int, bucket: int, folder: str | Path | None
) -> Iterator[np.ndarray]:
    """Yield the rows 0 .. num_rows - 1, `bucket` of them at a time (m, dim) float32, from chunks in any order.

    A chunk is (positions (m,) integers, rows (m, dim) float32): its row i belongs at positions[i]. All positions
    together must be the numbers 0 .. num_rows - 1, each once; the caller sees to that.

    This is distribution sort (Knuth, The Art of Computer Programming 3, 5.2.5) with one bucket in memory, as a hybrid
    hash join has it: rows of the bucket that is due go straight to their position, rows of later ones are appended to
    their bucket's stretch of a file in `folder` (None: the system's folder for such files). Rows that come nearly in
    order never touch the disk; rows in random order are written and read once more, 4 * dim bytes each. Memory: the
    bucket that is due and the one that the caller still has, a chunk, and 8 bytes for each row in the file. The file
    has no name, so even a killed process leaves none behind.
    """
    positions_in_file = np.empty(num_rows, np.int64)  # pages of it that nothing is written to take no memory
    waiting = np.zeros(-(-num_rows // bucket), np.int64)  # rows in the file, per bucket
    with tempfile.TemporaryFile(dir=folder) as file:
        source = parts(chunks, bucket)
        for due in range(len(waiting)):
            first = due * bucket
            ready = np.empty((min(bucket, num_rows - first), dim), np.float32)
            file.seek(first * 4 * dim)
            for start in range(first, first + waiting[due], PIECE):
                positions = positions_in_file[start : min(start + PIECE, first + waiting[due])]
                rows = np.empty((len(positions), dim), np.float32)
                file.readinto(rows.data)
                ready[positions - first] = rows
            missing = len(ready) - waiting[due]
            while missing:
                owner, positions, rows = next(source)
                if owner == due:
                    ready[positions - first] = rows
                    missing -= len(positions)
                else:
                    start = owner * bucket + waiting[owner]
                    file.seek(start * 4 * dim)
                    file.write(np.ascontiguousarray(rows, np.float32).data)
                    positions_in_file[start : start + len(positions)] = positions
                    waiting[owner] += len(positions)
            yield ready


def parts(chunks: Iterable[tuple[np.ndarray, np.ndarray]], bucket: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Split each chunk by bucket, the first bucket first, so that it may be complete when the next one's rows come."""
    for positions, rows in chunks:
        owner = positions // bucket
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
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_label = np.argsort(labels[shuffled], kind="stable")  # positions in `shuffled`, label by label
    size = np.bincount(labels)
    first = np.repeat(np.cumsum(size) - size, size)
    turn = np.empty(len(labels), np.int64)  # a row with turn k is the k-th of its label
    turn[by_label] = np.arange(len(labels)) - first
    return shuffled[np.argsort(turn, kind="stable")]
