"""The answer for each cell: the labels of all levels, and how many of them can be trusted; as a table of columns."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.annotate.calibration import Calibration
from fractal.annotate.votes import Raw
from fractal.hierarchy.tree import Tree

# NOVEL and CAUTION are shares of ordinary cells, which is what a p-value promises, and were tuned on no cells: 3 % of
# those that are like the held-out cells are flagged, and 5 % lose their fine labels.
NOVEL = 0.03  # p-value below this: the cell is flagged
CAUTION = 0.05  # p-value below this: no label below the second level
CAUTIOUS_DEPTH = 2
CONFIDENCE = 0.8  # the default, and what the model card reports
NOVELTY = ("on", "flag", "off")
STATUSES = ("ok", "withheld", "novel", "excluded", "invalid")


@dataclass(frozen=True)
class Answer:
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

    def spread(self, valid: np.ndarray, excluded: np.ndarray) -> "Answer":
        """The answers of the valid cells -> of all (n,), with codes 0 and numbers NaN elsewhere."""

        def fill(values: np.ndarray) -> np.ndarray:
            missing = np.nan if values.dtype.kind == "f" else 0
            out = np.full((len(valid), *values.shape[1:]), missing, values.dtype)
            out[valid] = values
            return out

        whole = {field.name: fill(getattr(self, field.name)) for field in fields(self)}
        return Answer(**whole | {"valid": valid, "excluded": fill(excluded)})


def join(answers: Sequence[Answer]) -> Answer:
    return Answer(*(np.concatenate([getattr(a, field.name) for a in answers]) for field in fields(Answer)))


def answer(raw: Raw, calibration: Calibration, confidence: float = CONFIDENCE, novelty: str = "on") -> Answer:
    """Back off to the deepest level whose probability is at least `confidence`, and to the second level in odd cells.

    `novelty`: "on" flags odd cells and withholds their fine labels, "flag" only flags them, "off" does neither.
    """
    probability = calibration.probability(raw.votes)
    ood_score = calibration.score(raw.signals)
    p_value = calibration.p_value(ood_score)
    confident, depth = depths(probability, p_value, confidence, novelty)
    novel = (p_value < NOVEL) & (novelty != "off")
    none = np.zeros(len(novel), bool)
    return Answer(raw.path, probability, confident, depth, raw.distance, ood_score, p_value, novel, none, ~none)


def depths(
    probability: np.ndarray, p_value: np.ndarray, confidence: float, novelty: str
) -> tuple[np.ndarray, np.ndarray]:
    """probability (n, levels), p_value (n,) -> the depth that the confidence allows (n,), and less in odd cells."""
    confident = (probability >= confidence).sum(1)  # probabilities fall from level to level
    odd = (p_value < CAUTION) & (novelty == "on")
    return confident, np.where(odd, np.minimum(confident, CAUTIOUS_DEPTH), confident)


def vote(answer: Answer, groups: np.ndarray, tree: Tree, confidence: float, novelty: str) -> Answer:
    """One answer for all cells of a group: per level, down the tree, the label with most probability in it.

    groups (n,) codes, -1 for cells without one, which keep their answer. A cell gives each of its labels that label's
    probability; the group's probability of a label is the mean over its cells.
    """
    path, probability = answer.path.copy(), answer.probability.copy()
    in_group = np.where(answer.valid, groups, -1)
    for group in np.unique(in_group[in_group >= 0]):
        rows = np.flatnonzero(in_group == group)
        allowed, mass = np.ones(len(tree.paths), bool), []
        for k, level in enumerate(tree.nodes.T):
            sums = np.bincount(level[path[rows]], probability[rows, k], minlength=level.max() + 1)
            sums[~np.isin(np.arange(len(sums)), level[allowed])] = -1.0
            chosen = int(sums.argmax())
            allowed &= level == chosen
            mass.append(sums[chosen] / len(rows))
        path[rows], probability[rows] = allowed.argmax(), np.minimum.accumulate(mass)
    confident, depth = depths(probability, answer.p_value, confidence, novelty)
    return replace(answer, path=path, probability=probability, confident_depth=confident, depth=depth)


def answer_columns(answer: Answer, tree: Tree) -> pa.Table:
    """A row per cell; text as dictionaries, missing where there is no answer; numbers float32.

    level, label, cl_id (the deepest answer); per level its label, CL id and probability; distance, ood_score, p_value;
    status and withheld_by.
    """
    names, ids = np.array(tree.paths, object), tree.cl_ids.astype(object)
    levels = len(tree.levels)
    deepest = answer.path * levels + np.maximum(answer.depth - 1, 0)
    columns = {
        "level": codes(answer.depth, ["none", *tree.levels], ordered=True),
        "label": text(names.reshape(-1), deepest, answer.depth > 0),
        "cl_id": text(ids.reshape(-1), deepest, answer.depth > 0),
    }
    for k, level in enumerate(tree.levels):
        columns[level] = text(names[:, k], answer.path, answer.valid)
        columns[f"{level}_cl_id"] = text(ids[:, k], answer.path, answer.valid)
        columns[f"{level}_probability"] = pa.array(answer.probability[:, k].astype(np.float32))
    for name in ("distance", "ood_score", "p_value"):
        columns[name] = pa.array(getattr(answer, name).astype(np.float32))
    withheld = answer.depth < answer.confident_depth
    status = np.select([~answer.valid, answer.novel, answer.excluded, withheld], [4, 2, 3, 1], 0)
    columns["status"] = codes(status, STATUSES)
    unsure = answer.valid & (answer.confident_depth < levels)
    columns["withheld_by"] = codes(np.select([withheld, unsure], [0, 1], -1), ["novelty", "confidence"])
    return pa.table(columns)


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
