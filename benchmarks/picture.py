"""The picture of the README: the same test cells at every prefix, and accuracy and silhouette as matrices.

    uv run python -m benchmarks.picture --model-path data/fractal_adapter_4L.pt --input data/stratified.parquet

Above, each prefix's vectors laid out in the plane by t-SNE (scikit-learn), coloured by its own level: where the next
prefix splits an island, its level's classes come apart. Below, leave-one-out 5-NN accuracy and cosine silhouette.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.manifold import TSNE
from tqdm import tqdm

import eval as evaluate
from fractal.adapter import embed, load
from fractal.cli import positive_int, run
from fractal.files import atomic_write
from fractal.metrics import knn_accuracy, silhouette
from fractal.parquet import read_rows


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=Path("data/fractal_adapter_4L.pt"), help="checkpoint")
    parser.add_argument("--input", type=Path, default=Path("data/stratified.parquet"), help="what it was trained on")
    parser.add_argument("--output", type=Path, default=Path("docs/prefixes.png"), help="(default: %(default)s)")
    parser.add_argument("--title", default="", help="a line above the picture")
    parser.add_argument(
        "--num-samples", type=positive_int, default=2_000, help="test cells drawn (default: %(default)s)"
    )
    return parser


def matrix(
    axes: plt.Axes,
    values: Sequence[Sequence[float | None]],
    names: list[str],
    levels: Sequence[str],
    title: str,
    low: float,
) -> None:
    """Embeddings down, levels across; a level of one class stays empty."""
    shown = np.array([[np.nan if v is None else v for v in row] for row in values])
    axes.imshow(shown, cmap="viridis", vmin=low, vmax=1, aspect="auto")
    axes.set_xticks(range(len(levels)), levels)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title, fontsize=10)
    for (i, j), value in np.ndenumerate(shown):
        if np.isfinite(value):
            colour = "black" if value > (1 + 2 * low) / 3 else "white"
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=9)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    mpl.use("agg")
    adapter, checkpoint = load(args.model_path)
    _, rows = evaluate.choose_rows(checkpoint, args.model_path, args.input, args.num_samples, seed=0)
    cells = read_rows(args.input, rows)
    labels, vectors = torch.from_numpy(cells.labels), torch.from_numpy(cells.vectors)
    prefixes = embed(adapter, vectors)
    names = [f"prefix {j + 1}" for j in range(len(prefixes) - 1)] + ["full"]
    blocks = checkpoint["config"].get("block_levels", range(len(prefixes)))

    figure = plt.figure(figsize=(3.2 * len(prefixes), 6.4), layout="constrained")
    above, below = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(1.2, 1)))
    for j, axes in enumerate(tqdm(above.subplots(1, len(prefixes)), unit="map", desc="t-SNE")):
        plane = TSNE(metric="cosine", init="random", random_state=0).fit_transform(prefixes[j].numpy())
        level = blocks[j]
        # 20 colours, repeated: beyond that neighbours may share one, islands are still seen
        axes.scatter(*plane.T, c=labels[:, level] % 20, cmap="tab20", s=3, linewidths=0)
        classes = len(labels[:, level].unique())
        axes.set_title(f"{names[j]}, coloured by {cells.levels[level]} ({classes})", fontsize=10)
        axes.set_axis_off()
    left, right = below.subplots(1, 2)
    rows_shown, all_names = [vectors, *prefixes], ["raw", *names]
    matrix(
        left,
        [knn_accuracy(e, labels) for e in rows_shown],
        all_names,
        cells.levels,
        "5-NN accuracy (leave-one-out)",
        0.5,
    )
    widths = [[silhouette(e, labels[:, k]) for k in range(len(cells.levels))] for e in rows_shown]
    matrix(right, widths, all_names, cells.levels, "silhouette (cosine)", -1)
    figure.suptitle(args.title or f"{len(rows):,} test cells of {args.input}", fontsize=11)
    with atomic_write(args.output) as part:
        figure.savefig(part, format="png", dpi=110)
    print(f"written to {args.output}")


if __name__ == "__main__":
    run(main)
