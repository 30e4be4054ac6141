"""What unseen types gain when vectors show more of the cell itself, and what seen types pay for it.

    uv run python -m benchmarks.unseen --kinds types     # trains the adapters, once
    uv run python -m benchmarks.frontier                    # ten minutes on a core

The adapters of unseen.py, on the same draws of unseen types and the same test cells. Nothing is trained again: the
residual's weights are multiplied by 0 to 3 (1 is the default), with the recipe's sharpened probabilities and without.
The columns are leave-one-out 5-NN accuracy of the subtype, full vector: cells of unseen types; cells of seen types,
with unseen types among the queries; and without them. `own level` is the share of levels whose silhouette among the
seen types is best at their own prefix. `cell alone` is the residual without the classes. All figures are means over
the draws of an atlas. Writes frontier.md, frontier.json and the picture.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from benchmarks.unseen import ATLAS_SEEDS, ATLASES, TYPE_DRAWS
from fractal.base.errors import InputError, run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.data.atlas import Atlas
from fractal.model.adapter import FractalAdapter, embed
from fractal.model.checkpoint import load
from fractal.score.metrics import knn_predict, silhouette

MULTIPLIERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
FIGURES = ["unseen", "seen among unseen", "seen alone", "own level"]
OTHERS = ["raw", "mrl", "hce", "published"]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atlases", nargs="+", choices=ATLASES, default=ATLASES, help="(default: all)")
    parser.add_argument(
        "--folder", type=Path, default=Path("data/unseen"), help="output of unseen.py (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, default=Path("docs/frontier.png"), help="(default: %(default)s)")
    return parser


def settings(adapter: FractalAdapter) -> Iterator[str]:
    """Set one point of the curves after the other -> its name."""
    residual, sharpness = adapter.residual_scale.clone(), adapter.sharpness.clone()
    for sharpened in (True, False):
        adapter.sharpness.copy_(sharpness if sharpened else torch.ones_like(sharpness))
        for multiplier in MULTIPLIERS:
            adapter.residual_scale.copy_(multiplier * residual)
            yield f"residual x {multiplier:g}{'' if sharpened else ', not sharpened'}"
    adapter.block_scale.zero_()
    adapter.residual_scale.copy_(residual)
    yield "cell alone"


def figures(prefixes: list[Tensor], levels: list[int], labels: Tensor, seen: Tensor) -> list[float]:
    """`FIGURES` of the test cells' vectors, of which the last is the full one. levels: that of each prefix."""
    full = prefixes[-1]
    right = knn_predict(full, labels)[:, -1] == labels[:, -1]
    alone = knn_predict(full[seen], labels[seen])[:, -1] == labels[seen, -1]
    widths = [np.array([silhouette(e[seen], labels[seen, k]) for e in prefixes], float) for k in levels]
    told = [(j, width) for j, width in enumerate(widths) if np.isfinite(width).all()]  # NaN: a level of one class
    best = [bool(width[j] == width.max()) for j, width in told]
    shares = [right[~seen], right[seen], alone, torch.tensor(best)]
    return [share.double().mean().item() for share in shares]


def score_draw(stratified: Path, folder: Path) -> dict[str, list[float]]:
    """-> name -> `FIGURES`."""
    with np.load(folder / "cells.npz") as arrays:
        rows, seen = arrays["rows"], torch.from_numpy(arrays["seen"])
    cells = Atlas.open(stratified).read(rows)
    x, labels = torch.from_numpy(cells.vectors), torch.from_numpy(cells.labels)
    found = {}
    for name in OTHERS:
        adapter = None if name == "raw" else load(folder / f"{name}.pt")[0]
        full = normalize(x, dim=1) if adapter is None else embed(adapter, x)[-1]
        found[name] = figures([full], [], labels, seen)  # no own levels
    adapter, checkpoint = load(folder / "fractal.pt")
    for name in settings(cast(FractalAdapter, adapter)):
        found[name] = figures(embed(adapter, x), checkpoint["config"]["block_levels"], labels, seen)
    return found


def draw_picture(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A panel per atlas: unseen against seen types, with unseen types among the queries."""
    mpl.use("agg")
    figure, panels = plt.subplots(2, 2, figsize=(10, 8.8), layout="constrained")
    for atlas, axes in zip(found, panels.flat, strict=False):
        points = found[atlas]
        for ending, colour, label in (("", "tab:blue", "fractal"), (", not sharpened", "tab:orange", "not sharpened")):
            curve = np.array([points[f"residual x {m:g}{ending}"][:2] for m in MULTIPLIERS])
            axes.plot(curve[:, 1], curve[:, 0], "o-", color=colour, label=f"{label}, residual x 0 to 3", zorder=2)
            for m, (unseen, seen) in zip(MULTIPLIERS, curve, strict=True):
                if m in (0, 3):  # the ends; the default is marked
                    axes.annotate(
                        f"x{m:g}", (seen, unseen), xytext=(6, 4), textcoords="offset points", fontsize=8, color=colour
                    )
        for name, marker in zip(["cell alone", *OTHERS], "DsX^v", strict=True):
            axes.plot(*points[name][1::-1], marker, color="black", markersize=7, label=name, zorder=4)
        axes.plot(*points["residual x 1"][1::-1], "*", color="tab:red", markersize=15, label="the default", zorder=3)
        axes.set(title=atlas, xlabel="seen types, unseen ones among the queries", ylabel="unseen types")
        axes.grid(alpha=0.3)
        axes.margins(0.12)
        axes.locator_params(nbins=6)
    for axes in panels.flat[len(found) :]:
        axes.set_axis_off()
    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(
        "Leave-one-out 5-NN accuracy of the subtype, full vector, means over the draws; up and right is better"
    )
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    draws = {atlas: ATLAS_SEEDS if atlas == "simulated" else TYPE_DRAWS for atlas in args.atlases}
    found: dict[str, dict[str, list[float]]] = {}
    with tqdm(total=sum(draws.values()), unit="draw", desc="frontier") as bar:
        for atlas, number in draws.items():
            scores: list[dict[str, list[float]]] = []
            for seed in range(number):
                own = f"{atlas}_{seed}" if atlas == "simulated" else atlas
                folder = args.folder / f"types_{atlas}" / str(seed)
                if not (folder / "cells.npz").exists():
                    raise InputError(f"{folder}: no such run; make it with python -m benchmarks.unseen")
                scores.append(score_draw(args.folder / own / "stratified.parquet", folder))
                bar.update()
            found[atlas] = {name: np.mean([s[name] for s in scores], axis=0).tolist() for name in scores[0]}
    draw_picture(found, args.picture)
    sets: dict[str, Any] = {**found}
    if len(found) > 1:
        sets = {f"mean of {len(found)} sets": mean_of(found)} | sets
    text = "\n".join(
        f"{title}\n\n{table(['Vector', *FIGURES], [[name, *map(shown, own)] for name, own in points.items()])}\n"
        for title, points in sets.items()
    )
    for name, content in (("frontier.md", text), ("frontier.json", json.dumps(found, indent=1) + "\n")):
        with atomic_write(args.folder / name) as part:
            part.write_text(content, encoding="utf-8")
    print(f"\n{text}\nwritten to {args.picture}")


def mean_of(found: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    names = next(iter(found.values()))
    return {name: np.mean([points[name] for points in found.values()], axis=0).tolist() for name in names}


def shown(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"


if __name__ == "__main__":
    run(main)
