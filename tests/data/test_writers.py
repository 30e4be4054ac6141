"""What is written into AnnData, and how a prefix is cut out of it again."""

import datetime
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pytest

from fractal.base.errors import InputError
from fractal.commands.output import write_new_h5ad
from fractal.data.writers import obs_of, truncate
from tests.conftest import TYPES, clustered


def test_truncate_cuts_and_normalises(tmp_path: Path):
    x = clustered(TYPES, 8)
    facts = {"recipe": "fractal", "prefix_ends": np.array([2, 4, 8])}
    for j, end in enumerate((2, 4, 8), 1):
        cut = truncate(x, facts, j)
        assert cut.shape == (6, end)
        assert np.allclose(cut, [row[:end] / np.sqrt((row[:end] ** 2).sum()) for row in x])
    published = {**facts, "recipe": "published"}
    with pytest.raises(InputError, match="give its blocks"):
        truncate(x, published, 1)
    assert np.allclose(truncate(x, published, 1, blocks=-x), truncate(-x, facts, 1))
    assert np.allclose(truncate(x, published, 3), truncate(x, facts, 3))
    for vectors, j, words in (
        (x, 0, "prefix 0: name one from 1 to 3"),
        (x, 4, "prefix 4: name one from 1 to 3"),
        (x[:, :4], 1, "not yet cut"),
    ):
        with pytest.raises(InputError, match=words):
            truncate(vectors, facts, j)


def test_columns_of_every_type_and_name_come_out_of_an_h5ad(tmp_path: Path):
    day = datetime.datetime(2020, 1, 2)
    table = pa.table({
        "query": ["a", None, "c"],
        "Query": pa.array(["x", "y", "x"]).dictionary_encode(),
        "when": [day, None, day],
        "took": [datetime.timedelta(hours=1), None, datetime.timedelta(seconds=1)],
        "bytes": [b"\x00\xff", None, b"a"],
        "list": [[1, 2], None, []],
        "n": [1, None, 3],
        "flag": [True, False, True],
        "none": pa.nulls(3),
        "CD4/CD8": [1.5, 2.5, 3.5],
        "_index": ["p", "q", "r"],
        "index": ["s", "t", "u"],
        "": [1, 2, 3],
    })  # fmt: skip
    write_new_h5ad(tmp_path / "a.h5ad", table, {"X": np.ones((3, 2), np.float32)})
    obs = anndata.read_h5ad(tmp_path / "a.h5ad").obs
    assert obs.columns.tolist() == obs_of(table).column_names
    assert obs.columns.tolist()[-4:] == ["CD4|CD8", "index", "index_2", "unnamed"]
    assert obs["when"].tolist() == ["2020-01-02 00:00:00", "", "2020-01-02 00:00:00"]
    assert obs["took"].tolist() == ["1:00:00", "", "0:00:01"]
    assert obs["bytes"].tolist() == ["00ff", "", "61"]
    assert obs["list"].tolist() == ["[1, 2]", "", "[]"]
    assert obs["query"].tolist() == ["a", "", "c"]
    assert obs["Query"].tolist() == ["x", "y", "x"]
    assert obs["index_2"].tolist() == ["s", "t", "u"]
