"""Indexes that are made and added to: by several runs at once, killed, in bounded memory."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch

from fractal.base.errors import InputError
from fractal.data.cells import Cells
from fractal.search import build, open_index
from fractal.search.folder import Space, check_files
from fractal.search.index import Index
from fractal.search.source import Source
from tests.search.conftest import DIM, agreement, cells_of, exact, table_of, vectors_of


def test_added_cells_equal_a_rebuild(index: Index, tmp_path: Path):
    old = {path.name: path.stat().st_ino for path in index.folder.path.iterdir()}
    more = vectors_of(800, seed=5)
    build.add(index.folder.path, cells_of(more, table_of(800, 5, 3_000).drop_columns("age"), adapters=("a2",)))
    found = open_index(tmp_path / "index")
    assert len(found) == 3_800
    kept = {path.name: path.stat().st_ino for path in found.folder.path.iterdir() if path.name in old}
    assert {k: v for k, v in kept.items() if k != "index.json"} == {k: v for k, v in old.items() if k != "index.json"}
    both, queries = np.concatenate([vectors_of(3_000), more]), vectors_of(40, seed=1)
    assert agreement(found.search(queries, 10, probes=10**6).cells, exact(queries, both, 10)) >= 0.99
    taken = found.take(np.array([3_799, 0]), ["cell_id", "age"])
    assert taken["cell_id"].to_pylist() == ["cell 3799", "cell 0"]
    assert taken["age"].to_pylist()[0] is None
    assert check_files(found.folder.path) > 0


def test_cells_to_add_go_to_their_nearest_list():
    centroids, vectors = build.kmeans(vectors_of(3_000), 300, 0), vectors_of(2_000, seed=5)
    for lists in (centroids[:1], centroids[:7], centroids):
        found = build.old_lists(lists)(vectors)
        assert (found == (vectors @ lists.T).argmax(1)).mean() > 0.85  # these vectors are nearly random


@pytest.mark.parametrize("second", ["add", "build"])
def test_a_second_run_waits_for_an_addition_and_nothing_is_lost(
    index: Index, second: str, monkeypatch: pytest.MonkeyPatch
):
    """The second run starts and would end while the first one, in another process, gathers its cells."""
    path, begun = index.folder.path, index.folder.path.parent / "begun"
    write_lists = build.write_lists

    def slow(*args: object) -> None:
        begun.touch()
        time.sleep(1.5)
        write_lists(*args)  # type: ignore[arg-type]

    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # a forked process has no other threads
        faiss.omp_set_num_threads(1)
        build.write_lists = slow  # type: ignore[assignment]
        build.add(path, cells_of(vectors_of(500, 3), table_of(500, 3, 3_000)))
        os._exit(0)
    while not begun.exists():
        time.sleep(0.01)
    cells = cells_of(vectors_of(400, 4), table_of(400, 4, 3_500))
    if second == "add":
        build.add(path, cells)
    else:
        build.build(path, cells)
    assert os.waitpid(child, 0)[1] == 0
    opened = open_index(path)
    assert len(opened) == (3_900 if second == "add" else 400)
    assert check_files(path)


def test_cells_that_are_there_already_are_not_added_twice(index: Index, capsys: pytest.CaptureFixture[str]):
    path, vectors, table = index.folder.path, vectors_of(3_000), table_of(3_000)
    with pytest.raises(InputError, match=r"(\d+) of \1 cells.*already"):
        build.add(path, cells_of(vectors, table))
    shuffled = np.random.default_rng(1).permutation(3_000)[:900]
    with pytest.raises(InputError, match="900 of 900"):  # a part of them, in another order and without names
        build.add(path, cells_of(vectors[shuffled], table.take(pa.array(shuffled)).drop_columns("cell_id")))
    with pytest.raises(InputError, match="800 of 800"):  # the names of the same file, other vectors
        build.add(path, cells_of(vectors_of(800, 7), table.slice(0, 800)))
    assert len(open_index(path)) == 3_000
    both = np.concatenate([vectors[:100], vectors_of(900, 7)])
    build.add(path, cells_of(both, table_of(1_000, 7, 3_000)))
    assert "100 of 1,000 cells that were looked at are in the index already" in capsys.readouterr().err
    half = np.concatenate([vectors[:50], vectors_of(50, 8)])
    with pytest.raises(InputError, match="50 of 100"):
        build.add(path, cells_of(half, table_of(100, 8, 9_000)))
    build.add(path, cells_of(vectors, table), force=True)
    assert len(open_index(path)) == 7_000


def test_a_further_part_than_the_most_is_refused(index: Index, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "MAX_PARTS", 2)
    build.add(index.folder.path, cells_of(vectors_of(50, 3), table_of(50, 3, 3_000)))
    with pytest.raises(InputError, match="cells were added 1 times, which is the most"):
        build.add(index.folder.path, cells_of(vectors_of(50, 4), table_of(50, 4, 4_000)))
    assert len(open_index(index.folder.path)) == 3_050


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of arrays; a chunk of the source, a sample and a buffer are all that is held at a time."""
    for name, value in {"PIECE": 2_000, "BUFFER": 64_000, "MAX_SAMPLE": 4_000, "CELLS_PER_LIST": 100}.items():
        monkeypatch.setattr(build, name, value)
    peaks = list[int]()
    for n in (20_000, 160_000):
        cells = Cells.from_matrix(
            Path("cells"), (n, DIM), np.float32, lambda rows: vectors_of(rows.stop - rows.start, rows.start)
        )
        tracemalloc.start()
        build.build(tmp_path / f"{n}", Source(cells, Space(DIM)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2 * 140_000  # two bytes for each of the further cells


@pytest.mark.parametrize("what", ["build", "add"])
def test_stopped_before_each_file_is_there_it_leaves_the_old_index(
    index: Index, what: str, monkeypatch: pytest.MonkeyPatch
):
    path = index.folder.path
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    steps = {"spool_cells": build.spool_cells, "write_lists": build.write_lists, "write_manifest": build.write_manifest}
    for name, step in steps.items():
        for late in (False, True):

            def stop(*args, late=late, step=step):
                if late:
                    step(*args)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(build, name, stop)
                cells = cells_of(vectors_of(500, 3), table_of(500, 3, 3_000))
                with pytest.raises(KeyboardInterrupt):
                    build.build(path, cells) if what == "build" else build.add(index.folder.path, cells)
            assert {file.name: file.read_bytes() for file in path.iterdir()} == before
            assert [file.name for file in path.parent.iterdir() if "part" in file.name] == []


def test_an_index_that_was_moved_away_by_a_killed_run_is_put_back(index: Index, tmp_path: Path):
    script = (
        "import os, pathlib, sys; from fractal.base import files\n"
        "rename = pathlib.Path.replace\n"
        "def die(self, target):\n"
        "    rename(self, target)\n"
        "    os._exit(9)\n"
        "pathlib.Path.replace = die\n"
        "with files.atomic_folder(sys.argv[1], os.listdir(sys.argv[1])) as new:\n"
        "    (new / 'index.json').write_text('{}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "index")], check=False)
    assert done.returncode == 9
    assert not (tmp_path / "index").exists()
    with pytest.raises(InputError):  # the new folder of this script is whole, and no index
        open_index(tmp_path / "index")
    assert (tmp_path / "index" / "index.json").exists()


def kill_at_operation(number: int, folder: Path, reached: Path) -> None:
    """Before the `number`-th file operation of this process that Python does in `folder`: make `reached`, and die."""
    left = iter(range(number + 1))

    def hook(event: str, args: tuple) -> None:
        in_folder = any(str(arg).startswith(str(folder)) for arg in args if isinstance(arg, str | Path))
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and in_folder and next(left, -1) == number:
            reached.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.slow
def test_killed_at_any_operation_an_addition_leaves_the_old_index_or_the_new(index: Index, tmp_path: Path):
    path, saved, reached = index.folder.path, tmp_path / "saved", tmp_path / "reached"

    def contents() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    def add() -> None:
        build.add(path, cells_of(vectors_of(500, 3), table_of(500, 3, 3_000)))

    old = contents()
    shutil.copytree(path, saved)
    add()
    new, left = contents(), list[str]()
    for number in itertools.count():
        shutil.rmtree(path)
        shutil.copytree(saved, path)
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)  # a forked process has no other threads
            faiss.omp_set_num_threads(1)
            kill_at_operation(number, path.parent, reached)
            add()
            os._exit(0)
        os.waitpid(child, 0)
        if not reached.exists():
            break
        reached.unlink()
        assert len(open_index(path)) in (3_000, 3_500)  # puts back a folder that was moved away
        left.append("old" if contents() == old else "new" if contents() == new else "neither")
        if left[-1] == "old":
            add()
            assert contents() == new
    assert set(left) <= {"old", "new"}
    assert left.count("old") > 10
    assert list(tmp_path.glob(".*part")) == []


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        build.build(tmp_path / "index", cells_of(vectors_of(50), table_of(50)))
    assert (tmp_path / "index" / "thesis.tex").read_text() == "x"


def test_a_file_system_without_links(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_link(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", no_link)
    build.add(index.folder.path, cells_of(vectors_of(50, 3), table_of(50, 3, 3_000)))
    assert check_files(tmp_path / "index")
