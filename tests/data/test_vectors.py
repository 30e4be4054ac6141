"""Which vectors can be used, and which are the same."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fractal.base.errors import InputError
from fractal.data.vectors import first_equal, refuse, usable, vector_hashes


@pytest.mark.parametrize("dim", [1, 128])
def test_what_is_usable_gets_length_1(dim: int):
    """Lengths from 1e-44 to 1e38: torch divides by 1e-12 at least, and squares in float32 overflow at 1e19."""
    lengths = 10.0 ** np.arange(-44, 38)
    x = (lengths[:, None] / np.sqrt(dim) * np.ones(dim)).astype(np.float32)
    norms = np.linalg.norm(torch.nn.functional.normalize(torch.from_numpy(x), dim=1).double().numpy(), axis=1)
    good = usable(x)
    assert np.allclose(norms[good], 1, atol=1e-5)
    assert good[(lengths > 2e-12) & (lengths < 1e18)].all()
    assert not good[lengths < 5e-13].any()


def test_what_is_not_usable_is_named():
    x = np.ones((4, 3), np.float32)
    x[1], x[2, 0], x[3, 2] = 0, np.nan, np.inf
    assert usable(x).tolist() == [True, False, False, False]
    with pytest.raises(InputError, match="x.npy: the vector of cell 101 is zero or not finite"):
        refuse(~usable(x), 100, "x.npy")
    refuse(~usable(x[:1]), 0, "x.npy")


@given(st.lists(st.tuples(st.sampled_from([0.0, -0.0, 1.0]), st.sampled_from([1.0, 2.0])), min_size=1, max_size=30))
def test_equal_vectors_are_those_of_a_slow_search(pairs: list[tuple[float, float]]):
    found = first_equal(vector_hashes(np.array(pairs, np.float32)))
    assert found.tolist() == [pairs.index(pair) for pair in pairs]  # 0. == -0.
