"""Intervals against scipy, and what their unit is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fractal.score.intervals import bootstrap_interval, cluster_bootstrap, share_interval, t_interval, wilson_interval


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_equals_scipy(n: int, share: float):
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_an_interval_at_the_edge_has_a_width():
    low, high = wilson_interval(100, 100)
    assert low == pytest.approx(0.963, abs=1e-3)
    assert high == 1


def test_t_interval_equals_scipy():
    values = [0.9, 0.95, 0.8, 0.85]
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    assert np.isnan(t_interval([0.5])).all()


def test_cluster_bootstrap_takes_groups_for_the_unit():
    """1,000 cells of ten donors that are right or wrong as a whole: the interval is that of ten coins."""
    donors = np.repeat(np.arange(10), 100)
    right = (donors < 7).astype(float)
    low, high = cluster_bootstrap(right, donors)
    expected = stats.binom(10, 0.7).ppf([0.025, 0.975]) / 10
    assert (low, high) == pytest.approx(tuple(expected), abs=0.01)
    narrow = bootstrap_interval(right)
    assert high - low > 5 * (narrow[1] - narrow[0])
    assert np.isnan(cluster_bootstrap(right, np.zeros(1_000))).all()


def test_cluster_bootstrap_weighs_groups_by_their_cells():
    """Groups of 3 cells (mean 1) and of 1 (mean 0): resamples are (1, 1), (1, 0), (0, 1), (0, 0)."""
    assert cluster_bootstrap(np.array([1.0, 1, 1, 0]), np.array([5, 5, 5, 9])) == (0.0, 1.0)


def test_intervals_are_of_cells_or_of_groups():
    right = np.array([True] * 30 + [False] * 10)
    groups = np.repeat([0, 1, 2, 3], 10)
    assert share_interval(right, None) == wilson_interval(30, 40)
    low, high = share_interval(right, groups) or (0, 0)
    assert (low, high) == (0.25, 1.0)
    assert share_interval(np.ones(40, bool), groups) == wilson_interval(4, 4)  # four groups, not forty cells
    assert share_interval(right, np.zeros(40)) is None
    assert share_interval(right[:0], None) is None
