"""Give every cell of a file its fractal vector.

    fractal embed new.h5ad --reference blood_reference
    fractal embed data/stratified.parquet --reference data/fractal_adapter_4L.pt --output data/embedded.parquet

An .h5ad is copied, to new_fractal.h5ad, and gets obsm["X_fractal"] and uns["fractal"] (see fractal/data/outputs.py); a
cell whose vector is NaN, inf or zero gets NaN there, but stops Parquet and .npy, which other scripts read. Parquet
keeps all its other columns, and its metadata name the checkpoint, the recipe and the blocks. A .npy file, a float
matrix (cells, dim), a .zarr of AnnData, an array or SOMA experiment of TileDB, and a folder of Parquet files are
taken as well. Files may be at a URI, such as s3://bucket/new.h5ad.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fractal.base.errors import InputError, run
from fractal.base.files import locked
from fractal.base.paths import check_paths
from fractal.base.storage import Location
from fractal.commands.options import CHECKPOINT, add, command, one_input

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    import pyarrow as pa

    from fractal.data.cells import Cells
    from fractal.model.embedding import Embedder

EXAMPLE = "fractal embed new.h5ad --reference FOLDER"


def get_parser() -> argparse.ArgumentParser:
    parser = command("embed", __doc__)
    files = parser.add_argument_group("files")
    add(files, "input")
    add(files, "--reference", default=CHECKPOINT, help="folder of `fractal fit`, or checkpoint (default: %(default)s)")
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
    from fractal.data.cells import has_obsm, is_h5ad

    args.input = one_input(args, EXAMPLE, Path("data/stratified.parquet"))
    from_h5ad = is_h5ad(args.input)
    if args.use_rep and not has_obsm(args.input):
        raise InputError(f"--use-rep {args.use_rep}: only an .h5ad has several vectors, {args.input} is none; drop it")
    beside = args.input.with_name(f"{args.input.stem}_fractal.h5ad")
    args.output = args.output or (beside if from_h5ad else Path("data/fractal_embeddings.parquet"))
    to_h5ad = is_h5ad(args.output)
    if to_h5ad and not from_h5ad:
        raise InputError(f"{args.output}: an .h5ad is only written for an .h5ad --input; name a .parquet or .npy")
    if to_h5ad and (args.prefix or args.dtype != "float32"):
        raise InputError(
            f"{args.output}: an .h5ad gets full float32 vectors; cut them with fractal.truncate, or name a "
            ".parquet or .npy with --output"
        )
    in_place = [("--output", "input")] if to_h5ad else []
    check_paths({"input": args.input, "--reference": args.reference}, {"--output": args.output}, in_place)


@contextmanager
def open_cells(embedder: "Embedder", args: argparse.Namespace) -> Iterator["Cells"]:
    """The cells of --input. Raises InputError for those of another embedding, and for a --prefix beyond the vector."""
    levels = embedder.adapter.num_levels
    if (args.prefix or 1) > levels:
        raise InputError(f"{args.reference}: has {levels} blocks, --prefix {args.prefix} asks for more")
    with embedder.open(args.input, args.use_rep, args.force) as cells:
        yield cells


def embed_cells(embedder: "Embedder", cells: "Cells", output: Location, prefix: int, dtype: str = "float32") -> int:
    """Write the vectors of all cells, whole or not at all -> how many are NaN.

    prefix: so many blocks of each; an .h5ad gets all. dtype: of Parquet and .npy, float32 or float16.
    """
    from fractal.commands.output import open_output
    from fractal.data.cells import is_h5ad
    from fractal.data.outputs import facts
    from fractal.data.parquet import ROW_GROUP
    from fractal.data.vectors import CHUNK
    from fractal.model.embedding import embed_chunks

    to_h5ad = is_h5ad(output)
    with open_output(
        output,
        cells,
        metadata=embedder.metadata(prefix),
        uns={"fractal": facts(embedder.adapter, embedder.recipe, embedder.sha256, embedder.levels)},
        replaces=("X_fractal", "X_fractal_blocks").__contains__,
        dtype=dtype,
    ) as write:

        def append(columns: "pa.Table", vectors: np.ndarray, blocks: np.ndarray) -> None:
            if to_h5ad:
                both = {"X_fractal": vectors, "X_fractal_blocks": blocks}
                write(columns, both if embedder.recipe == "published" else {"X_fractal": vectors})
            else:
                write(columns, {"embedding": vectors})

        chunks = cells.chunks(CHUNK if to_h5ad else ROW_GROUP, strict=not to_h5ad)
        return embed_chunks(embedder.adapter, chunks, cells.num_rows, prefix, append)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    from fractal.model.adapter import pick_device
    from fractal.reference import open_embedder

    embedder = open_embedder(args.reference, pick_device(args.device), args.model)
    levels = embedder.adapter.num_levels
    prefix = args.prefix or levels
    with locked(args.output), open_cells(embedder, args) as cells:  # the output may be the input
        invalid = embed_cells(embedder, cells, args.output, prefix, args.dtype)
    kind = "full vectors" if prefix == levels else f"prefix {prefix}"
    print(
        f"{cells.num_rows:,} cells, {kind} of recipe {embedder.recipe}, {prefix * embedder.adapter.scale_dim} numbers "
        f"each as {args.dtype}, written to {args.output}"
        + (f"; NaN for {invalid:,} cells whose vector is zero or not finite" if invalid else "")
    )


if __name__ == "__main__":
    run(main)
