"""How good answers are, per level and per class: against slow counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.score.answers import answer_counts, answer_scores, answer_table

PATHS = [("I", "a"), ("I", "b"), ("S", "c")]


def drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.random((n, 2)) < 0.7, rng.random((n, 2)) < 0.5, rng.random((n, 2)), rng


@settings(max_examples=20)  # of 100 draws each, for the noise floor
@given(st.integers(1, 60), st.integers(0, 99))
def test_figures_per_level_are_those_of_a_slow_count(n: int, seed: int):
    right, answered, probability, _ = drawn(n, seed)
    scores = answer_scores(["system", "type"], right, answered, probability)
    for k, level in enumerate(("system", "type")):
        given_ = [bool(right[i, k]) for i in range(n) if answered[i, k]]
        assert scores[level]["coverage"] == pytest.approx(len(given_) / n)
        assert scores[level]["accuracy"] == (pytest.approx(np.mean(given_)) if given_ else None)
        assert scores[level]["accuracy_forced"] == pytest.approx(right[:, k].mean())
        assert sum(bin["cells"] for bin in scores[level]["reliability"]) == n
    assert answer_table(scores).count("\n") == 3


@given(st.integers(0, 60), st.integers(0, 99), st.booleans())
def test_counts_by_class_and_study_are_those_of_a_slow_count(n: int, seed: int, with_studies: bool):
    right, answered, _, rng = drawn(n, seed)
    novel = rng.random(n) < 0.2
    paths = [PATHS[i] for i in rng.integers(0, 3, n)]
    studies = rng.choice(["x", "y"], n).tolist() if with_studies else None
    rows = answer_counts(paths, studies, right, answered, novel)
    assert sum(row["cells"] for row in rows) == n
    keys = [(tuple(row["path"]), row["study"]) for row in rows]
    assert keys == sorted(set(keys))
    for (path, study), row in zip(keys, rows, strict=True):
        cells = [i for i in range(n) if paths[i] == path and (studies is None or studies[i] == study)]
        assert row["cells"] == len(cells)
        assert row["novel"] == sum(bool(novel[i]) for i in cells)
        for k in range(2):
            assert row["right"][k] == sum(bool(right[i, k]) for i in cells)
            assert row["answered"][k] == sum(bool(answered[i, k]) for i in cells)
            assert row["right_answered"][k] == sum(bool(right[i, k] and answered[i, k]) for i in cells)
