"""Who is held out: no row and no vector is on two sides; whole studies, whole types; a small file's share."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.base.errors import InputError
from fractal.data.atlas import Atlas
from fractal.data.parquet import atlas_table, write_tables
from fractal.hierarchy.levels import LEVELS, column_names
from fractal.model.split import Split, draw_studies, draw_types, held_out, is_named


def write(
    path: Path,
    n: int,
    types: list[int] | None = None,
    studies: list[int] | None = None,
    copies: list[int] | None = None,
    levels: tuple[str, ...] = LEVELS,
) -> Atlas:
    """n cells with random vectors: of type t0, t1, ...; studies s0, s1, ...; row i has the vector of row copies[i]."""
    vectors = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    code = np.zeros(n, int) if types is None else np.array(types)
    columns = [(np.zeros(n, int), ["a"])] * (len(levels) - 1) + [(code, [f"t{i}" for i in range(code.max() + 1)])]
    if studies is not None:
        columns.append((np.array(studies), [f"s{i}" for i in range(max(studies) + 1)]))
    write_tables(path, [atlas_table(vectors if copies is None else vectors[copies], columns, levels)], {})
    return Atlas.open(path)


@settings(max_examples=50)
@given(st.integers(1, 500), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 600), st.integers(0, 2**32))
def test_splits_never_overlap(n: int, test_ratio: float, val_ratio: float, max_samples: int, seed: int):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.parquet", n)
        split = Split("", n, seed, test_ratio, val_ratio, max_samples)
        train, val, test = split.rows(path)
        assert len(np.unique(np.concatenate([train, val, test]))) == len(train) + len(val) + len(test) <= n
        left = n - len(test)
        assert len(train) + len(val) == (min(max_samples, left) if max_samples else left)
        assert len(val) == round(val_ratio * (len(train) + len(val)))
        assert all(np.array_equal(a, b) for a, b in zip((train, val, test), split.rows(path), strict=True))


def test_the_default_split_is_what_it_always_was(tmp_path: Path):
    """Written down from the first release: the same seed must go on meaning the same test cells."""
    train, val, test = Split("", 40, 0, 0.2, 0.15, 0).rows(write(tmp_path / "a", 40))
    rest = np.flatnonzero(~held_out(40, 0.2, 0))
    draw = np.random.default_rng(0).permutation(len(rest))
    assert val.tolist() == sorted(rest[draw[: round(0.15 * len(rest))]])
    assert train.tolist() == sorted(rest[draw[round(0.15 * len(rest)) :]])
    place = np.random.Philox(key=0).random_raw(40) / 2**64
    assert test.tolist() == np.flatnonzero(place < 0.2).tolist()


def test_a_row_is_a_test_row_whatever_the_length_of_the_file():
    long = held_out(100_000, 0.2, 7)
    assert np.array_equal(held_out(1_000, 0.2, 7), long[:1_000])
    assert long.mean() == pytest.approx(0.2, abs=0.006)  # 5 standard deviations
    assert not np.array_equal(long, held_out(100_000, 0.2, 8))
    # uniform over the file: each tenth of it holds its share
    assert np.abs(long.reshape(10, -1).mean(1) - 0.2).max() < 0.02
    assert not held_out(1_000, 0.0, 0).any()


def test_the_folds_hold_every_row_once():
    folds = np.stack([held_out(10_000, 0.2, 3, fold) for fold in range(5)])
    assert (folds.sum(0) == 1).all()
    assert folds.sum(1) == pytest.approx(np.full(5, 2_000), abs=200)


def test_whole_studies_are_held_out(tmp_path: Path):
    studies = [0, 1, 2, 3, 4] * 20
    path = write(tmp_path / "a", 100, studies=studies)
    drawn = draw_studies(path, 0.3, seed=1)
    assert len(drawn) == 2  # one holds .2 of the cells, two hold .4
    train, val, test = Split.draw(path, 1, 0.3, holdout="study").sampled(path, val_ratio=0.1).rows(path)
    assert {f"s{studies[row]}" for row in test} == set(drawn)
    assert not {f"s{studies[row]}" for row in [*train, *val]} & set(drawn)
    assert len(train) + len(val) + len(test) == 100
    assert len({tuple(draw_studies(path, 0.3, seed)) for seed in range(20)}) > 3
    assert len(draw_studies(path, 0.99, 0)) == 4  # never all


def test_studies_and_types_that_are_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="no column 'study'"):
        draw_studies(write(tmp_path / "none", 2), 0.2, 0)
    with pytest.raises(InputError, match="one: all its cells are of one study"):
        draw_studies(write(tmp_path / "one", 3, studies=[0, 0, 0]), 0.2, 0)
    path = write(tmp_path / "a", 2, types=[0, 1], studies=[0, 1])
    with pytest.raises(InputError, match="has no study z; it has s0, s1"):
        Split.draw(path, test_studies=["z"]).rows(path)
    with pytest.raises(InputError, match="has no type z; it has t0, t1"):
        Split.draw(path, test_types=["z"]).rows(path)


def test_whole_types_are_held_out_and_cells_of_the_others(tmp_path: Path):
    types = [i % 8 for i in range(800)] + [8] * 9  # the last is too small to be drawn
    path = write(tmp_path / "a", 809, types=types)
    split = Split.draw(path, 3, 0.25, holdout="type").sampled(path, val_ratio=0.1)
    assert len(split.test_types) == 2
    train, val, test = split.rows(path)
    of_unseen = np.isin([f"t{t}" for t in types], split.test_types)
    assert np.array_equal(is_named(path, split.test_types, "type"), of_unseen)
    assert not of_unseen[np.concatenate([train, val])].any()
    assert of_unseen[test].sum() == of_unseen.sum() == 200
    assert np.array_equal(np.sort(test[~of_unseen[test]]), np.flatnonzero(held_out(809, 0.25, 3) & ~of_unseen))
    drawn = {name for seed in range(60) for name in draw_types(path, 0.25, seed)}
    assert drawn == {f"t{i}" for i in range(8)}
    named = Split.draw(path, test_types=["t8"])
    assert (named.holdout, is_named(path, named.test_types, "type").sum()) == ("type", 9)
    assert not is_named(path, Split.draw(path).test_types, "type").any()
    with pytest.raises(InputError, match="holding out a type takes one with 10 cells"):
        draw_types(write(tmp_path / "few", 9, types=[0, 1, 2] * 3), 0.2, 0)


def test_the_types_are_those_of_the_finest_level(tmp_path: Path):
    path = write(tmp_path / "a", 60, types=[0, 1, 2] * 20, levels=("class", "subclass"))
    assert column_names(("class", "subclass")) == ("level1_class", "level2_subclass")
    assert len(draw_types(path, 0.3, 0)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"holdout": "cells", "test_studies": ["s0"]}, "takes no names of studies"),
        ({"holdout": "study", "test_types": ["t0"]}, "takes no names of types"),
        ({"test_studies": ["s0"], "fold": 1}, "folds are of cells"),
        ({"fold": 5}, "--fold 5: there are 5 of --test-ratio 0.2"),
    ],
)
def test_flags_that_contradict_each_other(tmp_path: Path, flags: dict, message: str):
    path = write(tmp_path / "a", 20, types=[0, 1] * 10, studies=[0, 1] * 10)
    with pytest.raises(InputError, match=message):
        Split.draw(path, **flags)


@pytest.mark.parametrize("holdout", ["cells", "study", "type"])
def test_copies_of_a_cell_are_on_one_side(tmp_path: Path, holdout: str):
    """100 vectors, four times each, the copies in other studies and types: no vector is on two sides."""
    copies = [i % 100 for i in range(400)]
    path = write(tmp_path / "a", 400, [i % 7 for i in range(400)], [i // 100 for i in range(400)], copies)
    split = Split.draw(path, 1, 0.25, holdout).sampled(path, val_ratio=0.3)
    sides = [{copies[row] for row in rows} for rows in split.rows(path)]
    assert [a & b for a, b in ((sides[0], sides[1]), (sides[0], sides[2]), (sides[1], sides[2]))] == [set()] * 3
    if holdout == "cells":
        assert min(len(side) for side in sides) > 10
        assert sum(len(rows) for rows in split.rows(path)) == 400


def test_a_file_sorted_by_type_and_study_gives_all_of_them(tmp_path: Path):
    types, studies = [i // 100 for i in range(1_000)], [i // 25 for i in range(1_000)]
    path = write(tmp_path / "a", 1_000, types, studies)
    split = Split("", 1_000, 0, 0.2, 0.1, 200)
    chosen = np.concatenate(split.rows(path)[:2])
    assert len(chosen) == 200
    assert np.bincount(np.array(types)[chosen]).tolist() == [20] * 10
    assert len(set(np.array(studies)[chosen])) > 30  # of 40: the first rows would hold 10


@pytest.mark.parametrize(
    ("n", "num_types", "expected"),
    [
        (4_000, 3, 600),  # 15 %
        (400, 3, 100),  # at least 100 cells
        (400, 30, 150),  # at least 5 per type
        (120, 3, 60),  # never more than half
        (3, 3, 1),
    ],
)
def test_small_files_choose_their_validation_share(tmp_path: Path, n: int, num_types: int, expected: int):
    path = write(tmp_path / "a", n, [i % num_types for i in range(n)])
    train, val, _ = Split.draw(path, test_ratio=0).sampled(path).rows(path)
    assert (len(val), len(train)) == (expected, n - expected)
    assert len(Split.draw(path, test_ratio=0).sampled(path, val_ratio=0).rows(path)[1]) == 0


def test_a_split_comes_back_from_a_checkpoint_or_is_refused(tmp_path: Path):
    split = Split("f", 20, 3, 0.2, 0.1, 0, "type", test_types=("t0",))
    good = asdict(split)
    assert Split.of({"split": good}, Path("a.pt")) == split
    lists = good | {"test_types": ["t0"]}
    assert Split.of({"split": lists}, Path("a.pt")) == split
    older = {name: value for name, value in good.items() if name not in ("holdout", "test_types")}
    wrong: list[dict] = [
        {"seed": -1},
        {"seed": 2.5},
        {"num_rows": "many"},
        {"test_ratio": 1.5},
        {"test_ratio": float("nan")},
    ]
    wrong += [{"holdout": "x"}, {"fingerprint": 3}, {"test_types": 3}, {"test_types": [3]}, {"max_samples": 2**80}]
    no_split: list[Any] = [None, 7, [], "x", older]
    for bad in [*no_split, good | {"more": 1}, *(good | change for change in wrong)]:
        with pytest.raises(InputError, match=r"a\.pt: carries no split of this version"):
            Split.of({"split": bad}, Path("a.pt"))
    with pytest.raises(InputError, match="carries no split"):
        Split.of({}, Path("a.pt"))


def test_a_split_of_too_many_rows_takes_no_memory(tmp_path: Path):
    path = write(tmp_path / "a", 20)
    with pytest.raises(InputError, match="has 20 rows, and the split is of 1,000,000,000,000,000"):
        Split("", 10**15, 0, 0.2, 0.1, 0).rows(path)
    with pytest.raises(InputError, match="has 20 rows"):
        Split("", 10**15, 0, 0.2, 0.1, 0).is_test(path)


def test_without_studies_to_test_on_no_row_is_a_test_row(tmp_path: Path):
    table = atlas_table(np.eye(2, dtype=np.float32), [(np.array([0, 1]), ["x", "y"])] * 5)
    write_tables(tmp_path / "a", [table], {})
    split = Split.draw(Atlas.open(tmp_path / "a"), test_ratio=0.0, holdout="study")
    assert split.is_test(Atlas.open(tmp_path / "a")).tolist() == [False, False]
