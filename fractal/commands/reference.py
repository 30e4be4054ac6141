"""A trained adapter -> a reference in one folder, which is all that `fractal annotate` takes.

    fractal reference --model-path data/fractal_adapter_4L.pt --output data/reference

The reference cells are training rows, as balanced over types as their sizes allow. The validation rows, which the
adapter was not fitted on, turn votes into probabilities; the test rows, which nothing has seen, say how far these can
be trusted.
"""

import argparse
import platform
from pathlib import Path

from fractal.base.cli import InputError, add_device, positive_int, run
from fractal.base.files import check_paths


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--obo", help="Cell Ontology that ingest.py used, a path or a URL (default: the shipped one)")
    parser.add_argument(
        "--output", type=Path, default=Path("data/reference"), help="folder to write (default: %(default)s)"
    )
    add_device(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    import numpy as np

    from fractal.annotate.bundle import check_place, make_reference, write_bundle
    from fractal.data.atlas import Atlas
    from fractal.hierarchy.ontology import CL_SLIM, load_graph
    from fractal.model.adapter import load, pick_device
    from fractal.model.split import MIN_VALIDATION, TEST_CELLS, Split
    from fractal.score.answers import answer_table

    args.obo = args.obo or CL_SLIM
    inputs = {"--model-path": args.model_path, "--input": args.input, "--obo": args.obo}
    check_paths(inputs, {}, folders={"--output": args.output})
    check_place(args.output)
    adapter, checkpoint = load(args.model_path, pick_device(args.device))
    split = Split.of(checkpoint, args.model_path)
    atlas = Atlas.open(args.input)
    if atlas.fingerprint != split.fingerprint:
        raise InputError(f"{args.input}: not the file that {args.model_path} was trained on; name that one")
    graph = load_graph(args.obo)
    metadata = atlas.metadata
    release = metadata.get("cl_release", graph.graph["release"])
    if release != graph.graph["release"]:
        raise InputError(
            f"{args.obo}: CL {graph.graph['release']}, and {args.input} was made with {release}; give that one"
        )

    train_rows, val_rows, test_rows = split.rows(atlas)
    if len(val_rows) < MIN_VALIDATION:
        raise InputError(
            f"{args.input}: {len(val_rows)} validation cells are too few to calibrate on, it takes {MIN_VALIDATION}; "
            "train with a larger --val-ratio"
        )
    train_rows = atlas.balanced_rows(train_rows, args.reference_cells, split.seed)
    test_rows = np.sort(np.random.default_rng(split.seed).permutation(test_rows)[:TEST_CELLS])
    facts = {
        "cl_release": release,
        "data": args.input.name,
        "source": Path(metadata.get("source", "unknown")).name,
        "obsm": metadata.get("obsm", ""),
        "split": checkpoint["split"],
        "training": checkpoint["training"],
        "validation": checkpoint["validation"],
        "versions": {**checkpoint["versions"], "numpy": np.__version__, "python": platform.python_version()},
    }
    bundle = make_reference(
        adapter,
        checkpoint["config"],
        checkpoint["classes"],
        atlas.read(train_rows),
        atlas.read(val_rows),
        atlas.path_counts(~split.is_test(atlas)),
        atlas.read(test_rows) if len(test_rows) else None,
        facts,
        graph,
    )
    write_bundle(args.output, bundle)
    about = bundle.facts
    print(f"{about['reference_cells']:,} reference cells of {about['reference_types']} types: {args.output}\n")
    if about["scores"]["cells"]:
        print(f"{about['scores']['cells']:,} test cells, {about['scores']['flagged']:.1%} flagged as novel\n")
        print(answer_table(about["scores"]["levels"]))


if __name__ == "__main__":
    run(main)
