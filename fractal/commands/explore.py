"""Cells and a reference -> one HTML page to look at: it opens from disk, without a server, and sends nothing.

    fractal explore cells.h5ad --reference blood_reference --output explorer.html
    fractal explore cells.h5ad --reference blood_reference --labels cell_type --columns donor tissue

The page shows the cells on one map per prefix, aligned, and morphs between them. It finds the neighbours of a cell
under any prefix and in the vectors that came, and labels CSV, Parquet and .npy files that are dropped on it.
Cells are coloured by the labels of the reference, each as deep as it can be trusted, or by those of a column. An atlas
of ingest.py brings its own. docs/explore.md shows what the page can do.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fractal.base.cli import InputError, add_device, add_force, positive_int, run
from fractal.base.files import check_paths

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    import pyarrow as pa

    from fractal.annotate.annotator import Annotator
    from fractal.data.cells import Cells
    from fractal.view.explorer import Cells as Shown


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal explore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument("input", type=Path, help="cells: .h5ad, Parquet, .npy or a TileDB array's folder")
    files.add_argument("--reference", type=Path, required=True, help="folder of `fractal fit` or `fractal reference`")
    files.add_argument(
        "--use-rep",
        "--obsm",
        dest="use_rep",
        help="of an .h5ad: key of its vectors in obsm (default: the one that the reference was made with)",
    )
    files.add_argument(
        "--output", type=Path, help="the page to write (default: explorer.html; with --embedding-atlas cells.parquet)"
    )
    files.add_argument(
        "--embedding-atlas",
        action="store_true",
        help="for millions of cells: in place of the page, Parquet that the package embedding-atlas opens, with maps, "
        "labels, columns and neighbours",
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--max-cells",
        type=positive_int,
        help="at most so many, drawn at random (default: 20,000, a page of about 14 MB; with --embedding-atlas all)",
    )
    shown.add_argument(
        "--labels",
        metavar="COLUMN",
        help="column of the cells' types, named as the reference's finest ones (default: an atlas's own finest column, "
        "else what the reference answers)",
    )
    shown.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        help="other columns to colour by, text or numbers (default: text columns of 2 to 60 values, at most 8)",
    )
    add_force(parser)
    add_device(parser)
    return parser


def read_cells(source: "Cells", args: argparse.Namespace) -> "Shown":
    """At most --max-cells of the usable cells, drawn at random, in the order of the file."""
    import pandas as pd
    import pyarrow as pa
    from tqdm import tqdm

    from fractal.data.cells import names_of
    from fractal.data.vectors import CHUNK, usable
    from fractal.view.explorer import MAX_CELLS, choose
    from fractal.view.explorer import Cells as Shown

    limit = args.max_cells or (None if args.embedding_atlas else MAX_CELLS)
    drawn = np.zeros(source.num_rows, bool)
    drawn[np.random.default_rng(0).permutation(source.num_rows)[:limit]] = True
    vectors, start = [], 0
    tables: list[pa.Table] = []
    with tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="read") as bar:
        for columns, chunk in source.chunks(CHUNK, obs=True):
            some = np.flatnonzero(drawn[start : start + len(chunk)] & usable(chunk))
            vectors.append(chunk[some])
            if columns.num_columns:
                tables.append(columns.take(some))
            start += len(chunk)
            bar.update(len(chunk))
    x, table = np.concatenate(vectors), pa.concat_tables(tables) if tables else None
    if not len(x):
        raise InputError(f"{args.input}: none of the cells drawn has a usable vector")
    names = None if table is None else names_of(table)
    frame = pd.DataFrame() if table is None else table.to_pandas()
    labels, shown = choose(frame, args.labels, args.columns, args.input)
    return Shown(x, source.num_rows, None if names is None else names.tolist(), labels, shown)


def atlas_columns(annotator: "Annotator", cells: "Shown") -> "pa.Table":
    """What Embedding Atlas shows of the cells beside the maps: names, a label per level, and their own columns."""
    import pyarrow as pa

    from fractal.annotate.answers import answer_columns

    levels = annotator.tree.levels
    if cells.labels is None:
        labels = answer_columns(annotator.answer(cells.vectors), annotator.tree)
        told = {name: labels[name].cast(pa.string()).fill_null("").to_pandas() for name in ("label", "status", *levels)}
    else:
        path_of = {path[-1]: path for path in annotator.tree.paths}
        paths = [path_of.get(name, ("",) * len(levels)) for name in cells.labels]
        told = dict(zip(levels, np.array(paths, object).T, strict=True))
    names = {} if cells.names is None else {"cell_id": cells.names}
    columns = {**names, **told, **cells.columns}
    return pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    output = args.output or Path("cells.parquet" if args.embedding_atlas else "explorer.html")
    check_paths({"input": args.input, "--reference": args.reference}, {"--output": output})
    from fractal.data.cells import is_h5ad
    from fractal.model.adapter import pick_device
    from fractal.reference import read_folder
    from fractal.view.embedding_atlas import write_embedding_atlas
    from fractal.view.explorer import check_template, write_page
    from fractal.view.maps import fractal_vectors, maps_of

    if args.use_rep and not is_h5ad(args.input):
        raise InputError(f"--use-rep {args.use_rep}: only an .h5ad has several vectors, {args.input} is none; drop it")
    if args.embedding_atlas and output.suffix != ".parquet":
        raise InputError(f"{output}: --embedding-atlas writes Parquet; name a .parquet file with --output")
    if not args.embedding_atlas:
        check_template()
    bundle = read_folder(args.reference, pick_device(args.device))
    with bundle.embedder.open(args.input, args.use_rep, args.force) as source:
        cells = read_cells(source, args)
    full = fractal_vectors(bundle, cells.vectors)
    maps = maps_of(bundle, args.reference)
    told = f"{len(cells.vectors):,} of {cells.total:,} cells of {args.input} -> {output}"
    if args.embedding_atlas:
        write_embedding_atlas(output, maps, full, atlas_columns(bundle.annotator, cells))
        last = len(maps.layouts)
        print(f"{told}; open it with: embedding-atlas {output} --x x_{last} --y y_{last} --neighbors neighbors")
        return
    reference = args.reference.resolve().name
    size = write_page(output, bundle, cells, maps.transform(full), args.input.name, reference)
    print(f"{told}, {size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run(main)
