"""The five hierarchy rules, on graphs small enough to check by eye and on the shipped Cell Ontology."""

from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.base.errors import InputError
from fractal.hierarchy.matching import match_names
from fractal.hierarchy.ontology import (
    CL_SLIM,
    LINEAGE_ANCHORS,
    STEM_ANCHOR,
    SYSTEM_ANCHORS,
    build_hierarchy,
    load_graph,
    place,
    read_hierarchy,
    term_distances,
    tree_of_columns,
)

DATA = Path(__file__).parents[2] / "data"
SCIMILARITY_TYPES = (DATA / "scimilarity-types.txt").read_text(encoding="utf-8").splitlines()
IMMUNE, EPITHELIAL, NEURAL, STEM = "CL:0000988", "CL:0000066", "CL:0002319", "CL:0000034"
LYMPHOID, NEURON = "CL:0000542", "CL:0000540"
STROMAL_SYSTEM, STROMAL_LINEAGE = "CL:0002320", "CL:0000499"


@pytest.fixture(scope="module")
def cl() -> nx.DiGraph:
    return load_graph(DATA / "cl-slim.obo")


def graph(*edges: tuple[str, str], names: dict[str, str] | None = None) -> nx.DiGraph:
    """A graph of is_a edges, child -> parent; a term without a name is called after its id."""
    made = nx.DiGraph(edges, release="by hand")
    for term in made:
        made.nodes[term].update(name=(names or {}).get(term, term), synonyms=[])
    return made


def test_nearest_system_wins():
    g = graph(("x", "a"), ("a", "b"), ("b", IMMUNE), ("a", EPITHELIAL))
    assert place("x", "x", g).levels[0] == "Epithelial"


def test_a_tie_goes_to_the_earlier_anchor():
    assert place("x", "x", graph(("x", NEURAL), ("x", EPITHELIAL), ("x", IMMUNE))).levels[0] == "Immune"
    assert place("x", "x", graph(("x", NEURAL), ("x", EPITHELIAL))).levels[0] == "Epithelial"
    # the same for lineages: Lymphoid stands before Neuron
    assert place("x", "x", graph(("x", NEURON), ("x", LYMPHOID))).levels[1] == "Lymphoid"


def test_the_stem_cell_trap():
    """A neuron two steps from neural cell stays Neural, though it is one step from stem cell."""
    g = graph(("x", STEM), ("x", "a"), ("a", NEURAL))
    assert place("x", "x", g).levels[0] == "Neural"
    assert place("y", "y", graph(("y", STEM))).levels[0] == "Stem/Progenitor"


def test_a_term_is_its_own_anchor():
    row = place(LYMPHOID, "lymphocyte", graph((LYMPHOID, "a"), ("a", IMMUNE)))
    assert (*row.levels[:2], row.type) == ("Immune", "Lymphoid", "lymphocyte")
    # distance 0 beats an earlier anchor at distance 1
    assert place(EPITHELIAL, "e", graph((EPITHELIAL, IMMUNE))).levels[0] == "Epithelial"


def test_without_an_anchor_everything_is_other():
    row = place("x", "my cell", graph(("x", "cell")))
    assert row.levels == ("Other", "Other", "my cell", "my cell")


def test_without_a_lineage_the_system_stands_in():
    row = place("x", "x", graph(("x", "p"), ("p", IMMUNE), names={"p": "the parent"}))
    assert row.levels == ("Immune", "Immune", "the parent", "x")


def test_the_type_is_the_parent_on_the_way_to_the_lineage_anchor():
    g = graph(("x", "p"), ("p", LYMPHOID), ("x", "q"), ("q", "r"), ("r", LYMPHOID), (LYMPHOID, IMMUNE), ("x", IMMUNE))
    row = place("x", "x", g)
    assert row.levels == ("Immune", "Lymphoid", "p", "x")
    assert row.path == f"x > p > {LYMPHOID}"


def test_of_several_shortest_paths_the_first_name_in_the_alphabet_counts():
    names = {"p": "zebra cell", "q": "alpha cell"}
    g = graph(("x", "p"), ("p", LYMPHOID), ("x", "q"), ("q", LYMPHOID), names=names)
    assert place("x", "x", g).type == "alpha cell"


def test_stromal_is_a_system_and_a_lineage_with_different_anchors():
    assert SYSTEM_ANCHORS[STROMAL_SYSTEM] == LINEAGE_ANCHORS[STROMAL_LINEAGE] == "Stromal"
    row = place("x", "x", graph(("x", STROMAL_LINEAGE)))
    assert row.levels[:2] == ("Other", "Stromal")


def test_the_203_scimilarity_types_on_the_shipped_release(cl: nx.DiGraph):
    rows = build_hierarchy(SCIMILARITY_TYPES, cl)
    assert cl.graph["release"] == "2025-07-30"
    assert Counter(row.matched for row in rows) == {"name": 194, "synonym": 7, "manual": 2}
    assert [len({row.levels[k] for row in rows}) for k in range(4)] == [8, 17, 120, 203]
    assert len({row.levels[:2] for row in rows}) == 18  # Neuron occurs under Neural and under Epithelial
    by_name = {row.subtype: row for row in rows}
    assert by_name["regulatory T cell"].levels == ("Immune", "Lymphoid", "mature T cell", "regulatory T cell")
    assert by_name["pancreatic D cell"].levels[:2] == ("Epithelial", "Neuron")
    assert by_name["microglial cell"].levels[:2] == ("Neural", "Glial")
    assert by_name["hematopoietic stem cell"].levels[0] == "Immune"
    assert by_name["native cell"].levels == ("Other", "Other", "native cell", "native cell")
    assert place("CL:0000646", "basal cell", cl).levels[0] == "Stem/Progenitor"
    assert by_name["natural killer cell"].levels[1] == "Innate Lymphoid"
    assert place("CL:0000451", "dendritic cell", cl).levels[1] == "Immune"
    assert len({row.type for row in rows if "T cell" in row.subtype}) >= 5
    for oddity in ("melanocyte", "ciliated cell", "progenitor cell", "mesenchymal cell"):
        assert by_name[oddity].levels[0] == "Other"


def test_systems_agree_with_networkx_on_every_term(cl: nx.DiGraph):
    """The two-pass rule spelt out with nx.shortest_path_length, over all of CL."""
    for term in cl:
        steps = {
            anchor: nx.shortest_path_length(cl, term, anchor)
            for anchor in (*SYSTEM_ANCHORS, *STEM_ANCHOR)
            if nx.has_path(cl, term, anchor)
        }
        stem = "Stem/Progenitor" if steps.pop(STEM, None) is not None else "Other"
        low = min(steps.values(), default=None)
        expected = next((SYSTEM_ANCHORS[a] for a in SYSTEM_ANCHORS if steps.get(a, -1) == low), stem)
        assert place(term, "any", cl).levels[0] == expected


def test_unmapped_names_stop_or_go_to_other(cl: nx.DiGraph):
    with pytest.raises(InputError, match="2 type names are not in CL 2025-07-30: blob; glob"):
        build_hierarchy(["blob", "B cell", "glob"], cl)
    row = build_hierarchy(["blob"], cl, unmapped="other")[0]
    assert (row.cl_id, row.levels) == ("", ("Other", "Other", "blob", "blob"))


OBO = """format-version: 1.2
data-version: {release}

[Term]
id: CL:0000000
name: cell

""" + "\n".join(
    f"[Term]\nid: {a}\nname: {name} anchor {a}\nis_a: CL:0000000\n"
    for a, name in (SYSTEM_ANCHORS | STEM_ANCHOR | LINEAGE_ANCHORS).items()
)


def test_only_is_a_edges_between_cl_terms_count(tmp_path: Path):
    path = tmp_path / "cl.obo"
    path.write_text(
        OBO.format(release="releases/2031-01-02/cl-basic.owl")
        + "\n[Term]\nid: CL:9\nname: x\nis_a: UBERON:1\nis_a: CL:0000542\nrelationship: part_of CL:0000066\n"
        + 'synonym: "e" EXACT []\nsynonym: "b" BROAD []\nsynonym: "r" RELATED []\nsynonym: "n" NARROW [PMID:1]\n'
        + 'synonym: "say \\"hi\\"" EXACT ABBREVIATION [PMID:1]\nsynonym: "plain" []\n'
        + "\n[Term]\nid: UBERON:1\nname: organ\n\n[Term]\nid: CL:10\nname: gone\nis_obsolete: true\n"
    )
    g = load_graph(path)
    assert g.graph["release"] == "2031-01-02"
    assert list(g.successors("CL:9")) == ["CL:0000542"]
    assert sorted(g.nodes["CL:9"]["synonyms"]) == ["e", "plain", 'say "hi"']
    assert "CL:10" not in g
    assert "UBERON:1" not in g


def test_an_unreasoned_ontology_is_refused(tmp_path: Path):
    path = tmp_path / "cl-base.obo"
    path.write_text(OBO.format(release="x") + "".join(f"\n[Term]\nid: CL:9{i}\nname: t{i}\n" for i in range(9)))
    with pytest.raises(InputError, match=r"cl-base.obo: 10 of 28 CL terms have no is_a parent"):
        load_graph(path)


@pytest.mark.parametrize("text", ["", "hello", "[Term]\nid: GO:1\nname: x\n", "\x00\x01\xff"])
def test_a_file_that_is_not_the_cell_ontology(tmp_path: Path, text: str):
    path = tmp_path / "other.obo"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"other\.obo"):
        load_graph(path)


def test_a_missing_ontology(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.obo: cannot be read"):
        load_graph(tmp_path / "none.obo")


def test_term_distances_are_steps_in_the_ontology(cl: nx.DiGraph):
    names = ["T cell", "lymphocyte", "regulatory T cell", "neuron", "native cell", "no such cell"]
    found = term_distances(names, cl)
    assert found[0, 1] == 1  # a T cell is a lymphocyte
    assert np.array_equal(found, found.T, equal_nan=True)
    assert np.isnan(found[4:]).all()
    ids = [term for term, _ in match_names(names, cl).values()]
    undirected = cl.to_undirected()
    for i in range(4):
        for j in range(4):
            assert found[i, j] == nx.shortest_path_length(undirected, ids[i], ids[j])


def test_one_class_per_term_and_classes_stay_what_they_are(cl: nx.DiGraph):
    """Any mix of names, synonyms, plurals and ids; a reference looks the classes' names up once more."""
    spelled = [(term, text) for term, data in cl.nodes(data=True) for text in (data["name"], *data["synonyms"])]

    @given(st.lists(st.tuples(st.sampled_from(spelled), st.sampled_from(["as is", "plural", "id"])), min_size=1))
    def check(drawn: list[tuple[tuple[str, str], str]]) -> None:
        names = [{"as is": text, "plural": text + "s", "id": term}[how] for (term, text), how in drawn]
        names = [name for name in dict.fromkeys(names) if match_names([name], cl)[name][0]]
        rows = build_hierarchy(names, cl)
        assert [row.cl_id for row in rows] == [match_names([name], cl)[name][0] for name in names]
        assert len({row.cl_id for row in rows}) == len({row.subtype for row in rows})
        classes = list(dict.fromkeys(row.subtype for row in rows))
        again = {row.subtype: row for row in build_hierarchy(classes, cl)}
        assert all(again[row.subtype].levels == row.levels and again[row.subtype].cl_id == row.cl_id for row in rows)

    check()


def test_flat_labels_are_explained():
    with pytest.raises(InputError, match="not 1; flat labels have no tree.*dendrogram.*Cell Ontology"):
        tree_of_columns(["leiden"], [("0",), ("1",)])


@pytest.mark.parametrize("levels", [["a"], ["a", "a"], [*"abcdefg"]])
def test_a_hierarchy_of_another_number_of_levels_is_refused(tmp_path: Path, levels: list[str]):
    text = "\t".join(["cl_id", *levels, "path"]) + "\n" + "\t".join(["", *(f"x{i}" for i in range(len(levels))), ""])
    (tmp_path / "t.tsv").write_text(text + "\n")
    with pytest.raises(InputError, match="the names of 2 to 6 levels"):
        read_hierarchy(tmp_path / "t.tsv")


def test_any_level_but_the_coarsest_may_be_missing():
    labels = [("A", "", ""), ("A", "b", ""), ("A", "", "c")]
    _, rows, _ = tree_of_columns(["k", "l", "m"], labels)
    assert [rows[path].levels for path in labels] == [("A", "A", "A"), ("A", "b", "b"), ("A", "A", "c")]


def obo(*terms: str) -> str:
    return CL_SLIM.read_text(encoding="utf-8") + "\n" + "\n\n".join(f"[Term]\n{term}" for term in terms) + "\n"


def test_a_cycle_of_terms_ends(tmp_path: Path):
    (tmp_path / "cl.obo").write_text(
        obo(
            "id: CL:9900001\nname: cat cell\nis_a: CL:9900002",
            "id: CL:9900002\nname: dog cell\nis_a: CL:9900001\nis_a: CL:0000542",
        ),
        encoding="utf-8",
    )
    cat, dog = build_hierarchy(["cat cell", "dog cell"], load_graph(tmp_path / "cl.obo"))
    assert (*cat.levels[:2], cat.type) == ("Immune", "Lymphoid", "dog cell")
    assert (dog.levels[1], dog.type) == ("Lymphoid", "lymphocyte")


def test_obsolete_terms_are_not_matched(tmp_path: Path):
    (tmp_path / "cl.obo").write_text(obo("id: CL:9900001\nname: gone cell\nis_obsolete: true"), encoding="utf-8")
    with pytest.raises(InputError, match=r"1 type names are not in CL .*: gone cell"):
        build_hierarchy(["gone cell"], load_graph(tmp_path / "cl.obo"))
