"""Types chosen by names and terms, as people write them."""

import networkx as nx
import numpy as np
import pytest

from fractal.base.errors import InputError
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.hierarchy.tree import Tree, nodes_of, terms_of

PATHS = [
    ("Immune", "Lymphoid", "B cell"),
    ("Immune", "Lymphoid", "regulatory T cell"),
    ("Immune", "Myeloid", "classical monocyte"),
    ("Stromal", "Fibroblast", "fibroblast"),
]


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    return load_graph(CL_SLIM)


@pytest.fixture(scope="module")
def tree(graph: nx.DiGraph) -> Tree:
    return Tree.of(PATHS, ("system", "lineage", "type"), terms_of(PATHS, graph))


@pytest.mark.parametrize("term", ["T cell", "CL:0000084", "CL_0000084", "cl:0000084", "T-cell", " T cells "])
def test_a_term_may_be_spelled_in_many_ways(tree: Tree, graph: nx.DiGraph, term: str):
    for only, exclude, expected in (([term], [], [1]), ([], [term], [0, 2, 3])):
        mask = tree.choose(graph, only, exclude)
        assert mask is not None
        assert np.flatnonzero(mask).tolist() == expected


def test_labels_of_any_level_are_chosen_too(tree: Tree, graph: nx.DiGraph):
    for ontology in (graph, None):  # a tree in place of the ontology has only these
        mask = tree.choose(ontology, ["Myeloid", "fibroblast"], [])
        assert mask is not None
        assert np.flatnonzero(mask).tolist() == [2, 3]
    assert tree.choose(graph, [], []) is None
    with pytest.raises(InputError, match="'T cell': not a label of the reference; write"):
        tree.choose(None, ["T cell"], [])
    with pytest.raises(InputError, match=r"'tee cell': not a label of the reference nor a term of CL 20"):
        tree.choose(graph, [], ["tee cell"])


def test_nodes_come_before_what_is_below_them():
    assert nodes_of([("b", "y"), ("a", "x"), ("b", "z")]) == [("a",), ("a", "x"), ("b",), ("b", "y"), ("b", "z")]


def test_names_are_found_as_people_write_them(tree: Tree, graph: nx.DiGraph):
    """By label, synonym, plural or id; a label goes before a term; without an ontology only labels are known."""
    [first, *others] = [path for path, term in zip(tree.paths, tree.cl_ids[:, -1], strict=True) if term]
    term = tree.cl_ids[tree.paths.index(first), -1]
    names = [first[-1], f"{first[-1]}s", term, term.replace(":", "_"), "no cell", "", others[0][-1]]
    assert tree.find(names, graph) == [first, first, first, first, None, None, others[0]]
    assert tree.find(names, None) == [first, None, None, None, None, None, others[0]]
