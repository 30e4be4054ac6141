"""Apply an adapter to a whole file: the same cells, each with its fractal vector.

    uv run python embed.py --model-path data/fractal_adapter_4L.pt --input data/stratified.parquet

Parquet (of ingest.py or stratify.py) keeps all its other columns, and its metadata name the checkpoint, the recipe and
the blocks. A .npy file, a float matrix (cells, dim), is taken and written as well.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fractal.adapter import Adapter, load, pick_device
from fractal.atlas import fingerprint
from fractal.cli import InputError, positive_int, run
from fractal.vectors import open_vectors, writing_vectors

BATCH = 2_048  # cells; 4 MB of hidden units per layer, which stay in the cache


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model-path",
        type=Path,
        default=Path("data/fractal_adapter_4L.pt"),
        help="checkpoint of train.py (default: %(default)s)",
    )
    files.add_argument(
        "--input", type=Path, default=Path("data/stratified.parquet"), help="Parquet or .npy (default: %(default)s)"
    )
    files.add_argument(
        "--output",
        type=Path,
        default=Path("data/fractal_embeddings.parquet"),
        help="Parquet, or .npy for the vectors alone (default: %(default)s)",
    )
    vectors = parser.add_argument_group("vectors")
    vectors.add_argument(
        "--prefix", type=positive_int, help="keep this many blocks, of length 1 again (default: the full vector)"
    )
    vectors.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="float16 takes half the space; the other scripts read float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="auto takes CUDA, else MPS, else the CPU (default: %(default)s)",
    )
    return parser


@torch.inference_mode()
def embedded(adapter: Adapter, vectors: np.ndarray, prefix: int, device: torch.device) -> Iterator[Tensor]:
    """(n, dim) float32 -> per batch the first `prefix` blocks, or the full vectors if these are all blocks; on the CPU.

    The two differ: a published full vector is no longer prefix, but has passed one more norm.
    """
    for start in range(0, len(vectors), BATCH):
        x = torch.tensor(vectors[start : start + BATCH], device=device)  # a copy: the file's pages are read-only
        yield (adapter.encode(x) if prefix == adapter.num_levels else adapter.prefix(x, prefix)).cpu()


def block_widths(adapter: Adapter, device: torch.device) -> list[int]:
    """Numbers of each block."""
    probe = np.ones((1, adapter.dim), np.float32)
    dims = [next(embedded(adapter, probe, j, device)).shape[1] for j in range(1, adapter.num_levels + 1)]
    return np.diff(dims, prepend=0).tolist()


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = pick_device(args.device)
    adapter, checkpoint = load(args.model_path, device)
    source = open_vectors(args.input)
    config, levels = checkpoint["config"], adapter.num_levels
    prefix = args.prefix or levels
    if prefix > levels:
        raise InputError(f"{args.model_path}: has {levels} blocks, --prefix {prefix} asks for more")
    if b"checkpoint_sha256" in (source.schema.metadata or {}):
        raise InputError(f"{args.input}: its vectors come from embed.py; name the file that they were made of")
    if source.dim != adapter.dim:
        raise InputError(f"{args.input}: its vectors have {source.dim} numbers, {args.model_path} takes {adapter.dim}")
    if args.output.exists() and args.output.samefile(args.input):
        raise InputError(f"{args.output}: is the input; name another --output")
    widths = block_widths(adapter, device)
    dim, dtype = sum(widths[:prefix]), np.dtype(args.dtype)
    metadata = {
        "checkpoint_sha256": fingerprint(args.model_path),
        "recipe": config["recipe"],
        "num_levels": str(levels),
        "block_widths": json.dumps(widths),
        "prefix": str(prefix),
    }
    with (
        writing_vectors(args.output, source, dim, dtype, metadata) as append,
        tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="embed") as bar,
    ):
        for columns, vectors in source.chunks():
            out, row = np.empty((len(vectors), dim), dtype), 0
            for batch in embedded(adapter, vectors, prefix, device):
                out[row : row + len(batch)] = batch.numpy()
                row += len(batch)
                bar.update(len(batch))
            append(columns, out)
    print(
        f"{source.num_rows:,} cells, {'full vectors' if prefix == levels else f'prefix {prefix}'} of recipe "
        f"{config['recipe']}, {dim} numbers each as {dtype}, written to {args.output}"
    )


if __name__ == "__main__":
    run(main)
