"""Cell type names -> Cell Ontology (CL) ids -> a hierarchy of four levels.

Pure functions over one graph. The rules are the published ones of the fractal cell embeddings:
  1. name -> CL id     by name, by the name without ", human", by synonym, or by hand (`match_names`)
  2. level 1, system   the nearest primary anchor above the term; only if there is none, stem cell; else Other
  3. level 2, lineage  the nearest lineage anchor above the term; else the system
  4. level 3, type     the parent that the shortest path to the lineage anchor (else the system's) goes through
  5. level 4, subtype  the name itself
"Nearest" counts is_a steps from child to parent. A term may be its own anchor; on a tie the anchor that stands
first in the list wins.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np
import obonet

from fractal.cli import InputError, printable, reason

# What is shipped: beside this file in an installed package, in data/ of a checkout.
SHIPPED = next(
    folder for folder in (Path(__file__).parent / "data", Path(__file__).parent.parent / "data") if folder.is_dir()
)
CL_SLIM = SHIPPED / "cl-slim.obo"

SYSTEM_ANCHORS = {
    "CL:0000988": "Immune",
    "CL:0000066": "Epithelial",
    "CL:0002319": "Neural",
    "CL:0000115": "Endothelial",
    "CL:0002320": "Stromal",
    "CL:0000187": "Muscle",
}
# A second pass: many differentiated cells have a short path to "stem cell" and would be trapped there.
STEM_ANCHOR = {"CL:0000034": "Stem/Progenitor"}
LINEAGE_ANCHORS = {
    "CL:0000542": "Lymphoid",
    "CL:0000766": "Myeloid",
    "CL:0001065": "Innate Lymphoid",
    "CL:0000540": "Neuron",
    "CL:0000125": "Glial",
    "CL:0000057": "Fibroblast",
    "CL:0000499": "Stromal",
    "CL:0000136": "Adipocyte",
    "CL:0000192": "Smooth Muscle",
    "CL:0000746": "Cardiac Muscle",
    "CL:0000188": "Skeletal Muscle",
}
OTHER = "Other"
# Both are obsolete in today's CL, so the graph does not hold them.
MANUAL = {"native cell": "CL:0000003", "animal cell": "CL:0000548"}


@dataclass(frozen=True)
class CellType:
    """One row of the hierarchy. `subtype` is the name as the release spells it; `path` explains rule 4."""

    cl_id: str  # "" for a name that CL does not know
    matched: str  # "name" | "synonym" | "manual" | "unmapped"
    system: str
    lineage: str
    type: str
    subtype: str
    path: str  # the is_a chain from the term up to its anchor, CL names joined by " > "

    @property
    def levels(self) -> tuple[str, str, str, str]:
        return self.system, self.lineage, self.type, self.subtype


def load_graph(obo: str | Path) -> nx.DiGraph:
    """Read an OBO file (path, URL, or compressed) and keep CL terms and their is_a edges, child -> parent.

    Nodes carry `name` and `synonyms` (EXACT ones, and those without a scope); `graph["release"]` says which CL
    it is. Raises InputError for a file that is not an OBO file, lacks an anchor, or was not reasoned over
    (cl-base.obo: a tenth of its terms have no is_a edge, so their anchors are out of reach).
    """
    try:
        full = obonet.read_obo(obo)
    except Exception as error:  # obonet raises what its parser, urllib or the decompressor happen to raise
        raise InputError(f"{obo}: cannot be read as OBO ({reason(error)}); data/cl-slim.obo is a good one") from error
    # "cl/releases/2025-07-30", "releases/2025-07-30/cl.owl", ... by product and year
    version = printable(str(full.graph.get("data-version", "unknown")))
    release = version.rpartition("releases/")[2].partition("/")[0]
    graph = nx.DiGraph(release=release)
    for term, data in full.nodes(data=True):
        if term.startswith("CL:") and "name" in data:
            graph.add_node(term, name=data["name"], synonyms=_usable_synonyms(data.get("synonym", ())))
    graph.add_edges_from((c, p) for c, p, kind in full.edges(keys=True) if kind == "is_a" and {c, p} <= graph.nodes)

    missing = [f"{a} ({name})" for a, name in _all_anchors().items() if a not in graph]
    if missing:
        raise InputError(f"{obo}: not the Cell Ontology, or an old one: it lacks {', '.join(missing)}")
    roots = sum(degree == 0 for _, degree in graph.out_degree())
    if roots > 0.02 * len(graph) + 1:  # the reasoned CL has one root, "cell"
        raise InputError(
            f"{obo}: {roots} of {len(graph)} CL terms have no is_a parent, so their anchors are unreachable; "
            "use a reasoned product such as cl-basic.obo or cl.obo, not cl-base.obo"
        )
    return graph


def _all_anchors() -> dict[str, str]:
    return SYSTEM_ANCHORS | STEM_ANCHOR | LINEAGE_ANCHORS


def _usable_synonyms(clauses: Iterable[str]) -> list[str]:
    """The texts of OBO synonym clauses such as '"B-cell" EXACT []' whose scope is EXACT or not given."""
    found = []
    for clause in clauses:
        text, _, rest = clause[1:].rpartition('"')
        scope = rest.split()[0] if rest.split() else ""
        if scope not in ("BROAD", "NARROW", "RELATED"):
            found.append(text.replace('\\"', '"').replace("\\\\", "\\"))
    return found


def _key(name: str) -> str:
    return name.removesuffix(", human").casefold()


def match_names(names: Iterable[str], graph: nx.DiGraph) -> dict[str, tuple[str, str]]:
    """Rule 1: name -> (CL id, "name" | "synonym" | "manual" | "unmapped").

    A name, or a synonym, that stands for several terms is unmapped rather than guessed.
    """
    exact, by_name, by_synonym = defaultdict(set), defaultdict(set), defaultdict(set)
    for term, data in graph.nodes(data=True):
        exact[data["name"]].add(term)
        by_name[_key(data["name"])].add(term)
        for synonym in data["synonyms"]:
            by_synonym[_key(synonym)].add(term)

    def match(name: str) -> tuple[str, str]:
        if name in MANUAL:
            return MANUAL[name], "manual"
        for index, key, how in (
            (exact, name, "name"),
            (by_name, _key(name), "name"),
            (by_synonym, _key(name), "synonym"),
        ):
            if terms := index.get(key):
                return (next(iter(terms)), how) if len(terms) == 1 else ("", "unmapped")
        return "", "unmapped"

    return {name: match(name) for name in names}


def closest_names(names: Iterable[str], graph: nx.DiGraph, count: int = 3) -> dict[str, list[str]]:
    """Name -> the CL names that are spelled most like it or like one of whose synonyms it is, best first."""
    spelled = {data["name"].casefold(): data["name"] for _, data in graph.nodes(data=True)}
    for _, data in graph.nodes(data=True):
        for synonym in data["synonyms"]:
            spelled.setdefault(synonym.casefold(), data["name"])
    found = {name: difflib.get_close_matches(name.casefold(), spelled, 2 * count, 0.5) for name in names}
    return {name: list(dict.fromkeys(spelled[key] for key in keys))[:count] for name, keys in found.items()}


def nearest(distance: dict[str, int], anchors: Iterable[str]) -> str | None:
    """The anchor with the smallest distance, the earlier one on a tie; None if none is reachable."""
    return min((a for a in anchors if a in distance), key=distance.__getitem__, default=None)


def place(term: str, name: str, graph: nx.DiGraph, matched: str = "name") -> CellType:
    """Rules 2-5 for one term of `graph`; `name` is what the release calls it."""
    distance = nx.single_source_shortest_path_length(graph, term)
    system_anchor = nearest(distance, SYSTEM_ANCHORS) or nearest(distance, STEM_ANCHOR)
    lineage_anchor = nearest(distance, LINEAGE_ANCHORS)
    system = (SYSTEM_ANCHORS | STEM_ANCHOR).get(system_anchor or "", OTHER)
    lineage = LINEAGE_ANCHORS.get(lineage_anchor or "", system)

    anchor = lineage_anchor or system_anchor or term
    chains = ([graph.nodes[t]["name"] for t in path] for path in nx.all_shortest_paths(graph, term, anchor))
    chain = min(chains)  # all start at the term: so the first step decides, by its CL name
    parent = chain[1] if len(chain) > 1 else name
    return CellType(term, matched, system, lineage, parent, name, " > ".join(chain))


def level_terms(row: CellType, graph: nx.DiGraph) -> tuple[str, str, str, str]:
    """The CL ids of the four labels of a row, "" for what is no CL term (Other, and names that CL does not know)."""
    if row.cl_id not in graph:
        return "", "", row.cl_id, row.cl_id
    distance = nx.single_source_shortest_path_length(graph, row.cl_id)
    system = nearest(distance, SYSTEM_ANCHORS) or nearest(distance, STEM_ANCHOR) or ""
    parents = [term for term in graph.successors(row.cl_id) if graph.nodes[term]["name"] == row.type]
    return system, nearest(distance, LINEAGE_ANCHORS) or system, (parents or [row.cl_id])[0], row.cl_id


def build_hierarchy(names: Sequence[str], graph: nx.DiGraph, unmapped: str = "error") -> list[CellType]:
    """The hierarchy of all `names`, in their order.

    `unmapped`: "error" raises InputError with the list of names that CL does not know; "other" files them under
    Other, Other, own name, own name, which is also where the two manual ones stand.
    """
    matches = match_names(names, graph)
    unknown = [name for name, (_, how) in matches.items() if how == "unmapped"]
    if unknown and unmapped == "error":
        hints = closest_names(unknown[:50], graph)  # a tenth of a second each
        listed = [f"{name} ({' or '.join(hints[name])}?)" if hints.get(name) else name for name in unknown]
        raise InputError(
            f"{len(unknown)} type names are not in CL {graph.graph['release']}: {'; '.join(listed)}. "
            "Rename them (--label-map does it for an .h5ad), or file them under Other with --unmapped other"
        )
    rows = []
    for name in names:
        term, how = matches[name]
        if term in graph:
            rows.append(place(term, name, graph, how))
        else:
            rows.append(CellType(term, how, OTHER, OTHER, name, name, name))
    return rows


def term_distances(names: Sequence[str], graph: nx.DiGraph) -> np.ndarray:
    """(k, k) float64: steps along is_a edges, up or down, from the term of each name to that of each other.

    NaN where one of the two is not in the graph. 1 is a parent or child, 2 a sibling or a grandparent.
    """
    terms = [term for term, _ in match_names(names, graph).values()]
    both_ways = graph.to_undirected(as_view=True)
    found = np.full((len(terms), len(terms)), np.nan)
    for i, term in enumerate(terms):
        if term in graph:
            steps = nx.single_source_shortest_path_length(both_ways, term)
            found[i] = [steps.get(other, np.nan) for other in terms]
    return found
