"""kNN and silhouette against scikit-learn, and votes against a slow, obvious count."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, silhouette_score
from sklearn.neighbors import NearestNeighbors

from fractal.score.metrics import (
    K,
    calibration_noise_floor,
    expected_calibration_error,
    hierarchical_f1,
    knn_accuracy,
    macro_scores,
    majority,
    neighbourhood_purity,
    reliability,
    silhouette,
    triplet_agreement,
)
from fractal.search.exact import nearest


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
    assert majority(torch.tensor(rows)[..., None])[:, 0].tolist() == [slow_vote(row) for row in rows]


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


def test_zoom_equals_a_slow_count():
    x, labels = cells(60, 4, 6, 0)
    two = torch.stack([labels // 2, labels], 1)
    agree, distinct = neighbourhood_purity(x, two, wide=12)
    neighbours = nearest(x, k=12).tolist()
    for level in range(2):
        share = [np.mean([two[o, level] == two[i, level] for o in row[:K]]) for i, row in enumerate(neighbours)]
        assert agree[level] == pytest.approx(np.mean(share))
    assert distinct == pytest.approx(np.mean([len({int(labels[o]) for o in row}) for row in neighbours]))
    assert 1 < distinct < 6
    assert min(agree) > 0


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_macro_scores_equal_scikit_learn():
    labels, predicted = (cells(80, 3, 5, seed)[1].numpy() for seed in (0, 1))
    predicted[0] = 7  # a class that no cell has counts only as an error
    f1 = f1_score(labels, predicted, labels=np.unique(labels), average="macro")
    assert macro_scores(predicted, labels) == pytest.approx((balanced_accuracy_score(labels, predicted), f1))
    assert macro_scores(predicted[:0], labels[:0]) == (None, None)


def test_hierarchical_f1_by_hand():
    """Terms: cell of a lineage, its two types; another lineage. Class 3 is not in the ontology."""
    ancestors = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    # right: 2 of 2 and 2; sibling: 1 of 2 and 2; other lineage: 0 of 1 and 2; the last cell has no term
    predicted, labels = np.array([0, 1, 2, 3]), np.array([0, 0, 0, 0])
    precision, recall = 3 / 5, 3 / 6
    assert hierarchical_f1(predicted, labels, ancestors) == pytest.approx(2 * precision * recall / (precision + recall))
    assert hierarchical_f1(predicted[3:], labels[3:], ancestors) is None


def test_triplets_by_hand():
    """Types a and b of one lineage, c and d of another; a and b point one way, d lies with them instead of with c."""
    labels = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3]])
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.9, 0.12]])
    # a, b against c agrees, against d does not (b is closer to d); c, d against a and b do not
    assert triplet_agreement(x, labels, torch.ones(4, dtype=torch.bool)) == (1 / 4, None)
    # d unseen: only a, b against c is all seen; c, d are two triplets with an unseen one among the two
    assert triplet_agreement(x, labels, torch.tensor([True, True, True, False])) == (1.0, 0.0)
    assert triplet_agreement(x[:2], labels[:2], torch.ones(2, dtype=torch.bool)) == (None, None)


@given(st.integers(0, 10**6), st.integers(1, 20))
def test_calibration_does_not_depend_on_the_order_of_cells(seed: int, bins: int):
    rng = np.random.default_rng(seed)
    p = rng.choice([0.2, 0.5, 0.7, 0.9], 60)  # few values, as isotonic regression gives
    right = rng.random(60) < p
    order = rng.permutation(60)
    assert expected_calibration_error(p, right, bins) == pytest.approx(
        expected_calibration_error(p[order], right[order], bins)
    )
    curve = reliability(p, right, bins)
    error = sum(abs(b["probability"] - b["accuracy"]) * b["cells"] for b in curve) / 60
    assert error == pytest.approx(expected_calibration_error(p, right, bins))
    assert sum(b["cells"] for b in curve) == 60


def test_calibration_error_by_hand():
    p, right = np.array([0.5] * 4 + [0.9] * 2), np.array([True, False, True, True, True, True])
    assert expected_calibration_error(p, right) == pytest.approx((4 * 0.25 + 2 * 0.1) / 6)
    distinct = np.linspace(0, 1, 30)
    assert [b["cells"] for b in reliability(distinct, distinct > 0.5)] == [2] * 15


def test_the_noise_floor_is_what_calibrated_cells_score():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 3_000)
    floor = calibration_noise_floor(p, 15, rng)
    scores = [expected_calibration_error(p, rng.random(3_000) < p) for _ in range(50)]
    assert floor == pytest.approx(np.mean(scores), rel=0.1)
    assert expected_calibration_error(p, rng.random(3_000) < p - 0.1) > 3 * floor
