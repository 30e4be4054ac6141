"""Lay cells out in the plane, once per prefix, on the maps of a reference: islands split from prefix to prefix.

    fractal map new.h5ad --reference blood_reference --output new_maps.h5ad
    fractal map data/stratified.parquet --reference blood_reference --output maps.parquet

The maps are fitted once, on the reference's cells, and kept in its folder (maps.safetensors): about two minutes for
20,000 cells. New cells are placed amid their nearest neighbours there, without refitting. An .h5ad is copied and gets
obsm["X_fractal_umap_1"] (prefix 1) to obsm["X_fractal_umap_4"] (the full vector), (cells, 2) float32, as many as there
are prefixes; a cell whose vector is NaN, inf or zero gets NaN. Parquet keeps its columns and gets lists of two numbers,
fractal_umap_1, ... The layouts are t-SNE's; umap is what other tools call such a place in an AnnData.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fractal.base.cli import InputError, add_device, add_force, run
from fractal.base.files import check_paths, locked

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    import pyarrow as pa

    from fractal.data.cells import Cells
    from fractal.model.embedding import Embedder

Append = Callable[["pa.Table", np.ndarray, np.ndarray], None]  # columns, vectors (m, dim), places (prefixes, m, 2)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal map", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="cells: .h5ad, Parquet, .npy or a TileDB array's folder")
    parser.add_argument("--reference", type=Path, required=True, help="folder of `fractal fit`")
    parser.add_argument(
        "--use-rep",
        "--obsm",
        dest="use_rep",
        help="of an .h5ad: key of its vectors in obsm (default: the one that the reference was made with; with "
        "--embedded X_fractal)",
    )
    parser.add_argument(
        "--embedded", action="store_true", help="the vectors are the full ones of `fractal embed` already"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help=".h5ad for an .h5ad, which may be the input, or Parquet"
    )
    add_force(parser)
    add_device(parser)
    return parser


@contextmanager
def h5ad_sink(source: "Cells", target: Path, prefixes: int) -> Iterator[Append]:
    """A copy of the .h5ad with a layout per prefix in obsm; whole or not at all."""
    from fractal.data.outputs import add_obsm, h5ad_copy
    from fractal.view.maps import OBSM

    with h5ad_copy(source.path, target) as file:
        outputs = [add_obsm(file, OBSM.format(j), source.num_rows, 2) for j in range(1, prefixes + 1)]
        done = 0

        def append(_: Any, vectors: np.ndarray, places: np.ndarray) -> None:
            nonlocal done
            for output, values in zip(outputs, places, strict=True):
                output[done : done + len(vectors)] = values
            done += len(vectors)

        yield append


@contextmanager
def parquet_sink(source: "Cells", target: Path, prefixes: int) -> Iterator[Append]:
    """The columns of the source, its vectors too, and a list of two numbers per prefix; whole or not at all."""
    import pyarrow as pa

    from fractal.data.parquet import metadata_of, open_writer
    from fractal.view.maps import COLUMN

    names = [COLUMN.format(j) for j in range(1, prefixes + 1)]
    others = [field for field in source.schema if field.name not in names]  # a second run replaces them
    metadata = metadata_of(source.schema)
    metadata.pop("pandas", None)  # it would tell pandas of an index that is now a column
    schema = pa.schema([*others, *(pa.field(name, pa.list_(pa.float32(), 2)) for name in names)])
    with open_writer(target, source.dim, schema, metadata) as writer:

        def append(columns: pa.Table, vectors: np.ndarray, places: np.ndarray) -> None:
            columns = columns.select([field.name for field in others])
            for name, values in zip(names, places, strict=True):
                flat = pa.array(np.ascontiguousarray(values).reshape(-1))
                columns = columns.append_column(name, pa.FixedSizeListArray.from_arrays(flat, 2))
            writer.append_table(vectors, columns)

        yield append


@contextmanager
def open_embedded(path: Path, use_rep: str | None, embedder: "Embedder") -> Iterator["Cells"]:
    """A file of full fractal vectors. Raises InputError where another adapter made them, or they can't be cut."""
    from fractal.search.source import open_cells

    key = use_rep or ("X_fractal_blocks" if embedder.recipe == "published" else "X_fractal")
    with open_cells(path, embedder, key, embedded=True) as opened:
        if embedder.recipe == "published" and not key.endswith("_blocks"):
            raise InputError(f"{path}: prefixes of recipe `published` are no cuts of its full vectors; drop --embedded")
        yield opened.cells


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    from tqdm import tqdm

    from fractal.data.cells import is_h5ad
    from fractal.data.vectors import CHUNK, usable
    from fractal.model.adapter import pick_device
    from fractal.reference import read_folder
    from fractal.view.maps import fractal_vectors, maps_of

    to_h5ad = is_h5ad(args.output)
    if to_h5ad and not is_h5ad(args.input):
        raise InputError(f"{args.output}: an .h5ad is only written for an .h5ad input; name a .parquet")
    if not to_h5ad and args.output.suffix.casefold() != ".parquet":
        raise InputError(f"{args.output}: name a .parquet{' or .h5ad' if is_h5ad(args.input) else ''} with --output")
    in_place = [("--output", "input")] if to_h5ad else []
    check_paths({"input": args.input, "--reference": args.reference}, {"--output": args.output}, in_place)
    if args.reference.is_file():
        raise InputError(f"{args.reference}: an adapter without cells; make a reference of it with `fractal reference`")
    bundle = read_folder(args.reference, pick_device(args.device))
    embedder = bundle.embedder
    with ExitStack() as stack:
        stack.enter_context(locked(args.output))  # it may be the input
        if args.embedded:
            source = stack.enter_context(open_embedded(args.input, args.use_rep, embedder))
        else:
            source = stack.enter_context(embedder.open(args.input, args.use_rep, args.force))
        maps = maps_of(bundle, args.reference)
        sink = (h5ad_sink if to_h5ad else parquet_sink)(source, args.output, len(maps.layouts))
        append, invalid = stack.enter_context(sink), 0
        with tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="map") as bar:
            for columns, vectors in source.chunks(CHUNK, strict=not to_h5ad):
                append(columns, vectors, maps.transform(vectors if args.embedded else fractal_vectors(bundle, vectors)))
                invalid += int((~usable(vectors)).sum())
                bar.update(len(vectors))
    print(
        f"{source.num_rows:,} cells placed on the maps of {len(maps.vectors):,} cells of {args.reference}, one per "
        f"prefix ({', '.join(embedder.levels)}), written to {args.output}"
        + (f"; NaN for {invalid:,} cells whose vector is zero or not finite" if invalid else "")
    )


if __name__ == "__main__":
    run(main)
