"""The four scripts as their users run them: outputs, the held-out guarantee, messages and exit codes."""

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

import eval as evaluate
import ingest
import stratify
import train
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas
from fractal.data.scimilarity import open_release
from fractal.hierarchy.levels import LEVEL_COLUMNS, LEVELS
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.model import training
from fractal.model.checkpoint import load
from tests.conftest import TYPES, clustered, write_release

ROOT = Path(__file__).parent.parent
QUICK = ["--epochs", "1", "--scale-dim", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(first_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "adapter.pt"
    train.main(["--input", str(first_steps / "stratified.parquet"), "--output", str(path), *QUICK])
    return path


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """Of the cells of `stratified`."""
    return Path(shutil.copy(trained, tmp_path))


def evaluated(checkpoint: Path, data: Path, *more: str) -> dict:
    out = checkpoint.with_suffix(".json")
    evaluate.main(["--model-path", str(checkpoint), "--input", str(data), "--json", str(out), "--device", "cpu", *more])
    return json.loads(out.read_text())


def test_ingest_writes_every_cell_in_order(release: Path, tmp_path: Path, capsys):
    out = tmp_path / "new folder" / "cells.parquet"
    ingest.main(["--model-dir", str(release), "--output", str(out)])
    table, source = pq.read_table(out), open_release(release)
    assert table["level4_subtype"].to_pylist() == [source.labels.names[c] for c in source.labels.codes]
    vectors = np.concatenate([x for _, x in source.chunks()])
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), vectors)
    assert set(table["study"].to_pylist()) == {"s1", "s2", "s3"}
    assert set(zip(*(table[c].to_pylist() for c in LEVEL_COLUMNS[:2]), strict=True)) == {
        ("Immune", "Lymphoid"),
        ("Immune", "Myeloid"),
        ("Immune", "Innate Lymphoid"),
        ("Stromal", "Fibroblast"),
        ("Epithelial", "Epithelial"),
    }
    printed = capsys.readouterr().out
    assert "Cell Ontology release 2025-07-30" in printed
    assert "6 type names: 6 matched automatically (5 by name, 1 by synonym), 0 by hand, 0 unmapped" in printed
    assert "| Immune" in printed

    with open(out.with_name("cells.hierarchy.tsv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["subtype"] for row in rows] == TYPES
    assert rows[4] == {
        "cl_id": "CL:0000815", "system": "Immune", "lineage": "Lymphoid", "type": "mature T cell",
        "subtype": "regulatory T cell", "path": "regulatory T cell > mature T cell > T cell > lymphocyte",
    }  # fmt: skip


def test_a_release_without_studies(tmp_path: Path):
    write_release(tmp_path / "m", clustered(TYPES * 4), TYPES * 4)
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "a")])
    stratify.main(["--input", str(tmp_path / "a"), "--output", str(tmp_path / "b")])
    assert pq.read_schema(tmp_path / "b").names == ["embedding", *LEVEL_COLUMNS]


def test_unmapped_names(fails, tmp_path: Path):
    types = ["B cell", "blob"]
    write_release(tmp_path / "m", clustered(types * 5), types * 5, types=types)
    argv = ["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "a")]
    assert "1 type names are not in CL 2025-07-30: blob" in fails(ingest.main, *argv)
    assert not (tmp_path / "a").exists()
    ingest.main([*argv, "--unmapped", "other"])
    cells = pq.read_table(tmp_path / "a").to_pylist()
    assert {row["level1_system"] for row in cells if row["level4_subtype"] == "blob"} == {"Other"}


def test_ingest_names_what_is_missing(fails, tmp_path: Path):
    message = fails(ingest.main, "--model-dir", tmp_path, "--output", tmp_path / "out" / "a")
    assert f"{tmp_path}/label_ints.csv: no such file" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["fractal", "published"])
def test_train_and_eval(stratified: Path, tmp_path: Path, capsys, recipe: str):
    path = tmp_path / "adapter.pt"
    argv = ["--input", str(stratified), "--output", str(path), "--recipe", recipe, "--epochs", "3", "--scale-dim", "8"]
    train.main([*argv, "--lr", "3e-3", "--batch-size", "64"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"recipe {recipe}: lr 0.003, batch 64")
    assert "4 blocks of 8: system, lineage, type, subtype" in printed
    result = evaluated(path, stratified)
    assert [row["embedding"] for row in result["rows"]] == ["raw", "full", "prefix 3", "prefix 2", "prefix 1"]
    assert [row["dims"] for row in result["rows"]] == [16, 32, 24, 16, 8]
    assert set(result) >= {"rows", "steerability", "num_queries"}
    for row in result["rows"]:
        for block in ("loo", "bank", "silhouette"):
            assert list(row[block]) == list(LEVELS)
    assert result["rows"][1]["bank"]["system"] > 0.9  # well separated clusters
    full, first = result["rows"][1]["loo"], result["rows"][4]["loo"]
    assert result["steerability"] == pytest.approx(
        first["system"] - full["system"] + full["subtype"] - first["subtype"], abs=1e-9
    )
    printed = capsys.readouterr().out
    assert "| Embedding | Dims |               System |" in printed
    assert "1.000 [0.9" in printed  # never 1.000 ± 0.000
    assert "(unseen)" not in printed
    for row in result["rows"]:
        low, high = row["loo_interval"]["subtype"]
        assert low <= row["loo"]["subtype"] <= high
    assert "Steerability" in printed


def test_two_levels_are_scored_on_all_four(stratified: Path, tmp_path: Path):
    path = tmp_path / "two.pt"
    argv = ["--input", str(stratified), "--output", str(path), "--epochs", "1", "--num-levels", "2", "--scale-dim", "4"]
    train.main(argv)
    result = evaluated(path, stratified)
    assert [row["embedding"] for row in result["rows"]] == ["raw", "full", "prefix 1"]
    assert set(result["rows"][1]["loo"]) == set(LEVELS)
    full, first = result["rows"][1]["loo"], result["rows"][2]["loo"]
    expected = first["system"] - full["system"] + full["lineage"] - first["lineage"]  # its leaf is the lineage
    assert result["steerability"] == pytest.approx(expected, abs=1e-9)


def test_held_out_cells_do_not_touch_training(stratified: Path, tmp_path: Path):
    """Spoil every test cell's vector and label: the trained weights stay the same, bit for bit."""
    from fractal.data.parquet import atlas_table, write_tables
    from fractal.model import split

    num_rows = pq.read_metadata(stratified).num_rows
    is_test = split.held_out(num_rows, 0.2, 0)
    cells = Atlas.open(stratified).read(np.arange(num_rows))
    vectors, labels = cells.vectors.copy(), cells.labels.copy()
    vectors[is_test] = np.random.default_rng(0).normal(size=(is_test.sum(), 16))
    labels[is_test] = 0
    table = atlas_table(vectors, [(labels[:, k], cells.classes[k]) for k in range(4)])
    write_tables(tmp_path / "spoilt", [table], Atlas.open(stratified).metadata)
    states = []
    for data, out in ((stratified, "a.pt"), (tmp_path / "spoilt", "b.pt")):
        argv = ["--input", str(data), "--output", str(tmp_path / out), "--epochs", "1", "--scale-dim", "4"]
        train.main([*argv, "--device", "cpu"])
        states.append(torch.load(tmp_path / out, weights_only=True)["state"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_eval_draws_from_the_test_rows_only(checkpoint: Path, stratified: Path, tmp_path: Path):
    from fractal.model import split

    evaluated(checkpoint, stratified, "--rows-out", str(tmp_path / "rows"), "--num-samples", "50", "--seed", "4")
    bank, queries = np.load(tmp_path / "rows" / "train.npy"), np.load(tmp_path / "rows" / "queries.npy")
    is_test = split.held_out(600, 0.2, 0)
    assert len(np.unique(queries)) == 50
    assert is_test[queries].all()
    assert not is_test[bank].any()
    assert len(bank) == (~is_test).sum() - 100  # a small file: 100 cells validate


def test_eval_refuses_another_file(fails, checkpoint: Path, stratified: Path, tmp_path: Path):
    other = tmp_path / "cells.parquet"  # the same cells, another order
    argv = ["--model-path", checkpoint, "--input", other]
    assert "cells.parquet: not the file that" in fails(evaluate.main, *argv)
    result = evaluated(checkpoint, other, "--all-rows")
    assert result["num_queries"] == 600
    assert result["rows"][0]["bank"]["system"] is None
    assert result["rows"][0]["loo"]["system"] > 0.5
    message = fails(evaluate.main, "--model-path", checkpoint, "--input", stratified, "--all-rows")
    assert "was trained on it" in message


def test_eval_refuses_another_width(fails, checkpoint: Path, tmp_path: Path):
    write_release(tmp_path / "m", clustered(TYPES * 4, dim=5), TYPES * 4)
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "narrow")])
    message = fails(evaluate.main, "--model-path", checkpoint, "--input", tmp_path / "narrow", "--all-rows")
    assert "narrow: its vectors have 5 numbers" in message


def test_one_type_cannot_be_trained_on(fails, tmp_path: Path):
    write_release(tmp_path / "m", clustered(["B cell"] * 30), ["B cell"] * 30)
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "a")])
    message = fails(train.main, "--input", tmp_path / "a", "--output", tmp_path / "out.pt")
    assert "all training rows are of one type" in message
    assert not (tmp_path / "out.pt").exists()


def test_an_atlas_of_one_system_has_no_silhouette_of_it(tmp_path: Path):
    immune = [t for t in TYPES if t not in ("fibroblast", "type II pneumocyte")]
    write_release(tmp_path / "m", clustered(immune * 50), immune * 50)
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "a")])
    argv = ["--input", str(tmp_path / "a"), "--output", str(tmp_path / "a.pt"), "--epochs", "1", "--scale-dim", "4"]
    train.main(argv)
    result = evaluated(tmp_path / "a.pt", tmp_path / "a")
    assert {row["silhouette"]["system"] for row in result["rows"]} == {None}
    assert [row["embedding"] for row in result["rows"]] == ["raw", "full", "prefix 2", "prefix 1"]  # none for system
    assert result["rows"][-1]["silhouette"]["lineage"] > 0.5


def test_the_same_seed_gives_the_same_weights(stratified: Path, tmp_path: Path):
    states = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        argv = ["--input", str(stratified), "--output", str(tmp_path / name), "--epochs", "1", "--seed", str(seed)]
        train.main([*argv, "--scale-dim", "4", "--device", "cpu"])
        states.append(torch.load(tmp_path / name, weights_only=True)["state"]["linear.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def run_script(script: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> object:
    """Run a script as `python SCRIPT` does -> its exit code."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize("script", ["stratify.py", "train.py", "eval.py"])
def test_a_script_exits_with_2_and_one_line(script: str, tmp_path: Path, monkeypatch, capsys):
    flag = "--model-path" if script == "eval.py" else "--input"
    assert run_script(script, monkeypatch, flag, str(tmp_path / "none")) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert str(tmp_path / "none") in line


@pytest.mark.parametrize("script", ["ingest.py", "stratify.py", "train.py", "eval.py"])
def test_help(script: str, monkeypatch, capsys):
    assert run_script(script, monkeypatch, "--help") == 0
    assert "usage" in capsys.readouterr().out


def test_a_process_of_its_own(tmp_path: Path):
    """Without what the tests have imported, and from another folder."""
    done = subprocess.run([sys.executable, ROOT / "stratify.py", "--input", "none"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: none")


def test_the_best_epoch_is_kept_and_patience_stops(stratified: Path, tmp_path: Path, monkeypatch, capsys):
    scores = iter([0.1, 0.5, 0.3, 0.4, 0.2, 0.9])
    states = []

    def score(self, adapter):
        states.append({k: v.clone() for k, v in adapter.state_dict().items()})
        return [0.5] * 4, next(scores)

    monkeypatch.setattr(training.Validator, "__call__", score)
    argv = ["--input", str(stratified), "--output", str(tmp_path / "a.pt"), "--epochs", "6", "--patience", "3"]
    train.main([*argv, "--scale-dim", "4", "--recipe", "published"])
    assert len(states) == 5  # two epochs, and three that are no better
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["training"]["best_epoch"] == 2
    assert all(torch.equal(saved["state"][key], states[1][key]) for key in saved["state"])
    assert "no better for 3 epochs" in capsys.readouterr().out


def test_without_validation_the_last_epoch_is_kept(stratified: Path, tmp_path: Path):
    argv = ["--input", str(stratified), "--output", str(tmp_path / "a.pt"), "--epochs", "2", "--val-ratio", "0"]
    train.main([*argv, "--scale-dim", "4", "--recipe", "published"])
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (saved["training"]["best_epoch"], saved["validation"]) == (2, None)


def test_a_run_that_diverges_in_its_last_step_is_not_saved(fails, stratified: Path, tmp_path: Path):
    argv = ["--recipe", "published", "--batch-size", "600", "--lr", "1e30", "--epochs", "1"]
    assert "lower --lr" in fails(train.main, "--input", stratified, "--output", tmp_path / "out.pt", *argv)
    assert not (tmp_path / "out.pt").exists()


def test_a_batch_of_one_cell_has_no_positives_and_a_finite_loss(stratified: Path, tmp_path: Path):
    argv = ["--input", str(stratified), "--output", str(tmp_path / "a.pt"), "--epochs", "1", "--batch-size", "1"]
    train.main([*argv, "--scale-dim", "4"])
    assert (tmp_path / "a.pt").exists()


def test_a_diverging_run_says_so(fails, stratified: Path, tmp_path: Path):
    argv = ["--input", stratified, "--output", tmp_path / "out.pt", "--lr", "1e30", "--epochs", "1"]
    assert "give a lower --lr than 1e+30" in fails(train.main, *argv)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    "argv", [["--lr", "0"], ["--val-ratio", "1"], ["--epochs", "0"], ["--max-samples", "-1"], ["--num-levels", "7"]]
)
def test_flags_out_of_range(argv: list[str]):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2


@pytest.mark.slow
def test_real_atlases_end_to_end(real_release: Path, tmp_path: Path):
    """A short run on real cells: at the type level the adapter is better than the raw vectors."""
    ingest.main(["--model-dir", str(real_release), "--output", str(tmp_path / "a")])
    stratify.main(["--input", str(tmp_path / "a"), "--output", str(tmp_path / "b")])
    train.main(
        ["--input", str(tmp_path / "b"), "--output", str(tmp_path / "a.pt"), "--epochs", "5", "--max-samples", "5000"]
    )
    result = evaluated(tmp_path / "a.pt", tmp_path / "b")
    raw, full = result["rows"][:2]
    assert full["loo"]["type"] > raw["loo"]["type"]
    assert full["loo"]["subtype"] > raw["loo"]["subtype"]
    assert full["silhouette"]["subtype"] > raw["silhouette"]["subtype"]


def test_a_study_held_out_in_training_is_what_eval_asks(stratified: Path, tmp_path: Path, fails, capsys):
    path = tmp_path / "study.pt"
    argv = ["--input", str(stratified), "--output", str(path), "--epochs", "1", "--scale-dim", "4"]
    train.main([*argv, "--holdout", "study", "--test-ratio", "0.3"])
    assert "held out: 1 studies" in capsys.readouterr().out
    evaluated(path, stratified, "--rows-out", str(tmp_path / "rows"))
    study = np.array(pq.read_table(stratified, columns=["study"])["study"].to_pylist())
    asked, bank = study[np.load(tmp_path / "rows" / "queries.npy")], study[np.load(tmp_path / "rows" / "train.npy")]
    assert len(set(asked)) == 1
    assert not set(asked) & set(bank)
    train.main([*argv, "--test-studies", "s3"])
    evaluated(path, stratified, "--rows-out", str(tmp_path / "rows"))
    assert set(study[np.load(tmp_path / "rows" / "queries.npy")]) == {"s3"}
    assert "has no study s9; it has s1, s2, s3" in fails(train.main, *argv, "--test-studies", "s9")
    train.main([*argv, "--holdout", "study", "--test-ratio", "0"])
    assert " 0 test cells" in capsys.readouterr().out


def test_several_checkpoints_are_rows_of_one_table(stratified: Path, tmp_path: Path, fails):
    argv = ["--input", str(stratified), "--epochs", "1", "--scale-dim", "4"]
    one, two, other = (str(tmp_path / f"{name}.pt") for name in ("one", "two", "other"))
    train.main([*argv, "--output", one])
    train.main([*argv, "--output", two, "--num-levels", "2"])
    train.main([*argv, "--output", other, "--split-seed", "1"])
    evaluate.main(["--model-path", one, two, "--input", str(stratified), "--json", str(tmp_path / "a.json")])
    result = json.loads((tmp_path / "a.json").read_text())
    names = [row["embedding"] for row in result["rows"]]
    assert names == ["raw", "one full", "one prefix 3", "one prefix 2", "one prefix 1", "two full", "two prefix 1"]
    assert set(result["steerability"]) == {"one", "two"}
    message = fails(evaluate.main, "--model-path", one, other, "--input", stratified)
    assert "other.pt: was trained on other cells than" in message


def test_controls_equal_scikit_learn(checkpoint: Path, stratified: Path, tmp_path: Path):
    result = evaluated(checkpoint, stratified, "--controls", "--rows-out", str(tmp_path))
    rows = {row["embedding"]: row for row in result["rows"]}
    for row in result["rows"]:
        assert row["seen"] == {"loo": row["loo"], "bank": row["bank"]}
        assert set(row["unseen"]["loo"].values()) | set(row["unseen"]["bank"].values()) == {None}
    assert {"raw 4d", "raw 8d", "PCA 4d", "PCA", "LDA 4d", "LDA"} <= set(rows)
    bank, queries = (Atlas.open(stratified).read(np.load(tmp_path / f"{name}.npy")) for name in ("train", "queries"))
    unit, asked = (normalize(cells.vectors) for cells in (bank, queries))
    lda = LinearDiscriminantAnalysis().fit(unit, bank.labels[:, 3])
    knn = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
    knn.fit(lda.transform(unit)[:, :4], bank.labels[:, 3])
    expected = knn.score(lda.transform(asked)[:, :4], queries.labels[:, 3])
    assert rows["LDA 4d"]["bank"]["subtype"] == pytest.approx(expected, abs=0.02)  # ties are broken differently
    evaluated(checkpoint, stratified, "--cells-out", str(tmp_path / "cells.npz"))
    right = np.load(tmp_path / "cells.npz")
    for protocol in ("loo", "bank"):
        assert right[protocol].mean(1)[1].tolist() == pytest.approx(list(rows["full"][protocol].values()))


LONG = "x" * 100_000


def test_a_name_with_a_megabyte_of_text_is_refused_in_a_line_of_bounded_length(fails, tmp_path: Path):
    types = ["B cell", LONG, "evil \x1b[2J cell"]
    write_release(tmp_path / "m", clustered(types * 3), types * 3, types=types)
    message = fails(ingest.main, "--model-dir", tmp_path / "m", "--output", tmp_path / "a")
    assert len(message) <= 10_000
    assert "\x1b" not in message


def test_one_cell(fails, tmp_path: Path):
    write_release(tmp_path / "m", clustered(["B cell"]), ["B cell"])
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "a")])
    stratify.main(["--input", str(tmp_path / "a"), "--output", str(tmp_path / "b")])
    assert pq.read_metadata(tmp_path / "b").num_rows == 1
    message = fails(train.main, "--input", tmp_path / "b", "--output", tmp_path / "c.pt", "--test-ratio", "0")
    assert "b: 1 rows are left to train on" in message


def test_no_cell(fails, tmp_path: Path):
    write_release(tmp_path / "m", clustered(["B cell"]), ["B cell"])
    (tmp_path / "m" / "annotation" / "reference_labels.tsv").write_text("")
    assert "reference_labels.tsv: " in fails(ingest.main, "--model-dir", tmp_path / "m", "--output", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_type_with_one_cell(tmp_path: Path):
    labels = ["fibroblast", *["B cell", "natural killer cell"] * 60]
    write_release(tmp_path / "m", clustered(labels), labels)
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "a")])
    argv = ["--input", str(tmp_path / "a"), "--output", str(tmp_path / "a.pt"), "--epochs", "1", "--scale-dim", "4"]
    train.main(argv)
    evaluate.main(["--model-path", str(tmp_path / "a.pt"), "--input", str(tmp_path / "a")])


def test_types_that_were_not_trained_on(tmp_path: Path, capsys):
    """A checkpoint embeds cells of any type: their names are not looked up."""
    for name, types in (("m", TYPES[:3]), ("n", TYPES[3:])):
        write_release(tmp_path / name, clustered(types * 40), types * 40)
        ingest.main(["--model-dir", str(tmp_path / name), "--output", str(tmp_path / f"{name}.parquet")])
    argv = ["--output", str(tmp_path / "a.pt"), "--epochs", "1", "--scale-dim", "4"]
    train.main(["--input", str(tmp_path / "m.parquet"), *argv])
    capsys.readouterr()
    evaluate.main(["--model-path", str(tmp_path / "a.pt"), "--input", str(tmp_path / "n.parquet"), "--all-rows"])
    assert "| full" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(fails, release: Path, tmp_path: Path):
    (tmp_path / "shut").mkdir(mode=0o555)
    message = fails(ingest.main, "--model-dir", release, "--output", tmp_path / "shut" / "a")
    assert "Permission denied" in message


@pytest.mark.parametrize("script", ["ingest", "stratify", "train", "eval"])
def test_an_output_that_is_a_folder(fails, request: pytest.FixtureRequest, monkeypatch, tmp_path: Path, script: str):
    """Said before the work is done, not after it."""
    (tmp_path / "taken").mkdir()
    model = ["--epochs", "1", "--scale-dim", "4"]
    if script == "ingest":
        argv = [ingest.main, "--model-dir", request.getfixturevalue("release"), "--output", tmp_path / "taken"]
    else:
        data = request.getfixturevalue("stratified")
        argv = [stratify.main, "--input", data, "--output", tmp_path / "taken"]
        if script == "train":
            argv = [train.main, "--input", data, "--output", tmp_path / "taken", *model]
        if script == "eval":
            train.main(["--input", str(data), "--output", str(tmp_path / "a.pt"), *model])
            argv = [evaluate.main, "--model-path", tmp_path / "a.pt", "--input", data, "--json", tmp_path / "taken"]
        for work in ("fractal.model.training.prepare", "fractal.score.table.nearest"):
            monkeypatch.setattr(work, lambda *_: pytest.fail("too late"))
    assert "taken: is not a file" in fails(*argv)


def test_names_from_files_do_not_reach_the_terminal_as_they_are(stratified: Path, tmp_path: Path):
    text = CL_SLIM.read_text(encoding="utf-8").replace("releases/2025-07-30", "releases/2025\x1b[2J", 1)
    (tmp_path / "a.obo").write_text(text, encoding="utf-8")
    assert load_graph(tmp_path / "a.obo").graph["release"] == "2025\\x1b[2J"
    train.main(["--input", str(stratified), "--output", str(tmp_path / "a.pt"), "--epochs", "1", "--scale-dim", "4"])
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    checkpoint["config"]["recipe"] = "fractal\x1b[2J"
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(InputError, match="not a checkpoint"):
        load(tmp_path / "a.pt")
