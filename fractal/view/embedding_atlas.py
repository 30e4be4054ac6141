"""Hand-over to Apple's Embedding Atlas (package embedding-atlas), which shows millions of cells in a browser.

    embedding-atlas cells.parquet --x x_4 --y y_4 --neighbors neighbors

The file has, after the columns of the cells, x_1, y_1, x_2, ...: a layout per prefix (fractal.view.maps), of which the
package shows one at a time; and `neighbors`, a struct {ids, distances}: rows of the nearest cells by full vector.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import normalize

from fractal.annotate.annotator import Annotator
from fractal.annotate.answers import answer_columns
from fractal.annotate.neighbours import Neighbours
from fractal.base.errors import InputError
from fractal.data.parquet import CELL_ID, ROW_GROUP, write_tables
from fractal.data.vectors import refuse, usable
from fractal.view.maps import Maps
from fractal.view.shown import Shown

NEIGHBORS = 15  # as many as the package itself computes


def write_embedding_atlas(path: str | Path, maps: Maps, vectors: np.ndarray, columns: pa.Table) -> None:
    """Write cells for Embedding Atlas, whole or not at all.

    vectors (n, D) float32: as `Maps.transform` takes them; columns: a table of n rows, such as names and labels, of
    which those with the names of the new ones are replaced. Distances are 1 - cosine. Raises InputError for vectors
    that are zero or not finite, and for fewer than two cells.
    """
    refuse(~usable(vectors), 0, path)
    if len(vectors) < 2:
        raise InputError(f"{len(vectors)} cells are too few to have neighbours; it takes 2")
    new: dict[str, pa.Array] = {}
    for j, layout in enumerate(maps.transform(vectors), 1):
        new |= {f"x_{j}": pa.array(layout[:, 0].copy()), f"y_{j}": pa.array(layout[:, 1].copy())}
    new["neighbors"] = neighbor_column(vectors)
    kept = {name: columns[name] for name in columns.column_names if name not in new}
    table = pa.table({**kept, **new})
    write_tables(path, (table.slice(start, ROW_GROUP) for start in range(0, len(table), ROW_GROUP)), {})


def neighbor_column(vectors: np.ndarray) -> pa.StructArray:
    """vectors (n, D) -> structs of the rows of the nearest other cells and their distances, nearest first."""
    unit = normalize(torch.from_numpy(np.ascontiguousarray(vectors, np.float32)), dim=1)
    k = min(NEIGHBORS, len(unit) - 1)
    cosine, rows = (part.numpy() for part in Neighbours(unit)(unit, k + 1))
    others = rows != np.arange(len(rows))[:, None]
    others[others.all(1), -1] = False  # a cell with many equals may not be among its neighbours: the last one goes
    ids, distances = rows[others].astype(np.int64), np.maximum(1 - cosine[others], 0).astype(np.float32)
    offsets = pa.array(np.arange(0, len(ids) + 1, k, dtype=np.int32))
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, distances)]
    return pa.StructArray.from_arrays(lists, ["ids", "distances"])


def atlas_columns(annotator: Annotator, shown: Shown) -> pa.Table:
    """What Embedding Atlas shows of the cells beside the maps: names, a label per level, and their columns."""
    tree = annotator.tree
    if shown.labels is None:
        answers = answer_columns(annotator.answer(shown.vectors), tree)
        names = ("label", "status", *tree.levels)
        labels = {name: answers[name].cast(pa.string()).fill_null("") for name in names}
    else:
        path_of = {path[-1]: path for path in tree.paths}
        paths = [path_of.get(name, ("",) * len(tree.levels)) for name in shown.labels]
        labels = dict(zip(tree.levels, map(pa.array, zip(*paths, strict=True)), strict=True))
    columns = {name: pa.array(values, from_pandas=True) for name, values in shown.columns.items()}
    return pa.table({**({} if shown.names is None else {CELL_ID: shown.names}), **labels, **columns})
