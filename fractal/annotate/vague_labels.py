"""Labels that mean less in one study than in another: "T cell" where other studies say CD4 and CD8.

As a type beside its own subtypes such a label would be their rival, and cells would stop above both. Its cells say
nothing about which subtype they are, so `fractal.fit` leaves them out and says so. A label is vague if

- at least two labels of the reference lie below it in the Cell Ontology,
- no study uses it together with one of those, and
- at least LEAST of its cells are as near to the types of those as their own cells of unseen studies are.

"B cell" beside plasmablasts is none: naive B cells look like no plasmablast.
"""

from collections.abc import Sequence
from dataclasses import replace

import networkx as nx
import numpy as np

from fractal.annotate.discriminant import Discriminant
from fractal.base.errors import InputError
from fractal.data.cells import Cells
from fractal.data.ingestion import Plan
from fractal.data.vectors import usable
from fractal.hierarchy.tree import term_of

LEAST = 0.9  # share of the label's cells
ORDINARY = 0.05  # share of the cells below that are further away
DRAWN = 4_000  # cells of a label, and of those below it, that are looked at


def below(plan: Plan, graph: nx.DiGraph) -> dict[int, list[int]]:
    """Class -> the other classes that lie below it in CL, where two or more do."""
    terms = [row.cl_id for row in plan.hierarchy.classes]
    found = {}
    for code, term in enumerate(terms):
        under = nx.ancestors(graph, term) if term in graph else set()
        if len(codes := [other for other, name in enumerate(terms) if name in under]) >= 2:
            found[code] = codes
    return found


def studies_of(plan: Plan, classes: Sequence[int]) -> set[int]:
    """The studies that use one of these classes."""
    if plan.study_codes is None:
        return set()
    return set(np.unique(plan.study_codes[np.isin(plan.classes, classes)]).tolist())


def without_vague(
    plan: Plan, cells: Cells, graph: nx.DiGraph, vague: Sequence[str] = (), not_vague: Sequence[str] = (), seed: int = 0
) -> Plan:
    """The plan without the cells of vague labels, which its notes list.

    Parameters
    ----------
    plan : of `place_cells`
    cells : whose vectors are read, in a pass for each label that may be vague
    graph : the Cell Ontology
    vague, not_vague : labels that are, or are not, whatever the cells say
    seed : of the draw of cells

    Raises
    ------
    InputError : for names that are no label of the cells, or, in `vague`, have no label below.
    """
    nested = below(plan, graph)
    position = {row.cl_id: code for code, row in enumerate(plan.hierarchy.classes) if row.cl_id}
    codes = dict[str, int]()
    for name in (*vague, *not_vague):
        code = position.get(term_of(name, graph))
        if code is None or (name in vague and code not in nested):
            why = "is no label of these cells" if code is None else "has not two labels of these cells below it"
            raise InputError(f"'{name}' {why}, so it can't be called vague or not")
        codes[name] = code
    forced, spared = {codes[name] for name in vague}, {codes[name] for name in not_vague}
    unsure = {
        code: under
        for code, under in nested.items()
        if code not in forced | spared
        and (studies := studies_of(plan, [code]))
        and not studies & studies_of(plan, under)
    }
    found = sorted(forced | {code for code, under in unsure.items() if is_ordinary(plan, cells, code, under, seed)})
    classes, notes, names = plan.classes.copy(), [], [row.subtype for row in plan.hierarchy.classes]
    for code in found:
        classes[plan.classes == code] = -1
        others = ", ".join(names[other] for other in nested[code])
        notes.append(
            f"{(plan.classes == code).sum():,} of {len(classes):,} cells left out: '{names[code]}' means less than "
            f"{others}, which other studies use in its place"
        )
    hierarchy = replace(plan.hierarchy, notes=[*plan.hierarchy.notes, *notes])
    return replace(plan, classes=classes, hierarchy=hierarchy)


def is_ordinary(plan: Plan, cells: Cells, label: int, under: Sequence[int], seed: int) -> bool:
    """Are the label's cells where those of the classes below it are, as these are seen from other studies?"""
    assert plan.study_codes is not None  # else nothing says that a label may be vague
    rng, kind = np.random.default_rng(seed), np.where(np.isin(plan.classes, under), 1, 0)
    kind[plan.classes == label] = 2
    drawn = np.sort(np.concatenate([rng.permutation(np.flatnonzero(kind == k))[:DRAWN] for k in (1, 2)]))
    x, _ = cells.take(drawn)
    good = usable(x)
    x, path, study, kind = x[good], *(a[drawn][good] for a in (plan.classes, plan.study_codes, kind))
    known = kind == 1
    folds = np.unique(study[known])
    if len(folds) < 2:  # nothing shows how far another study may lie
        return False
    away = [
        Discriminant(*(a[known & (study != fold)] for a in (x, path, study)))(x[known & (study == fold)])[:, 0]
        for fold in folds
    ]
    limit = np.quantile(np.concatenate(away), 1 - ORDINARY)
    distance = Discriminant(x[known], path[known], study[known])(x[kind == 2])[:, 0]
    return bool((distance <= limit).mean() >= LEAST)
