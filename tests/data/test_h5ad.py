"""ingest.py on an .h5ad, and what scanpy makes of embedded ones. How they are embedded: test_embed.py."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr

import ingest
from fractal.base.errors import InputError
from fractal.commands import embed
from fractal.commands.output import write_output
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.data.h5ad import open_h5ad
from fractal.model.adapter import FractalAdapter
from fractal.model.checkpoint import save
from tests.conftest import TYPES, clustered, write_h5ad

ROOT = Path(__file__).parents[2]


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
    assert np.array_equal(Atlas.open(out).read(np.arange(len(keep))).vectors, clustered(TYPES * 10)[keep])
    assert Atlas.open(out).schema.metadata[b"source"] == str(h5ad).encode()
    assert out.with_name("cells.hierarchy.tsv").is_file()


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
        (["--label-key", "cluster"], "obs has no column 'cluster'"),
        (["--study-key", "batch"], "obs has no column 'batch'"),
        (["--label-map", "missing.tsv"], "missing.tsv: No such file"),
    ],
)
def test_bad_keys(tmp_path: Path, h5ad: Path, fails, flags: list[str], words: str):
    base = ["--h5ad", h5ad, "--obsm", "X_pca", "--label-key", "kind", "--output", tmp_path / "out.parquet"]
    assert words in fails(ingest.main, *base, *flags)
    assert not (tmp_path / "out.parquet").exists()


def test_many_cells_in_a_row_without_a_label(tmp_path: Path, monkeypatch):
    """A chunk without any labelled cell, as in joined data sets of which one is labelled."""
    monkeypatch.setattr("fractal.data.ingestion.ROW_GROUP", 4)
    kinds = [None] * 9 + TYPES
    path = write_h5ad(tmp_path / "a.h5ad", clustered(["B cell"] * 9 + TYPES), kind=kinds)
    argv = ["--h5ad", str(path), "--obsm", "X_pca", "--label-key", "kind", "--output", str(tmp_path / "o.parquet")]
    ingest.main(argv)
    assert pq.read_table(tmp_path / "o.parquet")["level4_subtype"].to_pylist() == TYPES


def test_bad_maps_and_cells(tmp_path: Path, h5ad: Path, fails):
    (tmp_path / "map.tsv").write_text("B cell\n", encoding="utf-8")
    base = ["--h5ad", h5ad, "--obsm", "X_pca", "--label-key", "kind", "--output", tmp_path / "o"]
    assert "expected two columns" in fails(ingest.main, *base, "--label-map", tmp_path / "map.tsv")
    (tmp_path / "map.tsv").write_text("T cell\tB cell\n", encoding="utf-8")
    assert "obs 'kind': none of the label map's names is among the labels" in fails(
        ingest.main, *base, "--label-map", tmp_path / "map.tsv"
    )
    x = clustered(TYPES)
    x[2, 3] = np.nan
    bad = write_h5ad(tmp_path / "nan.h5ad", x, kind=TYPES)
    line = fails(ingest.main, "--h5ad", bad, "--obsm", "X_pca", "--label-key", "kind", "--output", tmp_path / "o")
    assert "vector of cell 2 is zero or not finite" in line


def test_scanpy_takes_the_vectors(tmp_path: Path, h5ad: Path):
    scanpy = pytest.importorskip("scanpy")
    paths = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]])
    config = {"recipe": "fractal", "dim": 16, "num_levels": 3, "scale_dim": 5, "paths": paths.tolist()}
    config |= {"levels": ["system", "lineage", "type"], "block_levels": [0, 1, 2]}
    facts: dict = {"split": {}, "training": {}, "validation": None, "versions": {}}
    model, out = str(tmp_path / "a.pt"), str(tmp_path / "out.h5ad")
    save(model, FractalAdapter(16, 3, 5, paths), config, [["a", "b"], ["a", "b", "c"], ["p", "q", "r", "s"]], **facts)
    embed.main([str(h5ad), "--reference", model, "--use-rep", "X_pca", "--output", out])
    data = scanpy.read_h5ad(tmp_path / "out.h5ad")
    scanpy.pp.neighbors(data, use_rep="X_fractal", n_neighbors=5)
    assert data.obsp["connectivities"].shape == (60, 60)
    assert data.obsp["connectivities"].nnz > 0


@pytest.mark.parametrize("kind", ["link", "external storage", "virtual"])
def test_numbers_of_other_files_are_refused(tmp_path: Path, kind: str, fails):
    x = clustered(TYPES * 10)
    path = write_h5ad(tmp_path / "cells.h5ad", x, kind=TYPES * 10)
    with h5py.File(tmp_path / "secret.h5", "w") as secret:
        secret["x"] = x
    x.tofile(tmp_path / "secret.bin")
    with h5py.File(path, "r+") as file:
        del file["obsm/X_pca"]
        if kind == "link":
            file["obsm/X_pca"] = h5py.ExternalLink("secret.h5", "/x")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(x.shape, x.dtype)
            layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "x", x.shape)
            file["obsm"].create_virtual_dataset("X_pca", layout)
        else:
            external = [(str(tmp_path / "secret.bin"), 0, x.nbytes)]
            file["obsm"].create_dataset("X_pca", x.shape, x.dtype, external=external)
    with (
        pytest.raises(InputError, match="cells.h5ad: its obsm/X_pca .*secret.* write it again as one file"),
        open_h5ad(path),
    ):
        pass
    line = fails(ingest.main, "--h5ad", path, "--obsm", "X_pca", "--label-key", "kind", "--output", tmp_path / "o")
    assert "secret" in line


def test_a_zarr_with_a_link_to_another_file_is_refused(tmp_path: Path):
    path = tmp_path / "cells.zarr"
    anndata.AnnData(np.zeros((60, 1), np.float32), obsm={"X_pca": clustered(TYPES * 10)}).write_zarr(path)
    chunk = next(file for file in (path / "obsm" / "X_pca").rglob("*0*") if file.is_file())
    (tmp_path / "secret").write_bytes(chunk.read_bytes())
    chunk.unlink()
    chunk.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=f"{chunk}: is a link that leaves its folder"), Cells.open(path, "X_pca"):
        pass


@pytest.mark.parametrize("several", [1, 20])
@pytest.mark.parametrize("link", [lambda group: group, lambda group: h5py.SoftLink(group.name)], ids=["hard", "soft"])
def test_links_that_lead_round_in_a_circle_are_refused(tmp_path: Path, link, several: int):
    path = write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 10))
    with h5py.File(path, "r+") as file:
        for number in range(several):
            file["obs"][f"loop {number}"] = link(file["obs"])
    with pytest.raises(InputError, match="cells.h5ad: damaged, obs/loop .* in a circle"), Cells.open(path, "X_pca"):
        pass


def test_groups_that_are_nested_too_deep_are_refused(tmp_path: Path):
    path = write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 10))
    with h5py.File(path, "r+") as file:
        group = file["uns"]
        for _ in range(5_000):
            group = group.create_group("a")
    with pytest.raises(InputError, match="uns/a/a.* lies in more than 100 groups"), Cells.open(path, "X_pca"):
        pass


def test_a_file_that_is_replaced_while_it_is_read_is_not_copied(tmp_path: Path):
    """Else the results of the old cells would stand beside the new ones."""
    path = write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 10))
    other = write_h5ad(tmp_path / "other.h5ad", clustered(TYPES * 10)[::-1])
    with Cells.open(path, "X_pca") as cells:
        chunks = [(pa.table({"cell_id": cells.names, "n": range(60)}), dict[str, np.ndarray]())]
        write_output(tmp_path / "out.h5ad", chunks, cells)
        other.replace(path)
        with pytest.raises(InputError, match=r"cells\.h5ad: has been replaced while it was read"):
            write_output(tmp_path / "out2.h5ad", chunks, cells)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cells.h5ad", "out.h5ad"]


def test_another_number_of_vectors_than_of_cells(tmp_path: Path):
    """h5py can write it; every command reads cells in this way."""
    path = write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 10))
    with h5py.File(path, "r+") as file:
        del file["obsm/X_pca"]
        file["obsm/X_pca"] = clustered(TYPES * 9)
    with pytest.raises(InputError, match="54 vectors, and obs has 60 cells"), Cells.open(path, "X_pca"):
        pass


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("obsm/X_pca", {"shape": (60, 16), "chunks": (60_000_000, 16)}, "lies in chunks of 3,840,000,000 bytes"),
        ("obs/number", {"shape": (10**9,), "chunks": (10**5,)}, "asks for 4,000,000,000 bytes and holds "),
        ("obsm/X_pca", {"shape": (10**9, 16), "chunks": (4_096, 16)}, "asks for 64,000,000,000 bytes and holds "),
        ("layers/counts", {"shape": (60, 10**8), "chunks": (1, 10**5)}, "asks for 24,000,000,000 bytes and holds "),
        ("varm/PCs", {"shape": (10**9, 16), "chunks": (4_096, 16)}, "varm/PCs asks for 64,000,000,000 bytes"),
        ("uns/fractal/x", {"shape": (10**9,), "chunks": (10**5,)}, "uns/fractal/x asks for 4,000,000,000 bytes"),
    ],
)
def test_a_small_file_that_asks_for_much_is_refused(
    tmp_path: Path, kind: str, name: str, options: dict[str, Any], says: str
):
    """Chunks that are read whole, and numbers that were never written; of some kB each."""
    cells = anndata.AnnData(np.zeros((60, 1), np.float32), obsm={"X_pca": clustered(TYPES * 10)})
    path = tmp_path / f"cells.{kind}"
    (cells.write_h5ad if kind == "h5ad" else cells.write_zarr)(path)
    with (
        h5py.File(path, "r+")
        if kind == "h5ad"
        else nullcontext(zarr.open_group(path, mode="r+", use_consolidated=False)) as file
    ):
        if name in file:
            del file[name]
        if kind == "h5ad":
            array = file.create_dataset(name, dtype="f4", maxshape=(None,) * len(options["shape"]), **options)
        else:
            array = file.create_array(name, dtype="f4", **options)
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        columns: Any = np.array(["number"], object) if kind == "h5ad" else ["number"]
        file["obs"].attrs["column-order"] = columns
    if kind == "zarr":
        zarr.consolidate_metadata(path)
    with pytest.raises(InputError, match=says), Cells.open(path, "X_pca"):
        pass


@pytest.mark.slow
def test_a_long_text_in_obs_is_refused_before_it_is_copied(tmp_path: Path):
    """In a process with 2 GB of addresses beyond what it has loaded: names as an array would take 60 x 4 x 20 MB."""
    path = write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 10), kind=TYPES * 10, note=["x"] * 60)
    code = """
import resource, sys
from fractal.base.errors import InputError
from fractal.data.cells import Cells
import anndata, pandas, pyarrow.compute
resource.setrlimit(resource.RLIMIT_AS, (int(open("/proc/self/statm").read().split()[0]) * 4096 + 2 * 10**9,) * 2)
with Cells.open(sys.argv[1], "X_pca") as cells:
    for read in (lambda: next(cells.chunks()), lambda: cells.labels("note")):
        try:
            read()
        except InputError as error:
            print(error)
"""
    with h5py.File(path, "r+") as file:
        for name in ("_index", "note"):
            del file["obs"][name]
            texts = np.array(["x"] * 59 + ["y" * 20_000_000], object)
            file["obs"].create_dataset(name, data=texts, dtype=h5py.string_dtype())
            file["obs"][name].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.splitlines() == [
        f"{path}: obs has a cell's name of 20,000,000 letters; give the cells shorter names",
        f"{path}: obs 'note' has a text of 20,000,000 bytes; cut it, or drop the column",
    ], done.stderr
