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
