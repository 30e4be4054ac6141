"""Whatever file vectors come in, they are the same, in chunks of any size; and files that hold none are refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import tiledb
from conftest import TYPES, clustered, write_h5ad
from test_atlas import write

from fractal.cli import InputError
from fractal.vectors import Source, open_vectors


def write_tiledb(folder: Path, x: np.ndarray) -> None:
    """As SCimilarity writes cellsearch/cell_embedding: uint32 dimensions, one attribute "data", room for more rows."""
    ends = {"x": len(x) + 39, "y": x.shape[1] - 1}
    dims = [tiledb.Dim(name, (0, end), 10, dtype=np.uint32) for name, end in ends.items()]
    schema = tiledb.ArraySchema(tiledb.Domain(*dims), [tiledb.Attr("data", dtype=np.float32)], sparse=False)
    tiledb.Array.create(str(folder), schema)
    with tiledb.open(str(folder), "w") as array:
        array[0 : len(x)] = x


def read(source: Source, size: int) -> np.ndarray:
    chunks = list(source.chunks(size))
    assert max(len(vectors) for _, vectors in chunks) <= size
    assert all(
        len(columns) == len(vectors) and columns.schema.names == source.schema.names for columns, vectors in chunks
    )
    vectors = np.concatenate([vectors for _, vectors in chunks])
    assert vectors.dtype == np.float32
    assert vectors.shape == (source.num_rows, source.dim)
    return vectors


@pytest.mark.parametrize("size", [7, 1_000])
def test_all_files_give_the_same_vectors(tmp_path: Path, size: int):
    x = clustered(TYPES * 10)
    x[11, 3], x[50] = np.nan, 0
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "wide.npy", np.asfortranarray(x, np.float64))
    write_h5ad(tmp_path / "x.h5ad", x)
    write_tiledb(tmp_path / "named", x)
    tiledb.from_numpy(str(tmp_path / "bare"), x).close()
    for name in ("x.npy", "wide.npy", "x.h5ad", "named", "bare"):
        with open_vectors(tmp_path / name, "X_pca", 16) as source:
            assert np.array_equal(read(source, size), x, equal_nan=True)
            with pytest.raises(InputError, match="vector of cell 11 is zero or not finite"):
                list(source.chunks(size, strict=True))


@pytest.mark.parametrize("size", [7, 1_000])
def test_an_atlas_gives_its_vectors_and_columns(tmp_path: Path, size: int):
    x, labels = write(tmp_path / "a.parquet", [5, 40, 3])
    with open_vectors(tmp_path / "a.parquet") as source:
        assert np.array_equal(read(source, size), x)
        found = [value for columns, _ in source.chunks(size) for value in columns["level4_subtype"].to_pylist()]
        assert found == labels[3]


def test_bad_files(tmp_path: Path):
    for name in ("junk.h5ad", "junk.npy", "junk.parquet"):
        (tmp_path / name).write_bytes(b"junk")
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "several", np.zeros((3, 4)))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    whole = tmp_path / "whole.npy"
    np.save(whole, np.zeros((3, 4)))
    (tmp_path / "header.npy").write_bytes(whole.read_bytes().replace(b"{'descr'", b"{'de\"cr'"))
    (tmp_path / "short.npy").write_bytes(whole.read_bytes()[:-1])
    for name, array in {"flat": np.zeros(3), "none": np.zeros((0, 3)), "ints": np.zeros((3, 4), int)}.items():
        np.save(tmp_path / f"{name}.npy", array)
    with h5py.File(tmp_path / "old.h5ad", "w") as file:  # obs was one compound dataset before AnnData 0.7
        file["obs"] = np.zeros(3, [("a", "f4")])
    tiledb.from_numpy(str(tmp_path / "ints"), np.zeros((3, 4), int)).close()
    write_h5ad(tmp_path / "x.h5ad", clustered(TYPES))
    for name, words in {
        "absent.npy": "no such file", "absent.h5ad": "no such file", "absent.parquet": "no such file",
        "junk.h5ad": "not an .h5ad", "junk.npy": "not a .npy file",
        "several.npy": "not a .npy file", "header.npy": "not a .npy file", "short.npy": "not a .npy file",
        "junk.parquet": "not a Parquet file",
        "folder": "not a TileDB array", "flat.npy": "cells x dims", "none.npy": "at least one cell",
        "ints.npy": r"holds int64 of shape \(3, 4\)", "ints": "holds int64", "old.h5ad": "before 0.7",
        "x.h5ad": "has no obsm 'X_umap'; it has X_pca",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"{name}: .*{words}"), open_vectors(tmp_path / name, "X_umap"):
            pass
    with (
        pytest.raises(InputError, match="vectors have 16 numbers, the adapter takes 8"),
        open_vectors(tmp_path / "x.h5ad", "X_pca", 8),
    ):
        pass
