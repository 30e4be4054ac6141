"""Rows in another order: numpy's own indexing is the oracle, for any order, chunks, buckets and memory."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fractal.data.reorder
import stratify
from fractal.data.atlas import Atlas
from fractal.data.reorder import equal_buckets, reorder
from fractal.hierarchy.levels import LEVEL_COLUMNS
from stratify import round_robin


def vector(dim: int) -> np.dtype:
    return np.dtype((np.float32, (dim,)))


def chunked(places: np.ndarray, rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(rows), size):
        yield places[start : start + size], rows[start : start + size]


@given(st.permutations(range(23)), st.integers(1, 30), st.integers(1, 30), st.integers(1, 3))
def test_any_order_any_chunks_any_buckets(order: list[int], size: int, bucket: int, dim: int):
    places, rows = np.array(order), np.random.default_rng(0).random((23, dim), np.float32)
    expected = np.empty_like(rows)
    expected[places] = rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fractal.data.reorder, "PIECE", 4)
        buckets = list(reorder(chunked(places, rows, size), equal_buckets(23, bucket), vector(dim), None))
    assert [len(b) for b in buckets[:-1]] == [bucket] * (len(buckets) - 1)
    assert np.array_equal(np.concatenate(buckets), expected)


@pytest.mark.parametrize(("window", "most"), [(1, 0), (30, 30), (1000, 1000)])
def test_the_file_holds_only_what_comes_too_early(window: int, most: int, monkeypatch: pytest.MonkeyPatch):
    """Rows are shuffled inside windows, as several threads leave them, that lie across the buckets' edges."""
    rng = np.random.default_rng(0)
    places = np.concatenate([start + rng.permutation(min(window, 1000 - start)) for start in range(0, 1000, window)])
    rows = places[:, None].astype(np.float32)
    written: list[int] = []

    class Spy:
        def __init__(self, dir: str | Path | None) -> None:  # noqa: A002
            self.file = real(dir=dir)

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, data: memoryview) -> int:
            written.append(data.nbytes // 12)  # a position and one number
            return self.file.write(data)

    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", Spy)
    found = np.concatenate(list(reorder(chunked(places, rows, 50), equal_buckets(1000, 100), vector(1), None)))
    assert np.array_equal(found[:, 0], np.arange(1000))
    edges = 9 if window < 1000 else 1  # at each edge of two buckets at most one window's rows wait
    assert sum(written) <= most * edges
    assert bool(written) == (window > 1)


@pytest.mark.parametrize("memory", ["0", "20KB", "1MB", "2GB"])
def test_stratify_equals_a_table_that_is_taken_whole(
    memory: str, stratified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stratify, "ROW_GROUP", 50)
    monkeypatch.setattr(fractal.data.parquet, "ROW_GROUP", 70)
    cells = pq.read_table(tmp_path / "cells.parquet")
    names = sorted(set(cells["level4_subtype"].to_pylist()))
    order = round_robin(np.array([names.index(name) for name in cells["level4_subtype"].to_pylist()]), seed=3)
    argv = ["--input", str(tmp_path / "cells.parquet"), "--seed", "3", "--output"]
    stratify.main([*argv, str(tmp_path / "a"), "--memory", memory])
    assert pq.read_table(tmp_path / "a").to_pylist() == cells.take(order).to_pylist()
    stratify.main([*argv, str(tmp_path / "b")])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "tmp"))]


def test_vectors_are_iterated_whatever_the_row_groups(tmp_path: Path):
    vectors = np.random.default_rng(0).random((333, 3), np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 3)
    table = pa.table({"embedding": column, **{name: ["a"] * 333 for name in LEVEL_COLUMNS}})
    for size in (1, 100, 333):
        pq.write_table(table, tmp_path / "a", row_group_size=size)
        assert np.array_equal(np.concatenate(list(Atlas.open(tmp_path / "a").vectors())), vectors)


@pytest.mark.parametrize("text", ["-1", "x", "1TB", "nan", "MB"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(SystemExit):
        stratify.main(["--memory", text])


@pytest.mark.slow  # two processes
def test_a_full_disk_is_one_line(stratified: Path, tmp_path: Path):
    """Files above 10 kB can't be written: first the temporary file is refused, then, without one, the output."""
    before = sorted(os.listdir(tmp_path))
    for memory, row_group in (("0", 50), ("1GB", 65_536)):
        code = f"import sys, stratify; stratify.ROW_GROUP = {row_group}; stratify.run(stratify.main)"
        done = subprocess.run(
            [sys.executable, "-c", code, "--input", str(tmp_path / "cells.parquet")]
            + ["--output", str(tmp_path / "out"), "--memory", memory],
            cwd=Path(__file__).parents[2],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if "error: " in line]
        assert len(errors) == 1
        assert f"error: {tmp_path / 'out'}: cannot be written (file too large)" in errors[0]
        assert "Traceback" not in done.stderr
        assert sorted(os.listdir(tmp_path)) == before
