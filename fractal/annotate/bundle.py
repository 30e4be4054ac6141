"""A reference in one folder: all that annotating takes, and where it comes from.

    adapter.safetensors   weights of the adapter
    cells.safetensors     reference and validation cells: their vectors as they went in, and their rows of hierarchy.tsv
    hierarchy.tsv         the paths: a name and a CL id per level, and how many cells of the training file lie on each
    calibration.json      what held-out cells taught (fractal.annotate.annotator.Calibration)
    projection.safetensors   only of a PCA: what projects new cells (fractal.annotate.projection)
    maps.safetensors      only after `fractal map`: layouts of the cells (fractal.view.maps), with a hash of its own
    bundle.json           format version, the adapter's config, sha256 of the files above, provenance
    README.md             the model card

The full fractal vectors are not kept: the adapter makes 100,000 in a second or two. The validation cells are: who asks
for some types only needs probabilities that hold among these.
"""

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from safetensors.torch import load_file, save

from fractal import __version__
from fractal.annotate.annotator import SIGNALS, Annotator, Answer, Calibration, Tree, Voters, answer, calibrate
from fractal.annotate.card import model_card
from fractal.annotate.projection import Projection
from fractal.annotate.space import space_problem
from fractal.base.cli import InputError
from fractal.base.files import atomic_folder, read_whole, recover
from fractal.base.storage import Place, fetch
from fractal.data.atlas import LabelledVectors
from fractal.data.parquet import fingerprint
from fractal.data.vectors import usable
from fractal.hierarchy.ontology import MANUAL, build_hierarchy, level_terms
from fractal.model import adapter as checkpoints
from fractal.model.adapter import Adapter, build_adapter
from fractal.model.split import MIN_VALIDATION
from fractal.score.answers import answer_scores

VERSION = 4  # 3: two signals of unknown types; 2: no validation cells; 1: before the logits were asked
FILES = ("adapter.safetensors", "cells.safetensors", "hierarchy.tsv", "calibration.json")
PROJECTION = "projection.safetensors"  # only where the vectors are principal components
MAPS = "maps.safetensors"  # layouts of the cells, made by `fractal map`; a reference that is made again loses them
# reference.parquet is of older versions
OWN_FILES = (*FILES, PROJECTION, MAPS, "bundle.json", "README.md", "reference.parquet")
# As a checkpoint's facts, where nothing is known.
NOTHING_KNOWN: dict[str, Any] = {"training": {}, "versions": {}, "split": {}, "validation": None}
MIN_RESTRICTED = 20  # of these cells, after --only and --exclude
CONFIDENCE = 0.8  # the default, and what the model card reports


@dataclass(frozen=True)
class Bundle:
    """A reference, ready to annotate. Made by `make_reference` or `read_bundle`."""

    adapter: Adapter
    tree: Tree
    levels: tuple[str, ...]  # names, coarse to fine
    cl_ids: np.ndarray  # (paths, levels) str, "" where a label is no CL term
    counts: np.ndarray  # (paths,) int64, cells of the training file that are no test cells
    vectors: np.ndarray  # (m, dim) float32, of the reference cells
    path: np.ndarray  # (m,) int64
    validation_vectors: np.ndarray  # (v, dim) float32
    validation_path: np.ndarray  # (v,) int64
    calibration: Calibration
    facts: dict[str, Any]  # bundle.json
    whole: "Bundle | None" = None  # of a restricted reference: that with all types
    projection: Projection | None = None  # from expression to vectors
    voters: Voters | None = None  # cells of an index, which vote in place of the reference's

    @property
    def use_rep(self) -> str:
        """Key of obsm whose vectors it was made of."""
        return str(self.facts.get("obsm") or "X_scimilarity")

    @cached_property
    def sha256(self) -> str:
        """Of the adapter's weights as `write_bundle` writes them."""
        return weights_sha256(self.adapter)

    def about(self, name: str, confidence: float, novelty: str, vectors: str, warning: str) -> dict[str, Any]:
        """What uns["fractal"]["annotation"] says of the answers; `name` is that of the reference."""
        return {
            "reference": name,
            "adapter_sha256": self.sha256,
            "cl_release": str(self.facts.get("cl_release", "")),
            "confidence": confidence,
            "novelty": novelty,
            "vectors": vectors,
            "warning": warning,
            "fractal_version": __version__,
            "reference_format": VERSION,
            **({"index": str(self.voters)} if self.voters else {}),
        }

    @cached_property
    def annotator(self) -> Annotator:
        return Annotator(self.adapter, self.vectors, self.path, self.tree, self.voters)

    def restricted(self, keep: np.ndarray) -> "Bundle":
        """With the paths of the mask `keep` (paths,) only, calibrated anew on the validation cells that lie on these.

        Raises InputError where too few of either are left.
        """
        reference, validation = keep[self.path], keep[self.validation_path]
        if not reference.any():
            raise InputError("--only and --exclude leave no reference cell; name broader terms")
        if validation.sum() < MIN_RESTRICTED:
            raise InputError(
                f"--only and --exclude leave {validation.sum()} validation cells, too few to calibrate on (it takes "
                f"{MIN_RESTRICTED}); name broader terms"
            )
        part = replace(
            self,
            vectors=self.vectors[reference],
            path=self.path[reference],
            validation_vectors=self.validation_vectors[validation],
            validation_path=self.validation_path[validation],
            whole=self,
            voters=self.voters and self.voters.restricted(keep),
        )
        return replace(part, calibration=calibration_of(part))

    def answer(self, vectors: np.ndarray, confidence: float = CONFIDENCE, novelty: str = "on") -> Answer:
        """vectors (n, dim) float32, finite and not zero -> their answers."""
        return answer(self.annotator(vectors), self.calibration, confidence, novelty)

    def annotate(
        self, vectors: np.ndarray, confidence: float = CONFIDENCE, novelty: str = "on"
    ) -> dict[str, np.ndarray]:
        """vectors (n, dim) float32, of any kind -> column -> (n,) values, see `columns`."""
        good = usable(vectors)
        return self.columns(self.answer(vectors[good], confidence, novelty), good, self.best_excluded(vectors[good]))

    def best_excluded(self, vectors: np.ndarray) -> np.ndarray:
        """(n,) bool: without --only and --exclude the answer would be a type that these leave out."""
        if self.whole is None:
            return np.zeros(len(vectors), bool)
        return ~np.isin(self.whole.annotator(vectors).path, self.path)

    def columns(self, found: Answer, good: np.ndarray, excluded: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Column -> (n,) values, in the order of the output; `good` (n,) bool marks the cells that `found` is about.

        The others have status "invalid", text "" and numbers NaN.
        """
        n, rows = len(good), np.flatnonzero(good)

        def spread(values: np.ndarray, missing: str | float) -> np.ndarray:
            out = np.full(n, missing, object if isinstance(missing, str) else np.float32)
            out[rows] = values
            return out

        names = np.array(self.tree.paths, object)[found.path]
        ids = self.cl_ids[found.path].astype(object)
        deepest = np.maximum(found.depth - 1, 0)[:, None]

        def at_depth(values: np.ndarray) -> np.ndarray:
            return np.where(found.depth > 0, np.take_along_axis(values, deepest, 1)[:, 0], "")

        columns = {
            "level": spread(np.array(["none", *self.levels], object)[found.depth], "none"),
            "label": spread(at_depth(names), ""),
            "cl_id": spread(at_depth(ids), ""),
        }
        for k, level in enumerate(self.levels):
            columns[level] = spread(names[:, k], "")
            columns[f"{level}_cl_id"] = spread(ids[:, k], "")
            columns[f"{level}_probability"] = spread(found.probability[:, k], np.nan)
        for name in ("distance", "ood_score", "p_value"):
            columns[name] = spread(getattr(found, name), np.nan)
        cut = found.depth < found.confident_depth
        status = np.full(len(rows), "ok", object)
        status[cut] = "withheld"
        if excluded is not None:
            status[excluded] = "excluded"
        status[found.novel] = "novel"
        columns["status"] = spread(status, "invalid")
        by = np.where(cut, "novelty", np.where(found.confident_depth < len(self.levels), "confidence", ""))
        columns["withheld_by"] = spread(by, "")
        return columns

    def space_problem(self, vectors: np.ndarray) -> tuple[str, bool] | None:
        """Why vectors (n, dim) float32 may not be of the reference's space, and whether that is certain; else None.

        Unusable ones are left out.
        """
        return space_problem(vectors[usable(vectors)], self.vectors)


def calibration_of(bundle: Bundle) -> Calibration:
    """From a bundle's validation cells, weighted to count as the training file's mix. An index may hold them, too."""
    weight = natural_weight(bundle.validation_path, bundle.counts)
    raw = bundle.annotator(bundle.validation_vectors, skip_copies=bundle.voters is not None)
    return calibrate(raw, bundle.validation_path, bundle.tree, weight)


def natural_weight(path: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weights (n,) that make cells with these paths (n,), balanced over types, count as the file's mix (paths,)."""
    return (counts / np.maximum(np.bincount(path, minlength=len(counts)), 1))[path]


def make_reference(
    adapter: Adapter,
    config: dict[str, Any],
    classes: list[list[str]],
    train: LabelledVectors,
    validation: LabelledVectors,
    counts: Mapping[tuple[str, ...], int],
    test: LabelledVectors | None = None,
    facts: Mapping[str, Any] | None = None,
    graph: nx.DiGraph | None = None,
    projection: Projection | None = None,
) -> Bundle:
    """A trained adapter and labelled cells -> a calibrated and scored reference.

    config, classes: those of the checkpoint. train: the reference cells, as balanced over types as can be; validation:
    cells that the adapter was not fitted on; test: cells that nothing has seen, for the scores. counts: how many cells
    of the training file that are no test cells lie on each path of names. facts: provenance, for bundle.json and the
    card. graph: the ontology, for CL ids; without one, labels have none. projection: where the vectors are those of a
    PCA. Raises InputError where fewer than MIN_VALIDATION validation cells are given.
    """
    if len(validation.vectors) < MIN_VALIDATION:
        raise InputError(
            f"{len(validation.vectors)} validation cells are too few to calibrate on, it takes {MIN_VALIDATION}; "
            "train with a larger --val-ratio, or on more cells"
        )
    named = [path_names(cells) for cells in (train, validation)]
    tree = Tree.of(sorted({names for part in named for names in part}))
    position = {names: i for i, names in enumerate(tree.paths)}
    path, validation_path = (np.array([position[names] for names in part]) for part in named)
    natural = np.array([counts.get(names, 0) for names in tree.paths])
    levels = train.levels
    sizes = {
        "reference_cells": len(path),
        "reference_types": len(np.unique(path)),
        "training_cells": int(natural.sum()),
    }
    about = {"config": config, "classes": classes, "recipe": config["recipe"], "levels": list(levels), **sizes}
    if projection:
        about["projection"] = projection.facts()
    # the calibration takes its place below: it needs the annotator
    nothing = Calibration([], [], ([], []))
    bundle = Bundle(
        adapter.eval(),
        tree,
        levels,
        terms_of(tree, graph),
        natural,
        train.vectors,
        path,
        validation.vectors,
        validation_path,
        nothing,
        {**NOTHING_KNOWN, **(facts or {}), **about},
        projection=projection,
    )
    bundle = replace(bundle, calibration=calibration_of(bundle))
    return replace(bundle, facts={**bundle.facts, "scores": scores_of(bundle, test)})


def path_names(cells: LabelledVectors) -> list[tuple[str, ...]]:
    return [tuple(cells.classes[k][c] for k, c in enumerate(row)) for row in cells.labels.tolist()]


def terms_of(tree: Tree, graph: nx.DiGraph | None) -> np.ndarray:
    """CL ids (paths, levels) of the labels, "" where the ontology has none or places the type otherwise."""
    ids = np.full(tree.nodes.shape, "", "<U16")
    if graph is not None:
        for i, row in enumerate(build_hierarchy([names[-1] for names in tree.paths], graph, "other")):
            if row.levels == tree.paths[i]:
                ids[i] = level_terms(row, graph)
            elif row.subtype == tree.paths[i][-1]:
                ids[i, -1] = row.cl_id
    return ids


def scores_of(bundle: Bundle, test: LabelledVectors | None) -> dict[str, Any]:
    """How good the answers are on test cells: per level accuracy, coverage, calibration error and its curve."""
    if test is None or not len(test.vectors):
        return {"cells": 0}
    found = bundle.answer(test.vectors)
    names = np.array(bundle.tree.paths, object)[found.path]  # by name: a test type may be missing in the tree
    right = names == np.array(path_names(test), object)
    answered = found.depth[:, None] > np.arange(len(bundle.levels))
    levels = answer_scores(bundle.levels, right, answered, found.probability)
    return {"cells": len(right), "flagged": float(found.novel.mean()), "levels": levels}


def check_place(path: Path) -> None:
    """Raises InputError for an output that would lose anything: only a bundle's own files are replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: is a file, and the reference is a folder; name another --output")
    recover(path / MAPS)  # of a run of `fractal map` that was killed
    there = sorted(file.name for file in path.iterdir())
    if there and "bundle.json" not in there:
        raise InputError(f"{path}: is there, and no reference; name another --output")
    if foreign := sorted(set(there) - set(OWN_FILES)):
        raise InputError(f"{path}: also holds {foreign[0]}, which would be lost; name another --output")


def weights(adapter: Adapter) -> bytes:
    """What adapter.safetensors holds; safetensors' save_file would make files that only their owner reads."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()})


def weights_sha256(adapter: Adapter) -> str:
    return hashlib.sha256(weights(adapter)).hexdigest()


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write all files, whole or not at all; the facts are completed with the version and the hashes."""
    check_place(path)
    with atomic_folder(path, OWN_FILES) as part:
        (part / "adapter.safetensors").write_bytes(weights(bundle.adapter))
        cells = {name: torch.tensor(getattr(bundle, name)) for name in CELL_ARRAYS}  # copies: they may share memory
        (part / "cells.safetensors").write_bytes(save(cells))
        with open(part / "hierarchy.tsv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow([*bundle.levels, *(f"{level}_cl_id" for level in bundle.levels), "cells"])
            for names, ids, count in zip(bundle.tree.paths, bundle.cl_ids.tolist(), bundle.counts, strict=True):
                writer.writerow([*names, *ids, count])
        (part / "calibration.json").write_text(json.dumps(asdict(bundle.calibration)) + "\n", encoding="utf-8")
        names = FILES
        if bundle.projection:
            arrays = {name: torch.tensor(values) for name, values in bundle.projection.arrays().items()}
            (part / PROJECTION).write_bytes(save(arrays))
            names = (*FILES, PROJECTION)
        hashes = {name: fingerprint(part / name) for name in names}
        facts = {**bundle.facts, "version": VERSION, "sha256": hashes}
        (part / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(model_card(bundle.facts, VERSION), encoding="utf-8")


CELL_ARRAYS = ("vectors", "path", "validation_vectors", "validation_path")


def read_bundle(path: Place, device: torch.device | str = "cpu") -> Bundle:
    """Raises InputError for a folder that is no bundle, is of another version, or whose files were changed."""
    return read_whole(fetch(path), partial(_read_bundle, device=device))


def _read_bundle(path: Path, device: torch.device | str) -> Bundle:
    try:
        facts = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
        version, hashes = facts.get("version"), dict(facts.get("sha256", {}))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a reference (bundle.json cannot be read); make one with `fractal fit`"
        ) from error
    if version != VERSION:
        raise InputError(f"{path}: a reference of version {version}, this reads {VERSION}; make it again")
    for name in (*FILES, PROJECTION) if facts.get("projection") else FILES:
        if not (path / name).is_file() or fingerprint(path / name) != hashes.get(name):
            raise InputError(f"{path / name}: missing, or not the file that the reference was made with; make it again")
    try:
        state = load_file(path / "adapter.safetensors")
        checkpoints.check({**facts, "state": state})
        adapter = build_adapter(facts["config"], facts["classes"])
        adapter.load_state_dict(state)
        with open(path / "hierarchy.tsv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t", strict=True))
        levels = tuple(facts["levels"])
        tree = Tree.of([tuple(row[level] for level in levels) for row in rows])
        cl_ids = np.array([[row[f"{level}_cl_id"] for level in levels] for row in rows])
        counts = np.array([int(row["cells"]) for row in rows])
        calibration = Calibration(**json.loads((path / "calibration.json").read_text(encoding="utf-8")))
        cells = read_arrays(path / "cells.safetensors")
        projection = None
        if facts.get("projection"):
            projection = Projection.of(read_arrays(path / PROJECTION), facts["projection"], adapter.dim)
        bundle = Bundle(
            adapter.to(device).eval(),
            tree,
            levels,
            cl_ids,
            counts,
            cells["vectors"],
            cells["path"],
            cells["validation_vectors"],
            cells["validation_path"],
            calibration,
            facts,
            projection=projection,
        )
        check_consistent(bundle)
    except Exception as error:  # whatever damaged files make torch, json and numpy raise
        raise InputError(f"{path}: a damaged reference; make it again") from error
    return bundle


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(path).items()}


def check_consistent(bundle: Bundle) -> None:
    """Raises ValueError, or whatever numpy does, unless the parts of a bundle that was read fit together."""
    for vectors, path in (bundle.vectors, bundle.path), (bundle.validation_vectors, bundle.validation_path):
        if vectors.dtype != np.float32 or vectors.shape != (len(path), bundle.adapter.dim) or path.dtype != np.int64:
            raise ValueError("cells do not fit the adapter")
        if not usable(vectors).all() or not ((path >= 0) & (path < len(bundle.tree.paths))).all():
            raise ValueError("cells are not finite, or on no path")
    if not len(bundle.path) or not len(bundle.validation_path) or (bundle.counts < 0).any():
        raise ValueError("no cells")
    if not all(isinstance(label, str) for names in bundle.tree.paths for label in names):
        raise ValueError("labels are missing")
    probability = bundle.calibration.probability(np.zeros((1, len(bundle.levels))))
    p_value = bundle.calibration.p_value(bundle.calibration.score(np.zeros((1, len(SIGNALS)))))
    if not (np.isfinite(probability).all() and np.isfinite(p_value).all()):
        raise ValueError("the calibration holds something else than numbers")
    model_card(bundle.facts, VERSION)  # fails where a fact is missing that saving it again takes


def load_adapter(path: Place, device: torch.device | str = "cpu") -> tuple[Adapter, dict[str, Any]]:
    """A checkpoint of train.py, or a reference's folder -> the adapter, and what the checkpoint says beside it.

    Raises InputError for anything else.
    """
    if path.is_dir():
        bundle = read_bundle(path, device)
        return bundle.adapter, bundle.facts
    return checkpoints.load(path, device)


def check_terms(bundle: Bundle, graph: nx.DiGraph, path: Path, obo: object) -> None:
    """Raises InputError if the ontology lacks terms of the bundle."""
    missing = sorted(set(bundle.cl_ids.flat) - {""} - set(MANUAL.values()) - set(graph))
    if missing:
        raise InputError(
            f"{obo}: CL {graph.graph['release']} lacks {len(missing)} terms of {path}, such as {missing[0]}; "
            f"give the release that it was made with, {bundle.facts.get('cl_release', 'unknown')}, with --obo"
        )


def choose_paths(bundle: Bundle, graph: nx.DiGraph, only: list[str], exclude: list[str]) -> np.ndarray | None:
    """(paths,) bool: types at or below a term of `only` (all, if none is named), and below none of `exclude`.

    None without constraints. Raises InputError for a term that CL does not have.
    """
    if not only and not exclude:
        return None
    if unknown := [term for term in [*only, *exclude] if term not in graph]:
        raise InputError(f"{unknown[0]}: not a term of CL {graph.graph['release']}; write it as CL:0000084")

    def at_or_below(terms: list[str]) -> np.ndarray:
        found = set(terms).union(*(nx.ancestors(graph, term) for term in terms))  # edges run child -> parent
        return np.isin(bundle.cl_ids[:, -1], sorted(found))

    return (at_or_below(only) if only else np.ones(len(bundle.tree.paths), bool)) & ~at_or_below(exclude)
