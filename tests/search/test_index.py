"""Index and search against exact search, filters against pandas, enrichment against Fisher's test; damaged folders."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import anndata
import faiss
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import fisher_exact

import fractal
import train
from benchmarks.faults import at_operation, kill, wait
from fractal.base.errors import InputError
from fractal.base.files import atomic_folder
from fractal.commands import embed
from fractal.commands import index as index_command
from fractal.commands import search as search_command
from fractal.data.cells import Cells
from fractal.search import build, enrichment, filters, open_index
from fractal.search.exact import nearest
from fractal.search.folder import OWN_FILES, Space, check_files
from fractal.search.index import HIT_COLUMNS, Hits, Index
from fractal.search.query import search_groups
from fractal.search.source import Source
from tests.conftest import TYPES, clustered, write_h5ad

DIM = 16
BLOCKS = (4, 4, 4, 4)
TISSUES = ("lung", "blood", "gut")


def table_of(n: int, seed: int = 0, first: int = 0) -> pa.Table:
    """Columns of n cells: one with a value missing, a number, and names that are hostile."""
    rng = np.random.default_rng(seed)
    tissue = [TISSUES[i] if i < 3 else None for i in rng.integers(0, 4, n)]
    return pa.table({
        "cell_id": [f"cell {first + i}" for i in range(n)],
        "level1_system": rng.choice(["Immune", "Neural"], n).tolist(),
        "level2_type": rng.choice(TYPES, n).tolist(),
        "tissue": pa.array(tissue, pa.string()).dictionary_encode(),
        "age": rng.integers(0, 90, n),
        "a name|with\x1b": rng.choice(["x|y", "<b>", "\x1b[2J"], n).tolist(),
    })  # fmt: skip


def cells_of(vectors: np.ndarray, table: pa.Table, adapters: tuple[str, ...] = ("a1", "a2")) -> Source:
    def columns(rows: slice) -> pa.Table:
        return table.slice(rows.start, rows.stop - rows.start)

    cells = Cells.from_matrix(Path("cells.parquet"), vectors.shape, vectors.dtype, vectors.__getitem__, columns)
    space = Space(vectors.shape[1], "fractal", BLOCKS, ("system", "lineage", "type", "subtype"), adapters)
    return Source(cells, space)


def vectors_of(n: int, seed: int = 0) -> np.ndarray:
    return clustered(np.random.default_rng(seed).choice(TYPES, n).tolist(), DIM, 0.7, seed)


@pytest.fixture
def many_lists(monkeypatch: pytest.MonkeyPatch):
    """Lists of 40 cells, pieces of 500, and gathering in several rounds, so that small files have many of each."""
    for name, value in {"CELLS_PER_LIST": 40, "PIECE": 500, "BUFFER": 20_000}.items():
        monkeypatch.setattr(build, name, value)


@pytest.fixture
def index(tmp_path: Path, many_lists) -> Index:
    build.build(tmp_path / "index", cells_of(vectors_of(3_000), table_of(3_000)))
    return open_index(tmp_path / "index")


def exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    return nearest(torch.tensor(queries), torch.tensor(vectors), k).numpy()


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)]))


def test_all_lists_equal_exact_search(index: Index):
    queries = vectors_of(50, seed=1)
    hits = index.search(queries, 10, probes=10**6)
    assert agreement(hits.cells, exact(queries, vectors_of(3_000), 10)) >= 0.995  # float16 swaps near ties
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, vectors_of(3_000))]
    cosines = np.einsum("nd,nkd->nk", unit[0], unit[1][hits.cells])
    assert np.allclose(hits.similarity, cosines, atol=2e-3)
    assert (np.diff(hits.similarity, axis=1) <= 0).all()


def test_faiss_sees_the_lists_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With other sizes it would read memory that is not its own; with a few lists that may go well by chance."""
    monkeypatch.setattr(build, "CELLS_PER_LIST", 8)
    monkeypatch.setattr(build, "SAMPLE_PER_LIST", 8)
    build.build(tmp_path / "index", cells_of(vectors_of(20_000), table_of(20_000)))
    index = open_index(tmp_path / "index")
    part, mapped = index.parts[0], index.mapped[0]
    assert len(part.sizes) > 1_000
    assert [mapped.list_size(i) for i in range(len(part.sizes))] == part.sizes.tolist()
    assert np.array_equal(np.sort(np.concatenate([part.rows(i) for i in range(len(part.sizes))])), np.arange(20_000))
    assert index.search(vectors_of(20_000)[:50], 1).cells[:, 0].tolist() == list(range(50))


def test_some_lists_find_nearly_all(index: Index):
    queries = vectors_of(200, seed=1)
    assert len(index.centroids) > 50
    assert agreement(index.search(queries, 10).cells, exact(queries, vectors_of(3_000), 10)) >= 0.9


@pytest.mark.parametrize("prefix", [1, 2, 3, 4])
def test_a_prefix_of_all_lists_equals_exact_search(index: Index, prefix: int):
    queries, width = vectors_of(40, seed=2), 4 * prefix
    hits = index.search(queries, 10, prefix, probes=10**6)
    expected = exact(queries[:, :width], vectors_of(3_000)[:, :width], 10)
    assert agreement(hits.cells, expected) >= 0.98


@settings(max_examples=15)
@given(st.integers(1, 400), st.integers(1, 30), st.integers(0, 99))
def test_any_size_and_k(tmp_path_factory: pytest.TempPathFactory, n: int, k: int, seed: int):
    folder = tmp_path_factory.mktemp("index")
    build.build(folder / "i", cells_of(vectors_of(n, seed), table_of(n, seed)))
    found = open_index(folder / "i")
    hits = found.search(vectors_of(3, seed + 1), k)
    assert hits.cells.shape == (3, k)
    assert ((hits.cells >= 0).sum(1) == min(n, k)).all()
    assert all(len(set(row[row >= 0])) == min(n, k) for row in hits.cells)
    assert found.take(np.arange(n), ["cell_id"])["cell_id"].to_pylist() == table_of(n, seed)["cell_id"].to_pylist()


def test_columns_come_back_as_they_went_in(index: Index):
    table = table_of(3_000)
    some = np.random.default_rng(0).integers(0, 3_000, 500)
    found = index.table(Hits(some[:, None], np.ones((500, 1), np.float32)))
    expected_names = ["query", "rank", "id", "row", "source", "similarity", *table.column_names[1:]]
    assert found.column_names == expected_names
    assert found["row"].to_pylist() == some.tolist()
    assert set(found["source"].to_pylist()) == {"cells.parquet"}
    expected = table.take(pa.array(some))
    for name in index.columns:
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    assert index.counts("tissue") == {t: table["tissue"].to_pylist().count(t) for t in TISSUES}


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


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("tissue == 'lung'", lambda f: f.tissue == "lung"),
        ("tissue != 'lung'", lambda f: f.tissue.notna() & (f.tissue != "lung")),
        ("tissue in ['lung', 'gut'] and age >= 40", lambda f: f.tissue.isin(["lung", "gut"]) & (f.age >= 40)),
        ("tissue not in ['lung']", lambda f: f.tissue.notna() & (f.tissue != "lung")),
        ("not (age < 30 or tissue == 'blood')", lambda f: ~((f.age < 30) | (f.tissue == "blood"))),
        ("column('a name|with\\x1b') == '<b>'", lambda f: f["a name|with\x1b"] == "<b>"),
        ("cell_id == 'cell 7'", lambda f: f.cell_id == "cell 7"),
        ("age > -1", lambda f: f.age > -1),
    ],
)
def test_conditions_equal_pandas(index: Index, condition: str, expected):
    keep = filters.where_mask(index, condition)
    assert np.array_equal(keep, expected(table_of(3_000).to_pandas()).to_numpy(bool))
    queries = vectors_of(20, seed=1)
    hits = index.search(queries, 5, keep=keep)
    there = np.flatnonzero(keep)
    assert keep[hits.cells[hits.cells >= 0]].all()
    right = there[exact(queries, vectors_of(3_000)[there], 5)]
    assert agreement(hits.cells[:, : right.shape[1]], right) >= 0.95
    by_prefix = index.search(queries, 5, 2, keep).cells
    assert keep[by_prefix[by_prefix >= 0]].all()


@pytest.mark.parametrize(
    "condition",
    ["__import__('os').system('true')", "tissue", "tissue == other", "1 == 1", "tissue == 'a' == 'b'", "tis == 'lung'",
     "age in 3", "age > 'old'", "tissue == [x for x in ()]", "(" * 300, "", "tissue < b'x'", "column(3) == 4", "\0"],
)  # fmt: skip
def test_what_is_no_condition_is_refused(index: Index, condition: str):
    with pytest.raises(InputError):
        filters.where_mask(index, condition)


def test_only_takes_labels_of_any_level_and_terms(index: Index):
    frame = table_of(3_000).to_pandas()
    assert np.array_equal(filters.only_mask(index, ["Neural"], "data/cl-slim.obo"), frame.level1_system == "Neural")
    leucocytes = ["B cell", "CD14-low, CD16-positive monocyte", "natural killer cell", "regulatory T cell"]
    assert np.array_equal(
        filters.only_mask(index, ["CL:0000738"], "data/cl-slim.obo"), frame.level2_type.isin(leucocytes)
    )
    for term in ("CL:9999999", "no such cell"):
        with pytest.raises(InputError, match=term):
            filters.only_mask(index, [term], "data/cl-slim.obo")


def test_a_planted_enrichment_is_found(index: Index):
    """40 hits, 30 of them of the lung: against scipy's Fisher test on the table of counts."""
    tissue = np.array(table_of(3_000)["tissue"].to_pylist(), object)
    lung, others = np.flatnonzero(tissue == "lung"), np.flatnonzero(tissue == "gut")
    planted = Hits(np.concatenate([lung[:30], others[:10]])[None], np.ones((1, 40), np.float32))
    found = enrichment.enrichment(index, planted, ["mine"]).to_pandas().set_index(["column", "value"])
    row = found.loc[("tissue", "lung")]
    with_value, total = len(lung), sum(t is not None for t in tissue)
    assert (row.hits, row.of_hits, row.cells, row.of_cells) == (30, 40, with_value, total)
    assert row.fold == pytest.approx(30 / 40 / (with_value / total))
    counts = [[30, 10], [with_value - 30, total - with_value - 10]]
    assert row.p_value == pytest.approx(fisher_exact(counts, "greater").pvalue)
    assert row.q_value < 0.001
    significant = found[found.q_value <= 0.05].index.tolist()
    assert significant == [("tissue", "lung")]
    assert "\x1b" not in enrichment.summary(enrichment.enrichment(index, planted, ["mine\x1b[2J"]), q_value=1.0)


def test_cells_of_the_same_kind_are_not_counted_twice(index: Index):
    twice = Hits(np.zeros((2, 5), np.int64), np.ones((2, 5), np.float32))
    found = enrichment.enrichment(index, twice, ["mine", "mine"], ["level1_system"])
    assert found["of_hits"].to_pylist() == [1]


# Several runs at once


def digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What an open index says of the nearest cell of its first 100 cells: its name, and the vectors' number in it."""
    index = open_index(path)
    hits = index.search(vectors_of(3_000)[:100], 1)
    return hits.cells[:, 0], index.table(hits)["id"].to_numpy()


def reversed_index(path: Path) -> None:
    """The same cells in the other order, so that every file has the length that it had."""
    build.build(path, cells_of(vectors_of(3_000)[::-1], table_of(3_000)[::-1]))


def test_an_open_index_stays_what_it_was_when_another_run_replaces_it(index: Index):
    hits = index.search(vectors_of(3_000)[:100], 1)
    reversed_index(index.folder.path)
    assert index.table(hits)["id"].to_pylist() == [f"cell {i}" for i in range(100)]
    assert index.search(vectors_of(3_000)[:100], 1).cells.tolist() == hits.cells.tolist()


@pytest.mark.parametrize("step", ["np.load", "pa.memory_map", "np.memmap", "faiss.OnDiskInvertedLists"])
def test_a_folder_that_is_replaced_while_it_is_opened_is_opened_again(
    index: Index, monkeypatch: pytest.MonkeyPatch, step: str
):
    """Before each of its files is opened, another run replaces all of them."""
    module = {"np": np, "pa": pa, "faiss": faiss}[step.split(".")[0]]
    name, replaced = step.split(".")[1], list[str]()
    real = getattr(module, name)

    def replace_first(*args: object, **options: object) -> object:
        if not replaced:
            replaced.append(step)
            monkeypatch.setattr(module, name, real)
            reversed_index(index.folder.path)
        return real(*args, **options)

    monkeypatch.setattr(module, name, replace_first)
    opened = open_index(index.folder.path)
    assert replaced
    hits = opened.search(vectors_of(3_000)[:100], 1)
    assert opened.table(hits)["id"].to_pylist() == [f"cell {i}" for i in range(100)]


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
    wait(child)
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
    build.add(path, cells_of(vectors, table), force=True)
    assert len(open_index(path)) == 7_000


# Killed and damaged


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
                cells = cells_of(vectors_of(500, 3), table_of(500, 3))
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


@pytest.mark.slow
def test_killed_at_any_operation_an_addition_leaves_the_old_index_or_the_new(index: Index, tmp_path: Path):
    path, saved, reached = index.folder.path, tmp_path / "saved", tmp_path / "reached"

    def contents() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    def add() -> None:
        build.add(path, cells_of(vectors_of(500, 3), table_of(500, 3)))

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
            at_operation(number, path.parent, reached, kill)()
            add()
            os._exit(0)
        wait(child)
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


@pytest.mark.parametrize("name", ["index.json", "centroids.npy", "sizes-0.npy", "vectors-0.bin", "columns-0.arrow"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "zeros", "noise"])
def test_a_damaged_index_is_refused_in_a_line(index: Index, tmp_path: Path, name: str, damage: str):
    file = tmp_path / "index" / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        made = {
            "cut": data[:-10],
            "empty": b"",
            "zeros": data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
            "noise": data[:200] + np.random.default_rng(0).bytes(len(data) - 200),
        }
        file.write_bytes(made[damage])
    with pytest.raises(InputError, match="index"):
        check_files(tmp_path / "index")
    try:  # what is noticed only by reading all is at least no crash
        found = open_index(tmp_path / "index")
        found.table(found.search(vectors_of(5, 9), 10))
        found.search(vectors_of(5, 9), 10, 2)
    except InputError:
        pass


@pytest.mark.parametrize("name", ["centroids.npy", "sizes-0.npy"])
def test_a_small_file_that_was_changed_is_refused_when_it_is_opened(index: Index, tmp_path: Path, name: str):
    """Its shape and sums are right, so that only the checksum says so."""
    array = np.load(tmp_path / "index" / name)
    np.save(tmp_path / "index" / name, array[::-1])
    with pytest.raises(InputError, match=f"{name}: not the file that the index was made with"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize(
    "change",
    [("dim", 8), ("dim", "x"), ("blocks", [4]), ("blocks", [16, 0]), ("adapters", None), ("recipe", None)],
)
def test_a_manifest_that_does_not_fit_is_refused(index: Index, tmp_path: Path, change):
    file = tmp_path / "index" / "index.json"
    facts = json.loads(file.read_text())
    facts["space"][change[0]] = change[1]
    file.write_text(json.dumps(facts))
    try:
        open_index(tmp_path / "index")
    except InputError:
        return
    assert change[0] == "recipe"  # a name, whatever it is


def test_names_of_files_in_the_manifest_lead_nowhere_else(index: Index, tmp_path: Path):
    (tmp_path / "secret").write_text("x")
    file = tmp_path / "index" / "index.json"
    facts = json.loads(file.read_text())
    facts["files"]["../secret"] = [1, "0"]
    file.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="secret"):
        open_index(tmp_path / "index")


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
    build.add(index.folder.path, cells_of(vectors_of(50), table_of(50)))
    assert check_files(tmp_path / "index")


def test_wrong_questions(index: Index):
    with pytest.raises(InputError, match="7 numbers"):
        index.search(np.ones((2, 7), np.float32))
    with pytest.raises(InputError, match="zero or not finite"):
        index.search(np.zeros((2, DIM), np.float32))
    with pytest.raises(InputError, match="prefix 5 of 4"):
        index.search(vectors_of(2), prefix=5)
    with pytest.raises(InputError, match="no column 'organ'"):
        index.table(Hits(np.zeros((1, 1), int), np.ones((1, 1))), columns=["organ"])
    with pytest.raises(InputError, match="not that of the index"):
        index.check_adapter(["b"], "other.pt")
    with pytest.raises(InputError, match="can't be compared"):
        build.add(index.folder.path, cells_of(vectors_of(50), table_of(50), adapters=("b",)))
    published = Space(DIM, "published", BLOCKS)
    with pytest.raises(InputError, match="no cut"):
        published.prefix_width(2)
    with pytest.raises(InputError, match="as they came"):
        Space(DIM).prefix_width(1)


def test_own_files_are_all_that_an_index_holds(index: Index, tmp_path: Path):
    assert {file.name for file in (tmp_path / "index").iterdir()} <= set(OWN_FILES)
    with atomic_folder(tmp_path / "index", OWN_FILES) as folder:
        shutil.copy(tmp_path / "index" / "index.json", folder / "index.json")


NAMES = ["query", "atlas_query", "Query", "id", "row", "source", "rank", "similarity", "none", "Tissue", "tissue"]


def test_columns_of_any_name_come_out(index: Index, tmp_path: Path):
    """Names of the hits' columns, of the one that stands for none, and such that differ in case only."""
    table = pa.table({name: [f"{name} {i}" for i in range(60)] for name in NAMES})
    build.build(tmp_path / "index", cells_of(vectors_of(60), table))
    opened = open_index(tmp_path / "index")
    assert opened.columns == NAMES
    hits = opened.search(vectors_of(60)[:5], 1)
    found = opened.table(hits)
    pq.write_table(found, tmp_path / "hits.parquet")
    columns = [c for c in pq.read_table(tmp_path / "hits.parquet").column_names if c not in HIT_COLUMNS]
    assert columns == ["atlas_atlas_query", "atlas_query", "atlas_Query", "atlas_id", "atlas_row", "atlas_source",
                       "atlas_rank", "atlas_similarity", "none", "Tissue", "tissue"]  # fmt: skip
    for name, column in zip(NAMES, columns, strict=True):
        assert found[column].to_pylist() == [f"{name} {i}" for i in range(5)]
    assert filters.where_mask(opened, "row == 'row 3' and none == 'none 3'").nonzero()[0].tolist() == [3]
    enriched = enrichment.enrichment(opened, hits, ["mine"] * 5, ["row", "none"])
    assert set(enriched["column"].to_pylist()) == {"row", "none"}


def test_a_group_of_unlike_cells_finds_what_each_of_them_is_like(index: Index):
    """Their mean is like neither: it lies between, with cells of a third kind."""
    rng = np.random.default_rng(0)
    a, b = np.eye(DIM)[:2]
    kinds = {"fibroblast": a, "T cell": b, "between": (a + b) / 2**0.5}
    names = np.repeat(list(kinds), 200)
    vectors = np.stack([kinds[name] for name in names]) + 0.05 * rng.standard_normal((600, DIM))
    build.build(index.folder.path, cells_of(vectors.astype(np.float32), pa.table({"kind": names.tolist()})))
    group = np.stack([a] * 30 + [b] * 10) + 0.05 * rng.standard_normal((40, DIM))
    opened = open_index(index.folder.path)
    found, hits = search_groups([(group, ["mixed"] * 40)], "cells", opened, 100, probes=10**6)
    assert found == ["mixed"]
    kinds_found = Counter(opened.table(hits)["kind"].to_pylist())
    assert set(kinds_found) == {"fibroblast", "T cell"}
    assert abs(kinds_found["T cell"] - 25) <= 4  # a share of each cluster, rounded
    assert len(set(hits.cells[0])) == 100
    assert (np.diff(hits.similarity) <= 0).all()
    mean = opened.search(group.mean(0, keepdims=True), 100, probes=10**6)
    assert "between" in opened.table(mean)["kind"].to_pylist()  # what was said before
    # few cells; fewer cells of the index than hits; two groups; a cell without one
    keep = np.arange(600) < 7
    found, hits = search_groups([(group[25:35], ["x", "y", None, "x", ""] * 2)], "cells", opened, 10, keep=keep)
    assert found == ["x", "y"]
    assert (np.sort(hits.cells, axis=1)[:, 3:] == np.arange(7)).all()
    with pytest.raises(InputError, match="no cell has a group"):
        search_groups([(group, [None] * 40)], "cells", opened, 10)


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


# The commands


@pytest.fixture
def checkpoint(stratified: Path, tmp_path: Path) -> Path:
    out = tmp_path / "a.pt"
    flags = ["--epochs", "1", "--scale-dim", "4", "--device", "cpu"]
    train.main(["--input", str(stratified), "--output", str(out), *flags])
    return out


def run_index(*argv: object) -> None:
    index_command.main([str(a) for a in argv])


def run_search(*argv: object) -> None:
    search_command.main([str(a) for a in argv])


def test_from_files_to_hits(checkpoint: Path, stratified: Path, tmp_path: Path, fails, capsys):
    folder, other = tmp_path / "index", tmp_path / "from embedded"
    run_index(stratified, "--reference", checkpoint, "--output", folder)
    embed.main(["--input", str(stratified), "--model-path", str(checkpoint), "--output", str(tmp_path / "e.parquet")])
    run_index(tmp_path / "e.parquet", "--output", other)
    for name in ("vectors-0.bin", "columns-0.arrow", "centroids.npy"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    run_index(folder, "--check")
    assert "whole" in capsys.readouterr().out

    # its own cells find themselves first; the labels are those of the file
    run_search("--query", tmp_path / "e.parquet", "--index", folder, "--output", tmp_path / "h.parquet", "-k", 3)
    hits = pq.read_table(tmp_path / "h.parquet").to_pandas()
    assert len(hits) == 1_800
    first = hits[hits["rank"] == 1]
    assert (first.similarity > 0.999).all()
    labels = pq.read_table(stratified)["level4_subtype"].to_pylist()
    assert hits.level4_subtype.tolist() == [labels[row] for row in hits.row]
    printed = capsys.readouterr().out
    assert "1,800 hits among 600 cells" in printed

    vectors = np.stack(pq.read_table(stratified)["embedding"].to_pylist()).astype(np.float32)[:60]
    write_h5ad(tmp_path / "q.h5ad", vectors, leiden=["x", "y", None] * 20)
    asked = ["--query", tmp_path / "q.h5ad", "--reference", checkpoint, "--use-rep", "X_pca", "--index", folder]
    run_search(*asked, "--output", tmp_path / "h.tsv", "--where", "study == 's1'", "--columns", "study", "-k", 2)
    frame = pd.read_csv(tmp_path / "h.tsv", sep="\t")
    assert set(frame.study) == {"s1"}
    assert list(frame) == ["query", "rank", "id", "row", "source", "similarity", "study"]
    assert frame["query"].tolist()[:3] == ["cell 0", "cell 0", "cell 1"]
    run_search(
        *asked, "--group-by", "leiden", "--output", tmp_path / "h.h5ad", "--summary", tmp_path / "s.tsv", "-k", 50
    )
    found = anndata.read_h5ad(tmp_path / "h.h5ad")
    assert set(found.obs["query"]) == {"x", "y"}
    assert found.obsm["X_fractal"].shape == (100, 16)
    assert {"group", "value", "fold", "q_value"} <= set(pd.read_csv(tmp_path / "s.tsv", sep="\t"))

    added = [folder, "--add", tmp_path / "q.h5ad", "--reference", checkpoint, "--use-rep", "X_pca"]
    assert "60 of 60 cells that were looked at are in" in fails(index_command.main, *added)
    run_index(*added, "--force")
    run_search(*asked, "--output", tmp_path / "h.parquet", "-k", 2)
    hits = pq.read_table(tmp_path / "h.parquet").to_pandas()
    assert set(hits[hits.source == "q.h5ad"].id) == {f"cell {i}" for i in range(60)}

    # the wrong adapter, none at all, the wrong width
    flags = ["--epochs", "1", "--scale-dim", "4", "--device", "cpu", "--seed", "3"]
    train.main(["--input", str(stratified), "--output", str(tmp_path / "b.pt"), *flags])
    capsys.readouterr()
    wrong = [tmp_path / "b.pt" if flag == checkpoint else flag for flag in asked]
    assert "not that of the index" in fails(search_command.main, *wrong)
    assert "--reference" in fails(search_command.main, "--query", stratified, "--index", folder)
    np.save(tmp_path / "q.npy", np.ones((3, 5), np.float32))
    message = fails(search_command.main, "--query", tmp_path / "q.npy", "--embedded", "--index", folder)
    assert "5 numbers" in message
    assert "no cell passes" in fails(search_command.main, *asked, "--where", "study == 'none'")
    assert "can't be compared" in fails(index_command.main, folder, "--add", stratified)
    assert "index.json" in fails(search_command.main, *asked[:-1], tmp_path)


def test_raw_vectors_and_numbers_without_columns(tmp_path: Path, fails):
    np.save(tmp_path / "x.npy", vectors_of(300))
    run_index(tmp_path / "x.npy", "--output", tmp_path / "index")
    run_search("--query", tmp_path / "x.npy", "--index", tmp_path / "index", "--output", tmp_path / "h.tsv")
    frame = pd.read_csv(tmp_path / "h.tsv", sep="\t")
    assert (frame[frame["rank"] == 1].row == frame[frame["rank"] == 1]["query"]).all()
    asked = ["--query", tmp_path / "x.npy", "--index", tmp_path / "index", "--prefix", 1]
    assert "as they came" in fails(search_command.main, *asked)
    bad = vectors_of(30)
    bad[7] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    message = fails(index_command.main, tmp_path / "bad.npy", "--output", tmp_path / "index")
    assert "cell 7" in message
    assert len(open_index(tmp_path / "index")) == 300


def test_from_python(tmp_path: Path):
    x = clustered(TYPES * 120)
    obs = pd.DataFrame({"cell_type": TYPES * 120, "leiden": ["a", "b"] * 360}, index=[f"c{i}" for i in range(720)])
    cells = anndata.AnnData(obs=obs, obsm={"X_pca": x})
    ref = fractal.fit(cells, "cell_type", use_rep="X_pca", epochs=1)
    ref.save(tmp_path / "reference")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    run_index(tmp_path / "cells.h5ad", "--reference", tmp_path / "reference", "--output", tmp_path / "index")
    hits = ref.search(cells[:20], tmp_path / "index", k=4)
    assert hits["query"].tolist()[::4] == [f"c{i}" for i in range(20)]
    assert (hits[hits["rank"] == 1].similarity > 0.999).all()
    index = fractal.open_index(tmp_path / "index")
    groups = ref.search(cells, index, k=5, group_by="leiden", where="cell_type == 'B cell'", prefix=1)
    assert set(groups["query"]) == {"a", "b"}
    assert set(groups.cell_type) == {"B cell"}
