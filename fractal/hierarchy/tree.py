"""A tree of labels as codes: the paths from the coarsest level to the finest, their nodes, and their CL terms."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from fractal.base.errors import InputError
from fractal.hierarchy.cellxgene import CELLXGENE_LEVELS, cellxgene_hierarchy, cellxgene_terms
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.matching import MANUAL, cl_id_of, match_names
from fractal.hierarchy.ontology import hierarchy_of, level_terms

Labels = tuple[str, ...]  # of a cell, or of a node: one a level, coarse to fine


def nodes_of(paths: Iterable[Labels]) -> list[Labels]:
    """All nodes of the paths, sorted; a node is the labels from the root down to it."""
    return sorted({path[:k] for path in paths for k in range(1, len(path) + 1)})


def at_or_below(graph: nx.DiGraph, terms: Collection[str]) -> set[str]:
    """Terms of CL and all that lies below one of them. (Edges run from child to parent.)"""
    return set(terms).union(*(nx.ancestors(graph, term) for term in terms))


def at_or_above(graph: nx.DiGraph, term: str) -> set[str]:
    """A term of CL and all above it; none for what is no term."""
    return {term, *nx.descendants(graph, term)} if term in graph else set()


@dataclass(frozen=True)
class Tree:
    """The hierarchy of a reference, one row per path of labels."""

    paths: list[Labels]  # (P,)
    nodes: np.ndarray  # (P, levels) int64: the node of each path at each level; two may share a name, not a parent
    levels: tuple[str, ...]  # names, coarse to fine
    cl_ids: np.ndarray  # (P, levels) str, "" where a label is no CL term
    counts: np.ndarray  # (P,) int64, cells of the training file that are no test cells

    @staticmethod
    def of(
        paths: Sequence[Labels],
        levels: Sequence[str] = LEVELS,
        cl_ids: np.ndarray | None = None,
        counts: np.ndarray | None = None,
    ) -> "Tree":
        depths = range(1, len(paths[0]) + 1)
        position = [{node: i for i, node in enumerate(sorted({path[:k] for path in paths}))} for k in depths]
        nodes = np.array([[position[k - 1][path[:k]] for k in depths] for path in paths])
        ids = np.full(nodes.shape, "", "<U16") if cl_ids is None else cl_ids
        cells = np.zeros(len(paths), np.int64) if counts is None else counts
        return Tree([tuple(path) for path in paths], nodes, tuple(levels), ids, cells)

    def names(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The labels of level k -> their codes (P,) by path, and the labels, sorted."""
        labels, codes = np.unique(np.array([path[k] for path in self.paths], object), return_inverse=True)
        return codes, labels

    def rows(self, paths: Sequence[Labels]) -> np.ndarray:
        """Labels of cells -> their rows (n,) int64 of the tree. Raises KeyError for labels that are on none."""
        position = {path: i for i, path in enumerate(self.paths)}
        return np.array([position[path] for path in paths], np.int64)

    def find(self, names: Sequence[str], graph: nx.DiGraph | None) -> list[Labels | None]:
        """The path of each name as people write it: of this finest label, or of this term of CL; None for no path.

        graph: the Cell Ontology; None where the labels are not of it.
        """
        by_name = {path[-1]: path for path in self.paths}
        by_term = {term: path for term, path in zip(self.cl_ids[:, -1].tolist(), self.paths, strict=True) if term}
        others = match_names([name for name in names if name not in by_name], graph) if graph is not None else {}
        return [by_name.get(name) or by_term.get(others.get(name, ("",))[0]) for name in names]

    def natural_weight(self, path: np.ndarray) -> np.ndarray:
        """Weights (n,) that make cells with these paths (n,), balanced over types, count as the file's mix."""
        return (self.counts / np.maximum(np.bincount(path, minlength=len(self.counts)), 1))[path]

    def check_terms(self, graph: nx.DiGraph, path: object, obo: object, release: str) -> None:
        """Raises InputError if the ontology lacks terms of the tree; path, obo and release are for the message."""
        missing = sorted(set(self.cl_ids.flat) - {""} - set(MANUAL.values()) - set(graph))
        if missing:
            raise InputError(
                f"{obo}: CL {graph.graph['release']} lacks {len(missing)} terms of {path}, such as {missing[0]}; "
                f"give the release that it was made with, {release}, with --obo"
            )

    def choose(self, graph: nx.DiGraph | None, only: Sequence[str], exclude: Sequence[str]) -> np.ndarray | None:
        """(P,) bool: the paths of a term of `only` (all, if none is named), and of none of `exclude`.

        None without constraints. Raises InputError for what is neither a label of the tree nor a term of CL.
        """
        if not only and not exclude:
            return None
        wanted = self.paths_of(only, graph) if only else np.ones(len(self.paths), bool)
        return wanted & ~self.paths_of(exclude, graph)

    def paths_of(self, terms: Sequence[str], graph: nx.DiGraph | None) -> np.ndarray:
        """(P,) bool: paths with one of these labels, at any level, or whose type lies at or below one in CL."""
        mask = np.zeros(len(self.paths), bool)
        for term in terms:
            labelled = np.array([term in path for path in self.paths])
            cl_id = "" if graph is None else term_of(term, graph)
            if not labelled.any() and not cl_id:
                known = f" nor a term of CL {graph.graph['release']}" if graph is not None else ""
                raise InputError(f"'{term}': not a label of the reference{known}; write it as T cell or CL:0000084")
            mask |= labelled | np.isin(self.cl_ids[:, -1], sorted(at_or_below(graph, [cl_id])) if cl_id else [])
        return mask


def term_of(text: str, graph: nx.DiGraph) -> str:
    """A name, a synonym or an id of CL, as "T cell", "CL_0000084", "cl:0000084" -> "CL:0000084"; "" for no term."""
    text = text.strip()
    term = cl_id_of(text) or match_names([text], graph)[text][0]
    return term if term in graph else ""


def terms_of(paths: Sequence[Labels], graph: nx.DiGraph | None, levels: Sequence[str] = LEVELS) -> np.ndarray:
    """CL ids (P, levels) of labels, "" where the ontology has none, or its tree of these levels has another place."""
    ids = np.full((len(paths), len(paths[0])), "", "<U16")
    if graph is None:
        return ids
    hierarchy, ids_of = hierarchy_of([path[-1] for path in paths], graph, "other"), level_terms
    if tuple(levels) == CELLXGENE_LEVELS:
        hierarchy, ids_of = cellxgene_hierarchy(hierarchy, graph), cellxgene_terms
    for i, row in enumerate(hierarchy.rows):
        if row.levels == paths[i]:
            ids[i] = ids_of(row, graph)
        elif row.subtype == paths[i][-1]:
            ids[i, -1] = row.cl_id
    return ids
