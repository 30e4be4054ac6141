"""Which resolution of Leiden finds the systems, lineages and types on which prefix?

    export FRACTAL_REAL_DATA=...  # the folder that holds fetal_organs/
    uv run --group scanpy python -m benchmarks.leiden

Half of the cells are labelled and make a reference, the other half get its vectors and are clustered as in
docs/questions.md: cosine neighbours on a prefix, Leiden (igraph, two iterations). Each entry is the adjusted Rand index
of the clusters with the true labels of the prefix's level, and the number of clusters; means over the seeds, each of
which draws other halves. The raw vectors are clustered beside, and compared with every level.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import fractal
from benchmarks.quality import add_data, prepare
from fractal.base.errors import needs, run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas

RESOLUTIONS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
EXAMPLE = Path(__file__).parent.parent / "docs" / "example.md"


def fetal_organs(args: argparse.Namespace) -> Any:
    """AnnData with obsm["X_pca"] and obs["cell_type"], of the release in $FRACTAL_REAL_DATA."""
    path = prepare("fetal_organs", 0, args.data, args.output.parent / "quality")
    cells = Atlas.open(path).read(np.arange(Atlas.open(path).num_rows))
    anndata, pandas = needs("anndata", "h5ad"), needs("pandas", "h5ad")
    names = np.array(cells.classes[-1])[cells.labels[:, -1]]
    obs = pandas.DataFrame({"cell_type": names}, [f"cell {i}" for i in range(len(names))])
    return anndata.AnnData(obs=obs, obsm={"X_pca": cells.vectors})


def pbmc68k_reduced(args: argparse.Namespace) -> Any:
    """The same of scanpy's 700 cells, with the names of docs/example.md."""
    adata = needs("scanpy", "scanpy").datasets.pbmc68k_reduced()
    adata.obs_names_make_unique()
    names = dict(re.findall(r'^    "(.+?)": "(.+?)"', EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE))
    adata.obs["cell_type"] = adata.obs["bulk_labels"].astype(str).map(names)
    return adata


DATASETS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "fetal_organs": fetal_organs,
    "pbmc68k_reduced": pbmc68k_reduced,
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS), help="(default: all)")
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("data/leiden.md"), help="(default: %(default)s)")
    return parser


def clustered(adata: Any, vectors: np.ndarray, truth: list[np.ndarray]) -> np.ndarray:
    """Vectors (n, dims) -> (levels, resolutions, 2): adjusted Rand index with the labels (n,) of a level, clusters."""
    from sklearn.metrics import adjusted_rand_score

    scanpy = needs("scanpy", "scanpy")
    adata.obsm["X_prefix"] = vectors
    scanpy.pp.neighbors(adata, use_rep="X_prefix", metric="cosine")
    found = np.zeros((len(truth), len(RESOLUTIONS), 2))
    for column, resolution in enumerate(RESOLUTIONS):
        scanpy.tl.leiden(adata, resolution=resolution, flavor="igraph", n_iterations=2, directed=False)
        clusters = adata.obs["leiden"].to_numpy()
        for row, labels in enumerate(truth):
            found[row, column] = adjusted_rand_score(labels, clusters), len(set(clusters))
    return found


def run_once(adata: Any, seed: int) -> dict[tuple[str, str], np.ndarray]:
    """-> (vectors, level) -> (resolutions, 2)."""
    first = np.random.default_rng(seed).permutation(adata.n_obs) < adata.n_obs // 2
    new = adata[~first].copy()
    reference = fractal.fit(adata[first].copy(), labels="cell_type", use_rep="X_pca", seed=seed, device="cpu")
    reference.embed(new, force=True)
    blocks, tree = list(new.uns["fractal"]["levels"]), reference.annotator.tree.paths
    path_of = {names[-1]: names for names in tree}
    known = new.obs["cell_type"].isin(path_of).to_numpy()  # not a type whose few cells are all in this half
    new = new[known].copy()
    paths = np.array([path_of[name] for name in new.obs["cell_type"]])
    truth = {level: paths[:, k] for k, level in enumerate(reference.levels) if level in blocks}
    found = {}
    for j, level in enumerate(blocks, 1):
        prefix = fractal.truncate(new.obsm["X_fractal"], new.uns["fractal"], j)
        found[f"prefix {j}", level] = clustered(new, prefix, [truth[level]])[0]
    raw = clustered(new, new.obsm["X_pca"], list(truth.values()))
    return found | {("raw", level): rows for level, rows in zip(truth, raw, strict=True)}


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    jobs = [(dataset, seed) for dataset in args.datasets for seed in range(args.seeds)]
    found: dict[str, list[dict[tuple[str, str], np.ndarray]]] = {dataset: [] for dataset in args.datasets}
    cells = {}
    for dataset, seed in tqdm(jobs, unit="run", desc="leiden"):
        cells[dataset] = DATASETS[dataset](args)
        found[dataset].append(run_once(cells[dataset], seed))
    text = ""
    for dataset, runs in found.items():
        rows = []
        for vectors, level in runs[0]:
            mean = np.mean([one[vectors, level] for one in runs], 0)
            rows.append([vectors, level, *(f"{rand:.2f} ({count:.0f})" for rand, count in mean)])
        n = cells[dataset].n_obs
        text += f"\n{dataset}: {n - n // 2:,} new cells, {args.seeds} seeds; adjusted Rand index (clusters)\n\n"
        text += table(["Vectors", "Level", *(f"{resolution:g}" for resolution in RESOLUTIONS)], rows) + "\n"
    with atomic_write(args.output) as part:
        part.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
