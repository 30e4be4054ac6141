"""Cells and their types -> their classes, and the columns of an atlas: what ingest.py and `fractal cluster` share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np

from fractal.base.cli import InputError
from fractal.data.h5ad import LabelledCells
from fractal.data.scimilarity import Release
from fractal.hierarchy.names import clean, is_missing
from fractal.hierarchy.ontology import Hierarchy, hierarchy_of, read_hierarchy


def type_names(cells: Release | LabelledCells, label_map: Mapping[str, str] | None) -> list[str]:
    """The names of the types, cleaned and mapped; "" for those whose cells are left out."""
    names = [clean(name) for name in cells.types]
    if label_map and isinstance(cells, Release):  # an .h5ad is opened with its map
        if unused := sorted(set(label_map) - set(names)):
            print(f"warning: the label map has names that no type has: {'; '.join(unused)}")
        names = [label_map.get(name, name) for name in names]
    return ["" if is_missing(name) else name for name in names]


def place_cells(
    cells: Release | LabelledCells,
    names: list[str],
    graph: nx.DiGraph,
    source: Path,
    table: Path | None = None,
    unmapped: str | None = None,
) -> tuple[np.ndarray, Hierarchy]:
    """-> the class of each cell (n,) int64, into `hierarchy.classes`, -1 for those left out; and the hierarchy.

    names: of `type_names`. table: a hierarchy as ingest.py writes it, in place of the ontology's. unmapped: what
    becomes of types that CL does not know, "error" (None) or "other". source: what messages call the cells.
    """
    known = [name for name in dict.fromkeys(names) if name]
    if isinstance(cells, LabelledCells) and cells.labels.tree is not None:
        hierarchy = hierarchy_of(known, graph, tree=cells.labels.tree, levels=cells.labels.levels or ())
    elif table:
        levels, tree = read_hierarchy(table)
        hierarchy = hierarchy_of(known, graph, tree=tree, levels=levels)
    else:
        hierarchy = hierarchy_of(known, graph, unmapped or "error")
    number = {row: code for code, row in enumerate(hierarchy.classes)}
    class_of = dict(zip(known, (number[row] for row in hierarchy.rows), strict=True)) | {"": -1}
    codes = np.array([*(class_of[name] for name in names), -1])[cells.type_codes]
    notes = cells.labels.notes if isinstance(cells, LabelledCells) else cells.notes
    left_out = int(((codes < 0) & (cells.type_codes >= 0)).sum())
    missing = [f"{left_out:,} of {len(codes):,} cells left out: the label map has no name for them"] if left_out else []
    if not (codes >= 0).any():
        raise InputError(f"{source}: no cell has a label")
    return codes, Hierarchy(hierarchy.levels, hierarchy.rows, [*notes, *missing, *hierarchy.notes])


def atlas_metadata(hierarchy: Hierarchy, graph: nx.DiGraph, source: Path) -> dict[str, str]:
    """For the schema of the atlas, see fractal/data/parquet.py."""
    return {
        "cl_release": graph.graph["release"],
        "anchors_sha256": hierarchy.rules_sha256,
        "source": str(source),
    }


@dataclass(frozen=True)
class ClassColumns:
    """The level columns of an atlas for cells of known classes."""

    levels: tuple[str, ...]
    names: list[list[str]]  # per level
    codes: list[np.ndarray]  # per level: of each class, the code of its name

    @staticmethod
    def of(hierarchy: Hierarchy) -> "ClassColumns":
        found = [
            np.unique([row.levels[k] for row in hierarchy.classes], return_inverse=True)
            for k in range(len(hierarchy.levels))
        ]
        names = [list(map(str, values)) for values, _ in found]
        return ClassColumns(tuple(hierarchy.levels), names, [codes for _, codes in found])

    def columns(self, classes: np.ndarray) -> list[tuple[np.ndarray, list[str]]]:
        """Classes (m,) -> per level the (m,) codes and their names, as `fractal.data.parquet.Writer.append` takes
        them."""
        return [(codes[classes], names) for codes, names in zip(self.codes, self.names, strict=True)]
