"""kNN and silhouette against scikit-learn, and votes against a slow, obvious count."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, silhouette_score
from sklearn.neighbors import NearestNeighbors

from fractal.metrics import K, knn_accuracy, macro_accuracy, neighbourhood_purity, silhouette, steerability, vote
from fractal.search import nearest


def cells(n: int, dim: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    vectors = rng.normal(size=(classes, dim))[labels] + rng.normal(size=(n, dim))
    return torch.tensor(vectors * rng.uniform(0.1, 9, (n, 1)), dtype=torch.float32), torch.tensor(labels)


def slow_vote(row: list[int]) -> int:
    count = Counter(row)
    return next(label for label in row if count[label] == max(count.values()))


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=20))
def test_the_majority_wins_and_the_nearest_breaks_ties(rows: list[list[int]]):
    assert vote(torch.tensor(rows)).tolist() == [slow_vote(row) for row in rows]


def test_accuracy_equals_a_slow_count():
    queries, labels = cells(90, 6, 4, 0)
    bank, bank_labels = cells(200, 6, 4, 1)
    levels, bank_levels = torch.stack([labels // 2, labels], 1), torch.stack([bank_labels // 2, bank_labels], 1)
    knn = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute")
    neighbours = knn.fit(bank).kneighbors(queries, return_distance=False)
    for level, accuracy in enumerate(knn_accuracy(queries, levels, bank, bank_levels)):
        votes = [slow_vote(bank_levels[row, level].tolist()) for row in neighbours]
        assert accuracy == pytest.approx(np.mean(np.array(votes) == levels[:, level].numpy()))
    neighbours = knn.fit(queries).kneighbors(return_distance=False)
    votes = [slow_vote(labels[row].tolist()) for row in neighbours]
    assert knn_accuracy(queries, labels[:, None])[0] == pytest.approx(np.mean(np.array(votes) == labels.numpy()))


@settings(max_examples=50)
@given(st.integers(3, 80), st.integers(1, 10), st.integers(2, 12), st.integers(0, 10**6))
def test_silhouette_equals_scikit_learn(n: int, dim: int, classes: int, seed: int):
    x, labels = cells(n, dim, classes, seed)
    found = labels.unique().numel()
    if not 2 <= found < n:
        return
    assert silhouette(x, labels) == pytest.approx(silhouette_score(x.double(), labels, metric="cosine"), abs=1e-6)


def test_silhouette_of_one_class_is_none():
    x, _ = cells(10, 3, 1, 0)
    assert silhouette(x, torch.full((10,), 7)) is None


def test_steerability_of_the_published_table():
    """Four levels x 32: system .941 at prefix 1, .943 at full; subtype .800 at full, .762 at prefix 1."""
    assert steerability(0.941, 0.943, 0.800, 0.762) == pytest.approx(0.036)


def test_macro_accuracy_equals_scikit_learn():
    _, labels = cells(80, 3, 5, 0)
    _, predicted = cells(80, 3, 5, 1)
    two = torch.stack([labels // 2, labels], 1)
    expected = [balanced_accuracy_score(own, predicted // (2 - k)) for k, own in enumerate(two.T)]
    assert macro_accuracy(torch.stack([predicted // 2, predicted], 1), two) == pytest.approx(expected)


def test_zoom_equals_a_slow_count():
    x, labels = cells(60, 4, 6, 0)
    two = torch.stack([labels // 2, labels], 1)
    agree, distinct = neighbourhood_purity(x, two, wide=12)
    neighbours = nearest(x, k=12).tolist()
    for level in range(2):
        share = [np.mean([two[o, level] == two[i, level] for o in row[:K]]) for i, row in enumerate(neighbours)]
        assert agree[level] == pytest.approx(np.mean(share))
    assert distinct == pytest.approx(np.mean([len({int(labels[o]) for o in row}) for row in neighbours]))
