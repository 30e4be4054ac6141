"""Markdown tables that can be pasted, and read in a terminal."""

from collections.abc import Sequence

from fractal.base.errors import printable


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal; all but the first column to the right.

    Names come from files, so what Markdown would take for a column or for HTML is escaped.
    """
    header, *rows = [[escaped(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def escaped(cell: str) -> str:
    return printable(cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<"))
