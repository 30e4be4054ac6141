"""Labels for new cells, each as deep in the hierarchy as it can be trusted.

The nearest reference cells vote (votes.py); cells that were held out say how often a label with so many votes is right,
and how unlike its type an ordinary cell may be (calibration.py); the answer stops above the first level whose
probability is below the confidence asked for (answers.py).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np

from fractal.annotate.answers import CONFIDENCE, Answer, answer, unforced
from fractal.annotate.calibration import Calibration, calibrate
from fractal.annotate.votes import Voters, Voting
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.data.vectors import usable
from fractal.hierarchy.tree import Labels, Tree, terms_of
from fractal.model.adapter import Adapter
from fractal.model.split import MIN_VALIDATION, Split
from fractal.score.answers import answer_counts, answer_scores

MIN_RESTRICTED = 20  # of these cells, after --only and --exclude


@dataclass
class Annotator:
    """An adapter, the cells that vote, and the cells that calibrate. `of` makes one."""

    adapter: Adapter
    tree: Tree
    vectors: np.ndarray  # (m, dim) float32, of the reference cells
    path: np.ndarray  # (m,) int64 into the tree
    validation_vectors: np.ndarray  # (v, dim) float32
    validation_path: np.ndarray  # (v,) int64
    calibration: Calibration
    voters: Voters | None = None  # cells of an index, which vote in place of the reference's
    whole: "Annotator | None" = None  # of a restricted one: that with all types

    @staticmethod
    def of(
        adapter: Adapter,
        train: LabelledVectors,
        validation: LabelledVectors,
        counts: Mapping[Labels, int],
        graph: nx.DiGraph | None = None,
    ) -> "Annotator":
        """A calibrated annotator of a trained adapter.

        Parameters
        ----------
        train : the reference cells, as balanced over types as can be
        validation : cells that the adapter was not fitted on
        counts : cells of the training file, without test cells, per path of names
        graph : the ontology, for CL ids; without one, labels have none

        Raises
        ------
        InputError : with fewer than MIN_VALIDATION validation cells.
        """
        check_validation(len(validation.vectors))
        named = [path_names(cells) for cells in (train, validation)]
        paths = sorted({names for part in named for names in part})
        natural = np.array([counts.get(names, 0) for names in paths])
        tree = Tree.of(paths, train.levels, terms_of(paths, graph), natural)
        position = {names: i for i, names in enumerate(paths)}
        path, validation_path = (np.array([position[names] for names in part]) for part in named)
        nothing = Calibration([], [], ([], []))
        return Annotator(
            adapter.eval(), tree, train.vectors, path, validation.vectors, validation_path, nothing
        ).calibrated()

    @staticmethod
    def of_atlas(
        adapter: Adapter, atlas: Atlas, split: Split, reference_cells: int, graph: nx.DiGraph | None = None
    ) -> "Annotator":
        """Of the file that the adapter was trained on: at most so many of its training cells vote. Raises as `of`."""
        train, validation, _ = split.rows(atlas)
        check_validation(len(validation))
        train = atlas.balanced_rows(train, reference_cells, split.seed)
        counts = atlas.path_counts(~split.is_test(atlas))
        return Annotator.of(adapter, atlas.read(train), atlas.read(validation), counts, graph)

    @cached_property
    def voting(self) -> Voting:
        return Voting(self.adapter, self.vectors, self.path, self.tree, self.voters)

    def calibrated(self) -> "Annotator":
        """The same with what its validation cells teach, weighted to count as the training file's mix."""
        raw = self.voting(self.validation_vectors, skip_copies=self.voters is not None)  # an index may hold them, too
        weight = self.tree.natural_weight(self.validation_path)
        new = copy.copy(self)
        new.calibration = calibrate(raw, self.validation_path, self.tree, weight)
        return new

    def restricted(self, keep: np.ndarray | None) -> "Annotator":
        """With the paths of the mask `keep` (paths,) only, calibrated anew on the validation cells that lie on these.

        Raises InputError where too few of either are left.
        """
        if keep is None:
            return self
        reference, validation = keep[self.path], keep[self.validation_path]
        if not reference.any():
            raise InputError("--only and --exclude leave no reference cell; name broader terms")
        if validation.sum() < MIN_RESTRICTED:
            raise InputError(
                f"--only and --exclude leave {validation.sum()} validation cells, too few to calibrate on (it takes "
                f"{MIN_RESTRICTED}); name broader terms"
            )
        return replace(
            self,
            vectors=self.vectors[reference],
            path=self.path[reference],
            validation_vectors=self.validation_vectors[validation],
            validation_path=self.validation_path[validation],
            whole=self,
            voters=self.voters and self.voters.restricted(keep),
        ).calibrated()

    def with_voters(self, voters: Voters) -> "Annotator":
        """These vote in place of the reference cells, and the probabilities are calibrated anew."""
        return replace(self, voters=voters).calibrated()

    def answer(self, vectors: np.ndarray, confidence: float = CONFIDENCE, novelty: str = "on") -> Answer:
        """vectors (n, dim) float32, of any kind -> the answer of each; see `fractal.annotate.answers.answer`."""
        valid = usable(vectors)
        x = vectors[valid]
        raw = self.voting(x)
        found = answer(raw, self.calibration, confidence, novelty)
        if self.whole is not None:
            path = self.whole.voting(x).path
            shared = (self.tree.nodes[raw.path] == self.tree.nodes[path]).cumprod(1).sum(1)
            found = unforced(replace(found, excluded=~np.isin(path, self.path)), shared)
        return found.spread(valid)

    def scores(self, test: LabelledVectors | None, studies: Sequence[str] | None = None) -> dict[str, Any]:
        """How good the answers are on n test cells: per level accuracy, coverage, calibration error and its curve.

        studies: (n,) that of each cell, where whole ones are held out; `classes` counts by them, see `answer_counts`.
        """
        if test is None or not len(test.vectors):
            return {"cells": 0}
        found = self.answer(test.vectors)
        names = np.array(self.tree.paths, object)[found.path]  # by name: a test type may be missing in the tree
        paths = path_names(test)
        right = names == np.array(paths, object)
        answered = found.depth[:, None] > np.arange(len(self.tree.levels))
        levels = answer_scores(self.tree.levels, right, answered, found.probability)
        classes = answer_counts(paths, studies, right, answered, found.novel)
        return {"cells": len(right), "flagged": float(found.novel.mean()), "levels": levels, "classes": classes}


def check_validation(cells: int) -> None:
    if cells < MIN_VALIDATION:
        raise InputError(
            f"{cells} validation cells are too few to calibrate on, it takes {MIN_VALIDATION}; "
            "train with a larger --val-ratio, or on more cells"
        )


def path_names(cells: LabelledVectors) -> list[Labels]:
    return [tuple(cells.classes[k][c] for k, c in enumerate(row)) for row in cells.labels.tolist()]
