"""What ingest.py and `fractal.fit` share: classes of cells, an atlas of them, and whether its labels are theirs."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import ingest
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.data.ingestion import atlas_in_memory, order_warning, place_cells, write_atlas
from fractal.data.parquet import atlas_table
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from tests.conftest import TYPES, clustered, write_release


def made(x: np.ndarray, kinds: list, donors: list | None = None) -> anndata.AnnData:
    obs = {"kind": kinds} if donors is None else {"kind": kinds, "donor": donors}
    return anndata.AnnData(obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(len(x))]), obsm={"X_pca": x})


def test_an_atlas_in_memory_is_the_one_that_is_written(tmp_path: Path):
    x, kinds = clustered(TYPES * 20), [None if i in (3, 40) else kind for i, kind in enumerate(TYPES * 20)]
    x[5] = x[9]
    with Cells.open(made(x, kinds, ["d2", "d1", "d3"] * 40), "X_pca") as cells:
        plan = place_cells(cells.labels("kind", "donor"), load_graph(CL_SLIM), "adata")
        memory = atlas_in_memory(cells, plan)
        write_atlas(tmp_path / "a.parquet", cells, plan)
    file = Atlas.open(tmp_path / "a.parquet")
    assert (
        (memory.num_rows, memory.dim, memory.levels) == (file.num_rows, file.dim, file.levels) == (118, 16, file.levels)
    )
    assert memory.metadata == {name: value for name, value in file.metadata.items() if name != "dim"}
    for column in ("level1_system", "level4_subtype", "study"):
        assert memory.codes(column)[0].tolist() == file.codes(column)[0].tolist()
        assert memory.codes(column)[1] == file.codes(column)[1]
    assert np.array_equal(memory.first_copies, file.first_copies)
    rows = np.random.default_rng(0).permutation(118)[:50]
    ours, theirs = memory.read(rows), file.read(rows)
    assert np.array_equal(ours.vectors, theirs.vectors)
    assert np.array_equal(ours.labels, theirs.labels)
    assert ours.classes == theirs.classes
    keep = np.arange(118) % 3 > 0
    assert memory.path_counts(keep) == file.path_counts(keep)
    assert np.array_equal(memory.balanced_rows(rows, 20, 1), file.balanced_rows(rows, 20, 1))


def test_an_atlas_in_memory_of_many_cells_is_read_in_pieces(monkeypatch):
    """More than a row group of a file may have before it is streamed."""
    monkeypatch.setattr("fractal.data.parquet.LARGE", 100)
    x = np.random.default_rng(0).normal(size=(70_000, 2)).astype(np.float32)
    columns = [(np.zeros(len(x), int), ["a"]), (np.arange(len(x)) % 2, ["x", "y"])]
    pieces = list(Atlas.of_table(atlas_table(x, columns, ("class", "type"))).vectors())
    assert [len(piece) for piece in pieces] == [65_536, 4_464]
    assert np.array_equal(np.concatenate(pieces), x)


def test_the_fingerprint_of_an_atlas_in_memory_changes_with_any_cell():
    columns = [(np.array([0, 0, 0]), ["a"]), (np.array([0, 1, 1]), ["x", "y"])]
    x = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
    prints = [Atlas.of_table(atlas_table(x, columns, ("class", "type"))).fingerprint for _ in range(2)]
    assert prints[0] == prints[1]
    other = [columns[0], (np.array([0, 1, 0]), ["x", "y"])]
    prints += [Atlas.of_table(atlas_table(x[::-1], columns, ("class", "type"))).fingerprint]
    prints += [Atlas.of_table(atlas_table(x, other, ("class", "type"))).fingerprint]
    assert len(set(prints)) == 3


def test_a_bad_vector_of_a_labelled_cell_is_refused_in_memory():
    x = clustered(TYPES)
    x[2] = 0
    with Cells.open(made(x, TYPES), "X_pca") as cells:
        plan = place_cells(cells.labels("kind"), load_graph(CL_SLIM), "adata")
        with pytest.raises(InputError, match="adata: the vector of cell 2 is zero"):
            atlas_in_memory(cells, plan)


@pytest.mark.parametrize("shuffled", [False, True])
def test_vectors_in_another_order_than_the_labels_are_told(tmp_path: Path, capsys, shuffled: bool):
    labels = np.random.default_rng(0).choice(TYPES, 900, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]).tolist()
    x = clustered(labels)
    write_release(tmp_path / "m", np.random.default_rng(1).permutation(x) if shuffled else x, labels)
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "a.parquet")])
    assert ("warning: the nearest of 900 cells has the same subtype in " in capsys.readouterr().out) == shuffled


def test_one_type_alone_and_few_cells_say_nothing():
    graph = load_graph(CL_SLIM)
    for kinds in (["B cell"] * 200, TYPES * 10):
        x = np.random.default_rng(0).normal(size=(len(kinds), 16)).astype(np.float32)
        with Cells.open(made(x, kinds), "X_pca") as cells:
            assert order_warning(atlas_in_memory(cells, place_cells(cells.labels("kind"), graph, "adata"))) == ""
