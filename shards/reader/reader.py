"""Batches of decoded samples in the order of `order`: the same for any number of threads and ranks.

    reader = ShardReader(open_dataset("runs/tokens"), StoredCrops(), Batches(256))
    for batch in reader.batches(epoch=0):
        train(batch.pixels, batch.codes)
    reader.close()

A batch is a pure function of (dataset, seed, lanes, window, epoch, position, batch size, rank, world size):
the samples consumed are all that resuming needs to count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from pipeline.errors import InputError
from shards.dataset.corpus import Corpus, namespaced_key
from shards.dataset.dataset import Dataset
from shards.dataset.rows import probe_shard
from shards.format.records import MAX_SAMPLE_ID
from shards.pixels.crops import Crops, FreshCrops, Showing, StoredCrops
from shards.pixels.decode import DecodeConfig, Rejected, decode_config_of, decode_image
from shards.pixels.views import decode_crop
from shards.reader.disk_cache import CacheConfig, NodeCache
from shards.reader.figures import Telemetry
from shards.reader.lookahead import Lookahead, PlannedBatch
from shards.reader.open_shards import ShardCache, cached_tar, named_failures, record_type, shard_bytes
from shards.reader.order import (
    BatchPlan,
    Order,
    SampleOrder,
    batch_plans,
    default_shape,
    fitting_shape,
    view_of_epoch,
)

FETCH_THREADS = 4
"""Shards in flight; each holds a whole tar in memory while it is fetched."""
CHUNK_SAMPLES = 32
"""Samples that a thread decodes at a time: 10 ms of crops, so that threads end a batch together."""


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleBatch:
    """One rank's part, b samples, of the global batch [position, next_position) of `global_size` samples.

    A rank's part of a short last batch may be empty; it is delivered nevertheless, so that every rank takes
    the same number of steps. `codes` is None for image datasets.
    """

    view: int
    """The stored view that the epoch reads."""
    sample_ids: np.ndarray
    """int64 [b]; of the second of several datasets they begin at 10^10, and so on."""
    pixels: np.ndarray
    """uint8 [b, S, S, 3], RGB; S is 0 where images are not decoded."""
    encoded: list[memoryview]
    """The images as they are stored, where they are not decoded."""
    codes: np.ndarray | None
    """uint16 [b, N], the code grid row by row."""
    labels: np.ndarray
    """int64 [b], -1 where there is none."""
    positions: np.ndarray
    """int64 [b], place of each sample in the epoch."""
    position: int
    next_position: int
    """Where to resume once this batch is consumed."""
    global_size: int

    @property
    def keys(self) -> list[str]:
        """Sample id and view: `0000000042-00`, or `1/0000000042-00` in the second of several datasets."""
        return [namespaced_key(sample_id, self.view) for sample_id in self.sample_ids.tolist()]


class ShardReader:
    """Reads a finished dataset in batches, over any number of epochs.

    `crops` decides what pixels it gives: a token dataset needs `StoredCrops`, of which epoch e reads one view
    of the K stored ones; an image dataset needs `FreshCrops`. None leaves the images encoded. Threads and
    clients start with the first batch, so a reader may be pickled or forked before it. What reading costs is
    in `telemetry`.
    """

    def __init__(
        self, dataset: Dataset, crops: Crops | None, batches: Batches, cache: CacheConfig | None = None
    ) -> None:
        if isinstance(crops, FreshCrops) and crops.decode is None:
            crops = dataclasses.replace(crops, decode=_prepared_decode(dataset))
        self.dataset = dataset
        self.crops = crops
        self.settings = batches
        self.cache = CacheConfig() if cache is None else cache
        self.telemetry = Telemetry()
        self.num_samples = min(dataset.num_samples(view) for view in range(dataset.num_views))
        self._workers: _Workers | None = None
        self._check()
        self.image_size = _crop_size(dataset, crops)
        lanes, window = batches.lanes, batches.window
        if lanes is None or window is None:
            fitting = order_shape(dataset, self.cache)
            lanes = fitting[0] if lanes is None else lanes
            window = fitting[1] if window is None else window
        self.lanes = lanes
        self.window = window

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch that starts at position 0."""
        return self._num_steps(self.num_samples)

    @property
    def num_dropped(self) -> int:
        """Samples at the end of each epoch's order that no batch of it contains."""
        return self.num_samples % self.settings.size if self.settings.drop_last else 0

    def batches(self, epoch: int, position: int = 0) -> Iterator[SampleBatch]:
        """The batches of an epoch from a position on: 0, or the `next_position` of the last one consumed.

        Raises what reading raises, when the batch concerned is asked for: InputError for an object that is
        missing or is not what was written, naming it.
        """
        if epoch < 0 or position < 0:
            raise ValueError(f"epoch {epoch} and position {position} must not be negative")
        view = view_of_epoch(self.dataset.num_views, self.settings.seed, epoch)
        order = self._order(view, epoch)
        if position > order.num_samples:
            raise InputError(
                f"position {position} lies beyond the {order.num_samples} samples of {self.dataset.url}; "
                "resume with the dataset that the run began with"
            )
        return self._stream(order, view, epoch, position)

    def begin(self, epoch: int = 0, position: int = 0) -> str:
        """What there is to read from a place on; InputError where this machine decodes differently.

        The decode probe is shared by the ranks: each decodes some of the images whose pixels the manifest
        knows, because codes belong to exactly these pixels.
        """
        datasets = self.dataset.datasets if isinstance(self.dataset, Corpus) else (self.dataset,)
        probed = sum(self._probe(dataset) for dataset in datasets)
        view = view_of_epoch(self.dataset.num_views, self.settings.seed, epoch)
        plan = next(self._plans(self._order(view, epoch), position), None)
        numbers = [] if plan is None else np.unique(plan.shards).tolist()
        total = int(shard_bytes(self.dataset, view)[numbers].sum())
        lines = [
            f"reader: {self.dataset.kind} {self.dataset.fingerprint[:12]} at {self.dataset.url}, "
            f"{probed} images of the decode probe agree",
            f"order version 1, {self.lanes} lanes of {self.window} shards",
            f"{len(numbers)} shards with {total / 1e6:,.1f} MB before the first batch",
        ]
        if self.dataset.is_remote:
            node = NodeCache(self.cache)
            tars = [cached_tar(self.dataset.shard(view, number)) for number in numbers]
            held = sum(tar is not None and node.held(tar) for tar in tars)
            lines.append(
                f"{held} of them in {self.cache.place}, which may hold {self.cache.bytes / 1e9:,.1f} GB"
            )
        return "; ".join(lines)

    def close(self) -> None:
        """Stop all threads and forget open shards. Iterators in progress end with an error."""
        workers, self._workers = self._workers, None
        if workers is not None and workers.pid == os.getpid():
            workers.planner.shutdown(wait=True, cancel_futures=True)
            workers.decoders.shutdown(wait=True, cancel_futures=True)
            workers.fetchers.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": None}

    # -------------------------------------------------------------------------------------------- inside

    def _check(self) -> None:
        size, url, kind = self.settings.size, self.dataset.url, self.dataset.kind
        # Evaluation may ask for more: its only batch is then the short one.
        if self.num_samples == 0 or (self.settings.drop_last and size > self.num_samples):
            raise InputError(
                f"a batch of {size} is more than the {self.num_samples} samples of {url}; "
                "lower the batch size or prepare more images"
            )
        if kind == "images" and isinstance(self.crops, StoredCrops):
            raise InputError(f"{url} holds whole images, and no view policy says how to crop them; give one")
        if kind == "tokens" and isinstance(self.crops, FreshCrops):
            raise InputError(
                f"{url} holds stored crops, which belong to their codes and cannot be cropped anew; "
                "read the image dataset for other views"
            )

    def _num_steps(self, num_samples: int) -> int:
        whole, rest = divmod(num_samples, self.settings.size)
        return whole + (1 if rest and not self.settings.drop_last else 0)

    def _plans(self, order: Order | SampleOrder, position: int) -> Iterator[BatchPlan]:
        return batch_plans(
            order,
            position,
            self.settings.size,
            rank=self.settings.rank,
            world_size=self.settings.world_size,
            drop_last=self.settings.drop_last,
        )

    def _order(self, view: int, epoch: int) -> Order | SampleOrder:
        sizes = self.dataset.shard_sizes(view)
        if not self.settings.shuffle:
            return SampleOrder(sizes)
        return Order(sizes, self.settings.seed, epoch, self.lanes, self.window)

    def _following(self, epoch: int) -> Iterator[tuple[int, int]]:
        """(view, number) of the shards with which the next epoch begins, in the order of need."""
        if not self.settings.shuffle or epoch + 1 >= self.settings.epochs:
            return
        view = view_of_epoch(self.dataset.num_views, self.settings.seed, epoch + 1)
        seen: set[int] = set()
        for plan in self._plans(self._order(view, epoch + 1), 0):
            for number in np.unique(plan.shards).tolist():
                if number not in seen:
                    seen.add(number)
                    yield view, number

    def _probe(self, dataset: Dataset) -> int:
        """How many images of the decode probe this rank decoded as the writer did."""
        decode: Callable[[bytes], np.ndarray] = decode_crop
        if dataset.kind == "images":
            settings = self.crops.decode if isinstance(self.crops, FreshCrops) else None
            decode = functools.partial(decode_image, config=settings or _prepared_decode(self.dataset))
        probe = dataset.manifest.probe
        mine = probe[self.settings.rank :: self.settings.world_size] or probe[:1]
        for entry in mine:
            shard = dataset.shard(entry.view - dataset.manifest.first_view, entry.number)
            with named_failures(shard):
                [found] = probe_shard(shard, [entry.row], decode)
            if (found.key, found.sha256) != (entry.key, entry.sha256):
                raise InputError(
                    f"sample {entry.key} of {shard.tar} decodes to other pixels here than where it was "
                    "written; install the library versions that its manifest names"
                )
        return len(mine)

    def _stream(
        self, order: Order | SampleOrder, view: int, epoch: int, position: int
    ) -> Iterator[SampleBatch]:
        """Batches in order, with `prefetch` more being filled while the consumer is busy with one."""
        workers = self._started()
        plans = Lookahead(
            self._plans(order, position),
            workers.cache,
            view,
            num_shards=self.dataset.num_shards,
            max_bytes=self._open_bytes(),
            following=self._following(epoch),
            ahead=self.settings.num_threads > 0,
        )
        coming = iter(plans)

        def begin_next() -> _PendingBatch | None:
            planned = next(coming, None)
            return None if planned is None else self._begin(workers, planned, view, epoch)

        ahead = deque(workers.planner.submit(begin_next) for _ in range(self.settings.num_ahead))
        try:
            while True:
                asked = time.perf_counter()
                ahead.append(workers.planner.submit(begin_next))
                pending = ahead.popleft().result()
                if pending is None:
                    return
                batch = pending.finished()
                workers.planner.submit(plans.done, pending.planned)
                self.telemetry.delivered(len(batch.sample_ids), time.perf_counter() - asked)
                yield batch
        except CancelledError:
            raise RuntimeError("the reader was closed while a batch was being read") from None
        finally:
            for future in ahead:
                if not future.cancel() and future.exception() is None and (begun := future.result()):
                    begun.cancel()

    def _open_bytes(self) -> int:
        """Tar bytes that this rank keeps open: its lanes' part of the cache, all where there is one lane."""
        if not self.dataset.is_remote or self.lanes == 1:
            return self.cache.bytes
        return self.cache.bytes // min(self.settings.world_size, self.lanes)

    def _started(self) -> _Workers:
        """The threads of this process: those of a parent do not survive a fork."""
        if self._workers is None or self._workers.pid != os.getpid():

            def threads(number: int, name: str) -> Executor:
                return (
                    ThreadPoolExecutor(number, name) if self.settings.num_threads > 0 else _InlineExecutor()
                )

            fetchers = threads(FETCH_THREADS, "shard-fetch")
            cache = ShardCache(
                self.dataset, fetchers, self._open_bytes(), NodeCache(self.cache), self.telemetry
            )
            self._workers = _Workers(
                pid=os.getpid(),
                planner=threads(1, "shard-plan"),
                fetchers=fetchers,
                decoders=threads(self.settings.num_threads, "shard-decode"),
                cache=cache,
                record_type=record_type(self.dataset),
                buffers=_Buffers(self.settings.num_ahead + 3),
            )
        return self._workers

    def _begin(self, workers: _Workers, planned: PlannedBatch, view: int, epoch: int) -> _PendingBatch:
        """Have the batch's samples decoded into place, a few at a time."""
        plan, size = planned.plan, len(planned.plan.positions)
        side, decoded = self.image_size, self.crops is not None
        records = np.empty(size, workers.record_type)
        batch = SampleBatch(
            view=self.dataset.manifest.first_view + view,
            sample_ids=records["sample_id"],
            pixels=workers.buffers.take((size, side, side, 3)),
            encoded=[] if decoded else [memoryview(b"")] * size,
            codes=records["codes"] if self.dataset.kind == "tokens" else None,
            labels=records["label"],
            positions=plan.positions,
            position=plan.position,
            next_position=plan.position + plan.global_size,
            global_size=plan.global_size,
        )
        chunk = CHUNK_SAMPLES if decoded else max(size, 1)
        chunks = [
            workers.decoders.submit(
                self._fill, batch, records, planned, epoch, start, min(start + chunk, size)
            )
            for start in range(0, size, chunk)
        ]
        return _PendingBatch(batch, planned, chunks)

    def _fill(
        self,
        batch: SampleBatch,
        records: np.ndarray,
        planned: PlannedBatch,
        epoch: int,
        start: int,
        end: int,
    ) -> None:
        """Fill some places of a batch. Waits for shards, which threads of their own open: no deadlock."""
        began = time.perf_counter()
        numbers, rows = planned.plan.shards[start:end].tolist(), planned.plan.rows[start:end].tolist()
        shards = {number: planned.shards[number].open() for number in set(numbers)}
        opened = time.perf_counter()
        # Everything but decoding first: after each image, which fills the processor's caches, it would cost
        # several times as much.
        images: list[memoryview] = []
        for place, number, row in zip(range(start, end), numbers, rows, strict=True):
            shard = shards[number]
            images.append(shard.image(row))
            records[place] = shard.records[row]
        if self.crops is None:
            batch.encoded[start:end] = images
        else:
            self._decode(self.crops, batch, planned, epoch, start, images)
        self.telemetry.decoded(time.perf_counter() - opened, opened - began)

    def _decode(
        self,
        crops: Crops,
        batch: SampleBatch,
        planned: PlannedBatch,
        epoch: int,
        start: int,
        images: list[memoryview],
    ) -> None:
        """Fill the pixels of the places from `start` on."""

        def named(place: int) -> str:
            key = namespaced_key(int(batch.sample_ids[place]), batch.view)
            return f"sample {key} of {planned.shards[int(planned.plan.shards[place])].open().info.tar}"

        view, out = self._drawn_view(epoch), batch.pixels
        for place, image in enumerate(images, start):
            sample_id = int(batch.sample_ids[place])
            showing = Showing(sample_id=sample_id, own_id=sample_id % MAX_SAMPLE_ID, view=view, epoch=epoch)
            try:
                shape = crops.fill(out[place], image, showing)
            except (Rejected, ValueError) as error:
                raise InputError(
                    f"{named(place)} cannot be decoded ({error}); "
                    "verify the dataset, and decode with the settings it was prepared with"
                ) from None
            if shape != out.shape[1:]:
                raise InputError(
                    f"{named(place)} is {shape[1]} x {shape[0]} pixels, not "
                    f"{self.image_size} x {self.image_size} as the manifest says; verify the dataset"
                )

    def _drawn_view(self, epoch: int) -> int:
        """Index of the views that fresh crops show in an epoch."""
        num_views = self.crops.policy.views_per_image if isinstance(self.crops, FreshCrops) else 0
        return view_of_epoch(num_views, self.settings.seed, epoch) if num_views > 0 else epoch


def order_shape(dataset: Dataset, cache: CacheConfig) -> tuple[int, int]:
    """(lanes, shards per window): the default, or what the cache has room for where shards are fetched.

    The same on every rank and node that has the same settings. InputError where not even two shards fit.
    """
    if not dataset.is_remote:
        return default_shape(dataset.num_shards)
    largest = max(int(shard_bytes(dataset, view).max()) for view in range(dataset.num_views))
    try:
        return fitting_shape(dataset.num_shards, cache.bytes // max(largest, 1))
    except ValueError:
        raise InputError(
            f"cache.bytes is {cache.bytes:,}, but a shard of {dataset.url} has up to {largest:,} bytes and "
            f"one is read while the next is fetched; give at least {2 * largest:,}"
        ) from None


@dataclass(frozen=True, slots=True, eq=False)
class _PendingBatch:
    """A batch whose places are being filled."""

    batch: SampleBatch
    planned: PlannedBatch
    chunks: list[Future[None]]

    def finished(self) -> SampleBatch:
        try:
            for chunk in self.chunks:
                chunk.result()
        except BaseException:
            self.cancel()
            raise
        return self.batch

    def cancel(self) -> None:
        for chunk in self.chunks:
            chunk.cancel()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Workers:
    """What lives in one process only."""

    pid: int
    planner: Executor
    """One thread, so that planning and asking for shards cost the consumer nothing."""
    fetchers: Executor
    decoders: Executor
    cache: ShardCache
    record_type: np.dtype[np.void]
    buffers: _Buffers


class _Buffers:
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


def _prepared_decode(dataset: Dataset) -> DecodeConfig:
    recipe = dataset.manifest.recipe.decode
    return DecodeConfig() if dataset.kind == "tokens" or recipe is None else decode_config_of(recipe)


def _crop_size(dataset: Dataset, crops: Crops | None) -> int:
    """Side of the crops in pixels, 0 where images stay encoded."""
    if crops is None:
        return 0
    if isinstance(crops, FreshCrops):
        return crops.policy.side
    return dataset.manifest.require_tokenizer().image_size
