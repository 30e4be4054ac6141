"""How good the answers are where the labels are known: accuracy per level, per type, and what is confused."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from fractal.base.cli import table
from fractal.base.files import atomic_write
from fractal.score.metrics import hierarchical_f1

CONFUSIONS = 15  # rows of the table


def report(
    answered: dict[str, np.ndarray],
    codes: np.ndarray,
    names: Sequence[str],
    paths: Sequence[tuple[str, ...]],
    levels: Sequence[str],
    column: str,
) -> str:
    """Markdown tables. answered: columns of the output, (n,) each; codes (n,) of the true `names`, -1 for none.

    A true label is one of the reference's finest names; the labels above it are those of its path. Other cells are
    counted, and stand in no figure but that of how many of them are flagged as novel.
    """
    path_of = {path[-1]: path for path in paths}
    listed = has_label(codes, names, paths)
    known = listed & (answered["status"] != "invalid")
    strange = (codes >= 0) & ~listed
    lines = [f"{known.sum():,} cells whose {column} the reference has"]
    if strange.any():
        flagged = (answered["status"][strange] == "novel").mean()
        lines[0] += f"; {strange.sum():,} of other types, {flagged:.1%} of them flagged as novel"
    if not known.any():
        return lines[0]
    true = np.array([path_of.get(name, ("",) * len(levels)) for name in names], object)[codes[known]]
    said = np.stack([answered[level][known] for level in levels], axis=1)
    position = {name: i for i, name in enumerate(("none", *levels))}
    depth = np.array([position[level] for level in answered["level"][known]])
    right = said == true
    share = lambda hits: f"{hits.mean():.3f}" if len(hits) else "-"  # noqa: E731
    rows = [[level, share(right[:, k]), share(depth > k), share(right[depth > k, k])] for k, level in enumerate(levels)]
    lines.append(table(["Level", "Accuracy, all cells", "Answered", "Accuracy, answered"], rows))
    score = tree_f1(said[:, -1], true[:, -1], paths)
    lines.append(f"hierarchical F1 of the finest labels: {score:.3f}")

    types = sorted(set(true[:, -1]))
    figures = precision_recall_fscore_support(true[:, -1], said[:, -1], labels=types, zero_division=0)
    rows = [[name, *(f"{v:.3f}" for v in row[:3]), f"{row[3]:,}"] for name, *row in zip(types, *figures, strict=True)]
    mean = [f"{figure.mean():.3f}" for figure in figures[:3]]
    lines.append(table(["Type", "Precision", "Recall", "F1", "Cells"], [*rows, ["mean of the types", *mean, ""]]))

    wrong = ~right[:, -1]
    if wrong.any():
        pairs, count = np.unique(
            np.stack([true[wrong, -1], said[wrong, -1]], 1).astype(str), axis=0, return_counts=True
        )
        cells = dict(zip(types, figures[3], strict=True))
        best = np.argsort(-count, kind="stable")[:CONFUSIONS]
        rows = [
            [f"{a} -> {b}", f"{n:,}", f"{n / cells[a]:.3f}"]
            for (a, b), n in zip(pairs[best].tolist(), count[best].tolist(), strict=True)
        ]
        lines.append(table(["Confusion (true -> answered)", "Cells", "Share of the type"], rows))
    return "\n\n".join(lines)


def has_label(codes: np.ndarray, names: Sequence[str], paths: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Codes (n,) of `names`, -1 for none -> (n,) bool: whether the reference has that label."""
    finest = {path[-1] for path in paths}
    return np.array([*(name in finest for name in names), False])[codes]


def tree_f1(said: np.ndarray, true: np.ndarray, paths: Sequence[tuple[str, ...]]) -> float:
    """Hierarchical F1 of finest labels (n,), over the nodes of the reference's own tree."""
    nodes = sorted({path[:k] for path in paths for k in range(1, len(path) + 1)})
    position = {path[-1]: i for i, path in enumerate(paths)}
    above = np.array([[path[: len(node)] == node for node in nodes] for path in paths])
    code = lambda labels: np.array([position[name] for name in labels])  # noqa: E731
    return hierarchical_f1(code(said), code(true), above) or 0.0


def draw_confusions(
    file: Path,
    answered: dict[str, np.ndarray],
    codes: np.ndarray,
    names: Sequence[str],
    paths: Sequence[tuple[str, ...]],
    levels: Sequence[str],
    column: str,
) -> None:
    """Write a picture: the share of each true type's cells by the finest label that they were given.

    Types stand in the order of the tree, with a line where the second level changes: mistakes within a lineage lie near
    the diagonal. Arguments are those of `report`; nothing is written where no cell has a label that the reference has.
    """
    known = has_label(codes, names, paths) & (answered["status"] != "invalid")
    if not known.any():
        return
    true, said = np.array(names, object)[codes[known]], answered[levels[-1]][known]
    present = {*true, *said}
    shown = sorted({path for path in paths if path[-1] in present})
    types = [path[-1] for path in shown]
    share = confusion_matrix(true.astype(str), said.astype(str), labels=types, normalize="true")
    side = 1.5 + 0.25 * len(types) + 0.07 * max(map(len, types))  # inches: a type takes .25, a letter of 8 points .07
    from matplotlib.figure import Figure  # half a second to load

    figure = Figure((side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(types)), types, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(types)), types, fontsize=8, parse_math=False)
    axes.set_xlabel("answered")
    axes.set_ylabel(column, parse_math=False)
    for i in range(1, len(shown)):
        if shown[i][:2] != shown[i - 1][:2]:
            axes.axhline(i - 0.5, color="grey", linewidth=0.5)
            axes.axvline(i - 0.5, color="grey", linewidth=0.5)
    figure.colorbar(image, label="share of the true type", shrink=0.5, aspect=15)
    with atomic_write(file) as part:
        figure.savefig(part, format=file.suffix[1:].lower(), dpi=150)
