"""How good a reference's answers are, per level: for its card, the report, and cells whose labels are known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fractal.base.table import table
from fractal.score.metrics import calibration_noise_floor, expected_calibration_error, reliability

COLUMNS = {
    "coverage": "Answered",
    "accuracy": "Accuracy",
    "accuracy_forced": "If all were answered",
    "calibration_error": "ECE",
    "calibration_noise_floor": "ECE by chance",
}


def answer_scores(
    levels: Sequence[str], right: np.ndarray, answered: np.ndarray, probability: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Per level how good answers are: (n, levels) whether right and whether given, bool, and their probabilities.

    -> level -> `coverage`, `accuracy` of the answers given (None without any), `accuracy_forced` of all,
    `calibration_error` and its `calibration_noise_floor`, and the `reliability` curve of the probabilities.
    """
    return {
        level: {
            "coverage": float(given.mean()),
            "accuracy": float(hit[given].mean()) if given.any() else None,
            "accuracy_forced": float(hit.mean()),
            "calibration_error": expected_calibration_error(p, hit),
            "calibration_noise_floor": calibration_noise_floor(p),
            "reliability": reliability(p, hit),
        }
        for level, hit, given, p in zip(levels, right.T, answered.T, probability.T, strict=True)
    }


def answer_counts(
    paths: Sequence[tuple[str, ...]],
    studies: Sequence[str] | None,
    right: np.ndarray,
    answered: np.ndarray,
    novel: np.ndarray,
) -> list[dict[str, Any]]:
    """A row per path of labels and study, sorted, of n cells with these true paths and studies.

    right, answered: (n, levels) bool, as in `answer_scores`; novel: (n,) bool, flagged as of an unknown type.
    -> `path`, `study` ("" without studies), `cells`, `right` (if all were answered), `answered` and `right_answered`
    (lists, a count per level), and `novel`.
    """
    groups: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for i, key in enumerate(zip(paths, studies or [""] * len(paths), strict=True)):
        groups.setdefault(key, []).append(i)
    counts = {"right": right, "answered": answered, "right_answered": right & answered}
    return [
        {
            "path": list(path),
            "study": study,
            "cells": len(rows),
            **{name: values[rows].sum(0).tolist() for name, values in counts.items()},
            "novel": int(novel[rows].sum()),
        }
        for (path, study), rows in sorted(groups.items())
    ]


def answer_table(scores: Mapping[str, Mapping[str, Any]], columns: int = len(COLUMNS)) -> str:
    """Markdown of what `answer_scores` returns: a row per level, and the first of COLUMNS."""
    keys = list(COLUMNS)[:columns]
    rows = [
        [level, *("-" if figures[key] is None else f"{figures[key]:.3f}" for key in keys)]
        for level, figures in scores.items()
    ]
    return table(["Level", *(COLUMNS[key] for key in keys)], rows)
