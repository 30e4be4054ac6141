"""Fitting from Python and the shell: it can be repeated, leaves no trace, and ingests as ingest.py does."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import fractal
import ingest as ingest_script
from fractal.base.errors import InputError
from fractal.commands import fit
from fractal.data.cells import Cells
from fractal.data.ingestion import place_cells, write_atlas
from fractal.fitting import check_labels
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from tests.conftest import labelled_cells as cells


def test_the_same_seed_gives_the_same_reference_and_nothing_else_changes(tmp_path: Path):
    """Neither the labelled cells nor the caller's random numbers, which else would be the same after every fit."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    labelled = cells(400)
    before, found = labelled.copy(), []
    for _ in range(2):
        torch.manual_seed(3)
        ref = fractal.fit(labelled, labels="cell_type", use_rep="X_scVI", epochs=1, device="cpu")
        assert torch.equal(torch.rand(4), expected)
        new = cells(60, seed=1)
        ref.embed(new)
        found.append(new.obsm["X_fractal"])
    assert np.array_equal(*found)
    pd.testing.assert_frame_equal(labelled.obs, before.obs)
    assert np.array_equal(labelled.obsm["X_scVI"], before.obsm["X_scVI"])
    assert labelled.uns == before.uns
    ref.save(tmp_path / "ref")
    torch.manual_seed(3)
    fractal.load(tmp_path / "ref")
    assert torch.equal(torch.rand(4), expected)


def test_arguments_that_contradict_each_other():
    with pytest.raises(InputError, match="give either labels, .* or levels"):
        check_labels("cell_type", ["a", "b"], None, None, "error", "published")
    with pytest.raises(InputError, match="label_map, unmapped: without effect beside levels"):
        check_labels(None, ["a", "b"], {"x": "B cell"}, None, "other", "published")


def test_fit_writes_a_label_map_that_it_takes(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adata = cells(300)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace({"fibroblast": "fibroblastz"})
    adata.write_h5ad("cells.h5ad")
    flags = ["cells.h5ad", "--labels", "cell_type", "--use-rep", "X_scVI"]
    with pytest.raises(InputError, match="fibroblastz.*--write-label-map"):
        fit.main([*flags, "--output", "blood"])
    fit.main([*flags, "--write-label-map", "map.tsv"])
    assert "--label-map map.tsv" in capsys.readouterr().out
    template = Path("map.tsv").read_text(encoding="utf-8")
    assert "fibroblastz\t\t\tunmapped\t" in template
    Path("map.tsv").write_text(template.replace("fibroblastz\t\t\t", "fibroblastz\tfibroblast\t\t"), encoding="utf-8")
    with pytest.raises(InputError, match="--write-label-map"):
        fit.main([*flags, "--write-label-map", "map.tsv", "--label-map", "map.tsv"])
    fit.main([*flags, "--label-map", "map.tsv", "--output", "blood", "--epochs", "1", "--device", "cpu"])
    assert Path("blood", "bundle.json").is_file()


def test_what_fit_ingests_says_where_it_comes_from(tmp_path: Path):
    """As a file of ingest.py does: the rules' sha256 and the cells' names, from memory and from a file."""
    cells(60).write_h5ad(tmp_path / "cells.h5ad")
    graph = load_graph(CL_SLIM)
    found = []
    for name, data in {"memory": cells(60), "file": tmp_path / "cells.h5ad"}.items():
        with Cells.open(data, "X_scVI") as opened:
            plan = place_cells(opened.labels("cell_type"), graph, opened.path)
            write_atlas(tmp_path / f"{name}.parquet", opened, plan)
        table = pq.read_table(tmp_path / f"{name}.parquet")
        assert table["cell_id"].to_pylist() == list(cells(60).obs_names)
        found.append(table.schema.metadata[b"anchors_sha256"])
    argv = ["--h5ad", tmp_path / "cells.h5ad", "--obsm", "X_scVI", "--output", tmp_path / "script.parquet"]
    ingest_script.main([str(part) for part in argv])
    script = pq.read_table(tmp_path / "script.parquet")
    assert found == [script.schema.metadata[b"anchors_sha256"]] * 2
    assert script.equals(table)
