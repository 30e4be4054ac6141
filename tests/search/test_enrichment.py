"""Enrichment, held to Fisher's test."""

import numpy as np
import pytest
from scipy.stats import fisher_exact

from fractal.search import enrichment
from fractal.search.index import Hits, Index
from tests.search.conftest import table_of


def test_a_planted_enrichment_is_found(index: Index):
    """40 hits, 30 of them of the lung: against scipy's Fisher test on the table of counts."""
    tissue = np.array(table_of(3_000)["tissue"].to_pylist(), object)
    lung, others = np.flatnonzero(tissue == "lung"), np.flatnonzero(tissue == "gut")
    planted = Hits(np.concatenate([lung[:30], others[:10]])[None], np.ones((1, 40), np.float32))
    found = enrichment.enrichment(index, planted, ["mine"]).to_pandas().set_index(["column", "value"])
    row = found.loc[("tissue", "lung")]
    with_value, total = len(lung), sum(t is not None for t in tissue)
    assert (row.hits, row.of_hits, row.cells, row.of_cells) == (30, 40, with_value, total)
    assert row.fold == pytest.approx(30 / 40 / (with_value / total))
    counts = [[30, 10], [with_value - 30, total - with_value - 10]]
    assert row.p_value == pytest.approx(fisher_exact(counts, "greater").pvalue)
    assert row.q_value < 0.001
    significant = found[found.q_value <= 0.05].index.tolist()
    assert significant == [("tissue", "lung")]
    assert "\x1b" not in enrichment.summary(enrichment.enrichment(index, planted, ["mine\x1b[2J"]), q_value=1.0)


def test_cells_of_the_same_kind_are_not_counted_twice(index: Index):
    twice = Hits(np.zeros((2, 5), np.int64), np.ones((2, 5), np.float32))
    found = enrichment.enrichment(index, twice, ["mine", "mine"], ["level1_system"])
    assert found["of_hits"].to_pylist() == [1]
