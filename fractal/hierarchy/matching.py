"""Rule 1 of the hierarchy: the name of a cell type -> its term of the Cell Ontology (CL).

A name is looked up as it stands; then, as a CL id; then, in the spellings that people use for the same thing: plural,
abbreviation, `CD4+`, without the word "cell". A spelling counts only if it leads to one term. What is still unknown is
not guessed: `closest_names` lists what it may have meant.
"""

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import networkx as nx

# Both are obsolete in today's CL, so the graph does not hold them; the published hierarchy has them.
MANUAL = {"native cell": "CL:0000003", "animal cell": "CL:0000548"}

# What people write -> a name of CL; keys in lower case, singular, without the word "cell". Only what means one thing in
# every tissue: not HSC (also hepatic stellate cell), not MSC, not EC.
ABBREVIATIONS = {
    "at1": "pulmonary alveolar type 1 cell",
    "at2": "pulmonary alveolar type 2 cell",
    "cardiomyocyte": "cardiac muscle cell",
    "cd14 mono": "CD14-positive monocyte",
    "cd14 monocyte": "CD14-positive monocyte",
    "cd16 mono": "CD14-low, CD16-positive monocyte",
    "cd16 monocyte": "CD14-low, CD16-positive monocyte",
    "cd4 naive": "naive thymus-derived CD4-positive, alpha-beta T cell",
    "cd4 t": "CD4-positive, alpha-beta T cell",
    "cd4 tcm": "central memory CD4-positive, alpha-beta T cell",
    "cd4 tem": "effector memory CD4-positive, alpha-beta T cell",
    "cd4-positive t": "CD4-positive, alpha-beta T cell",
    "cd8 naive": "naive thymus-derived CD8-positive, alpha-beta T cell",
    "cd8 t": "CD8-positive, alpha-beta T cell",
    "cd8 tcm": "central memory CD8-positive, alpha-beta T cell",
    "cd8 tem": "effector memory CD8-positive, alpha-beta T cell",
    "cd8-positive t": "CD8-positive, alpha-beta T cell",
    "cdc1": "CD141-positive myeloid dendritic cell",
    "cdc2": "CD1c-positive myeloid dendritic cell",
    "clp": "common lymphoid progenitor",
    "cmp": "common myeloid progenitor",
    "dc": "dendritic cell",
    "dendritic": "dendritic cell",
    "gdt": "gamma-delta T cell",
    "gmp": "granulocyte monocyte progenitor cell",
    "hspc": "hematopoietic precursor cell",
    "ilc": "innate lymphoid cell",
    "ilc2": "group 2 innate lymphoid cell",
    "ilc3": "group 3 innate lymphoid cell",
    "lymphatic endothelial": "endothelial cell of lymphatic vessel",
    "mait": "mucosal invariant T cell",
    "memory b": "memory B cell",
    "microglia": "microglial cell",
    "mono": "monocyte",
    "naive b": "naive B cell",
    "nk": "natural killer cell",
    "nkt": "mature NK T cell",
    "opc": "oligodendrocyte precursor cell",
    "pdc": "plasmacytoid dendritic cell",
    "rbc": "erythrocyte",
    "smc": "smooth muscle cell",
    "th1": "T-helper 1 cell",
    "th17": "T-helper 17 cell",
    "th2": "T-helper 2 cell",
    "treg": "regulatory T cell",
}
# Never taken without asking. CL has some as synonyms with a meaning that few people have in mind today: its DC2 is the
# plasmacytoid dendritic cell, its alpha cell is in the retina.
SEVERAL_MEANINGS = {
    "alpha": ["pancreatic A cell", "retinal ganglion cell A"],
    "beta": ["type B pancreatic cell"],
    "dc1": ["CD141-positive myeloid dendritic cell", "conventional dendritic cell"],
    "dc2": ["CD1c-positive myeloid dendritic cell", "plasmacytoid dendritic cell"],
    "hsc": ["hematopoietic stem cell", "hepatic stellate cell"],
    "hsc/mpp": ["hematopoietic stem cell", "hematopoietic multipotent progenitor cell"],
    "msc": ["mesenchymal stem cell"],
    "ec": ["endothelial cell"],
    "mac": ["macrophage"],
}
# For guesses alone.
EXPANSIONS = {
    "ab": "alpha-beta",
    "adc": "activated dendritic",
    "dn": "double negative",
    "dp": "double positive",
    "ec": "endothelial",
    "endo": "endothelial",
    "epi": "epithelial",
    "eryth": "erythroid",
    "excitatory": "glutamatergic",
    "fb": "fibroblast",
    "gd": "gamma-delta",
    "hsc": "hematopoietic stem",
    "inhibitory": "gabaergic",
    "mac": "macrophage",
    "mk": "megakaryocyte",
    "mpp": "multipotent progenitor",
    "tcm": "central memory t",
    "tem": "effector memory t",
    "temra": "effector memory t terminally differentiated",
    "tfh": "follicular helper t",
    "trm": "tissue resident memory t",
}
NO_TYPE = {"cluster", "debris", "doublet", "multiplet"}  # a name with one of these words gets no guess

Match = tuple[str, str]  # the CL id, "" if there is none, and how it was found
CL_ID = re.compile(r"(?:https?://purl\.obolibrary\.org/obo/)?CL[:_](\d{7})", re.IGNORECASE)


def cl_id_of(text: str) -> str | None:
    """`CL:0000236`, `CL_0000236` or the term's IRI -> "CL:0000236"; None for any other text."""
    found = CL_ID.fullmatch(text)
    return f"CL:{found[1]}" if found else None


def _without_human(name: str) -> str:
    return name.removesuffix(", human").casefold()


class Index:
    """Every name and synonym of a graph of `fractal.hierarchy.ontology.load_graph`, in the order in which rule 1
    tries them."""

    def __init__(self, graph: nx.DiGraph) -> None:
        self.graph = graph
        spelled = [(term, data["name"], "name") for term, data in graph.nodes(data=True)]
        spelled += [(term, text, "synonym") for term, data in graph.nodes(data=True) for text in data["synonyms"]]
        keys: list[tuple[str, Callable[[str], str]]] = [
            ("name", str),
            ("name", str.casefold),
            ("name", _without_human),
            ("synonym", str.casefold),
            ("synonym", _without_human),
        ]
        self.steps = []
        for how, key in keys:
            index = defaultdict[str, set[str]](set)
            for term, text, kind in spelled:
                if kind == how:
                    index[key(text)].add(term)
            self.steps.append((how, key, index))
        self.obsolete = graph.graph.get("obsolete", {})  # id -> (name, replaced_by, consider)
        self.obsolete_names = {name.casefold(): term for term, (name, *_) in self.obsolete.items() if name}

    def look_up(self, name: str) -> Match:
        """Rule 1 proper. A name, or a synonym, that stands for several terms is unmapped rather than guessed."""
        if name in MANUAL:
            return MANUAL[name], "manual"
        for how, key, index in self.steps:
            if terms := index.get(key(name)):
                return (next(iter(terms)), how) if len(terms) == 1 else ("", "unmapped")
        return "", "unmapped"

    def replaced(self, term: str) -> str | None:
        """The living term in the place of an obsolete one, where the ontology names exactly one."""
        seen = set[str]()
        while term in self.obsolete and term not in seen:
            seen.add(term)
            places = self.obsolete[term][1]
            if len(places) != 1:
                return None
            term = places[0]
        return term if term in self.graph else None

    def match(self, name: str) -> Match:
        if term := cl_id_of(name):
            if term in self.graph:
                return term, "id"
            if term in MANUAL.values():
                return term, "manual"
            place = self.replaced(term)
            return (place, "replaced") if place else ("", "unmapped")
        if name.casefold() in SEVERAL_MEANINGS or _bare(name) in SEVERAL_MEANINGS:
            return "", "unmapped"
        found = self.look_up(name)
        if found[0]:
            return found
        if (old := self.obsolete_names.get(name.casefold())) and (place := self.replaced(old)):
            return place, "replaced"
        terms = {other for spelling in spellings(name) if (other := self.look_up(spelling)[0])}
        return (terms.pop(), "spelling") if len(terms) == 1 else ("", "unmapped")


@lru_cache(maxsize=2)
def _index(graph: nx.DiGraph) -> Index:
    return Index(graph)


def match_names(names: Iterable[str], graph: nx.DiGraph) -> dict[str, Match]:
    """Rule 1: name -> (CL id, how), how being one of

    "name", "synonym", "manual"   as published
    "id"                          it is a CL id
    "spelling"                    plural, abbreviation, ... of a name or synonym
    "replaced"                    an obsolete term, or its id, of which the ontology says what replaced it
    "unmapped"                    none of these, or it may be several terms; the id is then ""
    """
    index = _index(graph)
    return {name: index.match(name) for name in names}


def singular(word: str) -> str:
    """cells -> cell, progenies -> progeny; microvillus, basis and abscess stay."""
    if len(word) > 3 and word.casefold().endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 2 and word.endswith("s") and not word.casefold().endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _tidy(name: str) -> str:
    """`CD4+ T_cells` -> `CD4-positive T cell`."""
    name = re.sub(r"\b(CD\d+[a-z]?)\+(?=\s|$)", r"\1-positive", name.replace("_", " "), flags=re.IGNORECASE)
    *words, last = name.split() or [""]
    return " ".join([*words, singular(last)])


def _bare(name: str) -> str:
    """The key of a name in the tables above."""
    return _tidy(name).casefold().removesuffix(" cell")


def spellings(name: str) -> Iterator[str]:
    """Other spellings of a name that mean the same."""
    tidy = _tidy(name)
    if bare := ABBREVIATIONS.get(_bare(name)):
        yield bare
        return
    yield tidy
    words = tidy.split()
    if words and words[-1].casefold() != "cell":
        yield f"{tidy} cell"  # Mast, Endothelial, B
    whole = [ABBREVIATIONS.get(singular(word).casefold(), word).removesuffix(" cell") for word in words]
    if whole != words and len(words) > 1:  # plasmacytoid DC
        yield " ".join(whole)
        yield " ".join([*whole, "cell"])


def _tokens(name: str) -> list[str]:
    """The words of a name as guesses compare them: singular, lower case, abbreviations written out, without "cell"."""
    words = [singular(word) for word in re.findall(r"[^\W_]+", _tidy(name).casefold())]
    full = [ABBREVIATIONS.get(word) or EXPANSIONS.get(word) or word for word in words]
    tokens = [singular(word) for phrase in full for word in re.findall(r"[^\W_]+", phrase.casefold())]
    return [token for token in dict.fromkeys(tokens) if token != "cell"]


@lru_cache(maxsize=2)
def _vocabulary(graph: nx.DiGraph) -> tuple[list[tuple[str, frozenset[str]]], dict[str, float]]:
    """Every spelling in CL as (name of its term, tokens), and how much each token tells: the log of its rarity."""
    known, count = [], defaultdict[str, int](int)
    for term in sorted(graph):
        data = graph.nodes[term]
        spelled = {frozenset(_tokens(text)) for text in (data["name"], *data["synonyms"])}
        known += [(data["name"], tokens) for tokens in sorted(spelled, key=sorted)]
        for token in frozenset[str]().union(*spelled):
            count[token] += 1
    return known, {token: math.log(len(graph) / n) for token, n in count.items()}


def closest_names(names: Iterable[str], graph: nx.DiGraph, count: int = 3) -> dict[str, list[str]]:
    """Name -> the CL names that it may mean, best first; none where no CL name shares enough of what it says.

    Compared are words, not letters: rare words tell more (as idf in text search), a misspelled word stands for the one
    that is spelled most like it. The score is the weight of the shared words over that of all words of both.
    """
    known, weight = _vocabulary(graph)
    rarest = max(weight.values())
    obsolete = graph.graph.get("obsolete", {})
    found = {}
    for name in names:
        if several := SEVERAL_MEANINGS.get(_bare(name), SEVERAL_MEANINGS.get(name.casefold())):
            found[name] = several[:count]
            continue
        if (term := cl_id_of(name)) and term in obsolete:
            _, replaced, considered = obsolete[term]
            found[name] = [graph.nodes[other]["name"] for other in (*replaced, *considered) if other in graph][:count]
            continue
        tokens_of_name = [] if NO_TYPE & set(_tokens(name)) else _tokens(name)
        asked = dict[str, float]()  # token -> its weight; of a token that CL does not know, half that of the rarest
        for token in tokens_of_name:
            alike = [token] if token in weight else difflib.get_close_matches(token, weight, 1, 0.8)
            asked |= {known_as: weight.get(known_as, rarest / 2) for known_as in alike or [token]}
        if asked:
            asked[next(reversed(asked))] *= 2  # the last word says what kind of cell it is: late ERYTHROID
        total = sum(asked.values())
        scores: dict[str, float] = {}
        for candidate, tokens in known:
            if shared := sum(asked[token] for token in asked.keys() & tokens):
                score = shared / (total + 0.5 * sum(weight[token] for token in tokens - asked.keys()))
                scores[candidate] = max(scores.get(candidate, 0), score)
        best = sorted(scores, key=lambda candidate: (-scores[candidate], len(candidate), candidate))
        found[name] = [candidate for candidate in best[:count] if scores[candidate] >= 0.35]
    return found
