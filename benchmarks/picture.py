"""The picture of the README: the same held-out cells at every prefix, on maps that belong together; and it moves.

    uv run python train.py --input data/quality/fetal_organs/stratified.parquet --test-ratio 0.5 \\
        --output data/half_4L.pt
    uv run --group benchmarks python -m benchmarks.picture --model-path data/half_4L.pt \\
        --input data/quality/fetal_organs/stratified.parquet

The layouts are those of fractal/maps.py, of the test cells among themselves; they see no label. Each cell has the
colour of its class at the level that the prefix tells: one colour per system, shades of it below (fractal/colours.py).
docs/prefixes.png has a map per prefix, docs/prefixes_morph.png (APNG) moves from one to the next.
"""

import argparse
import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from tqdm import tqdm

import eval as evaluate
from fractal.adapter import load
from fractal.cli import needs, positive_int, run
from fractal.colours import colours_of
from fractal.embedding import embed_matrix
from fractal.files import atomic_write
from fractal.maps import Maps, fit_maps
from fractal.parquet import read_rows

INK, FAINT = "#1a1a1a", "#8a8a8a"
MARGIN = 1.06  # the maps lie within [-1, 1]
FRAMES = 8  # of one move from a prefix to the next
HOLD, STEP = 1_600, 70  # milliseconds that a prefix stays, and that a frame of a move does
WRAP = 19  # letters of a name in one line


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=Path("data/half_4L.pt"), help="checkpoint")
    parser.add_argument("--input", type=Path, default=Path("data/stratified.parquet"), help="what it was trained on")
    parser.add_argument("--maps", type=Path, help="file that keeps the layouts: a second run takes them from there")
    parser.add_argument("--output", type=Path, default=Path("docs/prefixes.png"), help="(default: %(default)s)")
    parser.add_argument(
        "--morph", type=Path, default=Path("docs/prefixes_morph.png"), help="the animation (default: %(default)s)"
    )
    parser.add_argument(
        "--num-samples", type=positive_int, default=5_000, help="test cells at most (default: %(default)s)"
    )
    return parser


def names_on(axes: Any, places: np.ndarray, codes: np.ndarray, names: list[str], alpha: float = 1.0) -> None:
    """Write each class's name beside the middle of its cells, so that no two names overlap."""
    texts, middles = [], []
    for code in np.unique(codes):
        cells = places[codes == code]
        middle = cells[np.linalg.norm(cells - np.median(cells, axis=0), axis=1).argmin()]  # a place where a cell is
        middles.append(middle)
        name = "\n".join(textwrap.wrap(names[code], WRAP))
        texts.append(
            axes.text(*middle, name, fontsize=7.5, color=INK, alpha=alpha, ha="center", va="center", linespacing=0.95)
        )
        texts[-1].set_path_effects([patheffects.withStroke(linewidth=2.4, foreground="white", alpha=alpha)])
    x, y = np.array(middles).T
    needs("adjustText", "benchmarks").adjust_text(
        texts,
        target_x=x,
        target_y=y,
        ax=axes,
        expand=(1.08, 1.12),
        ensure_inside_axes=True,
        iter_lim=300,
        arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.5, "alpha": alpha, "shrinkA": 0, "shrinkB": 0},
    )


def draw(axes: Any, places: np.ndarray, colours: np.ndarray, size: float) -> None:
    order = np.random.default_rng(0).permutation(len(places))  # no class lies on top of the others
    axes.scatter(*places[order].T, c=colours[order], s=size, linewidths=0)
    axes.set(xlim=(-MARGIN, MARGIN), ylim=(-MARGIN, MARGIN), aspect="equal")
    axes.set_axis_off()


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    mpl.use("agg")
    adapter, checkpoint = load(args.model_path)
    _, rows = evaluate.choose_rows(checkpoint, args.model_path, args.input, args.num_samples, seed=0)
    cells = read_rows(args.input, np.sort(rows))
    ends = [adapter.scale_dim * j for j in range(1, adapter.num_levels + 1)]
    if args.maps and args.maps.exists():
        maps = Maps.load(args.maps)
    else:
        maps = fit_maps(embed_matrix(adapter, cells.vectors)[0], ends)
        if args.maps:
            maps.save(args.maps)

    levels = list(checkpoint["config"].get("block_levels", range(len(ends))))
    paths = [tuple(cells.classes[k][c] for k, c in enumerate(row)) for row in cells.labels.tolist()]
    shades = colours_of(sorted(set(paths)))
    colours = [np.array([to_rgb(shades[path[: level + 1]]) for path in paths]) for level in levels]
    titles = [f"prefix {j + 1}" if end < ends[-1] else "full vector" for j, end in enumerate(ends)]
    below = [
        f"{end} numbers, {len(np.unique(cells.labels[:, level]))} {plural(cells.levels[level])}"
        for end, level in zip(ends, levels, strict=True)
    ]

    def titled(axes: Any, j: int) -> None:
        axes.text(0.02, 0.99, titles[j], transform=axes.transAxes, fontsize=12, weight="bold", color=INK, va="top")
        axes.text(0.02, 0.935, below[j], transform=axes.transAxes, fontsize=9, color=FAINT, va="top")

    columns = 2 if len(ends) > 3 else len(ends)
    rows_of_maps = -(-len(ends) // columns)
    figure, grid = plt.subplots(
        rows_of_maps, columns, figsize=(4.6 * columns, 4.6 * rows_of_maps), squeeze=False, facecolor="white"
    )
    figure.subplots_adjust(0, 0, 1, 1, 0.01, 0.01)
    for j, axes in enumerate(tqdm(grid.flat[: len(ends)], unit="map", desc="picture")):
        draw(axes, maps.layouts[j], colours[j], size=7)
        titled(axes, j)
        names_on(axes, maps.layouts[j], cells.labels[:, levels[j]], cells.classes[levels[j]])
    with atomic_write(args.output) as part:
        figure.savefig(part, format="png", dpi=200)
    plt.close(figure)

    frames, durations = [], []
    for j in tqdm(range(len(ends)), unit="prefix", desc="morph"):
        for step in range(FRAMES if j + 1 < len(ends) else 1):
            share = (1 - np.cos(np.pi * step / FRAMES)) / 2  # slow at both ends
            nxt = min(j + 1, len(ends) - 1)
            figure, axes = plt.subplots(figsize=(4.6, 4.6), facecolor="white")
            figure.subplots_adjust(0, 0, 1, 1)
            mixed = [(1 - share) * both[j] + share * both[nxt] for both in (maps.layouts, colours)]
            draw(axes, mixed[0], mixed[1], size=6)
            titled(axes, j if share < 0.5 else nxt)
            if step == 0:
                names_on(axes, maps.layouts[j], cells.labels[:, levels[j]], cells.classes[levels[j]])
            frames.append(rendered(figure))
            durations.append(STEP if step else HOLD)
    with atomic_write(args.morph) as part:
        frames[0].save(part, format="PNG", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    print(f"{len(rows):,} test cells drawn; written to {args.output} and {args.morph}")


def plural(level: str) -> str:
    return f"{level}s"


def rendered(figure: Any) -> Any:
    """A figure -> an image of 256 colours, so that the animation stays small."""
    image = needs("PIL.Image", "pictures")
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=160)
        plt.close(figure)
        return image.open(file).convert("RGB").quantize(256)


if __name__ == "__main__":
    run(main)
