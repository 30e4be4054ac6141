"""The hand-over to Embedding Atlas: maps, neighbours and columns as Parquet."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fractal.view.embedding_atlas import atlas_columns, write_embedding_atlas
from fractal.view.maps import Maps
from fractal.view.shown import Shown
from tests.view.conftest import EVIL
from tests.view.test_maps import nested


@pytest.fixture(scope="module")
def fitted() -> Maps:
    vectors = nested(240)[0]
    return Maps(vectors, (8, 16), np.stack([vectors[:, :2], vectors[:, 8:10]]))  # layouts that cost nothing


def test_the_hand_over_has_maps_and_neighbours(fitted: Maps, tmp_path: Path):
    vectors, path = nested(40, seed=4)[0], tmp_path / "atlas.parquet"
    vectors[5] = vectors[6]  # equal cells are each other's neighbours, not their own
    write_embedding_atlas(path, fitted, vectors, pa.table({"x_1": range(40), "kind": ["<b>"] * 40}))
    table = pq.read_table(path)
    assert table.column_names == ["kind", "x_1", "y_1", "x_2", "y_2", "neighbors"]
    places = np.stack([[table[f"{axis}_{j}"] for axis in "xy"] for j in (1, 2)]).transpose(0, 2, 1)
    assert np.array_equal(places, fitted.transform(vectors))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    for i, found in enumerate(table["neighbors"].to_pylist()):
        assert len(found["ids"]) == len(set(found["ids"])) == 15
        assert i not in found["ids"]
        assert np.allclose(cosine[i][found["ids"]], np.sort(cosine[i])[::-1][:15], atol=1e-6)
        assert np.allclose(found["distances"], 1 - cosine[i][found["ids"]], atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("embedding-atlas") is None, reason="the program embedding-atlas is not installed")
def test_embedding_atlas_opens_it(fitted: Maps, tmp_path: Path):
    """The package itself, a program of its own: it takes pandas 3, and anndata does not yet."""
    vectors, path, out = nested(60, seed=5)[0], tmp_path / "atlas.parquet", tmp_path / "page"
    write_embedding_atlas(path, fitted, vectors, pa.table({"kind": ["<b>a", "b"] * 30}))
    flags = ["--x", "x_2", "--y", "y_2", "--neighbors", "neighbors", "--export-application", str(out)]
    done = subprocess.run(
        ["embedding-atlas", str(path), *flags], capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads((out / "data" / "metadata.json").read_text())["props"]["data"]
    assert (shown["projection"], shown["neighbors"]) == ({"x": "x_2", "y": "y_2"}, "neighbors")
    ours, theirs = pq.read_table(path), pq.read_table(out / "data" / "dataset.parquet")
    for name in ours.column_names:
        assert theirs[name].to_pylist() == ours[name].to_pylist()


def test_columns_are_names_labels_and_what_the_cells_bring(bundle):
    vectors, tree = bundle.annotator.vectors[:5], bundle.annotator.tree
    given = Shown(vectors, 5, ["v", "w", "x", "y", "z"], ["a", EVIL, "no such type", "b", "d"])
    table = atlas_columns(bundle.annotator, given).to_pydict()
    assert list(table) == ["cell_id", *tree.levels]
    assert table["cell_id"] == ["v", "w", "x", "y", "z"]
    assert table[tree.levels[0]] == ["I", "I", "", "I", "S"]
    answered = atlas_columns(bundle.annotator, Shown(vectors, 5)).to_pydict()
    assert list(answered) == ["label", "status", *tree.levels]
    expected = bundle.annotator.answer(vectors)
    assert answered[tree.levels[0]] == [tree.paths[path][0] for path in expected.path]
