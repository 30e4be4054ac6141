"""Cell type names -> Cell Ontology (CL) ids -> a hierarchy of four levels, or of the user's own.

Pure functions over one graph. The rules are the published ones of the fractal cell embeddings:
  1. name -> CL id     by name, by the name without ", human", by synonym, by hand, or respelled (matching.py)
  2. level 1, system   the nearest primary anchor above the term; only if there is none, stem cell; else Other
  3. level 2, lineage  the nearest lineage anchor above the term; else the system
  4. level 3, type     the parent that the shortest path to the lineage anchor (else the system's) goes through
  5. level 4, subtype  the name itself
"Nearest" counts is_a steps from child to parent. A term may be its own anchor; on a tie the anchor that stands
first in the list wins.

What these rules do that one may not expect, and keep because they are the published ones: a basal cell is
Stem/Progenitor, a natural killer cell's lineage is Innate Lymphoid and not Lymphoid, a dendritic cell's is Immune;
melanocyte and ciliated cell are Other, a microglial cell is Neural; T cells lie in several types.

One CL term is one class at every level: a name that nobody else spells differently is kept as it is ("B cells"); of
several spellings of one term, CL's own name is taken for all. In place of the rules, `hierarchy_of` takes a tree of
the user's: columns of labels from coarse to fine (`tree_of_columns`) or an edited table (`read_hierarchy`).
"""

import csv
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import networkx as nx
import numpy as np
import obonet

from fractal.base.errors import InputError, printable, reason
from fractal.base.files import atomic_write
from fractal.base.storage import Location, fetch
from fractal.hierarchy.levels import LEVELS, MAX_LEVELS, MIN_LEVELS
from fractal.hierarchy.matching import MANUAL, Match, cl_id_of, closest_names, match_names
from fractal.hierarchy.names import clean, is_missing

# What is shipped: in fractal/shipped of an installed package, in data/ of a checkout.
SHIPPED = next(
    folder for folder in (Path(__file__).parents[1] / "shipped", Path(__file__).parents[2] / "data") if folder.is_dir()
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
ANCHORS_SHA256 = hashlib.sha256(repr((SYSTEM_ANCHORS, STEM_ANCHOR, LINEAGE_ANCHORS)).encode()).hexdigest()


@dataclass(frozen=True)
class CellType:
    """One row of the hierarchy: a class of the finest level."""

    cl_id: str  # "" for a name that CL does not know
    matched: str  # how rule 1 found the id, see `match_names`; "table" for a row of the user's own hierarchy
    levels: tuple[str, ...]  # coarse to fine; the last is the name of the class
    path: str  # explains rule 4: the is_a chain from the term up to its anchor, CL names joined by " > "

    @property
    def system(self) -> str:
        return self.levels[0]

    @property
    def type(self) -> str:
        return self.levels[-2]

    @property
    def subtype(self) -> str:
        return self.levels[-1]


@dataclass(frozen=True)
class Hierarchy:
    """The classes of some names: `rows[i]` is that of name i; several names may share one."""

    levels: tuple[str, ...]  # the names of the levels, coarse to fine
    rows: list[CellType]
    notes: list[str]  # one line each: which spellings were merged, which terms were replaced

    @property
    def classes(self) -> list[CellType]:
        """Every row once, in the order of the names."""
        return list(dict.fromkeys(self.rows))

    @property
    def rules_sha256(self) -> str:
        """Of what places a type, the metadata `anchors_sha256`: the anchors, or the rows of another tree."""
        if self.levels == LEVELS and self.rows[0].matched != "table":
            return ANCHORS_SHA256
        return hashlib.sha256(repr([row.levels for row in self.classes]).encode()).hexdigest()


def load_graph(obo: str | Path) -> nx.DiGraph:
    """Read an OBO file (path, URL, or compressed) and keep CL terms and their is_a edges, child -> parent.

    Nodes carry `name` and `synonyms` (EXACT ones, and those without a scope); `graph["release"]` says which CL
    it is; `graph["obsolete"]` keeps the obsolete terms apart: id -> (name, the ids that replaced it, the
    ids to consider in its place).
    Raises InputError for a file that is not an OBO file, lacks an anchor, or was not reasoned over (cl-base.obo: a
    tenth of its terms have no is_a edge, so their anchors are out of reach).
    """
    try:
        full = obonet.read_obo(obo, ignore_obsolete=False)
    except Exception as error:  # obonet raises what its parser, urllib or the decompressor happen to raise
        raise InputError(f"{obo}: cannot be read as OBO ({reason(error)}); data/cl-slim.obo is a good one") from error
    # "cl/releases/2025-07-30", "releases/2025-07-30/cl.owl", ... by product and year
    version = printable(str(full.graph.get("data-version", "unknown")))
    release = version.rpartition("releases/")[2].partition("/")[0]
    graph = nx.DiGraph(release=release, obsolete={})
    for term, data in full.nodes(data=True):
        if term.startswith("CL:") and data.get("is_obsolete") == "true":
            name = data.get("name", "").removeprefix("obsolete ")
            graph.graph["obsolete"][term] = (name, data.get("replaced_by", []), data.get("consider", []))
        elif term.startswith("CL:") and "name" in data:
            graph.add_node(term, name=data["name"], synonyms=_usable_synonyms(data.get("synonym", ())))
    graph.add_edges_from((c, p) for c, p, kind in full.edges(keys=True) if kind == "is_a" and {c, p} <= graph.nodes)

    anchors = SYSTEM_ANCHORS | STEM_ANCHOR | LINEAGE_ANCHORS
    missing = [f"{anchor} ({name})" for anchor, name in anchors.items() if anchor not in graph]
    if missing:
        raise InputError(f"{obo}: not the Cell Ontology, or an old one: it lacks {', '.join(missing)}")
    roots = sum(degree == 0 for _, degree in graph.out_degree())
    if roots > 0.02 * len(graph) + 1:  # the reasoned CL has one root, "cell"
        raise InputError(
            f"{obo}: {roots} of {len(graph)} CL terms have no is_a parent, so their anchors are unreachable; "
            "use a reasoned product such as cl-basic.obo or cl.obo, not cl-base.obo"
        )
    return graph


def _usable_synonyms(clauses: Iterable[str]) -> list[str]:
    """The texts of OBO synonym clauses such as '"B-cell" EXACT []' whose scope is EXACT or not given."""
    parts = [clause[1:].rpartition('"') for clause in clauses]
    texts = [text for text, _, scope in parts if not re.match(r"\s*(BROAD|NARROW|RELATED)\b", scope)]
    return [text.replace('\\"', '"').replace("\\\\", "\\") for text in texts]


def nearest(distance: dict[str, int], anchors: Iterable[str]) -> str | None:
    """The anchor with the smallest distance, the earlier one on a tie; None if none is reachable."""
    return min((a for a in anchors if a in distance), key=distance.__getitem__, default=None)


def anchors_of(term: str, graph: nx.DiGraph) -> tuple[str | None, str | None]:
    """Rules 2 and 3 -> the anchors of the system and of the lineage."""
    distance = nx.single_source_shortest_path_length(graph, term)
    system = nearest(distance, SYSTEM_ANCHORS) or nearest(distance, STEM_ANCHOR)
    return system, nearest(distance, LINEAGE_ANCHORS)


def place(term: str, name: str, graph: nx.DiGraph, matched: str = "name") -> CellType:
    """Rules 2-5 for one term of `graph`; `name` is what its class is called."""
    system_anchor, lineage_anchor = anchors_of(term, graph)
    system = (SYSTEM_ANCHORS | STEM_ANCHOR).get(system_anchor or "", OTHER)
    lineage = LINEAGE_ANCHORS.get(lineage_anchor or "", system)

    anchor = lineage_anchor or system_anchor or term
    chains = ([graph.nodes[t]["name"] for t in path] for path in nx.all_shortest_paths(graph, term, anchor))
    chain = min(chains)  # all start at the term: so the first step decides, by its CL name
    parent = chain[1] if len(chain) > 1 else name
    return CellType(term, matched, (system, lineage, parent, name), " > ".join(chain))


def level_terms(row: CellType, graph: nx.DiGraph) -> tuple[str, ...]:
    """The CL ids of the four labels of a row, "" for what is no CL term (Other, and names that CL does not know).

    In a hierarchy of the user's own, only the finest label has one.
    """
    if row.cl_id not in graph or row.matched == "table":
        own = 1 if row.matched == "table" else 2  # of an unmapped name, type and subtype are the name itself
        return (*[""] * (len(row.levels) - own), *[row.cl_id] * own)
    system, lineage = anchors_of(row.cl_id, graph)
    parents = [term for term in graph.successors(row.cl_id) if graph.nodes[term]["name"] == row.type]
    return system or "", lineage or system or "", (parents or [row.cl_id])[0], row.cl_id


def build_hierarchy(names: Sequence[str], graph: nx.DiGraph, unmapped: str = "error") -> list[CellType]:
    """The row of each of `names`, in their order, by the published rules; names of one CL term get the same row.

    `unmapped`: "error" raises InputError with the list of names that CL does not know; "other" files them under
    Other, Other, own name, own name, which is also where the two manual ones stand.
    """
    matches = match_names(names, graph)
    unknown = [name for name, (_, how) in matches.items() if how == "unmapped"]
    if unknown and (unmapped == "error" or any(is_missing(name) for name in unknown)):
        raise InputError(_unknown_names(unknown, graph))
    spelled = defaultdict(set)
    for name, (term, _) in matches.items():
        spelled[term].add(name)
    rows = []
    for name in names:
        term, how = matches[name]
        if term in graph:
            own = len(spelled[term]) == 1 and cl_id_of(name) is None and how != "replaced"
            rows.append(place(term, name if own else graph.nodes[term]["name"], graph, how))
        else:
            name = next((known for known, manual in MANUAL.items() if manual == term), name)
            rows.append(CellType(term, how, (OTHER, OTHER, name, name), name))
    # A term that is its own anchor is its own type. Where it is also another's parent, both say CL's name for it; but
    # the published tree keeps its synonym "fat cell" beside "adipocyte", and counts 120 types so.
    parents = {row.type for row in rows if row.type != row.subtype}
    rows = [
        replace(row, levels=(*row.levels[:2], row.path, row.subtype))
        if row.path in parents and row.matched != "synonym"
        else row
        for row in rows
    ]
    first: dict[str, CellType] = {}  # one row for one class, however each of its spellings was found
    return [first.setdefault(row.subtype, row) for row in rows]


def _unknown_names(unknown: list[str], graph: nx.DiGraph) -> str:
    """What to say of names that CL does not know, with what each may have meant."""
    hints = closest_names(unknown[:50], graph)  # 10 ms each
    obsolete = graph.graph.get("obsolete", {})
    listed = []
    for name in unknown:
        # Quoted where else nobody could see what is wrong with it.
        shown = f"'{name}'" if name != " ".join(name.split()) or not name.isprintable() or not name else name
        gone = "obsolete; " if cl_id_of(name) in obsolete else ""
        guess = f"{' or '.join(hints[name])}?" if hints.get(name) else "a term that CL has withdrawn" if gone else ""
        listed.append(f"{shown} ({gone}{guess})" if guess else shown)
    ways = "Rename them (--write-label-map writes a file to start from, --label-map reads it)"
    if not any(is_missing(name) for name in unknown):
        ways += ", or file them under Other with --unmapped other"
    return f"{len(unknown)} type names are not in CL {graph.graph['release']}: {'; '.join(listed)}. {ways}"


def hierarchy_of(
    names: Sequence[str],
    graph: nx.DiGraph,
    unmapped: str = "error",
    tree: Mapping[str, CellType] | None = None,
    levels: tuple[str, ...] = LEVELS,
) -> Hierarchy:
    """The hierarchy of all `names`; what ingest.py and the Python API call.

    By default the four published levels of CL. `tree`: the user's own in its place, name -> row, of `levels`, from
    `tree_of_columns` or `read_hierarchy`; a name that is not in it is looked up by its CL term. Raises InputError for
    names that have no place, see `build_hierarchy`.
    """
    if tree is None:
        rows = build_hierarchy(names, graph, unmapped)
        return Hierarchy(LEVELS, rows, _notes(names, graph))
    by_term = {row.cl_id: row for row in tree.values() if row.cl_id}
    matches = match_names([name for name in names if name not in tree], graph)
    found = [tree.get(name) or by_term.get(matches[name][0]) for name in names]
    if unknown := [name for name, row in zip(names, found, strict=True) if row is None]:
        raise InputError(f"the hierarchy has no row for these names: {'; '.join(unknown)}. Add them to the table")
    return Hierarchy(levels, [row for row in found if row], [])


def _notes(names: Sequence[str], graph: nx.DiGraph) -> list[str]:
    """One line each on what was not taken as it stood, so that it can be checked."""
    matches = match_names(names, graph)

    def led_to(how: str) -> str:
        return "; ".join(f"{name} -> {graph.nodes[term]['name']}" for name, (term, by) in matches.items() if by == how)

    notes = {
        "taken as another spelling": led_to("spelling"),
        "obsolete in CL, replaced as it says": led_to("replaced"),
        "names of one CL term made one type": merged_names(matches, graph),
    }
    return [f"{what}: {which}" for what, which in notes.items() if which]


def term_names(graph: nx.DiGraph) -> dict[str, str]:
    """CL id -> name."""
    return {term: data["name"] for term, data in graph.nodes(data=True)} | {term: name for name, term in MANUAL.items()}


def merged_names(matches: Mapping[str, Match], graph: nx.DiGraph) -> str:
    """Which names lead to one term: "B cell = B cells, B_cell; ..."."""
    spelled = defaultdict(list)
    for name, (term, _) in matches.items():
        spelled[term].append(name)
    names = term_names(graph)
    return "; ".join(f"{names[t]} = {', '.join(several)}" for t, several in spelled.items() if t and len(several) > 1)


def tree_of_columns(
    columns: Sequence[str], labels: Iterable[tuple[str, ...]], graph: nx.DiGraph | None = None
) -> tuple[tuple[str, ...], dict[tuple[str, ...], CellType], list[str]]:
    """Columns of labels from coarse to fine -> the levels' names, the row of each distinct tuple, notes.

    A label that stands under several parents becomes one class under each, called "child (parent)", so that every
    class has one parent. Where a finer label is missing, the one above it stands in, as in the Human Lung Cell Atlas.
    With `graph`, rows whose finest label CL knows carry its id. Raises InputError unless there are 2 to 6 columns.
    """
    if not MIN_LEVELS <= len(columns) <= MAX_LEVELS:
        way = "flat labels have no tree: add a coarser column (scanpy.tl.dendrogram shows what belongs together)"
        raise InputError(
            f"levels: takes {MIN_LEVELS} to {MAX_LEVELS} columns, from coarse to fine, not {len(columns)}"
            + (f"; {way}, or give names of the Cell Ontology as labels" if len(columns) == 1 else "")
        )
    levels = tuple(re.sub(r"\W+", "_", column).strip("_") for column in columns)
    if len(set(levels)) < len(levels) or "" in levels:
        raise InputError(f"levels: every level needs a name of its own, not {', '.join(columns)}")
    filled = {path: list(path) for path in labels}
    for full in filled.values():
        for k in range(1, len(full)):
            full[k] = full[k - 1] if is_missing(full[k]) else full[k]
    renamed = dict[str, None]()  # in their order
    for k in range(1, len(columns)):
        parents = defaultdict(set)
        for full in filled.values():
            parents[full[k]].add(full[k - 1])
        split = {name for name, several in parents.items() if len(several) > 1}
        for full in filled.values():
            if full[k] in split:
                full[k] = f"{full[k]} ({full[k - 1]})"
                renamed[full[k]] = None
    terms = match_names({path[-1] for path in filled}, graph) if graph is not None else {}
    rows = {
        path: CellType(terms.get(path[-1], ("", ""))[0], "table", tuple(full), " > ".join(reversed(full)))
        for path, full in filled.items()
    }
    notes = [f"labels with several parents made one type under each: {'; '.join(renamed)}"] if renamed else []
    return levels, rows, notes


def write_hierarchy(path: Location, levels: tuple[str, ...], rows: Iterable[CellType]) -> None:
    """A TSV with a header: cl_id, the levels from coarse to fine, path. It can be edited and read again."""
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["cl_id", *levels, "path"])
        writer.writerows([row.cl_id, *row.levels, row.path] for row in rows)


def read_hierarchy(path: Location) -> tuple[tuple[str, ...], dict[str, CellType]]:
    """A table of `write_hierarchy`, edited or not -> the levels' names, and its rows by the finest label.

    Raises InputError for another header, 1 or more than 6 levels, an empty label, and a finest label that occurs twice.
    """
    try:
        with open(fetch(path), newline="", encoding="utf-8-sig") as file:
            header, *lines = [[clean(cell) for cell in line] for line in csv.reader(file, delimiter="\t") if any(line)]
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a table of UTF-8 text, or empty ({reason(error)})") from error
    levels = tuple(header[1:-1])
    named = header[0] == "cl_id" and header[-1] == "path" and len(set(levels)) == len(levels)
    if not named or not MIN_LEVELS <= len(levels) <= MAX_LEVELS:
        raise InputError(f"{path}: its first line must be cl_id, the names of 2 to 6 levels, path, separated by tabs")
    rows: dict[str, CellType] = {}
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise InputError(f"{path}: row {number} has {len(line)} columns, its first line {len(header)}")
        names = tuple(line[1:-1])
        if any(is_missing(name) for name in names):
            raise InputError(f"{path}: row {number} has a level without a label")
        if names[-1] in rows:
            raise InputError(f"{path}: '{names[-1]}' stands in two rows; a type has one place")
        rows[names[-1]] = CellType(cl_id_of(line[0]) or "", "table", names, line[-1])
    if not rows:
        raise InputError(f"{path}: has no row")
    return levels, rows


def write_label_map(path: Location, names: Sequence[str], codes: np.ndarray, graph: nx.DiGraph) -> str:
    """Write a template for --label-map -> a message about it.

    A line each, the most frequent first: the user's name, CL name, CL id, how `match_names` found it, number of cells,
    guesses. Of a name that CL does not know, name and id are empty, which leaves its cells out, until a person has
    copied a guess there.

    Parameters
    ----------
    path : where to write, whole or not at all
    names : the names of the types; "" is left out
    codes : (n,) int, the name of each cell, -1 for none
    graph : of `load_graph`

    Raises
    ------
    InputError : for a file that is there, which a person may have edited for hours.
    """
    if path.exists():
        raise InputError(f"{path}: is there, perhaps edited by hand; name another file, or remove it")
    cells = Counter(dict(zip(names, np.bincount(codes[codes >= 0], minlength=len(names)).tolist(), strict=True)))
    matches = match_names(filter(None, cells), graph)
    guesses = closest_names([name for name, (_, how) in matches.items() if how == "unmapped"], graph)
    cl_name = term_names(graph)
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["# name", "CL name", "CL id", "how", "cells", "guesses: copy one to CL name"])
        for name in sorted(matches, key=lambda name: -cells[name]):
            term, how = matches[name]
            writer.writerow([name, cl_name.get(term, ""), term, how, cells[name], " or ".join(guesses.get(name, []))])
    guessed = sum(map(bool, guesses.values()))
    merged = merged_names(matches, graph)
    return (
        f"{len(matches)} type names written to {path}: {len(matches) - len(guesses)} are known, {guessed} have guesses,"
        f" {len(guesses) - guessed} have none; fill in their CL names, or their cells are left out. "
        + (f"One type is made of: {merged}. " if merged else "")
        + f"Then: --label-map {path}"
    )


def term_distances(names: Sequence[str], graph: nx.DiGraph) -> np.ndarray:
    """(k, k) float64: steps along is_a edges, up or down, from the term of each name to that of each other.

    NaN where one of the two is not in the graph. 1 is a parent or child, 2 a sibling or a grandparent.
    """
    terms = [term for term, _ in match_names(names, graph).values()]
    both_ways = graph.to_undirected(as_view=True)
    distances = np.full((len(terms), len(terms)), np.nan)
    for i, term in enumerate(terms):
        if term in graph:
            steps = nx.single_source_shortest_path_length(both_ways, term)
            distances[i] = [steps.get(other, np.nan) for other in terms]
    return distances
