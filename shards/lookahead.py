"""The batches to come, with their shards asked for before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from shards.cache import OpenShard, ShardCache
from shards.order import AHEAD_SHARDS, BatchPlan

MAX_LOCATED = 1 << 16
"""Samples whose places are known in advance: 1.5 MB of numbers."""

_STEPS_AHEAD = 8


@dataclass(frozen=True, slots=True, eq=False)
class PlannedBatch:
    """A batch and its shards by number, open or being opened; holding it holds them."""

    plan: BatchPlan
    shards: dict[int, Future[OpenShard]]


class Lookahead:
    """Iterates over the plans of an epoch and keeps a queue of those that follow.

    At most `AHEAD_SHARDS` shards are being opened beside those of the batch that is due. What the queue and
    the batches that are not `done` hold stays within `max_bytes`; only the batch that is due may exceed it.
    Once the epoch's own shards are asked for, the shards `following` are: (view, number) in the order of the
    next epoch's need. With `ahead` off nothing is asked for before it is due.
    """

    def __init__(
        self,
        plans: Iterator[BatchPlan],
        cache: ShardCache,
        view: int,
        *,
        max_bytes: int,
        following: Iterator[tuple[int, int]],
        ahead: bool = True,
    ) -> None:
        self._plans = plans
        self._cache = cache
        self._view = view
        self._max_bytes = max_bytes
        self._following = following
        self._ahead = ahead
        self._queue: deque[PlannedBatch] = deque()
        self._held: dict[int, tuple[Future[OpenShard], int]] = {}
        """By shard: how many plans use it, of those in the queue and those not done."""
        self._bytes = 0
        self._samples = 0
        self._opening: list[Future[OpenShard]] = []
        self._next_plan = next(plans, None)
        self._next_shard: tuple[int, int] | None = None
        """Of those that follow, the one that is asked for as soon as there is room."""

    def __iter__(self) -> Iterator[PlannedBatch]:
        while self._queue or self._next_plan is not None:
            if not self._queue:
                self._enqueue()
            if self._ahead:
                self._look_ahead()
            yield self._queue.popleft()

    def done(self, planned: PlannedBatch) -> None:
        """The batch is read: its shards may give way to others. Earlier, they could wait for each other."""
        self._samples -= len(planned.plan.positions)
        for number in planned.shards:
            future, users = self._held.pop(number)
            if users > 1:
                self._held[number] = (future, users - 1)
            else:
                self._bytes -= self._cache.size(self._view, number)

    def _look_ahead(self) -> None:
        """A few steps at a time, so that the first batch does not wait for plans of later ones."""
        for _ in range(_STEPS_AHEAD):
            if not self._may_open_more():
                return
            if self._next_plan is not None:
                if not self._fits(self._next_plan):
                    return
                self._enqueue()
            elif not self._follow():
                return

    def _may_open_more(self) -> bool:
        self._opening = [future for future in self._opening if not future.done()]
        due = {id(future) for future in self._queue[0].shards.values()}
        opening = sum(id(future) not in due for future in self._opening)
        return opening < AHEAD_SHARDS and self._samples < MAX_LOCATED

    def _fits(self, plan: BatchPlan) -> bool:
        new = (number for number in np.unique(plan.shards).tolist() if number not in self._held)
        return self._bytes + sum(self._cache.size(self._view, number) for number in new) <= self._max_bytes

    def _enqueue(self) -> None:
        """Put the next plan into the queue, its shards being opened."""
        plan = self._next_plan
        assert plan is not None
        shards: dict[int, Future[OpenShard]] = {}
        for number in np.unique(plan.shards).tolist():
            future, users = self._held.get(number, (None, 0))
            if future is None:
                future = self._cache.get(self._view, number)
                self._bytes += self._cache.size(self._view, number)
                self._opening.append(future)
            self._held[number] = (future, users + 1)
            shards[number] = future
        self._cache.touch(self._view, shards)
        self._queue.append(PlannedBatch(plan, shards))
        self._samples += len(plan.positions)
        self._next_plan = next(self._plans, None)

    def _follow(self) -> bool:
        """Ask for one shard of the next epoch; False where there is none, or no room yet."""
        if self._next_shard is None:
            self._next_shard = next(self._following, None)
        found = self._next_shard
        if found is None or self._bytes + self._cache.size(*found) > self._max_bytes:
            return False
        self._bytes += self._cache.size(*found)
        self._opening.append(self._cache.get(*found))
        self._next_shard = None
        return True
