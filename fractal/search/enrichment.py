"""Which values of a column (types, studies, tissues) do the hits have more often than the atlas?

For each group of queries, its distinct hits are held against all cells that the search could have returned: the
hypergeometric test (Fisher's exact test, one-sided), corrected for the number of values tested by Benjamini and
Hochberg. Hits are neighbours of each other and no independent draws, so the p-values order the values; they are no
evidence about single cells.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from scipy.stats import false_discovery_control, hypergeom

from fractal.base.table import table
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
    hits each cell counts once: `hits` of its `of_hits` have the value, and `cells` of `of_cells` that pass the filter.
    The rows are sorted by group, then column, then q_value. Cells without a value count in neither.
    """
    counts = {column: index.counts(column, keep) for column in (index.text_columns if columns is None else columns)}
    counts = {column: of for column, of in counts.items() if 0 < len(of) <= MAX_VALUES}
    names, of_query = list(dict.fromkeys(groups)), np.asarray(groups, object)
    keys, numbers = list[tuple[int, int, str]](), list[tuple[int, int, int, int]]()
    for g, group in enumerate(names):
        cells = np.unique(hits.cells[of_query == group])
        taken = index.take(cells[cells >= 0], list(counts))
        for c, (column, of) in enumerate(counts.items()):
            hit = Counter(taken[column].drop_null().to_pylist())
            keys += [(g, c, value) for value in sorted(hit)]
            numbers += [(hit[value], hit.total(), of[value], of.total()) for value in sorted(hit)]
    if not keys:
        return pa.table({name: [] for name in COLUMNS})
    n, of_hits, with_value, of_cells = np.array(numbers, np.int64).reshape(-1, 4).T
    fold, p_value = (n / of_hits) / (with_value / of_cells), hypergeom.sf(n - 1, of_cells, with_value, of_hits)
    # values that no hit has were tested as well, with p = 1
    tested = len(names) * sum(map(len, counts.values()))
    q_value = false_discovery_control(np.append(p_value, np.ones(tested - len(n))))[: len(n)]
    order = np.lexsort([-fold, q_value, [c for _, c, _ in keys], [g for g, _, _ in keys]])
    text = [names[g] for g, _, _ in keys], [list(counts)[c] for _, c, _ in keys], [value for _, _, value in keys]
    arrays = [*text, n, of_hits, with_value, of_cells, fold, p_value, q_value]
    return pa.table(arrays, names=COLUMNS).take(order)


def summary(enriched: pa.Table, most: int = 3, q_value: float = 0.05) -> str:
    """The first rows of each group and column with at most this q-value, as a table to print."""
    rows, shown = list[list[str]](), Counter[tuple[str, str]]()
    for row in enriched.to_pylist():
        key = row["group"], row["column"]
        if row["q_value"] <= q_value and row["fold"] > 1 and shown[key] < most:
            shown[key] += 1
            share = f"{row['hits']:,} of {row['of_hits']:,}"
            rows.append([*key, row["value"], share, f"{row['fold']:.1f}", *(f"{row[f'{x}_value']:.1e}" for x in "pq")])
    if not rows:
        return f"No value is more frequent among the hits than in the atlas (q <= {q_value:g})."
    return table(["Group", "Column", "Value", "Hits", "Fold", "p", "q"], rows)
