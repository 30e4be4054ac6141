"""What held-out cells teach: probabilities, thresholds for an error, and what is left of them for a few types."""

import numpy as np
import pytest

from fractal.annotate.answers import answer
from fractal.annotate.calibration import HeldOut, calibrate, monotone, study_weight
from fractal.annotate.novelty import CAUTION, NOVEL
from fractal.hierarchy.tree import Tree
from fractal.score.metrics import expected_calibration_error

TREE = Tree.of([("I", "a"), ("I", "b"), ("S", "c")])


def held_out_cells(n: int, studies: int, seed: int = 0, hard: np.ndarray | None = None, folds: int = 3) -> HeldOut:
    """Cells of three types, each with five neighbours; those of a hard study have more of another type."""
    rng = np.random.default_rng(seed)
    path, study = rng.integers(0, 3, n), rng.integers(0, max(studies, 1), n)
    share = rng.uniform(0, 0.45, n) + (0 if hard is None else hard[study])
    wrong = rng.random((n, 5)) < share[:, None]
    neighbours = np.where(wrong, rng.integers(0, 3, (n, 5)), path[:, None]).astype(np.int32)
    cosine = np.sort(rng.uniform(0.5, 1, (n, 5)))[:, ::-1].astype(np.float32)
    study = study if studies else np.full(n, -1)
    signals = rng.exponential(size=(n, 3)).astype(np.float32)
    vectors, weight = rng.normal(size=(n, 4)).astype(np.float32), study_weight(study).astype(np.float32)
    return HeldOut(vectors, path, study, np.arange(n) % folds, weight, neighbours, cosine, signals)


def wrong_share(cells: HeldOut, confidence: float, teach: HeldOut) -> np.ndarray:
    """(n,) whether the deepest label at this confidence is neither the cell's nor above it."""
    found = answer(cells.raw(TREE), calibrate(teach, TREE), confidence, "off")
    right = TREE.nodes[found.path] == TREE.nodes[cells.path]
    return (found.depth > 0) & ~right[np.arange(len(cells)), np.maximum(found.depth - 1, 0)]


def test_a_probability_says_no_more_than_its_cells_show():
    votes, weight = np.linspace(0.6, 1, 100), np.ones(100)
    x, p = monotone(votes, np.ones(100), weight)
    assert p.max() == pytest.approx(101 / 102)  # the rule of succession
    assert np.interp(0.4, x, p) < 0.6  # where no cell was seen, it falls to 0
    _, few = monotone(votes, np.ones(100), np.where(np.arange(100) == 0, 1e4, 1e-4))
    assert few.max() < 0.7  # one cell that outweighs all others shows no more than one cell


def test_probabilities_rise_with_the_votes_and_are_those_of_their_cells():
    rng = np.random.default_rng(0)
    votes = rng.random(20_000)
    x, p = monotone(votes, rng.random(20_000) < votes**2, np.ones(20_000))
    assert (np.diff(x) >= 0).all()
    assert (np.diff(p) >= 0).all()
    grid = np.linspace(0.1, 0.9, 9)
    assert np.abs(np.interp(grid, x, p) - grid**2).max() < 0.05


def test_answers_are_as_sure_and_as_odd_as_new_cells_of_the_kind():
    teach, new = held_out_cells(5_000, 0), held_out_cells(5_000, 0, seed=1)
    found = answer(new.raw(TREE), calibrate(teach, TREE), 0.8)
    right = TREE.nodes[found.path] == TREE.nodes[new.path]
    for k in range(2):
        assert expected_calibration_error(found.probability[:, k], right[:, k]) < 0.02
    assert (np.diff(found.probability, axis=1) <= 0).all()
    odd = found.p_value < CAUTION
    assert np.array_equal(found.depth[~odd], (found.probability[~odd] >= 0.8).sum(1))
    assert found.novel.mean() == pytest.approx(NOVEL, abs=0.01)
    assert odd.mean() == pytest.approx(CAUTION, abs=0.01)


def test_weights_count_as_cells():
    """Of 100 cells with the same votes half are right; those weigh three times as much."""
    hits = np.arange(100) % 2 == 0
    _, p = monotone(np.ones(100), hits, np.where(hits, 3.0, 1.0))
    assert p.max() == pytest.approx(0.75, abs=0.01)


def test_cells_with_the_same_votes_have_one_probability():
    """Also where the sums of their votes differ by rounding, as 1 and 1 - 1e-12 do."""
    votes = 1 - 1e-12 * np.arange(100)
    x, p = monotone(votes, np.arange(100) < 60, np.ones(100))
    assert len(x) == 2
    assert p[1] == pytest.approx(61 / 102)


def test_studies_weigh_the_same_unless_they_are_small():
    study = np.repeat([0, 1, 2], [400, 100, 10])
    weight = study_weight(study)
    sums = np.bincount(study, weight)
    assert sums[0] == pytest.approx(sums[1])
    assert sums[2] == pytest.approx(sums[0] / 5)  # of 50 cells that count in full it has 10
    assert weight.mean() == pytest.approx(1)
    assert (study_weight(np.full(5, -1)) == 1).all()


@pytest.mark.parametrize("error", [0.01, 0.05, 0.1, 0.2])
def test_the_error_is_kept_on_new_cells(error: float):
    """In the mean over draws of held-out cells, as conformal risk control promises, and not by answering nothing."""
    risks, answered = [], []
    new = held_out_cells(4_000, 0, seed=999)
    for seed in range(20):
        teach = held_out_cells(400, 0, seed=seed)
        control = calibrate(teach, TREE).control(error)
        assert control.unit == "cells"
        wrong = wrong_share(new, control.confidence, teach)
        risks.append(wrong.mean())
        answered.append((answer(new.raw(TREE), calibrate(teach, TREE), control.confidence, "off").depth > 0).mean())
    assert np.mean(risks) <= error + 2 * np.std(risks) / len(risks) ** 0.5
    assert np.mean(risks) > error / 3
    assert np.mean(answered) > 0.3


def test_the_error_over_studies_is_guaranteed_where_there_are_enough_of_them():
    hard = np.where(np.arange(30) % 3 == 0, 0.4, 0.0)
    many, few = held_out_cells(3_000, 30, hard=hard), held_out_cells(3_000, 5, hard=hard)
    assert calibrate(many, TREE).control(0.1).unit == "studies"  # 30 >= 1 / .1 - 1
    assert calibrate(many, TREE).control(0.01).unit == ""
    control = calibrate(few, TREE).control(0.1)
    assert control.unit == ""
    assert control.mean <= 0.1 < control.worst
    assert "a target for new studies" in str(control)
    wrong = wrong_share(few, control.confidence, few)
    of_studies = [wrong[few.study == study].mean() for study in range(5)]
    assert control.mean == pytest.approx(np.mean(of_studies), abs=0.02)


def test_what_can_t_be_promised_is_not_answered():
    control = calibrate(held_out_cells(20, 0), TREE).control(0.01)  # 1 / 21 > .01
    assert control.confidence > 1
    assert control.mean == 0


def test_a_lower_error_never_answers_more():
    calibration = calibrate(held_out_cells(1_000, 0), TREE)
    confidence = [calibration.control(error).confidence for error in (0.01, 0.03, 0.1, 0.3)]
    assert confidence == sorted(confidence, reverse=True)


def test_of_held_out_cells_only_those_with_a_neighbour_left_stay():
    cells = held_out_cells(500, 4)
    keep = np.array([True, False, True])
    part = cells.restricted(keep)
    left = keep[cells.path] & keep[cells.neighbour_path].any(1)
    assert len(part) == left.sum()
    assert np.array_equal(part.path, cells.path[left])
    finite = np.isfinite(part.cosine)
    assert keep[part.neighbour_path[finite]].all()
    assert finite[:, 0].all()
    assert np.array_equal(finite.sum(1), keep[cells.neighbour_path[left]].sum(1))
    assert set(part.raw(TREE).path) <= {0, 2}
