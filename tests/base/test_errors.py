"""Exit codes, one line for each error, and names that would like to be more than text."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fractal.base.errors import MAX_LINE, InputError, in_python, reason, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def stopped_by(what: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise what

    return main


def send(number: int) -> Callable[[], None]:
    def main() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    return main


def misread(number: int) -> Callable[[], None]:
    """A library that makes an error of its own of Ctrl-C, as torch.onnx does, and a script that makes a line of it."""

    def main() -> None:
        try:
            try:
                send(number)()
            except KeyboardInterrupt:
                raise AttributeError("module 'torch._dynamo' has no attribute 'exc'")  # noqa: B904
        except Exception as error:
            raise InputError("a.pt: damaged") from error

    return main


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (stopped_by(InputError("a.txt: no\nsuch\tfile")), 2, "error: a.txt: no such file"),
        (stopped_by(InputError("a\x1b[31m\x07\u202eb\udcff: bad")), 2, "error: a\\x1b[31m\\x07\\u202eb\\udcff: bad"),
        (stopped_by(OSError(13, "Permission denied", "/x/y")), 2, "error: /x/y: Permission denied"),
        (stopped_by(MemoryError()), 2, "error: out of memory (); take fewer cells or a larger machine"),
        (
            stopped_by(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")),
            2,
            "error: out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to); "
            "take fewer cells or a larger machine",
        ),
        (stopped_by(KeyboardInterrupt()), 130, "interrupted: nothing half-written was left behind"),
        (stopped_by(KeyboardInterrupt("epoch 3 kept")), 130, "interrupted: epoch 3 kept"),
        (send(signal.SIGINT), 130, "interrupted: nothing half-written was left behind"),
        (send(signal.SIGTERM), 143, "interrupted: nothing half-written was left behind"),
        (misread(signal.SIGINT), 130, "interrupted: nothing half-written was left behind"),
        (misread(signal.SIGTERM), 143, "interrupted: nothing half-written was left behind"),
    ],
)
def test_what_stops_a_script_is_one_line(main, code: int, line: str, capsys: pytest.CaptureFixture[str]):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == line + "\n"


def test_other_errors_are_ours_and_keep_their_trace():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(stopped_by(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_an_error_as_long_as_a_broken_file_is_cut(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run(stopped_by(InputError("x" * 10**6)))
    assert len(capsys.readouterr().err) == MAX_LINE + 1


@pytest.mark.parametrize(
    ("shell", "expected"),
    [("> /dev/full", (2, "error: file: No space left on device\n")), ("| true", (141, "")), ("| head -c 9", (141, ""))],
)
def test_an_output_that_takes_no_more(shell: str, expected: tuple[int, str]):
    """Neither a trace-back nor Python's complaint about the buffer that it could not empty."""
    script = "from fractal.base.errors import run; import time; run(lambda: (time.sleep(.2), print('x' * 10**6)))"
    command = f'"{sys.executable}" -c "{script}" {shell}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == expected


def test_a_terminal_that_knows_ascii_only():
    script = "from fractal.base.errors import run; run(lambda: print('Gr\\xf6\\xdfe \\udcff'))"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Gr\\xf6\\xdfe \\udcff\n", b"")


def test_errors_speak_the_language_of_the_caller(capsys):
    """A command is told its flags, Python its arguments, and neither what the other one has."""

    @in_python
    def fit(use_rep: str, force: bool = False) -> None:
        raise InputError(f"{use_rep}: name another --use-rep, or --force; see --write-label-map")

    with pytest.raises(InputError, match="^X: name another use_rep, or force; see --write-label-map$"):
        fit("X")
    with pytest.raises(SystemExit):
        run(lambda: fit("X"))
    assert "name another --use-rep, or --force; see" in capsys.readouterr().err
    with pytest.raises(InputError, match="^X: name another use_rep"):  # as before
        fit("X")


def test_the_reason_of_an_error_is_its_first_line_or_its_kind():
    assert reason(ValueError("a\nb")) == "a"
    assert reason(KeyError()) == "KeyError"
