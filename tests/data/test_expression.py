"""Counts are found in what people bring, and what holds none is refused."""

from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from fractal.base.errors import InputError
from fractal.data.expression import choose_counts, open_expression
from tests.data.test_encoder import cells, counts, encoded, expected, write_model


def test_counts_are_looked_for_in_layers_x_and_raw(tmp_path: Path):
    network, x = write_model(tmp_path), counts()
    scaled = cells(x - x.mean(0))
    with pytest.raises(InputError, match="X holds numbers below 0"):
        encoded(scaled, tmp_path)
    scaled.raw = cells(x)
    assert np.abs(encoded(scaled, tmp_path)[1] - expected(network, x)).max() < 1e-5
    other = counts(seed=5)
    scaled.layers["counts"] = other
    assert np.abs(encoded(scaled, tmp_path)[1] - expected(network, other)).max() < 1e-5


def test_values_that_are_no_counts_are_refused(tmp_path: Path):
    write_model(tmp_path)
    x = counts()
    twice = np.log1p(np.log1p(x / x.sum(1, keepdims=True) * 1e4))
    for values in (twice, x * np.float32(0.3), np.zeros_like(x)):
        with pytest.raises(InputError, match="has no counts"):
            encoded(cells(values), tmp_path)
    late = counts(3_000)
    late[2_500, 3] = 0.5
    late[2_600, 4] = -1
    with pytest.raises(InputError, match=r"cell 2500 holds 0\.5"):
        encoded(cells(late), tmp_path)


def test_backed_and_raw_on_disk(tmp_path: Path):
    network, x = write_model(tmp_path / "model"), counts()
    cells(sp.csr_matrix(x)).write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert np.abs(encoded(backed, tmp_path / "model")[1] - expected(network, x)).max() < 1e-5
    scaled = cells(x - 1)
    scaled.raw = cells(x)
    scaled.write_h5ad(tmp_path / "raw.h5ad")
    with open_expression(str(tmp_path / "raw.h5ad")) as (_, matrix):
        assert choose_counts(matrix, "raw.h5ad").where.endswith(": raw")
