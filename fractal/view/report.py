"""What a report shows: a reference scored on labelled cells, or a checkpoint on the cells of eval.py.

Both by 5 neighbours among the reference's or training cells and among the scored ones, and by the answers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
import torch

from fractal.annotate.annotator import Annotator
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.hierarchy.tree import Labels
from fractal.model.embedding import weights_sha256
from fractal.score.checkpoints import Checkpoint, Evaluation
from fractal.score.embeddings import Subset, adapter_encoder, fit_controls, nearest_rows, raw
from fractal.score.table import score_table, truth_of
from fractal.view.labelled import Labelled
from fractal.view.scored import Scored, answers_of, provenance

REFERENCE_CELLS = 50_000  # as `fractal reference` keeps by default
COUNTS = "right", "answered", "right_answered"  # per level, in `answer_counts`


def coded(paths: Sequence[Labels]) -> tuple[list[list[str]], np.ndarray]:
    """Paths (n,) -> the classes of each level, and labels (n, levels) int64 into them."""
    pairs = [np.unique(np.array(column, object), return_inverse=True) for column in zip(*paths, strict=True)]
    return [names.tolist() for names, _ in pairs], np.stack([codes for _, codes in pairs], axis=1)


def kept_answers(
    facts: Mapping[str, Any], levels: Sequence[str], name: str
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """How good the answers were on the test cells when the reference was made, and their counts by class.

    Raises InputError for damaged ones.
    """
    scores, split = facts["scores"], facts.get("split") or {}
    try:
        if not scores["cells"]:
            return {}, []
        for level in levels:
            figures = scores["levels"][level]
            shares = [figures[key] for key in ("coverage", "accuracy_forced", "calibration_error")]
            bins = [(bin["probability"], bin["accuracy"], bin["cells"]) for bin in figures["reliability"]]
            every = [*shares, figures["accuracy"] or 0.0, *(x for p, r, _ in bins for x in (p, r))]
            if not bins or not all(0 <= x <= 1 for x in every):
                raise ValueError("no shares")
            if (
                not all(type(cells) is int and cells > 0 for *_, cells in bins)
                or figures["calibration_noise_floor"] < 0
            ):
                raise ValueError("no counts")
        counts = scores.get("classes", [])  # older references have none
        for row in counts:
            numbers = [row["novel"], *(row[key][k] for key in COUNTS for k in range(len(levels)))]
            if len(row["path"]) != len(levels) or not all(0 <= x <= row["cells"] for x in numbers) or not row["cells"]:
                raise ValueError("no counts")
        types = len(split.get("test_types") or ())
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name}: the scores in bundle.json are damaged; make the reference again") from error
    return {f"test cells ({types} of their types were held out whole)" if types else "test cells": scores}, counts


def score_reference(
    annotator: Annotator,
    facts: Mapping[str, Any],
    name: str,
    weights: str,
    cells: Labelled,
    held_out: bool,
    graph: nx.DiGraph,
) -> Scored:
    """Score labelled cells as eval.py does.

    facts: bundle.json; weights: their sha256; held_out: the cells are the validation cells of the reference, and
    the answers those of its test cells. Raises InputError for fewer than two cells, and for damaged kept answers.
    """
    n, device, tree = len(cells.paths), next(annotator.adapter.parameters()).device, annotator.tree
    if n < 2:
        raise InputError(f"{name}: {n} labelled cells are too few to score")
    reference_paths = [tree.paths[i] for i in annotator.path]
    classes, codes = coded([*cells.paths, *reference_paths])
    labels, bank_labels = torch.from_numpy(codes).to(device).split([n, len(reference_paths)])
    trained = [sorted({path[k] for path in reference_paths}) for k in range(len(tree.levels))]
    new = sorted({path[-1] for path in cells.paths} - set(trained[-1]))
    groups = cells.groups if cells.groups is not None and len(np.unique(cells.groups)) > 1 else None
    truth = truth_of(tree.levels, labels, classes, trained, new, groups, graph)
    queries, bank = (
        Subset(torch.from_numpy(x).to(device), np.arange(len(x))) for x in (cells.vectors, annotator.vectors)
    )
    widths = [annotator.adapter.scale_dim * (j + 1) for j in range(annotator.adapter.num_levels)]
    controls, failed = fit_controls(bank.vectors, annotator.path, widths)
    encoders = [raw, adapter_encoder(annotator.adapter), controls]
    scores = score_table(truth, queries, encoders, bank_labels, (bank, nearest_rows(bank, queries, encoders)))
    title = cells.title
    if held_out:
        answers, counts = kept_answers(facts, tree.levels, name)
        title += "".join(
            f". Answers: of {kept['cells']:,} test cells that nothing has seen" for kept in answers.values()
        )
    else:
        known = LabelledVectors(cells.vectors, codes[:n], classes, tree.levels)
        named = None if groups is None else [cells.studies[code] for code in groups]
        answers, counts = answers_of(annotator, known, truth.seen, named)
    return Scored(
        name=name,
        cells=title,
        levels=tree.levels,
        prefixes=scores.groups[1][::-1],
        raw=scores.rows[0],
        controls=scores.groups[2],
        protocols={"bank": "the reference's cells", "loo": "the other scored cells"},
        truth=truth,
        classes=classes,
        paths=np.unique(codes, axis=0),
        studies=cells.studies,
        answers=answers,
        counts=counts,
        no_answers="" if answers else "the reference was made without test cells",
        facts=[("reference", name), *provenance(facts, weights)],
        warnings=[*cells.notes, *copies(scores.copies), *failed],
    )


def copies(counts: Mapping[str, int]) -> list[str]:
    """A line for each kind of exact copies that flatter the figures."""
    where = {"the bank": "in the reference, which flatters all figures", "other test cells": "among the others, which "
             "flatters loo"}  # fmt: skip
    return [f"{n:,} cells have an exact copy {where[kind]}" for kind, n in counts.items() if n]


def scored_checkpoint(
    models: Sequence[Checkpoint],
    i: int,
    result: Evaluation,
    atlas: Atlas,
    protocols: dict[str, str],
    about: list[str],
    annotator: Annotator | None = None,
) -> Scored:
    """The i-th checkpoint of an evaluation on the cells of an atlas: its rows, and what its reference would answer.

    about: what the cells are, and how they were drawn. protocols: see `Scored`. annotator: of a reference, for cells
    that are all new; else the answers are those of what `fractal reference` would make of the checkpoint.
    """
    model, scores, cells = models[i], result.scores, result.cells
    truth, new_cells = scores.truth, "bank" not in protocols
    try:
        if not new_cells:
            annotator = Annotator.of_atlas(model.adapter, atlas, model.split, REFERENCE_CELLS)
        elif annotator is None:
            raise InputError("a checkpoint has none for cells of another file; name a reference with --model-path")
        queries, named = cells.split(len(truth.seen))[0], None
        if truth.groups is not None:
            named = [atlas.studies[1][code] for code in truth.groups]
        (answers, counts), why = answers_of(annotator, queries, truth.seen, named), ""
    except InputError as error:
        answers, counts, why = {}, [], str(error)
    data = atlas.fingerprint if new_cells else model.split.fingerprint  # `choose_rows` has compared them
    return Scored(
        name=model.name,
        cells="; ".join([str(model), *about]),
        levels=truth.levels,
        prefixes=scores.groups[1 + i][::-1],  # raw comes first
        raw=scores.rows[0],
        controls=[row for group in scores.groups[1 + len(models) :] for row in group],
        protocols=protocols,
        truth=truth,
        classes=cells.classes,
        paths=np.unique(cells.labels, axis=0),
        studies=atlas.studies[1] if truth.groups is not None else (),
        answers=answers,
        counts=counts,
        no_answers=why,
        facts=[
            ("model", model.path.name),
            ("cells scored", f"{atlas.path.name}, sha256 {data}"),
            *provenance(model.facts, weights_sha256(model.adapter)),
        ],
    )
