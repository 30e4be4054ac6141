"""Give every cell of a file its fractal vector.

    fractal embed new.h5ad --reference blood_reference
    fractal embed data/stratified.parquet --reference data/fractal_adapter_4L.pt --output data/embedded.parquet

An .h5ad is copied, to new_fractal.h5ad, and gets obsm["X_fractal"] and uns["fractal"] (see fractal/data/writers.py); a
cell whose vector is NaN, inf or zero gets NaN there, but stops Parquet and .npy, which other scripts read. Parquet
keeps all its other columns, and its metadata name the checkpoint, the recipe and the blocks. A .npy file, a float
matrix (cells, dim), a .zarr of AnnData, an array or SOMA experiment of TileDB, and a folder of Parquet files are
taken as well. Files may be at a URI, such as s3://bucket/new.h5ad.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fractal.base.errors import InputError
from fractal.base.files import locked
from fractal.base.storage import Location
from fractal.commands.options import CHECKPOINT, add, check_output, check_use_rep, command, one_input

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    from fractal.commands.output import Chunks
    from fractal.data.cells import Cells
    from fractal.model.embedding import Embedder


def get_parser() -> argparse.ArgumentParser:
    parser = command("embed", __doc__)
    files = parser.add_argument_group("files")
    add(files, "input")
    add(files, "--reference", default=CHECKPOINT, help="reference, or checkpoint of train.py (default: %(default)s)")
    add(files, "--use-rep", "--model")
    add(
        files,
        "--output",
        help="Parquet, or folder/part-{}.parquet for many files, .npy for the vectors alone, or .h5ad for an .h5ad, "
        "which may be the input (default: data/fractal_embeddings.parquet, or beside an .h5ad, its name with _fractal)",
    )
    vectors = parser.add_argument_group("vectors of Parquet and .npy; an .h5ad gets the full ones, to be cut later")
    add(vectors, "--prefix", help="keep this many blocks, of length 1 again (default: the full vector)")
    vectors.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="float16 takes half the space; the other scripts read float32 (default: %(default)s)",
    )
    add(parser, "--force", "--device")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Fill in the output. Raises InputError, before any work, for flags that do not go together."""
    from fractal.data.cells import is_h5ad

    args.input = one_input(args, "fractal embed new.h5ad --reference FOLDER", Path("data/stratified.parquet"))
    check_use_rep(args)
    beside = args.input.with_name(f"{args.input.stem}_fractal.h5ad")
    args.output = args.output or (beside if is_h5ad(args.input) else Path("data/fractal_embeddings.parquet"))
    check_output(args, {"--reference": args.reference})
    if is_h5ad(args.output) and (args.prefix or args.dtype != "float32"):
        raise InputError(
            f"{args.output}: an .h5ad gets full float32 vectors; cut them with fractal.truncate, or name a "
            ".parquet or .npy with --output"
        )


def num_blocks(args: argparse.Namespace, embedder: "Embedder") -> int:
    """How many blocks are kept. Raises InputError for a --prefix beyond the vector."""
    levels = embedder.adapter.num_levels
    if (args.prefix or 1) > levels:
        raise InputError(f"{args.reference}: has {levels} blocks, --prefix {args.prefix} asks for more")
    return args.prefix or levels


def embed_cells(embedder: "Embedder", cells: "Cells", output: Location, prefix: int, dtype: str = "float32") -> int:
    """Write the vectors of all cells, whole or not at all -> how many are NaN.

    prefix: so many blocks of each; an .h5ad gets all. dtype: of Parquet and .npy, float32 or float16.
    """
    import numpy as np

    from fractal.commands.output import kept_metadata, write_output
    from fractal.data.cells import is_h5ad
    from fractal.data.parquet import ROW_GROUP
    from fractal.data.vectors import CHUNK
    from fractal.data.writers import facts
    from fractal.model.embedding import embed_matrix

    to_h5ad, invalid = is_h5ad(output), 0

    def chunks() -> "Chunks":
        nonlocal invalid
        size = CHUNK if to_h5ad else ROW_GROUP
        for columns, vectors in cells.chunks(size, strict=not to_h5ad, progress="embed"):
            embedded, blocks = embed_matrix(embedder.adapter, vectors, prefix)
            invalid += int(np.isnan(embedded[:, 0]).sum())
            if not to_h5ad:
                yield columns, {"embedding": embedded.astype(dtype, copy=False)}
            elif embedder.recipe == "published":
                yield columns, {"X_fractal": embedded, "X_fractal_blocks": blocks}
            else:
                yield columns, {"X_fractal": embedded}

    write_output(
        output,
        chunks(),
        cells,
        metadata={**kept_metadata(cells), **embedder.metadata(prefix)},
        uns=lambda: {"fractal": facts(embedder.adapter, embedder.recipe, embedder.sha256, embedder.levels)},
        replaces=("X_fractal", "X_fractal_blocks"),
    )
    return invalid


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    from fractal.reference import open_embedder

    embedder = open_embedder(args.reference, args.device, args.model)
    prefix = num_blocks(args, embedder)
    with locked(args.output), embedder.open(args.input, args.use_rep, args.force) as cells:  # it may be the input
        invalid = embed_cells(embedder, cells, args.output, prefix, args.dtype)
    kind = "full vectors" if prefix == embedder.adapter.num_levels else f"prefix {prefix}"
    print(
        f"{cells.num_rows:,} cells, {kind} of recipe {embedder.recipe}, {prefix * embedder.adapter.scale_dim} numbers "
        f"each as {args.dtype}, written to {args.output}"
        + (f"; NaN for {invalid:,} cells whose vector is zero or not finite" if invalid else "")
    )
