"""What vectors must be to be used, and which of them are the same. All arrays are (n, dim) float32."""

from typing import Any

import numpy as np

from fractal.base.errors import InputError

CHUNK = 16_384  # rows; 8 MB of 128-d vectors
MIN_LENGTH = 1e-12  # what torch divides a shorter vector by, so that it would not get length 1


def usable(vectors: np.ndarray) -> np.ndarray:
    """(n,) bool: finite, and of a length that can be made 1 in float32: MIN_LENGTH or more, its square no overflow."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    return np.isfinite(squares) & (squares >= MIN_LENGTH**2)


def refuse(bad: np.ndarray, start: int, path: Any) -> None:
    """Raise InputError for the first of the `bad` rows, (m,) bool; `start` is the number of row 0."""
    if bad.any():
        raise InputError(
            f"{path}: the vector of cell {start + bad.argmax()} is zero or not finite; leave such cells out"
        )


def vector_hashes(vectors: np.ndarray) -> np.ndarray:
    """(n, dim) float32 -> (n,) int64, equal for equal vectors, and good within this process only (SipHash).

    Of 8 million different vectors two share a hash with a chance of 2 in a million.
    """
    whole = np.ascontiguousarray(vectors + np.float32(0))  # -0. becomes 0.
    rows = whole.view(f"V{whole.shape[1] * whole.itemsize}").ravel().tolist()  # one bytes object each
    return np.fromiter(map(hash, rows), np.int64, len(rows))


def first_equal(hashes: np.ndarray) -> np.ndarray:
    """(n,) hashes -> (n,) int64: for each row the first row with the same hash, itself where there is none."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    return first[group].astype(np.int64)
