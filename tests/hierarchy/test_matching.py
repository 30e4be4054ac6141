"""Names of types and terms, matched."""

import networkx as nx
import pytest

from fractal.hierarchy.matching import match_names, singular
from fractal.hierarchy.ontology import CL_SLIM, load_graph


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    return load_graph(CL_SLIM)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("cells", "cell"), ("progenies", "progeny"), ("microvillus", "microvillus"), ("basis", "basis"),
     ("abscess", "abscess"), ("T", "T"), ("as", "as"), ("ies", "ie")],
)  # fmt: skip
def test_singular_by_hand(word: str, expected: str):
    assert singular(word) == expected


def test_the_two_terms_that_are_matched_by_hand_are_known_by_their_ids(graph: nx.DiGraph):
    found = match_names(["native cell", "CL:0000003", "CL:0000548"], graph)
    assert set(found.values()) == {("CL:0000003", "manual"), ("CL:0000548", "manual")}
