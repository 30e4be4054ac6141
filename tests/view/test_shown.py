"""The cells of a page: which are drawn, which columns colour them, and how these are encoded."""

import anndata
import numpy as np
import pandas as pd
import pytest

from fractal.base.errors import InputError
from fractal.data.cells import Cells
from fractal.view.shown import MAX_VALUES, choose, encoded, read_shown


def cells(n: int = 90) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    x[3], x[5, 0] = 0, np.nan
    obs = pd.DataFrame(
        {"donor": rng.choice(["a", "b"], n), "genes": rng.integers(0, 9, n)}, index=[f"c{i}" for i in range(n)]
    )
    return anndata.AnnData(np.zeros((n, 1), np.float32), obs=obs, obsm={"X": x})


def test_usable_cells_are_drawn_in_their_order():
    adata = cells()
    with Cells.open(adata, "X") as opened:
        every, some = read_shown(opened), read_shown(opened, max_cells=40)
    assert every.names == [name for i, name in enumerate(adata.obs_names) if i not in (3, 5)]
    rows = [int(name[1:]) for name in some.names or ()]
    assert rows == sorted(rows)
    assert 38 <= len(rows) <= 40
    assert np.array_equal(some.vectors, adata.obsm["X"][rows])
    assert some.columns["donor"].tolist() == adata.obs["donor"].iloc[rows].tolist()
    assert list(some.columns) == ["donor"]  # numbers only where they are named
    assert (some.total, some.labels) == (90, None)


def test_without_a_usable_cell():
    adata = cells()
    adata.obsm["X"][:] = 0
    with Cells.open(adata, "X") as opened, pytest.raises(InputError, match="none of the cells drawn has a usable"):
        read_shown(opened)


def test_an_atlas_brings_its_labels():
    frame = pd.DataFrame({"level1_system": ["I", "S"], "level2_type": [" b", "c"], "x": ["u", "v"]})
    labels, columns = choose(frame, None, None, "atlas")
    assert (labels, list(columns)) == (["b", "c"], ["x"])
    assert choose(frame, "x", ["level1_system"], "atlas")[0] == ["u", "v"]
    with pytest.raises(InputError, match="atlas: has no column 'y'; it has level1_system, level2_type, x"):
        choose(frame, None, ["y"], "atlas")


def test_columns_are_codes_and_numbers():
    frame = pd.DataFrame({"kind": ["b", None, "nan", "a"], "score": [1.0, np.nan, 3.0, np.inf]})
    about, arrays = encoded(dict(frame.items()))
    assert about[0] == {"name": "kind", "values": ["a", "b"]}
    assert arrays["column_0"].tolist() == [2, 0, 0, 1]
    assert (about[1]["low"], about[1]["high"]) == pytest.approx((1.02, 2.98))
    assert np.array_equal(arrays["column_1"], frame["score"].to_numpy(np.float32), equal_nan=True)
    many = pd.Series([f"x{i}" for i in range(MAX_VALUES + 1)])
    with pytest.raises(InputError, match=f"{MAX_VALUES + 1} values"):
        encoded({"id": many})
