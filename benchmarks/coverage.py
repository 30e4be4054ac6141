"""How often do 95 % intervals over studies hold the true share? Simulated studies, six intervals.

    uv run python -m benchmarks.coverage      # three minutes on a core

A method is right for a share p of all cells, and for another share of the cells of each study: a draw of a beta
distribution, or of a normal one on the logit scale, whose mean is p and whose correlation within studies is given. Of
2, 3, 5, 10 or 20 studies, of 200 cells each or of 20 to 2,000, an interval is made, 150 times. The tables have, over
all such settings, the lowest and the mean coverage, and the mean width. (Of 24 settings that cover .95 the lowest comes
out at about .91 by chance.)

  cells        Wilson's, as if all cells were independent
  resampled    bootstrap of whole studies, percentiles
  t            Student's, of the studies' shares
  t on logits  Student's, of the share of all cells on the logit scale, its variance that between studies
  effective n  Clopper and Pearson's, of an effective number of cells (Korn and Graubard 1998)
  ours         fractal.score.intervals.grouped_interval: beta-binomial
"""

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from scipy import special, stats
from tqdm import tqdm

from benchmarks.intervals import cluster_bootstrap, t_interval
from fractal.base.errors import run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import non_negative_int, positive_int
from fractal.score.intervals import grouped_interval, wilson_interval

STUDIES = [2, 3, 5, 10, 20]
SHARES = [0.5, 0.8, 0.95, 0.99]
CORRELATIONS = [0.02, 0.2, 0.5]
NORMAL = {0.02: 0.35, 0.2: 1.3, 0.5: 3.0}  # standard deviation of logits with about this correlation, at p = .8
Interval = Callable[[np.ndarray, np.ndarray], tuple[float, float]]  # hits (g,), sizes (g,) -> low, high


def over_cells(hits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    return wilson_interval(hits.sum(), sizes.sum())


def resampled(hits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    return cluster_bootstrap(hits / sizes, np.arange(len(hits)), sizes.astype(float))


def of_means(hits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    return t_interval(hits / sizes)


def variance(hits: np.ndarray, sizes: np.ndarray) -> float:
    """Of the share of all cells, by how it differs between studies (Taylor linearisation)."""
    weight, g = sizes / sizes.sum(), len(hits)
    return float(g / (g - 1) * (weight**2 * (hits / sizes - hits.sum() / sizes.sum()) ** 2).sum())


def on_logits(hits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    share, spread = hits.sum() / sizes.sum(), variance(hits, sizes) ** 0.5
    if not 0 < share < 1 or not spread:  # of so many studies
        return wilson_interval(share * len(hits), len(hits))
    half = stats.t.ppf(0.975, len(hits) - 1) * spread / (share * (1 - share))
    low, high = special.expit(special.logit(share) + np.array([-half, half]))
    return float(low), float(high)


def effective(hits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    share, spread, n = hits.sum() / sizes.sum(), variance(hits, sizes), sizes.sum()
    number = share * (1 - share) / spread if spread else float(len(hits))
    number *= (stats.t.ppf(0.975, n - 1) / stats.t.ppf(0.975, len(hits) - 1)) ** 2
    number = float(np.clip(number, 1, n))
    k = share * number
    low = stats.beta.ppf(0.025, k, number - k + 1) if k > 0 else 0.0
    return float(low), float(stats.beta.ppf(0.975, k + 1, number - k) if k < number else 1.0)


METHODS: dict[str, Interval] = {
    "cells": over_cells,
    "resampled": resampled,
    "t": of_means,
    "t on logits": on_logits,
    "effective n": effective,
    "ours": grouped_interval,
}


def draw(
    rng: np.random.Generator, studies: int, share: float, correlation: float, normal: bool, equal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """-> hits and sizes of the studies."""
    if normal:
        shares = special.expit(logit_mean(share, NORMAL[correlation]) + NORMAL[correlation] * rng.normal(size=studies))
    else:
        size = 1 / correlation - 1
        shares = rng.beta(share * size, (1 - share) * size, studies)
    sizes = np.full(studies, 200) if equal else np.exp(rng.uniform(np.log(20), np.log(2_000), studies)).astype(int)
    return rng.binomial(sizes, shares), sizes


def logit_mean(share: float, deviation: float) -> float:
    """The mean of normal logits with this deviation whose shares have this mean; by bisection."""
    points = stats.norm.ppf((np.arange(2_000) + 0.5) / 2_000) * deviation
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if special.expit(middle + points).mean() < share else (low, middle)
    return low


def coverage(studies: int, normal: bool, draws: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """-> method -> coverage and mean width (settings,)."""
    rng = np.random.default_rng([seed, studies, normal])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for share, correlation, equal in product(SHARES, CORRELATIONS, (False, True)):
        sample = [draw(rng, studies, share, correlation, normal, equal) for _ in range(draws)]
        for name, interval in METHODS.items():
            ends = np.clip([interval(*one) for one in sample], 0, 1)
            holds = (ends[:, 0] <= share) & (share <= ends[:, 1])
            found[name].append((float(holds.mean()), float((ends[:, 1] - ends[:, 0]).mean())))
    return {name: tuple(np.array(pairs).T) for name, pairs in found.items()}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=positive_int, default=150, help="of each setting (default: %(default)s)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("data/coverage.md"), help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    parts = []
    for normal in (False, True):
        found = [coverage(g, normal, args.draws, args.seed) for g in tqdm(STUDIES, unit="setting", desc="coverage")]
        rows = []
        for name in METHODS:
            cells = [(covers.min(), covers.mean(), width.mean()) for covers, width in (each[name] for each in found)]
            rows.append([name, *(f"{low:.2f}, {mean:.2f} ({width:.2f})" for low, mean, width in cells)])
        kind = "normal on the logit scale" if normal else "beta"
        title = f"Shares of studies: {kind}. Lowest and mean coverage (mean width)"
        parts.append(f"{title}\n\n{table(['Interval', *(f'{g} studies' for g in STUDIES)], rows)}\n")
    with atomic_write(args.output) as part:
        part.write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))


if __name__ == "__main__":
    run(main)
