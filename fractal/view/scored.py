"""What a page is made of: one adapter, scored on n cells by fractal.score.table."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fractal.score.table import Row, Truth

SEEN, UNSEEN = "types that were trained on", "types that were not"


@dataclass(frozen=True)
class Scored:
    """The figures of one adapter. Rows are those of `fractal.score.table.score`, with `{protocol}_predicted`."""

    name: str
    cells: str  # what the n cells are, in a few words
    prefixes: list[Row]  # rows of prefix 1, 2, ..., full
    raw: Row  # row of the raw vectors
    controls: list[Row]  # rows of PCA, LDA and raw cut short; may be empty
    protocols: dict[str, str]  # "loo" and "bank" -> whose cells the neighbours are; conclusions are of the first
    truth: Truth
    classes: Sequence[Sequence[str]]  # per level, the names of truth.labels and of the predictions
    paths: np.ndarray  # (P, levels) int64, the hierarchy in these codes
    studies: Sequence[str] = ()  # names of truth.groups, where there are groups
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)  # whose cells -> what `Annotator.scores` returns
    no_answers: str = ""  # why there are none
    clusters: tuple[list[str], list[list[str]]] | None = None  # of annotated cells: header and rows of a table
    facts: list[tuple[str, str]] = field(default_factory=list)  # provenance
    warnings: list[str] = field(default_factory=list)

    @property
    def levels(self) -> Sequence[str]:
        """Names, coarse to fine."""
        return self.truth.levels

    @property
    def counts(self) -> list[dict[str, Any]]:
        """Rows of `answer_counts`, of the cells of types that were trained on; none without answers of these."""
        return next((scores.get("classes", []) for cells, scores in self.answers.items() if cells != UNSEEN), [])

    @property
    def names(self) -> list[str]:
        """Of the prefixes, short to long."""
        return [*(f"prefix {j}" for j in range(1, len(self.prefixes))), "full"]

    @property
    def vectors(self) -> list[tuple[str, Row]]:
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

        def of_seen(row: Row) -> Row:
            return {**row, **row["seen"], **{f"{p}_interval": each for p, each in row["seen_interval"].items()}}

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
