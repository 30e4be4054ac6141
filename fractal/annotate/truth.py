"""How good the answers are where the labels are known: accuracy per level, per type, and what is confused."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow as pa
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from fractal.base.errors import printable
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.hierarchy.matching import match_names
from fractal.hierarchy.tree import Tree, nodes_of
from fractal.score.metrics import hierarchical_f1

CONFUSIONS = 15  # rows of the table


@dataclass(frozen=True)
class Truth:
    """Labels that are known."""

    column: str
    codes: np.ndarray  # (n,) of the names, -1 for none
    names: Sequence[str]  # the reference's finest labels; others where it has none for a cell
    unknown: Sequence[str] = ()  # of these names, what the Cell Ontology does not know either

    @staticmethod
    def of(column: str, codes: np.ndarray, names: Sequence[str], tree: Tree, graph: nx.DiGraph | None) -> "Truth":
        """Names as people write them: a reference's label, or its term of the ontology by name, synonym or id.

        graph: the Cell Ontology; None where the reference's labels are not of it.
        """
        found = tree.find(names, graph)
        lacking = [name for name, path in zip(names, found, strict=True) if path is None]
        terms = {} if graph is None else match_names(lacking, graph)
        meant = [name if path is None else path[-1] for name, path in zip(names, found, strict=True)]
        return Truth(column, codes, meant, [name for name, (term, _) in terms.items() if not term])


def known_cells(answered: pa.Table, truth: Truth, tree: Tree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which cells (n,) have an answer and a label that the reference has -> the mask; true and answered paths of these.

    answered: columns of the output.
    """
    position = {path[-1]: i for i, path in enumerate(tree.paths)}
    true = np.array([*(position.get(name, -1) for name in truth.names), -1])[truth.codes]
    given = answered[tree.levels[-1]].to_pandas().map(position).astype(float).fillna(-1).to_numpy(int)
    known = (true >= 0) & (given >= 0)
    return known, true[known], given[known]


def report(answered: pa.Table, truth: Truth, tree: Tree) -> str:
    """Markdown tables; arguments as of `known_cells`.

    Cells of types that the reference lacks are counted, and stand in no figure but that of how many are flagged.
    """
    known, true, given = known_cells(answered, truth, tree)
    finest = [path[-1] for path in tree.paths]
    unseen = np.array([*(name not in finest for name in truth.names), False])[truth.codes]
    lines = [f"{known.sum():,} cells whose {truth.column} the reference has"]
    if unseen.any():
        flagged = (answered["status"].to_pandas().to_numpy(object)[unseen] == "novel").mean()
        lines[0] += f"; {unseen.sum():,} of other types, {flagged:.1%} of them flagged as novel"
    if truth.unknown:
        names = ", ".join(f"'{printable(name)}'" for name in truth.unknown[:3])
        lines[0] += f"; {len(truth.unknown)} of the names are none of the Cell Ontology's, such as {names}: rename them"
    if not known.any():
        return lines[0]
    level = answered["level"].to_pandas().to_numpy(object)[known]
    depth = np.array([["none", *tree.levels].index(name) for name in level])
    rows = []
    for k, name in enumerate(tree.levels):
        label = tree.names(k)[0]
        right, reached = label[given] == label[true], depth > k
        accuracy = f"{right[reached].mean():.3f}" if reached.any() else "-"
        rows.append([name, f"{right.mean():.3f}", f"{reached.mean():.3f}", accuracy])
    lines.append(table(["Level", "Accuracy, all cells", "Answered", "Accuracy, answered"], rows))
    above = np.array([[path[: len(node)] == node for node in nodes_of(tree.paths)] for path in tree.paths])
    lines.append(f"hierarchical F1 of the finest labels: {hierarchical_f1(given, true, above) or 0.0:.3f}")
    return "\n\n".join([*lines, *type_tables(true, given, finest)])


def type_tables(true: np.ndarray, given: np.ndarray, types: Sequence[str]) -> list[str]:
    """Precision and recall of each type, and the commonest confusions, of paths (n,)."""
    present = sorted(set(true), key=types.__getitem__)
    figures = precision_recall_fscore_support(true, given, labels=present, zero_division=0)
    rows = [
        [types[path], *(f"{value:.3f}" for value in row[:3]), f"{row[3]:,}"]
        for path, *row in zip(present, *figures, strict=True)
    ]
    mean = [f"{figure.mean():.3f}" for figure in figures[:3]]
    tables = [table(["Type", "Precision", "Recall", "F1", "Cells"], [*rows, ["mean of the types", *mean, ""]])]
    pairs, count = np.unique(np.stack([true, given], 1)[true != given], axis=0, return_counts=True)
    cells = np.bincount(true, minlength=len(types))
    confused = [(n, types[a], types[b], n / cells[a]) for (a, b), n in zip(pairs, count, strict=True)]
    rows = [
        [f"{a} -> {b}", f"{n:,}", f"{share:.3f}"]
        for n, a, b, share in sorted(confused, key=lambda row: (-row[0], row[1], row[2]))[:CONFUSIONS]
    ]
    return [*tables, table(["Confusion (true -> answered)", "Cells", "Share of the type"], rows)] if rows else tables


def draw_confusions(file: Path, answered: pa.Table, truth: Truth, tree: Tree) -> None:
    """Write a picture: the share of each true type's cells by the finest label that they were given.

    Types stand in the order of the tree, with a line where the second level changes: mistakes within a lineage lie near
    the diagonal. Arguments are those of `report`; nothing is written where no cell has a label that the reference has.
    """
    known, true, given = known_cells(answered, truth, tree)
    if not known.any():
        return
    order = sorted({*true, *given}, key=tree.paths.__getitem__)
    shown = [tree.paths[i] for i in order]
    types = [path[-1] for path in shown]
    share = confusion_matrix(true, given, labels=order, normalize="true")
    side = 1.5 + 0.25 * len(types) + 0.07 * max(map(len, types))  # inches: a type takes .25, a letter of 8 points .07
    from matplotlib.figure import Figure  # half a second to load

    figure = Figure((side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(types)), types, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(types)), types, fontsize=8, parse_math=False)
    axes.set_xlabel("answered")
    axes.set_ylabel(truth.column, parse_math=False)
    for i in range(1, len(shown)):
        if shown[i][:2] != shown[i - 1][:2]:
            axes.axhline(i - 0.5, color="grey", linewidth=0.5)
            axes.axvline(i - 0.5, color="grey", linewidth=0.5)
    figure.colorbar(image, label="share of the true type", shrink=0.5, aspect=15)
    with atomic_write(file) as part:
        figure.savefig(part, format=file.suffix[1:].lower(), dpi=150)
