"""A few of the faults and damaged files of benchmarks/faults.py and benchmarks/fuzz.py, which do many."""

import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks import fuzz

ROOT = Path(__file__).parents[2]
SCRATCH = TemporaryDirectory()
TARGETS = fuzz.targets(Path(SCRATCH.name))


@pytest.mark.slow
def test_killed_stopped_and_out_of_room():
    """Its exit code is 1 if anything is half-written, left over, or can't be run again."""
    faults = ["kill", "kill at each operation", "SIGINT", "file size limit"]
    argv = ["--scripts", "stratify", "--faults", *faults, "--kills", "3", "--others", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| stratify: ")]
    assert len(rows) == len(faults)


IN_PLACE = """
import contextlib, pathlib, sys
sys.path[:0] = ["."]
import fractal.base.files

@contextlib.contextmanager
def in_place(path):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    yield pathlib.Path(path)

fractal.base.files.atomic_write = in_place
from benchmarks import faults
faults.main(["--scripts", "stratify", "--faults", "file size limit", "--others", "2"])
"""


@pytest.mark.slow
def test_the_harness_sees_a_file_that_is_written_in_place():
    """The oracle must be able to fail: without `atomic_write`, a script that meets a limit leaves half a file."""
    done = subprocess.run([sys.executable, "-c", IN_PLACE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "stratify, file size limit 0: half-written" in done.stderr


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read(name: str, tmp_path: Path):
    target = TARGETS[name]
    for seed in target.seeds:
        assert fuzz.execute(target, target.wrap(seed), tmp_path / "a") == "accepted"


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "h5ad"])
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path):
    target = TARGETS[name]
    for i in range(250 if name.startswith("checkpoint") else 500):
        data = target.wrap(fuzz.damage(random.Random(f"0 {name} {i}"), target.seeds))
        assert fuzz.execute(target, data, tmp_path / "a") in ("accepted", "refused"), f"execution {i}"


def test_damaged_h5ad_files_are_read_or_refused(tmp_path: Path):
    """In a process of their own, which the HDF5 library may end or keep for ever: that alone is not ours to mend."""
    found = fuzz.batch_in_child("h5ad", TARGETS["h5ad"], 0, 60, 0, tmp_path)
    assert not [what for what in found.failures if not what.startswith("killed by")]
    assert found.executions == 60
