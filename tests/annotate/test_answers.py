"""Answers by hand: groups of cells, cells that a restriction leaves out, columns, and the warning about one type."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fractal.annotate.answers import (
    CAUTION,
    NOVEL,
    Answer,
    annotation_columns,
    answer,
    answer_columns,
    as_obs,
    group_columns,
    one_type_warning,
    real_groups,
    unforced,
    vote,
)
from fractal.annotate.calibration import Calibration
from fractal.annotate.novelty import joined
from fractal.annotate.votes import Ballot, Raw, count
from fractal.hierarchy.tree import Tree

TREE = Tree.of([("I", "x"), ("I", "y"), ("S", "z")], ("k", "t"), counts=np.array([10, 10, 80]))
NAN = float("nan")


def answer_of(path: list[int], probability: list[list[float]], p_value: float = 0.5, depth: int = 2) -> Answer:
    """Cells with these paths and probabilities; those whose probability is NaN have no vector."""
    n, none = len(path), np.zeros(len(path), bool)
    depths, valid = np.full(n, depth), ~np.isnan(np.array(probability)[:, 0])
    numbers = np.full(n, p_value)
    depths[~valid] = 0
    of_cells = numbers, numbers, numbers, none, none, valid, np.full(n, -1), np.full(n, NAN)
    return Answer(np.array(path), np.array(probability), depths, depths, *of_cells)


def test_a_vote_by_hand():
    """I has 2.7 of 3.7; below it y has .8 and x .6; z is not below I. The last cell is in no group."""
    cells = answer_of([0, 0, 1, 2, 2], [[0.9, 0.3], [0.9, 0.3], [0.9, 0.8], [1.0, 1.0], [1.0, 1.0]])
    found = vote(cells, np.array([0, 0, 0, 0, -1]), TREE, 0.8, "on")
    assert found.path.tolist() == [1, 1, 1, 1, 2]
    assert found.probability[0] == pytest.approx([2.7 / 4, 0.8 / 4])
    assert found.probability[4].tolist() == [1.0, 1.0]
    assert found.depth.tolist() == [0, 0, 0, 0, 2]


def test_a_group_that_lies_in_two_chunks_gets_one_answer():
    """Group 0: a cell of I, x (.9, .8), one of S, z (.6, .5), and one without a vector; group 1: two of S, z."""
    first = answer_of([0, 0, 2], [[0.9, 0.8], [NAN, NAN], [0.9, 0.9]])
    second = answer_of([2, 2], [[0.6, 0.5], [0.7, 0.7]])
    found = vote(Answer.join([first, second]), np.array([0, 0, 1, 0, 1]), TREE, 0.8, "on")
    good = found.valid
    assert good.tolist() == [True, False, True, True, True]
    assert found.path[good].tolist() == [0, 2, 0, 2]
    assert np.allclose(found.probability[good], [[0.45, 0.4], [0.8, 0.8]] * 2)
    assert found.depth[good].tolist() == found.confident_depth[good].tolist() == [0, 2, 0, 2]


def test_a_group_has_one_label_though_a_few_of_its_cells_are_odd():
    """Alone the odd cell would lose its fine label, in a tree of three levels; so do all where most are odd."""
    tree = Tree.of([("I", "L", "x"), ("I", "L", "y")], ("k", "l", "t"))
    cells = answer_of([0] * 4, [[1.0, 1.0, 0.9]] * 4, depth=3)
    for odd, depth in ((1, 3), (3, 2)):
        p_value = np.where(np.arange(4) < odd, 0.001, 0.5)
        found = vote(replace(cells, p_value=p_value), np.zeros(4, int), tree, 0.8, "on")
        assert found.depth.tolist() == [depth] * 4
        assert found.p_value.tolist() == p_value.tolist()  # of each cell, as before


def test_what_is_said_of_a_group():
    """Group b: three cells of x, one of y, sure of I only; group a: one of z; -1 and a missing value are no group."""
    cells = answer_of([0, 0, 0, 1, 2, 2, 2], [[0.9, 0.5]] * 4 + [[0.9, 0.9]] * 3, depth=1)
    codes, names = real_groups(np.array([2, 2, 2, 2, 1, 0, -1]), ["-1", "a", "b"])
    assert codes.tolist() == [2, 2, 2, 2, 1, -1, -1]
    after = vote(cells, codes, TREE, 0.8, "on")
    table = group_columns(cells, after, codes, names, TREE).to_pydict()
    assert table["group"] == ["a", "b"]
    assert table["cells"] == [1, 4]
    assert table["label"] == ["z", "I"]
    assert table["level"] == ["t", "k"]
    assert table["confidence"] == pytest.approx([0.9, 0.9])
    assert table["agreement"] == [1.0, 1.0]  # all are of I
    assert table["withheld_by"] == [None, "confidence"]
    deeper = group_columns(cells, vote(cells, codes, TREE, 0.3, "on"), codes, names, TREE).to_pydict()
    assert deeper["label"] == ["z", "x"]
    assert deeper["agreement"] == [1.0, 0.75]


def test_an_excluded_cell_keeps_the_labels_that_are_not_forced_on_it():
    """Without the restriction it would be y: of I, as x is; the other one shares nothing with what is left."""
    cells = replace(answer_of([0, 0, 0], [[0.9, 0.9]] * 3), excluded=np.array([True, True, False]))
    found = unforced(cells, np.array([1, 0, 2]))
    columns = answer_columns(found, TREE).to_pydict()
    assert columns["status"] == ["excluded", "excluded", "ok"]
    assert columns["label"] == ["I", None, "x"]
    assert columns["level"] == ["k", "none", "t"]
    assert columns["t"] == [None, None, "x"]
    assert columns["k"] == ["I", None, "I"]
    assert np.isnan(columns["t_probability"][:2]).all()
    assert columns["withheld_by"] == [None, None, None]


def test_columns_are_categories_and_what_is_not_answered_is_missing():
    cells = answer_of([0, 2, 0], [[0.9, 0.4], [0.9, 0.9], [NAN, NAN]])
    cells = replace(cells, depth=np.array([1, 2, 0]), confident_depth=np.array([1, 2, 0]))
    obs = as_obs(answer_columns(cells, TREE))
    assert obs["level"].ordered
    assert obs["level"].categories.tolist() == ["none", "k", "t"]
    assert obs["level"].tolist() == ["k", "t", "none"]
    assert obs["label"].tolist()[:2] == ["I", "z"]
    assert obs["label"].isna().tolist() == [False, False, True]
    assert obs["label"].categories.tolist() == ["I", "z"]  # those that occur
    assert obs["cl_id"].isna().all()
    assert obs["t"].tolist()[:2] == ["x", "z"]  # also below the answer
    assert obs["t_probability"].dtype == np.float32


def test_a_query_of_nearly_one_type_gets_a_warning():
    """y is a tenth of the reference; z is most of it, and no surprise."""
    for path, label in (([1] * 95 + [0] * 5, "y"), ([0, 1] * 50, "I"), ([2] * 100, ""), ([0, 1, 2, 2] * 25, "")):
        cells = answer_of(path, [[0.9, 0.9]] * 100)
        line = one_type_warning(answer_columns(cells, TREE), TREE)
        assert f"look like '{label}'" in line if label else not line
    assert not one_type_warning(answer_columns(answer_of([1] * 49, [[0.9, 0.9]] * 49), TREE), TREE)


def test_columns_of_an_earlier_annotation_are_known_by_their_names():
    mine = ["donor", "fractal_umap_1", "other_label", "my_type", "fractal"]
    old = ["fractal_label", "fractal_status", "fractal_class", "fractal_class_cl_id", "fractal_class_probability"]
    assert annotation_columns([*mine, *old], "fractal") == set(old)


def test_the_runner_up_has_its_share_of_what_the_best_label_leaves():
    """Ten neighbours: six of x, three of y and one of z; and a cell all of whose neighbours are of z."""
    ballot = Ballot(np.array([[0] * 6 + [1] * 3 + [2], [2] * 10]), np.full((2, 10), 0.5), np.zeros((2, 3)))
    raw = count(ballot, TREE)
    assert raw.path.tolist() == [0, 2]
    assert raw.runner_up.tolist() == [1, -1]
    assert raw.runner_up_votes == pytest.approx([0.3, 0])
    rise, one = (np.array([0, 0.8, 1]), np.array([0.2, 1, 1])), (np.zeros(1), np.ones(1))
    calibration = SimpleNamespace(votes=[rise] * 2, signals=[one] * 3, ood_score=one)
    found = answer(raw, calibration)  # type: ignore[arg-type]
    assert found.runner_up_probability[0] == pytest.approx((1 - 0.8) * 0.3 / 0.4)
    columns = answer_columns(found, TREE).to_pydict()
    assert columns["runner_up"] == ["y", None]
    assert np.isnan(columns["runner_up_probability"][1])
    assert as_obs(answer_columns(found, TREE))["runner_up"].categories.tolist() == ["y"]


def test_the_runner_up_of_a_group():
    """Two cells of x that may be z, one of z that may be y: z is next, with (.2 + .2 + .7) of three cells."""
    cells = answer_of([0, 0, 2], [[0.9, 0.8], [0.9, 0.8], [0.9, 0.7]])
    second = {"runner_up": np.array([2, 2, 1]), "runner_up_probability": np.array([0.2, 0.2, 0.1])}
    voted = vote(replace(cells, **second), np.zeros(3, int), TREE, 0.5, "on")
    assert voted.path.tolist() == [0] * 3
    assert voted.runner_up.tolist() == [2] * 3
    assert voted.runner_up_probability == pytest.approx([1.1 / 3] * 3)
    table = group_columns(cells, voted, np.zeros(3, int), ["a"], TREE).to_pydict()
    assert table["runner_up"] == ["z"]


def test_an_odd_cell_loses_its_fine_labels_and_an_odder_one_is_flagged():
    """1,000 held-out cells of oddness 1 to 1,000: the p-value of a cell is the share that is as odd."""
    held_out, ones, nothing = np.arange(1.0, 1_001.0), np.ones(1_000), np.zeros(0)
    certain = (np.array([0.0, 1.0]), np.array([0.9, 0.9]))
    knots = (held_out, ones)
    sure = Calibration([certain] * 3, [knots] * 3, knots, nothing, nothing, nothing, nothing)
    sure = replace(sure, ood_score=(np.sort(joined(np.repeat(held_out[:, None], 3, 1), sure.signals)), ones))
    shares = np.array([0.5, (CAUTION + NOVEL) / 2, NOVEL / 2])
    odd = 1_001 - 1_000 * shares
    raw = Raw(
        np.zeros(3, np.int64), np.ones((3, 3)), np.repeat(odd[:, None], 3, 1), np.zeros(3), np.full(3, -1), np.zeros(3)
    )
    found = answer(raw, sure)
    assert np.allclose(found.p_value, shares, atol=0.002)
    assert found.depth.tolist() == [3, 2, 2]
    assert found.novel.tolist() == [False, False, True]
    assert answer(raw, sure, novelty="flag").depth.tolist() == [3, 3, 3]
