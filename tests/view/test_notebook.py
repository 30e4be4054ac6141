"""A page in a notebook is the page of the file, in an iframe."""

from html.parser import HTMLParser

from fractal.view.notebook import InlinePage
from tests.view.conftest import EVIL


class Frames(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_iframe_holds_the_page_and_nothing_else():
    page = InlinePage(f"<!doctype html><title>&amp;</title>{EVIL}", EVIL, height=300)
    [(tag, attributes)] = Frames(page._repr_html_()).tags
    assert (tag, attributes["srcdoc"], attributes["title"]) == ("iframe", page.text, EVIL)
    assert "300px" in (attributes["style"] or "")
    assert "allow-same-origin" not in (attributes["sandbox"] or "")
    assert "0.0 MB" in repr(page)
