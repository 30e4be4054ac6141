"""Restriction to some types, the rule of novelty, and p-values, of a small reference."""

from dataclasses import replace

import numpy as np
import pytest

from fractal.base.errors import InputError
from fractal.reference import Reference
from tests.annotate.conftest import cells
from tests.conftest import columns


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
