"""Errors in one line: bad input, a missing package, Ctrl-C; what every script and command runs in."""

import importlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

MAX_LINE = 10_000  # characters of an error: it may list all types of a release, but not what a broken file holds


class InputError(Exception):
    """The input cannot be used. The message is one line that names the file and the way out."""


class InputWarning(UserWarning):
    """The input can be used, but something about it is unusual. The message is one line, as that of an error."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, what `kill` and cluster schedulers send, is answered like Ctrl-C."""


def terminate(*_: object) -> None:
    raise Terminated


def interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C that an error is due to: stopped while it imports, torch ends with an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def out_of_memory(error: BaseException) -> bool:
    """torch has no class of its own for a CPU without memory."""
    message = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


P = ParamSpec("P")
T = TypeVar("T")
_in_command: ContextVar[bool] = ContextVar("in_command", default=False)  # else Python called


def in_python(function: Callable[P, T]) -> Callable[P, T]:
    """A public function whose errors name its arguments where they name a command's flags: use_rep, not --use-rep."""
    names = {name.replace("_", "-"): name for name in signature(function).parameters}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            text = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda flag: names.get(flag[1], flag[0]), str(error))
            if _in_command.get() or text == str(error):
                raise
            raise InputError(text) from error

    return call


def warn(message: str) -> None:
    """In a command a line on stderr; in Python a warning at the line that called this package."""
    if _in_command.get():
        print(f"warning: {message}", file=sys.stderr)
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in ("fractal", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, InputWarning, stacklevel=level)


def run(main: Callable[[], None]) -> None:
    """Call `main`; what stops it is said in one line on stderr, whatever a name contains, and in the exit code.

    2: bad input, or a file that can't be used; 130: Ctrl-C; 143: SIGTERM; 141, and no line: `| head` has read enough.
    """
    signal.signal(signal.SIGTERM, terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal's encoding lacks is shown as \\xe4 and the like
        sys.stdout.reconfigure(errors="backslashreplace")
    token = _in_command.set(True)
    try:
        main()
        sys.stdout.flush()
        return
    except (Exception, KeyboardInterrupt) as error:
        if stop := interrupt_behind(error):
            line = f"interrupted: {str(stop) or 'nothing half-written was left behind'}"
            code = 143 if isinstance(stop, Terminated) else 130
        elif isinstance(error, BrokenPipeError):  # as a shell reports SIGPIPE, which ends other programs
            line, code = "", 141
        elif isinstance(error, InputError):
            line, code = f"error: {error}", 2
        elif isinstance(error, OSError):  # no permission, a folder where a file should be, ...
            line, code = f"error: {error.filename or 'file'}: {error.strerror or error}", 2
        elif out_of_memory(error):
            line, code = f"error: out of memory ({error}); take fewer cells or a larger machine", 2
        else:
            raise
    finally:
        _in_command.reset(token)
    with suppress(OSError):  # nobody reads it, or no room
        if line:
            print(printable(" ".join(line.split()))[:MAX_LINE], file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it, or no room: else Python would complain once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def reason(error: BaseException) -> str:
    """The first line of what a library says of a damaged file; its kind where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def printable(text: str) -> str:
    """Control characters, escape sequences and undecodable bytes as \\x1b and the like: names come from files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def needs(package: str, extra: str) -> Any:
    """Import an optional package. Raises InputError that names the extra it comes with."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        way = f"install fractal-cells with its extra `{extra}`, as pip install '.[{extra}]' does"
        raise InputError(f"the package {package} is missing; {way}") from error
