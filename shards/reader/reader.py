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
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
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
from shards.reader.disk_cache import CacheConfig, DiskCache
from shards.reader.figures import Telemetry
from shards.reader.lookahead import Lookahead, PlannedBatch
from shards.reader.open_shards import OpenShards, cached_tar, named_failures, record_type, shard_bytes
from shards.reader.order import (
    Batches,
    Order,
    SampleOrder,
    batch_plans,
    default_shape,
    fitting_shape,
    view_of_epoch,
)
from shards.reader.workers import Workers

CHUNK_SAMPLES = 32
"""Samples that a thread decodes at a time: 10 ms of crops, so that threads end a batch together."""


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
        self._workers: Workers | None = None
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
        num_whole, rest = divmod(self.num_samples, self.settings.size)
        return num_whole + (1 if rest and not self.settings.drop_last else 0)

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
        view, order = self._order(epoch)
        if position > order.num_samples:
            raise InputError(
                f"position {position} lies beyond the {order.num_samples} samples of {self.dataset.url}; "
                "resume with the dataset that the run began with"
            )
        return self._stream(view, order, epoch, position)

    def begin(self, epoch: int = 0, position: int = 0) -> str:
        """What there is to read from a place on; InputError where this machine decodes differently.

        The decode probe is shared by the ranks: each decodes some of the images whose pixels the manifest
        knows, because codes belong to exactly these pixels.
        """
        datasets = self.dataset.datasets if isinstance(self.dataset, Corpus) else (self.dataset,)
        probed = sum(self._probe(dataset) for dataset in datasets)
        view, order = self._order(epoch)
        plan = next(batch_plans(order, position, self.settings), None)
        numbers = [] if plan is None else np.unique(plan.shards).tolist()
        total = int(shard_bytes(self.dataset, view)[numbers].sum())
        lines = [
            f"reader: {self.dataset.kind} {self.dataset.fingerprint[:12]} at {self.dataset.url}, "
            f"{probed} images of the decode probe agree",
            f"order version 1, {self.lanes} lanes of {self.window} shards",
            f"{len(numbers)} shards with {total / 1e6:,.1f} MB before the first batch",
        ]
        if self.dataset.is_remote:
            disk = DiskCache(self.cache)
            tars = [cached_tar(self.dataset.shard(view, number)) for number in numbers]
            num_here = sum(tar is not None and disk.has(tar) for tar in tars)
            lines.append(
                f"{num_here} of them in {self.cache.place}, which may hold {self.cache.bytes / 1e9:,.1f} GB"
            )
        return "; ".join(lines)

    def close(self) -> None:
        """Stop all threads and forget open shards. Iterators in progress end with an error."""
        workers, self._workers = self._workers, None
        if workers is not None and workers.pid == os.getpid():
            workers.close()

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

    def _order(self, epoch: int) -> tuple[int, Order | SampleOrder]:
        """The stored view that an epoch reads, and the order of its samples."""
        view = view_of_epoch(self.dataset.num_views, self.settings.seed, epoch)
        sizes = self.dataset.shard_sizes(view)
        if not self.settings.shuffle:
            return view, SampleOrder(sizes)
        return view, Order(sizes, self.settings.seed, epoch, self.lanes, self.window)

    def _following(self, epoch: int) -> Iterator[tuple[int, int]]:
        """(view, number) of the shards with which the next epoch begins, in the order of need."""
        if not self.settings.shuffle or epoch + 1 >= self.settings.epochs:
            return
        view, order = self._order(epoch + 1)
        seen: set[int] = set()
        for plan in batch_plans(order, 0, self.settings):
            for number in np.unique(plan.shards).tolist():
                if number not in seen:
                    seen.add(number)
                    yield view, number

    def _probe(self, dataset: Dataset) -> int:
        """How many images of the decode probe this rank decoded as the writer did."""
        decode: Callable[[bytes], np.ndarray] = decode_crop
        if dataset.kind == "images":
            config = self.crops.decode if isinstance(self.crops, FreshCrops) else None
            decode = functools.partial(decode_image, config=config or _prepared_decode(self.dataset))
        probe = dataset.manifest.probe
        mine = probe[self.settings.rank :: self.settings.world_size] or probe[:1]
        for entry in mine:
            shard = dataset.shard(entry.view - dataset.manifest.first_view, entry.number)
            with named_failures(shard):
                [decoded] = probe_shard(shard, [entry.row], decode)
            if (decoded.key, decoded.sha256) != (entry.key, entry.sha256):
                raise InputError(
                    f"sample {entry.key} of {shard.tar} decodes to other pixels here than where it was "
                    "written; install the library versions that its manifest names"
                )
        return len(mine)

    def _stream(
        self, view: int, order: Order | SampleOrder, epoch: int, position: int
    ) -> Iterator[SampleBatch]:
        """Batches in order, with `prefetch` more being filled while the consumer is busy with one."""
        workers = self._started()
        plans = Lookahead(
            batch_plans(order, position, self.settings),
            workers.shards,
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
                if not future.cancel() and future.exception() is None and (pending := future.result()):
                    pending.cancel()

    def _drawn_view(self, epoch: int) -> int:
        """Index of the views that fresh crops show in an epoch."""
        num_views = self.crops.policy.views_per_image if isinstance(self.crops, FreshCrops) else 0
        return view_of_epoch(num_views, self.settings.seed, epoch) if num_views > 0 else epoch

    def _open_bytes(self) -> int:
        """Tar bytes that this rank keeps open: its lanes' part of the cache, all where there is one lane."""
        if not self.dataset.is_remote or self.lanes == 1:
            return self.cache.bytes
        return self.cache.bytes // min(self.settings.world_size, self.lanes)

    def _started(self) -> Workers:
        """The threads of this process: those of a parent do not survive a fork."""
        if self._workers is None or self._workers.pid != os.getpid():
            self._workers = Workers(
                self.settings.num_threads,
                self.settings.num_ahead + 3,
                lambda fetchers: OpenShards(
                    self.dataset, fetchers, self._open_bytes(), DiskCache(self.cache), self.telemetry
                ),
            )
        return self._workers

    def _begin(self, workers: Workers, planned: PlannedBatch, view: int, epoch: int) -> _PendingBatch:
        """Have the batch's samples decoded into place, a few at a time."""
        plan, size, side = planned.plan, len(planned.plan.positions), self.image_size
        records = np.empty(size, record_type(self.dataset))
        batch = SampleBatch(
            view=self.dataset.manifest.first_view + view,
            sample_ids=records["sample_id"],
            pixels=workers.buffers.take((size, side, side, 3)),
            encoded=[memoryview(b"")] * (size if self.crops is None else 0),
            codes=records["codes"] if self.dataset.kind == "tokens" else None,
            labels=records["label"],
            positions=plan.positions,
            position=plan.position,
            next_position=plan.position + plan.global_size,
            global_size=plan.global_size,
        )
        pending = _PendingBatch(batch, planned, records, epoch, self._drawn_view(epoch))
        chunk = CHUNK_SAMPLES if self.crops is not None else max(size, 1)
        for start in range(0, size, chunk):
            part = range(start, min(start + chunk, size))
            pending.chunks.append(workers.decoders.submit(self._fill, pending, part))
        return pending

    def _fill(self, pending: _PendingBatch, places: range) -> None:
        """Fill some places of a batch. Waits for shards, which threads of their own open: no deadlock."""
        began, batch, plan = time.perf_counter(), pending.batch, pending.planned.plan
        part = slice(places.start, places.stop)
        numbers, rows = plan.shards[part].tolist(), plan.rows[part].tolist()
        shards = {number: pending.planned.shards[number].open() for number in set(numbers)}
        opened = time.perf_counter()
        # Everything but decoding first: after each image, which fills the processor's caches, it would cost
        # several times as much.
        images: list[memoryview] = []
        for place, number, row in zip(places, numbers, rows, strict=True):
            shard = shards[number]
            images.append(shard.image(row))
            pending.records[place] = shard.records[row]
        if self.crops is None:
            batch.encoded[part] = images
        else:
            for place, number, image in zip(places, numbers, images, strict=True):
                self._decode(self.crops, pending, place, image, shards[number].info.tar)
        self.telemetry.decoded(time.perf_counter() - opened, opened - began)

    def _decode(self, crops: Crops, pending: _PendingBatch, place: int, image: memoryview, tar: str) -> None:
        """Fill the pixels of one place."""
        batch, sample_id = pending.batch, int(pending.batch.sample_ids[place])
        out, side = batch.pixels[place], self.image_size
        showing = Showing(sample_id, sample_id % MAX_SAMPLE_ID, pending.drawn_view, pending.epoch)
        try:
            shape = crops.fill(out, image, showing)
        except (Rejected, ValueError) as error:
            raise InputError(
                f"sample {namespaced_key(sample_id, batch.view)} of {tar} cannot be decoded ({error}); "
                "verify the dataset, and decode with the settings it was prepared with"
            ) from None
        if shape != out.shape:
            raise InputError(
                f"sample {namespaced_key(sample_id, batch.view)} of {tar} is {shape[1]} x {shape[0]} pixels, "
                f"not {side} x {side} as the manifest says; verify the dataset"
            )


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
    records: np.ndarray
    """Of `record_type`, [b]; the batch's ids, labels and codes are its fields."""
    epoch: int
    drawn_view: int
    """Index of the view that fresh crops show."""
    chunks: list[Future[None]] = field(default_factory=list)

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
