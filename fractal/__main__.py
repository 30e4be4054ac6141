"""`fractal NAME ...`: one command of fractal/commands/, and only that one is imported: torch takes seconds."""

import importlib
import sys

from fractal.base.errors import InputError, printable, run

COMMANDS = {  # name -> what --help says of it
    "encode": "counts of genes -> SCimilarity's vectors",
    "fit": "labelled cells -> a reference in one folder",
    "annotate": "label new cells with a reference",
    "embed": "give every cell of a file its fractal vector",
    "report": "how good a reference is, on one page",
    "explore": "cells and a reference -> one HTML page to look at",
    "map": "a layout in the plane per prefix, on which islands split",
    "index": "a file of cells -> an index to search",
    "search": "the cells of an index that are most like yours",
    "export": "an adapter as ONNX, or cells as Parquet for a vector database",
    "reference": "a trained adapter of train.py -> a reference",
    "cluster": "ingest, stratify, embed and annotate on many machines",
}
HELP = "usage: fractal COMMAND ...\n\n" + "\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items())


def main(argv: list[str] | None = None) -> None:
    """Raises InputError for a command that there is not."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(f"{HELP}\n\nEach has its own help: fractal COMMAND --help")
        return
    if name not in COMMANDS:
        raise InputError(f"fractal {printable(name)}: there is no such command; there are {', '.join(COMMANDS)}")
    sys.argv[0] = f"fractal {name}"  # as argparse shows it
    importlib.import_module(f"fractal.commands.{name}").main(rest)


def start() -> None:
    run(main)


if __name__ == "__main__":
    start()
