"""What a page is made of: one adapter, scored on n cells by fractal.score.table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fractal.annotate.annotator import Annotator, path_names
from fractal.data.atlas import LabelledVectors
from fractal.score.answers import answer_counts, answer_scores
from fractal.score.table import Truth


@dataclass(frozen=True)
class Scored:
    """The figures of one adapter. Rows are those of `fractal.score.table.score`, with `{protocol}_predicted`."""

    name: str
    cells: str  # what the n cells are, in a few words
    levels: Sequence[str]  # names, coarse to fine
    prefixes: list[dict[str, Any]]  # rows of prefix 1, 2, ..., full
    raw: dict[str, Any]  # row of the raw vectors
    controls: list[dict[str, Any]]  # rows of PCA, LDA and raw cut short; may be empty
    protocols: dict[str, str]  # "loo" and "bank" -> whose cells the neighbours are; conclusions are of the first
    truth: Truth
    classes: Sequence[Sequence[str]]  # per level, the names of truth.labels and of the predictions
    paths: np.ndarray  # (P, levels) int64, the hierarchy in these codes
    studies: Sequence[str] = ()  # names of truth.groups, where there are groups
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)  # whose cells -> what `scores_of` says of them
    counts: list[dict[str, Any]] = field(default_factory=list)  # of the same cells by class, see `answer_counts`
    no_answers: str = ""  # why there are none
    facts: list[tuple[str, str]] = field(default_factory=list)  # provenance
    warnings: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the prefixes, short to long."""
        return [*(f"prefix {j}" for j in range(1, len(self.prefixes))), "full"]

    @property
    def vectors(self) -> list[tuple[str, dict[str, Any]]]:
        """A title and a row of figures each: the prefixes, and the raw vectors."""
        return [*zip(self.names, self.prefixes, strict=True), ("raw", self.raw)]

    @property
    def main(self) -> str:
        """The protocol that conclusions are drawn from."""
        return next(iter(self.protocols))

    @property
    def unit(self) -> str:
        """What the intervals are over."""
        return "cells (Wilson)" if self.truth.groups is None else f"{len(np.unique(self.truth.groups))} studies"

    @property
    def mixed(self) -> bool:
        """Whether there are cells of types that were trained on, and of types that were not."""
        return bool(self.truth.seen.any() and not self.truth.seen.all())

    def apart(self) -> "Scored":
        """With `loo` and `bank` of the types that were trained on alone, where there are others among the cells."""
        if not self.mixed:
            return self

        def of_seen(row: dict[str, Any]) -> dict[str, Any]:
            seen = {protocol: row["seen"][protocol] for protocol in self.protocols}
            return {**row, **seen, **{f"{p}_interval": row["seen_interval"][p] for p in self.protocols}}

        prefixes, controls = ([of_seen(row) for row in rows] for rows in (self.prefixes, self.controls))
        return replace(self, prefixes=prefixes, controls=controls, raw=of_seen(self.raw))

    def counted(self, level: int) -> np.ndarray:
        """(n,) bool: the cells that the figures of `apart` are of, at a level of the first protocol."""
        counts = self.truth.counts[:, level] if self.main == "bank" else np.ones(len(self.truth.seen), bool)
        return counts & self.truth.seen if self.mixed else counts

    def compared(self) -> list[int]:
        """The levels, by number, that have more than one class, and an accuracy."""
        row = self.prefixes[-1][self.main]
        return [
            k for k, name in enumerate(self.levels) if len(np.unique(self.paths[:, k])) > 1 and row[name] is not None
        ]


def answers_of(
    annotator: Annotator, cells: LabelledVectors, seen: np.ndarray, studies: Sequence[str] | None
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The answers for n labelled cells -> their figures, of types that are known (seen, (n,) bool) and of others, and
    the counts of the known ones by class and study (n,)."""
    answer, levels, paths = annotator.answer(cells.vectors), annotator.tree.levels, path_names(cells)
    names = np.array(annotator.tree.paths, object)[answer.path]  # by name: a type may be missing in the tree
    right, answered = names == np.array(paths, object), answer.depth[:, None] > np.arange(len(levels))
    groups = {
        name: {
            "cells": int(mask.sum()),
            "flagged": float(answer.novel[mask].mean()),
            "levels": answer_scores(levels, right[mask], answered[mask], answer.probability[mask]),
        }
        for name, mask in (("seen", seen), ("unseen", ~seen))
        if mask.any()
    }
    known = np.flatnonzero(seen).tolist()
    of_known = None if studies is None else [studies[i] for i in known]
    named = [paths[i] for i in known]
    return groups, answer_counts(named, of_known, right[known], answered[known], answer.novel[known])


def provenance(facts: Mapping[str, Any], weights: str) -> list[tuple[str, str]]:
    """Of a checkpoint or a reference (bundle.json): what it is made of, in lines."""
    known = {key: facts.get(key) for key in ("split", "versions", "training")}
    split, versions, training = (value if isinstance(value, Mapping) else {} for value in known.values())
    config = facts["config"]
    lines = [
        ("recipe", str(config.get("recipe", "unknown"))),
        ("vectors", f"{config['dim']} numbers in, {config['num_levels']} blocks of {config['scale_dim']} out"),
        ("weights (sha256)", weights),
    ]
    lines += [(name, str(facts[key])) for key, name in NAMED if facts.get(key)]
    if split:
        lines.append(("trained on the file with sha256", str(split.get("fingerprint", "unknown"))))
        lines.append(("split", f"{split.get('holdout', 'unknown')} held out, seed {split.get('seed', 'unknown')}"))
        for key in ("test_studies", "test_types"):
            if isinstance(split.get(key), list | tuple) and split[key]:
                lines.append((f"held out {key[5:]}", ", ".join(map(str, split[key]))))
    if "best_epoch" in training:
        lines.append(("epoch", f"{training['best_epoch']} of {training.get('epochs', 'unknown')}"))
    if versions:
        lines.append(("made with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return lines


NAMED = (
    ("data", "data"),
    ("source", "source of the data"),
    ("obsm", "obsm"),
    ("cl_release", "Cell Ontology"),
    ("held_out", "held out"),
    ("reference_cells", "reference cells"),
    ("reference_types", "reference types"),
)
