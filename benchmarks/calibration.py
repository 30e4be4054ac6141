"""Does the simulated release score like the real one? The raw vectors beside the published row, and the room above.

    uv run python -m benchmarks.calibration

Every seed is a whole simulated atlas. The protocol is the published one: 5-NN by cosine, leave-one-out inside
queries that are drawn uniformly from all cells, so with the natural mix of types.

raw                the vectors as they are
LDA                linear discriminants of the subtypes, fitted on rows in the order of stratify.py that are no
                   queries; `bank`: the neighbours are those rows instead of the other queries
label-noise ceiling
                   the share of queries whose label is, at that level, the most frequent label among all cells of the
                   file that truly are of the query's type: the score of someone who knows what every cell is, and
                   guesses what its label says. What lies above is the labels' doing, not the vectors'.
"""

import argparse

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tqdm import tqdm

from benchmarks.quality import summary
from benchmarks.simulate import BLOCK, SimulatedAtlas
from fractal.base.errors import InputError, run
from fractal.base.table import table
from fractal.hierarchy.levels import LEVELS
from fractal.score.metrics import knn_accuracy, silhouette
from stratify import round_robin

PUBLISHED = (0.938, 0.916, 0.773, 0.749, 0.311)
NAMES = ("raw", "LDA", "LDA, bank", "label-noise ceiling")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000, help="cells in an atlas (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="atlases, seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=5_000, help="cells that are scored (default: %(default)s)")
    parser.add_argument("--train", type=int, default=100_000, help="rows that fit the LDA (default: %(default)s)")
    return parser


def score(vectors: np.ndarray, labels: np.ndarray) -> list[float]:
    """Leave-one-out accuracy at the four levels, then the silhouette of the systems."""
    x, y = torch.from_numpy(vectors), torch.from_numpy(labels)
    width = silhouette(x, y[:, 0])
    return [*knn_accuracy(x, y), float("nan") if width is None else width]


def calibrate(cells: int, seed: int, num_queries: int, num_train: int) -> dict[str, list[float]]:
    """The rows of the table for one atlas: by name, the accuracies and perhaps the silhouette."""
    atlas = SimulatedAtlas(cells, seed)
    queries = np.sort(np.random.default_rng([seed, 1]).permutation(cells)[:num_queries])
    order = round_robin(atlas.labels, seed)
    train = np.sort(order[~np.isin(order, queries)][:num_train])

    # one pass over the atlas: keep the vectors of these rows, count (true type, label) over all
    wanted = np.concatenate([queries, train])
    place = np.full(cells, -1)
    place[wanted] = np.arange(len(wanted))
    vectors = np.empty((len(wanted), 128), np.float32)
    true = np.empty(len(wanted), np.int64)
    joint = np.zeros((len(atlas.types), len(atlas.types)), np.int64)
    for i in tqdm(range(atlas.blocks), desc=f"seed {seed}", unit="block"):
        made, label, _, truth = atlas.block(i)
        slots = place[i * BLOCK : (i + 1) * BLOCK]
        kept = slots >= 0
        vectors[slots[kept]], true[slots[kept]] = made[kept], truth[kept]
        np.add.at(joint, (truth, label), 1)

    n, codes = len(queries), atlas.labels[wanted]
    labels = atlas.levels[codes]
    ceiling = []
    for level in range(len(LEVELS)):
        classes = np.eye(atlas.levels[:, level].max() + 1, dtype=np.int64)[atlas.levels[:, level]]
        guess = (joint @ classes).argmax(axis=1)  # (203,) the most frequent label of each true type
        ceiling.append(float((guess[true[:n]] == labels[:n, level]).mean()))

    lda = LinearDiscriminantAnalysis().fit(vectors[n:], codes[n:])
    linear = lda.transform(vectors).astype(np.float32)
    x, y = torch.from_numpy(linear), torch.from_numpy(labels)
    bank = knn_accuracy(x[:n], y[:n], x[n:], y[n:])
    scores = [score(vectors[:n], labels[:n]), score(linear[:n], labels[:n]), bank, ceiling]
    return dict(zip(NAMES, scores, strict=True))


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if min(args.seeds, args.queries - 5, args.train - 1) < 1 or args.queries + args.train > args.cells:
        raise InputError("--seeds and --train must be positive, --queries above 5, and both fit into --cells")
    runs = [calibrate(args.cells, seed, args.queries, args.train) for seed in range(args.seeds)]
    rows = [["published raw", *(f"{value:.3f}" for value in PUBLISHED)]]
    for name in NAMES:
        values = np.array([one[name] for one in runs])
        cells = [summary(list(column), args.seeds) for column in values.T]
        rows.append([f"simulated {name}", *cells, *["-"] * (5 - len(cells))])
    print(table(["", *LEVELS, "silhouette (system)"], rows))
    print(
        f"\n{args.cells:,} cells, {args.queries:,} queries, {args.train:,} training rows; "
        f"mean ± standard deviation (n - 1) of {args.seeds} seeds"
    )


if __name__ == "__main__":
    run(main)
