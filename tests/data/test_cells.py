"""Whatever cells come in, they are the same, in chunks of any size; and what holds none is refused."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import anndata
import fsspec
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiledb

from fractal.base.errors import InputError
from fractal.commands.output import write_parquet
from fractal.data.cells import Cells, names_of
from fractal.data.h5ad import open_h5ad
from fractal.data.parquet import NOT_READ
from tests.conftest import TYPES, clustered, write_h5ad
from tests.data.test_parquet import write
from tests.test_ingest import as_anndata_0_7


def write_tiledb(folder: Path, x: np.ndarray) -> None:
    """As SCimilarity writes cellsearch/cell_embedding: uint32 dimensions, one attribute "data", room for more rows."""
    ends = {"x": len(x) + 39, "y": x.shape[1] - 1}
    dims = [tiledb.Dim(name, (0, end), 10, dtype=np.uint32) for name, end in ends.items()]
    schema = tiledb.ArraySchema(tiledb.Domain(*dims), [tiledb.Attr("data", dtype=np.float32)], sparse=False)
    tiledb.Array.create(str(folder), schema)
    with tiledb.open(str(folder), "w") as array:
        array[0 : len(x)] = x


def read(source: Cells, size: int) -> np.ndarray:
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
    for version in (2, 3):
        with anndata.settings.override(zarr_write_format=version):
            anndata.read_h5ad(tmp_path / "x.h5ad").write_zarr(tmp_path / f"{version}.zarr")
    write_tiledb(tmp_path / "named", x)
    tiledb.from_numpy(str(tmp_path / "bare"), x).close()
    for name in ("x.npy", "wide.npy", "x.h5ad", "2.zarr", "3.zarr", "named", "bare"):
        with Cells.open(tmp_path / name, "X_pca", 16) as source:
            assert np.array_equal(read(source, size), x, equal_nan=True)
            with pytest.raises(InputError, match="vector of cell 11 is zero or not finite"):
                list(source.chunks(size, strict=True))


@pytest.mark.parametrize("size", [7, 1_000])
def test_an_atlas_gives_its_vectors_and_columns(tmp_path: Path, size: int):
    x, labels = write(tmp_path / "a.parquet", [5, 40, 3])
    with Cells.open(tmp_path / "a.parquet") as source:
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
        "x.h5ad": "has no obsm 'X_umap'; it has X_pca: name one with --use-rep",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"{name}: .*{words}"), Cells.open(tmp_path / name, "X_umap"):
            pass
    with (
        pytest.raises(InputError, match="vectors have 16 numbers, the adapter takes 8"),
        Cells.open(tmp_path / "x.h5ad", "X_pca", 8),
    ):
        pass


LISTS = [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 16)]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("make", LISTS)
def test_plain_parquet_needs_only_an_embedding(tmp_path: Path, make, kind: pa.DataType):
    x = clustered(TYPES * 10).astype(kind.to_pandas_dtype())
    names = [f"cell {i}" for i in range(len(x))]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": range(60), "obs_names": names, "embedding": pa.array(list(x), make(kind))}), path,
                   row_group_size=25)  # fmt: skip
    with Cells.open(path, dim=16) as source:
        assert np.array_equal(read(source, 7), x.astype(np.float32))
        assert source.has_names
        assert source.schema.names == ["cell_id", "n"]
        ids = [name for columns, _ in source.chunks(7) for name in columns["cell_id"].to_pylist()]
        assert ids == names
        out = tmp_path / "out.parquet"
        write_parquet(out, ((columns, {"embedding": vectors}) for columns, vectors in source.chunks()), {})
    assert pq.read_table(out).column_names == ["cell_id", "embedding", "n"]
    assert pq.read_table(out)["cell_id"].to_pylist() == names


@pytest.mark.parametrize("name", ["index", "__index_level_0__", "cell_id", None])
def test_a_pandas_index_stays(tmp_path: Path, name: str | None):
    frame = pd.DataFrame({"embedding": list(clustered(TYPES))}, index=pd.Index([f"c{i}" for i in range(6)]))
    frame.rename_axis(None if name == "__index_level_0__" else name).to_parquet(tmp_path / "x.parquet")
    with Cells.open(tmp_path / "x.parquet") as source:
        columns, _ = next(source.chunks())
        ids = names_of(columns)
        assert ids is not None
        assert ids.tolist() == frame.index.tolist()


def test_parquet_that_holds_no_vectors(tmp_path: Path):
    path = tmp_path / "x.parquet"
    for column, words in {
        "vector": ([[1.0]], "lacks the column embedding"),
        "embedding": ([[1.0, 2.0], [1.0]], "different lengths"),
    }.items():
        pq.write_table(pa.table({column: words[0]}), path)
        with pytest.raises(InputError, match=words[1]), Cells.open(path) as source:
            list(source.chunks())
    bad: list[list] = [[1.0], ["text"], [[1]], [[]], [[1.0], None], [[1.0, None]]]
    for values in bad:
        pq.write_table(pa.table({"embedding": values}), path)
        with pytest.raises(InputError, match=r"x\.parquet: "), Cells.open(path) as source:
            list(source.chunks())


def test_cell_names_of_an_h5ad(tmp_path: Path):
    x = clustered(TYPES * 10)
    for name, index in {"text": [f"ä {i}" for i in range(60)], "numbers": range(60)}.items():
        with pytest.warns(UserWarning, match="Transforming") if name == "numbers" else nullcontext():
            data = anndata.AnnData(obs=pd.DataFrame({"a": 1}, index=pd.Index(index)), obsm={"X_pca": x})
        data.write_h5ad(tmp_path / "x.H5AD")  # capitals are no other format
        with Cells.open(tmp_path / "x.H5AD", "X_pca") as source:
            ids = [name for columns, _ in source.chunks(7) for name in columns["cell_id"].to_pylist()]
            assert ids == [str(i) for i in index]


@pytest.mark.parametrize("ending", NOT_READ)
def test_formats_that_are_not_read_say_the_way(tmp_path: Path, ending: str):
    path = tmp_path / f"x{'.h5ad' if ending == '.gz' else ''}{ending}"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match=rf"{ending} is not read; .* Read are Parquet"), Cells.open(path):
        pass
    with pytest.raises(InputError, match=rf"{ending} is not read; .* Read are .h5ad and .zarr"), open_h5ad(path):
        pass


def test_an_embedding_in_x_and_expression(tmp_path: Path):
    x, path = clustered(TYPES * 10), tmp_path / "x.h5ad"
    anndata.AnnData(x).write_h5ad(path)
    with Cells.open(path, "X") as source:
        assert np.array_equal(read(source, 7), x)
    with pytest.raises(InputError, match="X is 16 numbers per cell: .* say --use-rep X"), Cells.open(path, "X_pca"):
        pass
    sparse = pytest.importorskip("scipy.sparse")
    for expression in (sparse.csr_matrix(x), np.zeros((6, 9), np.int64), np.zeros((6, 5_000), np.float32)):
        anndata.AnnData(expression).write_h5ad(path)
        for key in ("X", "X_pca"):
            with pytest.raises(InputError, match="one vector per cell: make one first"), Cells.open(path, key):
                pass


def test_a_plugin_that_is_not_there(tmp_path: Path):
    x, path = clustered(TYPES), write_h5ad(tmp_path / "x.h5ad", clustered(TYPES))
    with h5py.File(path, "r+") as file:
        del file["obsm"]["X_pca"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk(x.shape)
        settings.set_filter(32_099, h5py.h5z.FLAG_OPTIONAL)  # of no plugin that exists
        array = h5py.h5d.create(
            file["obsm"].id, b"X_pca", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple(x.shape), settings
        )
        array.write_direct_chunk((0, 0), x.tobytes(), 0)
    with (
        pytest.raises(InputError, match=r"x\.h5ad: compressed with an HDF5 plugin that is not installed here"),
        Cells.open(path, "X_pca") as source,
    ):
        list(source.chunks())


def test_damaged_compressed_data_needs_no_plugin(tmp_path: Path):
    x, path = clustered(TYPES), write_h5ad(tmp_path / "x.h5ad", clustered(TYPES))
    with h5py.File(path, "r+") as file:
        del file["obsm"]["X_pca"]
        array = file["obsm"].create_dataset("X_pca", x.shape, np.float32, chunks=x.shape, compression="gzip")
        array.id.write_direct_chunk((0, 0), b"no deflated block at all", 0)
    with pytest.raises(InputError, match=r"x\.h5ad: .*damaged"), Cells.open(path, "X_pca") as source:
        list(source.chunks())


def test_a_file_that_another_program_writes(tmp_path: Path):
    path = write_h5ad(tmp_path / "x.h5ad", clustered(TYPES))
    script = f"import h5py; file = h5py.File({str(path)!r}, 'r+'); print('open', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(InputError, match=r"x\.h5ad: locked, another program has it open"), open_h5ad(path):
            pass
        other.communicate(b"\n")


def test_a_npy_that_was_cut_short_is_refused_wherever_it_lies(tmp_path: Path):
    """Its header says how many rows there should be."""
    np.save(tmp_path / "x.npy", clustered(TYPES * 10))
    cut = (tmp_path / "x.npy").read_bytes()[:-40]
    (tmp_path / "x.npy").write_bytes(cut)
    with fsspec.open("memory://bucket/x.npy", "wb") as file:
        file.write(cut)
    for path, words in (tmp_path / "x.npy", "not a .npy file"), ("memory://bucket/x.npy", "cut short, 3,928 bytes of"):
        with pytest.raises(InputError, match=rf"x\.npy: {words}"), Cells.open(path):
            pass


@pytest.mark.parametrize("kind", ["h5ad", "parquet", "npy"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_file_of_a_store_that_was_cut_short_is_refused(tmp_path: Path, kind: str, share: float):
    path, x = tmp_path / f"x.{kind}", clustered(TYPES * 100)
    if kind == "npy":
        np.save(path, x)
    elif kind == "h5ad":
        write_h5ad(path, x)
    else:
        pq.write_table(pa.table({"embedding": list(x)}), path)
    data = path.read_bytes()
    with fsspec.open(f"memory://bucket/{path.name}", "wb") as file:
        file.write(data[: int(share * len(data))])
    with (
        pytest.raises(InputError, match=f"{path.name}: "),
        Cells.open(f"memory://bucket/{path.name}", "X_pca") as cells,
    ):
        for _ in cells.chunks(50):
            pass


MIXED = {
    "mixed": np.array(["a", 1, 2.5, True, None, np.nan], object),
    "categories": pd.Categorical(["x", 1, "x", None, 1, "y"]),
    "text": ["a", "b", "a", "b", "a", None],
    "gaps": pd.array([1, None, 3, 1, None, 3], dtype="Int64"),
    "flags": pd.array([True, None, False, True, None, False], dtype="boolean"),
    "half": np.array([0.1, 0.5, np.nan, 0.1, 0.5, 1], np.float32),
    "when": pd.to_datetime(["2020-01-01", None] * 3),
}
NAMES = {
    "mixed": ["1", "2.5", "True", "a"], "categories": ["1", "x", "y"], "text": ["a", "b"], "gaps": ["1", "3"],
    "flags": ["False", "True"], "half": ["0.1", "0.5", "1.0"], "when": ["2020-01-01 00:00:00"],
}  # fmt: skip


def test_columns_of_any_type_have_one_meaning(tmp_path: Path):
    """In memory, and as text where they mix types; what is missing stays missing."""
    frame = pd.DataFrame(MIXED, index=[f"c{i}" for i in range(6)])
    adata = anndata.AnnData(obs=frame, obsm={"X_pca": clustered(TYPES)})
    with Cells.open(adata, "X_pca") as cells:
        assert cells.names is not None
        assert cells.names.tolist() == list(frame.index)
        assert cells.column_names == tuple(MIXED)
        assert cells.table().num_rows == 6
        for name, expected in NAMES.items():
            codes, names = cells.codes(name)
            assert names == expected
            assert (codes < 0).tolist() == pd.isna(frame[name]).tolist()
        assert cells.column("mixed").to_pylist() == ["a", "1", "2.5", "True", None, None]
        with pytest.raises(InputError, match="adata: obs has no column 'donor'; it has mixed, categories"):
            cells.column("donor")


def test_memory_and_file_give_the_same_columns(tmp_path: Path):
    frame = pd.DataFrame({n: MIXED[n] for n in ("text", "gaps", "flags", "half")}, index=[f"c{i}" for i in range(6)])
    adata = anndata.AnnData(obs=frame, obsm={"X_pca": clustered(TYPES)}, uns={"fractal": {"recipe": "fractal"}})
    adata.write_h5ad(tmp_path / "x.h5ad")
    for source in (adata, tmp_path / "x.h5ad"):
        with Cells.open(source, "X_pca") as cells:
            assert cells.facts() == {"recipe": "fractal"}
            assert {name: cells.codes(name)[1] for name in frame} == {name: NAMES[name] for name in frame}
            table = pa.concat_tables(columns for columns, _ in cells.chunks(4, obs=True))
            assert table.column_names == ["cell_id", *frame]
            assert table["gaps"].to_pylist() == [1, None, 3, 1, None, 3]


@pytest.mark.parametrize("same", [True, False])
def test_a_column_that_is_called_as_the_names_are(tmp_path: Path, same: bool):
    names = [f"c{i}" for i in range(6)]
    values = names if same else [f"barcode {i}" for i in range(6)]
    adata = anndata.AnnData(
        obs=pd.DataFrame({"cell_id": values, "id": 1}, index=names), obsm={"X_pca": clustered(TYPES)}
    )
    adata.write_h5ad(tmp_path / "x.h5ad")
    for source in (adata, tmp_path / "x.h5ad"):
        with Cells.open(source, "X_pca") as cells:
            assert cells.column("cell_id").to_pylist() == values
            table = pa.concat_tables(columns for columns, _ in cells.chunks(4, obs=True))
            assert table.column_names == (["cell_id", "id"] if same else ["cell_id", "id", "obs_cell_id"])
            assert table["cell_id"].to_pylist() == names
            assert same or table["obs_cell_id"].to_pylist() == values
    adata.obs = adata.obs[["cell_id"]]  # alone
    with Cells.open(adata, "X_pca") as cells:
        columns, _ = next(cells.chunks(obs=True))
        assert columns.column_names == (["cell_id"] if same else ["cell_id", "obs_cell_id"])


def test_a_column_of_anndata_0_7_is_read_by_annotate_too(tmp_path: Path):
    """--truth and --over: names, not the codes "0", "1", and none for a cell without a label."""
    path = write_h5ad(tmp_path / "x.h5ad", clustered(TYPES[:3]), kind=pd.Categorical(["neuron", None, "B cell"]))
    as_anndata_0_7(path)
    with Cells.open(path, "X_pca") as cells:
        codes, names = cells.codes("kind")
        assert (codes.tolist(), names) == ([1, -1, 0], ["B cell", "neuron"])
        with pytest.raises(InputError, match="obs has no column '__categories'; it has kind$"):
            cells.codes("__categories")


def test_a_file_of_empty_vectors_says_so(tmp_path: Path):
    pq.write_table(pa.table({"embedding": pa.array([[], []], pa.list_(pa.float32()))}), tmp_path / "x.parquet")
    with (
        pytest.raises(InputError, match=r"x\.parquet: its first cell has an empty vector"),
        Cells.open(tmp_path / "x.parquet"),
    ):
        pass


def test_several_as_one(tmp_path: Path):
    """As the joined file: vectors, labels and studies, though a category has another code and another type in each."""
    whole = anndata.read_h5ad(write_h5ad(tmp_path / "x.h5ad", clustered(TYPES * 10), kind=TYPES * 10, batch=range(60)))
    whole.obs["donor"] = pd.Categorical(["b", "a", None] * 20, categories=["b", "a", "none has it"])
    parts = [whole[:25].copy(), whole[25:].copy()]
    parts[0].obs["batch"] = parts[0].obs["batch"].astype(str).astype("category")
    parts[1].obs["donor"] = parts[1].obs["donor"].astype(object)
    parts[1].write_h5ad(tmp_path / "b.h5ad")
    with Cells.open(parts[0], "X_pca") as a, Cells.open(tmp_path / "b.h5ad", "X_pca") as b:
        both = Cells.chain([a, b])
        assert Cells.chain([a]) is a
        assert (both.num_rows, both.dim, both.column_names) == (60, 16, ("kind", "batch", "donor"))
        assert np.array_equal(read(both, 7), whole.obsm["X_pca"])
        with Cells.open(whole, "X_pca") as joined:
            for name in both.column_names:
                (codes, names), (expected, expected_names) = both.codes(name), joined.codes(name)
                assert (codes.tolist(), names) == (expected.tolist(), expected_names)
            some, same = both.labels("kind", "donor"), joined.labels("kind", "donor")
        assert (some.names, some.studies, some.notes) == (same.names, same.studies, same.notes)
        assert some.study_codes is not None
        assert same.study_codes is not None
        assert np.array_equal(some.codes, same.codes)
        assert np.array_equal(some.study_codes, same.study_codes)
    del parts[0].obs["donor"]
    parts[0].write_h5ad(tmp_path / "a.h5ad")
    lacks = r"a\.h5ad: obs has no column 'donor'; it has kind, batch"
    with (
        Cells.open(tmp_path / "a.h5ad", "X_pca") as a,
        Cells.open(parts[1], "X_pca") as b,
        pytest.raises(InputError, match=lacks),
    ):
        Cells.chain([b, a]).labels("kind", "donor")
    np.save(tmp_path / "y.npy", clustered(TYPES, 5))
    narrow = r"y\.npy: its vectors have 5 numbers, those of adata 16"
    with (
        Cells.open(tmp_path / "y.npy") as y,
        Cells.open(parts[1], "X_pca") as b,
        pytest.raises(InputError, match=narrow),
    ):
        Cells.chain([b, y])
