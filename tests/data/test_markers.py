"""Markers against scipy's t-test on the dense matrix, and against scanpy where it is installed."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import ttest_ind

from fractal.base.errors import InputError
from fractal.data import expression as expression_module
from fractal.data.expression import choose_counts, open_expression
from fractal.data.markers import markers, symbols

GROUPS = ["a", "b", "few"]


@pytest.fixture
def cells() -> tuple[anndata.AnnData, np.ndarray]:
    """302 cells of 40 genes; genes 0 to 2 are of group a, 3 to 5 of b; two cells of a third group, some of none."""
    rng = np.random.default_rng(0)
    codes = np.array([*rng.integers(-1, 2, 300), 2, 2])
    rates = np.full((302, 40), 0.5)
    rates[codes == 0, :3], rates[codes == 1, 3:6] = 4, 4
    counts = sp.csr_matrix(rng.poisson(rates * rng.uniform(0.5, 2, (302, 1))).astype(np.float32))
    return anndata.AnnData(counts, var=pd.DataFrame(index=[f"G{i}" for i in range(40)])), codes


def found(adata: anndata.AnnData, codes: np.ndarray, **options) -> pd.DataFrame:
    with open_expression(adata) as (_, matrix):
        return markers(choose_counts(matrix, "adata"), codes, GROUPS, **options)


@pytest.mark.parametrize("chunk", [2**24, 40 * 64])
def test_scores_are_those_of_welchs_test(cells, chunk: int, monkeypatch):
    monkeypatch.setattr(expression_module, "NUMBERS", chunk)
    adata, codes = cells
    dense = adata.X.toarray().astype(np.float64)
    x = np.log1p(dense / dense.sum(1, keepdims=True) * 10_000)
    table = found(adata, codes, top=40)
    assert set(table["group"]) == {"a", "b"}  # two cells say nothing
    for code, name in enumerate(GROUPS[:2]):
        rows = table[table["group"] == name].set_index("gene")
        own, rest = x[codes == code], x[codes != code]
        score = pd.Series(ttest_ind(own, rest, equal_var=False).statistic, adata.var_names)
        assert rows["score"].to_dict() == pytest.approx(score[score > 0].to_dict())
        assert rows["score"].is_monotonic_decreasing
        assert set(rows.index[:3]) == {f"G{i}" for i in range(3 * code, 3 * code + 3)}
        gene = rows.index[0]
        assert rows["share"][gene] == pytest.approx((dense[codes == code, int(gene[1:])] > 0).mean())
        assert rows["share_of_rest"][gene] == pytest.approx((dense[codes != code, int(gene[1:])] > 0).mean())


def test_of_log_normalised_values_the_same_genes(cells):
    adata, codes = cells
    counts = found(adata, codes)
    dense = adata.X.toarray().astype(np.float64)
    adata.X = sp.csr_matrix(np.log1p(dense / dense.sum(1, keepdims=True) * 10_000))
    logged = found(adata, codes)
    assert logged["gene"].tolist() == counts["gene"].tolist()
    assert logged["score"].tolist() == pytest.approx(counts["score"].tolist(), rel=1e-4)


def test_as_scanpy_ranks_them(cells):
    scanpy = pytest.importorskip("scanpy")
    adata, codes = cells
    table = found(adata, codes, top=5)
    adata.obs["group"] = pd.Categorical.from_codes(np.where(codes < 0, 3, codes), [*GROUPS, "none"])
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    scanpy.tl.rank_genes_groups(adata, "group", groups=["a", "b"], method="t-test")
    for name in ("a", "b"):
        peer = scanpy.get.rank_genes_groups_df(adata, name).head(5)
        rows = table[table["group"] == name]
        assert rows["gene"].tolist() == peer["names"].tolist()
        assert rows["score"].to_numpy() == pytest.approx(peer["scores"].to_numpy(), rel=1e-3)
        assert rows["log2_fold_change"].to_numpy() == pytest.approx(peer["logfoldchanges"].to_numpy(), rel=1e-3)


def test_scaled_values_are_refused(cells):
    adata, codes = cells
    adata.X = adata.X.toarray() - 1
    with pytest.raises(InputError, match="has no counts"):
        found(adata, codes)


def test_genes_are_called_by_their_symbols():
    ids = pd.DataFrame({"feature_name": ["CD3E", "MS4A1"]}, index=["ENSG1", "ENSG2"])
    assert symbols(ids).tolist() == ["CD3E", "MS4A1"]
    assert symbols(ids.set_axis(["x", "y"])).tolist() == ["x", "y"]
    assert symbols(ids[[]]).tolist() == ["ENSG1", "ENSG2"]


@pytest.mark.parametrize("kind", ["object", "category", "string"])
def test_a_gene_without_a_symbol_keeps_its_id(kind: str):
    names = pd.Series(["CD3E", None, "", np.nan], [f"ENSG{i}" for i in range(4)], dtype="object").astype(kind)
    assert symbols(pd.DataFrame({"feature_name": names})).tolist() == ["CD3E", "ENSG1", "ENSG2", "ENSG3"]
