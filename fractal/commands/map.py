"""Lay cells out in the plane, once per prefix, on the maps of a reference: islands split from prefix to prefix.

    fractal map new.h5ad --reference blood_reference --output new_maps.h5ad
    fractal map data/stratified.parquet --reference blood_reference --output maps.parquet

The maps are fitted once, on the reference's cells, and kept in its folder (maps.safetensors): about two minutes for
20,000 cells. New cells are placed amid their nearest neighbours there, without refitting. An .h5ad is copied and gets
obsm["X_fractal_umap_1"] (prefix 1) to obsm["X_fractal_umap_4"] (the full vector), (cells, 2) float32, as many as there
are prefixes; a cell whose vector is NaN, inf or zero gets NaN. Parquet keeps its columns and gets lists of two numbers,
fractal_umap_1, ... The layouts are t-SNE's; umap is what other tools call such a layout in an AnnData.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fractal.base.archive import is_archive
from fractal.base.errors import InputError
from fractal.base.files import locked
from fractal.commands.options import add, check_output, check_suffix, command, one_input

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    from fractal.commands.output import Chunks
    from fractal.data.cells import Cells
    from fractal.reference import Reference


def get_parser() -> argparse.ArgumentParser:
    parser = command("map", __doc__)
    add(parser, "input", "--use-rep", "--embedded")
    add(parser, "--reference", required=True, help="reference of `fractal fit`")
    add(parser, "--output", required=True, help=".h5ad for an .h5ad, which may be the input, or Parquet")
    add(parser, "--force", "--device")
    return parser


@contextmanager
def open_cells(args: argparse.Namespace, reference: "Reference") -> "Iterator[Cells]":
    """Raises InputError for --embedded vectors that another adapter made, or that can't be cut."""
    from fractal.search.source import open_cells

    embedder = reference.embedder
    if not args.embedded:
        with embedder.open(args.input, args.use_rep, args.force) as cells:
            yield cells
        return
    key = args.use_rep or ("X_fractal_blocks" if embedder.recipe == "published" else "X_fractal")
    with open_cells(args.input, embedder, key, embedded=True) as opened:
        if embedder.recipe == "published" and not key.endswith("_blocks"):
            raise InputError(
                f"{args.input}: prefixes of recipe `published` are no cuts of its vectors; drop --embedded"
            )
        yield opened.cells


def map_cells(args: argparse.Namespace, cells: "Cells", reference: "Reference") -> int:
    """Write the layouts -> how many cells have none."""
    from fractal.commands.output import kept_metadata, write_output
    from fractal.data.cells import is_h5ad
    from fractal.data.vectors import CHUNK, usable
    from fractal.model.embedding import cut_matrix
    from fractal.view.maps import COLUMN, OBSM

    to_h5ad, maps, invalid = is_h5ad(args.output), reference.maps, 0
    names = [(OBSM if to_h5ad else COLUMN).format(j + 1) for j in range(len(maps.layouts))]

    def chunks() -> "Chunks":
        nonlocal invalid
        for table, vectors in cells.chunks(CHUNK, strict=not to_h5ad, progress="map"):
            full = vectors if args.embedded else cut_matrix(reference.adapter, vectors)
            layouts = dict(zip(names, maps.transform(full), strict=True))
            kept = [name for name in table.column_names if name not in names]  # a second run replaces them
            invalid += int((~usable(vectors)).sum())
            yield table.select(kept), layouts if to_h5ad else {**layouts, "embedding": vectors}

    write_output(args.output, chunks(), cells, metadata=kept_metadata(cells), replaces=names)
    return invalid


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    args.input = one_input(args, "fractal map new.h5ad --reference FOLDER --output new_maps.h5ad")
    check_suffix("--output", args.output, (".parquet", ".h5ad"))
    check_output(args, {"--reference": args.reference})
    if args.reference.is_file() and not is_archive(args.reference):
        raise InputError(f"{args.reference}: an adapter without cells; make a reference of it with `fractal reference`")
    from fractal.reference import read_reference

    reference = read_reference(args.reference, args.device)
    with locked(args.output), open_cells(args, reference) as cells:  # the output may be the input
        invalid = map_cells(args, cells, reference)
    print(
        f"{cells.num_rows:,} cells placed on the maps of {len(reference.maps.vectors):,} cells of {args.reference}, "
        f"one per prefix ({', '.join(reference.embedder.levels)}), written to {args.output}"
        + (f"; NaN for {invalid:,} cells whose vector is zero or not finite" if invalid else "")
    )
