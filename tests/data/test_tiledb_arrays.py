"""TileDB: SCimilarity's cellsearch with its frame, and SOMA experiments, against what was written."""

import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiledb

from fractal.base.errors import InputError
from fractal.commands import annotate, embed, fit, index
from fractal.data.cells import Cells
from fractal.search.index import open_index
from tests.conftest import TYPES, clustered
from tests.data.test_cells import write_tiledb

LABELS = TYPES * 40


def write_cellsearch(folder: Path, x: np.ndarray, **columns: object) -> Path:
    """As SCimilarity's scripts do: an array of 10 rows a tile, and a frame by tiledb.from_pandas."""
    folder.mkdir()
    write_tiledb(folder / "cell_embedding", x)
    tiledb.from_pandas(str(folder / "cell_metadata"), pd.DataFrame({"index": np.arange(len(x)), **columns}))
    return folder


def write_soma(folder: Path, x: np.ndarray, ids: np.ndarray, **columns: list) -> Path:
    """The layout of TileDB-SOMA 2.3: groups, and sparse arrays by soma_joinid, which need not be 0, 1, 2, ..."""
    for part in ("", "ms", "ms/RNA", "ms/RNA/obsm"):
        tiledb.Group.create(str(folder / part))

    def dim(name: str) -> tiledb.Dim:
        return tiledb.Dim(name, (0, 2**62), 64, dtype=np.int64)

    attributes = [tiledb.Attr(name, dtype=np.asarray(values).dtype.kind.replace("i", "int64").replace("f", "float64"))
                  for name, values in columns.items()]  # fmt: skip
    frame = str(folder / "obs")
    tiledb.Array.create(frame, tiledb.ArraySchema(tiledb.Domain(dim("soma_joinid")), attributes, sparse=True))
    with tiledb.open(frame, "w") as array:
        array[ids] = {name: np.asarray(values, object if isinstance(values[0], str) else None)
                      for name, values in columns.items()}  # fmt: skip
    matrix = str(folder / "ms" / "RNA" / "obsm" / "X_pca")
    domain = tiledb.Domain(dim("soma_dim_0"), dim("soma_dim_1"))
    tiledb.Array.create(matrix, tiledb.ArraySchema(domain, [tiledb.Attr("soma_data", dtype=np.float32)], sparse=True))
    row, column = (place.ravel() for place in np.indices(x.shape))
    with tiledb.open(matrix, "w") as array:
        array[ids[row], column] = x.ravel()
    for group, members in {"": ["obs", "ms"], "ms": ["RNA"], "ms/RNA": ["obsm"], "ms/RNA/obsm": ["X_pca"]}.items():
        with tiledb.Group(str(folder / group), "w") as opened:
            for name in members:
                opened.add(name, name, relative=True)
    return folder


@pytest.mark.parametrize("size", [7, 1_000])
def test_the_frame_of_cellsearch_becomes_columns(tmp_path: Path, size: int):
    x = clustered(LABELS)
    frame = {"study": ["a", "bé"] * 120, "nn_dist": np.linspace(0, 1, 240), "kind": pd.Categorical(LABELS),
             "in_train": [True, False, True] * 80}  # fmt: skip
    folder = write_cellsearch(tmp_path / "cellsearch", x, **frame)
    for path in (folder, folder / "cell_embedding"):
        with Cells.open(path) as source:
            chunks = list(source.chunks(size))
            assert (source.num_rows, source.dim) == x.shape
            assert all(columns.schema == source.schema for columns, _ in chunks)
        assert np.array_equal(np.concatenate([vectors for _, vectors in chunks]), x)
        found = pa.concat_tables([columns for columns, _ in chunks]).to_pandas()
        assert found["cell_id"].tolist() == [str(i) for i in range(240)]
        for name, values in frame.items():
            assert found[name].tolist() == list(values), name


def test_a_frame_of_other_cells_is_refused(tmp_path: Path):
    folder = write_cellsearch(tmp_path / "cellsearch", clustered(LABELS), study=["a"] * 240)
    with tiledb.open(str(folder / "cell_embedding"), "w") as array:
        array[240:250] = np.ones((10, 16), np.float32)
    with pytest.raises(InputError, match="250 vectors, and cell_metadata beside it has 240 rows"), Cells.open(folder):
        pass


@pytest.mark.slow  # it fits a reference
def test_cellsearch_is_embedded_annotated_and_indexed(tmp_path: Path, capsys):
    """From the commands' side: its columns come along, and a search can ask by them."""
    x = clustered(LABELS)
    obs = pd.DataFrame({"kind": LABELS}, index=[f"c{i}" for i in range(240)])
    anndata.AnnData(np.zeros((240, 1), np.float32), obs, obsm={"X_pca": x}).write_h5ad(tmp_path / "cells.h5ad")
    reference = str(tmp_path / "ref")
    argv = ["--labels", "kind", "--use-rep", "X_pca", "--epochs", "1", "--output", reference]
    fit.main([str(tmp_path / "cells.h5ad"), *argv])
    folder = str(write_cellsearch(tmp_path / "cellsearch", x, study=["a", "b"] * 120, tissue=LABELS))
    embed.main([folder, "--reference", reference, "--output", str(tmp_path / "embedded.parquet")])
    table = pq.read_table(tmp_path / "embedded.parquet")
    assert table.column_names == ["cell_id", "embedding", "study", "tissue"]
    assert table["tissue"].to_pylist() == LABELS
    annotate.main([folder, "--reference", reference, "--output", str(tmp_path / "labels.tsv")])
    labels = pd.read_csv(tmp_path / "labels.tsv", sep="\t")
    assert labels["cell_id"].tolist() == list(range(240))
    assert (labels["subtype"] == LABELS).mean() > 0.9
    index.main([folder, "--reference", reference, "--output", str(tmp_path / "index")])
    found = open_index(tmp_path / "index")
    assert {"study", "tissue"} <= set(found.columns)
    assert found.take(np.array([7]), ["cell_id"])["cell_id"].to_pylist() == ["7"]


@pytest.mark.parametrize("first", [0, 5])
def test_an_experiment_of_soma(tmp_path: Path, first: int):
    """Numbers of cells with gaps, as in a slice of the census; values that are 0 are not stored."""
    x = clustered(LABELS)
    x[3, 2] = 0
    ids = first + np.arange(240) + np.arange(240) // 50 * 17
    path = write_soma(tmp_path / "experiment", x, ids, cell_type=LABELS, n=list(range(240)))
    with Cells.open(path, "X_pca") as source:
        chunks = list(source.chunks(37))
        assert all(columns.schema == source.schema for columns, _ in chunks)
    assert np.array_equal(np.concatenate([vectors for _, vectors in chunks]), x)
    found = pa.concat_tables([columns for columns, _ in chunks])
    assert found["cell_id"].to_pylist() == [str(i) for i in ids]
    assert found["cell_type"].to_pylist() == LABELS
    assert found["n"].to_pylist() == list(range(240))
    with pytest.raises(InputError, match="has no obsm 'X_scVI'; it has X_pca: name one"), Cells.open(path, "X_scVI"):
        pass
    with (
        pytest.raises(InputError, match="no SOMA experiment; it has RNA: name one"),
        Cells.open(path / "ms", "X_pca"),
    ):
        pass
    with Cells.open(path / "ms" / "RNA" / "obsm" / "X_pca") as bare:  # by itself: rows without a cell are 0
        assert (bare.num_rows, bare.dim) == (ids[-1] + 1, 16)
        vectors = np.concatenate([vectors for _, vectors in bare.chunks(37)])
    assert np.array_equal(vectors[ids], x)
    assert np.count_nonzero(vectors.any(1)) == 240


def test_what_tiledbsoma_itself_writes(tmp_path: Path):
    """Where it is installed: uv run --with tiledbsoma pytest tests/data/test_tiledb_arrays.py"""
    pytest.importorskip("tiledbsoma.io")
    x = clustered(LABELS)
    obs = pd.DataFrame({"kind": pd.Categorical(LABELS)}, index=[f"c{i}" for i in range(240)])
    anndata.AnnData(np.zeros((240, 1), np.float32), obs, obsm={"X_pca": x}).write_h5ad(tmp_path / "cells.h5ad")
    code = "import sys, tiledbsoma.io; tiledbsoma.io.from_h5ad(sys.argv[1], sys.argv[2], 'RNA')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "soma"), str(tmp_path / "cells.h5ad")], check=True)
    with Cells.open(tmp_path / "soma", "X_pca") as source:
        chunks = list(source.chunks(100))
    assert np.array_equal(np.concatenate([vectors for _, vectors in chunks]), x)
    found = pa.concat_tables([columns for columns, _ in chunks])
    assert found["cell_id"].to_pylist() == obs.index.tolist()
    assert found["kind"].to_pylist() == LABELS
