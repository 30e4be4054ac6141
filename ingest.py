"""Step 1: a SCimilarity release -> Parquet, each cell with its four levels of the Cell Ontology.

    uv run python ingest.py --model-dir data/models/scimilarity/model_v1.1
    uv run python ingest.py --h5ad cells.h5ad --obsm X_pca --label-key cell_type   # or your own cells

Writes the cells in the order of the release and, beside them, hierarchy.tsv: one row per cell type with its CL id,
its four levels and the path that placed it.
"""

import argparse
import csv
import hashlib
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fractal.atlas import LEVELS, writing
from fractal.cli import run, table
from fractal.files import atomic_write, check_output
from fractal.labelled import LabelledCells, open_labelled
from fractal.ontology import (
    CL_SLIM,
    LINEAGE_ANCHORS,
    STEM_ANCHOR,
    SYSTEM_ANCHORS,
    CellType,
    build_hierarchy,
    load_graph,
)
from fractal.prefetch import prefetch
from fractal.scimilarity import Release, open_release


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = parser.add_argument_group("your own labelled cells, in place of --model-dir")
    own.add_argument(
        "--h5ad", type=Path, help="an .h5ad file with an embedding and labels; cells without one are left out"
    )
    own.add_argument("--obsm", default="X_scimilarity", help="key of the embedding in its obsm (default: %(default)s)")
    own.add_argument("--label-key", default="cell_type", help="column of obs, the type names (default: %(default)s)")
    own.add_argument("--study-key", help="column of obs, the studies or donors (default: none)")
    own.add_argument(
        "--label-map",
        type=Path,
        metavar="TSV",
        help="renames labels: own name<TAB>CL name on each line, no header; an empty CL name leaves its cells out",
    )
    parser.add_argument(
        "--model-dir",
        type=Path,
        default=Path("data/models/scimilarity/model_v1.1"),
        help="the model_v1.1 folder of a release; annotation/ and label_ints.csv are read (default: %(default)s)",
    )
    parser.add_argument(
        "--obo", default=CL_SLIM, help="Cell Ontology as OBO, a path or a URL (default: the shipped CL 2025-07-30)"
    )
    parser.add_argument(
        "--unmapped",
        choices=["error", "other"],
        default="error",
        help="type names that CL does not know: stop and list them, or file them under Other (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("data/scimilarity_embeddings.parquet"),
        help="Parquet file to write; hierarchy.tsv goes into the same folder (default: %(default)s)",
    )
    return parser


def write_hierarchy(path: Path, rows: list[CellType]) -> None:
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["cl_id", *LEVELS, "path"])
        writer.writerows([row.cl_id, *row.levels, row.path] for row in rows)


def write_cells(path: Path, release: Release | LabelledCells, rows: list[CellType], metadata: dict[str, str]) -> None:
    # Per level: the names, and for each type the code of its name.
    levels = [np.unique([row.levels[k] for row in rows], return_inverse=True) for k in range(len(LEVELS))]
    names = [list(map(str, values)) for values, _ in levels]
    with (
        writing(path, release.dim, release.study_codes is not None, metadata) as writer,
        tqdm(total=len(release), unit="cells", unit_scale=True, desc="ingest") as bar,
    ):
        for chunk, vectors in prefetch(release.chunks(scratch=path.parent)):
            types = release.type_codes[chunk]
            columns = [(codes[types], level) for (_, codes), level in zip(levels, names, strict=True)]
            if release.study_codes is not None:
                columns.append((release.study_codes[chunk], release.studies))
            writer.append(vectors, columns)
            bar.update(len(vectors))


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_output(args.output, args.h5ad, args.label_map)
    opened: AbstractContextManager[Release | LabelledCells]
    if args.h5ad is None:
        opened = nullcontext(open_release(args.model_dir))
    else:
        opened = open_labelled(args.h5ad, args.obsm, args.label_key, args.study_key, args.label_map)
    with opened as release:
        ingest(release, args)


def ingest(release: Release | LabelledCells, args: argparse.Namespace) -> None:
    graph = load_graph(args.obo)
    rows = build_hierarchy(release.types, graph, args.unmapped)

    print(f"Cell Ontology release {graph.graph['release']} ({args.obo})")
    matched = Counter(row.matched for row in rows)
    print(
        f"{len(rows)} type names: {matched['name'] + matched['synonym']} matched automatically ({matched['name']} by "
        f"name, {matched['synonym']} by synonym), {matched['manual']} by hand, {matched['unmapped']} unmapped"
    )
    counts = [len({row.levels[k] for row in rows}) for k in range(len(LEVELS))]
    print("categories: " + ", ".join(f"{n} {level}" for n, level in zip(counts, LEVELS, strict=True)))

    anchors = repr((SYSTEM_ANCHORS, STEM_ANCHOR, LINEAGE_ANCHORS)).encode()
    metadata = {
        "cl_release": graph.graph["release"],
        "anchors_sha256": hashlib.sha256(anchors).hexdigest(),
        "source": str(args.h5ad or args.model_dir),
    }
    write_cells(args.output, release, rows, metadata)
    write_hierarchy(args.output.with_name("hierarchy.tsv"), rows)

    cells = Counter[str]()
    for row, count in zip(rows, np.bincount(release.type_codes, minlength=len(rows)).tolist(), strict=True):
        cells[row.system] += count
    print(f"\n{len(release):,} cells, {release.dim} numbers each, written to {args.output}\n")
    shares = [[system, f"{n:,}", f"{100 * n / len(release):.1f}"] for system, n in cells.most_common() if n]
    print(table(["System", "Cells", "%"], shares))


if __name__ == "__main__":
    run(main)
