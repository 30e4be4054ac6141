"""Checkpoints of one split, scored on the cells that the split left: what eval.py does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch

from fractal.base.errors import InputError, printable
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.ontology import ANCHORS_SHA256
from fractal.model.adapter import Adapter
from fractal.model.embedding import block_names
from fractal.model.split import Split
from fractal.score.embeddings import (
    Encoder,
    Subset,
    adapter_encoder,
    distinct_names,
    fit_controls,
    kept_cells,
    nearest_in,
    raw,
    vectors_encoder,
)
from fractal.score.table import ScoreTable, score_table, truth_of

BANKS = {"train": "training", "all": "other"}  # whose cells are the bank


@dataclass(frozen=True)
class Checkpoint:
    """One to score."""

    name: str  # of its rows, where there are several
    path: Path
    adapter: Adapter
    facts: dict[str, Any]  # the checkpoint, or a reference's facts
    split: Split

    @property
    def blocks(self) -> tuple[str, ...]:
        """The name of the level that each block stands for."""
        return block_names(self.facts["config"])

    def __str__(self) -> str:
        config, blocks = self.facts["config"], self.blocks
        return f"recipe {config['recipe']}, {len(blocks)} blocks of {config['scale_dim']}: {', '.join(blocks)}"


def of_one_split(paths: Sequence[Path], loaded: Sequence[tuple[Adapter, dict[str, Any]]]) -> list[Checkpoint]:
    """What was loaded from these paths. Raises InputError for checkpoints that were not trained on the same cells."""
    named = zip(distinct_names(paths), paths, loaded, strict=True)
    models = [Checkpoint(name, path, *each, Split.of(each[1], path)) for name, path, each in named]
    for model in models:
        if model.split != models[0].split:
            raise InputError(f"{model.path}: was trained on other cells than {paths[0]}; evaluate it by itself")
    return models


def choose_rows(
    model: Checkpoint, atlas: Atlas, num_samples: int, seed: int, all_rows: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """-> the training rows of the file, and query rows: `num_samples` test cells, or cells of a new file (`all_rows`).

    Raises InputError for a file that does not fit the checkpoint.
    """
    path, config = atlas.path, model.facts["config"]
    same_file = atlas.fingerprint == model.split.fingerprint
    if atlas.dim != config["dim"]:
        raise InputError(f"{path}: its vectors have {atlas.dim} numbers, those of {model.path} {config['dim']}")
    levels, trained = atlas.levels, tuple(config.get("levels", LEVELS))
    if levels != trained:
        raise InputError(f"{path}: its levels are {', '.join(levels)}, those of {model.path} {', '.join(trained)}")
    if all_rows and same_file:
        raise InputError(f"{path}: {model.path} was trained on it, so its cells are not new; drop --all-rows")
    if not all_rows and not same_file:
        raise InputError(
            f"{path}: not the file that {model.path} was trained on, so which of its cells are held out is "
            "unknown; name that file, or say --all-rows if all its cells are new"
        )
    train, _, pool = model.split.rows(atlas) if same_file else (np.arange(0), None, np.arange(atlas.num_rows))
    queries = np.random.default_rng(seed).permutation(pool)[:num_samples]
    if len(queries) < 2:
        raise InputError(f"{path}: {len(queries)} test cells are too few; train with a larger --test-ratio")
    return train, queries


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns."""

    scores: ScoreTable
    cells: LabelledVectors  # the n queries, then the cells of the bank that are neighbours of one
    num_bank: int  # cells in which neighbours were looked for
    left_out: list[str]  # a line for each control that can't be fitted


def evaluate(
    models: Sequence[Checkpoint],
    atlas: Atlas,
    rows: tuple[np.ndarray, np.ndarray],
    graph: nx.DiGraph,
    bank: str | None = "train",
    vectors: Sequence[Path] = (),
    controls: bool = False,
) -> Evaluation:
    """Score checkpoints of one split (`of_one_split`) on rows of a file (`choose_rows`).

    bank: whose cells are the bank: "train", "all" (that are not set aside for testing), or None for no bank. vectors:
    files of others' vectors to score as well; controls: so are raw vectors cut short, PCA and LDA.
    """
    train_rows, query_rows = rows
    split, n, device = models[0].split, len(query_rows), next(models[0].adapter.parameters()).device
    needed = train_rows if bank == "train" or controls else train_rows[:0]
    cells = atlas.read(np.concatenate([query_rows, needed]))  # one call: labels share their codes
    x = torch.from_numpy(cells.vectors).to(device)
    queries, train = Subset(x[:n], query_rows), Subset(x[n:], needed)
    encoders: list[Encoder] = [raw]
    encoders += [adapter_encoder(model.adapter, model.name if len(models) > 1 else "") for model in models]
    named = zip(vectors, distinct_names(vectors), strict=True)
    encoders += [vectors_encoder(file, atlas.num_rows, name) for file, name in named]
    left_out = list[str]()
    if controls:
        widths = {j * model.adapter.scale_dim for model in models for j in range(1, model.adapter.num_levels + 1)}
        encode, left_out = fit_controls(train.vectors, cells.labels[n:, -1], sorted(widths))
        encoders.append(encode)
    others, near, num_bank = train, None, len(train_rows)
    if bank == "train":
        near = nearest_in([train], queries, encoders)
    elif bank == "all":
        keep = ~split.is_test(atlas)
        num_bank, near = int(keep.sum()), nearest_in(kept_cells(atlas.path, keep, device), queries, encoders)
        numbers, positions = np.unique(np.flatnonzero(keep)[near], return_inverse=True)
        cells = atlas.read(np.concatenate([query_rows, numbers]))
        others, near = Subset(torch.from_numpy(cells.vectors[n:]).to(device), numbers), positions.reshape(near.shape)
    labels, bank_labels = torch.from_numpy(cells.labels).to(device).tensor_split([n])
    unseen = split.test_types if bank else ()
    groups = atlas.studies[0][query_rows] if len(split.test_studies) > 1 and bank else None
    truth = truth_of(cells.levels, labels, cells.classes, models[0].facts["classes"], unseen, groups, graph)
    scores = score_table(truth, queries, encoders, None if near is None else (others, bank_labels, near))
    return Evaluation(scores, cells, num_bank, left_out)


def describe_intervals(split: Split, groups: np.ndarray | None) -> str:
    if groups is not None:
        return f"[95 % interval over the {len(np.unique(groups))} studies]"
    if split.test_studies:
        return "[95 % interval over cells: one study can't say how another would score]"
    return "[95 % interval over cells]"


def warnings(atlas: Atlas, release: str, copies: dict[str, int], failed: list[str]) -> list[str]:
    """What makes the figures say less than they seem to, a line each. release: of the ontology that counts steps."""
    lines = [f"left out: {line}" for line in failed]
    path, metadata = atlas.path, atlas.metadata
    made_with = metadata.get("cl_release", "")
    if made_with and made_with != release:
        lines.append(
            f"warning: {path} was made with Cell Ontology {printable(made_with)}, and steps are counted in {release}; "
            "name the other one with --obo"
        )
    if metadata.get("anchors_sha256", ANCHORS_SHA256) != ANCHORS_SHA256:
        lines.append(f"note: {path} has another tree than the published one of this version, and is scored on it")
    for where, number in copies.items():
        if number:
            lines.append(f"warning: {number:,} test cells have an exact copy among {where}, which flatters all figures")
    return lines
