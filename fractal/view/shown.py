"""The cells of a page: drawn at random from those of a file or an AnnData, with labels and columns to colour by."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from fractal.base.errors import InputError
from fractal.data.cells import Cells, names_of
from fractal.data.parquet import CELL_ID
from fractal.data.vectors import usable
from fractal.hierarchy.names import clean, is_missing
from fractal.view.genes import Genes

MAX_CELLS = 20_000  # shown by default; a page of 128-d vectors then stays under 15 MB
MAX_VALUES = 200  # of a column that colours cells
DEFAULT_COLUMNS, DEFAULT_VALUES = 8, 60


@dataclass(frozen=True)
class Shown:
    """The cells of a page, n of the `total` of their file."""

    vectors: np.ndarray  # (n, dim) float32, usable
    total: int
    names: Sequence[str] | None = None
    labels: Sequence[str] | None = None  # of the finest level; None: the reference's answers are shown
    columns: Mapping[str, pd.Series] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, int))  # (n,) of the cells in their file, ascending
    genes: Genes | None = None


def read_shown(
    cells: Cells, labels: str | None = None, columns: Sequence[str] | None = None, max_cells: int | None = MAX_CELLS
) -> Shown:
    """At most max_cells of the usable cells, drawn at random, in the order of the file.

    labels: column of types, by default an atlas's finest level; columns: others to colour by, by default those of text
    with 2 to 60 values. Raises InputError for a column that is not there, and without any usable cell.
    """
    rows = np.sort(np.random.default_rng(0).permutation(cells.num_rows)[:max_cells])
    vectors, table = cells.take(rows, obs=True)
    good = np.flatnonzero(usable(vectors))
    if not len(good):
        raise InputError(f"{cells.path}: none of the cells drawn has a usable vector")
    table = table.take(good)
    names = names_of(table)
    chosen = choose(table.to_pandas(), labels, columns, cells.path)
    return Shown(vectors[good], cells.num_rows, None if names is None else names.tolist(), *chosen, rows[good])


def choose(
    frame: pd.DataFrame, labels: str | None, columns: Sequence[str] | None, where: object
) -> tuple[list[str] | None, dict[str, pd.Series]]:
    """The table of the cells -> their labels, and the columns to colour by; see `read_shown`."""
    levels = [name for name in sorted(map(str, frame.columns)) if re.match(r"level[1-9]_.", name)]  # of an atlas
    labels = labels or (levels[-1] if levels else None)
    if missing := [name for name in (*(columns or ()), labels) if name is not None and name not in frame]:
        there = ", ".join(map(str, frame.columns)) or "none"
        raise InputError(f"{where}: has no column '{missing[0]}'; it has {there}")
    if columns is None:
        others = [name for name in frame if name not in (*levels, labels, CELL_ID)]
        text = [name for name in others if frame[name].dtype.kind not in "iufM"]
        columns = [name for name in text if 2 <= frame[name].nunique() <= DEFAULT_VALUES][:DEFAULT_COLUMNS]
    types = None if labels is None else [clean(str(name)) for name in frame[labels]]
    return types, {name: frame[name] for name in columns}


def encoded(columns: Mapping[str, pd.Series]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """-> what the page says of each column, and the arrays: codes with 0 for missing, or float32."""
    about, arrays = [], dict[str, np.ndarray]()
    for i, (name, values) in enumerate(columns.items()):
        if values.dtype.kind in "iuf":
            numbers = values.to_numpy(np.float32, na_value=np.nan)
            known = numbers[np.isfinite(numbers)]
            low, high = np.quantile(known, [0.01, 0.99]).tolist() if len(known) else (0.0, 1.0)
            about.append({"name": name, "low": low, "high": high})
            arrays[f"column_{i}"] = numbers
            continue
        text = values.astype(object).map(lambda value: None if value is None or is_missing(str(value)) else str(value))
        codes = pd.Categorical(text)
        if len(codes.categories) > MAX_VALUES:
            raise InputError(f"column '{name}' has {len(codes.categories)} values, at most {MAX_VALUES} can be shown")
        about.append({"name": name, "values": list(codes.categories)})
        arrays[f"column_{i}"] = (codes.codes + 1).astype(np.uint8 if len(codes.categories) < 256 else np.uint16)
    return about, arrays
