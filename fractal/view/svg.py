"""Panels as SVG: text stays text, colours come from a style sheet, so that a page can be light or dark.

A panel is about 340 units wide with letters of 12, so that on a phone, where one takes the whole width, it can be read
as on a desk. Names come from files: all text passes through `tag`, which escapes it.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fractal.base.cli import printable

WIDTH = 340
LEFT, RIGHT, TOP = 46, 14, 34  # margins of a panel with axes
MAX_NAME = 60  # letters of a name from a file

# Okabe and Ito (2008): told apart by all kinds of colour vision. c0 ... c3 are series, the others as they say.
LIGHT = {
    "ink": "#1b1f24", "soft": "#5b6470", "grid": "#dde1e6", "paper": "#ffffff", "card": "#f6f8fa",
    "c0": "#0072b2", "c1": "#d55e00", "c2": "#009e73", "c3": "#a8467f", "good": "#0072b2", "bad": "#d55e00",
    "none": "#c3cad3", "onfull": "#ffffff",
}  # fmt: skip
DARK = {
    "ink": "#e6e9ed", "soft": "#9aa4b0", "grid": "#343b44", "paper": "#14181d", "card": "#1c2128",
    "c0": "#56b4e9", "c1": "#f0925a", "c2": "#3fc79d", "c3": "#e39bc5", "good": "#56b4e9", "bad": "#f0925a",
    "none": "#4a535e", "onfull": "#0b0e11",
}  # fmt: skip
STYLE = """
svg text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 12px; fill: var(--ink) }
svg .title { font-weight: 600; font-size: 13px }
svg .soft { fill: var(--soft); font-size: 11px }
svg .small { font-size: 10px }
svg .start { text-anchor: start } svg .middle { text-anchor: middle } svg .end { text-anchor: end }
svg .grid { stroke: var(--grid); stroke-width: 1; fill: none }
svg .axis { stroke: var(--soft); stroke-width: 1; fill: none }
svg .line { fill: none; stroke-width: 2 }
svg .bar { stroke-width: 2 }
svg .box { fill: none; stroke: var(--ink); stroke-width: 2 }
svg .frame { fill: var(--grid) }
svg .s0 { stroke: var(--c0) } svg .s1 { stroke: var(--c1) } svg .s2 { stroke: var(--c2) } svg .s3 { stroke: var(--c3) }
svg .f0 { fill: var(--c0) } svg .f1 { fill: var(--c1) } svg .f2 { fill: var(--c2) } svg .f3 { fill: var(--c3) }
svg .raw { stroke: var(--soft); fill: none; stroke-width: 1.5; stroke-dasharray: 2 3 }
svg .d1 { stroke-dasharray: 6 3 } svg .d2 { stroke-dasharray: 2 2 } svg .d3 { stroke-dasharray: 8 3 2 3 }
svg .good { fill: var(--good) } svg .bad { fill: var(--bad) } svg .none { fill: var(--none) }
svg .onfull { fill: var(--onfull) }
"""


def tag(name: str, content: object = "", **attributes: object) -> Markup:
    """An element. Text and attributes are escaped, Markup is not; `css` is the attribute class, x_y is x-y."""
    text = "".join(
        Markup(' {}="{}"').format("class" if key == "css" else key.replace("_", "-"), number(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup(text), content)


def number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def short(name: object, letters: int = MAX_NAME) -> str:
    """A name from a file: one line, no control characters, not too long."""
    text = printable(" ".join(str(name)[: 4 * letters].split()))
    return text if len(text) <= letters else text[: letters - 1] + "…"


def text(x: float, y: float, content: object, css: str = "") -> Markup:
    return tag("text", content, x=x, y=y, css=css) if css else tag("text", content, x=x, y=y)


def path(points: Sequence[tuple[float, float]], css: str) -> Markup:
    return tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), css=css)


def rect(x: float, y: float, width: float, height: float, css: str, tip: object = "", **more: object) -> Markup:
    place = {"x": float(x), "y": float(y), "width": float(max(width, 0)), "height": float(height)}
    return tag("rect", tip, **place, css=css, **more)


def panel(title: object, elements: Sequence[Markup], height: float, width: float = WIDTH) -> Markup:
    """The elements as an image with a title, which is also what a screen reader says of it."""
    inside = [tag("title", title), text(8, 17, title, "title"), *elements]
    box = f"0 0 {width:g} {height:g}"
    xmlns = "http://www.w3.org/2000/svg"
    # role: else a screen reader reads out each number
    return tag("svg", Markup("").join(inside), xmlns=xmlns, viewBox=box, role="img", width=width, height=height)


MARKERS = ("circle", "square", "diamond", "triangle")


def marker(kind: int, x: float, y: float, size: float = 4) -> Markup:
    """Of another shape for each series: colours alone don't do on paper."""
    css = f"f{kind % 4}"
    if kind % 4 == 0:
        return tag("circle", cx=float(x), cy=float(y), r=float(size), css=css)
    if kind % 4 == 1:
        return rect(x - size, y - size, 2 * size, 2 * size, css)
    corners = [(x, y - 1.4 * size), (x + 1.2 * size, y), (x, y + 1.4 * size), (x - 1.2 * size, y)]
    if kind % 4 == 3:
        corners = [(x, y - 1.3 * size), (x + 1.2 * size, y + size), (x - 1.2 * size, y + size)]
    return path([*corners, corners[0]], css)


@dataclass(frozen=True)
class Series:
    """A line: (x, value, interval or None) per point."""

    name: str
    kind: int  # its colour, marker and dashes
    points: Sequence[tuple[float, float, Sequence[float] | None]]
    values: str = ""  # "above" or "right": where its numbers stand


def legend(series: Sequence[tuple[str, int]], more: Sequence[tuple[str, str]] = ()) -> Markup:
    """Names of lines, by their kind; `more`: names of areas (a class of the style sheet), or of the line "raw"."""
    rows, y = [], 14.0
    for name, kind in series:
        rows += [path([(6, y - 4), (34, y - 4)], f"line s{kind} d{kind}"), marker(kind, 20, y - 4), text(42, y, name)]
        y += 19
    for name, css in more:
        line = css == "raw"
        rows += [path([(6, y - 4), (34, y - 4)], "raw") if line else rect(10, y - 12, 18, 13, css), text(42, y, name)]
        y += 19
    longest = max((len(name) for name, _ in [*series, *more]), default=0)
    height, width = y - 8, 52 + 6.6 * longest
    box = f"0 0 {width:g} {height:g}"
    xmlns = "http://www.w3.org/2000/svg"
    return tag("svg", Markup("").join(rows), xmlns=xmlns, viewBox=box, width=width, height=height)


def span(values: Sequence[float], ceiling: float = 1.0) -> tuple[float, float]:
    """A range of shares for an axis: down to the next lower tenth, up to 1."""
    low = min([ceiling - 0.1, *values])
    return max(0.0, (low * 10 + 1e-9) // 1 / 10), ceiling


def share(value: float) -> str:
    """As in the house's tables, without the 0: .953."""
    return f"{value:.3f}".replace("0.", ".", 1)


def hundredths(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("0.", ".", 1)


def lines(
    title: object,
    ticks: Sequence[tuple[float, str, str]],
    series: Sequence[Series],
    y_range: tuple[float, float],
    x_label: str,
    baseline: tuple[str, float] | None = None,
    mark: tuple[float, float, str] | None = None,
) -> Markup:
    """Lines with intervals. ticks: (x, text, second line); `mark`: a ring around (x, value), with a text."""
    height, bottom = 256.0, 48.0
    low, high = y_range
    left, right = min(x for x, *_ in ticks), max(x for x, *_ in ticks)
    inner = WIDTH - LEFT - RIGHT - 48

    def at_x(x: float) -> float:
        return LEFT + 24 + (inner * (x - left) / (right - left) if right > left else inner / 2)

    def at_y(y: float) -> float:
        return TOP + 18 + (height - TOP - 18 - bottom) * (high - y) / (high - low)

    out = grid(at_y, low, high)
    last = -99.0
    for x, first, second in ticks:
        if at_x(x) - last < 16:  # no room
            continue
        last = at_x(x)
        out += [text(at_x(x), height - 32, first, "middle"), text(at_x(x), height - 18, second, "middle soft")]
    out.append(text(LEFT + 24 + inner / 2, height - 4, x_label, "middle soft"))
    if baseline:
        name, value = baseline
        out += [path([(LEFT, at_y(value)), (WIDTH - RIGHT, at_y(value))], "raw")]
        out.append(text(WIDTH - RIGHT, 32, f"{name} {share(value)}", "end soft"))
    step = 7.0  # between the intervals of series that share an x
    for i, one in enumerate(series):
        shift = step * (i - (len(series) - 1) / 2)
        places = [(at_x(x) + shift, at_y(y)) for x, y, _ in one.points]
        if len(places) > 1:
            out.append(path(places, f"line s{one.kind} d{one.kind}"))
        for j, ((x, y), (_, value, interval)) in enumerate(zip(places, one.points, strict=True)):
            top = y
            if interval:
                top = at_y(min(high, interval[1]))
                out.append(path([(x, top), (x, at_y(max(low, interval[0])))], f"bar s{one.kind}"))
            out.append(marker(one.kind, x, y))
            if one.values:
                ring = 5 if mark and mark[:2] == (one.points[j][0], value) else 0
                above = one.values == "above"
                place = (x, min(top, y - 4 - ring) - 5) if above else (x + 6, y + 15)
                out.append(text(*place, share(value), "middle small" if above else "start small"))
    if mark:
        shift = next((step * (i - (len(series) - 1) / 2) for i, one in enumerate(series) if one.values), 0.0)
        x, y = at_x(mark[0]) + shift, at_y(mark[1])
        out.append(tag("circle", cx=float(x), cy=float(y), r=8.5, css="box"))
        out.append(text(WIDTH - RIGHT, 17, mark[2], "end"))
    return panel(title, out, height)


def grid(at_y: Any, low: float, high: float) -> list[Markup]:
    """Horizontal lines of an axis of shares, with their numbers."""
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.25) if (high - low) / step <= 5.01 or step == 0.25)
    out, count = [], round((high - low) / step)
    for i in range(count + 1):
        value = high - i * step
        out += [path([(LEFT, at_y(value)), (WIDTH - RIGHT, at_y(value))], "grid")]
        out.append(text(LEFT - 6, at_y(value) + 4, f"{value:.2f}", "end soft"))
    return out


def heat(
    title: object,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    boxed: Sequence[int | None],
) -> Markup:
    """A matrix of values from -1 to 1: blue above 0, orange below. boxed: per column the row to frame, or None."""
    left, top, size = 92.0, 58.0, 30.0
    width = min(64.0, (WIDTH - left - 8) / max(len(columns), 1))
    out = [text(left + width * (k + 0.5), top - 8, short(name, 9), "middle") for k, name in enumerate(columns)]
    for i, (name, line) in enumerate(zip(rows, values, strict=True)):
        out.append(text(left - 8, top + size * i + 19, short(name, 13), "end"))
        for k, value in enumerate(line):
            x, y = left + width * k, top + size * i
            if value is not None:
                css = "good" if value >= 0 else "bad"
                out.append(rect(x + 1, y + 1, width - 2, size - 2, css, fill_opacity=min(1.0, abs(value))))
            full = value is not None and abs(value) > 0.55
            number = hundredths(value)
            out.append(text(x + width / 2, y + 19, number, "middle onfull" if full else "middle"))
    for k, row in enumerate(boxed):
        if row is not None:
            out.append(rect(left + width * k + 2, top + size * row + 2, width - 4, size - 4, "box"))
    return panel(title, out, top + size * len(rows) + 8)


def confusion(
    title: object,
    names: Sequence[str],
    shares: Sequence[Sequence[float]],
    groups: Sequence[object],
    sizes: Sequence[int],
    inside: Sequence[Sequence[bool]],
) -> Markup:
    """Rows: true classes, columns: answers, as shares of the row. A thin line parts the groups (parents).

    sizes: cells of each class; inside (n, n): whether two classes have a parent in common.
    """
    n = len(names)
    top, size = 44.0, max(13.0, min(30.0, 300 / n))
    left = max(196.0, WIDTH - n * size - 10)
    width, height = left + n * size + 10, top + n * size + 22
    out = [text(left + n * size, 36, "answered, by number of the row", "end soft small")] if n > 1 else []
    for i, name in enumerate(names):
        y = top + 8 + size * i
        middle = y + size / 2 + 4
        out.append(text(left - 24, middle, short(name, int((left - 28) / 6)), "end small"))
        out.append(text(left - 4, middle, i + 1, "end soft small"))
        out.append(text(left + size * (i + 0.5), height - 2, i + 1, "middle soft small"))
        out.append(rect(left, y + 0.5, n * size, size - 1, "frame", fill_opacity=0.35))
        for j, value in enumerate(shares[i]):
            if value > 0:
                css = "none" if i == j else "good" if inside[i][j] else "bad"
                x = left + size * j
                # a mistake of 1 % is to be seen: the root widens small shares
                opacity = 1.0 if i == j else min(1.0, 0.15 + 0.85 * value**0.5)
                tip = tag("title", f"{short(name)} → {short(names[j])}: {value:.1%} of {sizes[i]:,} cells")
                out.append(rect(x + 0.5, y + 0.5, size - 1, size - 1, css, tip, fill_opacity=opacity))
                if size >= 20 and value >= 0.005:
                    css = "middle small onfull" if i != j and opacity > 0.7 else "middle small"
                    out.append(text(x + size / 2, middle, f"{100 * value:.0f}", css))
    for i in range(1, n):
        if groups[i] != groups[i - 1]:
            y = top + 8 + size * i
            out += [path([(left, y), (left + n * size, y)], "axis")]
            out += [path([(left + size * i, top + 8), (left + size * i, top + 8 + n * size)], "axis")]
    return panel(title, out, height + 8, max(WIDTH, width))


def dots(
    title: object, rows: Sequence[tuple[str, int, float, Sequence[float] | None]], x_range: tuple[float, float]
) -> Markup:
    """Per row a name, and below it a dot with its interval: (name, cells, share, interval)."""
    left, right, size, top = 12.0, 64.0, 31.0, 48.0
    low, high = x_range

    def at(value: float) -> float:
        return left + (WIDTH - left - right) * (max(low, value) - low) / (high - low)

    bottom, out = top + size * len(rows), []
    for value, css in (low, "start"), ((low + high) / 2, "middle"), (high, "end"):
        out += [path([(at(value), top - 6), (at(value), bottom)], "grid")]
        out.append(text(at(value), top - 11, f"{value:.2f}", f"{css} soft"))
    out.append(text(WIDTH - 8, top - 11, "cells", "end soft"))
    for i, (name, cells, value, interval) in enumerate(rows):
        y = top + size * i
        out.append(text(left, y + 11, short(name, 46), "small"))
        if interval:
            out.append(path([(at(interval[0]), y + 21), (at(interval[1]), y + 21)], "bar s0"))
        out += [marker(0, at(value), y + 21), text(WIDTH - 8, y + 25, f"{cells:,}", "end soft")]
    return panel(title, out, bottom + 6)


def calibration(title: object, curves: Sequence[tuple[int, Sequence[dict[str, Any]]]]) -> Markup:
    """Reliability: (kind, bins) per curve, each bin its probability, accuracy, interval and cells; bars count cells."""
    side, base, strip = WIDTH - LEFT - RIGHT - 30, 226.0, 44.0
    height = base + strip * len(curves) + 42

    def at_x(p: float) -> float:
        return LEFT + side * p

    def at_y(p: float) -> float:
        return base - (base - TOP) * p

    out = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        out.append(path([(LEFT, at_y(value)), (at_x(1), at_y(value))], "grid"))
        out.append(text(LEFT - 6, at_y(value) + 4, f"{value:.2f}", "end soft"))
        out.append(text(at_x(value), height - 24, f"{value:g}", "middle soft"))
    out.append(path([(at_x(0), at_y(0)), (at_x(1), at_y(1))], "raw"))
    out.append(text(at_x(0.5), height - 7, "probability given", "middle soft"))
    for i, (kind, bins) in enumerate(curves):
        points = [(at_x(bin["probability"]), at_y(bin["accuracy"])) for bin in bins]
        if len(points) > 1:
            out.append(path(points, f"line s{kind} d{kind}"))
        floor, most = base + strip * (i + 1), max([bin["cells"] for bin in bins], default=1)
        out.append(path([(LEFT, floor), (at_x(1), floor)], "grid"))
        out.append(text(LEFT - 6, floor - 2, "cells", "end soft"))
        for (x, y), bin in zip(points, bins, strict=True):
            low, high = bin["interval"]
            out += [path([(x, at_y(low)), (x, at_y(high))], f"bar s{kind}"), marker(kind, x, y)]
            tall = (strip - 20) * bin["cells"] / most
            out.append(rect(at_x(bin["place"]) - 7, floor - tall, 14, tall, f"f{kind}", fill_opacity=0.6))
            out.append(text(at_x(bin["place"]), floor - tall - 3, compact(bin["cells"]), "middle small"))
    return panel(title, out, height)


def compact(count: int) -> str:
    return f"{count:,}" if count < 1000 else f"{count / 1000:.1f}k" if count < 100_000 else f"{count / 1000:.0f}k"


def stacked(title: object, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> Markup:
    """A bar of length 1 per row: (name, parts as (class of the style sheet, share))."""
    left, size, top = 92.0, 30.0, 32.0
    width = WIDTH - left - 10
    out = []
    for i, (name, parts) in enumerate(rows):
        x, y = left, top + size * i
        out.append(text(left - 8, y + 18, short(name, 14), "end"))
        for css, part in parts:
            out.append(rect(x, y + 3, width * part, size - 8, css))
            if part >= 0.09:
                number = "middle small" if css == "none" else "middle small onfull"
                out.append(text(x + width * part / 2, y + 18, f"{100 * part:.0f} %", number))
            x += width * part
    return panel(title, out, top + size * len(rows) + 6)


# Files


def with_colours(style: str, colours: dict[str, str]) -> str:
    return re.sub(r"var\(--(\w+)\)", lambda match: colours[match[1]], style)


def size(image: str) -> tuple[float, float]:
    """Width and height of an SVG made here."""
    width, height = re.findall(r' viewBox="0 0 ([\d.]+) ([\d.]+)"', image)[0]
    return float(width), float(height)


def sheet(title: str, sentence: str, panels: Sequence[Markup], key: Markup | None) -> str:
    """All panels of a figure as one SVG file, light, with the sentence below."""
    sizes = [size(image) for image in panels]
    widest = max([WIDTH, *(width for width, _ in sizes)])
    columns, cell = max(1, min(2 if widest > WIDTH else 3, len(panels))), widest + 16
    total, y, out = max(cell * columns, 480.0), 34.0, [text(12, 24, short(title, 200), "title")]
    for start in range(0, len(panels), columns):
        for k, image in enumerate(panels[start : start + columns]):
            out.append(Markup(str(image).replace("<svg ", f'<svg x="{8 + k * cell:g}" y="{y:g}" ', 1)))
        y += max(height for _, height in sizes[start : start + columns]) + 10
    if key:
        out.append(Markup(str(key).replace("<svg ", f'<svg x="8" y="{y:g}" ', 1)))
        y += size(key)[1] + 12
    for line in wrapped(sentence, int(total / 6.6)):
        out.append(text(12, y + 12, line))
        y += 17
    style = tag("style", Markup(with_colours(STYLE, LIGHT)))
    white = tag("rect", width="100%", height="100%", fill=LIGHT["paper"])
    xmlns, height = "http://www.w3.org/2000/svg", y + 12
    content = Markup("").join([style, white, *out])
    return str(tag("svg", content, xmlns=xmlns, viewBox=f"0 0 {total:g} {height:g}", width=total, height=height))


def wrapped(sentence: str, letters: int) -> list[str]:
    return textwrap.wrap(sentence, max(letters, 20))
