"""Does an .h5ad of 1 million cells x 128 stream in bounded memory? Peak memory of embedding it, and a smaller file.

    uv run --extra h5ad python benchmarks/streaming.py

Random vectors, an untrained adapter of the default size: memory and speed do not depend on their values. Each size runs
in a process of its own, since a peak never falls again.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds its own folder only

from fractal.adapter import FractalAdapter
from fractal.anndata_io import add_obsm, embed_h5ad
from fractal.cli import positive_int, run
from fractal.vectors import CHUNK, open_h5ad

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
    return parser


def measure(cells: int) -> None:
    adapter = FractalAdapter(DIM, 4, 32, torch.arange(SUBTYPES)[:, None].expand(SUBTYPES, 4)).eval()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.h5ad", Path(folder) / "out.h5ad"
        anndata.AnnData(obs=pd.DataFrame(index=pd.RangeIndex(cells).astype(str))).write_h5ad(source)
        with open_h5ad(source, "r+") as file:
            array = add_obsm(file, "X_raw", cells, DIM)
            for start in range(0, cells, CHUNK):
                array[start : start + CHUNK] = rng.standard_normal((min(CHUNK, cells - start), DIM), np.float32)
        began = time.perf_counter()
        embed_h5ad(adapter, "fractal", "untrained", source, "X_raw", target)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
        size = target.stat().st_size / 2**20
        print(f"{cells:,} cells: {seconds:.0f} s, peak {peak:,.0f} MiB, file {size:,.0f} MiB", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if len(args.cells) == 1:
        measure(args.cells[0])
        return
    for cells in args.cells:
        subprocess.run([sys.executable, __file__, "--cells", str(cells)], check=True)


if __name__ == "__main__":
    run(main)
