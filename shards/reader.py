"""Batches of decoded samples in the order of `shards.order`: the same for any number of threads and ranks.

    reader = ShardReader(open_dataset("runs/tokens"), batch_size=256)
    for batch in reader.batches(epoch=0):
        train(batch.pixels, batch.codes)
    reader.close()

A batch is a pure function of (dataset, seed, epoch, position, batch size, rank, world size), so the number of
samples consumed is all that resuming needs.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import InputError
from shards.cache import OpenShard, ShardCache
from shards.decode import DecodeConfig, Rejected, decode_config_of, decode_image
from shards.manifest import Dataset
from shards.order import Order, rank_slice, view_of_epoch
from shards.samples import sample_key
from shards.views import ViewPolicy, center_view, decode_crop, encode_crop, render, view_at

CACHE_BYTES = 8 << 30
"""Tar bytes kept open. 64 lanes of 100 MB shards are 6.4 GB; local ones are mapped, not copied."""

FETCH_THREADS = 4
CHUNK_SAMPLES = 16
"""Samples that a thread decodes at a time: 5 ms of crops, so that threads end a batch together."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleBatch:
    """One rank's part, b samples, of the global batch [position, next_position) of `global_size` samples.

    A rank's part of a short last batch may be empty; it is delivered nevertheless, so that every rank takes
    the same number of steps. `codes` is None for image datasets.
    """

    keys: list[str]
    """Sample id and view: `0000000042-00`."""
    sample_ids: np.ndarray
    """int64 [b]."""
    pixels: np.ndarray
    """uint8 [b, S, S, 3], RGB."""
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


class ShardReader:
    """Reads a finished dataset in batches, over any number of epochs.

    A token dataset gives its stored crops and codes; epoch e reads one view of the K stored ones. An image
    dataset needs `views` and gives crops drawn from it: a new one in every epoch where
    `views.views_per_image` is 0, else the one of the epoch's view, as a token dataset of that policy would;
    with `stored_pixels` they pass through the stored JPEG and are equal to that dataset's bit for bit.
    `center_crop` gives the evaluation crop instead. Images are decoded as they were prepared, unless `decode`
    says otherwise.

    `batch_size` counts over all ranks. With `drop_last` an epoch ends before the last N mod B samples
    (`num_dropped`), without it the last batch is short. With `shuffle` off, positions are in sample order.
    `num_threads` decode, 0 in the calling thread; `prefetch` batches are prepared ahead. Threads and clients
    start with the first batch, so a reader may be pickled or forked before it.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        views: ViewPolicy | None = None,
        decode: DecodeConfig | None = None,
        center_crop: bool = False,
        stored_pixels: bool = False,
        num_threads: int = 2,
        prefetch: int = 2,
        shuffle: bool = True,
        drop_last: bool = True,
        lanes: int | None = None,
        window: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.views = views
        self.decode = decode if decode is not None else _prepared_decode(dataset)
        self.center_crop = center_crop
        self.stored_pixels = stored_pixels
        self.num_threads = num_threads
        self.prefetch = prefetch if num_threads > 0 else 0
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.lanes = lanes
        self.window = window
        self.cache_bytes = cache_bytes
        self.num_samples = min(dataset.num_samples(view) for view in range(dataset.num_views))
        self._workers: _Workers | None = None
        self._check()
        self.image_size = views.side if views is not None else _stored_size(dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch that starts at position 0."""
        return self._num_steps(self.num_samples)

    @property
    def num_dropped(self) -> int:
        """Samples at the end of each epoch's order that no batch of it contains."""
        return self.num_samples % self.batch_size if self.drop_last else 0

    def batches(self, epoch: int, position: int = 0) -> Iterator[SampleBatch]:
        """The batches of an epoch from a position on: 0, or the `next_position` of the last one consumed.

        Raises what reading raises, when the batch concerned is asked for: InputError for an object that is
        missing or is not what was written, naming it.
        """
        if epoch < 0 or position < 0:
            raise ValueError(f"epoch {epoch} and position {position} must not be negative")
        view = view_of_epoch(self.dataset.num_views, self.seed, epoch)
        order = self._order(view, epoch)
        if position > order.num_samples:
            raise InputError(
                f"position {position} lies beyond the {order.num_samples} samples of {self.dataset.url}; "
                "resume with the dataset that the run began with"
            )
        return self._stream(self._plans(order, view, epoch, position))

    def close(self) -> None:
        """Stop all threads and forget open shards. Iterators in progress end with an error."""
        workers, self._workers = self._workers, None
        if workers is not None and workers.pid == os.getpid():
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
        batch_size, url = self.batch_size, self.dataset.url
        if batch_size < 1 or not 0 <= self.rank < self.world_size:
            raise InputError(
                f"batch size {batch_size}, rank {self.rank} of {self.world_size} workers make no sense; "
                "give at least one sample and ranks from 0"
            )
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed {self.seed} does not fit 64 bits; give a number from 0 to 2^64 - 1")
        if self.world_size > batch_size:
            raise InputError(
                f"{self.world_size} workers share a global batch of {batch_size}, so some would get nothing; "
                "raise the batch size or lower the number of workers"
            )
        # Evaluation may ask for more: its only batch is then the short one.
        if self.num_samples == 0 or (self.drop_last and batch_size > self.num_samples):
            raise InputError(
                f"a batch of {batch_size} is more than the {self.num_samples} samples of {url}; "
                "lower the batch size or prepare more images"
            )
        if self.dataset.kind == "images" and self.views is None:
            raise InputError(f"{url} holds whole images, and no view policy says how to crop them; give one")
        if self.dataset.kind == "tokens" and (self.views is not None or self.center_crop):
            raise InputError(
                f"{url} holds stored crops, which belong to their codes and cannot be cropped anew; "
                "read the image dataset for other views"
            )

    def _num_steps(self, num_samples: int) -> int:
        whole, rest = divmod(num_samples, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def _plans(
        self, order: Order | _SampleOrder, view: int, epoch: int, position: int
    ) -> Iterator[_BatchPlan]:
        end = order.num_samples
        while position < end and not (self.drop_last and position + self.batch_size > end):
            size = min(self.batch_size, end - position)
            positions = rank_slice(position, size, self.rank, self.world_size, order.lanes)
            shards, rows = order.locate(positions)
            yield _BatchPlan(epoch, view, position, size, positions, shards, rows)
            position += size

    def _order(self, view: int, epoch: int) -> Order | _SampleOrder:
        sizes = self.dataset.shard_sizes(view)
        if not self.shuffle:
            return _SampleOrder(sizes)
        return Order(sizes, self.seed, epoch, self.lanes, self.window)

    def _stream(self, plans: Iterator[_BatchPlan]) -> Iterator[SampleBatch]:
        """Batches in order, with `prefetch` more being filled while the consumer is busy with one."""
        workers = self._started()
        ahead: deque[_PendingBatch] = deque()
        try:
            for plan in plans:
                ahead.append(self._begin(workers, plan))
                if len(ahead) > self.prefetch:
                    yield ahead.popleft().finished()
            while ahead:
                yield ahead.popleft().finished()
        finally:
            for pending in ahead:
                pending.cancel()

    def _started(self) -> _Workers:
        """The threads of this process: those of a parent do not survive a fork."""
        if self._workers is None or self._workers.pid != os.getpid():
            inline = self.num_threads == 0
            fetchers = _InlineExecutor() if inline else ThreadPoolExecutor(FETCH_THREADS, "shard-fetch")
            decoders = _InlineExecutor() if inline else ThreadPoolExecutor(self.num_threads, "shard-decode")
            cache = ShardCache(self.dataset, fetchers, self.cache_bytes)
            self._workers = _Workers(pid=os.getpid(), fetchers=fetchers, decoders=decoders, cache=cache)
        return self._workers

    def _begin(self, workers: _Workers, plan: _BatchPlan) -> _PendingBatch:
        """Ask for the batch's shards and have its samples decoded into place, a few at a time."""
        size, tokens = len(plan.positions), self.dataset.kind == "tokens"
        rows, columns = self.dataset.manifest.grid if tokens else (0, 0)
        batch = SampleBatch(
            keys=[""] * size,
            sample_ids=np.empty(size, np.int64),
            pixels=np.empty((size, self.image_size, self.image_size, 3), np.uint8),
            codes=np.empty((size, rows * columns), np.uint16) if tokens else None,
            labels=np.empty(size, np.int64),
            positions=plan.positions,
            position=plan.position,
            next_position=plan.position + plan.global_size,
            global_size=plan.global_size,
        )
        shards = {number: workers.cache.get(plan.view, number) for number in np.unique(plan.shards).tolist()}
        chunks = [
            workers.decoders.submit(
                self._fill, batch, plan, shards, range(start, min(start + CHUNK_SAMPLES, size))
            )
            for start in range(0, size, CHUNK_SAMPLES)
        ]
        return _PendingBatch(batch, chunks)

    def _fill(
        self, batch: SampleBatch, plan: _BatchPlan, shards: dict[int, Future[OpenShard]], places: range
    ) -> None:
        """Fill some places of a batch. Waits for shards, which threads of their own open: no deadlock."""
        for place in places:
            shard, row = shards[int(plan.shards[place])].result(), int(plan.rows[place])
            sample_id = int(shard.sample_ids[row])
            key = sample_key(sample_id, shard.info.view)
            batch.keys[place] = key
            batch.sample_ids[place] = sample_id
            batch.labels[place] = shard.labels[row]
            if batch.codes is not None and shard.codes is not None:
                batch.codes[place] = shard.codes[row]
            data = shard.image(row)
            try:
                pixels = decode_crop(data) if self.views is None else self._crop(data, sample_id, plan.epoch)
            except (Rejected, ValueError) as error:
                raise InputError(
                    f"sample {key} of {shard.info.tar} cannot be decoded ({error}); "
                    "verify the dataset, and decode with the settings it was prepared with"
                ) from None
            if pixels.shape != batch.pixels.shape[1:]:
                raise InputError(
                    f"sample {key} of {shard.info.tar} is {pixels.shape[1]} x {pixels.shape[0]} pixels, not "
                    f"{self.image_size} x {self.image_size} as the manifest says; verify the dataset"
                )
            batch.pixels[place] = pixels

    def _crop(self, data: bytes, sample_id: int, epoch: int) -> np.ndarray:
        """The crop of a source image that an epoch sees, uint8 [S, S, 3]."""
        policy = self.views
        assert policy is not None
        image = decode_image(data, self.decode)
        height, width = image.shape[:2]
        if self.center_crop:
            view = center_view(policy, height=height, width=width)
        else:
            index = epoch
            if policy.views_per_image > 0:
                index = view_of_epoch(policy.views_per_image, self.seed, epoch)
            view = view_at(policy, sample_id, index, height=height, width=width)
        pixels = render(image, view, policy.interpolation)
        return decode_crop(encode_crop(pixels, policy.jpeg_quality)) if self.stored_pixels else pixels


@dataclass(frozen=True, slots=True, eq=False)
class _BatchPlan:
    """Where one rank's part of a batch lies."""

    epoch: int
    view: int
    position: int
    global_size: int
    positions: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class _PendingBatch:
    """A batch whose places are being filled."""

    batch: SampleBatch
    chunks: list[Future[None]]

    def finished(self) -> SampleBatch:
        try:
            for chunk in self.chunks:
                chunk.result()
        except CancelledError:
            raise RuntimeError("the reader was closed while a batch was being read") from None
        finally:
            self.cancel()
        return self.batch

    def cancel(self) -> None:
        for chunk in self.chunks:
            chunk.cancel()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Workers:
    """What lives in one process only."""

    pid: int
    fetchers: Executor
    decoders: Executor
    cache: ShardCache


class _InlineExecutor(Executor):
    """Runs everything at once in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _SampleOrder:
    """Positions in the order of sample ids; one lane, so that a rank's part is contiguous."""

    lanes = 1

    def __init__(self, sizes: np.ndarray) -> None:
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self.num_samples = int(sizes.sum())

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards = np.searchsorted(self._ends, positions, side="right")  # "right" steps over empty shards
        return shards, positions - self._starts[shards]


def _prepared_decode(dataset: Dataset) -> DecodeConfig:
    recipe = dataset.manifest.recipe.get("decode")
    return DecodeConfig() if dataset.kind == "tokens" or recipe is None else decode_config_of(recipe)


def _stored_size(dataset: Dataset) -> int:
    tokenizer = dataset.manifest.tokenizer
    if tokenizer is None or "image_size" not in tokenizer:
        raise InputError(f"the manifest of {dataset.url} does not say how large its crops are; make it again")
    return int(tokenizer["image_size"])
