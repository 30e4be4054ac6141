"""Vectors of another embedding are noticed, and honest ones are left alone, whatever their types and their batch."""

from collections.abc import Callable

import numpy as np
import pytest

from fractal.annotate.space import MIN_RUN, Bank, Comparison, RowCheck, draw, space_problem

DIM, TYPES = 60, 20
Draw = Callable[..., np.ndarray]


@pytest.fixture
def atlas() -> tuple[Draw, np.ndarray]:
    """Types that share programs of genes, as cells do; a donor shifts all numbers a little."""
    rng = np.random.default_rng(0)
    scale = np.geomspace(3, 0.1, DIM)  # as principal components vary
    programs = rng.normal(size=(12, DIM)) * scale
    use = rng.exponential(size=(TYPES + 6, 12)) - 1

    def make(types: np.ndarray, shift: float = 0.2) -> np.ndarray:
        amount = use[types] + 0.3 * rng.normal(size=(len(types), 12))
        noise = 0.3 * scale * rng.normal(size=(len(types), DIM))
        return (amount @ programs + noise + shift * scale * rng.normal(size=DIM)).astype(np.float32)

    return make, make(rng.integers(0, TYPES, 2_000), 0)


def test_honest_queries_pass(atlas: tuple[Draw, np.ndarray]):
    make, reference = atlas
    types = np.random.default_rng(1).integers(0, TYPES, 400)
    query = make(types)
    for honest in (reference, query, query[:12], 7 * query, make(np.full(60, 3)), make(np.full(400, 5))):
        assert space_problem(honest, reference) is None
    for unseen in (make(np.full(400, TYPES + 2)), make(np.random.default_rng(2).integers(TYPES, TYPES + 6, 400))):
        problem = space_problem(unseen, reference)
        assert problem is None or not problem[1]


@pytest.mark.slow
def test_what_means_something_else_is_refused(atlas: tuple[Draw, np.ndarray]):
    make, reference = atlas
    rng = np.random.default_rng(1)
    query = make(rng.integers(0, TYPES, 400))
    centred = query - query.mean(0)
    changed = {
        "own components": centred @ np.linalg.svd(centred)[2].T,
        "another order": query[:, rng.permutation(DIM)],
        "rotated": query @ np.linalg.qr(rng.normal(size=(DIM, DIM)))[0].astype(np.float32),
        "random": rng.normal(size=query.shape).astype(np.float32),
    }
    for name, other in changed.items():
        problem = space_problem(other, reference)
        assert problem is not None, name
        assert problem[1], name
    halves = [query * rng.permutation(np.resize([1, -1], DIM)).astype(np.float32) for _ in range(20)]
    refused = [space_problem(half, reference) for half in halves]
    assert sum(problem is not None and problem[1] for problem in refused) >= 18


def test_a_number_that_is_the_batch_is_named_and_not_refused(atlas: tuple[Draw, np.ndarray]):
    """Three technologies, which number 4 of one joint embedding tells apart: each fits with its sign turned round."""
    make, _ = atlas
    rng = np.random.default_rng(3)
    cells = [make(rng.integers(0, TYPES, 400), 0) for _ in range(3)]
    for x, side in zip(cells, (-12, 0, 12), strict=True):
        x[:, 3] = side + 0.3 * rng.normal(size=len(x))
    for i, query in enumerate(cells):
        problem = space_problem(query, np.concatenate([x for j, x in enumerate(cells) if j != i]))
        assert problem is None or not problem[1]
        if i != 1:
            assert problem is not None
            assert "number 4 " in problem[0]


def test_a_turned_sign_is_reported(atlas: tuple[Draw, np.ndarray]):
    make, reference = atlas
    query = make(np.random.default_rng(1).integers(0, TYPES, 400))
    assert space_problem(query * np.where(np.arange(DIM) == 0, -1, 1).astype(np.float32), reference) is not None


def test_what_is_foretold_is_that_of_the_cell_nearest_by_the_other_numbers(atlas: tuple[Draw, np.ndarray]):
    """Against a slow and obvious search, one number at a time."""
    make, reference = atlas
    bank = Bank(reference[:50])
    cells = draw(make(np.arange(8)), 8, np.random.default_rng(0))
    foretold = bank.foretell(cells)
    for i, cell in enumerate(cells):
        for part in range(8):
            rest = np.arange(DIM) % 8 != part
            a, b = (cell / bank.scale)[rest], (bank.cells / bank.scale)[:, rest]
            nearest = (b @ a / np.linalg.norm(b, axis=1)).argmax()
            assert np.array_equal(foretold[i, ~rest], bank.cells[nearest, ~rest])


@pytest.mark.parametrize("start", [0, 1_013, 2_280])
def test_a_block_of_foreign_rows_is_named_wherever_it_lies(atlas: tuple[Draw, np.ndarray], start: int):
    make, reference = atlas
    rng = np.random.default_rng(4)
    query = make(np.sort(rng.integers(0, TYPES, 2_400)))
    query[5] = np.nan
    query[start : start + 120] = rng.normal(size=(120, DIM))
    check = RowCheck(reference, len(query))
    for chunk in np.array_split(query, 7):
        check.add(chunk)
    (first, last), *others = check.strange
    assert not others
    assert start - check.length < first
    assert last <= start + 120 + check.length
    assert f"{first + 1:,} to {last:,}" in check.problem()


def test_honest_rows_and_few_rows_bring_no_warning(atlas: tuple[Draw, np.ndarray]):
    make, reference = atlas
    for types in (np.sort(np.random.default_rng(5).integers(0, TYPES, 3_000)), np.full(MIN_RUN - 1, 2)):
        check = RowCheck(reference, len(types))
        check.add(make(types))
        assert check.problem() == ""


@pytest.mark.parametrize(
    ("agreement", "against", "cosine", "other", "turned"),
    [
        (0.05, 0.5, 0.2, True, True), (0.06, 0.27, 0.2, False, False), (0.05, 0.5, 0.3, False, False),
        (0.2, 0.3, 0.2, False, True),
    ],
)  # fmt: skip
def test_when_another_space_is_certain(agreement: float, against: float, cosine: float, other: bool, turned: bool):
    compared = Comparison(200, agreement, against, cosine, 0, 0.0)
    assert compared.is_other() == other
    assert compared.is_turned() == turned
