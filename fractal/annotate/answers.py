"""The answer for each cell: the labels of all levels, and how many of them can be trusted; as a table of columns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.annotate.calibration import Calibration, chain
from fractal.annotate.novelty import CAUTION, CAUTIOUS_DEPTH, NOVEL, joined, tail
from fractal.annotate.votes import Raw, Rows
from fractal.hierarchy.tree import Tree

CONFIDENCE = 0.8  # the default, and what the model card reports
ONE_TYPE, ENOUGH = 0.9, 50  # share of the cells, of at least so many, that look like one type
# Columns of the output beside those of the levels.
COLUMNS = (
    *("level", "label", "cl_id", "runner_up", "runner_up_probability"),
    *("distance", "ood_score", "p_value", "status", "withheld_by"),
)
STATUSES = ("ok", "withheld", "novel", "excluded", "invalid")


@dataclass(frozen=True)
class Answer(Rows):
    """n annotated cells. The labels of all levels are there, `depth` says how many can be trusted."""

    path: np.ndarray  # (n,) int64 into Tree.paths
    probability: np.ndarray  # (n, levels)
    confident_depth: np.ndarray  # (n,) 0 ... levels, as deep as the confidence allows
    depth: np.ndarray  # (n,) the same, less where the novelty rule withholds labels
    distance: np.ndarray  # (n,)
    ood_score: np.ndarray  # (n,)
    p_value: np.ndarray  # (n,)
    novel: np.ndarray  # (n,) bool: like nothing in the reference
    excluded: np.ndarray  # (n,) bool: without --only and --exclude it would be a type that these leave out
    valid: np.ndarray  # (n,) bool: the vector is finite and not zero; elsewhere there is no answer
    runner_up: np.ndarray  # (n,) int64 into Tree.paths, the next best; -1 where there is none
    runner_up_probability: np.ndarray  # (n,)

    def spread(self, valid: np.ndarray) -> "Answer":
        """The answers of the valid cells -> of all (n,), with codes 0 and numbers NaN elsewhere."""

        def fill(values: np.ndarray) -> np.ndarray:
            missing = np.nan if values.dtype.kind == "f" else 0
            out = np.full((len(valid), *values.shape[1:]), missing, values.dtype)
            out[valid] = values
            return out

        whole = {name: fill(values) for name, values in vars(self).items()}
        return Answer(**whole | {"runner_up": np.where(valid, whole["runner_up"], -1)})


def answer(raw: Raw, calibration: Calibration, confidence: float = CONFIDENCE, novelty: str = "on") -> Answer:
    """Back off to the deepest level whose probability is at least `confidence`, unusual cells to the second level.

    `novelty`: "on" flags unusual cells and withholds their fine labels, "flag" only flags them, "off" does neither.
    """
    probability = chain(calibration.votes, raw.votes)
    ood_score = joined(raw.signals, calibration.signals)
    p_value = tail(ood_score, calibration.ood_score)
    confident, depth = depths(probability, p_value, confidence, novelty)
    novel = (p_value < NOVEL) & (novelty != "off")
    none = np.zeros(len(novel), bool)
    # Of what the best path leaves, the next one has as much as it has of the other votes.
    others = np.maximum(1 - raw.votes[:, -1], 1e-12)
    second = np.where(raw.runner_up < 0, np.nan, (1 - probability[:, -1]) * np.minimum(raw.runner_up_votes / others, 1))
    of_cells = raw.distance, ood_score, p_value, novel, none, ~none, raw.runner_up, second
    return Answer(raw.path, probability, confident, depth, *of_cells)


def depths(
    probability: np.ndarray, p_value: np.ndarray, confidence: float, novelty: str
) -> tuple[np.ndarray, np.ndarray]:
    """probability (n, levels), p_value (n,) -> the depth that the confidence allows (n,), and less in unusual cells."""
    confident = (probability >= confidence).sum(1)  # probabilities fall from level to level
    unusual = (p_value < CAUTION) & (novelty == "on")
    return confident, np.where(unusual, np.minimum(confident, CAUTIOUS_DEPTH), confident)


def unforced(answer: Answer, shared: np.ndarray) -> Answer:
    """Excluded cells keep only the labels that they would have without the restriction, the first `shared` (n,)."""
    forced = answer.excluded[:, None] & (np.arange(answer.probability.shape[1]) >= shared[:, None])
    depth = np.where(answer.excluded, np.minimum(answer.depth, shared), answer.depth)
    return replace(answer, depth=depth, probability=np.where(forced, np.nan, answer.probability))


def vote(answer: Answer, groups: np.ndarray, tree: Tree, confidence: float, novelty: str) -> Answer:
    """One answer for all cells of a group: per level, down the tree, the label with most probability in it.

    groups (n,) codes, -1 for cells without one, which keep their answer, as excluded cells do. A cell gives each of its
    labels that label's probability; the group's probability of a label is the mean over its cells. Its fine labels are
    withheld where those of half of its cells would be.
    """
    path, probability, p_value = answer.path.copy(), answer.probability.copy(), answer.p_value.copy()
    runner_up, second = answer.runner_up.copy(), answer.runner_up_probability.copy()
    for rows in members(answer, groups).values():
        allowed, mass = np.ones(len(tree.paths), bool), []
        for k, level in enumerate(tree.nodes.T):
            sums = np.bincount(level[path[rows]], probability[rows, k], minlength=level.max() + 1)
            sums[~np.isin(np.arange(len(sums)), level[allowed])] = -1.0
            chosen = int(sums.argmax())
            allowed &= level == chosen
            mass.append(sums[chosen] / len(rows))
        # The next best label is that of the cells' best and next best with most probability.
        both = np.concatenate([path[rows], runner_up[rows]]), np.concatenate([probability[rows, -1], second[rows]])
        there = both[0] >= 0
        sums = np.bincount(both[0][there], both[1][there], minlength=len(allowed)) * ~allowed
        runner_up[rows] = sums.argmax() if sums.any() else -1
        second[rows] = sums.max() / len(rows) if sums.any() else np.nan
        path[rows], probability[rows] = allowed.argmax(), np.minimum.accumulate(mass)
        p_value[rows] = np.median(p_value[rows])
    confident, depth = depths(probability, p_value, confidence, novelty)
    voted = replace(answer, path=path, probability=probability, confident_depth=confident, depth=depth)
    return replace(voted, runner_up=runner_up, runner_up_probability=second)


def real_groups(codes: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
    """Codes (n,) of groups and their names; "-1", as clusterings call what they leave out, is none."""
    left_out = np.array([*(name in ("-1", "-1.0") for name in names), True])
    return np.where(left_out[codes], -1, codes), names


def members(answer: Answer, groups: np.ndarray) -> dict[int, np.ndarray]:
    """groups (n,) codes, -1 for none -> code -> the rows of its cells that have an answer."""
    voting = np.where(answer.valid & ~answer.excluded, groups, -1)
    return {int(group): np.flatnonzero(voting == group) for group in np.unique(voting[voting >= 0])}


def group_columns(cells: Answer, voted: Answer, groups: np.ndarray, names: Sequence[str], tree: Tree) -> pa.Table:
    """A row per group: its label, the probability of that, the share of its cells that agree, why it is not deeper.

    cells, voted: the answers before and after `vote`; a cell agrees if its most likely label at that level is the same.
    """
    rows = members(voted, groups)
    first = np.array([cells_of[0] for cells_of in rows.values()], np.int64)
    one = voted[first]
    level = np.maximum(one.depth - 1, 0)
    agree = [
        (tree.nodes[cells.path[cells_of], k] == tree.nodes[path, k]).mean() if depth else np.nan
        for cells_of, k, path, depth in zip(rows.values(), level, one.path, one.depth, strict=True)
    ]
    columns = answer_columns(one, tree)
    confidence = np.where(one.depth > 0, one.probability[np.arange(len(first)), level], np.nan)
    sizes = [len(cells_of) for cells_of in rows.values()]
    table = columns.select(["label", "level", "withheld_by", "runner_up", "runner_up_probability"])
    table = table.add_column(2, "confidence", [confidence]).add_column(3, "agreement", [np.array(agree, np.float64)])
    return table.add_column(0, "group", [[names[code] for code in rows]]).add_column(1, "cells", [sizes])


def one_type_warning(answered: pa.Table, tree: Tree) -> str:
    """A line if nearly all cells share a label that is far from common in the reference; "" else.

    answered: columns of the tree's levels. The deepest such label counts.
    """
    for k, level in reversed(list(enumerate(tree.levels))):
        counts = answered[level].to_pandas().value_counts()
        label, n, total = counts.index[0], counts.iloc[0], counts.sum()
        of_reference = tree.counts[[path[k] == label for path in tree.paths]].sum()
        if total >= ENOUGH and n >= ONE_TYPE * total and of_reference <= tree.counts.sum() / 2:
            return (
                f"{n / total:.0%} of the cells look like '{label}', few of the reference's do: probabilities hold for "
                "its mix of types, and those of finer labels may be too high here"
            )
    return ""


def answer_columns(answer: Answer, tree: Tree) -> pa.Table:
    """A row per cell; text as dictionaries, missing where there is no answer; numbers float32.

    level, label, cl_id (the deepest answer); per level its label, CL id and probability; runner_up (the next best of
    the finest labels) and its probability; distance, ood_score, p_value; status and withheld_by.
    """
    names, ids = np.array(tree.paths, object), tree.cl_ids.astype(object)
    levels, known = len(tree.levels), ~np.isnan(answer.probability)
    deepest = answer.path * levels + np.maximum(answer.depth - 1, 0)
    columns = {
        "level": codes(answer.depth, ["none", *tree.levels], ordered=True),
        "label": text(names.reshape(-1), deepest, answer.depth > 0),
        "cl_id": text(ids.reshape(-1), deepest, answer.depth > 0),
    }
    for k, level in enumerate(tree.levels):
        columns[level] = text(names[:, k], answer.path, known[:, k])
        columns[f"{level}_cl_id"] = text(ids[:, k], answer.path, known[:, k])
        columns[f"{level}_probability"] = pa.array(answer.probability[:, k].astype(np.float32))
    has_second = (answer.runner_up >= 0) & ~answer.excluded
    columns["runner_up"] = text(names[:, -1], answer.runner_up, has_second)
    second = np.where(has_second, answer.runner_up_probability, np.nan)
    columns["runner_up_probability"] = pa.array(second.astype(np.float32))
    for name in ("distance", "ood_score", "p_value"):
        columns[name] = pa.array(getattr(answer, name).astype(np.float32))
    withheld = (answer.depth < answer.confident_depth) & ~answer.excluded
    status = np.select([~answer.valid, answer.novel, answer.excluded, withheld], [4, 2, 3, 1], 0)
    columns["status"] = codes(status, STATUSES)
    unsure = answer.valid & ~answer.excluded & (answer.confident_depth < levels)
    columns["withheld_by"] = codes(np.select([withheld, unsure], [0, 1], -1), ["novelty", "confidence"])
    return pa.table(columns)


def annotation_columns(names: Iterable[str], key: str) -> set[str]:
    """Which columns of obs are of an earlier annotation with this key."""
    there, fixed = {name.removeprefix(f"{key}_") for name in names if name.startswith(f"{key}_")}, set(COLUMNS)
    levels = {name.removesuffix("_probability") for name in there if name.endswith("_probability")}
    found = there & fixed | {level + end for level in levels for end in ("", "_cl_id", "_probability")} & there
    return {f"{key}_{name}" for name in found}


def codes(values: np.ndarray, names: Sequence[str], ordered: bool = False) -> pa.DictionaryArray:
    """Codes (n,) of names, below 0 where there is none."""
    indices = pa.array(values.astype(np.int32), mask=values < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()), ordered=ordered)


def text(labels: np.ndarray, index: np.ndarray, known: np.ndarray) -> pa.DictionaryArray:
    """labels[index] where known (n,), as codes of the sorted labels; "" is none."""
    names, code = np.unique(labels, return_inverse=True)
    first = int(names[0] == "")
    return codes(np.where(known, code[index] - first, -1), names[first:].tolist())


def as_obs(table: pa.Table) -> dict[str, Any]:
    """Columns as AnnData's obs takes them: (n,) float32, or the categories that occur; ordered ones stay whole."""
    columns = {}
    for name, values in table.to_pandas().items():
        if hasattr(values, "cat"):
            values = values if values.cat.ordered else values.cat.remove_unused_categories()
        columns[name] = values.values
    return columns
