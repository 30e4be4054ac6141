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
    scores = {}
    for k, level in enumerate(levels):
        given, hit, p = answered[:, k], right[:, k], probability[:, k]
        scores[level] = {
            "coverage": float(given.mean()),
            "accuracy": float(hit[given].mean()) if given.any() else None,
            "accuracy_forced": float(hit.mean()),
            "calibration_error": expected_calibration_error(p, hit),
            "calibration_noise_floor": calibration_noise_floor(p),
            "reliability": reliability(p, hit),
        }
    return scores


def answer_table(scores: Mapping[str, Mapping[str, Any]], columns: int = len(COLUMNS)) -> str:
    """Markdown of what `answer_scores` returns: a row per level, and the first of COLUMNS."""
    keys = list(COLUMNS)[:columns]
    rows = [
        [level, *("-" if figures[key] is None else f"{figures[key]:.3f}" for key in keys)]
        for level, figures in scores.items()
    ]
    return table(["Level", *(COLUMNS[key] for key in keys)], rows)
