"""The votes of neighbours and the signals of unknown types, against slow and obvious versions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from fractal.annotate.votes import Voting, descend
from fractal.hierarchy.tree import Tree
from fractal.model.adapter import FractalAdapter, embed
from tests.conftest import clustered

SMALL = [("I", "L", "T", name) for name in "abc"] + [("I", "L", "B", "d"), ("I", "M", "m", "e"), ("S", "L", "f", "g")]
TREE = Tree.of(SMALL)


def dense(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Votes for each of the six paths (n, 6)."""
    path, share = descend(torch.arange(6).expand(len(votes), -1), torch.from_numpy(votes), torch.from_numpy(TREE.nodes))
    return path.numpy(), share.numpy()


@given(st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(any), min_size=1, max_size=8))
def test_answers_lie_on_one_path_and_take_the_most_voted_child(votes):
    shares = np.array(votes, float) / np.sum(votes, axis=1, keepdims=True)
    paths, share = dense(shares)
    for row, path, found in zip(shares, paths, share, strict=True):
        for k in range(4):  # the label above is fixed; no sibling has more votes
            sums: dict[tuple[str, ...], float] = {}
            for p, names in enumerate(SMALL):
                if names[:k] == SMALL[path][:k]:
                    sums[names[: k + 1]] = sums.get(names[: k + 1], 0) + row[p]
            assert found[k] == pytest.approx(sums[SMALL[path][: k + 1]])
            assert found[k] == pytest.approx(max(sums.values()))
    assert (np.diff(share, axis=1) <= 1e-12).all()


def test_two_lineages_of_one_name_are_two_nodes():
    assert TREE.nodes[0, 1] != TREE.nodes[5, 1]  # L of I and L of S
    assert TREE.nodes[0, 1] == TREE.nodes[3, 1]


def test_votes_and_distances_are_those_of_a_slow_version(monkeypatch):
    monkeypatch.setattr("fractal.annotate.votes.NEIGHBOURS", 7)
    torch.manual_seed(0)
    names = [SMALL[i][3] for i in range(6)]
    x = clustered(names * 30, dim=8)
    path = np.tile(np.arange(6), 30)
    adapter = FractalAdapter(8, 4, 4, torch.from_numpy(TREE.nodes)).eval()
    queries = clustered(names * 2, dim=8, seed=1)
    monkeypatch.setattr("fractal.annotate.votes.BATCH", 5)  # of 12
    study = np.arange(180) // 90
    x[90:] += 0.3  # a shift of the second study
    raw = Voting(adapter, x, path, study, TREE)(queries)
    bank, full = (embed(adapter, torch.from_numpy(v))[-1].numpy() for v in (x, queries))
    distance, found = NearestNeighbors(n_neighbors=7, metric="cosine").fit(bank).kneighbors(full)
    unit, unit_q = (v / np.linalg.norm(v, axis=1, keepdims=True).astype(float) for v in (x, queries))
    covariance, means = np.zeros((8, 8)), np.array([unit[path == p].mean(0) for p in range(6)])
    for cell, p, s in zip(unit, path, study, strict=True):
        mean = unit[(path == p) & (study == s)].mean(0)
        covariance += np.outer(cell - mean, cell - mean) + 25 * np.outer(mean - means[p], mean - means[p])
    covariance /= 180
    precision = np.linalg.inv(0.7 * covariance + 0.3 * np.trace(covariance) / 8 * np.eye(8))
    for i in range(len(queries)):
        weight = np.exp(-distance[i] / 0.1)
        votes = np.array([weight[path[found[i]] == p].sum() for p in range(6)]) / weight.sum()
        p, share = dense(votes[None])
        assert raw.path[i] == p[0]
        assert np.allclose(raw.votes[i], share[0], atol=1e-4)
        assert raw.distance[i] == pytest.approx(distance[i, 0], abs=1e-5)
        squares = np.array([(unit_q[i] - mean) @ precision @ (unit_q[i] - mean) for mean in means])
        likelihood = np.exp(-squares / 4)
        signals = [distance[i, 6], np.sqrt(squares.min()), -np.log(likelihood.max() / likelihood.sum())]
        assert raw.signals[i] == pytest.approx(signals, rel=1e-4, abs=1e-5)
