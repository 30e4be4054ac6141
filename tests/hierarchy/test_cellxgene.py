"""The tree of CELLxGENE's subclasses, held against a slow obvious version and against what biologists expect."""

from pathlib import Path

import networkx as nx
import pytest

import ingest
from fractal.data.atlas import Atlas
from fractal.hierarchy.cellxgene import CELLXGENE_LEVELS, SUBCLASSES, cellxgene_hierarchy, subclass_of
from fractal.hierarchy.ontology import ANCHORS_SHA256, CL_SLIM, SHIPPED, Hierarchy, hierarchy_of, load_graph
from fractal.hierarchy.tree import terms_of

TYPES = (SHIPPED / "scimilarity-types.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    return load_graph(CL_SLIM)


@pytest.fixture(scope="module")
def hierarchy(graph: nx.DiGraph) -> Hierarchy:
    return cellxgene_hierarchy(hierarchy_of([name for name in TYPES if name], graph, "other"), graph)


def test_the_list_is_of_this_ontology(graph: nx.DiGraph):
    lines = (SHIPPED / "cellxgene-subclasses.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(SUBCLASSES)) == 73
    assert all(graph.nodes[term]["name"] == name for term, name in (line.split("\t") for line in lines))


def test_the_subclass_is_the_nearest_of_the_list(graph: nx.DiGraph, hierarchy: Hierarchy):
    for row in hierarchy.classes:
        if row.cl_id in graph:
            above = nx.descendants(graph, row.cl_id) | {row.cl_id}
            steps = {term: len(nx.shortest_path(graph, row.cl_id, term)) for term in SUBCLASSES if term in above}
            nearest = [term for term, n in steps.items() if n == min(steps.values())]
            assert subclass_of(row.cl_id, graph) == (nearest[0] if nearest else "")


def test_every_node_has_one_parent_and_the_system_is_the_published_one(graph: nx.DiGraph, hierarchy: Hierarchy):
    published = hierarchy_of([name for name in TYPES if name], graph, "other")
    parents = {row.levels[1]: row.levels[0] for row in hierarchy.classes}
    assert all(parents[row.levels[1]] == row.levels[0] for row in hierarchy.classes)
    assert [row.system for row in hierarchy.rows] == [row.system for row in published.rows]
    assert [row.subtype for row in hierarchy.rows] == [row.subtype for row in published.rows]
    assert [len({row.levels[k] for row in hierarchy.classes}) for k in range(3)] == [8, 58, 203]


@pytest.mark.parametrize(
    ("name", "system", "subclass"),
    [
        ("natural killer cell", "Immune", "lymphocyte"),
        ("plasmacytoid dendritic cell", "Immune", "dendritic cell"),
        ("classical monocyte", "Immune", "monocyte"),
        ("pancreatic D cell", "Epithelial", "epithelial cell of pancreas"),
        ("naive regulatory T cell", "Immune", "CD4-positive, alpha-beta T cell"),
        ("lung endothelial cell", "Endothelial", "endothelial cell"),
        ("club cell", "Epithelial", "progenitor cell (Epithelial)"),  # most progenitor cells are Immune
        ("ciliated cell", "Other", "Other"),  # has none, so its system stands in
    ],
)
def test_places(graph: nx.DiGraph, name: str, system: str, subclass: str):
    hierarchy = cellxgene_hierarchy(hierarchy_of([name], graph), graph)
    assert hierarchy.rows[0].levels == (system, subclass, name)


def test_labels_carry_their_terms(graph: nx.DiGraph, hierarchy: Hierarchy):
    paths = [row.levels for row in hierarchy.classes]
    ids = terms_of(paths, graph, CELLXGENE_LEVELS)
    row = [path[-1] for path in paths].index("natural killer cell")
    assert ids[row].tolist() == ["CL:0000988", "CL:0000542", "CL:0000623"]
    own = terms_of([("Immune", "Lymphoid", "natural killer cell")], graph, CELLXGENE_LEVELS)  # a tree of the user's
    assert own.tolist() == [["", "", "CL:0000623"]]


def test_ingest_writes_it(release, tmp_path, fails):
    ingest.main(["--model-dir", str(release), "--tree", "cellxgene", "--output", str(tmp_path / "cells.parquet")])
    atlas = Atlas.open(tmp_path / "cells.parquet")
    assert atlas.levels == CELLXGENE_LEVELS
    assert atlas.metadata["anchors_sha256"] != ANCHORS_SHA256
    table = tmp_path / "cells.hierarchy.tsv"
    line = fails(ingest.main, "--model-dir", release, "--tree", "cellxgene", "--hierarchy", table)
    assert line.startswith("error: --tree: without effect beside --hierarchy")


def test_the_table_of_the_docs_holds(graph: nx.DiGraph):
    text = (Path(__file__).parents[2] / "docs" / "hierarchy.md").read_text(encoding="utf-8")
    section = text[text.index("## The groups of CELLxGENE") : text.index("CELLxGENE also lists")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    assert len(rows) > 20
    hierarchy = cellxgene_hierarchy(hierarchy_of([row[0] for row in rows[1:]], graph), graph)
    assert [[row.subtype, *row.levels[:2]] for row in hierarchy.rows] == rows[1:]
