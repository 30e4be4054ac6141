"""The statistics behind the tables, against examples worked by hand."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

import train
from benchmarks import unseen
from benchmarks.ablations import ABLATIONS
from benchmarks.annotation import THRESHOLDS, at_threshold, off_path, threshold_table
from benchmarks.frontier import figures, settings
from benchmarks.plan import Line as Measured
from benchmarks.plan import fitted
from benchmarks.quality import differences, narrow, own_embedding, paired, summary
from benchmarks.unseen import Draw, Line, Result, bar_2, compare, in_twos
from fractal.annotate.answers import Answer, depths
from fractal.annotate.novelty import CAUTION, NOVEL
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas
from fractal.hierarchy.levels import LEVELS
from fractal.model.adapter import FractalAdapter
from fractal.model.checkpoint import build_adapter, load, save
from fractal.model.recipes import Recipe
from tests.conftest import TYPES, clustered, write_release

pytestmark = pytest.mark.slow

FOUR = {"recipe": "fractal", "num_levels": 4}
BLOOD = {"recipe": "fractal", "num_levels": 3, "block_levels": [1, 2, 3]}


def test_summary_by_hand():
    """Seeds of two folds: means .8, .9, 1.0; their standard deviation with n - 1 is .1 (with n it would be .082)."""
    assert summary([0.7, 0.9, 0.9, 0.9, 1.0, 1.0], 3) == "0.900 ± 0.100"
    assert summary([0.7, None], 2) == "-"
    assert summary([0.7], 1) == "0.700"


def test_a_cell_that_is_tested_twice_counts_once():
    """Cell 1 twice, +1 and -1; cells 2 and 3 once, +1 each: mean 2 / 3, not 1 / 2."""
    assert paired(np.array([1, -1, 1, 1]), np.array([1, 1, 2, 3])).startswith("+0.667 [")


def test_studies_are_the_unit_where_they_are_held_out():
    """Study a: ten cells of +1. Study b: two cells of 0, one of them tested twice. Study c: one of 0."""
    difference = np.array([1] * 10 + [0] * 3 + [0])
    cells, studies = np.array([*range(10), 10, 11, 11, 12]), np.array([0] * 10 + [1] * 3 + [2])
    half = stats.t.ppf(0.975, 2) * np.std([1, 0, 0], ddof=1) / 3**0.5
    assert paired(difference, cells, studies) == f"+0.333 [{1 / 3 - half:+.3f}, {1 / 3 + half:+.3f}]"


def run_of(right: dict[str, list[list[int]]], rows: list[int], config: dict) -> tuple[dict, dict]:
    stack = np.array(list(right.values()), bool)
    return (
        {"rows": [{"embedding": name} for name in right], "config": [config]},
        {"rows": np.array(rows), "loo": stack, "bank": stack},
    )


def test_differences_by_hand():
    """Two cells; `fractal full` is right in 2 of 2 at each level, raw in 1, prefix 1 in none."""
    right = {"raw": [[1] * 4, [0] * 4], "fractal full": [[1] * 4] * 2}
    right |= {f"fractal prefix {j}": [[0] * 4] * 2 for j in (1, 2, 3)}
    found = differences([run_of(right, [4, 9], FOUR)], 1, one_atlas_a_seed=False)
    assert all(text.startswith("+0.500 [") for text in found["loo: full - raw"])
    assert [text[:6] for text in found["bank: prefix j at level j - full"]] == ["-1.000"] * 3 + ["-"]
    # the same cells in a second run, where raw is right: each counts once, with half a difference
    again = run_of(right | {"raw": [[1] * 4] * 2}, [4, 9], FOUR)
    found = differences([run_of(right, [4, 9], FOUR), again], 2, one_atlas_a_seed=False)
    assert all(text.startswith("+0.250 [+0.000, +0.500]") for text in found["loo: full - raw"])
    # another atlas: four cells
    found = differences([run_of(right, [4, 9], FOUR), again], 2, one_atlas_a_seed=True)
    assert all(text.startswith("+0.250 [+0.000, +0.750]") for text in found["loo: full - raw"])


def test_the_embedding_of_a_level_follows_the_blocks():
    assert [own_embedding(FOUR, k) for k in range(4)] == ["prefix 1", "prefix 2", "prefix 3", "full"]
    assert [own_embedding(BLOOD, k) for k in range(4)] == ["prefix 1", "prefix 1", "prefix 2", "full"]
    two = {"recipe": "fractal", "num_levels": 2}
    assert [own_embedding(two, k) for k in range(4)] == ["prefix 1", "full", None, None]


def test_a_narrow_atlas_is_the_same_rows_as_principal_components(stratified: Path):
    assert narrow(stratified, 0) == stratified
    path = narrow(stratified, 3)
    rows = np.arange(40)
    whole, cut = Atlas.open(stratified).read(rows), Atlas.open(path).read(rows)
    assert np.array_equal(whole.labels, cut.labels)
    assert Atlas.open(path).metadata == Atlas.open(stratified).metadata | {"dim": "3"}
    every = Atlas.open(stratified).read(np.arange(int(pq.read_metadata(stratified).num_rows))).vectors
    unit = every / np.linalg.norm(every, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    assert np.allclose(np.abs(cut.vectors), np.abs(u[:40, :3] * s[:3]), atol=1e-4)  # signs are free


def test_points_of_the_frontier_change_the_weights_that_they_name():
    adapter = FractalAdapter(8, 2, 4, torch.tensor([[0, 0], [0, 1]]))
    residual, sharpness, block = (
        tensor.clone() for tensor in (adapter.residual_scale, adapter.sharpness, adapter.block_scale)
    )
    found = {
        name: (adapter.residual_scale.clone(), adapter.sharpness.clone(), adapter.block_scale.clone())
        for name in settings(adapter)
    }
    assert torch.equal(found["residual x 1"][0], residual)
    assert torch.equal(found["residual x 1"][1], sharpness)
    assert torch.equal(found["residual x 1.5, not sharpened"][0], 1.5 * residual)
    assert found["residual x 1.5, not sharpened"][1].eq(1).all()
    assert torch.equal(found["residual x 1.5, not sharpened"][2], block)
    assert torch.equal(found["cell alone"][0], residual)
    assert not found["cell alone"][2].any()


def test_figures_of_the_frontier_by_hand():
    """Types a, b seen; c not. With c among the queries a cell of b has mostly cells of c around it."""
    angle = torch.tensor([0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, *[1.0 + 0.001 * i for i in range(8)], *[1.1] * 3])
    full = torch.stack([angle.cos(), angle.sin()], 1)
    labels = torch.tensor([0] * 7 + [2] * 8 + [1] * 3)[:, None].repeat(1, 2)
    unseen, seen, alone, own = figures([full, full], [0, 1], labels, labels[:, 0] != 2)
    assert unseen == 1.0
    assert seen == pytest.approx(0.7)  # 7 of a; the 3 of b see two of their own and three of c
    assert alone == pytest.approx(0.7)  # two of their own and three of a
    assert own == 1.0  # both prefixes are alike, and so are both levels


def test_points_of_the_novelty_rule_are_what_the_rule_would_do():
    """At the default they are the flags and depths of the answer itself."""
    rng = np.random.default_rng(0)
    probability = np.sort(rng.uniform(0.5, 1, (200, 4)))[:, ::-1]
    p_value = rng.uniform(0, 0.2, 200)
    confident, depth = depths(probability, p_value, 0.8, "on")
    zeros = np.zeros(200)
    no = np.zeros(200, bool)
    of_cells = zeros, zeros, p_value, p_value < NOVEL, no, ~no, np.full(200, -1), zeros
    said = Answer(zeros, probability, confident, depth, *of_cells)
    flagged, there = at_threshold(said, NOVEL)
    assert np.array_equal(flagged, said.novel)
    assert np.array_equal(there, depth)
    threshold = 0.2 * NOVEL / CAUTION  # caution below .2: all of them
    flagged, there = at_threshold(said, threshold)
    assert flagged.mean() == (p_value < threshold).mean()
    assert (there == np.minimum(confident, 2)).all()


def test_the_table_of_thresholds_weighs_types_alike():
    keys = ("flagged", "found", "known flagged", "known withheld")
    points = [f"{key} at {t:g}" for t in THRESHOLDS for key in keys]
    runs = {"a": [dict.fromkeys(points, 0.2), dict.fromkeys(points, 0.4)], "b": [dict.fromkeys(points, 0.9)]}
    lines = threshold_table(runs).splitlines()[2:]
    assert len(lines) == len(THRESHOLDS)
    assert all(line.count("0.600") == 4 for line in lines)


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_what_an_ablation_replaces_is_there_and_its_checkpoint_is_read_again(name: str, tmp_path: Path):
    config = {"recipe": "fractal", "dim": 8, "num_levels": 2, "scale_dim": 4, "block_levels": [0, 1],
              "levels": ["a", "b"], "paths": [[0, 0], [0, 1]]}  # fmt: skip
    classes = [["x"], ["y", "z"]]
    facts: dict[str, Any] = {"split": {}, "training": {}, "versions": {}, "validation": None}
    with ExitStack() as stack:
        for target, value in ABLATIONS[name][1]().items():
            stack.enter_context(patch(target, value))
        save(tmp_path / "a.pt", build_adapter(config, classes), config, classes, **facts)
        adapter, _ = load(tmp_path / "a.pt")
    assert adapter.encode(torch.ones(1, 8)).shape == (1, 8)


def test_donors_in_twos_hold_every_donor_once():
    names = [f"d{i}" for i in range(9)]
    pairs = in_twos(names)
    assert sorted(name for pair in pairs for name in pair) == names
    assert [len(pair) for pair in pairs] == [2, 2, 2, 2, 1]
    assert pairs == in_twos(names)
    assert pairs != in_twos(names, 1)


def result_of(
    number: int, types: list[int], full: list[int], raw: list[int], studies: list[int] | None = None
) -> Result:
    """A draw of which types 2 and 3 are unseen; two embeddings, right or wrong alike at all levels."""
    right = np.array([full, raw, full], bool)[:, :, None].repeat(4, axis=2)
    labels = np.array(types)[:, None].repeat(4, axis=1)
    names = ["fractal full", "raw", "fractal prefix 1"]
    figures = {
        "rows": [{"embedding": name} for name in names],
        "classes": [[]] * 3 + [["a", "b", "c", "d"]],
        "config": [BLOOD | {"block_levels": [1, 3], "num_levels": 2}],
    }
    seen = labels[:, 0] < 2
    cells = {"loo": right, "bank": right, "labels": labels, "seen": seen, "counts": np.ones((len(types), 4), bool)}
    kind = "types" if studies is None else "studies"
    return Result(Draw(kind, "pbmc_tonsil", number), figures, cells, None if studies is None else np.array(studies))


def test_unseen_types_are_the_unit_and_draws_weigh_the_same():
    """Draw 0: four unseen cells, full right in all, raw in two. Draw 1: one, both wrong."""
    one = result_of(0, [0, 1, 2, 2, 3, 3], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0])
    two = result_of(1, [0, 3], [1, 0], [1, 0])
    line = compare("1", [one, two], "unseen", "loo", 3, "fractal full", ["raw"], 0.0)
    assert line is not None
    assert (line.ours, line.best, line.best_name) == (0.5, 0.25, "raw")
    # types c: differences 0, 0; d: 1, 1 and 0. A resample of c alone gives 0, of d alone .5 / (.5 + 1)
    assert line.interval == pytest.approx((0.0, 0.5 / 1.5))
    seen = compare("1", [one, two], "seen", "loo", 3, "fractal full", ["raw"], 0.0)
    assert seen is not None
    assert (seen.ours, seen.best) == (0.5, 1.0)
    one.cells["counts"][:] = two.cells["counts"][:] = False
    assert compare("2", [one, two], "unseen", "bank", 0, "fractal full", ["raw"], 0.0) is None


def test_studies_weigh_the_same():
    """Study 7: three cells, full right in all, raw in none; study 8: one cell, both right."""
    result = result_of(0, [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [7, 7, 7, 8])
    line = compare("3", [result], "studies", "loo", 3, "fractal full", ["raw"], 0.0)
    assert line is not None
    assert (line.ours, line.best, line.difference) == (1.0, 0.5, 0.5)


def test_verdicts():
    def verdict(difference: float, high: float, asked: float) -> str:
        return Line("1", "x", "y", 0.9, 0.9, "raw", difference, (-0.1, high), asked).verdict

    assert verdict(0.0, 0.1, 0.0) == verdict(-0.01, 0.0, -0.01) == "met"
    assert verdict(-0.02, 0.01, 0.0) == "open"
    assert verdict(-0.02, -0.01, 0.0) == "not met"


def test_the_prefix_of_a_level_is_looked_up_in_each_draw():
    result = result_of(0, [2, 3], [1, 0], [0, 0])
    assert result.right("loo", "fractal own", 3).tolist() == [True, False]  # full
    assert result.right("loo", "fractal own", 0).tolist() == [True, False]  # prefix 1
    with patch.object(unseen, "compare", return_value=None) as asked:
        bar_2([result])
    assert [call.args[4] for call in asked.call_args_list] == [0, 1, 2]
    assert len(LEVELS) == 4


def test_a_draw_tells_train_what_to_hold_out():
    assert Draw("types", "simulated", 1).flags == ["--holdout", "type"]
    assert Draw("studies", "simulated", 1).flags == ["--holdout", "study"]
    assert Draw("studies", "pancreas_studies", 0, ("xin",)).flags == ["--test-studies", "xin"]
    assert Path("data") in unseen.get_parser().parse_args([]).output.parents


@pytest.mark.slow
def test_unseen_from_release_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Two studies of 60 cells in the place of the pancreas, one epoch; a second run makes nothing again."""
    labels = TYPES * 20
    release = tmp_path / "real" / "pancreas_studies" / "model_v1.1"
    write_release(release, clustered(labels), labels, np.repeat(["s1", "s2"], 60).tolist())
    calls: list[list[str]] = []
    whole = train.main

    def one_epoch(argv: list[str], control: Recipe | None = None) -> None:
        calls.append(argv)
        whole([*argv, "--epochs", "1", "--scale-dim", "4"], control)

    monkeypatch.setattr(train, "main", one_epoch)
    argv = ["--data", str(tmp_path / "real"), "--atlases", "pancreas_studies", "--draws", "1", "--jobs", "1"]
    argv += ["--output", str(tmp_path / "out")]
    unseen.main(argv)
    assert len(calls) == 4 * (1 + 2)  # recipes x (a draw of types, and every study)
    held_out = [call[call.index("--test-studies") + 1] for call in calls if "--test-studies" in call]
    assert held_out == ["s1"] * 4 + ["s2"] * 4
    result = json.loads((tmp_path / "out" / "unseen.json").read_text())
    assert {line["bar"] for line in result["bar"]} == {"1", "2", "3"}
    assert len([line for line in result["bar"] if line["bar"] == "3"]) == 16  # 2 protocols x 4 levels x 2 measures
    assert {line["verdict"] for line in result["bar"]} <= {"met", "open", "not met"}
    first = (tmp_path / "out" / "unseen.md").read_text()
    assert "| Bar | " in first
    short = {
        tuple(row[:2]): row[2:]
        for row in ([c.strip() for c in line.split("|")[1:-1]] for line in first.split("In short")[1].splitlines())
        if len(row) == 8
    }
    figures = [draw["figures"]["rows"] for draw in result["draws"]]
    named = [{row["embedding"]: row for row in rows} for rows in figures]
    share = next(rows["raw"]["unseen"]["loo"]["subtype"] for rows in named if "unseen" in rows["raw"])
    assert short["pancreas_studies", "loo subtype"][0] == f"{share:.3f}"
    of_studies = [rows["fractal full"]["bank_macro_f1"]["subtype"] for rows in named[1:]]
    assert short["pancreas_studies", "bank, macro F1"][-1] == f"{np.mean(of_studies):.3f}"
    unseen.main(argv)
    assert len(calls) == 12
    assert (tmp_path / "out" / "unseen.md").read_text() == first


def test_the_plan_finds_the_constants_that_made_the_lines(tmp_path: Path):
    """Of computing: 2 s and 3 us a cell, and 1 us more of stratify's cells beyond 917,504; of memory 100 MB and 8."""
    path = tmp_path / "lines.json"
    sizes = [100_000, 1_000_000, 2_000_000, 4_000_000]
    lines = [
        {"stage": stage, "cells": n, "RssAnon": 1e8 + 8 * n, "cpu": 2 + 3e-6 * n + extra * max(0, n - 917_504)}
        for stage, extra in (("ingest", 0), ("stratify", 1e-6))
        for n in sizes
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [{**lines[0], "cpu": 99.0}, *lines]))  # the last counts
    for model, largest in fitted(Measured.read(path)):
        assert largest.cells == 4_000_000
        assert model.seconds(4_000_000) == pytest.approx(largest.cpu, rel=1e-6)
        assert model.bytes(4_000_000) == pytest.approx(132e6, rel=1e-6)
        assert model.cpu[:2] == pytest.approx([2, 3e-6], rel=1e-4)
        assert model.memory[:2] == pytest.approx([1e8, 8], rel=1e-4)
        assert model.memory[2:] == pytest.approx([0] * (len(model.memory) - 2), abs=0.01)
    path.write_text("{}")
    with pytest.raises(InputError, match="no lines of"):
        Measured.read(path)


def test_the_way_from_an_answer_to_the_nearest_term_that_is_true():
    """Three terms in a row. True of the cells are the first two, the first two, and the first alone."""
    steps = np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    true = np.array([[True, True, False], [True, True, False], [True, False, False]])
    assert off_path(steps, true, np.array([2, 1, 2])).tolist() == [1, 0, 2]
