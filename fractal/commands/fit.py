"""Labelled cells -> a reference in one folder, which is all that `fractal annotate` and `fractal embed` take.

    fractal fit cells.h5ad --labels cell_type --use-rep X_scVI --study donor_id --output blood_reference

In one go what ingest.py, stratify.py, train.py and `fractal reference` do: find the labels in the Cell Ontology, set
cells aside, train on the others, learn from the ones set aside how far answers can be trusted, and print how good they
are. With --study, whole studies (or donors) are set aside where that takes no type away from training.

    fractal fit a.h5ad b.h5ad --labels cell_type --use-rep X_scVI --study donor_id --output blood.zip
    fractal fit more.h5ad --update blood.zip --labels cell_type --study donor_id --output blood2.zip

Several files count as one. --update adds their cells to those that a reference keeps, and fits anew.
"""

import argparse
from pathlib import Path

from fractal.base.errors import InputError
from fractal.base.paths import check_paths
from fractal.base.storage import locate, locate_shared
from fractal.commands.options import add, check_reference_output, command, positive_int


def get_parser() -> argparse.ArgumentParser:
    parser = command("fit", __doc__)
    files = parser.add_argument_group("files")
    text = ".h5ad or .zarr, each with one vector per cell in obsm, and labels in obs"
    files.add_argument("input", type=locate, nargs="+", help=text)
    target = files.add_mutually_exclusive_group(required=True)
    add(target, "--output", type=Path, help="folder or .zip to write; only a reference is replaced")
    add(target, "--write-label-map")
    vectors = files.add_mutually_exclusive_group(required=True)
    add(vectors, "--use-rep", help="key of the vectors in obsm, such as X_scVI, X_pca, X_scimilarity")
    add(
        vectors, "--model", help="folder model_v1.1 of SCimilarity's release: its encoder makes the vectors from counts"
    )
    vectors.add_argument("--update", type=locate_shared, metavar="REFERENCE", help="add the cells to those it keeps")
    add(files, "--study")
    labels = parser.add_argument_group("labels")
    add(labels.add_mutually_exclusive_group(required=True), "--labels", "--levels")
    add(labels, "--label-map", "--unmapped", "--hierarchy", "--tree")
    labels.add_argument(
        "--vague", nargs="+", default=[], metavar="LABEL", help="leave its cells out: other studies divide this label"
    )
    text = "keep its cells (default: fit finds out, and says so)"
    labels.add_argument("--not-vague", nargs="+", default=[], metavar="LABEL", help=text)
    training = parser.add_argument_group("training")
    add(training, "--recipe")
    training.add_argument(
        "--max-cells",
        type=positive_int,
        default=100_000,
        help="cells to train and calibrate on, balanced over the subtypes (default: %(default)s)",
    )
    add(training, "--epochs", "--seed", "--device")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.write_label_map:
        propose_labels(args, parser)
        return
    from fractal.fitting import fit

    inputs = {"input": args.input, "--update": args.update, "--label-map": args.label_map}
    check_reference_output({**inputs, "--hierarchy": args.hierarchy}, args.output)  # before minutes of work
    of_command = ("input", "output", "write_label_map")
    options = {name: value for name, value in vars(args).items() if name not in of_command}
    reference = fit(args.input, **options)
    reference.save(args.output)
    print(f"{reference}\n\nwritten to {args.output}")


def propose_labels(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the template of --write-label-map. Raises InputError for flags that would have no effect beside it."""
    from fractal.data.encoder import read_encoder
    from fractal.fitting import open_labelled
    from fractal.hierarchy.ontology import CL_SLIM, load_graph, write_label_map

    used = ("input", "write_label_map", "use_rep", "model", "labels")
    others = [name for name, value in vars(args).items() if name not in used and value != parser.get_default(name)]
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise InputError(f"--write-label-map: takes --labels and --use-rep only; leave out {flags}")
    check_paths({"input": args.input}, {"--write-label-map": args.write_label_map})
    encoder = read_encoder(args.model) if args.model else None
    with open_labelled(args.input, args.use_rep, encoder) as cells:
        labels = cells.labels(args.labels)
    print(write_label_map(args.write_label_map, labels.names, labels.codes, load_graph(CL_SLIM)))
