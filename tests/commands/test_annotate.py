"""Annotation, its bundle and the export: against slow obvious versions, and as their users run them."""

import csv
import shutil
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata
import h5py
import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import eval as evaluate
import ingest
import train
from fractal.annotate.folder import VERSION
from fractal.base.errors import InputError
from fractal.commands import annotate, export
from fractal.commands import embed as embed_script
from fractal.commands.output import write_tsv
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.matching import match_names
from fractal.hierarchy.ontology import CL_SLIM, build_hierarchy, level_terms, load_graph
from fractal.model import embedding
from fractal.reference import read_reference
from tests.conftest import TYPES, clustered, write_h5ad


def test_ids_of_the_levels_are_ancestors_of_the_term():
    graph = load_graph(CL_SLIM)
    for row in build_hierarchy([*TYPES, "melanocyte", "pancreatic D cell", "native cell"], graph, "other"):
        ids = level_terms(row, graph)
        assert ids[3] == row.cl_id
        above = nx.descendants(graph, row.cl_id) | {row.cl_id} if row.cl_id in graph else {row.cl_id}
        assert set(ids) - {""} <= above
        if row.levels[0] == "Other":
            assert ids[0] == ""
        elif row.type != row.subtype:
            assert ids[2] == match_names([row.type], graph)[row.type][0]


def annotated(reference: Path, source: Path, out: Path, *more: str) -> list[dict[str, str]]:
    annotate.main(["--reference", str(reference / "ref"), "--input", str(source), "--output", str(out),
                   "--device", "cpu", *more])  # fmt: skip
    with open(out, encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_new_cells_get_their_labels_and_strange_ones_are_flagged(reference: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("fractal.data.vectors.CHUNK", 50)
    labels = TYPES * 30
    x = clustered(TYPES * 150)[-180:]  # other cells of the same types
    x[3], x[4, 2], x[5, 0] = 0, np.nan, np.inf
    x[60:110] = np.nan  # a whole chunk and more
    x[120:] = np.random.default_rng(9).normal(size=(60, 16)) * 3
    np.save(tmp_path / "x.npy", x)
    rows = annotated(reference, tmp_path / "x.npy", tmp_path / "out.tsv")
    assert len(rows) == 180
    invalid = [i for i, row in enumerate(rows) if row["status"] == "invalid"]
    assert invalid == [3, 4, 5, *range(60, 110)]
    assert all(rows[i]["level"] == "none" and rows[i]["label"] == rows[i]["subtype"] == "" for i in invalid)
    known = [i for i in range(120) if i not in invalid]
    assert np.mean([rows[i]["subtype"] == labels[i] for i in known]) > 0.9
    assert np.mean([rows[i]["status"] != "novel" for i in known]) > 0.9
    assert np.mean([row["status"] == "novel" for row in rows[120:]]) > 0.9

    hierarchy = {tuple(r[level] for level in LEVELS): r for r in hierarchy_rows(reference)}
    for i, row in enumerate(rows):
        if i in invalid:
            continue
        own = hierarchy[tuple(row[level] for level in LEVELS)]  # one path
        assert all(row[f"{level}_cl_id"] == own[f"{level}_cl_id"] for level in LEVELS)
        depth = ["none", *LEVELS].index(row["level"])
        assert row["label"] == (row[LEVELS[depth - 1]] if depth else "")
        assert all(float(row[f"{level}_probability"]) >= 0.8 for level in LEVELS[:depth])


def test_embed_and_annotate_in_one_h5ad_at_once(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The one that began later waits: neither's additions are lost."""
    file = write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 10))
    flags = [
        "--use-rep",
        "X_pca",
        "--reference",
        str(reference / "ref"),
        "--device",
        "cpu",
        "--output",
        str(file),
        str(file),
    ]
    began, embed_matrix = threading.Event(), embedding.embed_matrix

    def slow(*args: Any) -> tuple[np.ndarray, np.ndarray]:
        began.set()
        time.sleep(1)
        return embed_matrix(*args)

    monkeypatch.setattr(embedding, "embed_matrix", slow)
    with ThreadPoolExecutor(1) as pool:
        embedded = pool.submit(embed_script.main, flags)
        assert began.wait(60)
        annotate.main(flags)
        embedded.result()
    data = anndata.read_h5ad(file)
    assert "X_fractal" in data.obsm
    assert "fractal_label" in data.obs


def hierarchy_rows(reference: Path) -> list[dict[str, str]]:
    with open(reference / "ref" / "hierarchy.tsv", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_three_outputs_say_the_same(reference: Path, tmp_path: Path):
    x = clustered(TYPES * 3, seed=0)
    x[2] = np.nan
    source = write_h5ad(tmp_path / "x.h5ad", x, kind=TYPES * 3)
    rows = annotated(reference, source, tmp_path / "a.tsv", "--obsm", "X_pca")
    for name in ("b.parquet", "c.h5ad"):
        annotate.main(["--reference", str(reference / "ref"), "--input", str(source), "--output",
                       str(tmp_path / name), "--obsm", "X_pca", "--device", "cpu"])  # fmt: skip
    table = pq.read_table(tmp_path / "b.parquet")
    obs = anndata.read_h5ad(tmp_path / "c.h5ad").obs
    assert list(rows[0])[0] == table.column_names[0] == "cell_id"
    assert [row.pop("cell_id") for row in rows] == table["cell_id"].to_pylist() == obs.index.tolist()
    assert list(obs.columns) == ["kind", *(f"fractal_{name}" for name in rows[0])]
    about = anndata.read_h5ad(tmp_path / "c.h5ad").uns["fractal"]["annotation"]
    assert (about["reference"], about["confidence"], about["reference_format"]) == ("ref", 0.8, VERSION)
    for name in rows[0]:
        text = [row[name] for row in rows]
        for values in (table[name].to_pandas(), obs[f"fractal_{name}"]):
            is_number = values.dtype.kind == "f"
            shown = values.map("{:.6g}".format) if is_number else values.astype(object).fillna("")
            assert shown.tolist() == text


def test_a_tsv_of_cells_with_the_same_name_says_so(tmp_path: Path):
    """Joined by name, the rows of 200 barcodes would be mixed up."""
    tables = [pa.table({"cell_id": [f"cell {i}" for i in range(start, start + 400)]}) for start in (0, 200)]
    with pytest.warns(UserWarning, match=r"labels\.tsv: 200 rows repeat the cell_id of another: join it by the order"):
        write_tsv(tmp_path / "labels.tsv", tables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_tsv(tmp_path / "labels.tsv", tables[:1])


def test_only_and_exclude_take_descendants_along(reference: Path, tmp_path: Path, fails):
    np.save(tmp_path / "x.npy", clustered(TYPES * 5))
    rows = annotated(reference, tmp_path / "x.npy", tmp_path / "a.tsv", "--only", "CL:0000542")  # lymphocyte
    assert {row["subtype"] for row in rows} == {"B cell", "natural killer cell", "regulatory T cell", ""}
    assert all(row["status"] in ("excluded", "novel") for row in rows if not row["subtype"])
    more = ["--only", "CL:0000542", "--exclude", "CL:0000084"]  # T cell
    rows = annotated(reference, tmp_path / "x.npy", tmp_path / "a.tsv", *more)
    assert {row["subtype"] for row in rows} == {"B cell", "natural killer cell", ""}
    tree, graph = read_reference(reference / "ref").annotator.tree, load_graph(CL_SLIM)
    assert tree.choose(graph, [], []) is None
    base = ["--reference", reference / "ref", "--input", tmp_path / "x.npy", "--output", tmp_path / "b.tsv"]
    assert "nor a term of CL" in fails(annotate.main, *base, "--only", "tee cell")
    assert "leave no reference cell" in fails(annotate.main, *base, "--only", "CL:0000542", "--exclude", "CL:0000542")
    assert not (tmp_path / "b.tsv").exists()


def test_a_confidence_out_of_range(tmp_path: Path, fails):
    base = ["--reference", tmp_path, "--input", tmp_path / "x.npy"]
    assert "above 0" in fails(annotate.main, *base, "--output", tmp_path / "a.tsv", "--confidence", "1.5")
    assert "name a .tsv" in fails(annotate.main, *base, "--output", tmp_path / "a.txt")
    assert "only written for an .h5ad" in fails(annotate.main, *base, "--output", tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="not a reference"):
        read_reference(tmp_path)


def test_no_input_is_overwritten_and_no_embedding_embedded_again(reference: Path, tmp_path: Path, fails):
    cells, model = tmp_path / "cells.parquet", tmp_path / "adapter.pt"
    shutil.copyfile(reference / "cells.parquet", cells)
    shutil.copyfile(reference / "adapter.pt", model)
    x = tmp_path / "int8" / "full.npy"
    x.parent.mkdir()
    np.save(x, clustered(TYPES * 50))
    h5ad = tmp_path / "cells.h5ad"
    shutil.copyfile(reference / "cells.h5ad", h5ad)
    before = {path: path.read_bytes() for path in (cells, model, x, h5ad)}
    own = ["--model-path", model, "--output"]
    for main, *argv in (
        (annotate.main, "--reference", reference / "ref", "--input", cells, "--output", cells),
        (train.main, "--input", cells, "--output", cells),
        (ingest.main, "--h5ad", h5ad, "--obsm", "X_pca", "--label-key", "kind", "--output", h5ad),
        (evaluate.main, "--model-path", model, "--input", cells, "--json", cells),
        (evaluate.main, "--model-path", model, "--input", cells, "--cells-out", model),
        (export.main, *own, model),
        (export.main, *own, x, "--vectors", x, "--to", "parquet"),
    ):
        line = fails(main, *argv)
        assert "is the input" in line
        assert "name another output" in line
    # 4 x 4 numbers, as wide as the vectors that the adapter takes
    embed_script.main(["--model-path", str(model), "--input", str(cells), "--output", str(tmp_path / "made.parquet")])
    made = ["--input", tmp_path / "made.parquet", "--output", tmp_path / "out.tsv"]
    assert "come from embed.py" in fails(annotate.main, "--reference", reference / "ref", *made)
    assert "come from embed.py" in fails(
        export.main, *own, tmp_path / "a.parquet", "--vectors", tmp_path / "made.parquet", "--to", "parquet"
    )
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "a.parquet").exists()  # nothing is written before the vectors are looked at


def test_a_damaged_block_of_an_h5ad_is_not_a_full_disk(reference: Path, tmp_path: Path, fails):
    path = write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 50))
    with h5py.File(path, "a") as file:
        x = file["obsm/X_pca"][:]
        del file["obsm/X_pca"]
        array = file["obsm"].create_dataset("X_pca", data=x, chunks=(100, 16), compression="gzip")
        place = array.id.get_chunk_info(1)
    with open(path, "r+b") as raw:
        raw.seek(place.byte_offset)
        raw.write(bytes(place.size))
    argv = ["--reference", reference / "ref", "--input", path, "--obsm", "X_pca", "--output"]
    for name in ("out.tsv", "out.h5ad"):
        line = fails(annotate.main, *argv, tmp_path / name)
        assert str(path) in line
        assert "damaged" in line
        assert not (tmp_path / name).exists()


def test_an_obs_without_an_order_of_columns_is_refused_before_the_work(reference: Path, tmp_path: Path, fails):
    path = write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 5))
    with h5py.File(path, "a") as file:
        del file["obs"].attrs["column-order"]
    argv = ["--reference", reference / "ref", "--input", path, "--obsm", "X_pca", "--output", tmp_path / "out.h5ad"]
    assert f"{path}: not an .h5ad file" in fails(annotate.main, *argv)


def test_a_picture_of_the_confusions(reference: Path, tmp_path: Path, fails, capsys: pytest.CaptureFixture[str]):
    source = write_h5ad(tmp_path / "x.h5ad", clustered(TYPES * 3), kind=TYPES * 3)
    base = ["--reference", reference / "ref", "--input", source, "--obsm", "X_pca", "--device", "cpu", "--output"]
    assert "needs --truth" in fails(annotate.main, *base, tmp_path / "a.tsv", "--confusions", tmp_path / "a.png")
    truth = [tmp_path / "a.tsv", "--truth", "kind", "--confusions"]
    assert "name a .png, .svg or .pdf" in fails(annotate.main, *base, *truth, tmp_path / "a.tif")
    assert fails(annotate.main, *base, tmp_path / "a.h5ad", "--truth", "kind", "--confusions", source)
    assert not (tmp_path / "a.tsv").exists()
    annotate.main([str(a) for a in (*base, *truth, tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "cells whose kind the reference has" in capsys.readouterr().out
