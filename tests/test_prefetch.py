"""Reading ahead: the same items in the same order, one of them early."""

import threading
from collections.abc import Generator

import pytest

from fractal.prefetch import prefetch


def test_the_same_items():
    assert list(prefetch(i * i for i in range(100))) == [i * i for i in range(100)]
    assert list(prefetch(i for i in range(0))) == []


def test_the_next_item_is_made_meanwhile():
    made = [threading.Event() for _ in range(3)]

    def items() -> Generator[int, None, None]:
        for i, event in enumerate(made):
            event.set()
            yield i

    for i in prefetch(items()):
        assert i == 2 or made[i + 1].wait(10)  # before this one is handed back


def test_what_goes_wrong_is_raised_in_its_turn():
    def items() -> Generator[int, None, None]:
        yield 1
        raise OSError("disk")

    found = prefetch(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="disk"):
        next(found)


def test_the_generator_is_closed_when_the_caller_stops():
    closed = []

    def items() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    found = prefetch(items())
    assert next(found) == 1
    found.close()  # as Python does when nothing refers to it any more, as after Ctrl-C
    assert closed == [True]
