"""A trained adapter -> a reference in one folder, which is all that annotate.py takes.

    fractal reference --model-path data/fractal_adapter_4L.pt --output data/reference

The reference cells are the first training rows of the stratified file, so types are as balanced as their sizes allow.
The validation rows, which the adapter was not fitted on, turn votes into probabilities; the test rows, which nothing
has seen, say how far these can be trusted.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import numpy as np

from fractal.adapter import Adapter, load, pick_device
from fractal.atlas import LEVELS, fingerprint, open_atlas, path_counts, read_rows
from fractal.cli import InputError, positive_int, run, table
from fractal.ontology import CL_SLIM, build_hierarchy, level_terms, load_graph
from fractal.reference.annotator import Annotator, Calibration, Tree, answer, calibrate, calibration_error, reliability
from fractal.reference.bundle import VERSION, Bundle, check_place, path_codes, write_bundle
from fractal.split import Split

MIN_VALIDATION = 100  # cells: with fewer, probabilities would be guesses
TEST_CELLS = 5_000  # for the report; a standard error of .004 at an accuracy of .9


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-path",
        type=Path,
        default=Path("data/fractal_adapter_4L.pt"),
        help="checkpoint of train.py (default: %(default)s)",
    )
    parser.add_argument(
        "--input",
        type=Path,
        default=Path("data/stratified.parquet"),
        help="the Parquet file that it was trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--reference-cells",
        type=positive_int,
        default=50_000,
        help="how many training cells to keep, 512 bytes each at 128-d (default: %(default)s)",
    )
    parser.add_argument(
        "--obo", default=CL_SLIM, help="Cell Ontology that ingest.py used, a path or a URL (default: the shipped one)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/reference"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="auto takes CUDA, else MPS, else the CPU (default: %(default)s)",
    )
    return parser


def fit(
    adapter: Adapter, split: Split, path: Path, reference_cells: int
) -> tuple[Annotator, Calibration, np.ndarray, np.ndarray]:
    """-> the annotator, its calibration, the reference's vectors (m, dim) and paths (m,)."""
    train_rows, val_rows, _ = split.rows(path)
    if len(val_rows) < MIN_VALIDATION:
        raise InputError(
            f"{path}: {len(val_rows)} validation cells are too few to calibrate on, it takes {MIN_VALIDATION}; "
            "train with a larger --val-ratio"
        )
    train_rows = train_rows[:reference_cells]
    cells = read_rows(path, np.concatenate([train_rows, val_rows]))
    tree = Tree.of(sorted({tuple(cells.classes[k][c] for k, c in enumerate(row)) for row in cells.labels.tolist()}))
    codes = path_codes(cells.labels, cells.classes, tree, path)
    m = len(train_rows)
    annotator = Annotator(adapter, cells.vectors[:m], codes[:m], tree)
    weight = natural_weight(codes[m:], tree, split, path)
    calibration = calibrate(annotator(cells.vectors[m:]), codes[m:], tree, weight)
    return annotator, calibration, cells.vectors[:m], codes[:m]


def natural_weight(codes: np.ndarray, tree: Tree, split: Split, path: Path) -> np.ndarray:
    """Weights (n,) that make validation cells with these paths (n,), balanced over subtypes, count as the file's mix.

    As that of its cells that are no test cells: how common those are is not known beforehand.
    """
    counts = path_counts(path, ~split.is_test(path))
    natural = np.array([counts[names] for names in tree.paths])
    return (natural / np.maximum(np.bincount(codes, minlength=len(natural)), 1))[codes]


def report(annotator: Annotator, calibration: Calibration, split: Split, path: Path) -> dict[str, Any]:
    """How good the answers are on test cells: per level accuracy, coverage, calibration error and its curve."""
    rows = np.sort(np.random.default_rng(split.seed).permutation(split.rows(path)[2])[:TEST_CELLS])
    if not len(rows):
        return {"cells": 0}
    cells = read_rows(path, rows)
    found = answer(annotator(cells.vectors), calibration)
    names = np.array(annotator.tree.paths, object)[found.path]  # by name: a test type may be missing in the tree
    true = np.array([[cells.classes[k][c] for k, c in enumerate(row)] for row in cells.labels.tolist()], object)
    right = names == true
    levels = {}
    for k, level in enumerate(LEVELS):
        reached = found.depth > k
        levels[level] = {
            "coverage": float(reached.mean()),
            "accuracy": float(right[reached, k].mean()) if reached.any() else None,
            "accuracy_forced": float(right[:, k].mean()),
            "calibration_error": calibration_error(found.probability[:, k], right[:, k]),
            "reliability": reliability(found.probability[:, k], right[:, k]),
        }
    return {"cells": len(rows), "flagged": float(found.unlike.mean()), "levels": levels}


def report_table(scores: dict[str, Any]) -> str:
    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    keys = ("coverage", "accuracy", "accuracy_forced", "calibration_error")
    rows = [[level, *(show(found[key]) for key in keys)] for level, found in scores["levels"].items()]
    return table(["Level", "Answered", "Accuracy", "If all were answered", "ECE"], rows)


def model_card(facts: dict[str, Any]) -> str:
    scores = facts["scores"]
    measured = "There were no test cells, so nothing is known of its quality.\n"
    if scores["cells"]:
        measured = (
            f"On {scores['cells']:,} test cells that neither training nor calibration has seen, at confidence 0.8 "
            f"({scores['flagged']:.1%} are flagged as unlike the reference):\n\n{report_table(scores)}\n\n"
            "ECE: expected calibration error, 15 bins of equal size; bundle.json holds the reliability curves.\n"
        )
    return f"""# Reference for annotating cells

An adapter of Fractal Cells (recipe {facts["recipe"]}) and {facts["reference_cells"]:,} reference cells of
{len(facts["classes"][-1])} subtypes, with {facts["config"]["dim"]} numbers each. Labels follow the Cell Ontology,
release {facts["cl_release"]} (CC-BY 4.0).

    fractal annotate --reference THIS_FOLDER --input cells.npy --output cells.tsv

{measured}
Cells must come as vectors of the same embedding, made in the same way, as those of {facts["source"]}. Probabilities
hold for cells like the test cells: other tissues, assays or a different mix of types shift them. A type that the
reference lacks is only sometimes recognised as unlike it.

Made from {facts["data"]} (sha256 {facts["split"]["fingerprint"]}), seed {facts["split"]["seed"]}, with
{", ".join(f"{name} {version}" for name, version in facts["versions"].items())}; bundle format {VERSION}.
"""


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    adapter, checkpoint = load(args.model_path, pick_device(args.device))
    file = open_atlas(args.input)
    split = Split.of(checkpoint, args.model_path)
    if fingerprint(args.input) != split.fingerprint:
        raise InputError(f"{args.input}: not the file that {args.model_path} was trained on; name that one")
    check_place(args.output)
    graph = load_graph(args.obo)
    annotator, calibration, vectors, path = fit(adapter, split, args.input, args.reference_cells)
    tree = annotator.tree
    hierarchy = build_hierarchy([names[-1] for names in tree.paths], graph, "other")
    if other := [row.subtype for row, names in zip(hierarchy, tree.paths, strict=True) if row.levels != names]:
        raise InputError(f"{args.input}: places '{other[0]}' otherwise than {args.obo}; give ingest.py's --obo")

    metadata = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
    facts = {
        "config": checkpoint["config"],
        "classes": checkpoint["classes"],
        "recipe": checkpoint["config"]["recipe"],
        "reference_cells": len(path),
        "cl_release": graph.graph["release"],
        "data": args.input.name,
        "source": Path(metadata.get("source", "unknown")).name,
        "split": checkpoint["split"],
        "training": checkpoint["training"],
        "validation": checkpoint["validation"],
        "versions": {**checkpoint["versions"], "numpy": np.__version__, "python": platform.python_version()},
        "scores": report(annotator, calibration, split, args.input),
    }
    cl_ids = np.array([level_terms(row, graph) for row in hierarchy])
    bundle = Bundle(adapter, tree, cl_ids, vectors, path, calibration, facts)
    write_bundle(args.output, bundle, model_card(facts))
    print(f"{len(path):,} reference cells of {len(tree.paths)} subtypes, CL {graph.graph['release']}: {args.output}\n")
    if facts["scores"]["cells"]:
        print(f"{facts['scores']['cells']:,} test cells, {facts['scores']['flagged']:.1%} flagged as unlike it\n")
        print(report_table(facts["scores"]))


if __name__ == "__main__":
    run(main)
