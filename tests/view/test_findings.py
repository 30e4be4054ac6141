"""The tables follow from the figures, whatever these are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.hierarchy.levels import LEVELS
from fractal.score.answers import answer_counts
from fractal.score.intervals import wilson_interval
from fractal.score.metrics import reliability
from fractal.view import findings, page
from fractal.view.draw import share, short
from fractal.view.findings import Section
from fractal.view.scored import Scored
from tests.view.conftest import FOUR, check_page


def cautions_of(section: Section | None) -> dict[str, str]:
    assert section
    return dict(findings.cautions([section]))


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_the_prefix_to_use_is_the_shortest_that_loses_at_most_a_hundredth(hundredths):
    chosen = findings.choose([value / 100 for value in hundredths])
    good = [j for j, value in enumerate(hundredths) if max(hundredths) - value <= 1]
    assert chosen == min(good)


def test_of_many_the_first_are_named():
    assert findings.first(["a", "b"]) == "a; b"
    assert findings.first(list("abcdef"), 2) == "a; b; 4 more"


def with_accuracy(s: Scored, values: dict[str, list[float]], raw: float) -> Scored:
    """The accuracies by level of prefix 1, 2, ..., full, and those of the raw vectors, in bank."""
    prefixes = [{**row, "bank": {k: values[k][j] for k in values}} for j, row in enumerate(s.prefixes)]
    return replace(s, prefixes=prefixes, raw={**s.raw, "bank": dict.fromkeys(values, raw)}, controls=[])


def test_which_prefix_for_which_level(scored: Scored):
    values = {"system": [0.99, 0.99, 0.995, 1.0], "lineage": [0.5, 0.9, 0.9, 0.9]}
    values |= {"type": [0.5, 0.6, 0.9, 0.905], "subtype": [0.5, 0.6, 0.7, 0.8]}
    section = findings.prefixes(with_accuracy(scored, values, 0.85))
    columns = [[row[i].split(" [")[0] for row in section.rows] for i in range(6)]
    assert columns == [
        list(LEVELS),
        ["prefix 1 (4)", "prefix 2 (8)", "prefix 3 (12)", "full (16)"],
        [".990", ".900", ".900", ".800"],
        [".850"] * 4,
        [".850, raw"] * 4,
        ["", "prefix 1", "prefix 1; prefix 2", "prefix 1; prefix 2; prefix 3"],
    ]
    assert cautions_of(section)["A simpler method is better"] == "subtype (.850, raw against .800)"
    assert len(section.panels) == 6  # a panel per level, the legend, the silhouettes
    assert "A simpler method is better" not in cautions_of(findings.prefixes(with_accuracy(scored, values, 0.5)))


def test_the_prefix_to_draw_is_the_most_separated(scored: Scored):
    section = findings.prefixes(scored)
    for k, level in enumerate(LEVELS):
        column = [row["silhouette"][level] for row in scored.prefixes]
        prefix = column.index(max(column))
        assert section.rows[k][0] == level
        assert section.rows[k][-2:] == [scored.names[prefix], share(max(column), 2)]
    flat = [{**row, "silhouette": {**row["silhouette"], "type": 0.09}} for row in scored.prefixes]
    section = findings.prefixes(replace(scored, prefixes=flat))
    assert "type" in cautions_of(section)["No prefix shows islands: do not cluster for it"]


@pytest.mark.parametrize("level", range(4))
def test_mistakes_are_those_that_a_slow_count_finds(scored: Scored, level: int):
    section = findings.mistakes(scored, level)
    assert section
    labels, guess = scored.truth.labels.numpy(), scored.prefixes[-1]["bank_predicted"]
    names = scored.classes[level]
    pairs: dict[tuple[str, str], int] = {}
    inside = 0
    for row, answer in zip(labels, guess, strict=True):
        if row[level] != answer[level]:
            pair = (names[row[level]], names[answer[level]])
            pairs[pair] = pairs.get(pair, 0) + 1
            parents = [{path[level - 1] for path in FOUR if path[level] == name} for name in pair]
            inside += bool(level and parents[0] & parents[1])
    wrong = sum(pairs.values())
    assert wrong
    assert section.rule.startswith(f"{wrong} of 120 cells are wrong")
    if level:
        assert f"{share(inside / wrong)} of these inside the right {LEVELS[level - 1]}" in section.rule
    table = {(true, answered): int(cells) for true, answered, cells, _ in section.rows}
    assert table == {(short(a), short(b)): cells for (a, b), cells in pairs.items()}
    assert max(pairs.values()) == int(section.rows[0][2])


def test_no_mistake_and_one_class(scored: Scored):
    right = replace(
        scored, prefixes=[{**row, "bank_predicted": scored.truth.labels.numpy()} for row in scored.prefixes]
    )
    section = findings.mistakes(right, 3)
    assert section
    assert section.rule.startswith("0 of 120 cells are wrong:")
    assert not section.rows
    one = replace(scored, paths=np.array([[0, 0, 0, 0], [0, 1, 1, 1]]))
    assert one.compared() == [1, 2, 3]
    assert findings.prefixes(one).rows[0][:2] == ["system", "one class only"]
    nothing = replace(scored, paths=np.zeros((1, 4), int))
    assert len(findings.prefixes(nothing).panels) == 1  # the silhouettes
    check_page(page.render("x", [nothing], [findings.sections(nothing)]))


def test_weak_types_come_first_and_few_cells_are_not_judged(scored: Scored):
    labels, right = scored.truth.labels[:, 3].numpy(), np.ones((120, 4), bool)
    weak = np.flatnonzero(labels == 1)
    right[weak[: len(weak) // 2], 3] = False
    section = findings.types(
        replace(scored, answers={}, prefixes=[{**row, "bank_right": right} for row in scored.prefixes])
    )
    assert section
    hits, n, name = len(weak) - len(weak) // 2, len(weak), short(scored.classes[3][1])
    low, high = wilson_interval(hits, n)
    assert section.rows[1] == [name, str(n), f"{share(hits / n)} [{share(low)}, {share(high)}]"]
    assert section.rows[0][:2] == ["all classes", "120"]
    assert cautions_of(section) == {
        "Classes that are right for less than .8": f"{name} ({share(hits / n)} of {n} cells)"
    }
    fine = findings.types(
        replace(scored, answers={}, prefixes=[{**row, "bank_right": right | True} for row in scored.prefixes])
    )
    assert not cautions_of(fine)
    few = replace(scored, answers={}, truth=replace(scored.truth, counts=np.arange(120)[:, None].repeat(4, 1) < 8))
    assert "Classes with fewer than 20 cells, too few to judge" in cautions_of(findings.types(few))


def test_a_row_per_type_and_study_of_what_is_answered(scored: Scored):
    """Against a slow count of cells."""
    rng = np.random.default_rng(0)
    right, answered, novel = rng.random((120, 4)) < 0.7, rng.random((120, 4)) < 0.6, rng.random(120) < 0.1
    paths, studies = [FOUR[i] for i in rng.integers(0, 4, 120)], rng.choice(["x", "y", "z"], 120).tolist()
    counts = answer_counts(paths, studies, right, answered, novel)
    section = findings.types(replace(scored, answers={"seen": {"classes": counts}}))
    assert section
    name = ""
    for row in section.rows:
        name = row[0] or name
        kinds = [("all classes", short(path[3])) for path in paths]
        cells = [i for i in range(120) if name in kinds[i] and row[1] in ("all", studies[i])]
        hits, given = right[cells, 3], answered[cells, 3]
        assert row[2:] == [
            str(len(cells)),
            findings.with_interval(hits.mean(), wilson_interval(hits.sum(), len(cells))),
            share(given.mean()),
            share(hits[given].mean()) if given.any() else "–",
            share(novel[cells].mean()),
        ]
    shares = [float(row[3].split(" ")[0]) for row in section.rows if row[1] == "all"]
    assert shares[1:] == sorted(shares[1:])
    assert len(section.rows) == 4 * 5


def score_of(probability: np.ndarray, right: np.ndarray, floor: float = 0.005) -> dict[str, Any]:
    bins = reliability(probability, right)
    error = float(sum(abs(bin["probability"] - bin["accuracy"]) * bin["cells"] for bin in bins) / len(right))
    return {"reliability": bins, "calibration_error": error, "calibration_noise_floor": floor}


def test_probabilities_hold_or_are_too_high_or_too_low_or_both():
    rng = np.random.default_rng(0)
    p = rng.random(4_000)
    assert findings.calibrated(score_of(p, rng.random(4_000) < p, 0.02)) == "holds"
    assert findings.calibrated(score_of(p, np.zeros(4_000, bool))).startswith("too high by .")
    assert findings.calibrated(score_of(p, np.ones(4_000, bool))).startswith("too low by .")
    both = findings.calibrated(score_of(p, p < 0.5))
    assert both.startswith("off by")


def test_tenths_keep_every_cell_and_the_means():
    rng = np.random.default_rng(1)
    p = rng.random(700)
    right = rng.random(700) < p
    bins = findings.tenths(reliability(p, right))
    assert sum(bin["cells"] for bin in bins) == 700
    assert sum(bin["cells"] * bin["accuracy"] for bin in bins) == pytest.approx(right.sum())
    assert sum(bin["cells"] * bin["probability"] for bin in bins) == pytest.approx(p.sum())
    for bin in bins:
        assert bin["interval"] == wilson_interval(bin["accuracy"] * bin["cells"], bin["cells"])
        assert abs(bin["probability"] - bin["middle"]) <= 0.05


def test_controls_that_are_better_are_called_so(scored: Scored):
    better = {level: max(row["bank"][level] for row in scored.prefixes) + 0.1 for level in LEVELS}
    s = replace(scored, controls=[{**scored.raw, "embedding": "LDA", "dims": 3, "bank": better}])
    section = findings.prefixes(s)
    assert [row[4] for row in section.rows] == [f"{share(better[level])}, LDA" for level in LEVELS]
    assert all(level in cautions_of(section)["A simpler method is better"] for level in LEVELS)
