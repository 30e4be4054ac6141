"""Does an .h5ad of 1 million cells x 128 stream in bounded memory? Peaks of embedding and annotating, at two sizes.

    uv run python -m benchmarks.streaming --reference FOLDER

Random vectors; embedded by an untrained adapter of the default size, annotated with a reference for
vectors of 128 numbers. Memory and speed do not depend on their values. Each run is a process of its own, since a peak
never falls again.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from fractal.base.errors import run
from fractal.commands import annotate, embed
from fractal.commands.options import positive_int
from fractal.data.h5ad import open_h5ad
from fractal.data.vectors import CHUNK
from fractal.data.writers import add_obsm
from fractal.hierarchy.levels import LEVELS
from fractal.model.checkpoint import build_adapter, save

DIM, SUBTYPES = 128, 203


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cells",
        type=positive_int,
        nargs="+",
        default=[100_000, 1_000_000],
        help="sizes of the files; 1 million cells take 1 GB of disk (default: 100000 1000000)",
    )
    parser.add_argument("--reference", type=Path, help="also annotate, with this folder of `fractal reference`")
    parser.add_argument("--only", choices=["embed", "annotate"], help=argparse.SUPPRESS)  # in a process of its own
    return parser


def embed_untrained(source: Path, target: Path) -> None:
    paths = np.arange(SUBTYPES)[:, None].repeat(4, 1).tolist()
    config = {"recipe": "fractal", "dim": DIM, "num_levels": 4, "scale_dim": 32, "paths": paths}
    config |= {"levels": list(LEVELS), "block_levels": [0, 1, 2, 3]}
    classes = [[f"type {i:03}" for i in range(SUBTYPES)]] * 4
    checkpoint = source.with_name("untrained.pt")
    save(
        checkpoint, build_adapter(config, classes), config, classes, split={}, training={}, versions={}, validation=None
    )
    flags = ["--model-path", str(checkpoint), "--use-rep", "X_raw", "--device", "cpu"]
    embed.main([str(source), *flags, "--output", str(target)])


def measure(cells: int, name: str, do: Callable[[Path, Path], None]) -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.h5ad", Path(folder) / "out.h5ad"
        anndata.AnnData(obs=pd.DataFrame(index=pd.RangeIndex(cells).astype(str))).write_h5ad(source)
        with open_h5ad(source, "r+") as file:
            array = add_obsm(file, "X_raw", cells, DIM)
            for start in range(0, cells, CHUNK):
                array[start : start + CHUNK] = rng.standard_normal((min(CHUNK, cells - start), DIM), np.float32)
        began = time.perf_counter()
        do(source, target)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
        size = target.stat().st_size / 2**20
        print(f"{name}, {cells:,} cells: {seconds:.0f} s, peak {peak:,.0f} MiB, file {size:,.0f} MiB", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.only:
        flags = ["--reference", str(args.reference), "--obsm", "X_raw"]

        def label(source: Path, target: Path) -> None:
            annotate.main([*flags, "--input", str(source), "--output", str(target)])

        measure(args.cells[0], args.only, embed_untrained if args.only == "embed" else label)
        return
    more = ["--reference", str(args.reference)] if args.reference else []
    for name in ("embed", "annotate") if args.reference else ("embed",):
        for cells in args.cells:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.streaming", "--cells", str(cells), "--only", name, *more], check=True
            )


if __name__ == "__main__":
    run(main)
