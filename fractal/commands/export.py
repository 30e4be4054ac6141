"""An adapter -> ONNX, with one output per prefix; its vectors as int8; and cells into a vector database.

    fractal export --reference blood_reference --output blood.onnx
    fractal export --reference blood_reference --vectors cells.npy --int8-dir data/int8   # and int8 vectors
    fractal export --reference blood_reference --vectors cells.h5ad --to duckdb --output cells.duckdb

Input `x` (batch, dim) float32, any batch size. Outputs `prefix_1` (batch, scale_dim), `prefix_2`, ..., `full`, each of
length 1, so that a product of two is a cosine. The file is run once with onnxruntime and held against torch.

int8 vectors are a cell's values times 127 over the largest of them. Cosines do not depend on the factor.
"""

import argparse
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fractal.base.cli import InputError, needs, positive_int, run, table
from fractal.base.files import atomic_write, check_paths
from fractal.base.storage import place

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    from torch import Tensor, nn

    from fractal.model.adapter import Adapter

OPSET = 18  # onnxruntime-web runs it, with WebAssembly and with WebGPU
TOLERANCE = 1e-5
RECALL_CELLS = 5_000
DATABASES = ("lancedb", "duckdb", "qdrant", "parquet")
NEIGHBOURS = 10  # recall is the share of these that int8 vectors find again


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference",
        "--model-path",
        dest="model_path",
        type=Path,
        default=Path("data/fractal_adapter_4L.pt"),
        help="folder of `fractal fit`, or a checkpoint of train.py (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="what to write: an .onnx file (default: beside the checkpoint), or with --to a database (default: as "
        "data/cells.duckdb)",
    )
    vectors = parser.add_argument_group("int8 vectors")
    vectors.add_argument("--vectors", type=place, help="cells: .npy, Parquet, .h5ad, .zarr or TileDB")
    vectors.add_argument(
        "--use-rep",
        "--obsm",
        dest="use_rep",
        help="of an .h5ad: key of its vectors in obsm (default: the one that the reference was made with)",
    )
    vectors.add_argument("--int8-dir", type=Path, help="folder for prefix_1.npy, ... (default: data/int8)")
    vectors.add_argument(
        "--recall-cells",
        type=positive_int,
        help="cells whose neighbours are compared, drawn at random (default: 5000)",
    )
    database = parser.add_argument_group("vector database: cells with a prefix, the full vector and all their columns")
    database.add_argument(
        "--to", choices=DATABASES, help="what to write the cells of --vectors to; --output names the file or folder"
    )
    database.add_argument(
        "--prefix", type=positive_int, help="blocks of the prefix that makes a shortlist (default: all but the last)"
    )
    return parser


def output_names(adapter: "Adapter") -> list[str]:
    return [*(f"prefix_{j}" for j in range(1, adapter.num_levels)), "full"]


def prefixes_module(adapter: "Adapter") -> "nn.Module":
    """The adapter as a module that returns all prefixes, as fractal.model.adapter.embed does."""
    from torch import nn

    from fractal.model.adapter import truncate_blocks

    class Prefixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = adapter

        def forward(self, x: "Tensor") -> tuple["Tensor", ...]:
            blocks = adapter.blocks(x)
            return (*(truncate_blocks(blocks, j) for j in range(1, adapter.num_levels)), adapter.full(blocks))

    return Prefixes().eval()


def export(adapter: "Adapter", path: Path) -> float:
    """Write the ONNX file -> the largest difference between onnxruntime and torch on random cells of several batches.

    Raises InputError, and leaves no file, if that is above TOLERANCE.
    """
    import torch

    from fractal.model.adapter import embed

    needs("onnxscript", "onnx")  # torch's exporter is written in it
    runtime = needs("onnxruntime", "onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that nothing here uses
    module = prefixes_module(adapter)
    example = torch.randn(3, adapter.dim, generator=torch.Generator().manual_seed(0))
    with atomic_write(path) as part:
        torch.onnx.export(
            module,
            (example,),
            part,
            input_names=["x"],
            output_names=output_names(adapter),
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,  # one file
            verbose=False,
        )
        session = runtime.InferenceSession(part, providers=["CPUExecutionProvider"])
        worst = 0.0
        for size in (1, 2, 257):
            x = torch.randn(size, adapter.dim, generator=torch.Generator().manual_seed(size))
            for ours, theirs in zip(embed(adapter, x), session.run(None, {"x": x.numpy()}), strict=True):
                worst = max(worst, float(np.abs(ours.numpy() - theirs).max()))
        if not worst <= TOLERANCE:
            raise InputError(f"{path}: onnxruntime differs from torch by {worst:.1e}; try other versions of both")
    return worst


def quantize(vectors: np.ndarray) -> np.ndarray:
    """(n, dims) float32 -> int8: each row has a factor of its own, which no cosine sees, and so all of the range."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=1e-30)
    return np.rint(vectors * (127 / largest)).astype(np.int8)


def recall(exact: "Tensor", int8: "Tensor") -> tuple[float, float]:
    """-> the mean share of a cell's 10 nearest other cells that int8 vectors find again, and the cosine that is lost.

    The cells of a type lie so close together that which ten are nearest hangs on the last digits; the second figure,
    how much farther away (by exact cosine) the ten are that int8 vectors find, tells whether that matters.
    """
    import torch

    from fractal.search.exact import nearest

    ours, theirs = nearest(exact, k=NEIGHBOURS), nearest(int8.float(), k=NEIGHBOURS)
    again = (ours[:, :, None] == theirs[:, None, :]).any(2).float().mean().item()
    near, found = (torch.einsum("nd,nkd->", exact, exact[rows]).item() / rows.numel() for rows in (ours, theirs))
    return again, near - found


def write_int8(
    adapter: "Adapter", path: Path, obsm: str, folder: Path, recall_cells: int
) -> list[tuple[str, float, float]]:
    """Write an int8 .npy per prefix, rows as in the source, zeros for unusable cells -> per prefix what `recall` says.

    Recall is measured among `recall_cells` cells drawn at random, the only ones that are held.
    """
    import torch
    from tqdm import tqdm

    from fractal.data.cells import Cells
    from fractal.data.outputs import write_npy
    from fractal.data.vectors import CHUNK, usable
    from fractal.model.adapter import embed

    names, width = output_names(adapter), adapter.scale_dim
    with Cells.open(path, obsm, adapter.dim) as source, ExitStack() as stack:
        is_drawn = np.zeros(source.num_rows, bool)
        is_drawn[np.random.default_rng(0).permutation(source.num_rows)[:recall_cells]] = True
        kept, start = [list[torch.Tensor]() for _ in names], 0
        appends = [
            stack.enter_context(write_npy(folder / f"{name}.npy", source, j * width, np.dtype(np.int8), {}))
            for j, name in enumerate(names, 1)
        ]
        with tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="int8") as bar:
            for columns, chunk in source.chunks(CHUNK):
                good = usable(chunk)
                drawn = torch.from_numpy(is_drawn[start : start + len(chunk)][good])
                for append, prefix, part in zip(
                    appends, embed(adapter, torch.from_numpy(chunk[good])), kept, strict=True
                ):
                    out = np.zeros((len(chunk), prefix.shape[1]), np.int8)
                    out[good] = quantize(prefix.numpy())
                    append(columns, out)
                    part.append(prefix[drawn])
                start += len(chunk)
                bar.update(len(chunk))
        samples = [torch.cat(part) for part in kept]
        if len(samples[0]) <= NEIGHBOURS:
            raise InputError(f"{path}: {len(samples[0])} usable cells are too few to measure recall on")
    return [(n, *recall(s, torch.from_numpy(quantize(s.numpy())))) for n, s in zip(names, samples, strict=True)]


def to_database(args: argparse.Namespace) -> None:
    from fractal.commands import databases
    from fractal.model.embedding import Embedder

    if args.vectors is None or args.int8_dir or args.recall_cells:
        raise InputError(f"--to {args.to}: takes the cells of --vectors, and neither --int8-dir nor --recall-cells")
    output = args.output or Path(f"data/cells.{args.to}")
    inputs = {"--reference": args.model_path, "--vectors": args.vectors}
    in_folder = args.to in ("lancedb", "qdrant")
    check_paths(inputs, {} if in_folder else {"--output": output}, folders={"--output": output} if in_folder else {})
    embedder = Embedder.open(args.model_path)
    levels = embedder.adapter.num_levels
    prefix = args.prefix or levels - 1
    if prefix >= levels:
        raise InputError(f"--prefix {prefix}: {args.model_path} has {levels} blocks; a prefix has at most {levels - 1}")
    cells, left_out = databases.export(
        embedder, args.vectors, args.use_rep or embedder.use_rep, args.to, output, prefix
    )
    more = f"; left out {left_out:,} whose vector is zero or not finite" if left_out else ""
    print(f"{cells:,} cells, columns prefix_{prefix} and full, written to {output}{more}")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    from fractal.data.cells import Cells, has_obsm
    from fractal.model.embedding import Embedder

    if args.vectors is None and (args.use_rep or args.int8_dir or args.recall_cells):
        raise InputError("--use-rep, --int8-dir and --recall-cells are about --vectors; name those, or drop them")
    if args.use_rep and not has_obsm(args.vectors):
        raise InputError(
            f"--use-rep {args.use_rep}: only an .h5ad has several vectors, {args.vectors} is none; drop it"
        )
    if args.to:
        to_database(args)
        return
    if args.prefix:
        raise InputError("--prefix is about --to; name a database, or drop it")
    folder = args.int8_dir or Path("data/int8")
    embedder = Embedder.open(args.model_path)
    adapter, use_rep = embedder.adapter, args.use_rep or embedder.use_rep
    output = args.output or args.model_path.with_suffix(".onnx")
    int8 = [folder / f"{name}.npy" for name in output_names(adapter)] if args.vectors else []
    check_paths({"--reference": args.model_path, "--vectors": args.vectors}, {"--output": output, "--int8-dir": int8})
    if args.vectors:  # what is wrong with them is said before anything is written
        with Cells.open(args.vectors, use_rep, adapter.dim):
            pass
    worst = export(adapter, output)
    print(f"{output}: opset {OPSET}, outputs {', '.join(output_names(adapter))}; within {worst:.1e} of torch")
    if args.vectors:
        found = write_int8(adapter, args.vectors, use_rep, folder, args.recall_cells or RECALL_CELLS)
        print(f"\nint8 vectors in {folder}; of the {NEIGHBOURS} nearest: share found again, and cosine lost\n")
        rows = [[name, f"{again:.4f}", f"{1 - again:.4f}", f"{lost:.1e}"] for name, again, lost in found]
        print(table(["Prefix", "Recall", "Recall lost", "Cosine lost"], rows))


if __name__ == "__main__":
    run(main)
