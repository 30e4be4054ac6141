"""Checkpoints scored on a file: types that were held out, and what eval.py refuses or warns of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import eval as evaluate
from fractal.data.parquet import atlas_table, write_tables
from tests.conftest import TYPES, clustered
from tests.score.conftest import checkpoint_of


def test_types_held_out_are_scored_apart(stratified: Path, tmp_path: Path, capsys):
    model = checkpoint_of(stratified, tmp_path / "t.pt", "--test-types", "B cell", "fibroblast")
    out = tmp_path / "t.json"
    argv = ["--model-path", str(model), "--input", str(stratified), "--json", str(out), "--controls"]
    evaluate.main([*argv, "--rows-out", str(tmp_path / "rows")])
    printed = capsys.readouterr().out
    assert "held out: 2 whole types" in printed
    result = json.loads(out.read_text())
    for row in result["rows"]:
        lines = [line.split() for line in printed.splitlines() if line.startswith(f"| {row['embedding']} ")]
        assert {"unseen", "seen"} <= {word for line in lines for word in line}
        assert row["unseen"]["bank"]["subtype"] is None
        assert row["unseen"]["bank"]["system"] is not None  # a B cell's system has other types
        assert row["seen"]["bank"]["subtype"] is not None
    table = pq.read_table(stratified, columns=["level4_subtype"])["level4_subtype"].to_pylist()
    queries, bank = (np.load(tmp_path / "rows" / f"{name}.npy") for name in ("queries", "train"))
    unseen = np.isin(np.array(table, object), ["B cell", "fibroblast"])
    assert result["num_unseen"] == unseen[queries].sum() == unseen.sum()
    assert not unseen[bank].any()
    raw = result["rows"][0]
    share = unseen[queries].mean()
    apart = share * raw["unseen"]["loo"]["subtype"] + (1 - share) * raw["seen"]["loo"]["subtype"]
    assert raw["loo"]["subtype"] == pytest.approx(apart)


def test_copies_and_another_ontology_are_said(trained: Path, tmp_path: Path, capsys):
    """Every cell of another file twice; the file says that it was made with another release."""
    vectors, codes = clustered(TYPES * 4), np.arange(24) % 6
    table = atlas_table(np.repeat(vectors, 2, axis=0), [(np.repeat(codes, 2), TYPES)] * 4)
    write_tables(tmp_path / "twice", [table], {"cl_release": "2020-01-01", "anchors_sha256": "0"})
    argv = ["--model-path", str(trained), "--input", str(tmp_path / "twice"), "--all-rows"]
    capsys.readouterr()
    evaluate.main(argv)
    printed = capsys.readouterr().out
    assert "warning: 48 test cells have an exact copy among other test cells" in printed
    assert "has another tree than the published one" in printed
    assert "was made with Cell Ontology 2020-01-01, and steps are counted in 2025-07-30" in printed


def test_two_checkpoints_of_one_name_are_both_in_the_json(trained: Path, stratified: Path, tmp_path: Path):
    one, two = tmp_path / "one" / "m.pt", tmp_path / "two" / "m.pt"
    for path in (one, two):
        path.parent.mkdir()
        shutil.copyfile(trained, path)
    argv = ["--model-path", str(one), str(two), "--input", str(stratified), "--json", str(tmp_path / "a.json")]
    evaluate.main(argv)
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["steerability"]) == ["one/m", "two/m"]
    assert len({row["embedding"] for row in result["rows"]}) == len(result["rows"])


def test_flags_are_checked_before_any_work(fails, tmp_path: Path):
    """No input is there, and none is looked for."""
    (tmp_path / "file").touch()
    argv = [evaluate.main, "--input", tmp_path / "none", "--model-path", tmp_path / "m.pt"]
    assert "is a file; name a folder" in fails(*argv, "--rows-out", tmp_path / "file")
    same = tmp_path / "x.json"
    assert "name another" in fails(*argv, "--json", same, "--cells-out", same)
    assert "--controls needs the training cells" in fails(*argv, "--all-rows", "--controls")
    assert "none can be in the bank" in fails(*argv, "--all-rows", "--bank", "all")
