"""A few of the faults and damaged files of benchmarks/faults.py and benchmarks/fuzz.py, which do many."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fuzz

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUNDLES = ["bundle.json", "held_out.safetensors", "hierarchy.tsv", "adapter.safetensors", "cells.safetensors"]
NAMES = ["index", "labels", "types", "map", "npy", "obo", "parquet", "checkpoint", "checkpoint pickle", *BUNDLES]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    return fuzz.targets(tmp_path_factory.mktemp("fuzz"))


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


def test_whole_files_are_read(targets: dict[str, fuzz.Target], tmp_path: Path):
    assert set(targets) == {*NAMES, "h5ad"}
    for target in targets.values():
        for seed in target.seeds:
            assert fuzz.execute(target, target.wrap(seed), tmp_path / "a") == "accepted"


def check_damaged(name: str, target: fuzz.Target, numbers: range, path: Path) -> None:
    for i in numbers:
        data = target.wrap(fuzz.damage(random.Random(f"0 {name} {i}"), target.seeds))
        assert fuzz.execute(target, data, path) in ("accepted", "refused"), f"execution {i}"


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused(name: str, targets: dict[str, fuzz.Target], tmp_path: Path):
    check_damaged(name, targets[name], range(30), tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_files_are_read_or_refused(name: str, targets: dict[str, fuzz.Target], tmp_path: Path):
    check_damaged(name, targets[name], range(30, 250 if name.startswith("checkpoint") else 500), tmp_path / "a")


@pytest.mark.slow
def test_damaged_h5ad_files_are_read_or_refused(targets: dict[str, fuzz.Target], tmp_path: Path):
    """In a process of their own, which the HDF5 library may end or keep for ever: that alone is not ours to mend."""
    found = fuzz.batch_in_child("h5ad", targets["h5ad"], 0, 60, 0, tmp_path)
    assert not [what for what in found.failures if not what.startswith("killed by")]
    assert found.executions == 60
