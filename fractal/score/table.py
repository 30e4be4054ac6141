"""The table of scores of eval.py and the report: a row per embedding. (A reference's answers: answers.py.)

An embedding is a (n, dims) tensor with a name: the raw vectors, an adapter's full vectors and prefixes, a control. Two
protocols: `loo`, every test cell against the other test cells, and `bank`, against cells that were not set aside.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from fractal.base.table import table
from fractal.hierarchy.matching import match_names
from fractal.hierarchy.ontology import term_distances
from fractal.hierarchy.tree import at_or_above
from fractal.score.embeddings import Encoder, Subset
from fractal.score.intervals import share_interval
from fractal.score.metrics import (
    K,
    hierarchical_f1,
    knn_predict,
    macro_scores,
    majority,
    neighbourhood_purity,
    silhouette,
    triplet_agreement,
)
from fractal.search.exact import nearest

Row = dict[str, Any]  # the figures of one embedding, see `score`


@dataclass(frozen=True)
class Truth:
    """What is known of the n test cells. Their labels share codes with the cells of the bank."""

    levels: Sequence[str]  # names, coarse to fine
    labels: Tensor  # (n, levels) int64
    seen: np.ndarray  # (n,) bool: False where all cells of the type are held out
    counts: np.ndarray  # (n, levels) bool: whether the bank can know the label; else the cell does not count in `bank`
    groups: np.ndarray | None  # (n,) study of each cell, where whole studies are held out
    distances: Tensor  # (types, types) steps in the Cell Ontology, NaN for a type that is not in it
    ancestors: np.ndarray  # (types, terms) bool: a type's term and all above it


def ontology_ancestors(names: Sequence[str], graph: nx.DiGraph) -> np.ndarray:
    """(k, terms) bool: the term of each name and all terms above it, less those above everything ("cell").

    No term at all for a name that is not in the graph.
    """
    terms = [term for term, _ in match_names(names, graph).values()]
    above = [at_or_above(graph, term) for term in terms]
    columns = sorted({t for lineage in above for t in lineage if graph.out_degree(t)})  # a root tells nothing
    return np.array([[t in lineage for t in columns] for lineage in above], bool).reshape(len(above), -1)


def truth_of(
    levels: Sequence[str],
    labels: Tensor,
    classes: Sequence[Sequence[str]],
    trained: Sequence[Sequence[str]],
    unseen_types: Sequence[str],
    groups: np.ndarray | None,
    graph: nx.DiGraph,
) -> Truth:
    """Of test cells with these labels (n, levels) into `classes`; `trained`: per level the classes trained on.

    An unseen type counts in `bank` at the levels whose class other types have brought into training.
    """
    codes = labels.cpu().numpy()
    seen = ~np.isin(np.array(classes[-1], object), list(unseen_types))[codes[:, -1]]
    known = [np.isin(np.array(every, object), list(names)) for every, names in zip(classes, trained, strict=True)]
    counts = np.stack([there[column] for there, column in zip(known, codes.T, strict=True)], 1) | seen[:, None]
    distances = torch.from_numpy(term_distances(classes[-1], graph))
    return Truth(levels, labels, seen, counts, groups, distances, ontology_ancestors(classes[-1], graph))


# A row


def score(vectors: Tensor, truth: Truth, neighbours: Tensor | None) -> Row:
    """The figures of one embedding (n, dims). neighbours (n, 5, levels) are the labels of those in the bank.

    Per level: `loo` and `bank` accuracy of a 5-NN vote, with `_interval`, `_macro` (mean recall of the classes),
    `_macro_f1`; `silhouette`; `zoom_agree`. For the types: `_distance` (mean steps in the Cell Ontology from the true
    to the predicted type), `_distance_cells` (of so many cells), `_hierarchical_f1`. `seen` and `unseen` are the
    accuracies of those types apart. `loo_right` and `bank_right` are (n, levels) bool arrays, `loo_predicted` and
    `bank_predicted` (n, levels) int64.
    """
    row: Row = {"dims": vectors.shape[1]} | {
        f"{who}{key}": {} for who in ("seen", "unseen") for key in ("", "_interval")
    }
    bank = None if neighbours is None else majority(neighbours)
    for protocol, predicted in ("loo", knn_predict(vectors, truth.labels)), ("bank", bank):
        score_protocol(row, protocol, predicted, truth)
    agree, row["zoom_subtypes"] = neighbourhood_purity(vectors, truth.labels)
    row["zoom_agree"] = dict(zip(truth.levels, agree, strict=True))
    row["silhouette"] = {level: silhouette(vectors, truth.labels[:, k]) for k, level in enumerate(truth.levels)}
    triplets = triplet_agreement(vectors, truth.labels, torch.from_numpy(truth.seen))
    row["triplets"] = dict(zip(("seen", "unseen"), triplets, strict=True))
    return row


def score_protocol(row: Row, protocol: str, predicted: Tensor | None, truth: Truth) -> None:
    """Add to the row what (n, levels) predictions are worth; without any, every figure is None."""
    if predicted is None:
        predicted = truth.labels[:0]
    else:
        row[f"{protocol}_predicted"] = predicted.cpu().numpy()
        row[f"{protocol}_right"] = (predicted == truth.labels).cpu().numpy()
    n = len(predicted)
    guesses, labels = predicted.cpu().numpy(), truth.labels[:n].cpu().numpy()
    seen, groups = truth.seen[:n], None if truth.groups is None else truth.groups[:n]
    right, guess, types = guesses == labels, guesses[:, -1], labels[:, -1]
    use = truth.counts[:n] if protocol == "bank" else np.ones_like(right)
    row[protocol], row[f"{protocol}_interval"] = by_level(truth.levels, right, use, groups)
    macro = {level: macro_scores(guesses[use[:, k], k], labels[use[:, k], k]) for k, level in enumerate(truth.levels)}
    row[f"{protocol}_macro"] = {level: accuracy for level, (accuracy, _) in macro.items()}
    row[f"{protocol}_macro_f1"] = {level: f1 for level, (_, f1) in macro.items()}
    steps = truth.distances[types, guess]
    row[f"{protocol}_distance"] = steps.nanmean().item() if steps.isfinite().any() else None
    row[f"{protocol}_distance_cells"] = int(steps.isfinite().sum())
    row[f"{protocol}_hierarchical_f1"] = hierarchical_f1(guess, types, truth.ancestors)
    for who, cells, units in ("seen", seen, groups), ("unseen", ~seen, types):  # unseen: the types are the draw
        share, interval = by_level(truth.levels, right, use & cells[:, None], units)
        row[who][protocol], row[f"{who}_interval"][protocol] = share, interval


def by_level(
    levels: Sequence[str], right: np.ndarray, use: np.ndarray, groups: np.ndarray | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> per level the share of right (n, levels) among the cells of use (n, levels), and its interval, or None."""
    share, interval = {}, {}
    for level, column, rows in zip(levels, right.T, use.T, strict=True):
        share[level] = float(column[rows].mean()) if rows.any() else None
        interval[level] = share_interval(column[rows], None if groups is None else groups[rows])
    return share, interval


# The table


@dataclass(frozen=True)
class ScoreTable:
    """The rows of all embeddings of the same test cells, see `score`, each with its name as "embedding"."""

    truth: Truth
    groups: list[list[Row]]  # one per encoder, in their order
    copies: dict[str, int]  # whose cells -> how many test cells have an exact copy among them

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups for row in group]

    def as_json(self) -> list[Row]:
        """The rows without their arrays."""
        return [{k: v for k, v in row.items() if not k.endswith(("_right", "_predicted"))} for row in self.rows]

    def markdown(self, protocols: Mapping[str, str], interval: str) -> str:
        """All figures as tables. protocols: "loo" and perhaps "bank" -> title; interval: what intervals are over."""
        rows, levels, parts = self.rows, self.truth.levels, []
        for protocol, title in protocols.items():
            parts += [f"5-NN accuracy, {title} {interval}", accuracy_table(rows, protocol, levels)]
        if not self.truth.seen.all():
            parts.append(
                "5-NN accuracy, types that were held out (unseen) and all others (seen) apart, neighbours as above;\n"
                "in bank an unseen type counts at the levels whose class other types have brought into training"
            )
            parts.append(unseen_table(rows, list(protocols), levels))
        keys = {"Steps": "distance", "Cells": "distance_cells", "hF1": "hierarchical_f1"}
        for protocol, title in protocols.items():
            text = (
                f"Macro F1, every class counting alike, {title};\n"
                "Steps: mean way from the true type's term to the predicted one's in the Cell Ontology, of so many\n"
                "Cells whose true and predicted types are both terms of it. hF1: the same cells' F1 over all terms\n"
                "above"
            )
            more = {name: f"{protocol}_{key}" for name, key in keys.items()}
            parts += [text, level_table(rows, f"{protocol}_macro_f1", levels, more)]
            text = f"Macro accuracy: mean over the classes of the share of their cells that is right, {title}"
            parts += [text, level_table(rows, f"{protocol}_macro", levels)]
        text = "Zoom: share of a cell's 5 nearest that have its label, and distinct subtypes among its 50 nearest (loo)"
        parts += [text, level_table(rows, "zoom_agree", levels, {"Of 50": "zoom_subtypes"})]
        text = "Triplets: two types and a third that leaves their path earlier; how often the centroids say so too"
        parts += [text, level_table(rows, "triplets", ("seen", "unseen"))]
        text = "Silhouette (cosine) of each embedding at each level"
        return "\n\n".join([*parts, text, level_table(rows, "silhouette", levels)])


def score_table(
    truth: Truth,
    queries: Subset,
    encoders: Sequence[Encoder],
    bank: tuple[Subset, Tensor, np.ndarray] | None = None,
) -> ScoreTable:
    """Score every embedding of the test cells `queries`.

    The first of the encoders is `raw`. bank: m other cells, their labels (m, levels), and the positions among them of
    each query's neighbours, see `nearest_in`; without it `loo` alone is scored.
    """
    cells = queries.vectors.cpu().numpy()
    copies = {"other test cells": count_copies(cells, cells[nearest(queries.vectors, k=K).cpu().numpy()])}
    neighbours: Iterator[Tensor | None] = repeat(None)
    if bank:
        others, labels, positions = bank
        copies["the bank"] = count_copies(cells, others.vectors.cpu().numpy()[positions[0]])
        neighbours = iter(labels[torch.from_numpy(positions).to(labels.device)])
    groups = list[list[Row]]()
    for encode in encoders:
        embeddings = encode(queries).items()
        groups.append([{"embedding": name, **score(vectors, truth, next(neighbours))} for name, vectors in embeddings])
    return ScoreTable(truth, groups, copies)


def count_copies(vectors: np.ndarray, neighbours: np.ndarray) -> int:
    """How many of the cells (n, dim) have a neighbour (n, k, dim) with exactly the same vector."""
    return int((neighbours == vectors[:, None]).all(2).any(1).sum())


def steer(rows: Sequence[Row], top: str, leaf: str) -> tuple[float, str]:
    """Steerability of the rows of one adapter, full first and prefix 1 last -> S, and how it comes about.

    top, leaf: the levels of its first and last block. S is large when the first block knows the top level and only the
    whole vector knows the leaf. It rewards destroying information, so read it beside the accuracies.
    """
    full, first = rows[0]["loo"], rows[-1]["loo"]
    s = (first[top] - full[top]) + (full[leaf] - first[leaf])
    return s, (
        f"Steerability S = ({top} at prefix 1 - at full) + ({leaf} at full - at prefix 1)\n"
        f"  = ({first[top]:.3f} - {full[top]:.3f}) + ({full[leaf]:.3f} - {first[leaf]:.3f}) = {s:+.3f}"
    )


def show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def accuracy_table(rows: Sequence[Row], protocol: str, levels: Sequence[str]) -> str:
    """With intervals, where there are any."""
    lines = []
    for row in rows:
        line = [row["embedding"], f"{row['dims']}d"]
        for level in levels:
            interval = row[f"{protocol}_interval"][level]
            line.append(show(row[protocol][level]) + (" [{:.3f}, {:.3f}]".format(*interval) if interval else ""))
        lines.append([*line, show(row["silhouette"][levels[0]])])
    return table(["Embedding", "Dims", *map(str.capitalize, levels), "Sil"], lines)


def unseen_table(rows: Sequence[Row], protocols: Sequence[str], levels: Sequence[str]) -> str:
    """Unseen types, then seen ones, each at every level in every protocol."""
    columns = [(protocol, level) for protocol in protocols for level in levels]
    lines = [
        [row["embedding"], who, *(show(row[who][protocol][level]) for protocol, level in columns)]
        for who in ("unseen", "seen")
        for row in rows
    ]
    return table(["Embedding", "Types", *map(" ".join, columns)], lines)


def level_table(rows: Sequence[Row], key: str, levels: Sequence[str], more: Mapping[str, str] | None = None) -> str:
    """One figure per level, `key`, and further columns: title -> key."""
    lines, more = [], more or {}
    for row in rows:
        others = [show(row[k], 0 if k.endswith("cells") else 2) for k in more.values()]
        lines.append([row["embedding"], *(show(row[key][level]) for level in levels), *others])
    return table(["Embedding", *map(str.capitalize, levels), *more], lines)
