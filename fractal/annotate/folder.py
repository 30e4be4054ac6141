"""The folder of a reference:

    adapter.safetensors   weights of the adapter
    cells.safetensors     reference cells: their vectors as they went in, their rows of hierarchy.tsv, codes of studies
    held_out.safetensors  cells, and what was said of them without them (fractal.annotate.calibration.HeldOut)
    hierarchy.tsv         the paths: a name and a CL id per level, and how many cells of the training file lie on each
    projection.safetensors   only of a PCA: what projects new cells (fractal.annotate.projection)
    maps.safetensors      only after `fractal map`: layouts of the cells (fractal.view.maps), with a hash of its own
    raw_map.safetensors   only after `fractal explore`: the same of the vectors as they came
    bundle.json           format version, the adapter's config, sha256 of the files above, provenance
    README.md             the model card

The same files in one .zip are a reference as well (fractal.base.archive).

The full fractal vectors are not kept: the adapter makes 100,000 in a second or two. Nor is the calibration: it is made
of the held-out cells, also for those who ask for a few types only.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save

from fractal.annotate.annotator import Annotator
from fractal.annotate.calibration import HeldOut
from fractal.annotate.card import model_card
from fractal.annotate.projection import Projection
from fractal.annotate.votes import SIGNALS
from fractal.base import archive
from fractal.base.errors import InputError
from fractal.base.files import atomic_folder, check_header, read_whole, recover
from fractal.base.storage import Location, fetch
from fractal.data.encoder import EncoderLink
from fractal.data.parquet import fingerprint
from fractal.data.vectors import usable
from fractal.hierarchy.tree import Tree
from fractal.model import checkpoint as checkpoints
from fractal.model.adapter import pick_device
from fractal.model.embedding import weights

VERSION = 5  # 4: cells that were held out once; 3: two signals of unknown types; 2: no validation cells
FILES = ("adapter.safetensors", "cells.safetensors", "held_out.safetensors", "hierarchy.tsv")
PROJECTION, MAPS, RAW_MAP = "projection.safetensors", "maps.safetensors", "raw_map.safetensors"
# calibration.json and reference.parquet are of older versions
OWN_FILES = (*FILES, PROJECTION, MAPS, RAW_MAP, "bundle.json", "README.md", "calibration.json", "reference.parquet")

Parts = tuple[Annotator, dict[str, Any], Projection | None]  # of a reference; the facts are those of bundle.json


def check_folder(path: Path) -> None:
    """Raises InputError for an output that would lose anything: only a reference's own files are replaced."""
    if not path.exists():
        return
    if archive.is_archive(path):
        if "bundle.json" not in archive.names_in(path):
            raise InputError(f"{path}: is there, and no reference; name another file")
        return
    if not path.is_dir():
        raise InputError(f"{path}: is a file, and the reference is a folder or a .zip; name one of these")
    for name in (MAPS, RAW_MAP):  # of a run of `fractal map` or `explore` that was killed
        recover(path / name)
    there = sorted(file.name for file in path.iterdir())
    if there and "bundle.json" not in there:
        raise InputError(f"{path}: is there, and no reference; name another folder")
    if foreign := sorted(set(there) - set(OWN_FILES)):
        raise InputError(f"{path}: also holds {foreign[0]}, which would be lost; name another folder")


def write_folder(path: Path, parts: Parts) -> None:
    """Write all files, or one .zip of them, whole or not at all; the facts get the version and the hashes."""
    check_folder(path)
    annotator, facts, projection = parts
    cells = {"vectors": annotator.vectors, "path": annotator.path, "study": annotator.study}
    files = {
        "adapter.safetensors": weights(annotator.adapter),
        "cells.safetensors": packed(cells),
        "held_out.safetensors": packed(vars(annotator.held_out)),
        "hierarchy.tsv": tree_table(annotator.tree).to_csv(None, sep="\t", index=False, lineterminator="\n").encode(),
    }
    if projection:
        files[PROJECTION] = packed(projection.arrays())
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["bundle.json"] = (json.dumps({**facts, "version": VERSION, "sha256": hashes}, indent=1) + "\n").encode()
    files["README.md"] = model_card(facts, VERSION).encode()
    if archive.is_archive(path):
        archive.write_archive(path, files)
        return
    with atomic_folder(path, OWN_FILES) as part:
        for name, content in files.items():
            (part / name).write_bytes(content)


def read_parts(location: Location, device_name: str) -> Parts:
    """Of a folder or a .zip, here or at a URI; raises InputError as `read_folder` and `archive.unpacked` do."""
    device, path = pick_device(device_name), fetch(location)
    if not archive.is_archive(location):
        return read_whole(path, partial(read_folder, device=device))
    if not path.exists():
        raise InputError(f"{path}: no such file")
    with archive.unpacked(path, OWN_FILES) as folder:
        try:
            return read_folder(folder, device)
        except InputError as error:  # names the temporary folder
            raise InputError(str(error).replace(str(folder), str(location))) from error


def read_folder(path: Path, device: torch.device) -> Parts:
    """Runs no code from it. Raises InputError for no reference, another version, and files that were changed."""
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
        check_header(path / "adapter.safetensors")
        adapter = checkpoints.restore({**facts, "state": load_file(path / "adapter.safetensors")}).to(device).eval()
        cells = unpacked(path / "cells.safetensors")
        held_out = HeldOut(**unpacked(path / "held_out.safetensors"))
        vectors, rows, study = (cells[name] for name in ("vectors", "path", "study"))
        tree = read_tree(path / "hierarchy.tsv", facts["levels"])
        annotator = Annotator(adapter, tree, vectors, rows, study, held_out)
        check_shapes(annotator)
        projection = None
        if facts.get("projection"):
            projection = Projection.of(unpacked(path / PROJECTION), facts["projection"], adapter.dim)
        if "encoder" in facts:
            EncoderLink(**facts["encoder"])
        model_card(facts, VERSION)  # fails where a fact is missing that saving it again takes
    except Exception as error:  # whatever damaged files make torch, json and numpy raise
        raise InputError(f"{path}: a damaged reference; make it again") from error
    return annotator, facts, projection


def tree_table(tree: Tree) -> pd.DataFrame:
    ids = pd.DataFrame(tree.cl_ids, columns=[f"{level}_cl_id" for level in tree.levels])
    return pd.DataFrame(tree.paths, columns=tree.levels).join(ids).assign(cells=tree.counts)


def read_tree(path: Path, levels: list[str]) -> Tree:
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, encoding="utf-8")
    if table.isna().any(axis=None):
        raise ValueError("labels are missing")
    paths = list(table[levels].itertuples(index=False, name=None))
    cl_ids = table[[f"{level}_cl_id" for level in levels]].to_numpy(object)
    return Tree.of(paths, tuple(levels), cl_ids, table["cells"].astype(np.int64).to_numpy())


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """As a safetensors file."""
    return bytes(save({name: torch.tensor(values) for name, values in arrays.items()}))  # copies: they may share memory


def unpacked(path: Path) -> dict[str, np.ndarray]:
    check_header(path)
    return {name: tensor.numpy() for name, tensor in load_file(path).items()}


def check_shapes(annotator: Annotator) -> None:
    """Raises ValueError, or whatever numpy does, unless the parts that were read fit together."""
    tree, held_out, dim = annotator.tree, annotator.held_out, annotator.adapter.dim
    m, (n, k), last = len(annotator.path), held_out.cosine.shape, len(tree.paths) - 1

    def check(values: np.ndarray, shape: tuple[int, ...], dtype: str, low: float, high: float = np.inf) -> None:
        if values.shape != shape or values.dtype != dtype or not ((values >= low) & (values <= high)).all():
            raise ValueError("other shapes, types or values than a reference has")

    check(tree.counts, (last + 1,), "int64", 0)
    for cells, count, least_study in (annotator, m, 0), (held_out, n, -1):
        check(cells.vectors, (count, dim), "float32", -np.inf)
        check(cells.path, (count,), "int64", 0, last)
        check(cells.study, (count,), "int64", least_study)
        if not count or not usable(cells.vectors).all():
            raise ValueError("no cells, or some without a vector")
    largest = float(np.finfo(np.float32).max)
    check(held_out.fold, (n,), "int64", 0)
    check(held_out.weight, (n,), "float32", 1e-30, largest)
    check(held_out.neighbour_path, (n, k), "int32", 0, last)
    check(held_out.cosine, (n, k), "float32", -np.inf, largest)
    check(held_out.cosine[:, :1], (n, 1), "float32", -largest)
    check(held_out.signals, (n, len(SIGNALS)), "float32", -largest, largest)
