"""How well an order mixes, and what it costs a cluster: shards per batch, labels over an epoch, fetches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.reader.order import Order, rank_slice

MAX_COUNTED = 20_000_000
"""Samples of an epoch up to which every fetch is counted; 2 s."""

_BATCHES_LOOKED_AT = 64
_PART = 20
"""Labels are compared over a twentieth of an epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShuffleQuality:
    """Figures of one epoch's order for one batch size and number of ranks.

    `shards_per_batch` is the mean number of different shards in a global batch. `fetches_per_shard` counts,
    for ranks on nodes of their own, how often a shard is fetched in the epoch, lane by lane; None for very
    large epochs. `label_distance` is the largest total variation (0 to 1) between labels of a twentieth of
    the epoch and those of all of it, and `label_distance_by_chance` what random parts of that size have; None
    where there are no labels.
    """

    shards_per_batch: float
    fetches_per_shard: float | None
    label_distance: float | None
    label_distance_by_chance: float | None


def shuffle_quality(
    order: Order,
    batch_size: int,
    world_size: int,
    labels_of: Callable[[int], np.ndarray] | None = None,
) -> ShuffleQuality:
    """Look at a whole order. `labels_of` gives the labels of a shard, int64 [its samples], -1 for none."""
    distance, by_chance = None, None
    if labels_of is not None and order.num_samples <= MAX_COUNTED:
        distance, by_chance = _label_distance(order, labels_of)
    return ShuffleQuality(
        shards_per_batch=_shards_per_batch(order, batch_size),
        fetches_per_shard=fetches_per_shard(order, batch_size, world_size),
        label_distance=distance,
        label_distance_by_chance=by_chance,
    )


def fetches_per_shard(order: Order, batch_size: int, world_size: int) -> float | None:
    """Mean number of (rank, lane) that read a shard during the epoch; None for a very large one."""
    total = order.num_samples // batch_size * batch_size
    if order.num_samples > MAX_COUNTED or total == 0:
        return None
    pairs: list[np.ndarray] = []
    num_shards = order.num_shards
    for position in range(0, total, batch_size):
        rank_of = np.empty(batch_size, np.int64)
        for rank in range(world_size):
            rank_of[rank_slice(position, batch_size, rank, world_size, order.lanes) - position] = rank
        positions = np.arange(position, position + batch_size)
        shards, _ = order.locate(positions)
        lane = positions % order.lanes
        pairs.append(np.unique((rank_of * order.lanes + lane) * num_shards + shards))
    visits = np.unique(np.concatenate(pairs))
    return len(visits) / len(np.unique(visits % num_shards))


def _shards_per_batch(order: Order, batch_size: int) -> float:
    batches = max(order.num_samples // batch_size, 1)
    looked_at = np.unique(np.linspace(0, batches - 1, min(batches, _BATCHES_LOOKED_AT)).astype(np.int64))
    counts = []
    for number in looked_at.tolist():
        first = number * batch_size
        shards, _ = order.locate(np.arange(first, min(first + batch_size, order.num_samples)))
        counts.append(len(np.unique(shards)))
    return float(np.mean(counts))


def _label_distance(
    order: Order, labels_of: Callable[[int], np.ndarray]
) -> tuple[float | None, float | None]:
    shards, rows = order.locate(np.arange(order.num_samples))
    labels = np.empty(order.num_samples, np.int64)
    for number in np.unique(shards).tolist():
        places = np.flatnonzero(shards == number)
        labels[places] = labels_of(number)[rows[places]]
    if (labels < 0).all():
        return None, None
    _, classes = np.unique(labels, return_inverse=True)
    mixed = np.random.default_rng(0).permutation(classes)
    return _largest_distance(classes), _largest_distance(mixed)


def _largest_distance(classes: np.ndarray) -> float:
    """Largest total variation between a twentieth of the classes, int64 [N] from 0, and all of them."""
    share = np.bincount(classes) / len(classes)
    distances = [
        0.5 * np.abs(np.bincount(part, minlength=len(share)) / len(part) - share).sum()
        for part in np.array_split(classes, min(_PART, len(classes)))
    ]
    return float(max(distances))
