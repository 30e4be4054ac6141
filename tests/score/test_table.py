"""Scoring: types that were held out, controls that can't be fitted, intervals, and what eval.py refuses or warns of."""

import networkx as nx
import numpy as np
import pytest
import torch

from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.ontology import CL_SLIM, load_graph, term_distances
from fractal.score.intervals import wilson_interval
from fractal.score.table import count_copies, ontology_ancestors, score, steer, truth_of

CLASSES = [["Immune"], ["Lymphoid", "Myeloid"], ["B", "T"], ["B cell", "T cell", "blob"]]


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    return load_graph(CL_SLIM)


def test_ontology_distances_by_hand(graph: nx.DiGraph):
    """is_a in CL: a memory B cell is a B cell by two steps or fewer, T cell and B cell meet at lymphocyte."""
    steps = term_distances(["B cell", "T cell", "lymphocyte of B lineage", "no such cell"], graph)
    assert steps[0, 0] == 0
    assert steps[0, 2] == 1
    assert steps[0, 1] > 1
    assert np.isnan(steps[3]).all()


def test_ancestors_are_the_term_and_all_above_but_the_root(graph: nx.DiGraph):
    above = ontology_ancestors(["B cell", "lymphocyte of B lineage", "no such cell"], graph)
    assert above[0].sum() == len(nx.descendants(graph, "CL:0000236"))  # itself, and all but "cell"
    assert (above[0] & above[1]).sum() == above[1].sum() == above[0].sum() - 1
    assert not above[2].any()


def example(graph: nx.DiGraph) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> vectors and labels of 6 B, 6 T and 6 unseen cells, and of neighbours: the unseen have T cells."""
    labels = torch.tensor([[0, 0, 0, 0]] * 6 + [[0, 0, 1, 1]] * 6 + [[0, 0, 1, 2]] * 6)
    labels[-1, 1] = 1
    x = torch.eye(3)[labels[:, 3]] + 0.01 * torch.randn(18, 3, generator=torch.Generator().manual_seed(0))
    guess = labels.clone()
    guess[12:] = torch.tensor([0, 0, 1, 1])
    return x, labels, guess[:, None].expand(-1, 5, -1)


def test_an_unseen_type_counts_in_bank_where_its_class_was_trained_on(graph: nx.DiGraph):
    x, labels, neighbours = example(graph)
    trained = [["Immune"], ["Lymphoid"], ["B", "T"], ["B cell", "T cell"]]
    truth = truth_of(LEVELS, labels, CLASSES, trained, ["blob"], None, graph)
    row = score(x, truth, neighbours)
    assert row["loo"] == dict.fromkeys(LEVELS, 1.0) | {"lineage": 17 / 18}
    assert row["unseen"]["loo"] == {"system": 1.0, "lineage": 5 / 6, "type": 1.0, "subtype": 1.0}
    # the one unseen cell of the lineage Myeloid does not count there: nothing Myeloid was trained on
    assert row["unseen"]["bank"] == {"system": 1.0, "lineage": 1.0, "type": 1.0, "subtype": None}
    assert row["seen"]["bank"] == dict.fromkeys(LEVELS, 1.0)
    assert row["bank"] == dict.fromkeys(LEVELS, 1.0)
    assert row["unseen_interval"]["loo"]["type"] is None  # one type says nothing of others
    assert row["seen_interval"]["loo"]["type"] == wilson_interval(12, 12)
    assert row["bank_distance_cells"] == 12  # blob is no term of the ontology
    assert row["bank_distance"] == 0
    assert row["loo_macro_f1"]["subtype"] == 1
    assert row["triplets"] == {"seen": None, "unseen": pytest.approx(row["triplets"]["unseen"])}


def test_a_predicted_sibling_is_some_steps_away(graph: nx.DiGraph):
    x, labels, neighbours = example(graph)
    swapped = neighbours.clone()
    swapped[:6] = labels[6]  # all B cells taken for T cells
    truth = truth_of(LEVELS, labels, CLASSES, CLASSES, [], None, graph)
    row = score(x, truth, swapped)
    steps = term_distances(["B cell", "T cell"], graph)[0, 1]
    assert row["bank_distance"] == pytest.approx(steps / 2)
    assert 0.3 < row["bank_hierarchical_f1"] < 1
    assert row["unseen"]["loo"] == dict.fromkeys(LEVELS)


def test_steerability_of_the_published_table():
    """Four levels x 32: system .941 at prefix 1, .943 at full; subtype .800 at full, .762 at prefix 1."""
    full, first = {"system": 0.943, "subtype": 0.800}, {"system": 0.941, "subtype": 0.762}
    s, text = steer([{"loo": full}, {"loo": first}], "system", "subtype")
    assert s == pytest.approx(0.036)
    assert text.endswith("= (0.941 - 0.943) + (0.800 - 0.762) = +0.036")


def test_exact_copies_are_counted():
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    neighbours = np.stack([x[[1, 2]], x[[1, 0]], x[[0, 1]] + 1e-6])
    assert count_copies(x[:3], neighbours) == 1


def test_without_a_bank_its_figures_are_there_and_empty(graph: nx.DiGraph):
    labels = torch.tensor([[0, 0]] * 4 + [[0, 1]] * 4)
    truth = truth_of(("k", "t"), labels, [["A"], ["x", "y"]], [["A"], ["x", "y"]], [], None, graph)
    row = score(torch.randn(8, 3), truth, None)
    for kind in ("seen", "unseen"):
        assert row[kind]["bank"] == row[f"{kind}_interval"]["bank"] == {"k": None, "t": None}
    assert row["unseen"]["loo"] == {"k": None, "t": None}
    assert row["bank"] == row["bank_interval"] == row["bank_macro_f1"] == {"k": None, "t": None}
