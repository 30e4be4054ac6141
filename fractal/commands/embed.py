"""Give every cell of a file its fractal vector.

    fractal embed new.h5ad --reference blood_reference
    fractal embed data/stratified.parquet --reference data/fractal_adapter_4L.pt --output data/embedded.parquet

An .h5ad is copied, to new_fractal.h5ad, and gets obsm["X_fractal"] and uns["fractal"] (see fractal/data/h5ad.py); a
cell whose vector is NaN, inf or zero gets NaN there, but stops Parquet and .npy, which other scripts read. Parquet
keeps all its other columns, and its metadata name the checkpoint, the recipe and the blocks. A .npy file, a float
matrix (cells, dim), a .zarr of AnnData, an array or SOMA experiment of TileDB, and a folder of Parquet files are
taken as well. Files may be at a URI, such as s3://bucket/new.h5ad.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fractal.base.cli import InputError, add_device, add_force, needs, positive_int, run
from fractal.base.files import check_paths
from fractal.base.storage import Place, place

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    import pyarrow as pa

    from fractal.data.vectors import Source
    from fractal.model.embedding import Append, Embedder


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "input",
        nargs="?",
        type=place,
        help="cells: .h5ad, .zarr, Parquet (a file or a folder), .npy or TileDB (default: data/stratified.parquet)",
    )
    files.add_argument("--input", dest="input_flag", type=place, help=argparse.SUPPRESS)  # as in the scripts
    files.add_argument(
        "--reference",
        "--model-path",
        dest="model_path",
        type=place,
        default=Path("data/fractal_adapter_4L.pt"),
        help="folder of `fractal fit`, or a checkpoint of train.py (default: %(default)s)",
    )
    files.add_argument(
        "--use-rep",
        "--obsm",
        dest="use_rep",
        help="of an .h5ad: key of its vectors in obsm (default: the one that the reference was made with)",
    )
    files.add_argument(
        "--output",
        type=place,
        help="Parquet, or folder/part-{}.parquet for many files, .npy for the vectors alone, or .h5ad for an .h5ad, "
        "which may be the input (default: "
        "data/fractal_embeddings.parquet, or beside an .h5ad, its name with _fractal)",
    )
    vectors = parser.add_argument_group("vectors of Parquet and .npy; an .h5ad gets the full ones, to be cut later")
    vectors.add_argument(
        "--prefix", type=positive_int, help="keep this many blocks, of length 1 again (default: the full vector)"
    )
    vectors.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="float16 takes half the space; the other scripts read float32 (default: %(default)s)",
    )
    add_force(parser)
    add_device(parser)
    return parser


@contextmanager
def h5ad_sink(source: "Source", target: Place, embedder: "Embedder") -> Iterator["Append"]:
    """A copy of the .h5ad with X_fractal and uns["fractal"], filled chunk by chunk; whole or not at all."""
    from fractal.data.h5ad import add_obsm, facts, h5ad_copy

    io = needs("anndata", "h5ad").io
    adapter, recipe = embedder.adapter, embedder.recipe
    dims = adapter.num_levels * adapter.scale_dim
    with h5ad_copy(source.path, target) as file:
        outputs = [add_obsm(file, "X_fractal", source.num_rows, dims)]
        if recipe == "published":
            outputs.append(add_obsm(file, "X_fractal_blocks", source.num_rows, dims))
        elif "X_fractal_blocks" in file["obsm"]:
            del file["obsm"]["X_fractal_blocks"]  # of another adapter
        uns = file.require_group("uns")
        known = io.read_elem(uns["fractal"]) if "fractal" in uns else {}  # what `fractal annotate` has said there
        told = facts(adapter, recipe, embedder.sha256, embedder.levels)
        io.write_elem(uns, "fractal", {**(known if isinstance(known, dict) else {}), **told})
        done = 0

        def append(_: Any, vectors: np.ndarray, blocks: np.ndarray) -> None:
            nonlocal done
            for output, values in zip(outputs, (vectors, blocks), strict=False):
                output[done : done + len(values)] = values
            done += len(vectors)

        yield append


@contextmanager
def vector_sink(source: "Source", target: Place, dim: int, dtype: str, metadata: dict[str, str]) -> Iterator["Append"]:
    """Parquet with the columns of the source, or .npy; whole or not at all."""
    from fractal.data.vectors import writing_vectors

    with writing_vectors(target, source, dim, np.dtype(dtype), metadata) as write:

        def append(columns: "pa.Table", vectors: np.ndarray, _: np.ndarray) -> None:
            write(columns, vectors)

        yield append


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    from fractal.annotate.query import open_query, tell
    from fractal.data.parquet import ROW_GROUP
    from fractal.data.vectors import CHUNK, has_obsm, is_h5ad, open_vectors
    from fractal.model.adapter import pick_device
    from fractal.model.embedding import Embedder, embed_chunks

    source_path = args.input or args.input_flag or Path("data/stratified.parquet")
    from_h5ad = is_h5ad(source_path)
    if args.input and args.input_flag:
        raise InputError(f"{args.input_flag}: the input is {args.input} already; name one")
    if args.use_rep and not has_obsm(source_path):
        raise InputError(f"--use-rep {args.use_rep}: only an .h5ad has several vectors, {source_path} is none; drop it")
    beside = source_path.with_name(f"{source_path.stem}_fractal.h5ad")
    output = args.output or (beside if from_h5ad else Path("data/fractal_embeddings.parquet"))
    to_h5ad = is_h5ad(output)
    if to_h5ad and not from_h5ad:
        raise InputError(f"{output}: an .h5ad is only written for an .h5ad --input; name a .parquet or .npy")
    if to_h5ad and (args.prefix or args.dtype != "float32"):
        raise InputError(
            f"{output}: an .h5ad gets full float32 vectors; cut them with fractal.truncate, or name a "
            ".parquet or .npy with --output"
        )
    check_paths(
        {"input": source_path, "--reference": args.model_path},
        {"--output": output},
        in_place=[("--output", "input")] if to_h5ad else [],
    )
    embedder = Embedder.open(args.model_path, pick_device(args.device))
    adapter, recipe, levels = embedder.adapter, embedder.recipe, embedder.adapter.num_levels
    prefix = args.prefix or levels
    if prefix > levels:
        raise InputError(f"{args.model_path}: has {levels} blocks, --prefix {prefix} asks for more")
    metadata = embedder.metadata(prefix)
    with ExitStack() as stack:
        if embedder.reference:
            query = open_query(embedder.reference, source_path, args.use_rep, args.force)
            source, origin = stack.enter_context(query)
            tell(origin, source_path)
        else:  # a checkpoint of train.py knows no cells
            opened = open_vectors(source_path, args.use_rep or embedder.use_rep, adapter.dim)
            source = stack.enter_context(opened)
        dim = prefix * adapter.scale_dim
        chunks = source.chunks(CHUNK if to_h5ad else ROW_GROUP, strict=not to_h5ad)
        with (
            h5ad_sink(source, output, embedder) if to_h5ad else vector_sink(source, output, dim, args.dtype, metadata)
        ) as append:
            invalid = embed_chunks(adapter, chunks, source.num_rows, prefix, append)
    print(
        f"{source.num_rows:,} cells, {'full vectors' if prefix == levels else f'prefix {prefix}'} of recipe {recipe}, "
        f"{dim} numbers each as {args.dtype}, written to {output}"
        + (f"; NaN for {invalid:,} cells whose vector is zero or not finite" if invalid else "")
    )


if __name__ == "__main__":
    run(main)
