"""The queue of plans: nothing lost, shards asked for early, and never more of them than there is room for."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.reader.lookahead import Lookahead, PlannedBatch
from shards.reader.order import AHEAD_SHARDS, Batches, Order, batch_plans


class FakeCache:
    """Counts what is asked for; shards of 10 bytes that open when told to."""

    def __init__(self, opens_at_once: bool) -> None:
        self.asked: list[tuple[int, int]] = []
        self.futures: list[Future[Any]] = []
        self._opens_at_once = opens_at_once

    def get(self, view: int, number: int) -> Future[Any]:
        future: Future[Any] = Future()
        if self._opens_at_once:
            future.set_result(number)
        self.asked.append((view, number))
        self.futures.append(future)
        return future

    def touch(self, view: int, numbers: Iterable[int]) -> None:
        assert {(view, number) for number in numbers} <= set(self.asked)

    def size(self, view: int, number: int) -> int:
        del view, number
        return 10


def look(cache: FakeCache, order: Order, batch_size: int, **how: Any) -> Lookahead:
    settings = {"num_shards": order.num_shards, "max_bytes": 10_000, "following": iter(()), **how}
    return Lookahead(batch_plans(order, 0, Batches(batch_size)), cache, 3, **settings)  # type: ignore[arg-type]


def consumed(plans: Lookahead) -> list[PlannedBatch]:
    """All plans, two of them in work at a time."""
    found: list[PlannedBatch] = []
    for planned in plans:
        found.append(planned)
        assert set(planned.numbers.tolist()) <= set(planned.shards)
        if len(found) > 1:
            plans.done(found[-2])
    return found


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    batch_size=st.integers(1, 12),
    lanes=st.integers(1, 5),
    max_bytes=st.sampled_from([1, 60, 10_000]),
    at_once=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_plan_comes_once_with_its_shards(
    sizes: list[int], batch_size: int, lanes: int, max_bytes: int, at_once: bool
) -> None:
    order = Order(sizes, 1, 2, lanes, 1)
    cache = FakeCache(at_once)
    expected = list(batch_plans(order, 0, Batches(batch_size)))
    found = consumed(look(cache, order, batch_size, max_bytes=max_bytes))
    assert [planned.plan.position for planned in found] == [plan.position for plan in expected]
    for planned, plan in zip(found, expected, strict=True):
        assert np.array_equal(planned.plan.rows, plan.rows)
        assert planned.numbers.tolist() == np.unique(plan.shards).tolist()
    used = {number for plan in expected for number in plan.shards.tolist()}
    assert {number for _, number in cache.asked} == used


def test_shards_are_asked_for_ahead_in_the_order_of_need() -> None:
    """One lane of shards of 10 samples, batches of 5: two batches a shard."""
    order, cache = Order([10] * 40, 0, 0, 1, 1), FakeCache(opens_at_once=False)
    plans = iter(look(cache, order, 5))
    next(plans)
    needed = order.locate(np.arange(400))[0][::10].tolist()
    assert [number for _, number in cache.asked] == needed[: len(cache.asked)]
    assert 3 <= len(cache.asked) <= 1 + AHEAD_SHARDS
    while len(cache.asked) < 1 + AHEAD_SHARDS:
        next(plans)
    stalled = len(cache.asked)
    next(plans)
    assert len(cache.asked) - stalled <= 1  # none of them has come: no more are asked for
    for future in cache.futures:
        future.set_result(None)
    next(plans)
    assert len(cache.asked) > stalled


def test_nothing_is_held_beyond_the_room_but_what_a_batch_needs() -> None:
    order, cache = Order([10] * 40, 0, 0, 1, 1), FakeCache(opens_at_once=True)
    plans, ahead = look(cache, order, 5, max_bytes=30), []
    for planned in plans:
        ahead.append(len({number for _, number in cache.asked}) - (planned.plan.position // 10 + 1))
        plans.done(planned)
    assert max(ahead) == 2  # three shards of 10 bytes, one of them being read
    stuck = FakeCache(opens_at_once=True)
    for planned in look(stuck, order, 5, max_bytes=30):  # nobody is done: only what is due is asked for
        assert len(stuck.asked) <= max(3, planned.plan.position // 10 + 1)
    alone = FakeCache(opens_at_once=True)
    for planned in look(alone, order, 5, ahead=False):
        assert len(alone.asked) == planned.plan.position // 10 + 1


def test_the_next_epoch_follows_where_there_is_room() -> None:
    order, cache = Order([10] * 4, 0, 0, 1, 1), FakeCache(opens_at_once=True)
    consumed(look(cache, order, 5, following=iter([(5, 1), (5, 0)])))
    assert cache.asked[-2:] == [(5, 1), (5, 0)]
    waiting = FakeCache(opens_at_once=True)
    consumed(look(waiting, order, 5, following=iter([(5, 1), (5, 0)]), max_bytes=30))
    assert waiting.asked[-2:] == [(5, 1), (5, 0)]  # each as soon as a shard of this epoch gave way
    assert [view for view, _ in waiting.asked] == [3] * 4 + [5] * 2
    tight = FakeCache(opens_at_once=True)
    consumed(look(tight, order, 5, following=iter([(5, 1), (5, 0)]), max_bytes=5))
    assert all(view == 3 for view, _ in tight.asked)


@pytest.mark.parametrize("batch_size", [3, 50])
def test_an_epoch_without_a_batch_is_empty(batch_size: int) -> None:
    assert list(look(FakeCache(True), Order([1, 1], 0, 0), batch_size)) == []
