"""Figures of an order against counting them one by one."""

from __future__ import annotations

import numpy as np
import pytest

from shards.reader.order import Order, fitting_shape, rank_slice
from shards.reader.shuffle import fetches_per_shard, shuffle_quality


@pytest.mark.parametrize(("batch_size", "world_size", "lanes"), [(6, 1, 1), (6, 3, 4), (10, 4, 5), (7, 7, 3)])
def test_fetches_are_the_visits_of_ranks_lane_by_lane(batch_size: int, world_size: int, lanes: int) -> None:
    sizes = [9, 0, 12, 4, 15, 8, 3]
    order = Order(sizes, 3, 1, lanes, 1)
    visits = set()
    for position in range(0, sum(sizes) - batch_size + 1, batch_size):
        for rank in range(world_size):
            for p in rank_slice(position, batch_size, rank, world_size, lanes).tolist():
                visits.add((rank, p % lanes, int(order.locate([p])[0][0])))
    expected = len(visits) / len({shard for _, _, shard in visits})
    assert fetches_per_shard(order, batch_size, world_size) == pytest.approx(expected)


def test_lanes_keep_fetches_near_one_and_batches_wide() -> None:
    """FORMAT.md: 1.0 to 1.2 fetches of each shard where every rank has lanes of its own."""
    order = Order([20] * 641, 0, 0)
    for world_size in (1, 8, 12):
        found = shuffle_quality(order, 256, world_size)
        assert found.fetches_per_shard is not None and 1.0 <= found.fetches_per_shard < 1.35
        assert 60 <= found.shards_per_batch <= 140


def test_sorted_labels_are_told_from_mixed_ones() -> None:
    sizes = np.full(100, 40)
    by_shard = {number: np.full(40, number // 10) for number in range(100)}  # class by class
    mixed = {number: np.random.default_rng(number).integers(0, 10, 40) for number in range(100)}
    one_lane, lanes = Order(sizes, 0, 0, 1, 1), Order(sizes, 0, 0)
    poor = shuffle_quality(one_lane, 64, 1, lambda number: by_shard[number]).label_distance
    better = shuffle_quality(lanes, 64, 1, lambda number: by_shard[number]).label_distance
    good = shuffle_quality(one_lane, 64, 1, lambda number: mixed[number])
    assert poor is not None and better is not None and good.label_distance is not None
    assert poor > 2 * better
    assert good.label_distance < 2 * (good.label_distance_by_chance or 0)
    assert shuffle_quality(lanes, 64, 1, lambda _: np.full(40, -1)).label_distance is None


def test_the_shape_fits_the_cache() -> None:
    assert fitting_shape(1000, 200) == (64, 1)
    assert fitting_shape(1000, 72) == (64, 1)
    assert fitting_shape(40, 40) == (1, 40)
    assert fitting_shape(1, 1) == (1, 1)
    for num_shards in (2, 40, 65, 1000):
        for capacity in range(2, min(num_shards, 72)):
            lanes, window = fitting_shape(num_shards, capacity)
            assert window == 1 and 1 <= lanes < capacity
    with pytest.raises(ValueError, match="cannot hold"):
        fitting_shape(2, 1)
