"""fractal index and fractal search, from files to hits."""

import datetime as dt
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train
from fractal.commands import embed
from fractal.commands import index as index_command
from fractal.commands import search as search_command
from fractal.search import open_index
from fractal.search.index import hit_name
from tests.conftest import write_h5ad
from tests.search.conftest import vectors_of


@pytest.fixture
def checkpoint(stratified: Path, tmp_path: Path) -> Path:
    out = tmp_path / "a.pt"
    flags = ["--epochs", "1", "--scale-dim", "4", "--device", "cpu"]
    train.main(["--input", str(stratified), "--output", str(out), *flags])
    return out


def run_index(*argv: object) -> None:
    index_command.main([str(a) for a in argv])


def run_search(*argv: object) -> None:
    search_command.main([str(a) for a in argv])


def test_from_files_to_hits(checkpoint: Path, stratified: Path, tmp_path: Path, fails, capsys):
    folder, other = tmp_path / "index", tmp_path / "from embedded"
    run_index(stratified, "--reference", checkpoint, "--output", folder)
    embed.main(["--input", str(stratified), "--model-path", str(checkpoint), "--output", str(tmp_path / "e.parquet")])
    run_index(tmp_path / "e.parquet", "--output", other)
    for name in ("vectors-0.bin", "columns-0.arrow", "centroids.npy"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    run_index(folder, "--check")
    assert "whole" in capsys.readouterr().out

    # its own cells find themselves first; the labels are those of the file
    run_search("--query", tmp_path / "e.parquet", "--index", folder, "--output", tmp_path / "h.parquet", "-k", 3)
    hits = pq.read_table(tmp_path / "h.parquet").to_pandas()
    assert len(hits) == 1_800
    first = hits[hits["rank"] == 1]
    assert (first.similarity > 0.999).all()
    labels = pq.read_table(stratified)["level4_subtype"].to_pylist()
    assert hits.level4_subtype.tolist() == [labels[row] for row in hits.row]
    printed = capsys.readouterr().out
    assert "1,800 hits among 600 cells" in printed

    vectors = np.stack(pq.read_table(stratified)["embedding"].to_pylist()).astype(np.float32)[:60]
    write_h5ad(tmp_path / "q.h5ad", vectors, leiden=["x", "y", None] * 20)
    asked = ["--query", tmp_path / "q.h5ad", "--reference", checkpoint, "--use-rep", "X_pca", "--index", folder]
    run_search(*asked, "--output", tmp_path / "h.tsv", "--where", "study == 's1'", "--columns", "study", "-k", 2)
    frame = pd.read_csv(tmp_path / "h.tsv", sep="\t")
    assert set(frame.study) == {"s1"}
    assert list(frame) == ["query", "rank", "id", "row", "source", "similarity", "study"]
    assert frame["query"].tolist()[:3] == ["cell 0", "cell 0", "cell 1"]
    run_search(
        *asked, "--group-by", "leiden", "--output", tmp_path / "h.h5ad", "--summary", tmp_path / "s.tsv", "-k", 50
    )
    found = anndata.read_h5ad(tmp_path / "h.h5ad")
    assert set(found.obs["query"]) == {"x", "y"}
    assert found.obsm["X_fractal"].shape == (100, 16)
    assert {"group", "value", "fold", "q_value"} <= set(pd.read_csv(tmp_path / "s.tsv", sep="\t"))

    added = [folder, "--add", tmp_path / "q.h5ad", "--reference", checkpoint, "--use-rep", "X_pca"]
    assert "60 of 60 cells that were looked at are in" in fails(index_command.main, *added)
    run_index(*added, "--force")
    run_search(*asked, "--output", tmp_path / "h.parquet", "-k", 2)
    hits = pq.read_table(tmp_path / "h.parquet").to_pandas()
    assert set(hits[hits.source == "q.h5ad"].id) == {f"cell {i}" for i in range(60)}

    # the wrong adapter, none at all, the wrong width
    flags = ["--epochs", "1", "--scale-dim", "4", "--device", "cpu", "--seed", "3"]
    train.main(["--input", str(stratified), "--output", str(tmp_path / "b.pt"), *flags])
    capsys.readouterr()
    wrong = [tmp_path / "b.pt" if flag == checkpoint else flag for flag in asked]
    assert "not that of the index" in fails(search_command.main, *wrong)
    assert "--reference" in fails(search_command.main, "--query", stratified, "--index", folder)
    np.save(tmp_path / "q.npy", np.ones((3, 5), np.float32))
    message = fails(search_command.main, "--query", tmp_path / "q.npy", "--embedded", "--index", folder)
    assert "5 numbers" in message
    assert "no cell passes" in fails(search_command.main, *asked, "--where", "study == 'none'")
    assert "can't be compared" in fails(index_command.main, folder, "--add", stratified)
    assert "index.json" in fails(search_command.main, *asked[:-1], tmp_path)


def test_raw_vectors_and_numbers_without_columns(tmp_path: Path, fails):
    np.save(tmp_path / "x.npy", vectors_of(300))
    run_index(tmp_path / "x.npy", "--output", tmp_path / "index")
    run_search("--query", tmp_path / "x.npy", "--index", tmp_path / "index", "--output", tmp_path / "h.tsv")
    frame = pd.read_csv(tmp_path / "h.tsv", sep="\t")
    assert (frame[frame["rank"] == 1].row == frame[frame["rank"] == 1]["query"]).all()
    asked = ["--query", tmp_path / "x.npy", "--index", tmp_path / "index", "--prefix", 1]
    assert "as they came" in fails(search_command.main, *asked)
    bad = vectors_of(30)
    bad[7] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    message = fails(index_command.main, tmp_path / "bad.npy", "--output", tmp_path / "index")
    assert "cell 7" in message
    assert len(open_index(tmp_path / "index")) == 300


NAMES = ["cell_id", "id", "row", "source", "none", "query", "atlas_query", "rank", "similarity", "Query", "embedding"]


def test_columns_of_any_name_and_type_come_out_of_every_output(tmp_path: Path):
    """Names that the index or the hits use themselves; types that AnnData lacks come as text in .h5ad."""
    obs = pd.DataFrame({name: [f"{name} {i}" for i in range(40)] for name in NAMES}, index=[f"c{i}" for i in range(40)])
    cells = anndata.AnnData(obs=obs, obsm={"X_fractal": vectors_of(40)})
    cells.write_h5ad(tmp_path / "cells.h5ad")
    run_index(tmp_path / "cells.h5ad", "--output", tmp_path / "a")
    values = {
        "when": [dt.datetime(2020, 1, 2, i % 24) for i in range(40)],
        "day": [dt.date(2020, 1, 1 + i % 28) for i in range(40)],
        "long": [dt.timedelta(hours=i) for i in range(40)],
        "bytes": [b"\xff%d" % i for i in range(40)],
        "list": [[i, i] for i in range(40)],
        "nothing": pa.nulls(40),
    }
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_of(40).ravel()), vectors_of(40).shape[1])
    pq.write_table(pa.table({"embedding": embedding, **values}), tmp_path / "cells.parquet")
    run_index(tmp_path / "cells.parquet", "--output", tmp_path / "b")
    own = {"query", "rank", "id", "row", "source", "similarity"}
    for index, query, columns in (("a", "cells.h5ad", obs), ("b", "cells.parquet", pa.table(values).to_pandas())):
        for suffix in ("parquet", "tsv", "h5ad"):
            out = tmp_path / f"hits.{suffix}"
            run_search("--query", tmp_path / query, "--index", tmp_path / index, "--output", out, "-k", 1)
            read = {"parquet": pd.read_parquet, "tsv": lambda path: pd.read_csv(path, sep="\t")}
            frame = anndata.read_h5ad(out).obs if suffix == "h5ad" else read[suffix](out)
            assert frame["row"].astype(int).tolist() == list(range(40))
            assert len(set(frame.columns)) == len(own) + columns.shape[1]
            if index == "a":
                for name in NAMES:
                    found = "obs_cell_id" if name == "cell_id" else hit_name(name, NAMES)
                    assert frame[found].astype(str).tolist() == columns[name].tolist(), name
    frame = anndata.read_h5ad(tmp_path / "hits.h5ad").obs
    assert frame["when"].iloc[1] == "2020-01-02 01:00:00"
    assert frame["day"].iloc[1] == "2020-01-02"
    assert frame["long"].iloc[1] == "1:00:00"
    assert frame["bytes"].iloc[1] == "ff31"
