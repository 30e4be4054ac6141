"""Rule 1 of the hierarchy: the name of a cell type -> its term of the Cell Ontology (CL).

A name is looked up as it stands; then, as a CL id; then, in the spellings that people use for the same thing: plural,
abbreviation, `CD4+`, without the word "cell". A spelling counts only if it leads to one term. What is still unknown is
not guessed: `closest_names` lists what it may have meant.
"""

import difflib
import math
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import networkx as nx

# Both are obsolete in today's CL, so the graph does not hold them; the published hierarchy has them.
MANUAL = {"native cell": "CL:0000003", "animal cell": "CL:0000548"}

SPELLINGS = tomllib.loads(Path(__file__).with_name("spellings.toml").read_text(encoding="utf-8"))
ABBREVIATIONS: dict[str, str] = SPELLINGS["abbreviations"]
SEVERAL_MEANINGS: dict[str, list[str]] = SPELLINGS["several_meanings"]
EXPANSIONS: dict[str, str] = SPELLINGS["expansions"]
NO_TYPE = {"cluster", "debris", "doublet", "multiplet"}  # a name with one of these words gets no guess

Match = tuple[str, str]  # the CL id, "" if there is none, and how it was found
CL_ID = re.compile(r"(?:https?://purl\.obolibrary\.org/obo/)?CL[:_](\d{7})", re.IGNORECASE)


def cl_id_of(text: str) -> str | None:
    """`CL:0000236`, `CL_0000236` or the term's IRI -> "CL:0000236"; None for any other text."""
    match = CL_ID.fullmatch(text)
    return f"CL:{match[1]}" if match else None


def _without_human(name: str) -> str:
    return name.removesuffix(", human").casefold()


class Index:
    """Every name and synonym of a graph of `fractal.hierarchy.ontology.load_graph`, in the order in which rule 1
    tries them."""

    def __init__(self, graph: nx.DiGraph) -> None:
        self.graph = graph
        spelled = {
            "name": [(data["name"], term) for term, data in graph.nodes(data=True)],
            "synonym": [(text, term) for term, data in graph.nodes(data=True) for text in data["synonyms"]],
        }
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
            for text, term in spelled[how]:
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
        """The term that replaces an obsolete one, where the ontology names exactly one."""
        seen = set[str]()
        while term in self.obsolete and term not in seen:
            seen.add(term)
            successors = self.obsolete[term][1]
            if len(successors) != 1:
                return None
            term = successors[0]
        return term if term in self.graph else None

    def match(self, name: str) -> Match:
        if term := cl_id_of(name):
            if term in self.graph:
                return term, "id"
            if term in MANUAL.values():
                return term, "manual"
            successor = self.replaced(term)
            return (successor, "replaced") if successor else ("", "unmapped")
        if name.casefold() in SEVERAL_MEANINGS or _bare(name) in SEVERAL_MEANINGS:
            return "", "unmapped"
        match = self.look_up(name)
        if match[0]:
            return match
        if (old := self.obsolete_names.get(name.casefold())) and (successor := self.replaced(old)):
            return successor, "replaced"
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


MARKER = re.compile(r"\b(CD\d+[A-Z]*)(\+|-positive|-negative|-(?![A-Z\d]))?", re.IGNORECASE)


def markers(name: str) -> dict[str, bool | None]:
    """Markers of a name and their signs: `CD4+/CD25- CD3 T` or `CD4-positive, CD25-negative, CD3 T`: yes, no, none."""
    return {m.upper(): sign in ("+", "-positive") if sign else None for m, sign in MARKER.findall(name)}


def agree(name: str, candidate: str) -> bool:
    """Whether a CL name carries every marker sign of a name, and none of a marker that the name lacks."""
    wanted, given = markers(name), {m: sign for m, sign in markers(candidate).items() if sign is not None}
    return given.keys() <= wanted.keys() and all(given.get(m) == sign for m, sign in wanted.items() if sign is not None)


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


def _weights(tokens: list[str], weight: dict[str, float]) -> dict[str, float]:
    """The words of a name as CL spells them, with their weights; of one that CL does not know, half of the rarest's."""
    wanted = dict[str, float]()
    for token in tokens:
        alike = [token] if token in weight else difflib.get_close_matches(token, weight, 1, 0.8)
        wanted |= {known: weight.get(known, max(weight.values()) / 2) for known in alike or [token]}
    if wanted:
        wanted[next(reversed(wanted))] *= 2  # the last word says what kind of cell it is: late ERYTHROID
    return wanted


def closest_names(names: Iterable[str], graph: nx.DiGraph, count: int = 3) -> dict[str, list[str]]:
    """Name -> the CL names that it may mean, best first; none where no CL name shares enough of what it says.

    Compared are words, not letters: a rare word counts more (as idf in text search), a misspelled word stands for the
    one that is spelled most like it. The score is the weight of the shared words over that of all words of both. A CL
    name must agree with the markers of the name (`agree`): CD4+ is not CD8-positive. Markers alone are no type.
    """
    known, weight = _vocabulary(graph)
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
        no_type = NO_TYPE & set(_tokens(name)) or not re.search(r"\w", MARKER.sub("", name))
        wanted = _weights([] if no_type else _tokens(name), weight)
        total = sum(wanted.values())
        scores: dict[str, float] = {}
        for candidate, tokens in known:
            shared = sum(wanted[token] for token in wanted.keys() & tokens)
            if shared and agree(name, candidate):
                score = shared / (total + 0.5 * sum(weight[token] for token in tokens - wanted.keys()))
                scores[candidate] = max(scores.get(candidate, 0), score)
        best = sorted(scores, key=lambda candidate: (-scores[candidate], len(candidate), candidate))
        found[name] = [candidate for candidate in best[:count] if scores[candidate] >= 0.35]
    return found
