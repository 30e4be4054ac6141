"""The page, and its figures as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fractal import __version__
from fractal.base.cli import InputError, needs
from fractal.base.files import atomic_write
from fractal.view import findings, svg
from fractal.view.findings import Figure
from fractal.view.scored import Scored
from fractal.view.svg import short

MAX_FACT = 300  # letters of one line of provenance


def part_of(number: int, s: Scored, drawn: list[Figure]) -> dict[str, Any]:
    """What page.html takes of one adapter."""
    header, rows = findings.summary(s)
    notes = [f"No probabilities: {s.no_answers}"] if s.no_answers else []
    if not s.controls:
        notes.append("PCA and LDA were not asked for (eval.py --controls).")
    if s.truth.seen.all():
        notes.append("No type was held out, so nothing is known of types that the reference lacks.")
    return {
        "number": number,
        "name": short(s.name),
        "cells": short(s.cells, 1_000),
        "warnings": [short(line, MAX_FACT) for line in s.warnings],
        "header": header,
        "known": "Probability" in header,
        "rows": rows,
        "cautions": [line for figure in drawn for line in figure.cautions],
        "figures": [
            {**vars(figure), "sized": [(svg.size(panel)[0], panel) for panel in figure.panels]} for figure in drawn
        ],
        "facts": [(short(name), short(value, MAX_FACT)) for name, value in s.facts],
        "notes": [short(line, MAX_FACT) for line in notes],
    }


def render(title: str, scored: Sequence[Scored], drawn: Sequence[list[Figure]]) -> str:
    """The page of one adapter or more. Whatever names contain, they are text: the template escapes all of it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        title=short(title, 200),
        style=Markup(svg.STYLE),
        light=svg.LIGHT,
        dark=svg.DARK,
        parts=[part_of(i + 1, s, own) for i, (s, own) in enumerate(zip(scored, drawn, strict=True))],
        version=__version__,
    )


def png_of(image: str) -> bytes:
    """An SVG as PNG, two pixels a unit, in the font that comes with matplotlib."""
    fonts = Path(needs("matplotlib", "pictures").get_data_path()) / "fonts" / "ttf"
    found: bytes = needs("resvg_py", "pictures").svg_to_bytes(
        svg_string=image, zoom=2, font_files=[str(fonts / "DejaVuSans.ttf"), str(fonts / "DejaVuSans-Bold.ttf")]
    )
    return found


def check_output(report: Path | None, folder: Path | None) -> None:
    """Raises InputError, before any work, for outputs that can't be made."""
    if report and report.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{report}: the report is a page; name an .html file")
    if folder:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; name a folder for the figures")
        needs("matplotlib", "pictures")
        needs("resvg_py", "pictures")


def write(title: str, scored: Sequence[Scored], report: Path | None, folder: Path | None) -> None:
    """The page to `report`, and each figure as .svg and .png to `folder`; each file whole or not at all."""
    scored = [s.apart() for s in scored]
    drawn = [findings.figures(s) for s in scored]
    if folder:
        for i, own in enumerate(drawn):
            for figure in own:
                name = figure.name if len(drawn) == 1 else f"{i + 1}_{figure.name}"
                image = svg.sheet(figure.title, figure.conclusion, figure.panels, figure.legend)
                with atomic_write(folder / f"{name}.svg") as part:
                    part.write_text(image + "\n", encoding="utf-8")
                with atomic_write(folder / f"{name}.png") as part:
                    part.write_bytes(png_of(image))
    if report:
        with atomic_write(report) as part:
            part.write_text(render(title, scored, drawn), encoding="utf-8")
