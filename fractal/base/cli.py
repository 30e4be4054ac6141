"""Old names: until all modules import from errors, table and fractal.commands.options."""

from typing import Any

from fractal.base.errors import MAX_LINE, InputError, Terminated, needs, printable, reason, run  # noqa: F401
from fractal.base.table import table  # noqa: F401
from fractal.commands.options import (  # noqa: F401
    non_negative_int,
    num_bytes,
    positive_float,
    positive_int,
    ratio,
)


def add_device(parser: Any) -> None:
    from fractal.commands.options import add

    add(parser, "--device")


def add_force(parser: Any) -> None:
    from fractal.commands.options import add

    add(parser, "--force")
