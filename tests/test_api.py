"""The Python API: from labelled AnnData to answers, through a folder and back, and what is refused."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import fractal
from fractal.__main__ import COMMANDS
from fractal.base.errors import InputError
from fractal.commands import annotate, embed, fit, report
from tests.conftest import TYPES
from tests.conftest import labelled_cells as cells

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ref() -> fractal.Reference:
    return fractal.fit(cells(900), labels="cell_type", use_rep="X_scVI", epochs=2, device="cpu")


def test_from_cells_to_answers(ref, tmp_path: Path):
    new = cells(200, seed=1)
    new.obsm["X_scVI"][3] = np.nan
    ref.save(tmp_path / "blood")
    again = fractal.load(tmp_path / "blood")
    again.annotate(new)
    good = np.arange(200) != 3
    right = new.obs["fractal_subtype"].astype(str) == new.obs["cell_type"]
    assert right[good].mean() > 0.95
    assert new.obs["fractal_status"].iloc[3] == "invalid"
    assert new.obs["fractal_subtype_probability"].between(0, 1)[good].all()
    told = new.uns["fractal"]["annotation"]
    assert (told["reference"], told["confidence"], told["fractal_version"]) == ("blood", 0.8, fractal.__version__)

    again.embed(new)
    assert new.uns["fractal"]["annotation"]["confidence"] == 0.8  # one does not wipe out the other
    full = new.obsm["X_fractal"]
    assert full.dtype == np.float32
    assert np.isnan(full[3]).all()
    assert np.allclose(np.linalg.norm(full[good], axis=1), 1, atol=1e-5)
    cut = fractal.truncate(full, new.uns["fractal"], 2)
    again.embed(new, prefix=2, key_added="X_two")
    assert np.allclose(cut[good], new.obsm["X_two"][good], atol=1e-5)
    by_name = fractal.truncate(full, new.uns["fractal"], str(new.uns["fractal"]["levels"][1]))
    assert np.array_equal(by_name, cut, equal_nan=True)
    with pytest.raises(InputError, match="prefix 'tissue': name one from 1 to 4, or a level, system, lineage"):
        fractal.truncate(full, new.uns["fractal"], "tissue")


def test_what_is_written_comes_back(ref, tmp_path: Path):
    """uns, obs and obsm are such that AnnData writes and reads them."""
    new = cells(50, seed=2)
    ref.annotate(new, key_added="mine", confidence=0.5)
    ref.embed(new)
    new.write_h5ad(tmp_path / "new.h5ad")
    back = anndata.read_h5ad(tmp_path / "new.h5ad")
    assert list(back.obs["mine_label"]) == list(new.obs["mine_label"])
    assert back.uns["mine"]["annotation"]["confidence"] == 0.5
    assert np.array_equal(back.obsm["X_fractal"], new.obsm["X_fractal"])


def test_it_says_how_good_it_is(ref):
    text = repr(ref)
    assert "subtype" in text
    assert "held out" in text
    assert "X_scVI" in text


def test_the_command_line_gives_the_same_answers(tmp_path: Path, monkeypatch, capsys):
    """Two commands from files to answers; each names its files by position."""
    monkeypatch.chdir(tmp_path)
    cells(600).write_h5ad("cells.h5ad")
    cells(100, seed=1).write_h5ad("new.h5ad")
    flags = ["--labels", "cell_type", "--use-rep", "X_scVI", "--study", "donor", "--epochs", "1", "--device", "cpu"]
    fit.main(["cells.h5ad", *flags, "--output", "blood"])
    said = capsys.readouterr().out
    assert "Reference of 600 cells" in said  # whole donors are held out, and then they are back
    assert "600 cells held out (3 whole studies in 3 folds): " in said
    annotate.main(["new.h5ad", "--reference", "blood", "--output", "out.h5ad", "--device", "cpu"])
    embed.main(["out.h5ad", "--reference", "blood", "--output", "out.h5ad", "--device", "cpu"])
    out = anndata.read_h5ad("out.h5ad")
    new = cells(100, seed=1)
    ref = fractal.load("blood")
    ref.annotate(new)
    ref.embed(new)
    assert list(out.obs["fractal_label"].astype(str)) == list(new.obs["fractal_label"].astype(str))
    assert np.allclose(out.obsm["X_fractal"], new.obsm["X_fractal"], atol=1e-6)
    for key in ("recipe", "adapter_sha256"):
        assert out.uns["fractal"][key] == new.uns["fractal"][key]
    assert out.uns["fractal"]["annotation"] == new.uns["fractal"]["annotation"]
    assert {"fractal_version", "reference_format", "cl_release"} <= set(new.uns["fractal"]["annotation"])


def test_annotate_takes_what_the_command_takes(ref, tmp_path: Path, capsys):
    """Groups, known labels, and types by any spelling; and the command writes the same into a file."""
    new = cells(200, seed=1)
    new.obs["leiden"] = pd.Categorical(
        [TYPES.index(kind) if i % 50 else -1 for i, kind in enumerate(new.obs.cell_type)]
    )
    new.obs["more"] = "mine"
    new.write_h5ad(tmp_path / "new.h5ad")
    ref.save(tmp_path / "blood")
    ref.annotate(new, over="leiden", truth="cell_type", only=["CL_0000542", "fibroblast"], exclude="T-cell")
    assert "cells whose cell_type the reference has" in capsys.readouterr().out
    flags = ["--over", "leiden", "--truth", "cell_type", "--only", "cl:0000542", "fibroblast", "--exclude", "T cell"]
    files = [str(tmp_path / "new.h5ad"), "--reference", str(tmp_path / "blood"), "--output", str(tmp_path / "out.h5ad")]
    annotate.main([*files, *flags, "--device", "cpu"])
    assert "| leiden" in capsys.readouterr().out
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(out.obs) == list(new.obs)
    for name in new.obs:
        assert out.obs[name].astype(str).tolist() == new.obs[name].astype(str).tolist(), name
    assert out.uns["fractal_label_colors"].tolist() == list(new.uns["fractal_label_colors"])
    assert out.uns["fractal"]["annotation"] == new.uns["fractal"]["annotation"]
    groups = new.uns["fractal"]["groups"]
    assert set(groups["label"].dropna()) <= {"B cell", "natural killer cell", "fibroblast", "Immune", "Lymphoid"}
    assert groups["cells"].sum() < 200  # neither excluded cells nor group -1
    for name, cells_of in new.obs[new.obs["fractal_status"].isin(["ok", "withheld"])].groupby("leiden", observed=True):
        assert cells_of["fractal_label"].nunique(dropna=False) == 1 or name == -1
    ref.annotate(new)
    annotate.main(
        [str(tmp_path / "out.h5ad"), *files[1:3], "--output", str(tmp_path / "again.h5ad"), "--device", "cpu"]
    )
    again = anndata.read_h5ad(tmp_path / "again.h5ad")
    assert "groups" not in {**new.uns["fractal"], **again.uns["fractal"]}, "of the annotation before"
    with pytest.raises(InputError, match="obs has no column 'kind'; it has cell_type, donor"):
        ref.annotate(new, truth="kind")


def test_markers_of_clusters_by_either_way(ref, tmp_path: Path, capsys):
    """Each type has two genes of its own; Python and the command find the same ones."""
    new = cells(120, seed=1)
    rng, kinds = np.random.default_rng(0), np.searchsorted(TYPES, new.obs["cell_type"])
    rates = np.where(np.arange(12) // 2 == kinds[:, None], 9.0, 1.0)
    new = anndata.AnnData(rng.poisson(rates).astype(np.float32), new.obs, obsm={"X_scVI": new.obsm["X_scVI"]})
    new.var_names = [f"GENE{i}" for i in range(12)]
    new.obs["leiden"] = pd.Categorical(kinds)
    new.write_h5ad(tmp_path / "new.h5ad")
    ref.annotate(new, over="leiden", markers=True)
    found = new.uns["fractal"]["markers"]
    for group, rows in found.groupby("group"):
        assert set(rows["gene"][:2]) == {f"GENE{2 * int(group)}", f"GENE{2 * int(group) + 1}"}
    ref.save(tmp_path / "blood")
    flags = ["--over", "leiden", "--markers", "--output", str(tmp_path / "out.h5ad"), "--device", "cpu"]
    annotate.main([str(tmp_path / "new.h5ad"), "--reference", str(tmp_path / "blood"), *flags])
    first = found[found["group"] == "3"]["gene"].tolist()
    assert f"| {', '.join(first[:5])}" in capsys.readouterr().out
    written = anndata.read_h5ad(tmp_path / "out.h5ad").uns["fractal"]["markers"]
    assert written["gene"].tolist() == found["gene"].tolist()
    assert np.allclose(written["score"], found["score"])
    for annotated in (new, tmp_path / "out.h5ad"):
        page = ref.report(annotated=annotated).text
        assert f"<td>{', '.join(first[:5])}</td>" in page  # a cluster's markers, to check its label by
    pages = [
        str(tmp_path / "blood"),
        "--annotated",
        str(tmp_path / "out.h5ad"),
        "--output",
        str(tmp_path / "page.html"),
    ]
    report.main([*pages, "--device", "cpu"])
    assert f"<td>{', '.join(first[:5])}</td>" in (tmp_path / "page.html").read_text()
    with pytest.raises(InputError, match="markers: are of clusters"):
        ref.annotate(new, markers=True)
    new.X = new.X - 1
    with pytest.raises(InputError, match="has no counts"):
        ref.annotate(new, over="leiden", markers=True)


def test_clusters_that_a_report_can_not_show(ref, tmp_path: Path):
    new = cells(60, seed=1)
    with pytest.raises(InputError, match="adata: has no answers by cluster"):
        ref.report(annotated=new)
    new.obs["leiden"] = pd.Categorical(new.obs["cell_type"])
    ref.annotate(new, over="leiden")
    assert "Clusters of annotated cells" in ref.report(annotated=new).text
    assert "Clusters of annotated cells" not in ref.report().text
    del new.uns["fractal"]["groups"]["label"]
    with pytest.raises(InputError, match="its table of clusters is damaged"):
        ref.report(annotated=new)
    ref.annotate(new, over="leiden")
    new.uns["fractal"]["annotation"]["adapter_sha256"] = "another"
    new.write_h5ad(tmp_path / "new.h5ad")
    with pytest.raises(InputError, match=r"new\.h5ad: its clusters were annotated by another reference"):
        ref.report(annotated=tmp_path / "new.h5ad")


def test_a_second_annotation_takes_the_place_of_the_first(ref):
    new = cells(60, seed=1)
    new.obs["fractal_umap"] = 1.0
    ref.annotate(new, only=["fibroblast", "B cell"])
    new.obs["fractal_old_level_probability"] = 0.5  # of a reference with another level
    new.obs["fractal_old_level"] = "x"
    ref.annotate(new)
    assert not any("old_level" in name for name in new.obs)
    assert "fractal_umap" in new.obs
    labels = new.obs["fractal_label"]
    assert len(new.uns["fractal_label_colors"]) == len(labels.cat.categories)
    assert all(colour.startswith("#") for colour in new.uns["fractal_label_colors"])
    assert new.obs["fractal_level"].cat.ordered
    assert not (labels == "").any()


def test_the_key_is_remembered_and_another_space_is_refused(ref):
    new = cells(100, seed=1)
    new.obsm["X_other"] = new.obsm["X_scVI"][:, :5]
    with pytest.raises(InputError, match="5 numbers.*16"):
        ref.annotate(new, use_rep="X_other")
    with pytest.raises(InputError, match="X_missing"):
        ref.embed(new, use_rep="X_missing")
    del new.obsm["X_scVI"]
    with pytest.raises(InputError, match="X_scVI") as error:
        ref.annotate(new)
    assert "--" not in str(error.value)
    assert not any(name.startswith("fractal") for name in new.obs)


def test_bad_input_is_one_line(fails, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells(60).write_h5ad("cells.h5ad")
    base = ["cells.h5ad", "--labels", "cell_type", "--device", "cpu"]
    assert "no obsm 'X_pca'" in fails(fit.main, *base, "--use-rep", "X_pca", "--output", "out")
    assert "no column 'kind'" in fails(
        fit.main, "cells.h5ad", "--labels", "kind", "--use-rep", "X_scVI", "--output", "out"
    )
    assert "no such file" in fails(
        fit.main, "nothing.h5ad", "--labels", "kind", "--use-rep", "X_scVI", "--output", "out"
    )
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    assert "notes" in fails(fit.main, *base, "--use-rep", "X_scVI", "--output", "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    assert not Path("out").exists()


def test_importing_is_fast_and_loads_no_torch():
    check = "import sys, fractal; assert not {'torch', 'sklearn', 'anndata'} & set(sys.modules); print(dir(fractal))"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert time.perf_counter() - began < 1.5  # .1 s on an idle machine
    for name in fractal.__all__:
        assert name in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fractal.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_loads_next_to_nothing(name: str):
    """torch takes seconds to load, the others a good part of one."""
    check = f"""
import sys
from fractal.__main__ import main
try:
    main([*{[name] if name else []}, "--help"])
except SystemExit as stop:
    assert not stop.code
loaded = {{"torch", "sklearn", "scipy", "anndata", "pandas", "networkx"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"usage: fractal {name or 'COMMAND'}" in done.stdout


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == fractal.__version__
    assert f"version: {fractal.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_package_lists_what_it_has():
    assert {"Reference", "fit", "load", "truncate", "__version__"} <= set(dir(fractal))
    with pytest.raises(AttributeError, match="^module 'fractal' has no attribute 'fitt'$"):
        _ = fractal.fitt
