"""The command that makes a reference of a checkpoint: what it keeps, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from fractal.annotate.folder import VERSION
from fractal.commands import annotate
from fractal.commands import reference as bundle
from fractal.hierarchy.ontology import CL_SLIM
from fractal.reference import read_reference
from tests.conftest import TYPES, clustered


def test_a_bundle_says_where_it_comes_from_and_gives_back_what_went_in(reference: Path):
    facts = json.loads((reference / "ref" / "bundle.json").read_text())
    assert facts["cl_release"] == "2025-07-30"
    assert facts["recipe"] == "fractal"
    scores = facts["scores"]
    assert scores["cells"] > 100
    assert scores["levels"]["subtype"]["accuracy_forced"] > 0.9
    assert sum(b["cells"] for b in scores["levels"]["subtype"]["reliability"]) == scores["cells"]
    assert "| `subtype`" in (reference / "ref" / "README.md").read_text()
    found = read_reference(reference / "ref")
    checkpoint = torch.load(reference / "adapter.pt", weights_only=True)
    for name, tensor in found.adapter.state_dict().items():
        assert torch.equal(tensor, checkpoint["state"][name])
    assert len(found.annotator.vectors) == facts["reference_cells"]


def test_bad_bundles(reference: Path, tmp_path: Path, fails):
    np.save(tmp_path / "x.npy", clustered(TYPES))
    np.save(tmp_path / "wide.npy", np.zeros((3, 17)))

    def line(change, source: str = "x.npy", *more: str) -> str:
        shutil.rmtree(tmp_path / "ref", ignore_errors=True)
        shutil.copytree(reference / "ref", tmp_path / "ref")
        change(tmp_path / "ref")
        out = tmp_path / "out.tsv"
        found = fails(
            annotate.main, "--reference", tmp_path / "ref", "--input", tmp_path / source, "--output", out, *more
        )
        assert not out.exists()
        return found

    def edit(**changes: object):
        def change(folder: Path) -> None:
            facts = json.loads((folder / "bundle.json").read_text())
            (folder / "bundle.json").write_text(json.dumps(facts | changes))

        return change

    assert f"a reference of version 0, this reads {VERSION}" in line(edit(version=0))
    assert "not a reference" in line(lambda folder: (folder / "bundle.json").unlink())
    assert "not a reference" in line(lambda folder: (folder / "bundle.json").write_text("[]"))
    assert "not a reference" in line(edit(sha256=5))
    config = json.loads((reference / "ref" / "bundle.json").read_text())["config"]
    assert "a damaged reference" in line(edit(config={**config, "dim": 2**30}))
    for name in ("adapter.safetensors", "cells.safetensors", "hierarchy.tsv", "held_out.safetensors"):
        with_more = lambda folder, name=name: open(folder / name, "ab").write(b" ")  # noqa: E731, SIM115
        assert f"{name}: missing, or not the file" in line(with_more)
    same = lambda folder: None  # noqa: E731
    assert "vectors have 17 numbers, the adapter takes 16" in line(same, "wide.npy")
    blocks = CL_SLIM.read_text(encoding="utf-8").split("\n\n")
    lacking = [b for b in blocks if "id: CL:0000815\n" not in b]  # regulatory T cell
    (tmp_path / "old.obo").write_text("\n\n".join(lacking), encoding="utf-8")
    assert "lacks 1 terms of" in line(same, "x.npy", "--obo", str(tmp_path / "old.obo"))
    assert "CL:0000815" in line(same, "x.npy", "--obo", str(tmp_path / "old.obo"))


def test_bundle_refuses(reference: Path, tmp_path: Path, fails):
    base = ["--model-path", reference / "adapter.pt", "--device", "cpu"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    cells = ["--input", reference / "cells.parquet"]
    assert "no reference" in fails(bundle.main, *base, *cells, "--output", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    table = pq.read_table(reference / "cells.parquet")
    pq.write_table(table.slice(0, 100), tmp_path / "other.parquet")
    line = fails(bundle.main, *base, "--input", tmp_path / "other.parquet", "--output", tmp_path / "ref")
    assert "not the file that" in line
    assert not (tmp_path / "ref").exists()
