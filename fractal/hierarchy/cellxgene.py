"""A second tree over the Cell Ontology, of the groups that CELLxGENE's menus show: system > subclass > type.

The system of a type is the published one (`fractal.hierarchy.ontology`). Its subclass is the nearest of a curated list
of 73 terms at or above it, by is_a steps; of several as near, the one that stands first. Most CL terms of a subclass
share a system; for a type of another system the subclass is a node of its own, "progenitor cell (Epithelial)", so that
every node has one parent. A type without a subclass stands under its system directly.

CELLxGENE has a list of 23 classes above the subclasses, too. It is not a level here: one class per subclass would put
monocytes under "precursor cell" and GABAergic neurons under "secretory cell"; the system does not.
"""

from collections import Counter, defaultdict
from dataclasses import replace

import networkx as nx

from fractal.hierarchy.ontology import SHIPPED, CellType, Hierarchy, level_terms, nearest, place

CELLXGENE_LEVELS = ("system", "subclass", "type")

# CL id and name a line, in the order of the source (data/README.md says which).
LIST = SHIPPED / "cellxgene-subclasses.tsv"
SUBCLASSES = [line.split("\t")[0] for line in LIST.read_text(encoding="utf-8").splitlines()]


def subclass_of(term: str, graph: nx.DiGraph) -> str:
    """The CL id of the subclass of a term of `graph`; "" for a term that has none."""
    return nearest(nx.single_source_shortest_path_length(graph, term), SUBCLASSES) or ""


def subclass_systems(graph: nx.DiGraph) -> dict[str, str]:
    """Subclass -> the system of most terms of `graph` whose subclass it is; on a tie the first by name."""
    systems: dict[str, Counter[str]] = defaultdict(Counter)
    for term in graph:
        if subclass := subclass_of(term, graph):
            systems[subclass][place(term, "", graph).system] += 1
    return {subclass: min(counts, key=lambda name: (-counts[name], name)) for subclass, counts in systems.items()}


def cellxgene_hierarchy(published: Hierarchy, graph: nx.DiGraph) -> Hierarchy:
    """The same types in the same order, in this tree."""
    usual, placed = subclass_systems(graph), []
    for row in published.rows:
        subclass = subclass_of(row.cl_id, graph) if row.cl_id in graph else ""
        name = graph.nodes[subclass]["name"] if subclass else row.system
        if subclass and usual[subclass] != row.system:
            name = f"{name} ({row.system})"
        placed.append(replace(row, levels=(row.system, name, row.subtype)))
    return Hierarchy(CELLXGENE_LEVELS, placed, published.notes)


def cellxgene_terms(row: CellType, graph: nx.DiGraph) -> tuple[str, str, str]:
    """The CL ids of the labels of a row, "" for what is no CL term."""
    return level_terms(row, graph)[0], subclass_of(row.cl_id, graph) if row.cl_id in graph else "", row.cl_id
