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
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from fractal.base.errors import InputError, run
from fractal.base.files import locked
from fractal.base.paths import check_paths
from fractal.commands.options import add, command, one_input

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    from fractal.base.storage import Location
    from fractal.data.cells import Cells
    from fractal.model.embedding import Embedder


def get_parser() -> argparse.ArgumentParser:
    parser = command("map", __doc__)
    add(parser, "input", "--use-rep", "--embedded")
    add(parser, "--reference", required=True, help="folder of `fractal fit`")
    add(parser, "--output", required=True, help=".h5ad for an .h5ad, which may be the input, or Parquet")
    add(parser, "--force", "--device")
    return parser


@contextmanager
def open_embedded(path: "Location", use_rep: str | None, embedder: "Embedder") -> Iterator["Cells"]:
    """A file of full fractal vectors. Raises InputError where another adapter made them, or they can't be cut."""
    from fractal.search.source import open_cells

    key = use_rep or ("X_fractal_blocks" if embedder.recipe == "published" else "X_fractal")
    with open_cells(path, embedder, key, embedded=True) as opened:
        if embedder.recipe == "published" and not key.endswith("_blocks"):
            raise InputError(f"{path}: prefixes of recipe `published` are no cuts of its full vectors; drop --embedded")
        yield opened.cells


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError, before any work, for flags that do not go together."""
    from fractal.data.cells import is_h5ad

    args.input = one_input(args, "fractal map new.h5ad --reference FOLDER --output new_maps.h5ad")
    from_h5ad, to_h5ad = is_h5ad(args.input), is_h5ad(args.output)
    if to_h5ad and not from_h5ad:
        raise InputError(f"{args.output}: an .h5ad is only written for an .h5ad input; name a .parquet")
    if not to_h5ad and args.output.suffix.casefold() != ".parquet":
        raise InputError(f"{args.output}: name a .parquet{' or .h5ad' if from_h5ad else ''} with --output")
    in_place = [("--output", "input")] if to_h5ad else []
    check_paths({"input": args.input, "--reference": args.reference}, {"--output": args.output}, in_place)
    if args.reference.is_file():
        raise InputError(f"{args.reference}: an adapter without cells; make a reference of it with `fractal reference`")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    from tqdm.auto import tqdm

    from fractal.commands.output import open_output
    from fractal.data.cells import is_h5ad
    from fractal.data.vectors import CHUNK, usable
    from fractal.model.adapter import pick_device
    from fractal.model.embedding import cut_matrix
    from fractal.reference import read_reference
    from fractal.view.maps import COLUMN, OBSM

    to_h5ad, invalid = is_h5ad(args.output), 0
    reference = read_reference(args.reference, pick_device(args.device))
    embedder = reference.embedder
    with ExitStack() as stack:
        stack.enter_context(locked(args.output))  # it may be the input
        opened = open_embedded(args.input, args.use_rep, embedder) if args.embedded else None
        source = stack.enter_context(opened or embedder.open(args.input, args.use_rep, args.force))
        maps = reference.maps
        names = [(OBSM if to_h5ad else COLUMN).format(j + 1) for j in range(len(maps.layouts))]
        write = stack.enter_context(open_output(args.output, source, replaces=names.__contains__))
        bar = stack.enter_context(tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="map"))
        for table, vectors in source.chunks(CHUNK, strict=not to_h5ad):
            full = vectors if args.embedded else cut_matrix(embedder.adapter, vectors)
            layouts = dict(zip(names, maps.transform(full), strict=True))
            kept = [name for name in table.column_names if name not in names]  # a second run replaces them
            write(table.select(kept), layouts if to_h5ad else {**layouts, "embedding": vectors})
            invalid += int((~usable(vectors)).sum())
            bar.update(len(vectors))
    print(
        f"{source.num_rows:,} cells placed on the maps of {len(maps.vectors):,} cells of {args.reference}, one per "
        f"prefix ({', '.join(embedder.levels)}), written to {args.output}"
        + (f"; NaN for {invalid:,} cells whose vector is zero or not finite" if invalid else "")
    )


if __name__ == "__main__":
    run(main)
