"""Step 1: a SCimilarity release -> Parquet, each cell with its four levels of the Cell Ontology.

    uv run python ingest.py --model-dir data/models/scimilarity/model_v1.1
    uv run python ingest.py --h5ad cells.h5ad --obsm X_pca --label-key cell_type   # or your own cells
    uv run python ingest.py --h5ad cells.h5ad --obsm X_scVI --levels class subclass cluster   # and your own tree

Writes the cells in the order of the release and, beside them, the hierarchy (cells.parquet -> cells.hierarchy.tsv):
one row per cell type with its CL id, its levels and the path that placed it. Labels may be names, other spellings of
them ("B cells", "NK") or CL ids. Cells without a label are left out and counted.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import networkx as nx
import numpy as np

from fractal.base.errors import InputError, run
from fractal.base.paths import check_paths
from fractal.base.storage import Location, locate, scratch
from fractal.base.table import table
from fractal.commands.options import add
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.data.ingestion import Plan, order_warning, place_cells, write_atlas
from fractal.data.labels import Labels, read_map
from fractal.data.parquet import in_parts
from fractal.data.scimilarity import open_release
from fractal.hierarchy.ontology import CL_SLIM, Hierarchy, load_graph, write_hierarchy, write_label_map

MODEL_DIR = Path("data/models/scimilarity/model_v1.1")
OUTPUT = Path("data/scimilarity_embeddings.parquet")
OBSM, LABEL_KEY = "X_scimilarity", "cell_type"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-dir",
        type=locate,
        help=f"the model_v1.1 folder of a release; annotation/ and label_ints.csv are read (default: {MODEL_DIR})",
    )
    cells = parser.add_argument_group("your own labelled cells, in place of --model-dir")
    cells.add_argument("--h5ad", type=locate, help="an .h5ad file, or a .zarr, with an embedding and labels")
    cells.add_argument(
        "--obsm", "--use-rep", help=f"key of the embedding in its obsm, or X for its X (default: {OBSM})"
    )
    cells.add_argument("--label-key", help=f"column of obs, the type names or CL ids (default: {LABEL_KEY})")
    cells.add_argument("--study-key", help="column of obs, the studies or donors (default: none)")
    add(cells, "--levels")
    labels = parser.add_argument_group("labels and hierarchy")
    add(labels, "--label-map", "--write-label-map", "--hierarchy")
    add(labels, "--tree", "--unmapped", default=None)  # so that one that is given is known
    add(labels, "--obo", default=CL_SLIM)
    text = "Parquet file to write, or folder/part-{}.parquet for many (default: %(default)s)"
    add(parser, "--output", default=OUTPUT, help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    refuse_ignored(args)
    check_paths(
        {"--model-dir": None if args.h5ad else args.model_dir or MODEL_DIR, "--h5ad": args.h5ad, "--obo": args.obo,
         "--label-map": args.label_map, "--hierarchy": args.hierarchy},
        {"--write-label-map": args.write_label_map} if args.write_label_map
        else {"--output": args.output, "the hierarchy of --output": hierarchy_path(args.output)},
    )  # fmt: skip
    label_map = read_map(args.label_map) if args.label_map else None
    graph = load_graph(args.obo)
    with open_cells(args, label_map) as (cells, labels):
        if args.write_label_map:
            print(write_label_map(args.write_label_map, labels.names, labels.codes, graph))
            return
        source = args.h5ad or args.model_dir or MODEL_DIR
        plan = place_cells(labels, graph, source, args.hierarchy, args.unmapped, args.tree)
        report_hierarchy(plan.hierarchy, graph, args)
        write_atlas(args.output, cells, plan, "ingest")
        write_hierarchy(hierarchy_path(args.output), plan.hierarchy.levels, plan.hierarchy.classes)
    report_cells(args.output, cells.dim, plan)


def refuse_ignored(args: argparse.Namespace) -> None:
    """Raise InputError for a flag that would have no effect beside another one."""
    rivals = {
        "--model-dir": ("--h5ad", "--obsm", "--label-key", "--study-key", "--levels"),
        "--levels": ("--label-key", "--label-map", "--write-label-map", "--hierarchy", "--unmapped", "--tree"),
        "--hierarchy": ("--unmapped", "--tree"),
        "--write-label-map": ("--label-map", "--hierarchy", "--unmapped", "--tree"),
    }
    given = {flag for flag in sum(rivals.values(), tuple(rivals)) if getattr(args, flag[2:].replace("-", "_"))}
    if "--h5ad" not in given:  # then it is a release, named or not
        given.add("--model-dir")
    for flag, others in rivals.items():
        if flag in given and (ignored := [other for other in others if other in given]):
            which = flag if flag != "--model-dir" or args.model_dir else "a release (there is no --h5ad)"
            raise InputError(f"{', '.join(ignored)}: without effect beside {which}; leave out one or the other")
    if args.output.suffix == ".tsv":
        raise InputError(f"{args.output}: Parquet is written, so the name of --output ends in .parquet")


def hierarchy_path(output: Location) -> Location:
    """The design's plain name for the default output; else named after the output, so that two never meet."""
    return output.with_name("hierarchy.tsv" if output == OUTPUT or in_parts(output) else f"{output.stem}.hierarchy.tsv")


@contextmanager
def open_cells(args: argparse.Namespace, label_map: Mapping[str, str] | None) -> Iterator[tuple[Cells, Labels]]:
    if args.h5ad:
        with Cells.open(args.h5ad, args.obsm or OBSM) as cells:
            yield cells, cells.labels(args.label_key or LABEL_KEY, args.study_key, label_map, args.levels)
    else:
        release = open_release(args.model_dir or MODEL_DIR)
        labels = release.labels if label_map is None else release.labels.mapped(label_map, args.label_map)
        yield release.cells(scratch(args.output)), labels


def report_hierarchy(hierarchy: Hierarchy, graph: nx.DiGraph, args: argparse.Namespace) -> None:
    print(f"Cell Ontology release {graph.graph['release']} ({args.obo})")
    how = Counter(row.matched for row in hierarchy.rows)
    if how["table"]:
        print(f"{how['table']} types, placed by {args.hierarchy or 'the columns ' + ', '.join(args.levels)}")
    else:
        ways = {"name": "name", "synonym": "synonym", "id": "CL id", "spelling": "spelling", "replaced": "replacement"}
        parts = [f"{how[key]} by {way}" for key, way in ways.items() if how[key] or key in ("name", "synonym")]
        print(
            f"{how.total()} type names: {sum(how[key] for key in ways)} matched automatically ({', '.join(parts)}), "
            f"{how['manual']} by hand, {how['unmapped']} unmapped"
        )
    counts = [len({row.levels[k] for row in hierarchy.classes}) for k in range(len(hierarchy.levels))]
    print("categories: " + ", ".join(f"{n} {level}" for n, level in zip(counts, hierarchy.levels, strict=True)))
    for note in hierarchy.notes:
        print(note)


def report_cells(output: Location, dim: int, plan: Plan) -> None:
    cells, classes = Counter[str](), plan.hierarchy.classes
    sizes = np.bincount(plan.classes[plan.classes >= 0], minlength=len(classes))
    for row, count in zip(classes, sizes.tolist(), strict=True):
        cells[row.levels[0]] += count
    atlas = Atlas.open(output.parent if in_parts(output) else output)
    n = cells.total()
    if copies := atlas.num_copies:
        print(f"{copies:,} cells are exact copies of another one's vector; a split keeps copies on one side")
    if warning := order_warning(atlas):
        print(warning)
    print(f"\n{n:,} cells, {dim} numbers each, written to {output}\n")
    shares = [[label, f"{count:,}", f"{100 * count / n:.1f}"] for label, count in cells.most_common() if count]
    print(table([plan.hierarchy.levels[0].capitalize(), "Cells", "%"], shares))


if __name__ == "__main__":
    run(main)
