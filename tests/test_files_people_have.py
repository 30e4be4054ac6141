"""Eight kinds of files that people have, small, and what comes out of each. README: from the shell."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import fractal
from fractal.cli import InputError
from fractal.commands import fit

IMMUNE = ["B cell", "T cell", "natural killer cell", "CD14-positive monocyte", "plasma cell", "dendritic cell"]


def made(labels: Sequence[object], dim: int = 30, key: str = "X_scVI", seed: int = 0, **obs: object) -> anndata.AnnData:
    """Cells around one centre per label, in a space that depends on the label's name only."""
    names = sorted({str(label) for label in labels})
    rng = np.random.default_rng(seed)
    centres = {name: np.random.default_rng(zlib.crc32(name.encode())).normal(size=dim) for name in names}
    vectors = np.stack([centres[str(label)] for label in labels]) + 0.4 * rng.normal(size=(len(labels), dim))
    table = pd.DataFrame({"cell_type": pd.Categorical(labels), **obs}, index=[f"cell {i}" for i in range(len(labels))])
    return anndata.AnnData(np.zeros((len(labels), 3), np.float32), obs=table, obsm={key: vectors.astype(np.float32)})


def drawn(types: Sequence[str], n: int, seed: int = 0) -> list[str]:
    return np.random.default_rng(seed).choice(types, n).tolist()


def fitted(adata: anndata.AnnData, labels: str | None = "cell_type", key: str = "X_scVI", **more) -> fractal.Reference:
    more = {"epochs": 3, "device": "cpu", **more}
    return fractal.fit(adata, labels=labels, use_rep=key, **more)


def share_right(ref: fractal.Reference, new: anndata.AnnData, truth: Sequence[str], name: str = "subtype") -> float:
    ref.annotate(new)
    return float(np.mean(new.obs[f"fractal_{name}"].astype(str).to_numpy() == np.array(truth)))


def test_thirty_numbers_of_scvi():
    """Narrow vectors: blocks follow the input, a 30-d cell does not become 128-d."""
    ref = fitted(made(drawn([*IMMUNE, "fibroblast", "hepatocyte"], 700)))
    new = made(labels := drawn(IMMUNE, 80, seed=1), seed=1)
    assert share_right(ref, new, labels) > 0.9
    ref.embed(new)
    assert new.obsm["X_fractal"].shape[1] < 128


def test_columns_of_cellxgene(capsys):
    """Ids of the ontology as labels, "unknown" cells; these are left out, counted, and never a class."""
    ids = {"CL:0000236": "B cell", "CL:0000084": "T cell", "CL:0000057": "fibroblast"}
    labels = [*drawn(list(ids), 580), *["unknown"] * 20]
    data = made(labels)
    data.obs = data.obs.rename(columns={"cell_type": "cell_type_ontology_term_id"})
    ref = fitted(data, "cell_type_ontology_term_id")
    assert "20" in capsys.readouterr().out
    new = made(asked := drawn(list(ids), 60, seed=1), seed=1)
    assert share_right(ref, new, [ids[name] for name in asked]) > 0.9
    assert "unknown" not in set(new.obs["fractal_subtype"].astype(str))


def test_plurals_of_celltypist():
    """ "B cells", "Monocytes", "NK cells": found in the ontology without a map."""
    plurals = {
        "B cells": "B cell",
        "Monocytes": "monocyte",
        "NK cells": "natural killer cell",
        "Fibroblasts": "fibroblast",
    }
    ref = fitted(made(drawn(list(plurals), 600)))
    new = made(asked := drawn(list(plurals), 60, seed=1), seed=1)
    ref.annotate(new)
    terms = {"B cell": "CL:0000236", "monocyte": "CL:0000576", "natural killer cell": "CL:0000623"}
    terms["fibroblast"] = "CL:0000057"
    expected = [terms[plurals[name]] for name in asked]
    assert (new.obs["fractal_subtype_cl_id"].astype(str).to_numpy() == np.array(expected)).mean() > 0.9


def test_an_immune_set():
    """One system: the levels below are still told."""
    ref = fitted(made(drawn(IMMUNE, 700)))
    new = made(labels := drawn(IMMUNE, 80, seed=1), seed=1)
    assert share_right(ref, new, labels) > 0.9
    assert set(new.obs["fractal_system"].astype(str)) == {"Immune"}
    assert set(new.obs["fractal_lineage"].astype(str)) == {"Lymphoid", "Innate Lymphoid", "Myeloid", "Immune"}


def test_a_brain_with_levels_of_its_own(tmp_path: Path):
    """Types that CL does not have: own columns are the tree."""
    tree = {"L2/3 IT_1": "L2/3 IT", "L2/3 IT_2": "L2/3 IT", "L5 ET_1": "L5 ET", "Pvalb_1": "Pvalb", "Sst_1": "Sst"}
    top = {"L2/3 IT": "Glutamatergic", "L5 ET": "Glutamatergic", "Pvalb": "GABAergic", "Sst": "GABAergic"}
    clusters = drawn(list(tree), 700)
    levels: dict[str, Any] = {"subclass": [tree[c] for c in clusters], "class": [top[tree[c]] for c in clusters]}
    ref = fitted(made(clusters, **levels), None, levels=["class", "subclass", "cell_type"])
    new = made(asked := drawn(list(tree), 80, seed=1), seed=1)
    ref.save(tmp_path / "brain")
    ref = fractal.load(tmp_path / "brain")
    assert share_right(ref, new, asked, "cell_type") > 0.9
    assert share_right(ref, new, [tree[c] for c in asked], "subclass") > 0.9
    assert share_right(ref, new, [top[tree[c]] for c in asked], "class") > 0.9
    ref.embed(new)
    assert list(new.uns["fractal"]["levels"]) == ["class", "subclass", "cell_type"]
    assert fractal.truncate(new.obsm["X_fractal"], new.uns["fractal"], 1).shape[1] < new.obsm["X_fractal"].shape[1]


def test_450_cells():
    """Few: enough of them are still held out to calibrate on."""
    ref = fitted(made(drawn(IMMUNE, 450)))
    assert share_right(ref, made(labels := drawn(IMMUNE, 60, seed=1), seed=1), labels) > 0.9
    assert "held out" in repr(ref)


def test_a_file_sorted_by_type():
    """More cells than are trained on, one type after the other: each has its share."""
    labels = sorted([*["B cell"] * 1_200, *["T cell"] * 900, *["fibroblast"] * 200, *["hepatocyte"] * 150])
    ref = fitted(made(labels), max_cells=600)
    asked = ["B cell", "T cell", "fibroblast", "hepatocyte"] * 15
    assert share_right(ref, made(asked, seed=1), asked) > 0.95


def test_expression_only(fails, tmp_path: Path):
    """No vectors at all: told how to get some."""
    labels = drawn(IMMUNE, 50)
    counts = scipy.sparse.csr_matrix(np.random.default_rng(0).poisson(0.5, (50, 200)).astype(np.float32))
    data = anndata.AnnData(counts, obs=pd.DataFrame({"cell_type": labels}, index=[f"cell {i}" for i in range(50)]))
    data.write_h5ad(tmp_path / "counts.h5ad")
    base = [tmp_path / "counts.h5ad", "--labels", "cell_type", "--output", tmp_path / "ref"]
    message = fails(fit.main, *base, "--use-rep", "X_pca")
    assert "counts.h5ad: has no obsm 'X_pca'" in message
    assert "normalize_total, log1p, pca" in message
    with pytest.raises(InputError, match="normalize_total, log1p, pca"):
        fitted(data)
