"""Who is asked of whom: no cell of an adapter that has seen it, its copy or its study."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fractal.annotate.cross_fit import FOLDS, cross_fit, deal, draw_folds
from fractal.annotate.discriminant import Discriminant
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.data.parquet import atlas_table
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.tree import Tree
from fractal.model.checkpoint import build_adapter

NODES = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 2], [1, 2, 3, 3]])  # of the types


def atlas_of(types: np.ndarray, studies: np.ndarray | None = None, copies: bool = False) -> Atlas:
    """Every number of a vector says which row it is of; with `copies` the second half repeats the first."""
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(len(types), 8)) + 3 * types[:, None]).astype(np.float32)
    if copies:
        vectors[len(types) // 2 :] = vectors[: len(types) // 2]
    labels = [(NODES[types, k].astype(np.int32), [f"{level}{i}" for i in range(4)]) for k, level in enumerate(LEVELS)]
    if studies is not None:
        labels.append((studies.astype(np.int32), [f"s{i}" for i in range(studies.max() + 1)]))
    return Atlas.of_table(atlas_table(vectors, labels))


def fitted(seen: list[tuple[LabelledVectors, LabelledVectors]]) -> Callable[..., Any]:
    """In place of training: an adapter as it starts, and what it would have been trained on."""

    def train(training: LabelledVectors, held_out: LabelledVectors, counted: np.ndarray) -> Any:
        seen.append((training, held_out))
        torch.manual_seed(0)
        config = {"recipe": "fractal", "dim": 8, "num_levels": 4, "scale_dim": 4, "levels": list(LEVELS),
                  "block_levels": [0, 1, 2, 3], "paths": np.unique(training.labels, axis=0).tolist()}  # fmt: skip
        return SimpleNamespace(adapter=build_adapter(config, training.classes), best_epoch=len(seen))

    return train


def tree_of(atlas: Atlas) -> Tree:
    return Tree.of(sorted(atlas.path_counts(np.ones(atlas.num_rows, bool))))


@pytest.mark.parametrize("by_study", [True, False])
def test_each_cell_is_asked_once_of_what_excludes_it(by_study: bool):
    rng = np.random.default_rng(1)
    types, studies = rng.integers(0, 3, 300), rng.integers(0, 7, 300)
    atlas, seen = atlas_of(types, studies), list[tuple[LabelledVectors, LabelledVectors]]()
    folds = draw_folds(atlas, by_study, 0)
    assert folds.by_study == by_study
    found, epochs = cross_fit(atlas, folds, tree_of(atlas), studies, fitted(seen), 0)
    assert epochs == [1, 2, 3, 4, 5]
    assert sorted(map(tuple, found.vectors.tolist())) == sorted(map(tuple, next(atlas.vectors()).tolist()))
    row_of = {tuple(vector): i for i, vector in enumerate(next(atlas.vectors()).tolist())}
    rows = np.array([row_of[tuple(vector)] for vector in found.vectors.tolist()])
    assert np.array_equal(found.path, types[rows])
    assert np.array_equal(found.study, studies[rows] if by_study else np.full(300, -1))
    for fold, (training, held_out) in enumerate(seen):
        trained = [row_of[tuple(vector)] for vector in training.vectors.tolist()]
        asked = [row_of[tuple(vector)] for vector in held_out.vectors.tolist()]
        assert sorted(trained + asked) == list(range(300))
        assert np.array_equal(np.sort(asked), np.sort(rows[found.fold == fold]))
        # the differences of studies count as in the reference, also where cells are dealt
        unlike = Discriminant(training.vectors, types[trained], studies[trained])(held_out.vectors)
        assert np.allclose(found.signals[found.fold == fold][:, 1:], unlike, rtol=1e-5)
        if by_study:
            assert not set(studies[trained]) & set(studies[asked])


def test_a_copy_of_a_held_out_cell_is_not_trained_on():
    types = np.tile(np.random.default_rng(2).integers(0, 3, 100), 2)
    seen: list[tuple[LabelledVectors, LabelledVectors]] = []
    for studies in (None, np.repeat([0, 1], 100)):  # the second study repeats the first
        atlas = atlas_of(types, studies, copies=True)
        folds = draw_folds(atlas, studies is not None, 0)
        if studies is None:
            cross_fit(atlas, folds, tree_of(atlas), np.zeros(200, np.int64), fitted(seen), 0)
            for training, held_out in seen:
                assert not {*map(tuple, training.vectors)} & {*map(tuple, held_out.vectors)}
            assert len(set(folds.fold[:100])) == FOLDS
            assert np.array_equal(folds.fold[:100], folds.fold[100:])


def test_a_type_of_one_study_is_not_asked():
    """Type 3 is only in study 0, whose other cells are asked."""
    types, studies = np.tile([0, 1, 2, 0], 75), np.repeat(np.arange(3), 100)
    types[:10] = 3
    folds = draw_folds(atlas_of(types, studies), True, 0)
    assert folds.by_study
    assert np.array_equal(~folds.asked, types == 3)
    assert folds.about == "3 whole studies in 3 folds"


def test_studies_that_share_few_types_are_not_held_out():
    """An organ is no study of another where nearly all cells are of types that one organ has."""
    studies = np.repeat(np.arange(3), 200)
    few, more = (np.where(np.arange(600) % 10 < shared, 0, studies + 1) for shared in (2, 4))
    folds = draw_folds(atlas_of(few, studies), True, 0)
    assert not folds.by_study
    assert "20% of them have a type of another study" in folds.about
    assert folds.asked.all()
    assert draw_folds(atlas_of(more, studies), True, 0).by_study


def test_a_column_that_names_cells_is_no_column_of_studies():
    """Folds of such studies are folds of cells, and an error would be guaranteed for new studies."""
    types = np.tile([0, 1], 100)
    with pytest.raises(InputError, match="200 studies of 200 cells: that column names cells"):
        draw_folds(atlas_of(types, np.arange(200)), True, 0)
    assert draw_folds(atlas_of(types, np.arange(200) // 2), True, 0).by_study


def test_too_few_cells_are_found_before_training():
    with pytest.raises(InputError, match="60 labelled cells of types with more than one are too few"):
        draw_folds(atlas_of(np.tile([0, 1], 30)), False, 0)


def test_studies_are_dealt_to_folds_of_about_equal_size():
    fold = deal(np.array([50, 10, 30, 20, 20, 40]))
    assert fold.max() == FOLDS - 1
    assert np.bincount(fold, [50, 10, 30, 20, 20, 40]).max() == 50
    assert set(deal(np.array([5, 5]))) == {0, 1}
