"""Panels of the report, drawn by matplotlib: as SVG whose text stays text, and as files.

A panel is about 340 units wide with letters of 12, so that on a phone, where one takes the whole width, it can be read
as on a desk. On a page the colours are CSS variables, light or dark as the reader's screen is.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from fractal.base.errors import printable
from fractal.base.files import atomic_write

if TYPE_CHECKING:  # matplotlib takes half a second to load
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 340, 250  # units of a panel: CSS pixels, and points of a file
MAX_NAME = 60  # letters of a name from a file
LIGHT_TEXT = 0.55  # opacity of a filled cell above which its number is light

# Okabe and Ito (2008): distinct for all kinds of colour vision. c0 ... c3 are series; good is c0 and bad is c1.
LIGHT = {
    "ink": "#1b1f24", "soft": "#5b6470", "grid": "#dde1e6", "paper": "#fefefe", "card": "#f6f8fa", "none": "#c3cad3",
    "c0": "#0072b2", "c1": "#d55e00", "c2": "#009e73", "c3": "#a8467f", "onfull": "#fffffe",
}  # fmt: skip
DARK = {
    "ink": "#e6e9ed", "soft": "#9aa4b0", "grid": "#343b44", "paper": "#14181d", "card": "#1c2128", "none": "#4a535e",
    "c0": "#56b4e9", "c1": "#f0925a", "c2": "#3fc79d", "c3": "#e39bc5", "onfull": "#0b0e11",
}  # fmt: skip
INK, SOFT, GRID, PAPER, NONE, ON_FULL = (LIGHT[name] for name in ("ink", "soft", "grid", "paper", "none", "onfull"))
GOOD, BAD = LIGHT["c0"], LIGHT["c1"]
SERIES = [(LIGHT["c0"], "o", "-"), (LIGHT["c1"], "s", "--"), (LIGHT["c2"], "D", ":"), (LIGHT["c3"], "^", "-.")]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "fractal", "font.family": "DejaVu Sans", "font.size": 11,
    "text.parse_math": False, "text.color": INK,
    "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": INK,
    "axes.edgecolor": GRID, "axes.labelcolor": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "axes.titlepad": 8, "axes.facecolor": "none",
    "figure.facecolor": "none", "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT, "xtick.labelsize": 10, "ytick.labelsize": 10, "grid.color": GRID, "legend.frameon": False,
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """A picture of one pair of axes."""

    title: str
    draw: Callable[["Axes"], None]
    width: float = WIDTH
    height: float = HEIGHT


Line = Sequence[tuple[float, float, Sequence[float] | None]]  # x, value and 95 % interval (or None) per point


@dataclass(frozen=True)
class Box:
    """A rectangle with a text; its left, top, width and height in cells of a grid."""

    x: float
    y: float
    text: str
    colour: str
    opacity: float = 1.0
    width: float = 1.0
    height: float = 1.0
    framed: bool = False


def short(name: object, letters: int = MAX_NAME) -> str:
    """A name from a file: one line, no control characters, not too long."""
    text = printable(" ".join(str(name)[: 4 * letters].split()))
    return text if len(text) <= letters else text[: letters - 1] + "…"


def share(value: float | None, digits: int = 3) -> str:
    """As in the house's tables, without the 0: .953."""
    return "–" if value is None else f"{value:.{digits}f}".replace("0.", ".", 1)


def curve(ax: "Axes", i: int, x: Sequence[float] | np.ndarray, y: Sequence[float], intervals: Sequence[Any]) -> None:
    """The i-th series, with upright bars over its intervals (low, high)."""
    colour, marker, dashes = SERIES[i]
    error = np.abs(np.reshape(intervals, (-1, 2)).T - y)
    ax.errorbar(x, y, error, color=colour, marker=marker, linestyle=dashes, markersize=6)


def lines(
    title: str,
    ticks: Sequence[tuple[float, str]],
    series: Sequence[Line],
    low: float,
    raw: float,
    best: tuple[float, float],
) -> Panel:
    """Shares from `low` to 1, with intervals; the values of the first line are written beside it.

    ticks: x and its text; raw: where a dotted line is; best: x and value on the first line, which a ring marks.
    """

    def draw(ax: "Axes") -> None:
        gap = 0.03 * max(ticks[-1][0] - ticks[0][0], 0.3)  # between the intervals of series that share an x
        shift = -gap * (len(series) - 1) / 2
        for i, line in enumerate(series):
            intervals = [interval or (value, value) for _, value, interval in line]
            curve(ax, i, [x + shift + gap * i for x, *_ in line], [value for _, value, _ in line], intervals)
        for x, value, interval in series[0]:
            top = x + shift, interval[1] if interval else value
            ax.annotate(share(value), top, (0, 5), textcoords="offset points", ha="center", fontsize=10)
        ax.axhline(raw, color=SOFT, linestyle=":")
        ax.set_title(f"raw {share(raw)}", loc="right", fontsize=10, color=SOFT, weight="normal")
        ax.plot(best[0] + shift, best[1], "o", color=INK, markersize=14, markerfacecolor="none")
        ax.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
        ax.set_ylim(low, 1 + 0.09 * (1 - low))
        ax.locator_params(axis="y", nbins=5)
        ax.grid(axis="y")
        ax.margins(x=0.12)

    return Panel(title, draw)


def floor(values: Sequence[float]) -> float:
    """Where an axis of shares begins: the next lower tenth, at most .9."""
    return max(0.0, (min([0.9, *values]) * 10 + 1e-9) // 1 / 10)


def boxes(
    title: str,
    filled: Sequence[Box],
    rows: Sequence[str],
    columns: Sequence[str],
    width: float = WIDTH,
    size: float = 28,
    borders: Sequence[int] = (),
) -> Panel:
    """Filled boxes in a grid with names of its rows, whose height is `size`, and columns, above these.

    borders: rows, and columns as well, before which a line parts the grid. A text that has no room is left out.
    """
    letters, bottom = min(10, 0.7 * size), max(box.y + box.height for box in filled)

    def draw(ax: "Axes") -> None:
        for box in filled:
            edge, line, order = (INK, 2, 3) if box.framed else (PAPER, 1.2, 1)
            bar = ax.barh(box.y, box.width, box.height, box.x, align="edge", facecolor=(box.colour, box.opacity))
            bar[0].set(edgecolor=edge, linewidth=line, zorder=order)
            ink = ON_FULL if box.opacity > LIGHT_TEXT and box.colour != NONE else INK
            if size * box.height >= 10:
                middle = box.x + box.width / 2, box.y + box.height / 2
                ax.text(*middle, box.text, ha="center", va="center", fontsize=letters, color=ink)
        for border in borders:
            ax.axhline(border, color=SOFT, linewidth=0.8)
            ax.axvline(border, color=SOFT, linewidth=0.8)
        for set_ticks, names in ((ax.set_yticks, rows), (ax.set_xticks, columns)):
            set_ticks(np.arange(len(names)) + 0.5, names, color=INK, fontsize=letters)
        ax.set_ylim(bottom, 0)
        ax.set_xlim(0, max(box.x + box.width for box in filled))
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)

    return Panel(title, draw, width, 56 + size * bottom)


def calibration(title: str, curves: Sequence[Sequence[dict[str, Any]]]) -> Panel:
    """Reliability: per curve its bins, each with probability, accuracy, interval and cells; the numbers count cells."""

    def draw(ax: "Axes") -> None:
        ax.plot([0, 1], [0, 1], color=SOFT, linestyle=":")
        for i, bins in enumerate(curves):
            x, y, intervals = ([bin[key] for bin in bins] for key in ("probability", "accuracy", "interval"))
            curve(ax, i, x, y, intervals)
            most = max((bin["cells"] for bin in bins), default=1)
            bottom = -0.2 * (i + 1)  # a strip of bars below the curves
            for bin in bins:
                tall = 0.12 * bin["cells"] / most
                ax.bar(bin["middle"], tall, 0.05, bottom, color=SERIES[i][0], alpha=0.6)
                ax.text(bin["middle"], bottom + tall, compact(bin["cells"]), ha="center", va="bottom", fontsize=9)
        ax.set_yticks(np.linspace(0, 1, 5))
        ax.set_xticks(np.linspace(0, 1, 5), ["0", ".25", ".50", ".75", "1"])
        ax.set_ylim(-0.2 * len(curves), 1.04)
        ax.set_xlabel("probability given")
        ax.grid(axis="y")

    return Panel(title, draw, height=HEIGHT + 44 * len(curves))


def compact(count: int) -> str:
    return f"{count:,}" if count < 1000 else f"{count / 1000:.1f}k" if count < 100_000 else f"{count / 1000:.0f}k"


def legend(entries: Sequence[tuple[str, int | str]]) -> Panel:
    """Names of series by their number, of areas by their colour, of the dotted line by ":"."""

    def draw(ax: "Axes") -> None:
        for name, kind in entries:
            if isinstance(kind, int):
                colour, marker, dashes = SERIES[kind]
                ax.plot([], [], color=colour, marker=marker, linestyle=dashes, label=name)
            elif kind == ":":
                ax.plot([], [], color=SOFT, linestyle=":", label=name)
            else:
                ax.bar([0], [0], color=kind, label=name)
        ax.axis("off")
        ax.set_title("")
        ax.legend(loc="upper left", borderaxespad=0, fontsize=11, handlelength=2.6)

    return Panel("; ".join(name for name, _ in entries), draw, height=14 + 18 * len(entries))


def drawn(panels: Sequence[Panel], columns: int, kind: str, **options: Any) -> bytes:
    """The panels row by row as one figure, a unit is a point -> a file's bytes, "svg" or "png"."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights, columns = [max(panel.height for panel in row) for row in rows], min(columns, len(panels))
    size = columns * max(panel.width for panel in panels) / 72, sum(heights) / 72
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
        figure = Figure(size, layout="constrained")
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for i, panel in enumerate(panels):
            ax = figure.add_subplot(grid[i // columns, i % columns])
            ax.set_title(panel.title)
            panel.draw(ax)
        figure.savefig(file, format=kind, **options)
    return file.getvalue()


def inline(panel: Panel, number: str) -> Markup:
    """The panel as an element of a page. `number`: of the panel on the page; ids begin with it.

    Only ids that something refers to stay. A screen reader says the title, not each number.
    """
    image = drawn([panel], 1, "svg").decode()
    image = " ".join(image[image.index("<defs>") :].split())  # less the head, the metadata and line breaks
    image = re.sub(r' id="([^"]+)"', lambda id: f' id="{number}-{id[1]}"' if f"#{id[1]}" in image else "", image)
    image = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{number}-", image)
    names = {value: name for name, value in LIGHT.items()}
    image = re.sub(r"#[0-9a-f]{6}\b", lambda hex: f"var(--{names[hex[0]]})" if hex[0] in names else hex[0], image)
    image = image.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    box = f'viewBox="0 0 {panel.width:g} {panel.height:g}" width="{panel.width:g}" height="{panel.height:g}"'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return Markup(f'<svg {spaces} {box} role="img"><title>{escape(panel.title)}</title>{image}')


def write_files(folder: Path, name: str, panels: Sequence[Panel]) -> None:
    """The panels side by side, as .svg and .png of two pixels a unit; each file whole or not at all."""
    columns = min(3, len(panels)) if max(panel.width for panel in panels) == WIDTH else 2
    options: dict[str, dict[str, Any]] = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 144}}
    for kind in options:
        with atomic_write(folder / f"{name}.{kind}") as part:
            part.write_bytes(drawn(panels, columns, kind, facecolor="white", **options[kind]))
