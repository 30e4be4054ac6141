"""The stages in parts give the rows of the single-machine scripts, also where Ray's workers are killed."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import fractal
import ingest
import stratify
from fractal.base.errors import InputError
from fractal.base.files import recover
from fractal.commands import annotate, embed
from fractal.commands import cluster as command
from fractal.commands import stages as cluster
from tests.conftest import labelled_cells

ROOT = Path(__file__).parents[2]
SMALL = 97  # rows of a row group here, so that 600 cells make 7 parts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ROW_GROUP", SMALL)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks one by one in this process, in place of Ray."""

    class Alone:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> cluster.Engine:
            return lambda task, count, _: map(task, range(count))

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(command, "ray_engine", Alone)


@pytest.fixture
def atlas(release: Path, tmp_path: Path) -> Path:
    """600 cells in 7 row groups."""
    whole, out = tmp_path / "whole.parquet", tmp_path / "atlas.parquet"
    ingest.main(["--model-dir", str(release), "--output", str(whole)])
    pq.write_table(pq.read_table(whole), out, row_group_size=SMALL)
    return out


def rows_of(path: Path) -> list[dict]:
    """All rows of a file, or of a folder's files by name."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def main(*argv: object) -> None:
    command.main([str(word) for word in argv])


@pytest.mark.usefixtures("alone")
def test_ingest_of_a_release(release: Path, tmp_path: Path):
    ingest.main(["--model-dir", str(release), "--output", str(tmp_path / "one.parquet")])
    main("ingest", "--model-dir", release, "--output", tmp_path / "many")
    assert len(list((tmp_path / "many").iterdir())) == 7
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one.parquet")
    schema = pq.read_schema(tmp_path / "one.parquet")
    assert pq.read_schema(tmp_path / "many" / "part-000000.parquet").equals(schema, check_metadata=True)
    names = "one.hierarchy.tsv", "many.hierarchy.tsv"
    assert len({(tmp_path / name).read_text() for name in names}) == 1


@pytest.mark.usefixtures("alone")
def test_ingest_of_an_h5ad_with_cells_left_out(h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "ROW_GROUP", 8)
    flags = ["--h5ad", h5ad, "--use-rep", "X_pca", "--label-key", "kind", "--study-key", "donor"]
    ingest.main([str(word) for word in [*flags, "--output", tmp_path / "one.parquet"]])
    main("ingest", *flags, "--output", tmp_path / "many")
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one.parquet")
    assert len(rows_of(tmp_path / "many")) == 59


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("shuffled", [False, True])
def test_vectors_in_another_order_than_the_labels_are_noticed(tmp_path: Path, capsys, shuffled: bool):
    cells = labelled_cells(300)
    if shuffled:
        cells.obs["cell_type"] = np.random.default_rng(0).permutation(cells.obs["cell_type"].to_numpy())
    cells.write_h5ad(tmp_path / "cells.h5ad")
    main("ingest", "--h5ad", tmp_path / "cells.h5ad", "--use-rep", "X_scVI", "--output", tmp_path / "many")
    assert ("are the vectors in the order of the labels" in capsys.readouterr().out) == shuffled


def test_one_long_name_does_not_widen_all(h5ad: Path):
    with h5py.File(h5ad, "r+") as file:
        index = file["obs"][file["obs"].attrs["_index"]]
        index[7] = "x" * 100_000
    names = cluster.read_h5ad(h5ad, "X_pca", slice(0, 60))[1]
    assert names is not None
    assert names[7] == "x" * 100_000
    assert names.nbytes < 10_000


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("memory", [1, 40_000, 10**9])  # parts of 97, 291, and all rows
def test_stratify(memory: int, atlas: Path, tmp_path: Path):
    stratify.main(["--input", str(atlas), "--output", str(tmp_path / "one.parquet"), "--seed", "3"])
    main("stratify", "--input", atlas, "--output", tmp_path / "many", "--seed", 3, "--memory", memory)
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one.parquet")
    schema = pq.read_schema(tmp_path / "one.parquet")
    assert pq.read_schema(tmp_path / "many" / "part-000000.parquet").equals(schema, check_metadata=True)


@pytest.mark.usefixtures("alone")
def test_a_folder_is_read_in_the_order_of_its_names(atlas: Path, tmp_path: Path):
    table = pq.read_table(atlas)
    (tmp_path / "folder").mkdir()
    for name, rows in ("b", slice(200, 600)), ("a", slice(0, 200)):
        pq.write_table(table[rows], tmp_path / "folder" / f"{name}.parquet", row_group_size=50)
    for path, out in (atlas, "one"), (tmp_path / "folder", "two"):
        main("stratify", "--input", path, "--output", tmp_path / out, "--memory", 1)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")


@pytest.mark.usefixtures("alone")
def test_a_folder_of_hive_folders_and_hidden_files(atlas: Path, tmp_path: Path):
    """The same cells as the script sees: NAME=VALUE is a column, and _SUCCESS.parquet is none of them."""
    table = pq.read_table(atlas)
    for study in ("s1", "s2", "s3"):
        (tmp_path / "folder" / f"study={study}").mkdir(parents=True)
        rows = table.filter(pc.equal(table["study"], study)).drop_columns("study")
        pq.write_table(rows, tmp_path / "folder" / f"study={study}" / "a.parquet", row_group_size=50)
    (tmp_path / "folder" / "_SUCCESS.parquet").write_bytes(b"")
    stratify.main(["--input", str(tmp_path / "folder"), "--output", str(tmp_path / "one.parquet")])
    main("stratify", "--input", tmp_path / "folder", "--output", tmp_path / "many", "--memory", 1)
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one.parquet")


@pytest.mark.usefixtures("alone")
def test_parts_with_other_columns_are_refused(atlas: Path, tmp_path: Path, fails: Callable[..., str]):
    (tmp_path / "folder").mkdir()
    pq.write_table(pq.read_table(atlas), tmp_path / "folder" / "a.parquet")
    pq.write_table(pq.read_table(atlas).drop_columns("study"), tmp_path / "folder" / "b.parquet")
    line = fails(command.main, "stratify", "--input", tmp_path / "folder", "--output", tmp_path / "out")
    assert "b.parquet: lacks the column study" in line


@pytest.fixture
def reference(atlas: Path, tmp_path: Path) -> Path:
    """A reference of the atlas's cells."""
    table = pq.read_table(atlas)
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    cells = anndata.AnnData(np.zeros((600, 1), np.float32), obsm={"X_pca": vectors})
    cells.obs["kind"] = table["level4_subtype"].to_pylist()
    fractal.fit(cells, labels="kind", use_rep="X_pca", epochs=1).save(tmp_path / "reference")
    return tmp_path / "reference"


@pytest.mark.slow  # it trains, and makes a reference
@pytest.mark.usefixtures("alone")
def test_embed_and_annotate(atlas: Path, reference: Path, tmp_path: Path):
    table = pq.read_table(atlas)
    named = tmp_path / "named.parquet"  # as pandas names an index
    names = pa.array([f"cell {i}" for i in range(600)])
    pq.write_table(table.append_column("obs_names", names), named, row_group_size=SMALL)
    for path in atlas, named:
        flags = ["--input", str(path), "--reference", str(reference)]
        embed.main([*flags, "--output", str(tmp_path / "one.parquet"), "--prefix", "2", "--device", "cpu"])
        main("embed", *flags, "--output", tmp_path / "many", "--prefix", 2)
        assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one.parquet")
        schema = pq.read_schema(tmp_path / "one.parquet")
        assert pq.read_schema(tmp_path / "many" / "part-000003.parquet").equals(schema, check_metadata=True)
        annotate.main([*flags, "--output", str(tmp_path / "labels.parquet"), "--device", "cpu"])
        main("annotate", *flags, "--output", tmp_path / "labels")
        parts, whole = (pd.DataFrame(rows_of(tmp_path / name)) for name in ("labels", "labels.parquet"))
        pd.testing.assert_frame_equal(parts, whole, check_exact=True)  # a probability may be NaN, in both


def test_rows_of_another_embedding_are_noticed_in_every_part(tmp_path: Path):
    """Warnings of the workers come back with the part's number."""
    cells = labelled_cells(1_200)
    fractal.fit(cells, labels="cell_type", use_rep="X_scVI", epochs=1).save(tmp_path / "reference")
    vectors = cells.obsm["X_scVI"].copy()
    vectors[700:900] = np.random.default_rng(1).normal(size=(200, vectors.shape[1]))
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    pq.write_table(pa.table({"embedding": column}), tmp_path / "cells.parquet", row_group_size=400)

    def engine(task: cluster.Task, count: int, _: str) -> Iterator[int]:
        for number in range(count):
            result = command.task_result(task, {"id": number})
            lines.extend(result["warnings"].splitlines())
            yield result["cells"]

    for stage in "embed", "annotate":
        lines = list[str]()
        flags = {"input": "cells.parquet", "reference": "reference", "output": stage}
        argv = [word for name, path in flags.items() for word in (f"--{name}", str(tmp_path / path))]
        assert getattr(cluster, stage)(command.get_parser().parse_args([stage, *argv]), engine) == 1_200
        assert [line[:7] for line in lines] == ["part 1:", "part 2:"]  # rows 401 to 800, and 801 to 1,200
        assert all("have nothing in common with the reference's cells" in line for line in lines)


@pytest.mark.usefixtures("alone")
def test_an_output_is_there_whole_or_not_at_all(atlas: Path, tmp_path: Path, fails: Callable[..., str]):
    table = pq.read_table(atlas)
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    vectors[333] = np.nan  # in the fourth row group
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 16)
    bad = table.set_column(table.column_names.index("embedding"), "embedding", column)
    pq.write_table(bad, tmp_path / "bad.parquet", row_group_size=SMALL)
    out = tmp_path / "out" / "many"
    torch_free = ["--input", atlas, "--output", out]
    main("stratify", *torch_free)
    before = rows_of(out)
    line = fails(command.main, "stratify", "--input", tmp_path / "none", "--output", out)
    assert "no such file" in line
    (out / "notes.txt").write_text("mine")
    assert "would be lost (notes.txt)" in fails(command.main, "stratify", *torch_free)
    (out / "notes.txt").unlink()

    def lost(task: cluster.Task, count: int, name: str):
        for number in range(count - (name == "sort")):
            yield task(number)

    flags = argparse.Namespace(input=atlas, output=out, seed=0, memory=1)
    with pytest.raises(InputError, match="cells of 600 were written"):
        cluster.stratify(flags, lost)

    def twice(task: cluster.Task, count: int, name: str) -> Iterator[int]:
        yield from [task(number) for number in range(count)]
        if name == "sort":  # a run stands in another's position
            runs = task.args[2]  # type: ignore[attr-defined]
            shutil.copyfile(runs[0], runs[1])

    with pytest.raises(InputError, match="rows are missing or there twice"):
        cluster.stratify(flags, twice)

    def replaced(task: cluster.Task, count: int, name: str) -> Iterator[int]:
        yield from [task(number) for number in range(count)]
        shutil.copyfile(atlas, tmp_path / "copy")
        (tmp_path / "copy").replace(atlas)

    with pytest.raises(InputError, match="has been replaced while it was read"):
        cluster.stratify(flags, replaced)
    assert rows_of(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["many"]


@pytest.mark.slow
@pytest.mark.parametrize("begun", [3, 12], ids=["first half", "second half"])  # of 7 tasks that sort and 7 that merge
def test_ray_with_a_worker_killed_in_the_middle(atlas: Path, tmp_path: Path, begun: int):
    class Slowly:
        """A task that takes its time, and notes that it ran."""

        def __init__(self, task: cluster.Task, log: Path) -> None:
            self.task, self.log = task, log

        def __call__(self, number: int) -> int:
            with open(self.log, "a") as file:
                file.write(f"{number} {os.getpid()}\n")
            time.sleep(0.5)
            return self.task(number)

    stratify.main(["--input", str(atlas), "--output", str(tmp_path / "one.parquet")])
    log = tmp_path / "log"
    log.touch()
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            started = [int(line.split()[1]) for line in log.read_text().splitlines()]
            if len(started) >= begun:
                os.kill(started[-1], signal.SIGKILL)
                killed.append(started[-1])
            time.sleep(0.02)

    with command.ray_engine(None, 2) as engine:
        thread = threading.Thread(target=kill)
        thread.start()

        def slowly(task: cluster.Task, count: int, name: str) -> Iterator[int]:
            return engine(Slowly(task, log), count, name)

        flags = argparse.Namespace(input=atlas, output=tmp_path / "many", seed=0, memory=1)
        cells = cluster.stratify(flags, slowly)
        thread.join()
    assert cells == 600
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one.parquet")
    started = [line.split() for line in log.read_text().splitlines()]
    assert len(started) > 14  # of 7 tasks that sort and 7 that merge some ran twice
    assert len({process for _, process in started}) >= 2


# The flags stand after the number of the rename from or to OUTPUT before which it is killed, and the largest size of a
# file, 0 for none of it. Without --workers the tasks run one by one in the process itself, once the file GATE is there.
DRIVER = f"""
import os, resource, signal, sys, time
from contextlib import nullcontext
from fractal.base.errors import run
from fractal.commands import cluster, stages
stages.ROW_GROUP = {SMALL}
number, size, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
output, seen = argv[argv.index("--output") + 1], []
def hook(event, args):
    if event == "os.rename" and output in map(str, args[:2]):
        seen.append(args)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
def tasks(task, count, _):
    while not os.path.exists(os.environ["GATE"]):
        time.sleep(0.05)
    yield from map(task, range(count))
if "--workers" not in argv:
    cluster.ray_engine = lambda *_: nullcontext(tasks)
if size:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
run(lambda: cluster.main(argv))
"""


def start(*argv: object, gate: Path | str = "/") -> subprocess.Popen[str]:
    command, env = [sys.executable, "-c", DRIVER, *map(str, argv)], {**os.environ, "GATE": str(gate)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


@pytest.fixture
def orders(atlas: Path, tmp_path: Path) -> dict[int, list[dict]]:
    """The rows of stratify.py by seed."""
    for seed in (0, 1):
        stratify.main(["--input", str(atlas), "--output", str(tmp_path / f"{seed}.parquet"), "--seed", str(seed)])
    return {seed: rows_of(tmp_path / f"{seed}.parquet") for seed in (0, 1)}


@pytest.mark.slow
@pytest.mark.usefixtures("alone")  # but for the run that is killed
@pytest.mark.parametrize("rename", [1, 2], ids=["before the old goes", "before the new comes"])
def test_a_driver_killed_when_it_writes(atlas: Path, orders: dict[int, list[dict]], tmp_path: Path, rename: int):
    """When all parts are there. A reader then sees the old ones or the new ones, and the next run ends as ever."""
    out = tmp_path / "out" / "many"
    flags = ["stratify", "--input", atlas, "--output", out, "--memory", 1]
    main(*flags, "--seed", 0)
    ray = ["--workers", 2] if rename == 2 else []  # it takes its time to start, and once is enough
    driver = start(rename, 0, *flags, "--seed", 1, *ray)
    error = driver.communicate(timeout=300)[1]
    assert driver.returncode == -signal.SIGKILL, error
    assert out.exists() == (rename == 1)
    recover(out)  # as readers do
    assert rows_of(out) == orders[0 if rename == 1 else 1]
    main(*flags, "--seed", 1)
    assert rows_of(out) == orders[1]
    assert [path.name for path in out.parent.iterdir()] == ["many"]


@pytest.mark.slow
def test_two_runs_into_one_output_take_turns(atlas: Path, orders: dict[int, list[dict]], tmp_path: Path):
    """Without Ray: on a busy machine its start alone takes minutes. The first run ends only once the second waits."""
    out, gate = tmp_path / "out" / "many", tmp_path / "gate"
    flags = [0, 0, "stratify", "--input", atlas, "--output", out, "--memory", 1, "--seed"]
    first = start(*flags, 0, gate=gate)
    while not out.with_name(".many.lock").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = start(*flags, 1)
    try:
        assert second.stderr
        assert second.stderr.readline() == f"{out}: another run is writing it; waiting until that has ended\n"
    finally:
        gate.touch()
    errors = [run.communicate(timeout=300)[1] for run in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert rows_of(out) == orders[1]
    assert [path.name for path in out.parent.iterdir()] == ["many"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_000, 10_000], ids=["in the plan", "in a task"])
def test_a_full_disk(atlas: Path, tmp_path: Path, limit: int):
    """Of 600 cells the plan takes 4,928 bytes, and their vectors 38,400. Files can't grow, as on a full disk."""
    out = tmp_path / "out" / "many"
    run = start(0, limit, "stratify", "--input", atlas, "--output", out)
    error = run.communicate(timeout=300)[1]
    assert run.returncode == 2, error
    assert error.startswith(f"error: {out.parent}")
    assert error.endswith("; make room\n")
    assert list(out.parent.iterdir()) == []
