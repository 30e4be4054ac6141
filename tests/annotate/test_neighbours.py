"""The reference's lists, held to exact search."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fractal.annotate import neighbours
from fractal.annotate.neighbours import Neighbours
from fractal.search.exact import nearest


def islands(n: int, seed: int, dim: int = 16, spread: float = 0.6) -> torch.Tensor:
    """Cells (n, dim) in 40 clusters, of length 1."""
    of = torch.randn(40, dim, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(seed)
    own = of[torch.randint(40, (n,), generator=noise)]
    return normalize(own + spread * torch.randn(n, dim, generator=noise), dim=1)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CENTRES", 32)
    monkeypatch.setattr(neighbours, "LENGTHS", (100, 400))


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries exact search is asked for, filled as it happens."""
    asked = list[int]()

    def counted(queries: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        asked.append(len(queries))
        return nearest(queries, *rest, **more)

    monkeypatch.setattr(neighbours, "nearest", counted)
    return asked


@pytest.mark.usefixtures("_small")
def test_lists_find_what_exact_search_finds(monkeypatch: pytest.MonkeyPatch):
    bank, queries = islands(3_000, 1, dim=64), islands(500, 2, dim=64)
    found = Neighbours(bank)
    asked = looked_at(monkeypatch)
    cosine, rows = found(queries, 10)
    exact = nearest(queries, bank, 10)
    assert sum(asked) < 100  # most queries need no exact search
    assert (rows[:, :, None] == exact[:, None, :]).any(2).float().mean() > 0.99
    assert torch.allclose(cosine, (queries[:, None] * bank[rows]).sum(2), atol=1e-6)
    assert (cosine.diff(dim=1) <= 0).all()


@pytest.mark.usefixtures("_small")
def test_a_certain_bound_is_exact(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neighbours, "DEVIATIONS", 4.0)  # cos p = 1 in 16 dimensions
    bank, queries = islands(3_000, 1), torch.cat([islands(200, 2, spread=0.2), islands(100, 3, spread=5)])
    found = Neighbours(bank)
    asked = looked_at(monkeypatch)
    assert torch.equal(found(queries, 5)[1], nearest(queries, bank, 5))
    assert 0 < sum(asked) < len(queries)


@pytest.mark.usefixtures("_small")
def test_answers_do_not_hang_on_the_other_queries():
    bank, queries = islands(3_000, 1), islands(60, 2)
    found = Neighbours(bank)
    cosine, rows = found(queries, 10)
    for i in range(0, 60, 7):
        alone = found(queries[i : i + 1], 10)
        assert torch.allclose(alone[0][0], cosine[i], atol=1e-6)
        assert torch.equal(alone[1][0], rows[i])
    assert [part.shape for part in found(queries[:0], 10)] == [(0, 10), (0, 10)]


@pytest.mark.usefixtures("_small")
@pytest.mark.filterwarnings("error")
def test_a_bank_of_equal_cells_or_of_a_few_has_neighbours():
    same = islands(1, 0).expand(500, -1).contiguous()
    cosine, rows = Neighbours(same)(islands(3, 1), 10)
    assert np.ptp(cosine.numpy(), axis=1).max() < 1e-6
    assert all(len(set(row)) == 10 for row in rows.tolist())
    few, queries = islands(30, 1), islands(3, 2)
    assert torch.equal(Neighbours(few)(queries, 10)[1], nearest(queries, few, 10))
