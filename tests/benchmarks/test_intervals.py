"""Intervals of means against scipy, and what their unit is."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.intervals import bootstrap_interval, cluster_bootstrap, t_interval

pytestmark = pytest.mark.slow


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


def test_the_interval_equals_scipys_bootstrap():
    right = (np.random.default_rng(0).random(400) < 0.9).astype(float)
    expected = stats.bootstrap((right,), np.mean, method="percentile", random_state=0).confidence_interval
    assert bootstrap_interval(right) == pytest.approx(tuple(expected), abs=0.004)
