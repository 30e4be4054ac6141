"""Read the next piece while the present one is being written."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield the same items; a thread makes the next one while the caller is busy with the one it has.

    Pays where both sides leave Python's interpreter lock, as numpy and Arrow do. Memory: one more item. What the
    generator raises is raised here, in its turn. It is closed when this one is, also after Ctrl-C.
    """
    try:
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(next, items, None)
            while (item := coming.result()) is not None:
                coming = pool.submit(next, items, None)
                yield item
    finally:
        items.close()
