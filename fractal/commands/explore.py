"""Cells and a reference -> one HTML page to look at: it opens from disk, without a server, and sends nothing.

    fractal explore cells.h5ad --reference blood_reference --output explorer.html
    fractal explore cells.h5ad --reference blood_reference --labels cell_type --columns donor tissue
    fractal explore cells.h5ad --reference blood_reference --genes CD3E MS4A1 LYZ

The page shows the cells on one map per prefix, aligned, and morphs between them. It lists the neighbours of a cell
under any prefix and in the vectors that came, and labels CSV, Parquet and .npy files that are dropped on it.
Cells are coloured by the labels of the reference, each as deep as it can be trusted, or by those of a column. An atlas
of ingest.py brings labels. docs/explore.md shows what the page can do.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from fractal.base.errors import InputError
from fractal.base.paths import check_paths
from fractal.commands.options import add, check_suffix, check_use_rep, command, one_input, positive_int


def get_parser() -> argparse.ArgumentParser:
    parser = command("explore", __doc__)
    files = parser.add_argument_group("files")
    add(files, "input", "--use-rep")
    add(files, "--reference", required=True, help="reference of `fractal fit` or `fractal reference`")
    add(files, "--output", help="the page to write (default: explorer.html; with --embedding-atlas cells.parquet)")
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
    add(
        shown,
        "--labels",
        help="column of the cells' types, by name or as the Cell Ontology knows them (default: an atlas's finest "
        "column, else what the reference answers)",
    )
    add(
        shown,
        "--columns",
        help="other columns to colour by, text or numbers (default: text columns of 2 to 60 values, at most 8)",
    )
    shown.add_argument(
        "--genes",
        nargs="+",
        metavar="GENE",
        help="genes to colour by and to compare between types, at most 500, or a text file of them (default: the "
        "types' markers, at most 60, where an .h5ad has counts)",
    )
    add(parser, "--force", "--device")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    from fractal.data.cells import has_obsm

    args.input = one_input(args, "fractal explore cells.h5ad --reference FOLDER")
    args.output = args.output or Path("cells.parquet" if args.embedding_atlas else "explorer.html")
    check_use_rep(args)
    check_paths({"input": args.input, "--reference": args.reference}, {"--output": args.output})
    if args.embedding_atlas:
        check_suffix("--output", args.output, (".parquet",))
    if args.genes and (args.embedding_atlas or not has_obsm(args.input)):
        raise InputError(f"--genes: the page takes them from an .h5ad or .zarr, not from {args.input}; drop it")
    from fractal.model.embedding import cut_matrix
    from fractal.reference import read_reference
    from fractal.view.embedding_atlas import atlas_columns, write_embedding_atlas
    from fractal.view.explorer import check_template, write_page
    from fractal.view.genes import names_of, read_genes
    from fractal.view.shown import MAX_CELLS

    if not args.embedding_atlas:
        check_template()
    reference = read_reference(args.reference, args.device)
    limit = args.max_cells or (None if args.embedding_atlas else MAX_CELLS)
    with reference.embedder.open(args.input, args.use_rep, args.force) as cells:
        shown = reference.shown(cells, args.labels, args.columns, limit)
    line = f"{len(shown.vectors):,} of {shown.total:,} cells of {args.input} -> {args.output}"
    if args.embedding_atlas:
        full = cut_matrix(reference.adapter, shown.vectors)
        write_embedding_atlas(args.output, reference.maps, full, atlas_columns(reference.annotator, shown))
        last = len(reference.maps.layouts)
        print(f"{line}; open it with: embedding-atlas {args.output} --x x_{last} --y y_{last} --neighbors neighbors")
        return
    if has_obsm(args.input):
        genes = read_genes(args.input, shown.rows, args.genes and names_of(args.genes))
        shown = replace(shown, genes=genes)
    size = write_page(args.output, reference.page(args.input.name), shown, reference.layouts(shown.vectors))
    print(f"{line}, {size / 1e6:.1f} MB; open it in a browser")
