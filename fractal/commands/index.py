"""Index a file of cells, so that `fractal search` finds the ones like yours among millions in milliseconds.

    fractal index data/embedded.parquet --output data/index
    fractal index data/stratified.parquet --reference data/fractal_adapter_4L.pt --output data/index
    fractal index data/index --add more.h5ad --reference blood_reference
    fractal index data/index --check

Vectors that `fractal embed` has made are indexed as they are. With --reference, others are embedded on the way; without
it, they are indexed as they come, and there are no prefixes to search by. All other columns are kept: labels, study,
ids, and whatever else the file has (of an .h5ad: obs). One pass over the file; memory does not grow with it.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fractal.base.cli import InputError, add_device, add_force, non_negative_int, run
from fractal.base.files import check_paths
from fractal.base.storage import place

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    from fractal.search.folder import Folder


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument("input", nargs="?", type=place, help="cells: Parquet, .h5ad, .zarr, .npy or TileDB; or an index")
    files.add_argument("--input", dest="input_flag", type=place, help=argparse.SUPPRESS)  # as in the scripts
    files.add_argument("--output", type=Path, help="folder of the new index")
    files.add_argument(
        "--reference",
        "--model-path",
        dest="reference",
        type=place,
        help="folder of `fractal fit`, or a checkpoint of train.py: embeds vectors that it has not made",
    )
    files.add_argument(
        "--use-rep",
        "--obsm",
        dest="use_rep",
        help="of an .h5ad: key of its vectors in obsm (default: what the reference takes; without one X_fractal)",
    )
    parser.add_argument(
        "--add", type=place, metavar="FILE", help="add the cells of FILE to the index, without a rebuild"
    )
    parser.add_argument("--check", action="store_true", help="read all of the index and compare it with its checksums")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the clustering (default: %(default)s)")
    add_force(parser)
    add_device(parser)
    return parser


def told(folder: "Folder") -> str:
    """One line: how large an index is, and what its vectors are."""
    cells = sum(part.cells for part in folder.parts)
    size = sum(length for length, _ in folder.facts["files"].values())
    space = folder.space
    kind = f"recipe {space.recipe}, {len(space.blocks)} blocks" if space.blocks else "vectors as they came, no prefixes"
    return f"{folder.path}: {cells:,} cells in {len(folder.centroids):,} lists, {kind}, {size / 1e6:,.0f} MB"


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    source = args.input or args.input_flag
    if source is None or (args.input and args.input_flag):
        raise InputError("name one input: fractal index cells.parquet --output FOLDER")
    if args.add and args.check:
        raise InputError("--add and --check: name one of them")
    if (args.add or args.check) and args.output:
        raise InputError(f"--output {args.output}: --add and --check work on the index {source} itself; drop it")
    if not (args.add or args.check or args.output):
        raise InputError("name the folder of the new index with --output")
    if args.output:
        check_paths({"input": source, "--reference": args.reference}, {}, folders={"--output": args.output})
    began = time.perf_counter()
    if args.check:
        from fractal.search.folder import check_files, read_folder

        folder = read_folder(source)
        size = check_files(folder)
        print(f"{source}: whole, {size / 1e6:,.0f} MB agree with their checksums")
        return

    from fractal.base.files import check_folder
    from fractal.model.adapter import pick_device
    from fractal.model.embedding import Embedder
    from fractal.search import build
    from fractal.search.folder import OWN_FILES, read_folder
    from fractal.search.source import open_cells

    old = read_folder(source) if args.add else None
    if args.output:
        check_folder(args.output, OWN_FILES)
    embedder = Embedder.open(args.reference, pick_device(args.device)) if args.reference else None
    with open_cells(args.add or source, embedder, args.use_rep, force=args.force) as opened:
        if old is None:
            build.build(args.output, opened.cells, args.seed)
        else:
            build.add(old, opened.cells)
    seconds = time.perf_counter() - began
    print(f"{told(read_folder(args.output or source))}; {opened.source.num_rows:,} cells in {seconds:,.0f} s")


if __name__ == "__main__":
    run(main)
