"""What a report shows: a reference scored on labelled cells, or a checkpoint on the cells of eval.py.

Both by 5 neighbours among the reference's or training cells and among the scored ones, and by the answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch

from fractal.annotate.annotator import Annotator
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.hierarchy.tree import Labels
from fractal.model.embedding import weights_sha256
from fractal.score.checkpoints import Checkpoint, Evaluation
from fractal.score.embeddings import Subset, adapter_encoder, fit_controls, nearest_in, raw
from fractal.score.table import ScoreTable, Truth, score_table, truth_of
from fractal.view.labelled import Labelled
from fractal.view.scored import SEEN, UNSEEN, Scored

REFERENCE_CELLS = 50_000  # as `fractal reference` keeps by default
COPIES = {
    "the bank": "in the reference, which flatters all figures",
    "other test cells": "among the others, which flatters loo",
}
FACTS = {
    "data": "data",
    "source": "source of the data",
    "obsm": "obsm",
    "cl_release": "Cell Ontology",
    "held_out": "held out",
    "reference_cells": "reference cells",
    "reference_types": "reference types",
}
Answers = dict[str, dict[str, Any]]  # whose cells -> what `Annotator.scores` returns


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
    the answers those of its test cells. Raises InputError for fewer than two cells, and for damaged facts.
    """
    n, tree = len(cells.paths), annotator.tree
    if n < 2:
        raise InputError(f"{name}: {n} labelled cells are too few to score")
    reference_paths = [tree.paths[i] for i in annotator.path]
    codes, classes = coded([*cells.paths, *reference_paths])
    trained = [sorted(set(column)) for column in zip(*reference_paths, strict=True)]
    new = sorted({path[-1] for path in cells.paths} - set(trained[-1]))
    groups = cells.groups if cells.groups is not None and len(np.unique(cells.groups)) > 1 else None
    labels = torch.from_numpy(codes).to(next(annotator.adapter.parameters()).device)
    truth = truth_of(tree.levels, labels[:n], classes, trained, new, groups, graph)
    scores, failed = neighbour_scores(annotator, cells.vectors, truth, labels[n:])
    title = cells.title
    try:
        lines = provenance(facts, weights)
        answers = kept_answers(facts, tree.levels) if held_out else {}
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{name}: bundle.json is damaged ({error!r}); make the reference again") from error
    for kept in answers.values():
        title += f". Answers: of {kept['cells']:,} test cells that nothing has seen"
    if not held_out:
        known = LabelledVectors(cells.vectors, codes[:n], classes, tree.levels)
        answers = answers_of(annotator, known, truth.seen, groups, cells.studies)
    return Scored(
        name=name,
        cells=title,
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
        facts=[("reference", name), *lines],
        warnings=[
            *cells.notes,
            *(f"{count:,} cells have an exact copy {COPIES[kind]}" for kind, count in scores.copies.items() if count),
            *failed,
        ],
    )


def neighbour_scores(
    annotator: Annotator, vectors: np.ndarray, truth: Truth, bank_labels: torch.Tensor
) -> tuple[ScoreTable, list[str]]:
    """Score by neighbours among the cells themselves, and among those of the reference -> also what failed.

    vectors (n, dim) float32 of the cells of `truth`; bank_labels (m, levels) int64.
    """
    given, adapter = (vectors, annotator.vectors), annotator.adapter
    queries, bank = (Subset(torch.from_numpy(x).to(bank_labels.device), np.arange(len(x))) for x in given)
    widths = [adapter.scale_dim * j for j in range(1, adapter.num_levels + 1)]
    controls, failed = fit_controls(bank.vectors, annotator.path, widths)
    encoders = [raw, adapter_encoder(adapter), controls]
    near = nearest_in([bank], queries, encoders)
    return score_table(truth, queries, encoders, (bank, bank_labels, near)), failed


def coded(paths: Sequence[Labels]) -> tuple[np.ndarray, list[list[str]]]:
    """Paths (n,) -> labels (n, levels) int64, and the classes of each level that they are codes of."""
    columns = [pd.factorize(np.array(column, object), sort=True) for column in zip(*paths, strict=True)]
    return np.stack([codes for codes, _ in columns], axis=1), [names.tolist() for _, names in columns]


def kept_answers(facts: Mapping[str, Any], levels: Sequence[str]) -> Answers:
    """How good the answers were on the test cells when the reference was made. Raises KeyError and the like."""
    scores, types = facts["scores"], len((facts.get("split") or {}).get("test_types") or ())
    if not scores["cells"]:
        return {}
    scores = {**scores, "levels": {level: {**scores["levels"][level]} for level in levels}}
    return {f"test cells ({types} of their types were held out whole)" if types else "test cells": scores}


def answers_of(
    annotator: Annotator, cells: LabelledVectors, seen: np.ndarray, groups: np.ndarray | None, studies: Sequence[str]
) -> Answers:
    """How good the answers are on n labelled cells of types that are known (seen, (n,) bool), and on others.

    groups: (n,) codes of `studies`, or None.
    """
    answers = {}
    for name, mask in ((SEEN, seen), (UNSEEN, ~seen)):
        if mask.any():
            part = replace(cells, vectors=cells.vectors[mask], labels=cells.labels[mask])
            named = None if groups is None else [studies[code] for code in groups[mask]]
            answers[name] = annotator.scores(part, named)
    return answers


def provenance(facts: Mapping[str, Any], weights: str) -> list[tuple[str, str]]:
    """Of a checkpoint or a reference (bundle.json): what it is made of, in lines. Raises KeyError and the like."""
    split, versions, training = (facts.get(key) or {} for key in ("split", "versions", "training"))
    config = facts["config"]
    lines = [
        ("recipe", str(config.get("recipe", "unknown"))),
        ("vectors", f"{config['dim']} numbers in, {config['num_levels']} blocks of {config['scale_dim']} out"),
        ("weights (sha256)", weights),
        *((name, str(facts[key])) for key, name in FACTS.items() if facts.get(key)),
    ]
    if split:
        lines.append(("trained on the file with sha256", split["fingerprint"]))
        lines.append(("split", f"{split['holdout']} held out, seed {split['seed']}"))
        held_out = {key: split.get(f"test_{key}") for key in ("studies", "types")}
        lines += [(f"held out {key}", ", ".join(map(str, names))) for key, names in held_out.items() if names]
    if "best_epoch" in training:
        lines.append(("epoch", f"{training['best_epoch']} of {training.get('epochs', 'unknown')}"))
    if versions:
        lines.append(("made with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return lines


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
    studies = [] if truth.groups is None else atlas.studies[1]
    try:
        if not new_cells:
            annotator = Annotator.of_atlas(model.adapter, atlas, model.split, REFERENCE_CELLS)
        elif annotator is None:
            raise InputError("a checkpoint has none for cells of another file; name a reference with --model-path")
        queries = cells.split(len(truth.seen))[0]
        answers, why = answers_of(annotator, queries, truth.seen, truth.groups, studies), ""
    except InputError as error:
        answers, why = {}, str(error)
    data = atlas.fingerprint if new_cells else model.split.fingerprint  # `choose_rows` has compared them
    return Scored(
        name=model.name,
        cells="; ".join([str(model), *about]),
        prefixes=scores.groups[1 + i][::-1],  # raw comes first
        raw=scores.rows[0],
        controls=[row for group in scores.groups[1 + len(models) :] for row in group],
        protocols=protocols,
        truth=truth,
        classes=cells.classes,
        paths=np.unique(cells.labels, axis=0),
        studies=studies,
        answers=answers,
        no_answers=why,
        facts=[
            ("model", model.path.name),
            ("cells scored", f"{atlas.path.name}, sha256 {data}"),
            *provenance(model.facts, weights_sha256(model.adapter)),
        ],
    )
