"""A page in a Jupyter notebook: the same file, in an iframe."""

from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class InlinePage:
    """A whole page of HTML. A notebook shows it where it is the last value of a cell; `text` is what a file holds."""

    text: str
    title: str
    height: int = 800  # pixels

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {self.height}px; border: 0"
        sandbox = "allow-scripts allow-downloads"  # the page's scripts can't reach the notebook
        text, title = escape(self.text), escape(self.title)
        return f'<iframe srcdoc="{text}" title="{title}" sandbox="{sandbox}" style="{style}"></iframe>'

    def __repr__(self) -> str:
        return f"{self.title}: a page of {len(self.text) / 1e6:.1f} MB; a notebook shows it, a path writes it to a file"
