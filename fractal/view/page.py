"""The page of the report, and its figures as files."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fractal import __version__
from fractal.base.errors import InputError
from fractal.base.files import atomic_write
from fractal.view import draw, findings
from fractal.view.findings import Section
from fractal.view.notebook import InlinePage
from fractal.view.scored import Scored


def render(title: str, scored: Sequence[Scored], sections: Sequence[list[Section]]) -> str:
    """The page of one adapter or more. Whatever names contain, they are text: the template escapes all of it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"short": draw.short, "inline": draw.inline, "cautions": findings.cautions}
    parts = [*zip(scored, sections, strict=True)]
    page = environment.get_template("page.html")
    return page.render(title=title, light=draw.LIGHT, dark=draw.DARK, parts=parts, version=__version__)


def inline(title: str, scored: Scored) -> InlinePage:
    """The page for a notebook."""
    apart = scored.apart()
    return InlinePage(render(title, [apart], [findings.sections(apart)]), title)


def check_output(report: Path | None, folder: Path | None) -> None:
    """Raises InputError, before any work, for outputs that can't be made."""
    if report and report.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{report}: the report is a page; name an .html file")
    if folder and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder for the figures")


def write(title: str, scored: Sequence[Scored], report: Path | None, folder: Path | None) -> None:
    """The page to `report`, and each figure as .svg and .png to `folder`; each file whole or not at all."""
    scored = [s.apart() for s in scored]
    sections = [findings.sections(s) for s in scored]
    for i, each in enumerate(sections) if folder else ():
        for section in each:
            if section.panels:
                name = section.name if len(sections) == 1 else f"{i + 1}_{section.name}"
                draw.write_files(Path(folder or ""), name, section.panels)
    if report:
        with atomic_write(report) as part:
            part.write_text(render(title, scored, sections), encoding="utf-8")
