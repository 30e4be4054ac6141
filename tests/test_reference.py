"""A reference as the commands and the Python API make and use it: folder, card, restriction, vote, space, scores."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fractal.annotate import folder as folders
from fractal.annotate.annotator import Annotator
from fractal.annotate.answers import CAUTION, NOVEL, answer
from fractal.annotate.calibration import Calibration
from fractal.annotate.card import code, model_card
from fractal.annotate.votes import Raw
from fractal.base.errors import InputError
from fractal.data.atlas import LabelledVectors
from fractal.hierarchy.levels import LEVELS
from fractal.model.checkpoint import build_adapter
from fractal.reference import Reference, load_adapter, make_reference, read_reference
from tests.conftest import columns

CLASSES = [["I", "S"], ["L", "M"], ["f", "m", "t"], ["a", "b", "c", "d"]]
LABELS = np.array([[0, 0, 2, 0], [0, 0, 2, 1], [0, 1, 1, 2], [1, 0, 0, 3]])
PATHS = [tuple(CLASSES[k][c] for k, c in enumerate(row)) for row in LABELS.tolist()]
CENTRES = np.random.default_rng(5).normal(size=(4, 8))


def cells(n: int, seed: int) -> LabelledVectors:
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 4, n)
    x = (CENTRES[types] + 0.3 * rng.normal(size=(n, 8))).astype(np.float32)
    return LabelledVectors(x, LABELS[types], CLASSES)


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.manual_seed(0)
    config = {"recipe": "fractal", "dim": 8, "num_levels": 4, "scale_dim": 4, "paths": LABELS.tolist(),
              "levels": list(LEVELS), "block_levels": [0, 1, 2, 3]}  # fmt: skip
    counts = dict(zip(PATHS, (700, 100, 100, 100), strict=True))
    evil = "</td><script>alert(1)</script> [x](javascript:1) `\x1b[31m\n# x"
    facts = {"source": evil, "data": evil, "versions": {evil: evil}, "split": {"fingerprint": evil}}
    adapter = build_adapter(config, CLASSES)
    annotator = Annotator.of(adapter, cells(200, 0), cells(400, 1), counts)
    return make_reference(annotator, config, CLASSES, cells(300, 2), facts)


def test_what_is_written_is_read_again(reference: Reference, tmp_path: Path):
    replace(reference).save(tmp_path / "ref")
    again = read_reference(tmp_path / "ref")
    x = cells(50, 3).vectors
    for name, values in columns(reference.annotator, x).items():
        again_values = columns(again.annotator, x)[name]
        assert np.array_equal(values, again_values, equal_nan=values.dtype.kind == "f")
    adapter, facts = load_adapter(tmp_path / "ref")
    assert adapter.dim == facts["config"]["dim"] == 8
    assert (facts["reference_cells"], facts["reference_types"], facts["training_cells"]) == (200, 4, 1000)
    replace(again).save(tmp_path / "ref")  # its own files are replaced


def test_a_reference_that_a_killed_run_moved_away_is_put_back(reference: Reference, tmp_path: Path):
    part = tmp_path / ".ref.01234567.part"  # as a run killed between its two renames leaves it
    for name in ("old", "new"):
        replace(reference).save(part / name)
    assert read_reference(tmp_path / "ref").levels == reference.levels
    assert [path.name for path in tmp_path.iterdir()] == ["ref"]


def test_a_reference_that_is_replaced_while_it_is_read(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All that is read is of one run, not the first one's facts and the second one's cells."""
    path, load_file = tmp_path / "ref", folders.load_file
    a = reference.annotator
    other = replace(reference, annotator=replace(a, vectors=a.vectors[::-1].copy(), path=a.path[::-1].copy()))
    replace(reference).save(path)

    def replaced(file: Path) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(folders, "load_file", load_file)
        replace(other).save(path)
        return load_file(file)

    monkeypatch.setattr(folders, "load_file", replaced)
    again = read_reference(path)
    assert np.array_equal(again.annotator.vectors, other.annotator.vectors)
    assert again.facts["sha256"] == json.loads((path / "bundle.json").read_text())["sha256"]


def test_nothing_that_is_not_the_reference_s_own_is_lost(reference: Reference, tmp_path: Path):
    replace(reference).save(tmp_path / "ref")
    (tmp_path / "ref" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        replace(reference).save(tmp_path / "ref")
    assert (tmp_path / "ref" / "notes.txt").read_text() == "mine"


def test_foreign_text_on_the_card_is_no_markup(reference: Reference):
    card = model_card(reference.facts, 3)
    outside = "".join(card.replace("\n", " ").split("`")[::2])
    assert "script" in card
    assert not any(mark in outside for mark in ("script", "javascript", "\x1b", "alert"))
    assert code("a`b\x1b[1m\nc") == "`a'b\\x1b[1m c`"


def test_a_restricted_reference_is_calibrated_for_what_is_left(reference: Reference):
    keep = np.array([path[1] == "L" and path[0] == "I" for path in reference.annotator.tree.paths])
    whole = reference.annotator
    part = whole.restricted(keep)
    assert set(part.path) == set(np.flatnonzero(keep))
    assert keep[part.held_out.path].all()
    assert keep[part.held_out.neighbour_path[np.isfinite(part.held_out.cosine)]].all()
    x = cells(400, 4)
    found = columns(part, x.vectors, novelty="off")
    left = x.labels[:, 3] < 2
    assert (found["status"][~left] == "excluded").mean() > 0.9
    assert (found["status"][left] == "excluded").mean() < 0.1
    with pytest.raises(InputError, match="no reference cell"):
        whole.restricted(np.zeros(4, bool))
    none_to_calibrate = replace(whole, held_out=replace(whole.held_out, path=np.full_like(whole.held_out.path, 3)))
    with pytest.raises(InputError, match="too few to calibrate"):
        none_to_calibrate.restricted(keep)


def test_the_novelty_rule_can_be_had_without(reference: Reference):
    x = np.concatenate([cells(100, 5).vectors, np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32) * 9])
    found = {rule: columns(reference.annotator, x, novelty=rule) for rule in ("on", "flag", "off")}
    assert (found["on"]["status"][100:] == "novel").mean() > 0.3
    assert (found["on"]["withheld_by"] == "novelty").any()
    assert np.array_equal(found["flag"]["status"] == "novel", found["on"]["status"] == "novel")
    assert not np.isin(found["off"]["status"], ["novel", "withheld"]).any()
    for rule in ("flag", "off"):
        assert not (found[rule]["withheld_by"] == "novelty").any()
        assert np.array_equal(found[rule]["level"], found["off"]["level"])


def test_p_values_are_those_of_the_natural_mix(reference: Reference):
    """Validation cells are balanced, the file is not: type `a` counts seven times as much."""
    x = cells(4_000, 6)
    p = columns(reference.annotator, x.vectors)["p_value"]
    weight = np.where(x.labels[:, 3] == 0, 7.0, 1.0)
    assert np.average(p < 0.2, weights=weight) == pytest.approx(0.2, abs=0.06)


def test_an_odd_cell_loses_its_fine_labels_and_an_odder_one_is_flagged():
    """1,000 held-out cells of oddness 1 to 1,000: the p-value of a cell is the share that is as odd."""
    held_out, ones, nothing = np.arange(1.0, 1_001.0), np.ones(1_000), np.zeros(0)
    certain = (np.array([0.0, 1.0]), np.array([0.9, 0.9]))
    knots = (held_out, ones)
    sure = Calibration([certain] * 3, [knots] * 3, knots, nothing, nothing, nothing, nothing)
    sure = replace(sure, ood_score=(np.sort(sure.score(np.repeat(held_out[:, None], 3, 1))), ones))
    shares = np.array([0.5, (CAUTION + NOVEL) / 2, NOVEL / 2])
    odd = 1_001 - 1_000 * shares
    raw = Raw(
        np.zeros(3, np.int64), np.ones((3, 3)), np.repeat(odd[:, None], 3, 1), np.zeros(3), np.full(3, -1), np.zeros(3)
    )
    found = answer(raw, sure)
    assert np.allclose(found.p_value, shares, atol=0.002)
    assert found.depth.tolist() == [3, 2, 2]
    assert found.novel.tolist() == [False, False, True]
    assert answer(raw, sure, novelty="flag").depth.tolist() == [3, 3, 3]
