"""One run of `annotate`: what was asked for, then the columns of the cells as they come, then what holds for all."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa

from fractal.annotate.annotator import Annotator
from fractal.annotate.answers import (
    CONFIDENCE,
    Answer,
    answer_columns,
    group_columns,
    one_type_warning,
    real_groups,
    vote,
)
from fractal.annotate.novelty import NOVELTY
from fractal.annotate.query import Origin
from fractal.annotate.space import RowCheck
from fractal.annotate.votes import BATCH
from fractal.base.errors import InputError, reason, warn
from fractal.base.prefetch import prefetch
from fractal.base.storage import Location
from fractal.data.cells import Cells
from fractal.data.expression import choose_counts, open_expression
from fractal.data.h5ad import fractal_uns, open_anndata
from fractal.data.labels import Codes
from fractal.data.markers import markers
from fractal.data.parquet import CELL_ID

MARKERS = 5  # genes that the table of clusters shows
CLUSTERS = {  # columns of `group_columns` -> what that table calls them
    "cells": "Cells",
    "label": "Label",
    "level": "Level",
    "confidence": "Probability",
    "agreement": "Cells that agree",
    "withheld_by": "Not deeper by",
    "runner_up": "Next best",
    "runner_up_probability": "Probability",
}

Clusters = tuple[list[str], list[list[str]]]  # header and rows of that table


@dataclass
class Run:
    """`fractal.reference.Reference.run` makes it; `columns` fills what is empty."""

    annotator: Annotator
    confidence: float
    novelty: str
    lines: list[str]  # to print before it
    results: dict[str, Any]  # for uns["fractal"]: "annotation", and the tables "groups" and "markers", or None
    answered: pa.Table | None = None  # of all cells: level, label, status, and the labels of all levels

    def columns(self, cells: Cells, origin: Origin, groups: Codes | None = None) -> Iterator[pa.Table]:
        """Yield a row per cell, chunk by chunk: its name where it has one, then `answer_columns`.

        groups: the codes and names of clusters, all cells of which get one label; then all come as one chunk.
        """
        tree, kept = self.annotator.tree, list[pa.Table]()
        check = RowCheck((self.annotator.whole or self.annotator).vectors, cells.num_rows)
        parts: Iterable[tuple[pa.Table, Answer]] = prefetch(self.answers(cells, check))
        own = None  # answers of the cells, before those of a group get one
        if groups is not None:
            names, own, voted = self.voted(parts, groups)
            parts = [(names, voted)]
        for names, answer in parts:
            columns = answer_columns(answer, tree)
            kept.append(columns.select(["level", "label", "status", *tree.levels]))
            yield columns.add_column(0, CELL_ID, names[CELL_ID]) if cells.has_names else columns
        self.answered = pa.concat_tables(kept)
        alike = one_type_warning(self.answered if own is None else answer_columns(own, tree), tree)
        lines = [line for line in (check.problem(), alike) if line]
        for line in lines:
            warn(f"{cells.path}: {line}")
        warning = "; ".join(filter(None, (origin.warning, *lines)))
        self.results["annotation"] |= {"vectors": origin.vectors, "warning": warning}

    def add_markers(self, cells: Any, groups: Codes) -> None:
        """Put a table of the genes that set each cluster apart beside that of the groups.

        cells: AnnData, or path of an .h5ad or .zarr, with counts, or values log-normalised from them.
        """
        with open_expression(cells) as (_, matrix):
            codes, names = real_groups(*groups)
            where = cells if isinstance(cells, Location) else "adata"
            self.results["markers"] = markers(choose_counts(matrix, where), codes, names, progress="markers")

    def answers(self, cells: Cells, check: RowCheck) -> Generator[tuple[pa.Table, Answer], None, None]:
        """The names, if there are any, and the answer of each chunk, all of whose vectors are checked."""
        for columns, vectors in cells.chunks(BATCH, progress="annotate"):
            check.add(vectors)
            names = columns.select([CELL_ID] if cells.has_names else [])
            yield names, self.annotator.answer(vectors, self.confidence, self.novelty)

    def voted(self, parts: Iterable[tuple[pa.Table, Answer]], groups: Codes) -> tuple[pa.Table, Answer, Answer]:
        """One answer for the cells of a group -> the names of all cells, the answers before, and those after."""
        codes, labels = real_groups(*groups)
        names, answers = zip(*parts, strict=True)
        before = Answer.join(answers)
        after = vote(before, codes, self.annotator.tree, self.confidence, self.novelty)
        table = group_columns(before, after, codes, labels, self.annotator.tree)
        self.results["groups"] = table.to_pandas().set_index("group")
        return pa.concat_tables(names), before, after


def read_clusters(annotated: Any, adapter_sha256: str) -> Clusters:
    """The table of the clusters of an AnnData, .h5ad or .zarr, which `annotate --over` has put into uns["fractal"].

    Raises InputError where it says nothing, or was annotated by another reference.
    """
    with open_anndata(annotated) as (file, path):
        results = fractal_uns(file, path)
    if not isinstance(results.get("groups"), pd.DataFrame):
        raise InputError(f"{path}: has no answers by cluster; `annotate` writes them, asked for by the column (over)")
    if (results.get("annotation") or {}).get("adapter_sha256") != adapter_sha256:
        raise InputError(f"{path}: its clusters were annotated by another reference; annotate it again with this one")
    try:
        return cluster_table(results, "Cluster")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its table of clusters is damaged ({reason(error)}); annotate it again") from error


def cluster_table(results: Mapping[str, Any], column: str) -> Clusters:
    """A row per cluster, from `Run.results`: its answer, and the first of its markers, if there are any."""
    frame = results["groups"].reset_index()[["group", *CLUSTERS]].astype(object)
    numbers = ["confidence", "agreement", "runner_up_probability"]
    frame[numbers] = frame[numbers].map(lambda value: "" if value != value else f"{value:.3f}")
    header = [column, *CLUSTERS.values()]
    if results.get("markers") is not None:
        genes = results["markers"].groupby("group", sort=False)["gene"].agg(lambda names: ", ".join(names[:MARKERS]))
        header.insert(3, "Markers")  # beside the label, which they are to be compared with
        frame.insert(3, "markers", frame["group"].map(genes))
    return header, frame.where(frame.notna(), "").astype(str).to_numpy().tolist()


def check_answers(confidence: float, novelty: str, error: float | None = None) -> None:
    """Raises InputError for what `annotate` can't be asked."""
    if not 0 < confidence <= 1:
        raise InputError(f"confidence {confidence:g}: must be above 0 and at most 1")
    if error is not None and not 0 < error < 1:
        raise InputError(f"error {error:g}: must be above 0 and below 1")
    if error is not None and confidence != CONFIDENCE:
        raise InputError("give either a confidence or an error: either says how deep the answers go")
    if novelty not in NOVELTY:
        raise InputError(f"novelty '{novelty}': is one of {', '.join(NOVELTY)}")
