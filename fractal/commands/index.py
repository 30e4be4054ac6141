"""Index a file of cells, so that `fractal search` finds the ones like yours among millions in milliseconds.

    fractal index data/embedded.parquet --output data/index
    fractal index data/stratified.parquet --reference data/fractal_adapter_4L.pt --output data/index
    fractal index data/index --add more.h5ad --reference blood_reference
    fractal index data/index --check

Vectors that `fractal embed` has made are indexed as they are. With --reference, others are embedded on the way; without
it, they are indexed as they come, and there are no prefixes to search by. All other columns are kept: labels, study,
ids, and whatever else the file has (of an .h5ad: obs). One pass over the file; memory does not grow
with it, but for the columns of an obs.
"""

import argparse
import time
from pathlib import Path

from fractal.base.errors import InputError
from fractal.base.paths import check_paths
from fractal.base.storage import locate
from fractal.commands.options import add, command, one_input


def get_parser() -> argparse.ArgumentParser:
    parser = command("index", __doc__)
    files = parser.add_argument_group("files")
    add(files, "input", help="cells: .h5ad, .zarr, .npy, Parquet or TileDB; or an index")
    add(files, "--output", type=Path, help="folder of the new index")
    add(files, "--reference", help="reference of `fractal fit`, or checkpoint: embeds vectors that it has not made")
    add(
        files,
        "--use-rep",
        help="of an .h5ad: key of its vectors in obsm (default: what the reference takes; without one X_fractal)",
    )
    parser.add_argument(
        "--add", type=locate, metavar="FILE", help="add the cells of FILE to the index, without a rebuild"
    )
    parser.add_argument("--check", action="store_true", help="read all of the index and compare it with its checksums")
    add(parser, "--seed", help="of the clustering (default: %(default)s)")
    add(
        parser,
        "--force",
        help="take vectors that can't come from the reference's embedding, or cells that are there already",
    )
    add(parser, "--device")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError, before any work, for flags that do not go together."""
    args.input = one_input(args, "fractal index cells.parquet --output FOLDER")
    if args.add and args.check:
        raise InputError("--add and --check: name one of them")
    if (args.add or args.check) and args.output:
        raise InputError(f"--output {args.output}: --add and --check work on the index {args.input} itself; drop it")
    if not (args.add or args.check or args.output):
        raise InputError("name the folder of the new index with --output")
    check_paths({"input": args.input, "--reference": args.reference}, {}, folders={"--output": args.output})


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    from fractal.base.paths import check_folder
    from fractal.search.folder import OWN_FILES, check_files

    path = args.output or Path(str(args.input))  # of the index
    if args.check:
        print(f"{path}: whole, {check_files(path) / 1e6:,.0f} MB agree with their checksums")
        return
    from fractal.reference import open_embedder
    from fractal.search import build, open_index
    from fractal.search.source import open_cells

    if args.add:
        open_index(path)  # an error before the work
    else:
        check_folder(path, OWN_FILES)
    began = time.perf_counter()
    embedder = open_embedder(args.reference, args.device) if args.reference else None
    with open_cells(args.add or args.input, embedder, args.use_rep, force=args.force) as source:
        if args.add:
            build.add(path, source, args.force)
        else:
            build.build(path, source, args.seed)
    seconds, index = time.perf_counter() - began, open_index(path).folder
    space, lists = index.space, len(index.centroids)
    kind = f"recipe {space.recipe}, {len(space.blocks)} blocks" if space.blocks else "vectors as they came, no prefixes"
    print(
        f"{path}: {index.cells:,} cells in {lists:,} list{'s' * (lists > 1)}, {kind}, {index.num_bytes / 1e6:,.0f} MB; "
        f"{source.cells.num_rows:,} cells in {seconds:,.0f} s"
    )
