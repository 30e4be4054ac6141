"""The picture of the README: the same held-out cells at every prefix, on maps that belong together; and it moves.

    uv run python train.py --input data/quality/fetal_organs/stratified.parquet --test-ratio 0.5 \\
        --output data/half_4L.pt
    uv run --group benchmarks python -m benchmarks.picture --model-path data/half_4L.pt \\
        --input data/quality/fetal_organs/stratified.parquet

The layouts are those of fractal/view/maps.py, of the test cells among themselves; they see no label. Each cell has the
colour of its class at the level that the prefix tells: one colour per system, shades of it below
(fractal/view/colours.py). docs/prefixes.png has a map per prefix, docs/prefixes_morph.png (APNG) moves from one to
the next.
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
from PIL import Image
from tqdm import tqdm

from fractal.base.errors import needs, run
from fractal.base.files import atomic_write
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas
from fractal.model.checkpoint import load
from fractal.model.embedding import embed_matrix
from fractal.score.checkpoints import choose_rows, of_one_split
from fractal.view.colours import colours_of
from fractal.view.maps import Maps, fit_maps

INK, FAINT = "#1a1a1a", "#8a8a8a"
WIDTH = 4.6  # inches of a map; its height is that of the layouts
MARGIN, HEAD = 0.06, 0.3  # around the layouts, which lie within [-1, 1], and above them for the title
NAMED = 4  # cells that a class has at least, else its name is left out
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
        "--num-samples", type=positive_int, default=20_000, help="test cells at most (default: %(default)s)"
    )
    parser.add_argument(
        "--per-type", type=positive_int, default=150, help="cells at most of one subtype (default: %(default)s)"
    )
    return parser


def draw_evenly(atlas: Atlas, rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the given rows of each subtype, drawn at random: one type would fill half the picture."""
    finest = atlas.finest[0][rows]
    shuffled = np.random.default_rng(0).permutation(len(rows))
    return np.sort(rows[np.concatenate([shuffled[finest[shuffled] == c][:count] for c in np.unique(finest)])])


def names_on(axes: Any, places: np.ndarray, codes: np.ndarray, names: list[str]) -> None:
    """Write each class's name beside the middle of its cells, off the cells and so that no two names overlap."""
    texts, middles = [], []
    for code in np.unique(codes):
        cells = places[codes == code]
        if len(cells) < NAMED:
            continue
        middle = cells[np.linalg.norm(cells - np.median(cells, axis=0), axis=1).argmin()]  # a place where a cell is
        name = "\n".join(textwrap.wrap(names[code], WRAP))
        text = axes.text(*middle, name, fontsize=7.5, color=INK, ha="center", va="center", linespacing=0.95)
        text.set_path_effects([patheffects.withStroke(linewidth=2.4, foreground="white")])
        texts.append(text)
        middles.append(middle)
    (x, y), (target_x, target_y) = places.T, np.array(middles).T
    needs("adjustText", "benchmarks").adjust_text(
        texts,
        x=x,
        y=y,
        target_x=target_x,
        target_y=target_y,
        ax=axes,
        expand=(1.06, 1.15),
        force_text=(0.3, 0.5),
        force_static=(0.05, 0.1),
        force_pull=(0.02, 0.03),
        ensure_inside_axes=True,
        iter_lim=500,
        min_arrow_len=4,
        arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.6, "shrinkA": 0, "shrinkB": 0},
    )


def draw(axes: Any, places: np.ndarray, colours: np.ndarray, limits: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(len(places))  # no class lies on top of the others
    axes.scatter(*places[order].T, c=colours[order], s=9, linewidths=0)
    axes.set(xlim=limits[:, 0], ylim=limits[:, 1], aspect="equal")
    axes.set_axis_off()


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    mpl.use("agg")
    adapter, checkpoint = load(args.model_path)
    (model,) = of_one_split([args.model_path], [(adapter, checkpoint)])
    atlas = Atlas.open(args.input)
    _, rows = choose_rows(model, atlas, args.num_samples, seed=0)
    cells = atlas.read(draw_evenly(atlas, np.sort(rows), args.per_type))
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

    low, high = maps.layouts.min((0, 1)) - MARGIN, maps.layouts.max((0, 1)) + MARGIN
    limits = np.array([low, high + np.array([0, HEAD])])
    wide, tall = WIDTH, WIDTH * np.ptp(limits[:, 1]) / np.ptp(limits[:, 0])

    def titled(axes: Any, j: int) -> None:
        axes.text(0.02, 0.99, titles[j], transform=axes.transAxes, fontsize=12, weight="bold", color=INK, va="top")
        axes.text(0.02, 0.925, below[j], transform=axes.transAxes, fontsize=9, color=FAINT, va="top")

    columns = 2 if len(ends) > 3 else len(ends)
    rows_of_maps = -(-len(ends) // columns)
    figure, grid = plt.subplots(
        rows_of_maps, columns, figsize=(wide * columns, tall * rows_of_maps), squeeze=False, facecolor="white"
    )
    figure.subplots_adjust(0, 0, 1, 1, 0.01, 0.01)
    for j, axes in enumerate(tqdm(grid.flat[: len(ends)], unit="map", desc="picture")):
        draw(axes, maps.layouts[j], colours[j], limits)
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
            figure, axes = plt.subplots(figsize=(wide, tall), facecolor="white")
            figure.subplots_adjust(0, 0, 1, 1)
            mixed = [(1 - share) * both[j] + share * both[nxt] for both in (maps.layouts, colours)]
            draw(axes, mixed[0], mixed[1], limits)
            titled(axes, j if share < 0.5 else nxt)
            if step == 0:
                names_on(axes, maps.layouts[j], cells.labels[:, levels[j]], cells.classes[levels[j]])
            frames.append(rendered(figure))
            durations.append(STEP if step else HOLD)
    with atomic_write(args.morph) as part:
        frames[0].save(part, format="PNG", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    print(f"{len(cells.labels):,} of {len(rows):,} test cells; written to {args.output} and {args.morph}")


def plural(level: str) -> str:
    return f"{level}s"


def rendered(figure: Any) -> Any:
    """A figure -> an image of 256 colours, so that the animation stays small."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=160)
        plt.close(figure)
        return Image.open(file).convert("RGB").quantize(256)


if __name__ == "__main__":
    run(main)
