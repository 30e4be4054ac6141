"""One run of `annotate`: what was asked for, then the columns of the cells as they come, then what holds for all."""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm

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
from fractal.base.errors import InputError, warn
from fractal.base.prefetch import prefetch
from fractal.base.storage import Location
from fractal.data.cells import Cells
from fractal.data.expression import choose_counts, open_expression
from fractal.data.labels import Codes
from fractal.data.markers import markers
from fractal.data.parquet import CELL_ID


@dataclass
class Run:
    """`fractal.reference.Reference.run` makes it; `columns` fills what is empty."""

    annotator: Annotator
    confidence: float
    novelty: str
    lines: list[str]  # to print before it
    results: dict[str, Any]  # for uns["fractal"]: what it says of the annotation, and a table of the groups
    answered: pa.Table | None = None  # of all cells: level, label, status, and the labels of all levels

    def columns(self, cells: Cells, origin: Origin, groups: Codes | None = None) -> Iterator[pa.Table]:
        """Yield a row per cell, chunk by chunk: its name where it has one, then `answer_columns`.

        groups: the codes and names of clusters, all cells of which get one label; then all come as one chunk.
        """
        tree, kept = self.annotator.tree, list[pa.Table]()
        check = RowCheck((self.annotator.whole or self.annotator).vectors, cells.num_rows)
        parts: Iterable[tuple[pa.Table, Answer]] = prefetch(self.answers(cells, check))
        if groups is not None:
            parts = [self.voted(parts, groups)]
        for names, answer in parts:
            columns = answer_columns(answer, tree)
            kept.append(columns.select(["level", "label", "status", *tree.levels]))
            yield columns.add_column(0, CELL_ID, names[CELL_ID]) if cells.has_names else columns
        self.answered = pa.concat_tables(kept)
        lines = [line for line in (check.problem(), one_type_warning(self.answered, tree)) if line]
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
        with tqdm(total=cells.num_rows, unit="cells", unit_scale=True, desc="annotate") as bar:
            for columns, vectors in cells.chunks(BATCH):
                check.add(vectors)
                names = columns.select([CELL_ID] if cells.has_names else [])
                yield names, self.annotator.answer(vectors, self.confidence, self.novelty)
                bar.update(len(vectors))

    def voted(self, parts: Iterable[tuple[pa.Table, Answer]], groups: Codes) -> tuple[pa.Table, Answer]:
        """One answer for the cells of a group -> the names of all cells, and their answers."""
        codes, labels = real_groups(*groups)
        names, answers = zip(*parts, strict=True)
        before = Answer.join(answers)
        after = vote(before, codes, self.annotator.tree, self.confidence, self.novelty)
        table = group_columns(before, after, codes, labels, self.annotator.tree)
        self.results["groups"] = table.to_pandas().set_index("group")
        return pa.concat_tables(names), after


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
