"""Read the next piece while the present one is being written."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import repeat, takewhile
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield the same items, none of which is None; a thread makes the next one while the caller is busy with one.

    Pays where both sides leave Python's interpreter lock, as numpy and Arrow do. Memory: one more item. What the
    generator raises is raised here, in its turn. It is closed when this one is, also after Ctrl-C.
    """
    with closing(items), closing(prefetch_calls(repeat(partial(next, items, None)), 1)) as made:
        yield from takewhile(lambda item: item is not None, made)


def prefetch_calls(calls: Iterable[Callable[[], Item]], ahead: int) -> Generator[Item, None, None]:
    """Yield what the calls return, in their order; threads make `ahead` of them while the caller is busy with one.

    For calls that wait, as for a store on the network. Memory: `ahead` items more.
    """
    coming = deque[Future[Item]]()
    with ThreadPoolExecutor(ahead) as pool:
        try:
            for call in calls:
                coming.append(pool.submit(call))
                if len(coming) > ahead:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
