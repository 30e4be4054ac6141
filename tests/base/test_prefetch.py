"""Reading ahead: the same items in the same order, one of them early."""

import threading
import time
from collections.abc import Generator
from functools import partial

import pytest

from fractal.base.prefetch import prefetch, prefetch_calls


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


def test_calls_are_made_ahead_and_come_in_order():
    begun: list[int] = []

    def call(i: int) -> int:
        begun.append(i)
        time.sleep(0.05 if i == 0 else 0)  # the first is the slowest
        return i

    found = prefetch_calls((partial(call, i) for i in range(20)), 3)
    assert next(found) == 0
    assert sorted(begun) == [0, 1, 2, 3]  # and no more than these
    assert list(found) == list(range(1, 20))
    assert list(prefetch_calls([], 3)) == []


def test_an_error_of_a_call_comes_in_its_turn():
    def call(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    found = prefetch_calls((partial(call, i) for i in range(5)), 4)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(found)
