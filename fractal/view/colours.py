"""One colour per family of cell types throughout, and shades of it for what is below: maps, pictures and pages agree.

The families are the systems; where all cells are of one system, its lineages. Their colours are those of Okabe and Ito
(2008), which colour-blind people tell apart; grey is for what the hierarchy calls Other. Below a family, lightness and
hue run from one end of its range to the other in the order of the tree, in OKLCH (Ottosson 2020), where equal steps
look equal; lightness alone orders the shades of a family in black and white.
"""

from collections.abc import Sequence

import numpy as np

FAMILIES = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#b8a000", "#7f5539", "#2a9d8f",
]  # fmt: skip
OTHER = "#8a8a8a"
NEUTRAL = "#6f7f8f"  # above the families
UNKNOWN = "#b4b4b4"  # cells without a label, on light and dark ground
LIGHTNESS = 0.44, 0.83  # of the shades
HUE = 44.0  # degrees over which the shades of one family run


def colours_of(paths: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Paths of names, coarse to fine -> node (the beginning of a path) -> "#rrggbb"."""
    nodes = sorted({path[:k] for path in paths for k in range(1, len(path) + 1)})
    levels = len(paths[0])
    of_level = [[node for node in nodes if len(node) == k] for k in range(1, levels + 1)]
    top = next((k for k, level in enumerate(of_level, 1) if len(level) > 1), 1)  # the level of the families
    families = [node for node in of_level[top - 1] if node[-1] != "Other"]
    base = {node: FAMILIES[i % len(FAMILIES)] for i, node in enumerate(families)}
    colours = {node: base.get(node, OTHER) for node in of_level[top - 1]}
    colours |= {node: NEUTRAL for node in nodes if len(node) < top}
    for family in of_level[top - 1]:
        leaves = sorted({path for path in paths if path[:top] == family})
        for node in (node for node in nodes if len(node) > top and node[:top] == family):
            below = [i for i, leaf in enumerate(leaves) if leaf[: len(node)] == node]
            position = (sum(below) / len(below) + 0.5) / len(leaves)  # of its middle leaf among the family's
            colours[node] = shade(colours[family], position) if len(leaves) > 1 else colours[family]
    return colours


def label_colours(paths: Sequence[tuple[str, ...]], labels: Sequence[str]) -> list[str]:
    """The colour of each label, of whatever level; where several nodes have its name, that of the first."""
    by_name = {node[-1]: colour for node, colour in reversed(colours_of(paths).items())}
    return [by_name.get(label, UNKNOWN) for label in labels]


def shade(colour: str, position: float) -> str:
    """A colour of the family of `colour`: dark at position 0, light at 1."""
    _, chroma, hue = to_oklch(colour)
    lightness = LIGHTNESS[0] + position * (LIGHTNESS[1] - LIGHTNESS[0])
    return from_oklch(lightness, 0.95 * chroma, hue + HUE * (position - 0.5))


# OKLab: linear sRGB -> cone responses -> their cube roots -> lightness, green-red, blue-yellow.
TO_CONES = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])  # fmt: skip
TO_LAB = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])  # fmt: skip


def to_oklch(colour: str) -> tuple[float, float, float]:
    """ "#rrggbb" -> lightness 0 to 1, chroma, hue in degrees."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness, a, b = TO_LAB @ np.cbrt(TO_CONES @ linear)
    return float(lightness), float(np.hypot(a, b)), float(np.degrees(np.arctan2(b, a)))


def from_oklch(lightness: float, chroma: float, hue: float) -> str:
    """The nearest colour of that lightness and hue that a screen can show: chroma is reduced as far as it takes."""
    for share in np.linspace(1, 0, 41):
        a, b = share * chroma * np.cos(np.radians(hue)), share * chroma * np.sin(np.radians(hue))
        linear = np.linalg.solve(TO_CONES, np.linalg.solve(TO_LAB, np.array([lightness, a, b])) ** 3)
        if linear.min() >= -1e-4 and linear.max() <= 1 + 1e-4:
            break
    linear = linear.clip(0, 1)
    rgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * float(v)):02x}" for v in rgb)
