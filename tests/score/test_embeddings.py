"""What is scored beside the adapters: controls, vectors of others; and names that differ."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn.functional import normalize

import eval as evaluate
from fractal.data.atlas import Atlas
from fractal.score.embeddings import Subset, distinct_names, fit_controls
from tests.conftest import TYPES, clustered


def test_controls_see_vectors_of_length_1():
    x = torch.from_numpy(clustered(TYPES * 20))
    types = np.unique(TYPES * 20, return_inverse=True)[1]
    long = x * torch.rand(120, 1, generator=torch.Generator().manual_seed(0)) * 1e18
    encode, failed = fit_controls(long, types, [4, 8])
    assert not failed
    unit = normalize(x.double(), dim=1).numpy()
    found = encode(Subset(long, np.arange(120)))
    assert list(found) == ["raw 4d", "raw 8d", "PCA 4d", "PCA", "LDA 4d", "LDA"]
    for name, fitted in ("PCA", PCA(8)), ("LDA", LinearDiscriminantAnalysis()):
        expected = fitted.fit(unit, types).transform(unit)[:, : found[name].shape[1]]
        assert np.allclose(np.abs(found[name].numpy()), np.abs(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("vectors", "names", "said"),
    [
        (np.ones((30, 16)), ["raw 4d"], "all training cells have the same vector"),
        (clustered(TYPES * 2), ["raw 4d", "PCA"], "LDA: needs more training cells than types"),
        (clustered(TYPES * 5) * 1e19, ["raw 4d", "PCA", "LDA"], None),
    ],
)
def test_controls_of_odd_cells(vectors: np.ndarray, names: list[str], said: str | None):
    types = np.arange(12) if len(vectors) == 12 else np.arange(30) % 6
    encode, failed = fit_controls(torch.from_numpy(np.float32(vectors)), types, [4])
    found = encode(Subset(torch.from_numpy(np.float32(vectors)), np.arange(len(vectors))))
    assert list(found) == names
    assert all(e.isfinite().all() for e in found.values())
    assert bool(failed) == bool(said)
    assert said is None or said in failed[0]


def test_names_of_checkpoints_are_distinct():
    paths = [Path("a/x/m.pt"), Path("b/x/m.pt"), Path("n.pt")]
    assert distinct_names(paths) == ["a/x/m", "b/x/m", "n"]
    assert len(set(distinct_names([Path("m.pt"), Path("m.pt")]))) == 2


@pytest.mark.slow
def test_vectors_of_others_are_rows_of_the_table(trained: Path, stratified: Path, tmp_path: Path, fails):
    """The file's vectors once more give the figures of raw, in both banks; others are refused."""
    mine, figures = tmp_path / "mine.npy", tmp_path / "a.json"
    argv = ["--input", str(stratified), "--device", "cpu", "--model-path", str(trained), "--vectors", str(mine)]
    cells = Atlas.open(stratified).read(np.arange(600))
    np.save(mine, cells.vectors)
    for bank in "train", "all":
        evaluate.main([*argv, "--bank", bank, "--json", str(figures)])
        rows = {row.pop("embedding"): row for row in json.loads(figures.read_text())["rows"]}
        assert list(rows)[-1] == "mine"
        assert rows["mine"] == rows["raw"]
        assert rows["mine"]["bank"]["system"] is not None
    blind = np.random.default_rng(0).normal(size=(600, 3))
    np.save(mine, blind)
    evaluate.main([*argv, "--json", str(figures)])
    row = json.loads(figures.read_text())["rows"][-1]
    assert row["dims"] == 3
    assert row["bank"]["subtype"] < 0.5
    for bad, message in (
        (blind[:-1], "has 599 rows, and --input 600"),
        (blind[:, 0], "not a matrix of floats"),
        (blind > 0, "not a matrix of floats"),
        (np.where(blind > 3, np.nan, np.nan), "not finite"),
    ):
        np.save(mine, bad)
        assert message in fails(evaluate.main, *argv)
    mine.write_bytes(mine.read_bytes()[:-100])
    assert "not a .npy matrix, or damaged" in fails(evaluate.main, *argv)


def test_controls_are_fitted_on_cells_that_lie_close_together():
    x = 1 + 0.01 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    encode, failed = fit_controls(x, np.arange(60) % 3, [2])
    assert not failed
    assert {"PCA", "LDA"} <= set(encode(Subset(x, np.arange(60))))
