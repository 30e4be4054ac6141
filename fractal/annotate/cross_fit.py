"""Cross-fitting: every cell is asked once of an adapter and of reference cells that have seen neither it nor its study.

The studies, or where there are none the cells, are dealt to at most FOLDS folds. For each, an adapter is trained on
the others, and its cells are asked. Scores, probabilities and the null of novelty come of it; then all cells train.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fractal.annotate.calibration import HeldOut, held_out_of, study_weight
from fractal.annotate.votes import Voting
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.hierarchy.tree import Labels, Tree
from fractal.model.split import MIN_VALIDATION
from fractal.model.training import Fitted

FOLDS = 5
FOLD_CELLS = 20_000  # that a fold trains on, at most
ASKED = 4_000  # cells of a fold that are asked, at most: a standard error of .005 at an accuracy of .9
MIN_SHARED = 0.3  # share of the cells whose type other studies have; with less, a study is no draw of the next one

Train = Callable[[LabelledVectors, LabelledVectors, np.ndarray], Fitted]


@dataclass(frozen=True)
class Folds:
    """How an atlas of n rows is dealt."""

    fold: np.ndarray  # (n,) int64
    asked: np.ndarray  # (n,) bool: other folds have the cell's type
    study: np.ndarray  # (n,) int64 codes, -1 where cells are dealt
    about: str  # who is held out

    @property
    def by_study(self) -> bool:
        return bool(self.study[0] >= 0)


def draw_folds(atlas: Atlas, by_study: bool, seed: int) -> Folds:
    """Deal the studies of an atlas to folds of about equal size, or else its cells; copies of a vector go together.

    Raises InputError where too few cells have their type in other folds, and for studies of hardly more than one cell.
    """
    types, _ = atlas.finest
    why = ""
    if by_study:
        codes, names = atlas.studies
        if 2 * len(names) > len(codes):
            raise InputError(
                f"{len(names):,} studies of {len(codes):,} cells: that column names cells; give the one of their "
                "donors or batches, or none"
            )
        study = codes.astype(np.int64)
        fold = deal(np.bincount(study, minlength=len(names)))[study]
        asked = shared(types, fold)
        if asked.mean() >= MIN_SHARED and asked.sum() >= MIN_VALIDATION:
            return Folds(fold, asked, study, f"{len(names)} whole studies in {fold.max() + 1} folds")
        why = f"; {asked.mean():.0%} of them have a type of another study, too few to hold studies out"
    fold = np.random.default_rng(seed).permutation(len(types))[atlas.first_copies] % FOLDS
    asked = shared(types, fold)
    if asked.sum() < MIN_VALIDATION:
        raise InputError(
            f"{asked.sum():,} labelled cells of types with more than one are too few to learn from how far answers can "
            f"be trusted, it takes {MIN_VALIDATION}"
        )
    return Folds(fold, asked, np.full(len(types), -1), f"cells drawn at random, in {FOLDS} folds{why}")


def deal(size: np.ndarray) -> np.ndarray:
    """Sizes of studies (s,) -> the fold of each: the largest first, each to the fold with the fewest cells."""
    fold, load = np.zeros(len(size), np.int64), np.zeros(min(FOLDS, len(size)))
    for study in np.argsort(-size, kind="stable"):
        fold[study] = load.argmin()
        load[fold[study]] += size[study]
    return fold


def shared(types: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(n,) bool: whether another fold has the cell's type."""
    counts = np.zeros((types.max() + 1, fold.max() + 1), np.int64)
    np.add.at(counts, (types, fold), 1)
    return counts.sum(1)[types] > counts[types, fold]


def cross_fit(
    atlas: Atlas, folds: Folds, tree: Tree, study: np.ndarray, train: Train, seed: int
) -> tuple[HeldOut, list[int]]:
    """-> the held-out cells, and the best epoch of each fold.

    study: (n,) codes of all cells, as `Voting` takes them, which may have studies where cells are dealt.
    train: called with training cells, held-out cells, and which rows of the atlas (n,) bool may be counted.
    """
    parts, epochs = list[HeldOut](), list[int]()
    for fold in range(folds.fold.max() + 1):
        out = folds.fold == fold
        copied = np.zeros(len(out), bool)
        copied[atlas.first_copies[out]] = True
        others = ~out & ~copied[atlas.first_copies]  # no copy of a held-out cell trains
        rows = atlas.balanced_rows(np.flatnonzero(others), FOLD_CELLS, seed)
        asked = np.random.default_rng([seed, fold]).permutation(np.flatnonzero(out & folds.asked))[:ASKED]
        print(f"fold {fold + 1} of {folds.fold.max() + 1}: {len(rows):,} cells train, {len(asked):,} are asked")
        training, held_out = atlas.read(np.concatenate([rows, asked])).split(len(rows))
        fitted = train(training, held_out, others)
        path, true = (tree.rows(path_names(cells)) for cells in (training, held_out))
        voting = Voting(fitted.adapter.eval(), training.vectors, path, study[rows], tree)
        ballot = voting.ballot(held_out.vectors)
        parts.append(held_out_of(ballot, held_out.vectors, true, folds.study[asked], fold, np.ones(len(true))))
        epochs.append(fitted.best_epoch)
    found = HeldOut.join(parts)
    found.weight[:] = study_weight(found.study)
    return found, epochs


def path_names(cells: LabelledVectors) -> list[Labels]:
    return [tuple(cells.classes[k][c] for k, c in enumerate(row)) for row in cells.labels.tolist()]
