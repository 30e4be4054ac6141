"""Exact search against scikit-learn and a full sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from fractal.search import exact as search
from fractal.search.exact import TILE, Nearest, nearest, top


def cells(n: int, dim: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(n, dim)) * rng.uniform(0.1, 9, (n, 1)), dtype=torch.float32)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """Tiles of 37 queries x 1,024 rows, so that small banks have many, in two steps each."""
    for name, value in {"QUERY_CHUNK": 37, "TILE": 1_024, "GROUP": 16}.items():
        monkeypatch.setattr(search, name, value)


def test_neighbours_equal_scikit_learn(small_tiles):
    bank, queries = cells(2_500, 20, 0), cells(130, 20, 1)
    expected = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(bank)
    assert np.array_equal(nearest(queries, bank, 5), expected.kneighbors(queries, return_distance=False))
    assert np.array_equal(nearest(queries, normalize(bank, dim=1), 5, unit=True), nearest(queries, bank, 5))
    # leave-one-out: scikit-learn leaves the point itself out when it is given no queries
    assert np.array_equal(nearest(bank, None, 5), expected.kneighbors(return_distance=False))


@pytest.mark.parametrize("k", [10, 300])  # in groups, and too many for it
def test_a_bank_of_several_full_tiles_equals_a_sort_of_all(k: int):
    bank, queries = cells(5 * TILE + 100, 4, 0), cells(40, 4, 1)
    similarity = normalize(queries, dim=1) @ normalize(bank, dim=1).T
    found = similarity.gather(1, nearest(queries, bank, k))
    assert torch.allclose(found, similarity.sort(1, descending=True).values[:, :k], atol=1e-6)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_a_bank_in_pieces_equals_the_whole(sizes: list[int], k: int, halves: bool, seed: int):
    bank, queries = cells(sum(sizes), 6, seed), cells(9, 6, seed + 1)
    bank = bank.half() if halves else bank
    found = Nearest(queries, k)
    for piece in bank.split(sizes):
        found.add(piece)
    similarity = normalize(queries, dim=1) @ normalize(bank.float(), dim=1).T
    expected = similarity.sort(1, descending=True).values[:, :k]
    assert torch.allclose(similarity.gather(1, found.rows()), expected, atol=1e-6)


@given(st.integers(1, 16), st.integers(0, 4), st.integers(0, 10**6))
@settings(max_examples=30)
def test_the_largest_in_two_steps_equal_topk(k: int, spread: int, seed: int):
    """Few distinct values make many ties, within groups and between them: values agree, and columns hold them."""
    torch.manual_seed(seed)
    similarity = torch.randint(-(10**spread), 10**spread + 1, (3, TILE)).float()
    values, columns = top(similarity, k)
    assert torch.equal(values, similarity.topk(k).values)
    assert torch.equal(similarity.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_fewer_rows_than_neighbours():
    x = cells(4, 3, 0)
    assert nearest(x, None, 5).shape == (4, 3)
    assert nearest(x, x, 5).shape == (4, 4)
