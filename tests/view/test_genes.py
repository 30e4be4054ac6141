"""Genes of a page; the t-test behind its markers is tested in tests/data/test_markers.py."""

from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from fractal.base.errors import InputError, InputWarning
from fractal.view import genes
from fractal.view.genes import Genes, names_of, read_genes

ALL = np.arange(300)
TYPES = np.array(list("abcd"))[np.random.default_rng(0).integers(0, 4, 300)]


@pytest.fixture
def adata() -> anndata.AnnData:
    """Counts of 40 genes, five of them high in each type."""
    means = np.full((300, 40), 0.5)
    for i, name in enumerate("abcd"):
        means[name == TYPES, 5 * i : 5 * i + 5] = 4
    counts = sp.csr_matrix(np.random.default_rng(1).poisson(means).astype(np.float32))
    return anndata.AnnData(counts, var=pd.DataFrame(index=[f"G{i}" for i in range(40)]))


def of(source: object, rows: np.ndarray = ALL, names: Sequence[str] | None = None) -> Genes:
    found = read_genes(source, rows, names)
    assert found is not None
    return found


def expected(adata: anndata.AnnData) -> np.ndarray:
    counts = adata.X.toarray()
    return np.log1p(10_000 * counts / counts.sum(1, keepdims=True))


def test_values_are_log1p_of_scaled_counts_and_keep_a_byte(adata, tmp_path: Path):
    rows = np.arange(0, 300, 7)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for source in (adata, tmp_path / "cells.h5ad"):
        with pytest.warns(InputWarning, match=r"(adata|cells\.h5ad): has no gene no such gene$"):
            chosen = of(source, rows, ["G3", "no such gene", "G1", "G3"])
        assert chosen.names == ["G3", "G1"]
        about, values = chosen.encoded()
        assert values.dtype == np.uint8
        assert [gene["name"] for gene in about] == ["G3", "G1"]
        for i, gene in enumerate((3, 1)):
            exact = expected(adata)[rows, gene]
            assert np.allclose(values[i] / 255 * about[i]["high"], exact, atol=about[i]["high"] / 500)
            assert ((values[i] > 0) == (exact > 0)).all()


def test_markers_are_the_genes_that_set_types_apart(adata, monkeypatch: pytest.MonkeyPatch):
    everything = of(adata)
    codes = np.searchsorted(list("abcd"), TYPES) + 1
    markers = everything.markers(np.where(codes == 4, 0, codes))  # cells of no type are no type
    position = {name: i for i, name in enumerate(markers.names)}
    for i in range(3):
        assert {f"G{5 * i + k}" for k in range(5)} <= set(markers.names)
    assert position["G0"] < position["G5"] < position["G10"]  # in the order of the types
    assert (markers.values.toarray() == everything.values[:, [everything.names.index(n) for n in markers.names]]).all()
    monkeypatch.setattr(genes, "MARKERS", 6)
    assert sorted(int(name[1:]) // 5 for name in everything.markers(codes).names) == [0, 0, 1, 1, 2, 3]
    assert everything.markers(np.ones(300, int)).names == []


def test_symbols_beside_ensembl_ids_are_matched(adata):
    adata.var["feature_name"] = pd.Categorical(adata.var_names)
    adata.var_names = [f"ENSG{i}" for i in range(40)]
    assert of(adata, names=["G7"]).names == ["G7"]
    assert of(adata, names=["ENSG7"]).names == ["ENSG7"]
    assert set(of(adata).names) == {f"G{i}" for i in range(40)}


def test_without_counts_named_genes_are_as_they_are_and_others_are_none(adata):
    scaled = adata.X.toarray() - 1
    adata.X = scaled
    assert read_genes(adata, ALL) is None
    chosen = of(adata, names=["G2"])
    assert (chosen.values.toarray()[:, 0] == scaled[:, 2]).all()
    about, values = chosen.encoded()
    assert np.allclose(
        about[0]["low"] + values[0] / 255 * (about[0]["high"] - about[0]["low"]), scaled[:, 2], atol=0.02
    )
    bare = anndata.AnnData(obs=adata.obs)
    assert read_genes(bare, ALL) is None
    with pytest.raises(InputError, match="no counts"):
        read_genes(bare, ALL, ["G2"])


def test_a_cell_without_counts_stops_only_named_genes(adata, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fractal.data.expression.EXAMINED", 100)
    adata.X[250, 3] = 0.5  # the first cells hold counts
    with pytest.raises(InputError, match="first cells hold counts"):
        of(adata, names=["G2"])
    assert read_genes(adata, ALL) is None


def test_a_large_file_is_not_read_for_markers(adata, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(genes, "MAX_READ", 299)
    assert read_genes(adata, ALL) is None
    assert read_genes(adata, ALL, ["G2"]) is not None


def test_names_come_as_words_or_in_a_file(adata, tmp_path: Path):
    assert names_of(["CD3E", "LYZ"]) == ["CD3E", "LYZ"]
    (tmp_path / "genes.txt").write_text("CD3E\nLYZ, MS4A1\n")
    assert names_of([str(tmp_path / "genes.txt")]) == ["CD3E", "LYZ", "MS4A1"]
    (tmp_path / "genes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"genes\.txt"):
        names_of([str(tmp_path / "genes.txt")])
    with pytest.raises(InputError, match="has no gene nothing"):
        read_genes(adata, ALL, ["nothing"])
    with pytest.raises(InputError, match="at most 500"):
        read_genes(adata, ALL, [f"G{i}" for i in range(501)])
