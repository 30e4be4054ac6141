"""A reference in one folder: all that annotating takes, and where it comes from.

    adapter.safetensors   weights of the adapter
    reference.parquet     reference cells in the format of fractal.atlas, their vectors as they went in
    hierarchy.tsv         the paths: four names and their four CL ids
    calibration.json      what held-out cells taught (fractal.annotate.Calibration)
    bundle.json           format version, the adapter's config, sha256 of the files above, provenance
    README.md             the model card

The full fractal vectors are not kept: the adapter makes 100,000 in a second or two.
"""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from safetensors.torch import load_file, save

from fractal.adapter import Adapter, build_adapter, check_sizes
from fractal.atlas import LEVELS, ROW_GROUP, fingerprint, open_atlas, read_rows, writing
from fractal.cli import InputError
from fractal.files import atomic_folder
from fractal.ontology import MANUAL
from fractal.reference.annotator import Annotator, Calibration, Tree

VERSION = 2  # 1: typicality by distance, before the adapter's logits were asked
FILES = ("adapter.safetensors", "reference.parquet", "hierarchy.tsv", "calibration.json")
ID_COLUMNS = tuple(f"{level}_cl_id" for level in LEVELS)


@dataclass(frozen=True)
class Bundle:
    adapter: Adapter
    tree: Tree
    cl_ids: np.ndarray  # (paths, 4) str, "" where a label is no CL term
    vectors: np.ndarray  # (m, dim) float32
    path: np.ndarray  # (m,) int64, of the reference cells
    calibration: Calibration
    facts: dict[str, Any]  # bundle.json

    def annotator(self, keep: np.ndarray | None = None) -> Annotator:
        """With all reference cells, or with those whose path is in the mask `keep` (paths,)."""
        rows = slice(None) if keep is None else keep[self.path]
        return Annotator(self.adapter, self.vectors[rows], self.path[rows], self.tree)


def check_place(path: Path) -> None:
    """Raises InputError for an output that is there and no bundle: only a bundle is replaced."""
    if path.exists() and not (path / "bundle.json").is_file():
        raise InputError(f"{path}: is there, and no bundle; name another --output")


def write_bundle(path: Path, bundle: Bundle, card: str) -> None:
    """Write all files; `facts` are completed with the version and the hashes."""
    check_place(path)
    with atomic_folder(path, [*FILES, "bundle.json", "README.md"]) as part:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in bundle.adapter.state_dict().items()}
        (part / "adapter.safetensors").write_bytes(save(state))  # save_file makes files that only their owner reads
        names = [sorted({p[k] for p in bundle.tree.paths}) for k in range(len(LEVELS))]
        codes = np.array([[level.index(p[k]) for k, level in enumerate(names)] for p in bundle.tree.paths])
        with writing(part / "reference.parquet", bundle.vectors.shape[1], False, {}) as writer:
            for start in range(0, len(bundle.path), ROW_GROUP):
                rows = slice(start, start + ROW_GROUP)
                columns = zip(codes[bundle.path[rows]].T, names, strict=True)
                writer.append(bundle.vectors[rows], list(columns))
        with open(part / "hierarchy.tsv", "w", newline="", encoding="utf-8") as file:
            rows_out = csv.writer(file, delimiter="\t", lineterminator="\n")
            rows_out.writerow([*LEVELS, *ID_COLUMNS])
            rows_out.writerows([*p, *ids] for p, ids in zip(bundle.tree.paths, bundle.cl_ids.tolist(), strict=True))
        (part / "calibration.json").write_text(json.dumps(asdict(bundle.calibration)) + "\n", encoding="utf-8")
        facts = {"version": VERSION, **bundle.facts, "sha256": {name: fingerprint(part / name) for name in FILES}}
        (part / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(card, encoding="utf-8")


def read_bundle(path: Path, device: torch.device | str = "cpu") -> Bundle:
    """Raises InputError for a folder that is no bundle, is of another version, or whose files were changed."""
    try:
        facts = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
        version, hashes = facts.get("version"), dict(facts.get("sha256", {}))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a bundle (bundle.json cannot be read); make one with bundle.py") from error
    if version != VERSION:
        raise InputError(f"{path}: a bundle of version {version}, this reads {VERSION}; make it again")
    for name in FILES:
        if not (path / name).is_file() or fingerprint(path / name) != hashes.get(name):
            raise InputError(f"{path / name}: missing, or not the file that the bundle was made with; make it again")
    reference = path / "reference.parquet"
    try:
        state = load_file(path / "adapter.safetensors")
        check_sizes(facts["config"], state)
        adapter = build_adapter(facts["config"], facts["classes"])
        adapter.load_state_dict(state)
        with open(path / "hierarchy.tsv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        tree = Tree.of([tuple(row[level] for level in LEVELS) for row in rows])
        cl_ids = np.array([[row[column] for column in ID_COLUMNS] for row in rows])
        calibration = Calibration(**json.loads((path / "calibration.json").read_text(encoding="utf-8")))
        calibration.probability(np.zeros((1, len(LEVELS))))  # both fail if it holds something else than numbers
        calibration.typicality(np.zeros(1), np.zeros(1))
        cells = read_rows(reference, np.arange(open_atlas(reference).metadata.num_rows))
    except InputError:
        raise
    except Exception as error:  # whatever damaged files make torch, json and numpy raise
        raise InputError(f"{path}: a damaged bundle; make it again with bundle.py") from error
    codes = path_codes(cells.labels, cells.classes, tree, reference)
    return Bundle(adapter.to(device).eval(), tree, cl_ids, cells.vectors, codes, calibration, facts)


def path_codes(labels: np.ndarray, classes: list[list[str]], tree: Tree, path: Path) -> np.ndarray:
    """Labels (n, 4) as in fractal.atlas.Cells -> (n,) int64, the number of each row's path in the tree."""
    position = {names: i for i, names in enumerate(tree.paths)}
    used, row = np.unique(labels, axis=0, return_inverse=True)
    named = [tuple(classes[k][code] for k, code in enumerate(codes)) for codes in used.tolist()]
    if unknown := [names for names in named if names not in position]:
        raise InputError(f"{path}: '{unknown[0][-1]}' lies on a path that the hierarchy does not have")
    return np.array([position[names] for names in named])[row.reshape(-1)]


def check_terms(bundle: Bundle, graph: nx.DiGraph, path: Path, obo: object) -> None:
    """Raises InputError if the ontology lacks terms of the bundle."""
    missing = sorted(set(bundle.cl_ids.flat) - {""} - set(MANUAL.values()) - set(graph))
    if missing:
        raise InputError(
            f"{obo}: CL {graph.graph['release']} lacks {len(missing)} terms of {path}, such as {missing[0]}; "
            f"give the release that it was made with, {bundle.facts['cl_release']}, with --obo"
        )


def choose_paths(bundle: Bundle, graph: nx.DiGraph, only: list[str], exclude: list[str]) -> np.ndarray | None:
    """(paths,) bool: subtypes at or below a term of `only` (all, if none is named), and below none of `exclude`.

    None without constraints. Raises InputError for a term that CL does not have, or if nothing is left.
    """
    if not only and not exclude:
        return None
    if unknown := [term for term in [*only, *exclude] if term not in graph]:
        raise InputError(f"{unknown[0]}: not a term of CL {graph.graph['release']}; write it as CL:0000084")

    def at_or_below(terms: list[str]) -> np.ndarray:
        found = set(terms).union(*(nx.ancestors(graph, term) for term in terms))  # edges run child -> parent
        return np.isin(bundle.cl_ids[:, -1], sorted(found))

    keep = (at_or_below(only) if only else np.ones(len(bundle.tree.paths), bool)) & ~at_or_below(exclude)
    if not keep[bundle.path].any():
        raise InputError("--only and --exclude leave no reference cell; name broader terms")
    return keep
