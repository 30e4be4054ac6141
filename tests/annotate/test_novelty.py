"""P-values of novelty against held-out cells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.annotate.calibration import study_weight
from fractal.annotate.novelty import tail


def test_a_p_value_counts_studies_the_same():
    """Study 0 has 900 ordinary cells, study 1 has 100 odd ones: half of what is to come is as odd."""
    weight = study_weight(np.repeat([0, 1], [900, 100]))
    values = np.repeat([0.0, 5.0], [900, 100])
    assert tail(np.array([4.0]), (values, weight)) == pytest.approx(0.5, abs=0.01)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(-1, 6), min_size=1, max_size=5))
def test_tail_counts_the_held_out_values_that_are_as_large(held_out, values):
    found = tail(np.array(values), (np.sort(held_out), np.ones(len(held_out))))
    assert found.tolist() == pytest.approx([(sum(h >= v for h in held_out) + 1) / (len(held_out) + 1) for v in values])
