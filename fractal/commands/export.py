"""An adapter as ONNX, with one output per prefix; or cells with their vectors as Parquet, for a vector database.

    fractal export --reference blood_reference --output blood.onnx
    fractal export --reference blood_reference --vectors cells.h5ad --to parquet --output cells.parquet

ONNX: input `x` (batch, dim) float32, any batch size. Outputs `prefix_1` (batch, scale_dim), `prefix_2`, ..., `full`,
each of length 1, so that a product of two is a cosine. The file is run once with onnxruntime and held against torch.

Parquet: `row`, the cell's number in the source; `cell_id` where the cells have names; every further column of the
source (of an .h5ad: obs); the prefix that makes a shortlist, `prefix_3` for three blocks; and `full`. Cells whose
vector is zero or not finite are left out. docs/databases.md loads it with LanceDB, DuckDB and Qdrant.
"""

import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fractal.base.errors import InputError, needs
from fractal.base.files import atomic_write
from fractal.base.paths import check_paths
from fractal.base.storage import locate
from fractal.commands.options import CHECKPOINT, add, command

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    from torch import Tensor, nn

    from fractal.commands.output import Chunks
    from fractal.data.cells import Cells
    from fractal.model.adapter import Adapter

OPSET = 18  # onnxruntime-web runs it, with WebAssembly and with WebGPU
TOLERANCE = 1e-5


def get_parser() -> argparse.ArgumentParser:
    parser = command("export", __doc__)
    add(parser, "--reference", default=CHECKPOINT)
    parser.add_argument(
        "--to", choices=["onnx", "parquet"], default="onnx", help="what to write (default: %(default)s)"
    )
    add(parser, "--output", help="file to write (default: an .onnx beside the checkpoint, or data/cells.parquet)")
    vectors = parser.add_argument_group("cells, for --to parquet")
    vectors.add_argument("--vectors", type=locate, help="cells: .npy, Parquet, .h5ad, .zarr or TileDB")
    add(vectors, "--use-rep")
    add(vectors, "--prefix", help="blocks of the prefix that makes a shortlist (default: all but the last)")
    add(vectors, "--force")
    return parser


def output_names(adapter: "Adapter") -> list[str]:
    return [*(f"prefix_{j}" for j in range(1, adapter.num_levels)), "full"]


def prefixes_module(adapter: "Adapter") -> "nn.Module":
    """The adapter as a module that returns all prefixes, as fractal.model.adapter.embed does."""
    from torch import nn

    class Prefixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = adapter

        def forward(self, x: "Tensor") -> tuple["Tensor", ...]:
            return tuple(adapter.prefixes(adapter.blocks(x)))

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


def check_names(cells: "Cells", prefix: int) -> None:
    """Raises InputError for columns whose names the export, or a database, would mix up."""
    if taken := {"row", f"prefix_{prefix}", "full"} & {*cells.column_names, *cells.schema.names}:
        raise InputError(f"{cells.path}: has a column '{min(taken)}', as the export writes one; rename it")
    folded = Counter(name.casefold() for name in cells.column_names)
    if twice := [name for name in cells.column_names if folded[name.casefold()] > 1]:
        raise InputError(
            f"{cells.path}: its columns {' and '.join(twice)} differ by case alone, and databases such as DuckDB "
            "rename one of them; rename it yourself"
        )


def exported(adapter: "Adapter", cells: "Cells", prefix: int) -> "Chunks":
    """The cells with usable vectors: their numbers, their columns and their vectors."""
    import pyarrow as pa
    import torch

    from fractal.data.vectors import CHUNK, usable
    from fractal.model.adapter import embed

    start, written = 0, 0
    for columns, vectors in cells.chunks(CHUNK, obs=True, progress="export"):
        rows = np.flatnonzero(usable(vectors))
        written += len(rows)
        if len(rows):
            prefixes = embed(adapter, torch.from_numpy(vectors[rows]))
            table = {"row": pa.array(start + rows)} | {name: columns[name].take(rows) for name in columns.column_names}
            for name, column in table.items():
                if pa.types.is_dictionary(column.type):  # no database takes one
                    table[name] = column.cast(column.type.value_type)
            yield pa.table(table), {f"prefix_{prefix}": prefixes[prefix - 1].numpy(), "full": prefixes[-1].numpy()}
        start += len(vectors)
    if not written:
        raise InputError(f"{cells.path}: every cell's vector is zero or not finite; make the embedding again")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    to_parquet = args.to == "parquet"
    if to_parquet != (args.vectors is not None):
        raise InputError("--to parquet and --vectors, the cells to write, go together; name both, or neither")
    if not to_parquet and (args.use_rep or args.prefix):
        raise InputError("--use-rep and --prefix are about --to parquet; drop them")
    beside = args.reference if isinstance(args.reference, Path) else Path(args.reference.name)  # a URI's: here
    args.output = args.output or (Path("data/cells.parquet") if to_parquet else beside.with_suffix(".onnx"))
    check_paths({"--reference": args.reference, "--vectors": args.vectors}, {"--output": args.output})
    from fractal.commands.output import write_parquet
    from fractal.reference import open_embedder

    embedder = open_embedder(args.reference)
    adapter, levels = embedder.adapter, embedder.adapter.num_levels
    if not to_parquet:
        worst = export(adapter, args.output)
        names = ", ".join(output_names(adapter))
        print(f"{args.output}: opset {OPSET}, outputs {names}; within {worst:.1e} of torch")
        return
    prefix = args.prefix or levels - 1
    if prefix >= levels:
        raise InputError(f"--prefix {prefix}: {args.reference} has {levels} blocks; a prefix has at most {levels - 1}")
    with embedder.open(args.vectors, args.use_rep, args.force) as cells:
        check_names(cells, prefix)
        metadata = {"recipe": embedder.recipe, "checkpoint_sha256": embedder.sha256}
        written = write_parquet(args.output, exported(adapter, cells, prefix), metadata)
    left_out = cells.num_rows - written
    more = f"; left out {left_out:,} whose vector is zero or not finite" if left_out else ""
    print(f"{written:,} cells, columns prefix_{prefix} and full, written to {args.output}{more}")
