"""The batches to come, with their shards asked for before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from shards.reader.open_shards import OpenShard, OpenShards
from shards.reader.order import AHEAD_SHARDS, BatchPlan

MAX_LOCATED = 1 << 16
"""Samples whose places are known in advance: 1.5 MB of numbers."""

_STEPS_AHEAD = 8
_OF_THE_NEXT_EPOCH = -1


@dataclass(slots=True, eq=False)
class PendingShard:
    """A shard that batches need, open or being opened."""

    future: Future[OpenShard]
    _open: OpenShard | None = None

    def open(self) -> OpenShard:
        """Waits for it the first time; raises what opening it raised."""
        if self._open is None:
            self._open = self.future.result()
        return self._open


@dataclass(frozen=True, slots=True, eq=False)
class PlannedBatch:
    """A batch and the shards that it needs, open or being opened until it is `done`."""

    plan: BatchPlan
    numbers: np.ndarray
    """int64, of its shards, each once."""
    shards: dict[int, PendingShard]
    """By number: these, and those of the other batches that are not done."""


class Lookahead:
    """Iterates over the plans of an epoch and keeps a queue of those that follow.

    At most `AHEAD_SHARDS` shards are being opened beside those of the batch that is due. What the queue and
    the batches that are not `done` hold stays within `max_bytes`; only the batch that is due may exceed it.
    Once the epoch's own shards are asked for, the shards `following` are: (view, number) in the order of the
    next epoch's need. With `ahead` off nothing is asked for before it is due. One thread at a time.
    """

    def __init__(
        self,
        plans: Iterator[BatchPlan],
        cache: OpenShards,
        view: int,
        *,
        num_shards: int,
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
        self._pending: dict[int, PendingShard] = {}
        self._users = np.zeros(num_shards, np.int32)
        """How many plans need a shard, of those in the queue and those not done."""
        self._bytes = 0
        self._samples = 0
        self._opening: list[tuple[int, Future[OpenShard]]] = []
        self._next_plan = self._planned()
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
        """Let the shards of a batch give way to others.

        Call it only after the batch is read; else shards of two batches may wait for each other's room.
        """
        self._samples -= len(planned.plan.positions)
        self._users[planned.numbers] -= 1
        for number in self._unused(planned):
            del self._pending[number]
            self._bytes -= self._cache.size(self._view, number)

    def _planned(self) -> PlannedBatch | None:
        plan = next(self._plans, None)
        return None if plan is None else PlannedBatch(plan, np.unique(plan.shards), self._pending)

    def _unused(self, planned: PlannedBatch) -> list[int]:
        """The shards of a plan that no plan needs."""
        return planned.numbers[self._users[planned.numbers] == 0].tolist()

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
        if self._samples >= MAX_LOCATED:
            return False
        self._opening = [(number, future) for number, future in self._opening if not future.done()]
        if len(self._opening) < AHEAD_SHARDS:
            return True
        due = set(self._queue[0].numbers.tolist())
        return sum(number not in due for number, _ in self._opening) < AHEAD_SHARDS

    def _fits(self, planned: PlannedBatch) -> bool:
        more = sum(self._cache.size(self._view, number) for number in self._unused(planned))
        return self._bytes + more <= self._max_bytes

    def _enqueue(self) -> None:
        """Put the next plan into the queue, its shards being opened."""
        planned = self._next_plan
        assert planned is not None
        if unused := self._unused(planned):
            self._cache.touch(self._view, self._pending)  # none of those may give way to these
        for number in unused:
            future = self._cache.get(self._view, number)
            self._pending[number] = PendingShard(future)
            self._opening.append((number, future))
            self._bytes += self._cache.size(self._view, number)
        self._users[planned.numbers] += 1
        self._queue.append(planned)
        self._samples += len(planned.plan.positions)
        self._next_plan = self._planned()

    def _follow(self) -> bool:
        """Ask for one shard of the next epoch; False where there is none, or no room yet."""
        if self._next_shard is None:
            self._next_shard = next(self._following, None)
        shard = self._next_shard
        if shard is None or self._bytes + self._cache.size(*shard) > self._max_bytes:
            return False
        self._bytes += self._cache.size(*shard)
        self._opening.append((_OF_THE_NEXT_EPOCH, self._cache.get(*shard)))
        self._next_shard = None
        return True
