"""Labelled cells to score a reference with: those that it holds out, and those of a file or an AnnData."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from fractal.annotate.annotator import Annotator
from fractal.base.errors import InputError
from fractal.base.storage import Location
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.data.labels import Labels as CellLabels
from fractal.data.vectors import refuse, usable
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.ontology import build_hierarchy
from fractal.hierarchy.tree import Labels, Tree
from fractal.model.split import Split


@dataclass(frozen=True)
class Labelled:
    """n cells with known labels."""

    vectors: np.ndarray  # (n, dim) float32, usable
    paths: list[Labels]  # (n,) the labels of each, coarse to fine
    title: str  # what they are
    groups: np.ndarray | None = None  # (n,) study of each
    studies: Sequence[str] = ()  # names of the groups
    notes: list[str] = field(default_factory=list)


def draw_rows(n: int, num_samples: int, seed: int) -> np.ndarray:
    """At most num_samples of n row numbers, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:num_samples])


def held_out_cells(annotator: Annotator, num_samples: int, seed: int) -> Labelled:
    """The held-out cells that a reference keeps."""
    held_out = annotator.held_out
    rows = draw_rows(len(held_out), num_samples, seed)
    paths = [annotator.tree.paths[i] for i in held_out.path[rows]]
    seen = (
        "The weights were not fitted on them, but the epoch was chosen by them"
        if len(np.unique(held_out.fold)) == 1
        else "After they had been held out, the weights were fitted on them as well"
    )
    title = (
        f"{len(rows):,} held-out cells of the reference beside its {len(annotator.path):,} reference cells. {seen}, "
        "and they come from the studies of training: expect less on another donor or tissue"
    )
    return Labelled(held_out.vectors[rows], paths, title)


def atlas_cells(path: Location, tree: Tree, facts: Mapping[str, Any], num_samples: int, seed: int) -> Labelled:
    """Cells of a Parquet file of ingest.py or stratify.py; of the file of training only the test cells.

    facts: of the reference (bundle.json), with the split of its training. Raises InputError for other levels, and where
    no cell was held out.
    """
    atlas = Atlas.open(path)
    if atlas.levels != tree.levels:
        theirs, ours = ", ".join(atlas.levels), ", ".join(tree.levels)
        raise InputError(f"{path}: its levels are {theirs}, those of the reference {ours}; score a file of these")
    rows, kind, by_study = np.arange(atlas.num_rows), "cells", atlas.has_studies
    known = facts.get("split")
    if isinstance(known, Mapping) and atlas.fingerprint == known.get("fingerprint"):
        split = Split.of(dict(facts), Path(str(path)))
        rows, kind, by_study = split.rows(atlas)[2], "test cells", len(split.test_studies) > 1
    rows = rows[draw_rows(len(rows), num_samples, seed)]
    if not len(rows):
        raise InputError(f"{path}: none of its cells was held out; score another file")
    cells = atlas.read(rows)
    paths = [tuple(cells.classes[k][c] for k, c in enumerate(row)) for row in cells.labels.tolist()]
    groups, studies = atlas.studies if by_study else (None, [])
    title = f"{len(rows):,} {kind} of {path.name}"
    return Labelled(cells.vectors, paths, title, None if groups is None else groups[rows], studies)


def obs_cells(
    cells: Cells, columns: CellLabels, tree: Tree, graph: nx.DiGraph, num_samples: int, seed: int
) -> Labelled:
    """Cells with labels in obs: names of the Cell Ontology or of the reference, or a column per level.

    Raises InputError where no cell has a label that the reference or the ontology has, and for unusable vectors.
    """
    if columns.tree and len(columns.levels or ()) != len(tree.levels):
        raise InputError(f"{cells.path}: the reference has {len(tree.levels)} levels; name as many with --levels")
    names, by_name = columns.names, columns.tree
    known = [by_name[name].levels for name in names] if by_name else known_paths(tree, names, graph)
    labelled = columns.codes >= 0
    placed = labelled & np.array([*(path is not None for path in known), False])[columns.codes]
    notes = list(columns.notes)
    if lost := int((labelled & ~placed).sum()):
        unknown = sorted({names[code] for code in np.unique(columns.codes[labelled & ~placed])})
        notes.append(f"{lost:,} cells left out, neither the reference nor the ontology has: {'; '.join(unknown)}")
    rows = np.flatnonzero(placed)
    if not len(rows):
        raise InputError(f"{cells.path}: no cell has a label that the reference or the ontology has; {notes[-1]}")
    rows = rows[draw_rows(len(rows), num_samples, seed)]
    vectors, _ = cells.take(rows)
    refuse(~usable(vectors), 0, cells.path)
    groups = None if columns.study_codes is None else columns.study_codes[rows]
    paths = [known[code] or () for code in columns.codes[rows]]
    return Labelled(vectors, paths, f"{len(rows):,} cells of {cells.path.name}", groups, columns.studies, notes)


def known_paths(tree: Tree, names: Sequence[str], graph: nx.DiGraph) -> list[Labels | None]:
    """The path of each name: the reference's, by name or CL id, else the ontology's, else None."""
    found = tree.find(names, graph)
    if not tree.cl_ids.any() or tree.levels != LEVELS:  # the ontology has no paths of these levels
        return found
    rows = build_hierarchy(names, graph, "other")
    return [path or (row.levels if row.matched != "unmapped" else None) for path, row in zip(found, rows, strict=True)]
