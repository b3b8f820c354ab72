"""Work done in threads ahead of its use: in order, and no more of it at once than fits into memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
PREFETCHED = 32  # results that are made or wait to be taken
MOST_THREADS = 8


def prefetch(
    work: Callable[[Item], Result], items: Iterable[Item], ahead: int = PREFETCHED
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) of each item in order; raises what `work` raises when that item's turn has come."""
    waiting: deque = deque()
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) >= ahead:
                    item, result = waiting.popleft()
                    yield item, result.result()
            while waiting:
                item, result = waiting.popleft()
                yield item, result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
