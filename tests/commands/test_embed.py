"""embed.py: the vectors are the adapter's own, everything else is kept, and bad input leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import eval as evaluate
import train
from fractal.base.errors import InputError
from fractal.commands import embed
from fractal.data import vectors
from fractal.data.atlas import Atlas
from fractal.data.parquet import fingerprint
from fractal.data.writers import truncate
from fractal.model import adapter as adapters
from fractal.model import embedding
from fractal.model.adapter import truncate_blocks
from fractal.model.checkpoint import build_adapter, load, save
from tests.conftest import TYPES, clustered, write_h5ad
from tests.data.test_cells import write_tiledb
from tests.data.test_parquet import write


@pytest.fixture(params=["fractal", "published"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Of an adapter with random weights: what they are does not matter here."""
    config = {
        "recipe": request.param,
        "dim": 16,
        "num_levels": 4,
        "scale_dim": 4,
        "levels": ["system", "lineage", "type", "subtype"],
        "block_levels": [0, 1, 2, 3],
        "paths": [[0, 0, 0, 0], [0, 1, 1, 1]],
    }
    classes = [["a"], ["b", "c"], ["d", "e"], ["f", "g"]]
    path = tmp_path / f"{request.param}.pt"
    about: dict[str, Any] = {"split": {}, "training": {}, "versions": {}, "validation": None}
    save(path, build_adapter(config, classes), config, classes, **about)
    return path


def embedded(checkpoint: Path, source: Path, out: Path, *more: str) -> Path:
    argv = ["--model-path", str(checkpoint), "--input", str(source), "--output", str(out), "--device", "cpu"]
    embed.main([*argv, *more])
    return out


def vectors_of(path: Path) -> np.ndarray:
    return np.stack(pq.read_table(path)["embedding"].to_pylist())


@pytest.mark.parametrize("prefix", [None, 1, 3, 4])
def test_the_vectors_are_the_adapters(checkpoint: Path, stratified: Path, tmp_path: Path, prefix: int | None):
    out = embedded(checkpoint, stratified, tmp_path / "out.parquet", *(["--prefix", str(prefix)] if prefix else []))
    adapter, _ = load(checkpoint)
    x = torch.from_numpy(Atlas.open(stratified).read(np.arange(600)).vectors)
    expected = adapters.embed(adapter, x)[(prefix or 4) - 1]  # what eval.py scores; the last one is the full vector
    assert np.allclose(vectors_of(out), expected, atol=1e-6)


def test_all_else_is_kept(checkpoint: Path, stratified: Path, tmp_path: Path):
    out = embedded(checkpoint, stratified, tmp_path / "out.parquet", "--prefix", "2", "--dtype", "float16")
    before, after = pq.read_table(stratified), pq.read_table(out)
    assert after.drop_columns("embedding").equals(before.drop_columns("embedding"))
    assert after.column_names == before.column_names
    assert after.schema.field("embedding").type == pa.list_(pa.float16(), 8)
    kept = before.schema.metadata.keys() - {b"dim"}
    assert {key: after.schema.metadata[key] for key in kept} == {key: before.schema.metadata[key] for key in kept}
    told = {key.decode(): value.decode() for key, value in after.schema.metadata.items()}
    assert told["checkpoint_sha256"] == fingerprint(checkpoint)
    assert (told["recipe"], told["num_levels"], told["prefix"], told["dim"]) == (checkpoint.stem, "4", "2", "8")
    assert json.loads(told["block_widths"]) == [4, 4, 4, 4]
    whole = vectors_of(embedded(checkpoint, stratified, tmp_path / "whole.parquet", "--prefix", "2"))
    assert np.allclose(vectors_of(out), whole, atol=1e-3)


def test_row_groups_stay_as_they_are(tmp_path: Path, checkpoint: Path):
    write(tmp_path / "cells.parquet", [5, 3_000, 7], dim=16)
    out = embedded(checkpoint, tmp_path / "cells.parquet", tmp_path / "out.parquet")
    meta = pq.read_metadata(out)
    assert [meta.row_group(i).num_rows for i in range(3)] == [5, 3_000, 7]


def test_all_files_give_the_same_vectors(checkpoint: Path, stratified: Path, tmp_path: Path):
    x = Atlas.open(stratified).read(np.arange(600)).vectors
    np.save(tmp_path / "x.npy", x.astype(np.float64))
    write_h5ad(tmp_path / "x.h5ad", x)
    write_tiledb(tmp_path / "tiledb", x)
    expected = vectors_of(embedded(checkpoint, stratified, tmp_path / "a.parquet"))
    for name in ("x.npy", "x.h5ad", "tiledb"):
        more = ["--use-rep", "X_pca"] if name == "x.h5ad" else []
        found = np.load(embedded(checkpoint, tmp_path / name, tmp_path / "b.npy", *more))
        assert found.dtype == np.float32
        assert np.allclose(found, expected, atol=1e-6)
    out = embedded(checkpoint, tmp_path / "tiledb", tmp_path / "c.parquet")
    assert np.allclose(vectors_of(out), expected, atol=1e-6)
    assert pq.read_schema(out).names == ["embedding"]
    assert np.array_equal(np.load(embedded(checkpoint, stratified, tmp_path / "d.npy")), found)


def test_an_h5ad_gets_vectors_to_be_cut(checkpoint: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(vectors, "CHUNK", 13)  # several chunks, the last one short
    x = clustered(TYPES * 10)
    x[20], x[41, 2] = 0, np.nan
    source, out = write_h5ad(tmp_path / "cells.h5ad", x, kind=TYPES * 10), tmp_path / "cells_fractal.h5ad"
    base = ["--model-path", str(checkpoint), "--obsm", "X_pca", "--device", "cpu"]
    embed.main([*base, "--input", str(source)])
    first = anndata.read_h5ad(out)
    embed.main([*base, "--input", str(out), "--output", str(out)])  # in place
    assert capsys.readouterr().out.count("NaN for 2 cells") == 2

    data, (adapter, _) = anndata.read_h5ad(out), load(checkpoint)
    assert np.array_equal(data.obsm["X_fractal"], first.obsm["X_fractal"], equal_nan=True)
    assert list(data.obs["kind"]) == TYPES * 10
    facts = data.uns["fractal"]
    assert list(facts["levels"]) == ["system", "lineage", "type", "subtype"]
    assert (facts["recipe"], facts["block_width"], list(facts["prefix_ends"])) == (checkpoint.stem, 4, [4, 8, 12, 16])
    assert facts["adapter_sha256"] == fingerprint(checkpoint)
    good = ~np.isin(np.arange(60), [20, 41])
    assert np.isnan(data.obsm["X_fractal"][~good]).all()
    with torch.inference_mode():
        given = torch.from_numpy(x[good])
        assert np.allclose(data.obsm["X_fractal"][good], adapter.encode(given), atol=1e-6)
        for j in (1, 2, 3):
            assert np.allclose(
                truncate(data.obsm["X_fractal"], facts, j, data.obsm.get("X_fractal_blocks"))[good],
                truncate_blocks(adapter.blocks(given), j),
                atol=1e-6,
            )
    assert np.allclose(truncate(data.obsm["X_fractal"], facts, 4)[good], data.obsm["X_fractal"][good], atol=1e-6)
    for j in (0, 5):
        with pytest.raises(InputError, match="from 1 to 4"):
            truncate(data.obsm["X_fractal"], facts, j, data.obsm.get("X_fractal_blocks"))
    if checkpoint.stem == "published":  # what the helper is there for: a cut of the full vector is something else
        cut = torch.nn.functional.normalize(torch.from_numpy(data.obsm["X_fractal"][good, :4]), dim=1)
        assert not np.allclose(
            cut, truncate(data.obsm["X_fractal"], facts, 1, data.obsm["X_fractal_blocks"])[good], atol=1e-2
        )
        with pytest.raises(InputError, match="X_fractal_blocks"):
            truncate(data.obsm["X_fractal"], facts, 1)


def test_bad_input_leaves_nothing(fails, checkpoint: Path, stratified: Path, tmp_path: Path):
    out = tmp_path / "new" / "out.parquet"

    def message(source: Path, *more: object) -> str:
        text = fails(embed.main, "--model-path", checkpoint, "--input", source, "--output", out, *more)
        assert not out.parent.exists() or not list(out.parent.iterdir())
        return text

    assert "has 4 blocks, --prefix 5 asks for more" in message(stratified, "--prefix", 5)
    np.save(tmp_path / "narrow.npy", np.ones((3, 5)))
    assert "narrow.npy: its vectors have 5 numbers" in message(tmp_path / "narrow.npy")
    x = np.ones((70_000, 16), np.float32)
    x[69_999, 3] = np.nan
    np.save(tmp_path / "nan.npy", x)
    assert "nan.npy: the vector of cell 69999 is zero or not finite" in message(tmp_path / "nan.npy")
    again = embedded(checkpoint, stratified, tmp_path / "once.parquet")
    assert "its vectors come from embed.py" in message(again)
    assert "--use-rep X_pca: only an .h5ad" in message(stratified, "--use-rep", "X_pca")

    cells = write_h5ad(tmp_path / "cells.h5ad", x[-9:])
    assert "vector of cell 8 is zero or not finite" in message(cells, "--obsm", "X_pca")  # a file for other scripts
    out = out.with_suffix(".h5ad")
    assert "only written for an .h5ad" in message(tmp_path / "nan.npy")
    assert "has no obsm 'X_scimilarity'; it has X_pca" in message(cells)
    assert "has no obsm 'X_fractal'" in message(cells, "--obsm", "X_fractal")
    for more in (["--prefix", 2], ["--dtype", "float16"]):
        assert "full float32 vectors; cut them" in message(cells, "--obsm", "X_pca", *more)
    write_h5ad(tmp_path / "narrow.h5ad", x[:, :5])
    assert "its vectors have 5 numbers" in message(tmp_path / "narrow.h5ad", "--obsm", "X_pca")
    before = stratified.read_bytes()
    argv = ["--model-path", checkpoint, "--input", stratified, "--output", stratified]
    assert "is the input" in fails(embed.main, *argv)
    assert stratified.read_bytes() == before


def test_an_interrupted_run_leaves_the_old_file(checkpoint: Path, stratified: Path, tmp_path: Path, monkeypatch):
    out = embedded(checkpoint, stratified, tmp_path / "out.parquet")
    old = out.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding, "embed_matrix", stop)
    with pytest.raises(KeyboardInterrupt):
        embedded(checkpoint, stratified, out)
    assert out.read_bytes() == old
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_eval_takes_neighbours_from_all_but_the_test_cells(stratified: Path, tmp_path: Path, fails):
    """--bank all equals --bank train of a checkpoint whose training rows are all but the test rows."""
    argv = ["--input", str(stratified), "--epochs", "1", "--scale-dim", "4", "--val-ratio", "0", "--device", "cpu"]
    train.main([*argv, "--max-samples", "0", "--output", str(tmp_path / "all.pt")])
    train.main([*argv, "--max-samples", "100", "--output", str(tmp_path / "few.pt")])
    few = torch.load(tmp_path / "few.pt", weights_only=True)
    few["state"] = torch.load(tmp_path / "all.pt", weights_only=True)["state"]
    torch.save(few, tmp_path / "few.pt")
    results = {}
    for name, bank in (("all", "train"), ("few", "all"), ("few", "train")):
        out = tmp_path / "figures.json"
        common = ["--input", str(stratified), "--json", str(out), "--device", "cpu", "--bank", bank]
        evaluate.main(["--model-path", str(tmp_path / f"{name}.pt"), *common])
        results[name, bank] = json.loads(out.read_text())
    expected, found, sampled = results["all", "train"], results["few", "all"], results["few", "train"]
    assert found["num_bank"] == expected["num_bank"] > sampled["num_bank"] == 100
    for a, b in zip(found["rows"], expected["rows"], strict=True):
        assert a == b
    assert [row["bank"] for row in found["rows"]] != [row["bank"] for row in sampled["rows"]]
    evaluate.main(["--model-path", str(tmp_path / "few.pt"), "--input", str(stratified), "--bank", "all", "--controls"])
    message = fails(evaluate.main, "--model-path", tmp_path / "few.pt", "--input", tmp_path / "cells.parquet",
                    "--bank", "all", "--all-rows")  # fmt: skip
    assert "so none can be in the bank; drop one" in message
