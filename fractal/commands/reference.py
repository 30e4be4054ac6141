"""A trained adapter -> a reference in one folder, which is all that `fractal annotate` takes.

    fractal reference --model-path data/fractal_adapter_4L.pt --output data/reference

The reference cells are training rows, as balanced over types as their sizes allow. The validation rows, which the
adapter was not fitted on, turn votes into probabilities; the test rows, which nothing has seen, say how far these can
be trusted.
"""

import argparse
from pathlib import Path

from fractal.base.errors import InputError
from fractal.commands.options import CHECKPOINT, add, check_reference_output, command, positive_int


def get_parser() -> argparse.ArgumentParser:
    parser = command("reference", __doc__)
    add(parser, "--reference", default=CHECKPOINT, help="checkpoint of train.py (default: %(default)s)")
    add(parser, "--input", help="the Parquet file that it was trained on (default: %(default)s)")
    parser.add_argument(
        "--reference-cells",
        type=positive_int,
        default=50_000,
        help="how many training cells to keep, 512 bytes each at 128-d (default: %(default)s)",
    )
    add(parser, "--obo", help="Cell Ontology that ingest.py used, a path or a URL (default: the shipped one)")
    add(parser, "--output", type=Path, default=Path("data/reference"), help="folder or .zip (default: %(default)s)")
    add(parser, "--device")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    import numpy as np

    from fractal.annotate.annotator import Annotator
    from fractal.annotate.card import headline
    from fractal.data.atlas import Atlas
    from fractal.hierarchy.ontology import CL_SLIM, load_graph
    from fractal.model.checkpoint import load
    from fractal.model.split import TEST_CELLS, Split
    from fractal.reference import make_reference
    from fractal.score.answers import answer_table

    args.obo = args.obo or CL_SLIM
    inputs = {"--model-path": args.reference, "--input": args.input, "--obo": args.obo}
    check_reference_output(inputs, args.output)
    adapter, checkpoint = load(args.reference, args.device)
    split = Split.of(checkpoint, args.reference)
    atlas = Atlas.open(args.input)
    if atlas.fingerprint != split.fingerprint:
        raise InputError(f"{args.input}: not the file that {args.reference} was trained on; name that one")
    graph, metadata = load_graph(args.obo), atlas.metadata
    release = metadata.get("cl_release", graph.graph["release"])
    if release != graph.graph["release"]:
        raise InputError(
            f"{args.obo}: CL {graph.graph['release']}, and {args.input} was made with {release}; give that one"
        )
    annotator = Annotator.of_atlas(adapter, atlas, split, args.reference_cells, graph)
    test_rows = np.random.default_rng(split.seed).permutation(split.rows(atlas)[2])[:TEST_CELLS]
    facts = {
        **{name: checkpoint[name] for name in ("split", "training", "validation")},
        "cl_release": release,
        "data": args.input.name,
        "source": Path(metadata.get("source", "unknown")).name,
        "obsm": metadata.get("obsm", ""),
        "versions": checkpoint["versions"],
    }
    test_rows = np.sort(test_rows)
    test = atlas.read(test_rows) if len(test_rows) else None
    studies = atlas.column("study").take(test_rows).to_pylist() if split.test_studies else None
    reference = make_reference(annotator, checkpoint["config"], checkpoint["classes"], test, facts, studies=studies)
    reference.save(args.output)
    about, scores = reference.facts, reference.facts["scores"]
    print(f"{about['reference_cells']:,} reference cells of {about['reference_types']} types: {args.output}\n")
    if scores["cells"]:
        print(f"{headline(about)}\n")
        print(answer_table(scores["levels"]))
