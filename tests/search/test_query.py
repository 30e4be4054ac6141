"""Queries that are groups, and those from Python."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import fractal
from fractal.base.errors import InputError
from fractal.reference import open_embedder
from fractal.search import build, open_index
from fractal.search.index import Hits, Index
from fractal.search.query import search
from fractal.search.source import open_cells
from tests.conftest import TYPES, clustered
from tests.search.conftest import DIM, cells_of


def grouped(
    vectors: np.ndarray, groups: Sequence[str | None], index: Index, k: int, **options: Any
) -> tuple[list[str], Hits]:
    source = cells_of(vectors.astype(np.float32), pa.table({"group": pa.array(groups, pa.string())}))
    ((names, hits),) = search(source, index, k, "group", **options)
    return names, hits


def test_a_group_of_unlike_cells_finds_what_each_of_them_is_like(index: Index):
    """Their mean is like neither: it lies between, with cells of a third kind."""
    rng = np.random.default_rng(0)
    a, b = np.eye(DIM)[:2]
    kinds = {"fibroblast": a, "T cell": b, "between": (a + b) / 2**0.5}
    names = np.repeat(list(kinds), 200)
    vectors = np.stack([kinds[name] for name in names]) + 0.05 * rng.standard_normal((600, DIM))
    build.build(index.folder.path, cells_of(vectors.astype(np.float32), pa.table({"kind": names.tolist()})))
    group = np.stack([a] * 30 + [b] * 10) + 0.05 * rng.standard_normal((40, DIM))
    opened = open_index(index.folder.path)
    found, hits = grouped(group, ["mixed"] * 40, opened, 100, probes=10**6)
    assert found == ["mixed"]
    kinds_found = Counter(opened.table(hits)["kind"].to_pylist())
    assert set(kinds_found) == {"fibroblast", "T cell"}
    assert abs(kinds_found["T cell"] - 25) <= 4  # a share of each cluster, rounded
    assert len(set(hits.cells[0])) == 100
    assert (np.diff(hits.similarity) <= 0).all()
    mean = opened.search(group.mean(0, keepdims=True), 100, probes=10**6)
    assert "between" in opened.table(mean)["kind"].to_pylist()  # as one query
    # few cells; fewer cells of the index than hits; two groups; a cell without one
    keep = np.arange(600) < 7
    found, hits = grouped(group[25:35], ["x", "y", None, "x", ""] * 2, opened, 10, keep=keep)
    assert found == ["x", "y"]
    assert (np.sort(hits.cells, axis=1)[:, 3:] == np.arange(7)).all()
    with pytest.raises(InputError, match="no cell has a group"):
        grouped(group, [None] * 40, opened, 10)


def test_from_python(tmp_path: Path):
    x = clustered(TYPES * 120)
    obs = pd.DataFrame({"cell_type": TYPES * 120, "leiden": ["a", "b"] * 360}, index=[f"c{i}" for i in range(720)])
    cells = anndata.AnnData(obs=obs, obsm={"X_pca": x})
    ref = fractal.fit(cells, "cell_type", use_rep="X_pca", epochs=1)
    ref.save(tmp_path / "reference")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with open_cells(tmp_path / "cells.h5ad", open_embedder(tmp_path / "reference")) as source:
        build.build(tmp_path / "index", source)
    hits = ref.search(cells[:20], tmp_path / "index", k=4)
    assert "leiden" not in ref.search(cells[:20], tmp_path / "index", k=4, columns="cell_type")
    assert hits["query"].tolist()[::4] == [f"c{i}" for i in range(20)]
    assert (hits[hits["rank"] == 1].similarity > 0.999).all()
    index = fractal.open_index(tmp_path / "index")
    groups = ref.search(cells, index, k=5, group_by="leiden", where="cell_type == 'B cell'", prefix=1)
    assert set(groups["query"]) == {"a", "b"}
    assert set(groups.cell_type) == {"B cell"}
