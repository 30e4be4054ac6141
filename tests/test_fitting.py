"""Fitting from Python and the shell: it can be repeated, leaves no trace, and ingests as ingest.py does."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import fractal
import ingest as ingest_script
from fractal.base.errors import InputError
from fractal.commands import annotate, fit
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


def test_a_file_that_is_given_twice_is_noticed(capsys: pytest.CaptureFixture[str]):
    labelled = cells(300)
    fractal.fit(labelled, labels="cell_type", use_rep="X_scVI", epochs=1)
    assert "twice" not in capsys.readouterr().out
    fractal.fit([labelled, labelled], labels="cell_type", use_rep="X_scVI", study="donor", epochs=1)
    assert "warning: 300 of 600 cells have the vector of an earlier one" in capsys.readouterr().out


def test_one_name_is_no_list_of_letters():
    labelled = cells(300)
    with pytest.raises(InputError, match="has no column 'leiden'"):
        fractal.fit(labelled, levels="leiden", use_rep="X_scVI")
    with pytest.raises(InputError, match="'B cell' has not two labels"):
        fractal.fit(labelled, labels="cell_type", use_rep="X_scVI", vague="B cell")


def test_fit_writes_a_label_map_that_it_takes(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adata = cells(300)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace({"fibroblast": "fibroblastz"})
    adata.write_h5ad("cells.h5ad")
    flags = ["cells.h5ad", "--labels", "cell_type", "--use-rep", "X_scVI"]
    with pytest.raises(InputError, match="fibroblastz.*--write-label-map"):
        fit.main([*flags, "--output", "blood"])
    fit.main([*flags, "--write-label-map", "map.tsv"])
    with pytest.raises(InputError, match="map.tsv: is there, perhaps edited by hand"):
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


QUICK: dict[str, Any] = {"use_rep": "X_scVI", "epochs": 1, "device": "cpu"}
ARRAYS = ("adapter.safetensors", "cells.safetensors", "held_out.safetensors", "hierarchy.tsv")


def written(ref: fractal.Reference, folder: Path) -> dict[str, bytes]:
    ref.save(folder)
    return {name: (folder / name).read_bytes() for name in ARRAYS}


@pytest.mark.slow
def test_two_files_give_the_reference_of_the_joined_one(tmp_path: Path, monkeypatch, capsys):
    """Byte for byte. In the shell, and as one .zip, which labels cells as the folder does."""
    monkeypatch.chdir(tmp_path)
    whole = cells(400)
    whole.write_h5ad("whole.h5ad")
    whole[:150].write_h5ad("a.h5ad")
    whole[150:].write_h5ad("b.h5ad")
    expected = written(fractal.fit("whole.h5ad", "cell_type", study="donor", **QUICK), tmp_path / "whole")
    flags = ["--labels", "cell_type", "--use-rep", "X_scVI", "--study", "donor", "--epochs", "1", "--device", "cpu"]
    fit.main(["a.h5ad", "b.h5ad", *flags, "--output", "both.zip"])
    assert "cells: 150 of a.h5ad, 250 of b.h5ad\n" in capsys.readouterr().out
    both = fractal.load("both.zip", "cpu")
    assert written(both, tmp_path / "both") == expected
    assert both.facts["source"] == "a.h5ad, b.h5ad"
    assert both.facts["cells_from"] == [{"name": "a.h5ad", "cells": 150}, {"name": "b.h5ad", "cells": 250}]
    assert "Labelled cells: 150 of `a.h5ad`, 250 of `b.h5ad`." in Path("both", "README.md").read_text()
    cells(60, seed=1).write_h5ad("new.h5ad")
    found = []
    for name in ("whole", "both.zip"):
        annotate.main(["new.h5ad", "--reference", name, "--output", "labels.tsv", "--device", "cpu"])
        found.append(Path("labels.tsv").read_text())
    assert found[0] == found[1]


@pytest.mark.slow
def test_update_fits_the_kept_cells_and_the_new_ones(tmp_path: Path, monkeypatch):
    """As a fit of the same cells in one AnnData: labels of the tree, old studies by number, new ones beside them."""
    monkeypatch.chdir(tmp_path)
    ref = fractal.fit(cells(300), "cell_type", study="donor", max_cells=200, **QUICK)
    ref.save("old.zip")
    new = cells(100, seed=1)
    new.obs["cell_type"] = new.obs["cell_type"].replace({"B cell": "B cells"})  # one term of CL: one type
    new.write_h5ad("new.h5ad")
    flags = ["--labels", "cell_type", "--study", "donor", "--epochs", "1", "--device", "cpu", "--output", "more"]
    fit.main(["new.h5ad", "--update", "old.zip", *flags])
    more, a = fractal.load("more", "cpu"), ref.annotator
    assert more.facts["cells_from"] == [
        {"name": f"the reference old.zip (adapter {ref.sha256[:16]})", "cells": 200},
        {"name": "new.h5ad", "cells": 100},
    ]
    assert more.facts["source"] == "an AnnData, new.h5ad"
    assert more.use_rep == "X_scVI"
    obs = pd.DataFrame({
        "cell_type": [*(a.tree.paths[row][-1] for row in a.path), *cells(100, seed=1).obs["cell_type"]],
        "donor": [*(f"study {code} of the reference" for code in a.study), *new.obs["donor"]],
    })  # fmt: skip
    obs.index = obs.index.astype(str)
    joined = anndata.AnnData(obs=obs, obsm={"X_scVI": np.concatenate([a.vectors, new.obsm["X_scVI"]])})
    in_two = fractal.fit([joined[:120].copy(), joined[120:].copy()], "cell_type", study="donor", **QUICK)
    assert written(in_two, tmp_path / "joined") == {name: Path("more", name).read_bytes() for name in ARRAYS}
    assert len(np.unique(more.annotator.study)) == 6
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "the reference has 3 studies; name the column .*study"),
        ({"study": "donor", "tree": "cellxgene"}, "the reference has the levels system, .*; give its tree"),
        ({"study": "donor", "model": "x"}, "^model: the reference of update knows its encoder"),
    ]
    for options, match in cases:
        with pytest.raises(InputError, match=match):
            fractal.fit("new.h5ad", "cell_type", update=ref, **options)
    with pytest.raises(InputError, match="there are no cells"):
        fractal.fit([], "cell_type", study="donor", update=ref)


def test_levels_of_the_user_s_own_come_back_for_an_update():
    """Also those that `fit` renamed, since they stand under two parents."""
    adata = cells(300)
    adata.obs["side"] = np.where(adata.obs["donor"] == "a", "left", "right")
    ref = fractal.fit(adata, levels=["side", "cell_type"], **QUICK)
    assert all(fine.endswith(f" ({coarse})") for coarse, fine in ref.annotator.tree.paths)
    more = fractal.fit(adata[:50].copy(), levels=["side", "cell_type"], update=ref, epochs=1, device="cpu")
    assert more.annotator.tree.paths == ref.annotator.tree.paths
    assert len(more.annotator.path) == 350
