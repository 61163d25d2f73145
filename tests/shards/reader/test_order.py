"""Order version 1 against a slow reading of its definition, and as the exact partition it promises."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.draws import permute
from shards.reader.order import (
    Batches,
    Order,
    SampleOrder,
    batch_plans,
    default_shape,
    rank_slice,
    view_of_epoch,
)

WORD = (1 << 64) - 1

FROZEN_PERMUTATION = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
FROZEN_ORDER = [(0, 2), (2, 1), (0, 0), (2, 3), (3, 0), (2, 2), (0, 1), (2, 0), (3, 1)]
FROZEN_VIEWS = [0, 3, 2, 1, 3, 1, 2, 0]


def philox_words(count: int, key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox 4x64-10 (Salmon et al., SC'11) in plain integers; NumPy steps the counter before each block."""
    words: list[int] = []
    number = sum(part << (64 * n) for n, part in enumerate(counter))
    while len(words) < count:
        number = (number + 1) & ((1 << 256) - 1)
        c0, c1, c2, c3 = ((number >> (64 * n)) & WORD for n in range(4))
        k0, k1 = key
        for _ in range(10):
            low, high = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (high >> 64) ^ c1 ^ k0, high & WORD, (low >> 64) ^ c3 ^ k1, low & WORD
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
        words += [c0, c1, c2, c3]
    return words[:count]


def slow_permute(m: int, seed: int, epoch: int, stream: int, i: int) -> list[int]:
    bits = max(m - 1, 0).bit_length()
    words = philox_words(m, (seed, epoch), (0, stream, i, 0))
    return sorted(range(m), key=lambda n: (words[n] >> bits << bits) | n)


def slow_order(sizes: list[int], seed: int, epoch: int, lanes: int, window: int) -> list[tuple[int, int]]:
    """(shard, row) of every position, one sample at a time, in the five steps of the definition."""
    shards = slow_permute(len(sizes), seed, epoch, 0, 0)
    laid_out = [(shard, row) for shard in shards for row in range(sizes[shard])]
    total = len(laid_out)
    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + sizes[shard])
    q, r = divmod(total, lanes)
    lane_starts = [lane * q + min(lane, r) for lane in range(lanes)]
    edges = sorted({*starts[::window], *lane_starts, total})
    shuffled: list[tuple[int, int]] = []
    for i, (start, end) in enumerate(pairwise(edges)):
        shuffled += [laid_out[start + n] for n in slow_permute(end - start, seed, epoch, 1, i)]
    return [shuffled[lane_starts[p % lanes] + p // lanes] for p in range(total)]


def located(order: Order, positions: np.ndarray | list[int]) -> list[tuple[int, int]]:
    shard, row = order.locate(positions)
    return list(zip(shard.tolist(), row.tolist(), strict=True))


def everything(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]


big_words = st.integers(0, WORD)
shapes = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=14), st.integers(1, 12), st.integers(1, 16)
)


@given(
    m=st.integers(0, 70), seed=big_words, epoch=st.integers(0, 1 << 40), stream=st.integers(0, 2), i=big_words
)
@settings(max_examples=60, deadline=None)
def test_permute_is_the_argsort_of_philox_words(m: int, seed: int, epoch: int, stream: int, i: int) -> None:
    assert permute(m, seed, epoch, stream, i).tolist() == slow_permute(m, seed, epoch, stream, i)


def test_permute_never_changes() -> None:
    """Frozen values: checkpoints and papers' batches depend on them for as long as version 1 is read."""
    assert permute(10, 0, 0, 0, 0).tolist() == FROZEN_PERMUTATION
    assert located(Order([3, 0, 4, 2], 7, 5, lanes=2, window=2), np.arange(9)) == FROZEN_ORDER
    assert [view_of_epoch(4, 3, epoch) for epoch in range(8)] == FROZEN_VIEWS


@given(shape=shapes, seed=big_words, epoch=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_locate_follows_the_definition_and_is_a_bijection(
    shape: tuple[list[int], int, int], seed: int, epoch: int
) -> None:
    sizes, lanes, window = shape
    order = Order(sizes, seed, epoch, lanes, window)
    found = located(order, np.arange(sum(sizes)))
    assert found == slow_order(sizes, seed, epoch, lanes, window)
    assert sorted(found) == everything(sizes)


@given(shape=shapes, data=st.data())
@settings(max_examples=60, deadline=None)
def test_locate_does_not_depend_on_what_was_asked_before(
    shape: tuple[list[int], int, int], data: st.DataObject
) -> None:
    sizes, lanes, window = shape
    total = sum(sizes)
    whole = located(Order(sizes, 1, 2, lanes, window), np.arange(total))
    order = Order(sizes, 1, 2, lanes, window)
    for _ in range(3):
        asked = data.draw(st.lists(st.integers(0, total - 1), max_size=20)) if total else []
        assert located(order, asked) == [whole[p] for p in asked]


@given(
    batch=st.integers(1, 150),
    world=st.integers(1, 20),
    lanes=st.sampled_from([1, 2, 3, 7, 64]),
    position=st.integers(0, 10_000),
)
@settings(max_examples=300, deadline=None)
def test_ranks_partition_a_batch(batch: int, world: int, lanes: int, position: int) -> None:
    slices = [rank_slice(position, batch, rank, world, lanes).tolist() for rank in range(world)]
    joined = [p for piece in slices for p in piece]
    assert joined == sorted(range(position, position + batch), key=lambda p: (p % lanes, p))
    assert [len(piece) for piece in slices] == [
        (rank + 1) * batch // world - rank * batch // world for rank in range(world)
    ]


@pytest.mark.parametrize("lanes", [1, 5, 64])
@pytest.mark.parametrize("batch", [1, 24, 100])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_epoch_is_partitioned_over_ranks(lanes: int, batch: int, world: int) -> None:
    """Every sample once over all ranks, for any lanes, batch and world; a resumed epoch sees the rest."""
    sizes = [17, 0, 40, 23, 9, 31, 1, 16] * 2
    total = sum(sizes)
    seen: list[tuple[int, int]] = []
    for rank in range(world):
        order = Order(sizes, 3, 4, lanes, 2)
        for position in range(0, total, batch):
            size = min(batch, total - position)
            seen += located(order, rank_slice(position, size, rank, world, lanes))
    assert sorted(seen) == everything(sizes)

    resumed_at = (total // 2) // batch * batch  # another batch size and one rank take over here
    before = located(Order(sizes, 3, 4, lanes, 2), np.arange(resumed_at))
    order, after = Order(sizes, 3, 4, lanes, 2), []
    for position in range(resumed_at, total, 7):
        after += located(order, rank_slice(position, min(7, total - position), 0, 1, lanes))
    assert sorted(before + after) == everything(sizes)


@given(
    batch=st.integers(1, 40),
    world=st.integers(1, 5),
    position=st.integers(0, 240),
    drop_last=st.booleans(),
    at_once=st.sampled_from([1, 7, 64, 4096]),
    in_order=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_plans_are_the_ranks_parts_one_batch_after_the_other(
    batch: int, world: int, position: int, drop_last: bool, at_once: int, in_order: bool
) -> None:
    """Many are located at a time, which must not show."""
    world = min(world, batch)
    sizes = [17, 0, 40, 23, 9, 31, 1, 16, 100]
    total = sum(sizes)
    end = total - max(total - position, 0) % batch if drop_last else total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.reader.order._PLANNED_AT_ONCE", at_once)
        for rank in range(world):
            order = SampleOrder(sizes) if in_order else Order(sizes, 3, 4, 5, 2)
            plans = batch_plans(
                order, position, Batches(batch, rank=rank, world_size=world, drop_last=drop_last)
            )
            for start, plan in zip(range(position, end, batch), plans, strict=True):
                size = min(batch, end - start)
                part = rank_slice(start, size, rank, world, order.lanes)
                shards, rows = order.locate(part)
                assert (plan.position, plan.global_size) == (start, size)
                assert plan.positions.tolist() == part.tolist()
                assert (plan.shards.tolist(), plan.rows.tolist()) == (shards.tolist(), rows.tolist())


def test_seed_and_epoch_change_the_order() -> None:
    sizes = [40] * 5
    orders = [located(Order(sizes, seed, epoch), np.arange(200)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(found) for found in orders}) == 4


def test_default_shape_draws_a_batch_from_many_shards() -> None:
    assert default_shape(64) == (1, 64)
    assert default_shape(65) == (64, 1)
    small = Order([50] * 20, 0, 0)
    assert (small.lanes, small.window) == (1, 20)
    large = Order([50] * 641, 0, 0)
    shard, _ = large.locate(np.arange(64))
    assert len(np.unique(shard)) >= 62  # two lanes may meet inside one shard, seldom more


@given(num_views=st.integers(1, 12), seed=big_words, cycle=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_every_view_comes_once_in_k_epochs(num_views: int, seed: int, cycle: int) -> None:
    views = [view_of_epoch(num_views, seed, cycle * num_views + turn) for turn in range(num_views)]
    assert views == slow_permute(num_views, seed, cycle, 2, 0)


def test_imagenet_sized_epoch_is_a_bijection() -> None:
    sizes = np.full(641, 2000)
    sizes[-1] = 1167
    shard, row = Order(sizes, 0, 12).locate(np.arange(sizes.sum()))
    start = np.cumsum(sizes) - sizes
    assert np.array_equal(np.sort(start[shard] + row), np.arange(sizes.sum()))


def test_a_billion_samples_need_no_memory_per_sample() -> None:
    """250,000 shards of 4,000: one number per sample would be 8 GB."""
    sizes = np.full(250_000, 4000)
    tracemalloc.start()
    order = Order(sizes, 1, 2)
    shard, row = order.locate(rank_slice(777_777_777, 1024, 3, 8, order.lanes))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000
    assert len(np.unique(shard * 4000 + row)) == 128 and row.min() >= 0 and row.max() < 4000
    edges = np.array([0, 1, 999_999_998, 999_999_999])
    assert located(order, edges) == located(Order(sizes, 1, 2), edges[::-1])[::-1]


def test_memory_does_not_grow_over_an_epoch() -> None:
    """Every window of 4 M samples is visited: their permutations together would be 32 MB."""
    order = Order(np.full(2000, 2000), 1, 2)
    tracemalloc.start()
    for first in range(0, 4_000_000, 64 * 1000):
        order.locate(np.arange(first, first + 64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000


def test_positions_outside_the_epoch_are_errors() -> None:
    order = Order([3, 4], 0, 0)
    assert located(order, []) == []
    for positions in ([7], [-1], [0, 7]):
        with pytest.raises(IndexError, match=r"\[0, 7\)"):
            order.locate(positions)
    with pytest.raises(ValueError, match="rank 2"):
        rank_slice(0, 4, 2, 2, 1)
    with pytest.raises(ValueError, match="lanes"):
        Order([3], 0, 0, lanes=0)
    with pytest.raises(ValueError, match="non-negative"):
        Order([3, -1], 0, 0)
