"""The figures of benchmarks/peers.py by hand, and that every peer answers separable cells rightly."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.peers import PEERS, figures, read, risk_coverage, spoil, strange
from fractal.hierarchy.tree import Tree

pytestmark = pytest.mark.slow

PATHS = [
    ("Immune", "Lymphoid", "T", "CD4"),
    ("Immune", "Lymphoid", "T", "CD8"),
    ("Stromal", "Stromal", "S", "Adventitial"),
]
TREE = Tree.of(PATHS)


def test_area_under_the_risk_coverage_curve_by_hand():
    """Surest first: right, wrong, right. Risks 0, 1/2, 1/3, joined by straight lines: (0 + 1/4 + 5/12) / 3."""
    assert risk_coverage(np.array([0.9, 0.8, 0.7]), np.array([False, True, False])) == pytest.approx(2 / 9)


def test_equally_sure_cells_have_no_order():
    sure, wrong = np.full(4, 0.5), np.array([True, False, False, False])
    assert risk_coverage(sure, wrong) == risk_coverage(sure, wrong[::-1]) == 0.25


def test_a_weight_is_a_number_of_cells():
    sure, wrong = np.array([0.9, 0.5]), np.array([False, True])
    assert risk_coverage(sure, wrong, np.array([2, 1])) == pytest.approx(
        risk_coverage(np.array([0.9, 0.9, 0.5]), np.array([False, False, True]))
    )


def test_spoilt_labels_are_others_and_a_larger_share_spoils_more():
    path = np.random.default_rng(0).integers(0, 5, 10_000)
    tenth, fifth = spoil(path, 0.1), spoil(path, 0.2)
    assert np.mean(tenth != path) == pytest.approx(0.1, abs=0.01)
    assert ((tenth == path) | (tenth == fifth)).all()
    assert set(fifth) == set(range(5))
    assert (spoil(path, 0.0) == path).all()


def test_labels_are_chosen_down_the_tree(tmp_path: Path):
    """CD4 and CD8 have .6 together, so the cell is immune, though adventitial cells are the likeliest."""
    np.savez(tmp_path / "said.npz", spread=[[0.25, 0.35, 0.4]], odd=[0.6], seconds=1.0)
    said = read(tmp_path / "said.npz", TREE)
    assert said["path"].tolist() == [1]
    assert said["probability"][0].tolist() == pytest.approx([0.6, 0.6, 0.6, 0.35])


def test_cells_that_this_tool_flags_come_last(tmp_path: Path):
    probability = np.tile([[0.9], [0.5]], 4)
    np.savez(tmp_path / "said.npz", path=[0, 1], probability=probability, odd=[0.99, 0.2], seconds=1.0)
    assert read(tmp_path / "said.npz", TREE)["sure"].argmax() == 1


def test_figures_and_strangers_by_hand():
    """A CD4 cell taken for CD8 is right down to the type; the stranger looks stranger than the known cells."""
    truth = np.array([0, 1, 2, 0, -1, -1, -1, -1, -1])
    path = np.array([0, 1, 2, 1, 2, 2, 2, 2, 2])
    sure = np.array([0.9, 0.9, 0.9, 0.6, 0.85, 0.5, 0.5, 0.5, 0.5])
    said = {"path": path, "probability": np.tile(sure[:, None], 4), "odd": (truth < 0) * 1.0, "sure": sure}
    ancestors = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0]], bool)
    found = figures(truth, said, TREE, ancestors)
    assert [found[level] for level in ("System", "Lineage", "Type", "Subtype")] == [1, 1, 1, 0.75]
    assert found["AURC"] == pytest.approx((3 * 0 + 1 / 8) / 4)
    assert found["Hierarchical F1"] == pytest.approx(6 / 7)
    assert found["Macro F1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["Novelty AUROC"] == 1
    # half strangers: one of the five is sure and wrong, and none of the known cells
    assert strange(truth, said, 0.5)[1] == pytest.approx(0.1)
    assert strange(truth, said, 0.0)[1] == 0


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_answers_separable_cells(name: str):
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(3, 16)).astype(np.float32) * 3
    path, truth = np.arange(150) % 3, np.arange(30) % 3
    x, new = (centre[rows] + rng.normal(size=(len(rows), 16)).astype(np.float32) * 0.3 for rows in (path, truth))
    spread, odd = PEERS[name](x, path, new, TREE)
    assert (spread.argmax(1) == truth).all()
    assert spread.sum(1) == pytest.approx(np.ones(30))
    assert odd.shape == (30,)


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = list[list[Path]]()

    def timed(python: str, code: str, files: list[Path]) -> tuple[float, float]:
        asked.append(files)
        return 1.0, 2.0

    monkeypatch.setattr(peers, "timed", timed)
    arrays = {"path": np.arange(3)}
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / "15-NN_0.npz", x=0)
    outputs = peers.make_answers("15-NN", [(tmp_path / name, arrays, 0.0) for name in "ab"], None)
    assert [file.parent.name for file in outputs] == ["a", "b"]
    assert asked == [[Path("15-NN"), tmp_path / "a" / "cells_0.npz", tmp_path / "a" / "15-NN_0.npz"]]
    assert (tmp_path / "15-NN.GB").read_text() == "2.0\n"
