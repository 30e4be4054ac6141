"""A reference of a PCA projects new cells: against scikit-learn, in memory and from files, and what is refused."""

import itertools
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.decomposition import PCA, TruncatedSVD

import fractal
from fractal.annotate.projection import Projection, learn, learn_together
from fractal.base.errors import InputError
from fractal.commands import annotate, embed, fit, index, search
from fractal.data.expression import open_expression
from tests.conftest import TYPES

GENES = 120


def counts(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Counts (n, GENES) of cells of the six TYPES; each type has its own mean of every gene, whatever the seed."""
    means = np.random.default_rng(7).gamma(0.6, 2.0, (len(TYPES), GENES))
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, len(TYPES), n)
    return rng.poisson(means[kind] * rng.uniform(0.5, 2, (n, 1))).astype(np.float32), [TYPES[k] for k in kind]


def normalised(x: np.ndarray) -> np.ndarray:
    return np.log1p(x / x.sum(1, keepdims=True) * 1e3)


def with_pca(x: np.ndarray, labels: list[str], centred: bool = True, used: np.ndarray | None = None) -> anndata.AnnData:
    """As scanpy's pca leaves it: loadings of 0 for genes that were not used."""
    used = np.ones(x.shape[1], bool) if used is None else used
    found = PCA(15, svd_solver="full") if centred else TruncatedSVD(15, algorithm="arpack")
    vectors = found.fit_transform(x[:, used]).astype(np.float32)
    loadings = np.zeros((x.shape[1], 15))
    loadings[used] = found.components_.T
    index = [f"cell {i}" for i in range(len(x))]
    obs, var = pd.DataFrame({"cell_type": labels}, index), pd.DataFrame(index=[f"GENE{i}" for i in range(x.shape[1])])
    uns = {"pca": {"params": {"zero_center": centred}}}
    return anndata.AnnData(x, obs, var, uns, obsm={"X_pca": vectors}, varm={"PCs": loadings})


def labelled(n: int = 700) -> anndata.AnnData:
    x, labels = counts(n, 0)
    return with_pca(normalised(x), labels)


def unseen(n: int = 300) -> anndata.AnnData:
    """New cells with a PCA of their own, which is another space."""
    x, labels = counts(n, 1)
    return with_pca(normalised(x), labels)


def accuracy(adata: anndata.AnnData) -> float:
    return float((adata.obs["fractal_subtype"].astype(str) == adata.obs["cell_type"].astype(str)).mean())


@pytest.fixture(scope="module")
def ref() -> fractal.Reference:
    return fractal.fit(labelled(), labels="cell_type", use_rep="X_pca", epochs=2, device="cpu")


@pytest.fixture
def folder(ref: fractal.Reference, tmp_path: Path) -> Path:
    ref.save(tmp_path / "ref")
    return tmp_path / "ref"


FORMS = {"dense": np.asarray, "csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix}


@pytest.mark.parametrize(("form", "centred", "on_disk"), list(itertools.product(FORMS, [True, False], [True, False])))
def test_the_training_cells_come_out_as_they_are(
    form: str, centred: bool, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their own components are the oracle; of genes that were not used, and of a subset made after the PCA."""
    monkeypatch.setattr("fractal.data.expression.NUMBERS", 100 * GENES)  # several pieces
    x, labels = counts(500, 0)
    adata = with_pca(normalised(x), labels, centred, np.arange(GENES) % 3 > 0)[40:].copy()
    adata.X = FORMS[form](adata.X)
    cells: anndata.AnnData | Path = adata
    if on_disk:
        cells = tmp_path / "cells.h5ad"
        adata.write_h5ad(cells)
    found, line = learn(cells, "X_pca")
    assert found is not None
    assert len(found.genes) == 80
    assert "80 genes" in line
    with open_expression(adata) as (_, matrix):
        expression = matrix("")
    assert expression is not None
    rows, said = found.components(expression)
    assert np.allclose(rows(slice(0, 460)), adata.obsm["X_pca"], atol=1e-4)
    assert np.allclose(rows(slice(350, 460)), adata.obsm["X_pca"][350:], atol=1e-4)
    assert "80 of 80 genes" in said


def test_a_layer_is_looked_up_and_asked_for():
    adata = labelled(200)
    adata.layers["log"], adata.X = adata.X, np.zeros_like(adata.X)
    adata.uns["pca"]["params"]["layer"] = "log"
    found, _ = learn(adata, "X_pca")
    assert found is not None
    assert found.layer == "log"
    again = Projection.of(found.arrays(), found.facts(), 15)
    for name in ("genes", "loadings", "means", "offset", "layer", "kind"):
        assert np.array_equal(getattr(again, name), getattr(found, name))


def test_files_have_one_pca_between_them(tmp_path: Path):
    whole, (x, labels) = labelled(200), counts(100, 3)
    parts = [whole[:120].copy(), whole[120:].copy()]
    (found, _), (expected, _) = learn_together(parts, "X_pca"), learn(whole, "X_pca")
    assert found is not None
    assert expected is not None
    assert np.array_equal(found.loadings, expected.loadings)
    with_pca(normalised(x), labels).write_h5ad(tmp_path / "own.h5ad")
    with pytest.raises(InputError, match=r"own\.h5ad: obsm 'X_pca' is a PCA of its own; make one"):
        learn_together([whole, tmp_path / "own.h5ad"], "X_pca")
    with pytest.raises(InputError, match="an AnnData: obsm 'X_pca' is a PCA of its own"):
        learn_together([tmp_path / "own.h5ad", whole], "X_pca")


def test_an_old_scanpy_marks_unused_genes_by_nan():
    x, labels = counts(200, 0)
    used = np.arange(GENES) % 3 > 0
    adata = with_pca(normalised(x), labels, used=used)
    adata.varm["PCs"][~used] = np.nan
    found, _ = learn(adata, "X_pca")
    assert found is not None
    assert list(found.genes) == list(adata.var_names[used])


def test_numbers_that_are_missing_in_an_unused_gene_do_no_harm():
    x, labels = counts(300, 0)
    used = np.arange(GENES) >= 20
    adata = with_pca(normalised(x), labels, used=used)
    adata.X[5, 3] = np.nan
    projection, line = learn(adata, "X_pca")
    assert projection is not None
    assert (projection.kind, len(projection.genes)) == ("normalised", 100)
    assert "keeps the loadings of 100 genes" in line
    with open_expression(adata) as (_, expression):
        x_of = expression("")
        assert x_of
        projection.check_kind(x_of, np.flatnonzero(used).tolist(), np.ones(100, bool), force=False)


def test_nothing_is_kept_where_the_expression_does_not_give_the_components():
    adata = labelled(200)
    assert learn(adata, "X_other") == (None, "")
    changed = adata.copy()
    changed.X = counts(200, 0)[0]
    found, line = learn(changed, "X_pca")
    assert found is None
    assert "changed since" in line
    twice = adata.copy()
    twice.var_names = ["same"] * GENES
    assert "not unique" in learn(twice, "X_pca")[1]
    hole = adata.copy()
    hole.X[3, 4] = np.nan
    assert "not finite" in learn(hole, "X_pca")[1]
    bare = adata.copy()
    bare.X = None
    assert "without the expression" in learn(bare, "X_pca")[1]
    del adata.varm["PCs"]
    assert learn(adata, "X_pca")[0] is None


def test_new_cells_are_projected_as_well_as_by_hand(ref, capsys):
    """As accurate as with the loadings applied by hand, though their own PCA is of another space, or missing."""
    new, trained = unseen(), labelled()
    by_hand = new.copy()
    by_hand.obsm["X_pca"] = ((new.X - trained.X.mean(0)) @ trained.varm["PCs"]).astype(np.float32)
    ref.annotate(by_hand)
    assert capsys.readouterr().out == ""
    assert by_hand.uns["fractal"]["annotation"]["vectors"] == "obsm 'X_pca'"
    assert accuracy(by_hand) > 0.95
    ref.annotate(new)
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1
    assert "nothing in common" in said
    assert "projected from X: 120 of 120 genes" in said
    assert list(new.obs["fractal_label"]) == list(by_hand.obs["fractal_label"])
    bare = new.copy()
    del bare.obsm["X_pca"]
    ref.embed(bare)
    ref.embed(by_hand)
    assert np.allclose(bare.obsm["X_fractal"], by_hand.obsm["X_fractal"], atol=1e-4)
    wide = new.copy()
    wide.obsm["X_pca"] = wide.obsm["X_pca"][:, :5]
    ref.annotate(wide)
    assert list(wide.obs["fractal_label"]) == list(by_hand.obs["fractal_label"])
    with pytest.raises(InputError, match="X_other"):  # who names vectors gets these, or an error
        ref.annotate(new, use_rep="X_other")
    anew = new.copy()
    ref.annotate(anew, force=True)
    assert accuracy(anew) < accuracy(new)


def test_genes_in_another_order_missing_and_by_another_name(ref, capsys):
    new = unseen()
    del new.obsm["X_pca"]
    ref.annotate(new)
    order = np.random.default_rng(0).permutation(GENES)[:110]
    other = anndata.AnnData(scipy.sparse.csr_matrix(new.X[:, order]), new.obs[["cell_type"]], new.var.iloc[order])
    other.var["feature_name"] = pd.Categorical(other.var_names)
    other.var_names = [f"ENSG{i:011}" for i in range(110)]
    ref.annotate(other)
    said = capsys.readouterr().out
    assert "110 of 120 genes, the 10 missing ones at the reference's mean" in said
    assert "feature_name" in said
    assert (other.obs["fractal_label"].astype(str) == new.obs["fractal_label"].astype(str)).mean() > 0.9
    other.var["feature_name"] = "none"
    with pytest.raises(InputError, match=r"0 of the 120 genes.*GENE0.*ENSG0"):
        ref.annotate(other)


def test_another_normalisation_is_refused_or_said(ref, capsys):
    new = unseen()
    del new.obsm["X_pca"]
    raw = new.copy()
    raw.X = counts(300, 1)[0]
    with pytest.raises(InputError, match="holds whole numbers, as counts are; .* prepare new cells in the same way"):
        ref.annotate(raw)
    scaled = new.copy()
    scaled.X = (new.X - new.X.mean(0)) / (new.X.std(0) + 1e-3)
    with pytest.raises(InputError, match="numbers below 0"):
        ref.annotate(scaled)
    new.X = new.X * 3
    ref.annotate(new, force=True)
    assert "was it normalised in the same way?" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Fit, annotate and embed from files; X is sparse and streamed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fractal.data.expression.NUMBERS", 100 * GENES)
    cells, new = labelled(), unseen()
    new.X = scipy.sparse.csr_matrix(new.X)
    cells.write_h5ad("cells.h5ad")
    new.write_h5ad("new.h5ad")
    flags = ["--labels", "cell_type", "--use-rep", "X_pca", "--epochs", "2", "--device", "cpu"]
    fit.main(["cells.h5ad", *flags, "--output", "ref"])
    assert "projects new cells itself" in capsys.readouterr().out
    assert "expression of 120 genes" in Path("ref", "README.md").read_text(encoding="utf-8")
    annotate.main(["new.h5ad", "--reference", "ref", "--output", "out.h5ad", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "nothing in common" in said
    assert "120 of 120 genes" in said
    embed.main(["out.h5ad", "--reference", "ref", "--output", "out.h5ad", "--device", "cpu"])
    out, ref = anndata.read_h5ad("out.h5ad"), fractal.load("ref")
    ref.annotate(new)
    ref.embed(new)
    assert accuracy(out) > 0.95
    assert list(out.obs["fractal_label"]) == list(new.obs["fractal_label"])
    assert np.allclose(out.obsm["X_fractal"], new.obsm["X_fractal"], atol=1e-5)
    shell, api = (adata.uns["fractal"]["annotation"] for adata in (out, new))
    assert {key: value for key, value in shell.items() if key != "vectors"} == {
        key: value for key, value in api.items() if key != "vectors"
    }


def test_a_file_without_such_vectors_streams(folder: Path, tmp_path: Path):
    new = unseen()
    del new.obsm["X_pca"]
    new.write_h5ad(tmp_path / "new.h5ad")
    intake = fractal.load(folder).intake
    with intake.open(tmp_path / "new.h5ad", None, False) as (source, origin):
        assert origin.projected
        parts = list(source.chunks(64))
    assert [len(vectors) for _, vectors in parts] == [64, 64, 64, 64, 44]
    assert parts[0][0]["cell_id"].to_pylist()[:2] == ["cell 0", "cell 1"]
    trained = labelled()
    expected = (new.X - trained.X.mean(0)) @ trained.varm["PCs"]
    assert np.allclose(np.concatenate([vectors for _, vectors in parts]), expected, atol=1e-3)


def test_index_and_search_project_cells_without_such_vectors(ref, folder: Path, tmp_path: Path, capsys):
    labelled().write_h5ad(tmp_path / "cells.h5ad")
    new = unseen()
    del new.obsm["X_pca"]
    new.write_h5ad(tmp_path / "new.h5ad")
    flags = ["--reference", str(folder), "--device", "cpu"]
    index.main([str(tmp_path / "cells.h5ad"), *flags, "--output", str(tmp_path / "index")])
    found = ref.search(new, tmp_path / "index", k=3)
    asked = ["--query", str(tmp_path / "new.h5ad"), "--index", str(tmp_path / "index"), "-k", "3"]
    search.main([*asked, *flags, "--output", str(tmp_path / "hits.parquet")])
    assert "120 of 120 genes" in capsys.readouterr().out
    hits = pd.read_parquet(tmp_path / "hits.parquet")
    assert (hits["id"] == found["id"].to_numpy()).mean() > 0.98
    type_of = dict(zip(new.obs_names, new.obs["cell_type"].astype(str), strict=True))
    assert (hits["cell_type"] == hits["query"].map(type_of)).mean() > 0.95
    index.main([str(tmp_path / "index"), "--add", str(tmp_path / "new.h5ad"), *flags])
    assert len(fractal.open_index(tmp_path / "index")) == labelled().n_obs + new.n_obs


def test_damaged_or_missing_loadings_are_noticed(ref, folder: Path, tmp_path: Path):
    with open(folder / "projection.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(InputError, match="projection.safetensors: missing, or not the file"):
        fractal.load(folder)
    (folder / "projection.safetensors").unlink()
    with pytest.raises(InputError, match="projection.safetensors: missing, or not the file"):
        fractal.load(folder)
    ref.save(folder)  # its own files are replaced
    fractal.load(folder)
    shutil.rmtree(folder)
