"""Names of types and terms, matched."""

import networkx as nx
import pytest

from fractal.hierarchy.matching import (
    ABBREVIATIONS,
    SEVERAL_MEANINGS,
    agree,
    closest_names,
    markers,
    match_names,
    singular,
)
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


def test_names_are_matched_by_name_then_synonym():
    g = nx.DiGraph(release="by hand")
    g.add_node("CL:1", name="T cell", synonyms=["T-lymphocyte", "shared"])
    g.add_node("CL:2", name="mast cell, human", synonyms=["Shared", "mastocyte, human"])
    g.add_node("CL:3", name="naive cell", synonyms=["T cell"])
    g.add_node("CL:4", name="twin", synonyms=[])
    g.add_node("CL:5", name="twin", synonyms=[])
    found = match_names(
        [
            "T cell",
            "T cell, human",
            "t CELL",
            "mast cell",
            "t-LYMPHOCYTE",
            "mastocyte",
            "shared",
            "native cell",
            "?",
            "twin",
        ],
        g,
    )
    assert found == {
        "T cell": ("CL:1", "name"),
        "T cell, human": ("CL:1", "name"),
        "t CELL": ("CL:1", "name"),
        "mast cell": ("CL:2", "name"),
        "t-LYMPHOCYTE": ("CL:1", "synonym"),
        "mastocyte": ("CL:2", "synonym"),
        "shared": ("", "unmapped"),  # stands for two terms
        "native cell": ("CL:0000003", "manual"),
        "?": ("", "unmapped"),
        "twin": ("", "unmapped"),
    }


def test_capitals_never_make_a_term_ambiguous(graph: nx.DiGraph):
    """ "Dendritic cell" was, with "dendritic cell, human"; and so were 17 more names."""
    names = {data["name"]: term for term, data in graph.nodes(data=True)}
    for spelled in (str.capitalize, str.upper, str.title):
        written = {name: spelled(name) for name in names}
        found = match_names(written.values(), graph)
        wrong = [name for name, other in written.items() if found[other][0] != names[name]]
        assert not wrong, wrong
    synonyms = match_names(["mature NKT cell", "ILC2", "ILC3, human"], graph)
    assert [graph.nodes[term]["name"] for term, _ in synonyms.values()] == [
        "mature NK T cell",
        "group 2 innate lymphoid cell",
        "group 3 innate lymphoid cell, human",
    ]


def test_the_tables_of_spellings_lead_to_names_of_cl(graph: nx.DiGraph):
    names = {data["name"] for _, data in graph.nodes(data=True)}
    assert set(ABBREVIATIONS.values()) <= names
    assert {name for several in SEVERAL_MEANINGS.values() for name in several} <= names
    for key in (*ABBREVIATIONS, *SEVERAL_MEANINGS):
        assert key == key.lower()


def test_spellings(graph: nx.DiGraph):
    for written, name in {
        "B cells": "B cell",
        "Monocytes": "monocyte",
        "NK": "natural killer cell",
        "NK cells": "natural killer cell",
        "pDC": "plasmacytoid dendritic cell",
        "Tregs": "regulatory T cell",
        "DC": "dendritic cell",
        "RBC": "erythrocyte",
        "Mast": "mast cell",
        "CD14+ Monocyte": "CD14-positive monocyte",
        "CD4+ T cells": "CD4-positive, alpha-beta T cell",
        "plasmacytoid DC": "plasmacytoid dendritic cell",
        "Endothelial": "endothelial cell",
        "smooth_muscle_cells": "smooth muscle cell",
    }.items():
        assert match_names([written], graph)[written][0] == match_names([name], graph)[name][0] != "", written
    # What may be several things is not decided: hepatic or hematopoietic, today's DC2 or CL's, pancreas or retina.
    for written in ("HSC", "HSCs", "DC2", "Alpha cells", "Beta cells", "T/B cells", "unknown"):
        assert match_names([written], graph)[written] == ("", "unmapped"), written


@pytest.mark.parametrize(
    ("name", "guesses"),
    [
        ("CD4+/CD25 T Reg", {"CD4-positive, CD25-positive, alpha-beta regulatory T cell"}),  # not CD8-positive
        ("CD34+", set()),  # a marker alone is no type: not the eosinophil progenitor
        ("T reg", {"regulatory T cell"}),
        ("CD56+ NK", set()),  # the CL names that say CD56-positive say CD161-positive as well
        ("CD8+ Cytotoxic T", {"CD8-positive, alpha-beta cytotoxic T cell"}),
    ],
)
def test_a_guess_has_the_marker_signs_of_the_name(name: str, guesses: set[str], graph: nx.DiGraph):
    found = closest_names([name], graph)[name]
    assert guesses <= set(found)
    assert guesses or not found
    assert not any("CD161" in guess or ("CD8" in guess) != ("CD8" in name) for guess in found)


def test_marker_signs():
    assert markers("CD4+/CD45RA+/CD25- CD3 T") == {"CD4": True, "CD45RA": True, "CD25": False, "CD3": None}
    assert markers("CD16-positive, CD56-dim natural killer cell") == {"CD16": True, "CD56": None}
    assert markers("CD4-negative, CD8-negative T cell") == {"CD4": False, "CD8": False}


def test_agreement_of_markers():
    assert agree("CD4+ CD25 T", "CD4-positive, CD25-positive T cell")
    assert agree("T", "T cell")
    assert not agree("CD4+ T", "T cell")
    assert not agree("CD4+ T", "CD4-negative T cell")
    assert not agree("CD4+ T", "CD4-positive, CD25-positive T cell")
