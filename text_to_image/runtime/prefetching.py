"""Work done in threads ahead of its use: results in order, and only as many at once as fit into memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
PREFETCHED = 32  # results in the making or waiting to be used
MAX_THREADS = 8


def prefetch(
    work: Callable[[Item], Result], items: Iterable[Item], ahead: int = PREFETCHED
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) for each item, in order. An exception of `work` is raised when its item's turn comes."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) >= ahead:
                    yield _pop_first(waiting)
            while waiting:
                yield _pop_first(waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _pop_first(waiting: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, future = waiting.popleft()
    return item, future.result()
