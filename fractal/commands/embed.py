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
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fractal.base.errors import InputError, run
from fractal.base.files import check_paths, locked
from fractal.commands.options import CHECKPOINT, add, command, one_input

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    import pyarrow as pa


EXAMPLE = "fractal embed new.h5ad --reference FOLDER"


def get_parser() -> argparse.ArgumentParser:
    parser = command("embed", __doc__)
    files = parser.add_argument_group("files")
    add(files, "input")
    add(files, "--reference", default=CHECKPOINT, help="folder of `fractal fit`, or checkpoint (default: %(default)s)")
    add(files, "--use-rep")
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


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    from fractal.annotate.query import open_query, tell
    from fractal.commands.output import open_output
    from fractal.data.cells import Cells, is_h5ad
    from fractal.data.outputs import facts
    from fractal.data.parquet import ROW_GROUP
    from fractal.data.vectors import CHUNK
    from fractal.model.adapter import pick_device
    from fractal.model.embedding import Embedder, embed_chunks

    embedder = Embedder.open(args.reference, pick_device(args.device))
    adapter, recipe, levels = embedder.adapter, embedder.recipe, embedder.adapter.num_levels
    prefix, to_h5ad = args.prefix or levels, is_h5ad(args.output)
    if prefix > levels:
        raise InputError(f"{args.reference}: has {levels} blocks, --prefix {prefix} asks for more")
    with ExitStack() as stack:
        stack.enter_context(locked(args.output))  # it may be the input
        if embedder.reference:
            query = open_query(embedder.reference, args.input, args.use_rep, args.force)
            source, origin = stack.enter_context(query)
            tell(origin, args.input)
        else:  # a checkpoint of train.py knows no cells
            source = stack.enter_context(Cells.open(args.input, args.use_rep or embedder.use_rep, adapter.dim))
        write = stack.enter_context(
            open_output(
                args.output,
                source,
                metadata=embedder.metadata(prefix),
                uns=facts(adapter, recipe, embedder.sha256, embedder.levels),
                replaces=("X_fractal", "X_fractal_blocks").__contains__,
                dtype=args.dtype,
            )
        )

        def append(columns: "pa.Table", vectors: np.ndarray, blocks: np.ndarray) -> None:
            if to_h5ad:
                both = {"X_fractal": vectors, "X_fractal_blocks": blocks}
                write(columns, both if recipe == "published" else {"X_fractal": vectors})
            else:
                write(columns, {"embedding": vectors})

        chunks = source.chunks(CHUNK if to_h5ad else ROW_GROUP, strict=not to_h5ad)
        invalid = embed_chunks(adapter, chunks, source.num_rows, prefix, append)
    print(
        f"{source.num_rows:,} cells, {'full vectors' if prefix == levels else f'prefix {prefix}'} of recipe {recipe}, "
        f"{prefix * adapter.scale_dim} numbers each as {args.dtype}, written to {args.output}"
        + (f"; NaN for {invalid:,} cells whose vector is zero or not finite" if invalid else "")
    )


if __name__ == "__main__":
    run(main)
