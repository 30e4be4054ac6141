"""Labelled cells -> an atlas: what ingest.py, `fractal.fit` and a task of `fractal cluster` call.

with Cells.open("cells.h5ad", "X_pca") as cells:
    plan = place_cells(cells.labels("cell_type", "donor"), graph, cells.path)
    write_atlas(path, cells, plan)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import pyarrow as pa

from fractal.base.errors import InputError
from fractal.base.prefetch import prefetch
from fractal.base.storage import Location
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells, names_of
from fractal.data.labels import Codes, Labels
from fractal.data.parquet import ROW_GROUP, atlas_table, write_tables
from fractal.data.vectors import refuse, usable
from fractal.hierarchy.cellxgene import cellxgene_hierarchy
from fractal.hierarchy.ontology import Hierarchy, hierarchy_of, read_hierarchy

LOOKED_AT, GROUPS, FEW = 2_000, 32, 100  # cells and row groups that are drawn; fewer cells say nothing
MAX_COPIES = 0.01  # of the cells; some studies are published twice
MIN_AGREEMENT = 0.1  # of the way from chance to 1; real atlases reach .6 and more


@dataclass(frozen=True)
class Plan:
    """The atlas that cells become: their classes, and its columns."""

    hierarchy: Hierarchy  # with notes on all that was left out, merged or replaced
    classes: np.ndarray  # (n,) int64, into `hierarchy.classes`; -1 for the cells that are left out
    levels: list[Codes]  # per level the code of each class's label (classes,) int64, and the labels, sorted
    studies: list[str] | None  # names; None where the cells have none
    study_codes: np.ndarray | None  # (n,) int
    metadata: Mapping[str, str]  # of the Parquet file

    def columns(self, rows: slice) -> list[Codes]:
        """Of those of these cells that are taken, per text column the (m,) codes and the names."""
        classes = self.classes[rows]
        keep = classes >= 0
        columns = [(codes[classes[keep]], names) for codes, names in self.levels]
        if self.study_codes is not None:
            columns.append((self.study_codes[rows][keep], self.studies or []))
        return columns

    def table(self, rows: slice, vectors: np.ndarray, names: np.ndarray | None, path: Any) -> pa.Table:
        """Those of these cells that are taken, as an atlas has them: vectors (m, dim), names (m,).

        Raises InputError, which names `path`, for a vector that is zero or not finite.
        """
        keep = self.classes[rows] >= 0
        refuse(keep & ~usable(vectors), rows.start, path)
        kept_names = None if names is None else names[keep]
        return atlas_table(vectors[keep], self.columns(rows), self.hierarchy.levels, kept_names)


def place_cells(
    labels: Labels,
    graph: nx.DiGraph,
    source: Any,
    table: Location | None = None,
    unmapped: str | None = None,
    tree: str | None = None,
) -> Plan:
    """The class of each cell, and the columns of the atlas.

    graph: the Cell Ontology; source: what messages and the atlas's metadata call the cells; table: a hierarchy as
    ingest.py writes it, in place of the ontology's; unmapped: what becomes of types that CL does not know, "error"
    (None) or "other"; tree: of the ontology, "published" (None) or "cellxgene".
    Raises InputError for names that have no class, and if no cell is left.
    """
    names = [name for name in dict.fromkeys(labels.names) if name]
    if labels.tree is not None:
        hierarchy = hierarchy_of(names, graph, tree=labels.tree, levels=labels.levels or ())
    elif table:
        levels, edited = read_hierarchy(table)
        hierarchy = hierarchy_of(names, graph, tree=edited, levels=levels)
    else:
        hierarchy = hierarchy_of(names, graph, unmapped or "error")
        if tree == "cellxgene":
            hierarchy = cellxgene_hierarchy(hierarchy, graph)
    number = {row: code for code, row in enumerate(hierarchy.classes)}
    class_of = dict(zip(names, (number[row] for row in hierarchy.rows), strict=True)) | {"": -1}
    classes = np.array([*(class_of[name] for name in labels.names), -1])[labels.codes]
    if not (classes >= 0).any():
        raise InputError(f"{source}: no cell has a label")
    rows = hierarchy.classes
    labels_of = np.array([row.levels for row in rows], object)  # no array of text: each would be as wide as the longest
    columns = [np.unique(column, return_inverse=True) for column in labels_of.T]
    return Plan(
        Hierarchy(hierarchy.levels, hierarchy.rows, [*labels.notes, *hierarchy.notes]),
        classes,
        [(codes, values.tolist()) for values, codes in columns],
        None if labels.study_codes is None else labels.studies,
        labels.study_codes,
        {"cl_release": graph.graph["release"], "anchors_sha256": hierarchy.rules_sha256, "source": str(source)},
    )


def write_atlas(path: Location, cells: Cells, plan: Plan, progress: str = "") -> None:
    """Write the cells that are taken, in their order. progress: the title of a bar; "" shows none."""

    def tables() -> Iterator[pa.Table]:
        start = 0
        for columns, vectors in prefetch(cells.chunks(ROW_GROUP, progress=progress)):
            rows = slice(start, start + len(vectors))
            if (plan.classes[rows] >= 0).any():
                yield plan.table(rows, vectors, names_of(columns), cells.path)
            start += len(vectors)

    write_tables(path, tables(), plan.metadata)


def atlas_in_memory(cells: Cells, plan: Plan) -> Atlas:
    """The same cells as an atlas that is nowhere written; for an AnnData, which is in memory as well."""
    vectors = np.concatenate([x for _, x in cells.chunks()])
    table = plan.table(slice(0, len(vectors)), vectors, None, cells.path)
    return Atlas.of_table(table.replace_schema_metadata(plan.metadata))


def order_warning(atlas: Atlas) -> str:
    """A line if a cell's nearest neighbour has its finest label hardly more often than any cell; "" if it does.

    Then vectors and labels are most likely in different orders. LOOKED_AT cells of at most GROUPS row groups are drawn.
    """
    rng, starts = np.random.default_rng(0), np.cumsum([0, *atlas.data.sizes])
    groups = rng.permutation(len(atlas.data.sizes))[:GROUPS]
    rows = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
    cells = atlas.read(np.sort(rng.permutation(rows)[:LOOKED_AT]))
    labels, n = cells.labels[:, -1], len(cells.labels)
    vectors = cells.vectors / np.linalg.norm(cells.vectors, axis=1, keepdims=True)
    products = vectors @ vectors.T
    np.fill_diagonal(products, -np.inf)
    agree, chance = (labels[products.argmax(1)] == labels).mean(), ((np.bincount(labels) / n) ** 2).sum()
    if n < FEW or agree >= chance + MIN_AGREEMENT * (1 - chance):
        return ""
    return (
        f"warning: the nearest of {n:,} cells has the same {cells.levels[-1]} in {agree:.1%}, and any two have in "
        f"{chance:.1%}: are the vectors in the order of the labels, and made of these cells?"
    )


def copies_warning(atlas: Atlas) -> str:
    """A line if many cells have the vector of another, as where one file was given twice; "" if they have not."""
    copies, n = atlas.num_copies, atlas.num_rows
    if copies <= MAX_COPIES * n:
        return ""
    return f"warning: {copies:,} of {n:,} cells have the vector of an earlier one; was a file given twice?"
