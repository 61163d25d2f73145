"""Maps over threads that keep the order and bound what waits: memory does not grow with the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, ahead: int | None = None
) -> Generator[Result, None, None]:
    """Results in the order of the items, computed by `num_threads` threads of their own.

    At most `ahead` items (4 for each thread) are begun before their result is asked for; an error is raised
    where its result would have come, and closing the generator cancels what has not begun.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="in-order") as pool:
        yield from in_order_on(pool, function, items, 4 * num_threads if ahead is None else ahead)


def in_order_on(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """The same on the threads of a pool that outlives the map."""
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
