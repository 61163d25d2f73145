"""The order of samples, version 1: a pure function of (shard sizes, seed, epoch, lanes, windows, position).

Nothing is stored but the sizes, so an epoch of a billion samples starts anywhere in milliseconds and resuming
needs one number. Permutations are those of `pipeline.draws`: stream 0 orders the shards, stream 1 the samples
inside window i, stream 2 the views.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from pipeline.draws import permute
from pipeline.errors import InputError

ORDER_VERSION = 1
DEFAULT_LANES = 64

AHEAD_SHARDS = 8
"""Shards that are asked for before any batch needs them, where the cache has room for so many."""

_LOCATED_AT_ONCE = 1 << 17
_PLANNED_AT_ONCE = 1 << 12
_SHARD_STREAM = 0
_WINDOW_STREAM = 1
_VIEW_STREAM = 2


@dataclass(frozen=True, slots=True)
class Batches:
    """Which batches of which order a rank reads, and how far ahead it prepares them."""

    size: int
    """Samples of a batch, over all ranks."""
    _: KW_ONLY
    seed: int = 0
    """Seed of the order, and of which view an epoch reads."""
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    """False: positions are in the order of sample ids."""
    drop_last: bool = True
    """An epoch ends before the last N mod B samples; False: its last batch is short."""
    lanes: int | None = None
    """Lanes of the order; None takes the default, or fewer where the cache has no room for it. A run that may
    resume keeps the lanes and the window that it began with."""
    window: int | None = None
    """Shards per window of the order; None as for the lanes."""
    epochs: int = 0
    """Epochs that will be read: near the end of each but the last, shards of the next are fetched."""
    num_threads: int = 2
    """Threads that decode; 0 decodes in the calling thread."""
    prefetch: int = 2
    """Batches that are prepared ahead; their shards are fetched before."""

    @property
    def num_ahead(self) -> int:
        """Batches being filled while the consumer is busy with one."""
        return self.prefetch if self.num_threads > 0 else 0

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.world_size:
            raise InputError(
                f"batch size {self.size}, rank {self.rank} of {self.world_size} workers make no sense; "
                "give at least one sample and ranks from 0"
            )
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed {self.seed} does not fit 64 bits; give a number from 0 to 2^64 - 1")
        if self.world_size > self.size:
            raise InputError(
                f"{self.world_size} workers share a global batch of {self.size}, so some would get nothing; "
                "raise the batch size or lower the number of workers"
            )


def view_of_epoch(num_views: int, seed: int, epoch: int) -> int:
    """The stored view that an epoch reads: K epochs in a row see each of the K views once."""
    cycle, turn = divmod(epoch, num_views)
    return int(permute(num_views, seed, cycle, _VIEW_STREAM, 0)[turn])


def default_shape(num_shards: int) -> tuple[int, int]:
    """(lanes, shards per window): 64 lanes of one shard each, or one window over everything.

    A batch then draws from 64 shards at a time; where there are no more than that, from all of them.
    """
    return (DEFAULT_LANES, 1) if num_shards > DEFAULT_LANES else (1, max(num_shards, 1))


def fitting_shape(num_shards: int, capacity: int) -> tuple[int, int]:
    """The default shape where a cache of `capacity` shards can hold it, else fewer lanes of one shard each.

    Room for the shards that are fetched ahead is left beside the lanes. ValueError where not even two fit.
    """
    lanes, window = default_shape(num_shards)
    if lanes * window + (AHEAD_SHARDS if num_shards > window else 0) <= capacity:
        return lanes, window
    if capacity < 2:
        raise ValueError(f"a cache of {capacity} shards cannot hold one and the next")
    return min(DEFAULT_LANES, capacity - max(1, min(AHEAD_SHARDS, capacity // 4))), 1


def rank_slice(position: int, batch: int, rank: int, world: int, lanes: int) -> np.ndarray:
    """Positions, int64 [<= ceil(batch / world)], that a rank takes of the batch [position, position + batch).

    The batch is cut along its lanes, not by p mod world: each shard is then fetched by 1.0 to 1.2 ranks per
    epoch, not by three, also where world does not divide the lanes. Slices may differ in size by one; every
    position belongs to exactly one of them.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in [0, {world})")
    positions = np.arange(position, position + batch, dtype=np.int64)
    by_lane = positions[np.argsort(positions % lanes, kind="stable")]
    return by_lane[rank * batch // world : (rank + 1) * batch // world]


class Order:
    """Where each position of one epoch lies: a bijection from [0, N) to the (shard, row) of all samples.

    `sizes` [S] are the samples per shard of the epoch's view; a shard may be empty. Memory is O(S): one
    permutation of the shards, and those of the few windows asked for last. One thread at a time.
    """

    def __init__(
        self,
        sizes: Sequence[int] | np.ndarray,
        seed: int,
        epoch: int,
        lanes: int | None = None,
        window: int | None = None,
    ) -> None:
        sizes = np.asarray(sizes, dtype=np.int64)
        if sizes.ndim != 1 or (sizes < 0).any():
            raise ValueError("shard sizes must be one row of non-negative numbers")
        default_lanes, default_window = default_shape(len(sizes))
        self.lanes = default_lanes if lanes is None else lanes
        self.window = default_window if window is None else window
        if self.lanes < 1 or self.window < 1:
            raise ValueError(f"lanes ({self.lanes}) and window ({self.window}) must be at least 1")
        self.seed = seed
        self.epoch = epoch
        self.num_samples = int(sizes.sum())
        self.num_shards = len(sizes)

        # FORMAT step 1: the shards laid end to end, in a shuffled order.
        self._shards = permute(len(sizes), seed, epoch, _SHARD_STREAM, 0)
        self._starts = np.concatenate([[0], np.cumsum(sizes[self._shards])]).astype(np.int64)
        # Steps 2 and 3: lanes cut samples, windows never cross a lane.
        quotient, remainder = divmod(self.num_samples, self.lanes)
        lane = np.arange(self.lanes, dtype=np.int64)
        self._lane_starts = lane * quotient + np.minimum(lane, remainder)
        self._edges = np.unique(
            np.concatenate([self._starts[:: self.window], self._lane_starts, [self.num_samples]])
        )
        self._window_type = np.uint16 if len(self._edges) <= 1 << 16 else np.int64  # 16 bits sort by radix
        self._windows: OrderedDict[int, np.ndarray] = OrderedDict()

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row), each int64 in the shape of `positions`, which may come in any order."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.num_samples):
            raise IndexError(f"a position lies outside [0, {self.num_samples})")
        flat = positions.ravel()
        shard, row = np.empty_like(flat), np.empty_like(flat)
        # A part at a time: what is computed on the way then stays in the processor's cache.
        for first in range(0, len(flat), _LOCATED_AT_ONCE):
            part = slice(first, first + _LOCATED_AT_ONCE)
            self._locate(flat[part], shard[part], row[part])
        return shard.reshape(positions.shape), row.reshape(positions.shape)

    def _locate(self, positions: np.ndarray, shard: np.ndarray, row: np.ndarray) -> None:
        """Step 4 for positions int64 [n]; fills shard and row, int64 [n]."""
        # Positions are grouped by window, because a window spans few shards, often one: finding the shard
        # there is nearly free, while a search over all shards would cost as much as all the rest.
        lap = positions // self.lanes
        laid = self._lane_starts[positions - lap * self.lanes] + lap  # twice as fast as divmod
        window = (np.searchsorted(self._edges, laid, side="right") - 1).astype(self._window_type)
        grouped = np.argsort(window, kind="stable")
        laid, window = laid[grouped], window[grouped]
        cuts = [0, *(np.flatnonzero(window[1:] != window[:-1]) + 1).tolist(), len(window)]
        touched = window[cuts[:-1]].astype(np.int64)
        starts = self._edges[touched]
        firsts = np.searchsorted(self._starts, starts, side="right") - 1  # steps over empty shards
        lasts = np.searchsorted(self._starts, self._edges[touched + 1], side="left")
        windows = zip(touched.tolist(), starts.tolist(), firsts.tolist(), lasts.tolist(), strict=True)
        places = np.repeat(firsts, np.diff(cuts))
        for n, (i, start, first, last) in enumerate(windows):
            group = slice(cuts[n], cuts[n + 1])
            inside = self._permutation(i)[laid[group] - start]
            inside += start
            if last > first + 1:
                places[group] += np.searchsorted(self._starts[first + 1 : last], inside, side="right")
            laid[group] = inside
        laid -= self._starts[places]
        row[grouped] = laid
        shard[grouped] = self._shards[places]

    def _permutation(self, i: int) -> np.ndarray:
        if i in self._windows:
            self._windows.move_to_end(i)
            return self._windows[i]
        length = int(self._edges[i + 1] - self._edges[i])
        self._windows[i] = permute(length, self.seed, self.epoch, _WINDOW_STREAM, i)
        # Every lane is inside one window, or passes from one to the next while a batch is read.
        if len(self._windows) > 2 * self.lanes:
            self._windows.popitem(last=False)
        return self._windows[i]


class SampleOrder:
    """Positions in the order of sample ids; one lane, so that a rank's part is contiguous."""

    lanes = 1

    def __init__(self, sizes: Sequence[int] | np.ndarray) -> None:
        sizes = np.asarray(sizes, dtype=np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self.num_samples = int(sizes.sum())

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row), each int64 in the shape of `positions`."""
        shards = np.searchsorted(self._ends, positions, side="right")  # "right" steps over empty shards
        return shards, positions - self._starts[shards]


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """Where one rank's part, b samples, of the global batch [position, position + global_size) lies."""

    position: int
    global_size: int
    positions: np.ndarray
    """int64 [b], as are the others."""
    shards: np.ndarray
    rows: np.ndarray


def batch_plans(order: Order | SampleOrder, position: int, batches: Batches) -> Iterator[BatchPlan]:
    """A rank's parts of the global batches of an epoch from a position on."""
    num_samples = max(order.num_samples - position, 0)
    end = position + num_samples - (num_samples % batches.size if batches.drop_last else 0)
    # Many batches at a time: a window costs the same for one sample as for a hundred.
    stride = batches.size * -(-_PLANNED_AT_ONCE * batches.world_size // batches.size)
    for first in range(position, end, stride):
        starts = range(first, min(first + stride, end), batches.size)
        sizes = [min(batches.size, end - start) for start in starts]
        parts = [
            rank_slice(start, size, batches.rank, batches.world_size, order.lanes)
            for start, size in zip(starts, sizes, strict=True)
        ]
        shards, rows = order.locate(np.concatenate(parts))
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        yield from map(BatchPlan, starts, sizes, parts, np.split(shards, cuts), np.split(rows, cuts))
