"""fractal index: what it refuses, and a disk that is full."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fractal.commands import index
from tests.search.conftest import vectors_of

SCRIPT = """
import resource, sys
from fractal.base.errors import run
from fractal.commands import index
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # bytes of a file
run(lambda: index.main(sys.argv[2:]))
"""


@pytest.mark.slow  # faiss alone takes seconds to load
@pytest.mark.parametrize("limit", [50_000, 300_000])
def test_a_full_disk_names_the_index_and_leaves_nothing(tmp_path: Path, limit: int):
    """96 kB of vectors in the nameless file, 600 kB of a column."""
    vectors = vectors_of(3_000)
    table = pa.table({
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        "note": [f"{i:0200}" for i in range(3_000)],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "cells.parquet")
    flags = [str(limit), str(tmp_path / "cells.parquet"), "--output", str(tmp_path / "index")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *flags], capture_output=True, text=True, check=False)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert error.startswith(f"error: {tmp_path / 'index'}: cannot be written (")
    assert error.endswith("make room")
    assert [path.name for path in tmp_path.iterdir()] == ["cells.parquet"]


def test_flags_that_do_not_go_together(tmp_path: Path, fails):
    np.save(tmp_path / "x.npy", vectors_of(30))
    run = [index.main, tmp_path / "x.npy"]
    assert "--output" in fails(*run)
    assert "name one of them" in fails(*run, "--add", tmp_path / "x.npy", "--check")
    assert "drop it" in fails(*run, "--check", "--output", tmp_path / "index")
    assert "not an index" in fails(*run, "--check")
    assert "not an index" in fails(index.main, "s3://bucket/index", "--check")
    assert "not an index" in fails(*run, "--add", tmp_path / "x.npy")
    assert "one input" in fails(index.main, "--output", tmp_path / "index")
    assert "can't be at a URI" in fails(*run, "--output", "s3://bucket/index")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.npy"]
