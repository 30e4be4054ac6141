"""Vectors in and out of .h5ad, .npy, Parquet and TileDB; ingest.py on an .h5ad."""

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiledb
import torch
from conftest import TYPES, clustered
from torch.nn.functional import normalize

import ingest
from fractal import anndata_io
from fractal.adapter import FractalAdapter, PublishedAdapter, embed
from fractal.anndata_io import cut_prefix, embed_h5ad, open_vectors
from fractal.atlas import open_atlas, read_rows
from fractal.cli import InputError


def write_h5ad(path: Path, vectors: np.ndarray, **obs: object) -> Path:
    data = anndata.AnnData(np.zeros((len(vectors), 1), np.float32), obs=pd.DataFrame(obs).set_axis(
        [f"cell {i}" for i in range(len(vectors))]), obsm={"X_pca": vectors})  # fmt: skip
    data.write_h5ad(path)
    return path


@pytest.fixture
def h5ad(tmp_path: Path) -> Path:
    """60 cells of 6 types; one without a label."""
    labels = [*TYPES * 10]
    labels[7] = None  # type: ignore[call-overload]
    return write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 10), kind=labels, donor=["a", "b"] * 30)


def read(path: Path, size: int, **more: str) -> np.ndarray:
    with open_vectors(path, **more) as vectors:
        chunks = list(vectors.chunks(size))
        assert sum(map(len, chunks)) == vectors.n
        assert {chunk.shape[1] for chunk in chunks} == {vectors.dim}
        return np.concatenate(chunks)


@pytest.mark.parametrize("size", [7, 1_000])
def test_all_sources_give_the_same_vectors(tmp_path: Path, h5ad: Path, size: int):
    x = clustered(TYPES * 10)
    np.save(tmp_path / "x.npy", x)
    # as SCimilarity writes cellsearch/cell_embedding: uint32 dimensions, one attribute "data"
    dims = [tiledb.Dim(n, (0, end), 10, dtype=np.uint32) for n, end in (("x", 99), ("y", 15))]
    schema = tiledb.ArraySchema(tiledb.Domain(*dims), [tiledb.Attr("data", dtype=np.float32)], sparse=False)
    tiledb.Array.create(str(tmp_path / "named"), schema)
    with tiledb.open(str(tmp_path / "named"), "w") as array:
        array[0:60] = x  # of 100 rows that it has room for
    tiledb.from_numpy(str(tmp_path / "bare"), x).close()
    assert np.array_equal(read(h5ad, size, obsm="X_pca"), x)
    for name in ("x.npy", "named", "bare"):
        assert np.array_equal(read(tmp_path / name, size), x)
    ingest.main(["--h5ad", str(h5ad), "--obsm", "X_pca", "--label-key", "donor", "--unmapped", "other",
                 "--output", str(tmp_path / "a.parquet")])  # fmt: skip
    assert np.array_equal(read(tmp_path / "a.parquet", size), x)


def test_ingest_of_an_h5ad_keeps_labelled_cells_and_renames(tmp_path: Path, h5ad: Path):
    (tmp_path / "map.tsv").write_text("B cell\tplasmablast\nfibroblast\t\n", encoding="utf-8")
    out = tmp_path / "cells.parquet"
    ingest.main(["--h5ad", str(h5ad), "--obsm", "X_pca", "--label-key", "kind", "--study-key", "donor",
                 "--label-map", str(tmp_path / "map.tsv"), "--output", str(out)])  # fmt: skip
    labels = [{"B cell": "plasmablast"}.get(name, name) for name in TYPES * 10]
    keep = [i for i in range(60) if i != 7 and labels[i] != "fibroblast"]
    table = pq.read_table(out)
    assert table["level4_subtype"].to_pylist() == [labels[i] for i in keep]
    assert table["study"].to_pylist() == ["ab"[i % 2] for i in keep]
    assert np.array_equal(read_rows(out, np.arange(len(keep))).vectors, clustered(TYPES * 10)[keep])
    assert open_atlas(out).schema_arrow.metadata[b"source"] == str(h5ad).encode()
    assert out.with_name("hierarchy.tsv").is_file()


def test_unknown_names_come_with_the_closest_ones(tmp_path: Path, fails):
    path = write_h5ad(tmp_path / "x.h5ad", clustered(["a"] * 4), kind=["natural kiler cell", "B cell"] * 2)
    line = fails(ingest.main, "--h5ad", path, "--obsm", "X_pca", "--label-key", "kind", "--output", tmp_path / "o")
    assert "1 type names are not in CL" in line
    assert "natural kiler cell (natural killer cell" in line
    assert "--label-map" in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--obsm", "X_umap"], "has no obsm 'X_umap'; it has X_pca"),
        (["--label-key", "cluster"], "obs has no column 'cluster'"),
        (["--study-key", "batch"], "obs has no column 'batch'"),
        (["--label-map", "missing.tsv"], "missing.tsv: No such file"),
    ],
)
def test_bad_keys(tmp_path: Path, h5ad: Path, fails, flags: list[str], words: str):
    base = ["--h5ad", h5ad, "--obsm", "X_pca", "--label-key", "kind", "--output", tmp_path / "out.parquet"]
    assert words in fails(ingest.main, *base, *flags)
    assert not (tmp_path / "out.parquet").exists()


def test_bad_files(tmp_path: Path, h5ad: Path, fails):
    (tmp_path / "junk.h5ad").write_bytes(b"junk")
    (tmp_path / "junk.npy").write_bytes(b"junk")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    with h5py.File(tmp_path / "old.h5ad", "w") as file:  # obs was one compound dataset before AnnData 0.7
        file["obs"] = np.zeros(3, [("a", "f4")])
    for name, words in {
        "absent.npy": "no such file", "junk.h5ad": "not an .h5ad", "junk.npy": "not an array of numpy",
        "folder": "not a TileDB array", "flat.npy": "cells x dims", "none.npy": "holds no cells",
        "old.h5ad": "before 0.7",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=words), open_vectors(tmp_path / name, "X_pca"):
            pass
    (tmp_path / "map.tsv").write_text("B cell\n", encoding="utf-8")
    base = ["--h5ad", h5ad, "--obsm", "X_pca", "--label-key", "kind", "--output", tmp_path / "o"]
    assert "expected two columns" in fails(ingest.main, *base, "--label-map", tmp_path / "map.tsv")
    (tmp_path / "map.tsv").write_text("T cell\tB cell\n", encoding="utf-8")
    assert "not in obs 'kind'" in fails(ingest.main, *base, "--label-map", tmp_path / "map.tsv")
    x = clustered(TYPES)
    x[2, 3] = np.nan
    bad = write_h5ad(tmp_path / "nan.h5ad", x, kind=TYPES)
    line = fails(ingest.main, "--h5ad", bad, "--obsm", "X_pca", "--label-key", "kind", "--output", tmp_path / "o")
    assert "vector of cell 2 is zero or not finite" in line


PATHS = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]])


@pytest.mark.parametrize("recipe", ["fractal", "published"])
def test_embedded_h5ad_and_its_prefixes(tmp_path: Path, h5ad: Path, recipe: str, monkeypatch):
    monkeypatch.setattr(anndata_io, "CHUNK", 13)  # several chunks, the last one short
    torch.manual_seed(0)
    adapter = FractalAdapter(16, 3, 5, PATHS) if recipe == "fractal" else PublishedAdapter(16, 3, 5, 2, 4)
    x = clustered(TYPES * 10)
    x[20] = np.nan
    source = write_h5ad(tmp_path / "nan.h5ad", x, kind=TYPES * 10)
    assert embed_h5ad(adapter, recipe, "abc", source, "X_pca", tmp_path / "out.h5ad") == 1
    assert embed_h5ad(adapter, recipe, "abc", tmp_path / "out.h5ad", "X_pca", tmp_path / "out.h5ad") == 1  # in place

    data = anndata.read_h5ad(tmp_path / "out.h5ad")
    good = np.arange(60) != 20
    expected = embed(adapter, torch.from_numpy(x[good]))
    facts = data.uns["fractal"]
    assert list(facts["levels"]) == ["system", "lineage", "type"]
    assert (facts["block_width"], list(facts["prefix_ends"]), facts["adapter_sha256"]) == (5, [5, 10, 15], "abc")
    assert np.isnan(data.obsm["X_fractal"][20]).all()
    assert np.allclose(data.obsm["X_fractal"][good], expected[-1], atol=1e-6)
    for j in (1, 2, 3):
        assert np.allclose(cut_prefix(data.obsm, facts, j)[good], expected[j - 1], atol=1e-6)
    for j in (0, 4):
        with pytest.raises(ValueError, match="of 3"):
            cut_prefix(data.obsm, facts, j)
    if recipe == "published":  # what the helper is there for: a cut of the full vector is something else
        cut = normalize(torch.from_numpy(data.obsm["X_fractal"][good, :5]), dim=1)
        assert not np.allclose(cut, expected[0], atol=1e-2)
        with pytest.raises(ValueError, match="X_fractal_blocks"):
            cut_prefix({"X_fractal": data.obsm["X_fractal"]}, facts, 1)
    assert list(data.obs["kind"]) == TYPES * 10


def test_a_wrong_width_leaves_nothing(tmp_path: Path, h5ad: Path):
    with pytest.raises(InputError, match="vectors have 16 numbers, the adapter takes 8"):
        embed_h5ad(FractalAdapter(8, 3, 5, PATHS), "fractal", "", h5ad, "X_pca", tmp_path / "out.h5ad")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.h5ad"]


def test_scanpy_takes_the_vectors(tmp_path: Path, h5ad: Path):
    scanpy = pytest.importorskip("scanpy")
    embed_h5ad(FractalAdapter(16, 3, 5, PATHS), "fractal", "", h5ad, "X_pca", tmp_path / "out.h5ad")
    data = scanpy.read_h5ad(tmp_path / "out.h5ad")
    scanpy.pp.neighbors(data, use_rep="X_fractal", n_neighbors=5)
    assert data.obsp["connectivities"].shape == (60, 60)
    assert data.obsp["connectivities"].nnz > 0
