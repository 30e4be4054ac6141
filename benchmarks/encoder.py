"""`fractal encode` beside the package scimilarity: the same vectors, cells a second, memory.

    uv run python -m benchmarks.encoder --cells 100000
    uv run python -m benchmarks.encoder --cells 100000 --peer OTHER/bin/python     # an environment with scimilarity

The encoder has the real size (28,231 genes, 1,024, 1,024, 128) and random weights: its vectors mean nothing. Counts are
simulated: sparse, Poisson around log-normal means, about 2,000 genes a cell. scimilarity needs an older zarr than this
project, so it runs in an environment of its own. Each run is a process of its own that reads the .h5ad and writes the
vectors; seconds are those of the whole process, memory is its peak.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from fractal.base.errors import InputError, run
from fractal.base.table import table
from fractal.data.encoder import new_network

WIDTHS = [28_231, 1_024, 1_024, 128]
OURS = """
import sys, anndata, numpy as np, fractal
adata = anndata.read_h5ad(sys.argv[1], backed="r")
fractal.encode(adata, sys.argv[2])
np.save(sys.argv[3], adata.obsm["X_scimilarity"])
"""
THEIRS = """
import sys, anndata, numpy as np
from scimilarity import CellEmbedding
from scimilarity.utils import align_dataset, lognorm_counts
encoder = CellEmbedding(sys.argv[2])
adata = anndata.read_h5ad(sys.argv[1])
adata.layers["counts"] = adata.X
np.save(sys.argv[3], encoder.get_embeddings(lognorm_counts(align_dataset(adata, encoder.gene_order)).X))
"""


def write_model(folder: Path, genes: list[str]) -> None:
    torch.manual_seed(0)
    network = new_network([len(genes), *WIDTHS[1:]]).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            state = {name: torch.rand_like(tensor.float()) + 0.5 for name, tensor in module.state_dict().items()}
            module.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    torch.save({"state_dict": state}, folder / "encoder.ckpt")
    (folder / "layer_sizes.json").write_text(json.dumps({name: list(t.shape) for name, t in state.items()}))
    (folder / "gene_order.tsv").write_text("\n".join(genes) + "\n")
    (folder / "label_ints.csv").write_text(",0\n0,T cell\n")


def write_cells(path: Path, num_cells: int, genes: list[str]) -> None:
    """Counts in blocks of 5,000 cells; 25,000 of the model's genes and 5,000 others."""
    rng = np.random.default_rng(0)
    names = [*rng.permutation(genes)[:25_000], *(f"OTHER{i}" for i in range(5_000))]
    mean = rng.lognormal(-3.2, 1.9, len(names)).clip(max=20)
    blocks = [
        sp.csr_matrix(
            rng.poisson(np.outer(rng.lognormal(0, 0.4, min(5_000, num_cells - start)), mean)).astype("float32")
        )
        for start in range(0, num_cells, 5_000)
    ]
    anndata.AnnData(sp.vstack(blocks, format="csr"), var=pd.DataFrame(index=names)).write_h5ad(path)


PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""  # kB, of this program alone: getrusage counts what the parent had before


def timed(python: str, code: str, arguments: list[Path]) -> tuple[float, float]:
    """Run it -> seconds of the process, and its peak memory in GB."""
    began = time.perf_counter()
    command = [python, "-W", "ignore", "-c", code + PEAK, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"{python}: ended with {done.returncode}")
    return time.perf_counter() - began, int(done.stdout.split()[-1]) / 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=Path, help="a gene_order.tsv (default: made-up names)")
    parser.add_argument("--peer", help="Python of an environment with scimilarity")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("data/encoder"))
    args = parser.parse_args(argv)
    # In alphabetical order, as SCimilarity's are: scimilarity 0.4.1 with anndata 0.12 puts genes into that order.
    genes = args.genes.read_text().split() if args.genes else [f"GENE{i:05}" for i in range(WIDTHS[0])]
    model, cells = args.folder / "model", args.folder / f"cells_{args.cells}.h5ad"
    write_model(model, genes)
    if not cells.exists():
        write_cells(cells, args.cells, genes)
    runs = {"fractal": (sys.executable, OURS)} | ({"scimilarity": (args.peer, THEIRS)} if args.peer else {})
    measured = {name: list[tuple[float, float]]() for name in runs}
    for _ in range(args.rounds):
        for name, (python, code) in runs.items():
            measured[name].append(timed(python, code, [cells, model, args.folder / f"{name}.npy"]))
    rows = []
    for name, values in measured.items():
        seconds = [s for s, _ in values]
        middle = statistics.median(seconds)
        rows.append([name, f"{middle:.1f} ({min(seconds):.1f} to {max(seconds):.1f})", f"{args.cells / middle:,.0f}",
                     f"{statistics.median(gb for _, gb in values):.2f}"])  # fmt: skip
    print(table(["", "seconds", "cells a second", "GB"], rows))
    if args.peer:
        ours, theirs = (np.load(args.folder / f"{name}.npy") for name in runs)
        print(f"\nlargest difference of a number: {np.abs(ours - theirs).max():.1e}")


if __name__ == "__main__":
    run(main)
