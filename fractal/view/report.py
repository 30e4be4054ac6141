"""A reference, scored: on its own held-out cells, or on labelled cells of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import torch

from fractal.base.cli import InputError
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.data.cells import Cells, is_h5ad
from fractal.data.vectors import usable
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.ontology import build_hierarchy, match_names
from fractal.model.split import Split
from fractal.score.embeddings import Subset, adapter_encoder, fit_controls, nearest_rows, raw
from fractal.score.table import score_table, truth_of
from fractal.view.scored import Scored, answers_of, provenance

if TYPE_CHECKING:
    from fractal.reference import Reference as Bundle

Path_ = tuple[str, ...]  # the labels of a type, coarse to fine


@dataclass(frozen=True)
class Labelled:
    """Cells with known labels: vectors (n, dim) float32, the path of each (n,), perhaps the study of each (n,)."""

    vectors: np.ndarray
    paths: list[Path_]
    groups: np.ndarray | None
    studies: Sequence[str]
    said: str  # what they are
    notes: list[str]


def own_cells(bundle: Bundle, num_samples: int, seed: int) -> Labelled:
    """The validation cells that a reference keeps."""
    rows = drawn(len(bundle.validation_path), num_samples, seed)
    paths = [bundle.tree.paths[i] for i in bundle.validation_path[rows]]
    said = (
        f"{len(rows):,} validation cells of the reference beside its {len(bundle.path):,} reference cells. The weights "
        "were not fitted on them, but the epoch was chosen by them. They are balanced over the types and come from the "
        "studies of training: expect less on another donor or tissue"
    )
    if bundle.facts["scores"].get("cells"):
        said += f". Answers and probabilities: of {bundle.facts['scores']['cells']:,} test cells that nothing has seen"
    return Labelled(bundle.validation_vectors[rows], paths, None, (), said + ".", [])


def drawn(n: int, num_samples: int, seed: int) -> np.ndarray:
    """At most num_samples of n row numbers, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:num_samples])


def of_atlas(bundle: Bundle, path: Path, num_samples: int, seed: int) -> Labelled:
    """Cells of a Parquet file of ingest.py or stratify.py; of the file of training only the test cells."""
    atlas = Atlas.open(path)
    if atlas.levels != bundle.levels:
        theirs, ours = ", ".join(atlas.levels), ", ".join(bundle.levels)
        raise InputError(f"{path}: its levels are {theirs}, those of the reference {ours}; score a file of these")
    rows, kind, by_study = np.arange(atlas.num_rows), "cells", atlas.has_studies
    known = bundle.facts.get("split")
    if isinstance(known, Mapping) and atlas.fingerprint == known.get("fingerprint"):
        split = Split.of(bundle.facts, path)
        rows, kind, by_study = split.rows(atlas)[2], "test cells", len(split.test_studies) > 1
    rows = rows[drawn(len(rows), num_samples, seed)]
    cells = atlas.read(rows) if len(rows) else None
    if cells is None:
        raise InputError(f"{path}: none of its cells was held out; score another file")
    paths = [tuple(cells.classes[k][c] for k, c in enumerate(row)) for row in cells.labels.tolist()]
    groups, studies = atlas.studies if by_study else (None, [])
    said = f"{len(rows):,} {kind} of {path.name}"
    return Labelled(cells.vectors, paths, None if groups is None else groups[rows], studies, said, [])


def of_h5ad(
    bundle: Bundle,
    path: Path,
    labels: str | None,
    levels: Sequence[str],
    use_rep: str,
    study: str | None,
    graph: nx.DiGraph,
    num_samples: int,
    seed: int,
) -> Labelled:
    """Cells of an .h5ad with labels in obs: names of the Cell Ontology or of the reference, or a column per level."""
    with Cells.open(path, use_rep) as cells:
        found = cells.labels(labels or "", study, None, levels)
        taken = np.flatnonzero(found.codes >= 0)
        codes, groups, names = found.codes[taken], found.study_codes, found.names
        tree = found.tree
        known = [tree[name].levels for name in names] if tree else places(bundle, names, graph)
        if tree and len(levels) != len(bundle.levels):
            raise InputError(f"{path}: the reference has {len(bundle.levels)} levels; name as many with --levels")
        placed = np.array([path is not None for path in known])[codes]
        rows = np.flatnonzero(placed)
        rows = rows[drawn(len(rows), num_samples, seed)]
        groups = None if groups is None else groups[taken]
        vectors, start = np.empty((len(rows), cells.dim), np.float32), 0
        for _, chunk in cells.chunks():
            inside = (taken[rows] >= start) & (taken[rows] < start + len(chunk))
            vectors[inside] = chunk[taken[rows[inside]] - start]
            start += len(chunk)
        notes = list(found.notes)
    if lost := int((~placed).sum()):
        unknown = sorted({names[c] for c in np.unique(codes[~placed])})
        notes.append(f"{lost:,} cells left out, neither the reference nor the ontology has: {'; '.join(unknown)}")
    if not len(rows):
        raise InputError(f"{path}: no cell has a label that the reference or the ontology has; {notes[-1]}")
    paths = [known[c] or () for c in codes[rows]]
    said = f"{len(rows):,} cells of {path.name}"
    return Labelled(vectors, paths, None if groups is None else groups[rows], found.studies, said, notes)


def places(bundle: Bundle, names: Sequence[str], graph: nx.DiGraph) -> list[Path_ | None]:
    """The path of each name: the reference's own, by name or CL id, else the ontology's, else None."""
    by_name = {path[-1]: path for path in bundle.tree.paths}
    by_term = {term: path for term, path in zip(bundle.cl_ids[:, -1], bundle.tree.paths, strict=True) if term}
    matches, rows = match_names(names, graph), build_hierarchy(names, graph, "other")
    found: list[Path_ | None] = []
    for name, row in zip(names, rows, strict=True):
        term, how = matches[name]
        from_ontology = row.levels if how != "unmapped" and by_term and bundle.levels == LEVELS else None
        found.append(by_name.get(name) or by_term.get(term) or from_ontology)
    return found


def read_labelled(
    bundle: Bundle,
    path: Path,
    labels: str | None,
    levels: Sequence[str],
    use_rep: str | None,
    study: str | None,
    graph: nx.DiGraph,
    num_samples: int,
    seed: int,
    force: bool,
) -> Labelled:
    """Raises InputError for cells that can't be scored: without labels, or of another embedding."""
    if is_h5ad(path):
        key = use_rep or bundle.use_rep
        cells = of_h5ad(bundle, path, labels, levels, key, study, graph, num_samples, seed)
    else:
        cells = of_atlas(bundle, path, num_samples, seed)
    if cells.vectors.shape[1] != bundle.adapter.dim:
        raise InputError(f"{path}: {cells.vectors.shape[1]} numbers a cell, the reference takes {bundle.adapter.dim}")
    if not usable(cells.vectors).all():
        raise InputError(f"{path}: some vectors are zero or not finite; leave such cells out")
    odd, certain = bundle.intake.problem(cells.vectors)
    if certain and not force:
        raise InputError(f"{path}: {odd}; name the right vectors with --use-rep, or go on with --force")
    return Labelled(**{**vars(cells), "notes": [*cells.notes, *([odd] if odd else [])]})


def coded(paths: Sequence[Path_]) -> tuple[list[list[str]], np.ndarray]:
    """Paths (n,) -> the classes of each level, and labels (n, levels) int64 into them."""
    pairs = [np.unique(np.array(column, object), return_inverse=True) for column in zip(*paths, strict=True)]
    return [names.tolist() for names, _ in pairs], np.stack([codes for _, codes in pairs], axis=1)


def kept_answers(bundle: Bundle, name: str) -> dict[str, dict[str, Any]]:
    """How good the answers were on the test cells when the reference was made. Raises InputError for a damaged one."""
    scores, split = bundle.facts["scores"], bundle.facts.get("split") or {}
    try:
        if not scores["cells"]:
            return {}
        for level in bundle.levels:
            own = scores["levels"][level]
            shares = [own["coverage"], own["accuracy_forced"], own["accuracy"] or 0.0, own["calibration_error"]]
            bins = [(bin["probability"], bin["accuracy"], bin["cells"]) for bin in own["reliability"]]
            if not all(0 <= x <= 1 for x in [*shares, *(x for p, r, _ in bins for x in (p, r))]) or not bins:
                raise ValueError("no shares")
            if not all(type(cells) is int and cells > 0 for *_, cells in bins) or own["calibration_noise_floor"] < 0:
                raise ValueError("no counts")
        types = len(split.get("test_types") or ())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name}: the scores in bundle.json are damaged; make the reference again") from error
    return {f"test cells ({types} of their types were held out whole)" if types else "test cells": scores}


def score_reference(bundle: Bundle, name: str, cells: Labelled, own: bool, graph: nx.DiGraph) -> Scored:
    """Score cells by 5 neighbours among the reference cells (bank) and among themselves (loo), as eval.py does.

    own: they are the reference's validation cells; then the answers are those of its test cells, as it keeps them.
    Raises InputError for fewer than two cells.
    """
    n, device = len(cells.paths), next(bundle.adapter.parameters()).device
    if n < 2:
        raise InputError(f"{name}: {n} labelled cells are too few to score")
    reference_paths = [bundle.tree.paths[i] for i in bundle.path]
    classes, codes = coded([*cells.paths, *reference_paths])
    labels, bank_labels = torch.from_numpy(codes).to(device).split([n, len(reference_paths)])
    trained = [sorted({path[k] for path in reference_paths}) for k in range(len(bundle.levels))]
    unseen = sorted({path[-1] for path in cells.paths} - set(trained[-1]))
    groups = cells.groups if cells.groups is not None and len(np.unique(cells.groups)) > 1 else None
    truth = truth_of(bundle.levels, labels, classes, trained, unseen, groups, graph)

    queries, bank = (Subset(torch.from_numpy(x).to(device), np.arange(len(x))) for x in (cells.vectors, bundle.vectors))
    count, width = bundle.adapter.num_levels, bundle.adapter.scale_dim
    controls, failed = fit_controls(bank.vectors, bundle.path, [width * (j + 1) for j in range(count)])
    encoders = [raw, adapter_encoder(bundle.adapter), controls]
    scores = score_table(truth, queries, encoders, bank_labels, (bank, nearest_rows(bank, queries, encoders)))
    known = LabelledVectors(cells.vectors, codes[:n], classes, bundle.levels)
    answers = kept_answers(bundle, name) if own else answers_of(bundle.annotator, known, truth.seen)
    copies, same = scores.copies["the bank"], scores.copies["other test cells"]
    copies_note = f"{copies:,} cells have an exact copy in the reference, which flatters all figures"
    same_note = f"{same:,} cells have an exact copy among the others, which flatters loo"
    notes = [note for number, note in ((copies, copies_note), (same, same_note)) if number]
    return Scored(
        name=name,
        cells=cells.said,
        levels=bundle.levels,
        blocks=bundle.facts["config"].get("block_levels", range(count)),
        prefixes=scores.groups[1][::-1],
        raw=scores.rows[0],
        controls=scores.groups[2],
        protocols={"bank": "the reference's cells", "loo": "the other scored cells"},
        truth=truth,
        classes=classes,
        paths=np.unique(codes, axis=0),
        studies=cells.studies,
        answers=answers,
        no_answers="" if answers else "the reference was made without test cells",
        facts=[("reference", name), *provenance(bundle.facts, bundle.sha256)],
        warnings=[*cells.notes, *notes, *failed],
    )
