"""Which values of a column (types, studies, tissues) do the hits have more often than the atlas?

For each group of queries, its distinct hits are held against all cells that the search could have found: the
hypergeometric test (Fisher's exact test, one-sided), corrected for the number of values tested by Benjamini and
Hochberg. Hits are neighbours of each other and no independent draws, so the p-values order the values; they are no
evidence about single cells.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from scipy.stats import false_discovery_control, hypergeom

from fractal.base.cli import table
from fractal.search.index import Hits, Index

MAX_VALUES = 10_000  # a column with more distinct values, such as a barcode, is left out
COLUMNS = ("group", "column", "value", "hits", "of_hits", "cells", "of_cells", "fold", "p_value", "q_value")


def enrichment(
    index: Index,
    hits: Hits,
    groups: Sequence[str],
    columns: Sequence[str] | None = None,
    keep: np.ndarray | None = None,
) -> pa.Table:
    """Hits of n queries that belong to groups (n,) -> a row per group, column and value that a hit of it has.

    columns: text columns (default: all of few values). keep: the filter of the search, (len(index),) bool. Of a group's
    hits each cell counts once: `hits` of its `of_hits` have the value, and `cells` of `of_cells` that could be found.
    The rows are sorted by group, then column, then q_value. Cells without a value count in neither.
    """
    columns = index.text_columns() if columns is None else list(columns)
    names = list(dict.fromkeys(groups))
    found: dict[str, list] = {name: [] for name in COLUMNS}
    atlas = {column: index.counts(column, keep) for column in columns}
    columns = [column for column in columns if 0 < len(atlas[column]) <= MAX_VALUES]
    of_group = np.asarray(groups, object)
    for group in names:
        cells = np.unique(hits.cells[of_group == group])
        taken = index.take(cells[cells >= 0], columns)
        for column in columns:
            counts = Counter(taken[column].drop_null().to_pylist())
            total, drawn = sum(atlas[column].values()), counts.total()
            for value, count in sorted(counts.items()):
                cells_with = atlas[column][value]
                row = (group, column, value, count, drawn, cells_with, total)
                fold = (count / drawn) / (cells_with / total)
                p_value = float(hypergeom.sf(count - 1, total, cells_with, drawn))
                for name, entry in zip(COLUMNS, (*row, fold, p_value, 1.0), strict=True):
                    found[name].append(entry)
    if found["p_value"]:
        # values that no hit has were tested as well, with p = 1
        tested = len(names) * sum(len(atlas[column]) for column in columns)
        p_values = np.concatenate([found["p_value"], np.ones(tested - len(found["p_value"]))])
        found["q_value"] = false_discovery_control(p_values)[: len(found["p_value"])].tolist()
    place = {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(columns)}

    def by(i: int) -> tuple[float, ...]:
        return place[0][found["group"][i]], place[1][found["column"][i]], found["q_value"][i], -found["fold"][i]

    order = sorted(range(len(found["group"])), key=by)
    return pa.table({name: [values[i] for i in order] for name, values in found.items()})


def summary(found: pa.Table, most: int = 3, q_value: float = 0.05) -> str:
    """The first rows of each group and column with at most this q-value, as a table to print."""
    rows, shown = [], dict[tuple[str, str], int]()
    for row in found.to_pylist():
        key = row["group"], row["column"]
        if row["q_value"] <= q_value and row["fold"] > 1 and shown.setdefault(key, 0) < most:
            shown[key] += 1
            rows.append([
                *key,
                row["value"],
                f"{row['hits']:,} of {row['of_hits']:,}",
                f"{row['fold']:.1f}",
                f"{row['p_value']:.1e}",
                f"{row['q_value']:.1e}",
            ])  # fmt: skip
    if not rows:
        return f"No value is more frequent among the hits than in the atlas (q <= {q_value:g})."
    return table(["Group", "Column", "Value", "Hits", "Fold", "p", "q"], rows)
