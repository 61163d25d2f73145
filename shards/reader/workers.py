"""The threads of a reader in one process, and the memory that its batches take again and again."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from shards.reader.open_shards import OpenShards

FETCH_THREADS = 4
"""Shards in flight; each holds a whole tar in memory while it is fetched."""


class Workers:
    """What lives in one process only. Without threads, all work is done where it is asked for."""

    def __init__(
        self, num_threads: int, num_buffers: int, open_shards: Callable[[Executor], OpenShards]
    ) -> None:
        def threads(number: int, name: str) -> Executor:
            return ThreadPoolExecutor(number, name) if num_threads > 0 else _InlineExecutor()

        self.pid = os.getpid()
        self.planner = threads(1, "shard-plan")
        """One thread, so that planning and asking for shards cost the consumer nothing."""
        self.decoders = threads(num_threads, "shard-decode")
        self.shards = open_shards(fetchers := threads(FETCH_THREADS, "shard-fetch"))
        self.buffers = Buffers(num_buffers)
        self._pools = (self.planner, self.decoders, fetchers)

    def close(self) -> None:
        """Stop all threads."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)


class Buffers:
    """Pixel arrays of batches, taken again once nobody refers to them: touching new memory is not free.

    Every view of an array, a torch tensor's too, refers to its owner: a batch that is kept never changes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._owners: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of any content, which nothing else refers to."""
        size = math.prod(shape)
        for place in range(len(self._owners)):
            if _references(self._owners, place) == _NO_OTHER:
                if len(self._owners[place]) < size:
                    self._owners[place] = np.empty(size, np.uint8)
                return self._owners[place][:size].reshape(shape)
        owner = np.empty(size, np.uint8)
        if len(self._owners) < self._most:
            self._owners.append(owner)
        return owner.reshape(shape)


def _references(objects: list[np.ndarray], place: int) -> int:
    return sys.getrefcount(objects[place])


_NO_OTHER = _references([np.empty(0)], 0)
"""References to what is in a list and nowhere else, as they are counted here."""


class _InlineExecutor(Executor):
    """Runs everything at once in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
