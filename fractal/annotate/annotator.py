"""Labels for new cells, each as deep in the hierarchy as it can be trusted.

The nearest reference cells vote (votes.py); cells that were held out say how often a label with so many votes is right,
and how unlike its type an ordinary cell may be (calibration.py); the answer stops above the first level whose
probability is below the confidence asked for (answers.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np

from fractal.annotate.answers import CONFIDENCE, Answer, answer, unforced
from fractal.annotate.calibration import Calibration, HeldOut, calibrate, held_out_of
from fractal.annotate.cross_fit import path_names
from fractal.annotate.votes import COPIES, NEIGHBOURS, SAME, Voters, Voting
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.data.vectors import usable
from fractal.hierarchy.tree import Labels, Tree, terms_of
from fractal.model.adapter import Adapter
from fractal.model.split import MIN_VALIDATION, Split
from fractal.score.answers import answer_counts, answer_scores

MIN_RESTRICTED = 20  # held-out cells, after --only and --exclude
FULL_STUDY = 50  # cells; of a smaller study it is not said how many are flagged


@dataclass
class Annotator:
    """An adapter, the cells that vote, and what held-out cells teach. `of` makes one of a single split."""

    adapter: Adapter
    tree: Tree
    vectors: np.ndarray  # (m, dim) float32, of the reference cells
    path: np.ndarray  # (m,) int64 into the tree
    study: np.ndarray  # (m,) int64 codes of their studies, 0 where nothing is known
    held_out: HeldOut
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
        """Of a trained adapter, calibrated on cells of one split, which weigh as much as the file's mix has of them.

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
        if len(validation.vectors) < MIN_VALIDATION:
            raise InputError(
                f"{len(validation.vectors)} validation cells are too few to calibrate on, it takes {MIN_VALIDATION}; "
                "train with a larger --val-ratio, or on more cells"
            )
        named = [path_names(cells) for cells in (train, validation)]
        paths = sorted({names for part in named for names in part})
        natural = np.array([counts.get(names, 0) for names in paths])
        tree = Tree.of(paths, train.levels, terms_of(paths, graph, train.levels), natural)
        path, true = (tree.rows(names) for names in named)
        study, cells = np.zeros(len(path), np.int64), np.full(len(true), -1)
        ballot = Voting(adapter.eval(), train.vectors, path, study, tree).ballot(validation.vectors)
        held_out = held_out_of(ballot, validation.vectors, true, cells, 0, tree.natural_weight(true))
        return Annotator(adapter, tree, train.vectors, path, study, held_out)

    @staticmethod
    def of_atlas(
        adapter: Adapter, atlas: Atlas, split: Split, reference_cells: int, graph: nx.DiGraph | None = None
    ) -> "Annotator":
        """Of the file that the adapter was trained on: at most so many of its training cells vote. Raises as `of`."""
        train, validation, _ = split.rows(atlas)
        train = atlas.balanced_rows(train, reference_cells, split.seed)
        counts = atlas.path_counts(~split.is_test(atlas))
        return Annotator.of(adapter, atlas.read(train), atlas.read(validation), counts, graph)

    @cached_property
    def voting(self) -> Voting:
        return Voting(self.adapter, self.vectors, self.path, self.study, self.tree, self.voters)

    @cached_property
    def calibration(self) -> Calibration:
        return calibrate(self.held_out, self.tree)

    def restricted(self, keep: np.ndarray | None) -> "Annotator":
        """Only the paths of the mask `keep` (paths,) vote and calibrate; what is novel is still so to all types.

        Raises InputError where too few of either are left.
        """
        if keep is None:
            return self
        reference, held_out = keep[self.path], self.held_out.restricted(keep)
        if not reference.any():
            raise InputError("--only and --exclude leave no reference cell; name broader terms")
        if len(held_out) < MIN_RESTRICTED:
            raise InputError(
                f"--only and --exclude leave {len(held_out)} held-out cells, too few to calibrate on (it takes "
                f"{MIN_RESTRICTED}); name broader terms"
            )
        return replace(
            self,
            vectors=self.vectors[reference],
            path=self.path[reference],
            study=self.study[reference],
            held_out=held_out,
            whole=self,
            voters=self.voters and self.voters.restricted(keep),
        )

    def with_voters(self, voters: Voters) -> "Annotator":
        """These vote in place of the reference cells, and the held-out cells are asked of them; novel is as before.

        They may hold a held-out cell itself, which then has no vote.
        """
        asking = replace(self, voters=voters)
        ballot = asking.voting.ballot(self.held_out.vectors, COPIES)
        cosine = np.where(ballot.cosine > SAME, -np.inf, ballot.cosine)
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :NEIGHBOURS]
        path, cosine = (np.take_along_axis(values, order, 1) for values in (ballot.path, cosine))
        asking.held_out = replace(self.held_out, neighbour_path=path.astype(np.int32), cosine=cosine.astype(np.float32))
        return asking

    def answer(self, vectors: np.ndarray, confidence: float = CONFIDENCE, novelty: str = "on") -> Answer:
        """vectors (n, dim) float32, of any kind -> the answer of each; see `fractal.annotate.answers.answer`."""
        valid = usable(vectors)
        x = vectors[valid]
        raw, calibration, whole = self.voting(x), self.calibration, None
        if self.whole is not None:
            whole = self.whole.voting(x)
            ordinary, raw = self.whole.calibration, replace(raw, signals=whole.signals)
            calibration = replace(calibration, signals=ordinary.signals, ood_score=ordinary.ood_score)
        found = answer(raw, calibration, confidence, novelty)
        if whole is not None:
            shared = (self.tree.nodes[raw.path] == self.tree.nodes[whole.path]).cumprod(1).sum(1)
            found = unforced(replace(found, excluded=~np.isin(whole.path, self.path)), shared)
        return found.spread(valid)

    def scores(self, test: LabelledVectors | None = None, studies: Sequence[str] | None = None) -> dict[str, Any]:
        """How good the answers are: on test cells, or else on the held-out ones, each by what the other folds teach.

        Per level accuracy, coverage, calibration error and its curve; the share of known cells that are flagged as
        novel, also in the worst study, and of those whose right subtype is withheld as novel. studies: (n,) the name
        of that of each cell, where whole ones are held out; `classes` counts by them, see `answer_counts`.
        """
        study = np.full(1, -1)
        if test is not None and len(test.vectors):
            found = self.answer(test.vectors)
            names = np.array(self.tree.paths, object)[found.path]  # by name: a test type may be missing in the tree
            paths = path_names(test)
            right = names == np.array(paths, object)
        elif len(folds := np.unique(self.held_out.fold)) > 1:
            found, right = cross_answers(self.held_out, self.tree, folds)
            study, paths = self.held_out.study, [self.tree.paths[path] for path in self.held_out.path]
        else:
            return {"cells": 0}
        withheld = right[:, -1] & (found.depth < found.confident_depth)
        by_study = [study == code for code in np.unique(study) if (study == code).sum() >= FULL_STUDY]
        worst = [float(found.novel[rows].mean()) for rows in by_study] if study[0] >= 0 else []
        answered = found.depth[:, None] > np.arange(len(self.tree.levels))
        levels = answer_scores(self.tree.levels, right, answered, found.probability)
        flagged = {"flagged": float(found.novel.mean()), "withheld": float(withheld.mean())}
        classes = answer_counts(paths, studies, right, answered, found.novel)
        return {
            "cells": len(right), **flagged, "flagged_worst": max(worst, default=None),
            "levels": levels, "classes": classes,
        }  # fmt: skip


def cross_answers(held_out: HeldOut, tree: Tree, folds: np.ndarray) -> tuple[Answer, np.ndarray]:
    """The answers for held-out cells, each fold calibrated on the others; and which labels are right (n, levels)."""
    parts = [(held_out[held_out.fold == fold], held_out[held_out.fold != fold]) for fold in folds]
    found = Answer.join([answer(cells.raw(tree), calibrate(others, tree)) for cells, others in parts])
    found = found[np.argsort(held_out.fold, kind="stable").argsort()]  # in the order of the cells again
    return found, tree.nodes[found.path] == tree.nodes[held_out.path]
