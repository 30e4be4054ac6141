"""What the scripts share on the command line: errors in one line, optional packages, tables that can be pasted."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

# The four levels, coarse to fine, in the words of tables and JSON.
LEVELS = ("system", "lineage", "type", "subtype")


class InputError(Exception):
    """The input cannot be used. The message is one line that names the file and the way out."""


def run(main: Callable[[], None]) -> None:
    """Call `main`; exit 2 with one line on stderr for bad input or a file that can't be used, 130 on Ctrl-C."""
    try:
        main()
    except InputError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a name contains
        sys.exit(2)
    except OSError as error:  # no space, no permission, a folder where a file should be, ...
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left behind", file=sys.stderr)
        sys.exit(130)


def needs(package: str, extra: str) -> Any:
    """Import an optional package. Raises InputError that names the extra it comes with."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"the package {package} is missing; say `uv run --extra {extra} ...`") from error


def positive_int(text: str) -> int:
    """An argparse type, as are the next ones."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:  # what numpy and torch take as a seed
        raise argparse.ArgumentTypeError(f"{value} is below 0 or above 2^63 - 1")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def ratio(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def num_bytes(text: str) -> int:
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    value = float(text[:-2]) * units[text[-2:].upper()] if text[-2:].upper() in units else float(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500MB or 2GB")
    return int(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal; all but the first column to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
