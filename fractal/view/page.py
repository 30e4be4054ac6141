"""The page of the report, and its figures as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fractal import __version__
from fractal.base.errors import InputError
from fractal.base.files import atomic_write
from fractal.view import draw, findings
from fractal.view.draw import short
from fractal.view.findings import Section
from fractal.view.notebook import InlinePage
from fractal.view.scored import Scored

MAX_FACT = 300  # letters of one line of provenance


def part_of(number: int, s: Scored, sections: list[Section]) -> dict[str, Any]:
    """What page.html takes of one adapter."""
    notes = [f"No probabilities: {s.no_answers}"] if s.no_answers else []
    if not s.controls:
        notes.append("PCA and LDA were not scored (eval.py --controls).")
    if s.truth.seen.all():
        notes.append("No type was held out, so nothing is known of types that the reference lacks.")
    return {
        "number": number,
        "name": short(s.name),
        "cells": short(s.cells, 1_000),
        "warnings": [short(line, MAX_FACT) for line in s.warnings],
        "cautions": [line for section in sections for line in section.cautions],
        "sections": [
            {
                **vars(section),
                "drawn": [
                    (panel.width, draw.inline(panel, f"{number}-{section.name}-{i}"))
                    for i, panel in enumerate(section.panels)
                ],
            }
            for section in sections
        ],
        "facts": [(short(name), short(value, MAX_FACT)) for name, value in s.facts],
        "notes": [short(line, MAX_FACT) for line in notes],
    }


def render(title: str, scored: Sequence[Scored], sections: Sequence[list[Section]]) -> str:
    """The page of one adapter or more. Whatever names contain, they are text: the template escapes all of it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        title=short(title, 200),
        light=draw.LIGHT,
        dark=draw.DARK,
        parts=[part_of(i + 1, s, each) for i, (s, each) in enumerate(zip(scored, sections, strict=True))],
        version=__version__,
    )


def prepared(scored: Sequence[Scored]) -> tuple[list[Scored], list[list[Section]]]:
    apart = [s.apart() for s in scored]
    return apart, [findings.sections(s) for s in apart]


def inline(title: str, scored: Sequence[Scored]) -> InlinePage:
    """The page for a notebook."""
    return InlinePage(render(title, *prepared(scored)), title)


def check_output(report: Path | None, folder: Path | None) -> None:
    """Raises InputError, before any work, for outputs that can't be made."""
    if report and report.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{report}: the report is a page; name an .html file")
    if folder and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder for the figures")


def write(title: str, scored: Sequence[Scored], report: Path | None, folder: Path | None) -> None:
    """The page to `report`, and each figure as .svg and .png to `folder`; each file whole or not at all."""
    scored, sections = prepared(scored)
    for i, each in enumerate(sections) if folder else ():
        for section in each:
            if section.panels:
                name = section.name if len(sections) == 1 else f"{i + 1}_{section.name}"
                draw.write_files(Path(folder or ""), name, section.panels)
    if report:
        with atomic_write(report) as part:
            part.write_text(render(title, scored, sections), encoding="utf-8")
