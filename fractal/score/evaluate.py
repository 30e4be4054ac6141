"""Scoring: what every embedding of the same test cells tells of every level, and what is scored beside the adapters.

An embedding is a (n, dims) tensor with a name: the raw vectors, an adapter's full vectors and prefixes, a control. Two
protocols: `loo`, every test cell against the other test cells, and `bank`, against cells that were not set aside.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from fractal.data.cells import Cells
from fractal.hierarchy.ontology import match_names, term_distances
from fractal.model.adapter import Adapter, embed
from fractal.score.metrics import (
    K,
    cluster_bootstrap,
    hierarchical_f1,
    knn_predict,
    macro_accuracy,
    macro_f1,
    majority,
    neighbourhood_purity,
    silhouette,
    triplet_agreement,
    wilson_interval,
)
from fractal.search.exact import Nearest, nearest

Encoder = Callable[[Tensor], dict[str, Tensor]]  # vectors (m, dim) -> name -> embedding (m, dims)


@dataclass(frozen=True)
class Truth:
    """What is known of the n test cells. Their labels share codes with the cells of the bank."""

    levels: Sequence[str]  # names, coarse to fine
    labels: Tensor  # (n, levels) int64
    seen: np.ndarray  # (n,) bool: False where all cells of the type are held out
    counts: np.ndarray  # (n, levels) bool: whether the bank can know the label; else the cell does not count in `bank`
    groups: np.ndarray | None  # (n,) study of each cell, where whole studies are held out
    distances: Tensor  # (types, types) steps in the Cell Ontology, NaN for a type that is not in it
    ancestors: np.ndarray  # (types, terms) bool: a type's own term and all above it


def ontology_ancestors(names: Sequence[str], graph: nx.DiGraph) -> np.ndarray:
    """(k, terms) bool: the term of each name and all terms above it, less those above everything ("cell").

    No term at all for a name that is not in the graph.
    """
    terms = [term for term, _ in match_names(names, graph).values()]
    above = [{term, *nx.descendants(graph, term)} if term in graph else set() for term in terms]  # edges go up
    columns = sorted({t for own in above for t in own if graph.out_degree(t)})  # a root tells nothing
    return np.array([[t in own for t in columns] for own in above], bool).reshape(len(above), -1)


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
    known = [np.isin(np.array(own, object), list(names)) for own, names in zip(classes, trained, strict=True)]
    counts = np.stack([there[column] for there, column in zip(known, codes.T, strict=True)], 1) | seen[:, None]
    distances = torch.from_numpy(term_distances(classes[-1], graph))
    return Truth(levels, labels, seen, counts, groups, distances, ontology_ancestors(classes[-1], graph))


def share_interval(right: np.ndarray, groups: np.ndarray | None) -> tuple[float, float] | None:
    """95 % interval of the share of (n,) bool that is True; None where nothing can be said.

    Over cells (Wilson), or over `groups` (n,) where whole groups are held out. Where all of these agree a bootstrap
    has no width; then it is Wilson's for that many groups.
    """
    if not len(right):
        return None
    if groups is None:
        return wilson_interval(int(right.sum()), len(right))
    low, high = cluster_bootstrap(right.astype(float), groups)
    number = len(np.unique(groups))
    return (low, high) if low < high else wilson_interval(number * low, number) if low == high else None


def by_group(truth: Truth, right: np.ndarray, use: np.ndarray, groups: np.ndarray | None) -> tuple[dict, dict]:
    """-> per level the share of right (n, levels) among the cells of use (n, levels), and its interval, or None."""
    share, interval = {}, {}
    for level, column, rows in zip(truth.levels, right.T, use.T, strict=True):
        share[level] = float(column[rows].mean()) if rows.any() else None
        interval[level] = share_interval(column[rows], None if groups is None else groups[rows])
    return share, interval


def score(vectors: Tensor, truth: Truth, neighbours: Tensor | None) -> dict[str, Any]:
    """The figures of one embedding (n, dims). neighbours (n, 5, levels) are the labels of those in the bank.

    Per level: `loo` and `bank` accuracy of a 5-NN vote, with `_interval`, `_macro` (mean recall of the classes),
    `_macro_f1`; `silhouette`; `zoom_agree`. For the types: `_distance` (mean steps in the Cell Ontology from the true
    to the predicted type), `_distance_cells` (of so many cells), `_hierarchical_f1`. `seen` and `unseen` are the
    accuracies of those types apart. `loo_right` and `bank_right` are (n, levels) bool arrays, `loo_predicted` and
    `bank_predicted` (n, levels) int64, what was answered.
    """
    levels, labels = truth.levels, truth.labels
    nothing = dict.fromkeys(levels)
    row: dict[str, Any] = {"dims": vectors.shape[1]}
    row |= {f"bank{part}": dict(nothing) for part in ("", "_interval", "_macro", "_macro_f1")}
    row |= {"bank_distance": None, "bank_distance_cells": 0, "bank_hierarchical_f1": None}
    for name in ("seen", "unseen"):
        row[name] = {"loo": dict(nothing), "bank": dict(nothing)}
        row[f"{name}_interval"] = {"loo": dict(nothing), "bank": dict(nothing)}
    protocols = {"loo": knn_predict(vectors, labels)}
    if neighbours is not None:
        protocols["bank"] = majority(neighbours)
    types = labels[:, -1].cpu().numpy()
    for protocol, predicted in protocols.items():
        right = (predicted == labels).cpu().numpy()
        use = truth.counts if protocol == "bank" else np.ones_like(right)
        row[f"{protocol}_right"], row[f"{protocol}_predicted"] = right, predicted.cpu().numpy()
        row[protocol], row[f"{protocol}_interval"] = by_group(truth, right, use, truth.groups)
        for key, metric in (("macro", macro_accuracy), ("macro_f1", macro_f1)):
            row[f"{protocol}_{key}"] = {
                level: metric(predicted[rows, k, None], labels[rows, k, None])[0] if len(rows) else None
                for k, (level, rows) in enumerate(zip(levels, map(np.flatnonzero, use.T), strict=True))
            }
        guess = predicted[:, -1].cpu().numpy()
        steps = truth.distances[types, guess]
        row[f"{protocol}_distance"] = steps.nanmean().item() if steps.isfinite().any() else None
        row[f"{protocol}_distance_cells"] = int(steps.isfinite().sum())
        row[f"{protocol}_hierarchical_f1"] = hierarchical_f1(guess, types, truth.ancestors)
        for name, cells in (("seen", truth.seen), ("unseen", ~truth.seen)):
            groups = types if name == "unseen" else truth.groups  # unseen: the types are the draw
            share, interval = by_group(truth, right, use & cells[:, None], groups)
            row[name][protocol], row[f"{name}_interval"][protocol] = share, interval
    row["silhouette"] = {level: silhouette(vectors, labels[:, k]) for k, level in enumerate(levels)}
    agree, row["zoom_subtypes"] = neighbourhood_purity(vectors, labels)
    row["zoom_agree"] = dict(zip(levels, agree, strict=True))
    triplets = triplet_agreement(vectors, labels, torch.from_numpy(truth.seen))
    row["triplets"] = dict(zip(("seen", "unseen"), triplets, strict=True))
    return row


# Encoders: the adapters, and what one gets without one.


def adapter_encoder(adapter: Adapter, own: str) -> Encoder:
    """The full vectors, then the prefixes, longest first; `own` comes before their names."""
    names = [own + name for name in ("full", *(f"prefix {j}" for j in reversed(range(1, adapter.num_levels))))]
    return lambda x: dict(zip(names, reversed(embed(adapter, x)), strict=True))


def fit_controls(train: Tensor, types: np.ndarray, widths: Sequence[int]) -> tuple[Encoder, list[str]]:
    """Raw vectors cut short, PCA and LDA, at these widths -> the encoder, and a line for each that can't be fitted.

    PCA and LDA are fitted on the training cells (m, dim) with types (m,), both on vectors of length 1, as the adapters
    see them and as the cosine does.
    """

    def unit(x: Tensor) -> np.ndarray:
        return normalize(x.double(), dim=1).cpu().numpy()

    x, widths = unit(train), sorted(widths)
    fitted: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [("raw", lambda x: x)]
    failed = []
    if np.ptp(x, axis=0).max() <= 1e-12:
        failed.append("PCA and LDA: all training cells have the same vector")
    else:
        fitted.append(("PCA", PCA(min(widths[-1], *x.shape), random_state=0).fit(x).transform))
        if len(x) <= len(np.unique(types)):  # no two cells of a type: no scatter inside types
            failed.append("LDA: needs more training cells than types")
        else:
            fitted.append(("LDA", LinearDiscriminantAnalysis().fit(x, types).transform))

    def controls(vectors: Tensor) -> dict[str, Tensor]:
        x, found = unit(vectors), {}
        for name, transform in fitted:
            rotated = transform(x)
            for width in (cuts := sorted({min(width, rotated.shape[1]) for width in widths})):
                if name == "raw" and width == x.shape[1]:
                    continue  # the whole of it is there without controls
                cut = torch.from_numpy(np.float32(rotated[:, :width])).to(vectors.device)
                found[name if name != "raw" and width == cuts[-1] else f"{name} {width}d"] = cut
        return found

    return controls, failed


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A name per checkpoint: its stem, or as much of its path as tells it from the others of that stem."""
    full = [Path(os.path.abspath(str(path))).with_suffix("") for path in paths]
    for parts in range(1, max(len(path.parts) for path in full) + 1):
        names = ["/".join(path.parts[-parts:]) for path in full]
        if len(set(names)) == len(names):
            break
    else:  # the same checkpoint twice, or two suffixes
        return [f"{path.name} ({i + 1})" for i, path in enumerate(paths)]
    stems = [path.name for path in full]
    return [stem if stems.count(stem) == 1 else name for stem, name in zip(stems, names, strict=True)]


# Neighbours in the bank.


def nearest_rows(bank: Tensor, queries: Tensor, encoders: Sequence[Encoder]) -> list[np.ndarray]:
    """-> per embedding, in the order of the encoders: (n, 5) rows of the bank (m, dim) nearest to queries (n, dim)."""
    found = []
    for encode in encoders:
        embedded = encode(bank)
        found += [nearest(e, embedded[name], K).cpu().numpy() for name, e in encode(queries).items()]
    return found


def nearest_in_file(path: Path, keep: np.ndarray, queries: Tensor, encoders: Sequence[Encoder]) -> list[np.ndarray]:
    """The same among the kept rows of a file, as row numbers of the file; `keep` is a mask (num_rows,).

    The file is read once, a row group (34 MB) at a time.
    """
    found = [[Nearest(vectors, K) for vectors in encode(queries).values()] for encode in encoders]
    start = 0
    with Cells.open(path) as source, tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="bank") as bar:
        for _, vectors in source.chunks(strict=True):
            bank = torch.from_numpy(vectors[keep[start : start + len(vectors)]]).to(queries.device)
            start += len(vectors)
            for encode, group in zip(encoders, found, strict=True) if len(bank) else ():
                for searched, embedding in zip(group, encode(bank).values(), strict=True):
                    searched.add(embedding)
            bar.update(len(vectors))
    kept = np.flatnonzero(keep)
    return [kept[searched.rows().cpu().numpy()] for group in found for searched in group]


def twins(vectors: np.ndarray, neighbours: np.ndarray) -> int:
    """How many of the cells (n, dim) have a neighbour (n, k, dim) with exactly the same vector."""
    return int((neighbours == vectors[:, None]).all(2).any(1).sum())


def shuffled_tree(labels: Tensor, seed: int) -> Tensor:
    """The labels (n, levels) if every subtype sat on the path of another: a tree of the same shape, without meaning."""
    subtypes, first = np.unique(labels[:, -1].cpu().numpy(), return_index=True)
    paths = labels[torch.from_numpy(first)]  # one row per subtype
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(subtypes)))
    own = torch.from_numpy(np.searchsorted(subtypes, labels[:, -1].cpu().numpy()))
    return torch.cat([paths[order][own][:, :-1], labels[:, -1:]], dim=1)
