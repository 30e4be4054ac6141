"""The simulated studies and the intervals of benchmarks/coverage.py, against figures by hand."""

import numpy as np
import pytest
from scipy import special, stats

from benchmarks.coverage import METHODS, coverage, draw, effective, logit_mean, on_logits, variance

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("correlation", [0.02, 0.5])
def test_studies_have_the_share_and_the_correlation(correlation: float):
    hits, sizes = draw(np.random.default_rng(0), 20_000, 0.8, correlation, normal=False, equal=True)
    shares = hits / sizes
    assert shares.mean() == pytest.approx(0.8, abs=0.01)
    expected = 0.16 * (correlation + (1 - correlation) / 200)  # between studies, and of 200 draws within one
    assert shares.var() == pytest.approx(expected, rel=0.05)
    hits, sizes = draw(np.random.default_rng(0), 20_000, 0.8, correlation, normal=True, equal=False)
    assert (hits / sizes).mean() == pytest.approx(0.8, abs=0.01)
    assert sizes.min() >= 20
    assert sizes.max() > 1_000


def test_the_mean_of_normal_logits():
    logits = np.random.default_rng(0).normal(logit_mean(0.95, 1.3), 1.3, 400_000)
    assert special.expit(logits).mean() == pytest.approx(0.95, abs=0.001)


def test_intervals_by_hand():
    """Studies of 90, 80 and 70 of 100: standard error .1 / sqrt(3)."""
    hits, sizes = np.array([90, 80, 70]), np.full(3, 100)
    assert variance(hits, sizes) == pytest.approx(0.1**2 / 3)
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5 / 0.16
    assert on_logits(hits, sizes) == pytest.approx(special.expit(np.log(4) + np.array([-half, half])))
    n = 0.16 / (0.01 / 3) * (stats.t.ppf(0.975, 299) / stats.t.ppf(0.975, 2)) ** 2
    k = 0.8 * n
    assert effective(hits, sizes) == pytest.approx(
        (stats.beta.ppf(0.025, k, n - k + 1), stats.beta.ppf(0.975, k + 1, n - k))
    )


def test_a_setting_has_a_coverage_and_a_width_for_each_method():
    found = coverage(3, False, 2, 0)
    assert list(found) == list(METHODS)
    for covers, widths in found.values():
        assert len(covers) == len(widths) == 24
        assert ((covers >= 0) & (covers <= 1)).all()
    assert found["ours"][1].mean() > found["cells"][1].mean()
