"""Intervals against scipy, and what their unit is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fractal.score import intervals
from fractal.score.intervals import grouped_interval, share_interval, wilson_interval


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_equals_scipy(n: int, share: float):
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_an_interval_at_the_edge_has_a_width():
    low, high = wilson_interval(100, 100)
    assert low == pytest.approx(0.963, abs=1e-3)
    assert high == 1


def test_intervals_are_of_cells_or_of_groups():
    right = np.array([True] * 30 + [False] * 10)
    groups = np.repeat([7, 1, 2, 3], 10)
    assert share_interval(right, None) == wilson_interval(30, 40)
    assert share_interval(right, groups) == grouped_interval(np.array([10, 10, 0, 10]), np.full(4, 10))
    assert share_interval(right, np.zeros(40)) is None
    assert share_interval(right[:0], None) is None


def test_groups_that_agree_are_cells_and_groups_that_do_not_are_single_draws():
    """20 groups of 100: alike but for chance, about as sure as 2,000 cells; right or wrong as a whole, as 20 coins."""
    chance = np.random.default_rng(0).binomial(100, 0.8, 20)
    low, high = grouped_interval(chance, np.full(20, 100))
    expected = wilson_interval(int(chance.sum()), 2_000)
    assert (low, high) == pytest.approx(expected, abs=0.02)
    low, high = grouped_interval(np.repeat([100, 0], [16, 4]), np.full(20, 100))
    assert (low, high) == pytest.approx(wilson_interval(16, 20), abs=0.05)
    low, high = grouped_interval(np.full(3, 100), np.full(3, 100))
    assert low < 0.9  # three groups, not three hundred cells
    assert high == 1


def test_the_grid_is_fine_enough(monkeypatch: pytest.MonkeyPatch):
    groups = [([10, 10, 0, 10], [10] * 4), ([199, 200, 200], [200] * 3), ([900, 15, 60], [1_000, 20, 100])]
    found = [grouped_interval(np.array(hits), np.array(sizes)) for hits, sizes in groups]
    monkeypatch.setattr(intervals, "MEANS", 2 * intervals.MEANS)
    monkeypatch.setattr(intervals, "CORRELATIONS", 2 * intervals.CORRELATIONS)
    intervals.grid.cache_clear()
    finer = [grouped_interval(np.array(hits), np.array(sizes)) for hits, sizes in groups]
    intervals.grid.cache_clear()
    assert np.allclose(found, finer, atol=0.01)


@pytest.mark.parametrize("studies", [3, 5, 10])
@pytest.mark.parametrize(("share", "correlation"), [(0.8, 0.2), (0.99, 0.2)])
def test_intervals_over_studies_cover(studies: int, share: float, correlation: float):
    """Of 200 draws of beta-binomial studies; resampling whole studies covers .13 to .9 of these."""
    rng, size = np.random.default_rng(0), 1 / correlation - 1
    hits = rng.binomial(200, rng.beta(share * size, (1 - share) * size, (200, studies)))
    found = [grouped_interval(row, np.full(studies, 200)) for row in hits]
    assert np.mean([low <= share <= high for low, high in found]) >= 0.9
