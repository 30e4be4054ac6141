"""Simulated counts of genes, and an encoder of random weights for them, in the three files of SCimilarity's release.

    uv run python -m benchmarks.simulate_counts --output data/demo/counts

writes model_v1.1/ (encoder.ckpt, layer_sizes.json, gene_order.tsv), labelled.h5ad and new.h5ad. A type's mean
expression is the product of a base level and of what its system, lineage, type and subtype add in genes of their own;
counts are Poisson, cells differ in depth. Random weights keep near what is near, no more: vectors of this encoder are
for the mechanics alone and say nothing about SCimilarity.
"""

import argparse
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from fractal.base.errors import run
from fractal.base.files import atomic_write
from fractal.base.paths import check_paths
from fractal.data.encoder import CHECKPOINT, GENES, SIZES, new_network
from fractal.hierarchy.ontology import CL_SLIM, build_hierarchy, load_graph

NUM_GENES, HIDDEN, DIM = 6_000, (256, 256), 128
SYMBOLS = [f"GENE{i}" for i in range(NUM_GENES)]
MARKERS = (120, 80, 50, 40)  # genes that a system, a lineage, a type and a subtype raise, to about nine times the level
TYPES = [
    "B cell", "plasma cell", "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell",
    "natural killer cell", "classical monocyte", "macrophage", "mast cell", "neutrophil",
    "endothelial cell of artery", "vein endothelial cell", "endothelial cell of lymphatic vessel",
    "fibroblast", "myofibroblast cell", "smooth muscle cell", "cardiac muscle cell",
    "hepatocyte", "enterocyte", "goblet cell", "keratinocyte",
    "glutamatergic neuron", "GABAergic neuron", "astrocyte", "oligodendrocyte",
]  # fmt: skip


def write_encoder(folder: Path, seed: int = 0) -> None:
    """The three files; each appears whole, and replaces that of an older run."""
    torch.manual_seed(seed)
    state = new_network([NUM_GENES, *HIDDEN, DIM]).state_dict()
    sizes = {name: list(tensor.shape) for name, tensor in state.items()}
    with atomic_write(folder / SIZES) as part:
        part.write_text(json.dumps(sizes), encoding="utf-8")
    with atomic_write(folder / GENES) as part:
        part.write_text("\n".join(SYMBOLS) + "\n", encoding="utf-8")
    with atomic_write(folder / CHECKPOINT) as part, open(part, "wb") as file:
        torch.save({"state_dict": state}, file)


def mean_expression(seed: int) -> np.ndarray:
    """(types, genes) float64: the share that each gene has of a cell's counts."""
    rng = np.random.default_rng(seed)
    log = np.tile(rng.normal(-2, 1.5, NUM_GENES), (len(TYPES), 1))
    paths = [row.levels for row in build_hierarchy(TYPES, load_graph(CL_SLIM))]
    for level, size in enumerate(MARKERS):
        for node in sorted({path[: level + 1] for path in paths}):
            members = np.array([i for i, path in enumerate(paths) if path[: level + 1] == node])
            genes = rng.permutation(NUM_GENES)[:size]
            log[np.ix_(members, genes)] += rng.normal(2.2, 0.4, size)
    mean = np.exp(log)
    return mean / mean.sum(1, keepdims=True)


def simulate_cells(num_cells: int, seed: int) -> anndata.AnnData:
    """Cells of all TYPES in equal shares, 3,000 counts in the median; obs `cell_type` and `donor`."""
    rng = np.random.default_rng([seed, 1])
    kind = rng.integers(0, len(TYPES), num_cells)
    depth = rng.lognormal(np.log(3_000), 0.4, (num_cells, 1))
    counts = sp.csr_matrix(rng.poisson(depth * mean_expression(0)[kind]).astype(np.float32))
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(TYPES)[kind]),
            "donor": pd.Categorical(rng.choice(list("abcd"), num_cells)),
        },
        index=[f"cell{i}" for i in range(num_cells)],
    )
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=SYMBOLS))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/demo/counts"), help="(default: %(default)s)")
    parser.add_argument(
        "--cells", type=int, default=4_000, help="labelled cells, half as many new ones (default: 4000)"
    )
    args = parser.parse_args(argv)
    files = {name: args.output / f"{name}.h5ad" for name in ("labelled", "new")}
    check_paths({}, {f"--output {name}": path for name, path in files.items()})
    write_encoder(args.output / "model_v1.1")
    for seed, (name, path) in enumerate(files.items()):
        cells = simulate_cells(args.cells // (1 + seed), seed)
        with atomic_write(path) as part:
            cells.write_h5ad(part)
        print(f"{path}: {cells.n_obs:,} simulated cells of {len(TYPES)} types, {NUM_GENES:,} genes ({name})")


if __name__ == "__main__":
    run(main)
