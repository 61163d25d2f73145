"""Shards opened for reading: fetched whole and once, checked before first use, the last few kept open."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from pipeline.remote import StoreError
from shards.dataset.dataset import Dataset
from shards.dataset.rows import check_in_place
from shards.format.build import MAX_SHARD_BYTES
from shards.format.index import codes_of
from shards.format.manifest import DamageError, ShardInfo
from shards.reader.disk_cache import CacheConfig, CachedObject, DiskCache, MappedFile, map_file
from shards.reader.figures import Telemetry

FETCH_TRIES = 3
"""A remote object that arrives damaged is fetched again; one that stays damaged stops the run."""

_PLACE_COLUMNS = ("sample_id", "image_offset", "image_bytes", "label")


def record_type(dataset: Dataset) -> np.dtype[np.void]:
    """What is known of a sample beside its image, together, so that one copy takes it into a batch.

    `sample_id` and `label` int64, a label of -1 means none; in token datasets `codes` uint16 [grid area].
    """
    fields: list[tuple[Any, ...]] = [("sample_id", np.int64), ("label", np.int64)]
    if dataset.kind == "tokens":
        rows, columns = dataset.manifest.grid
        fields.append(("codes", np.uint16, (rows * columns,)))
    return np.dtype(fields)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OpenShard:
    """One shard ready to read; row i of everything is sample i of its index.

    `records` are of `record_type`, [n]. `starts` and `ends` bound each image in `payload`, which begins
    somewhere in the tar.
    """

    info: ShardInfo
    records: np.ndarray
    starts: list[int]
    ends: list[int]
    hashes: list[bytes] | None
    payload: memoryview
    """Of a map: what lives in it is not copied, and the file stays as long as something refers to it."""

    def image(self, row: int) -> memoryview:
        """The encoded image of a row. In a tar indexed in place each image is checked here, at every read."""
        data = self.payload[self.starts[row] : self.ends[row]]
        if self.hashes is not None and hashlib.sha256(data).digest() != self.hashes[row]:
            raise InputError(
                f"sample {self.records['sample_id'][row]} in {self.info.tar}, indexed in place as shard "
                f"{self.info.name}, has changed; bring the old tar back or prepare again"
            )
        return data


def shard_bytes(dataset: Dataset, view: int) -> np.ndarray:
    """Bytes that each shard of a view takes while it is read, int64 [shards]; at most, for foreign tars."""
    return np.minimum(dataset.shard_bytes(view), MAX_SHARD_BYTES + (1 << 20))


def cached_tar(info: ShardInfo) -> CachedObject | None:
    """What the node's cache keeps for a shard; None for local tars, and for foreign ones."""
    if info.tar_sha256 is None or storage.is_local(info.tar):
        return None
    return CachedObject(name=info.tar_sha256, bytes=info.tar_bytes, what=f"{info.tar} of shard {info.name}")


class OpenShards:
    """Opens shards of one dataset through an executor and keeps the last used ones, up to `max_bytes` of tar.

    Local tars are mapped where they lie, so what is kept is the kernel's page cache; remote ones are fetched
    into the node's cache and mapped there. A shard that was dropped stays valid for whoever still holds it.
    """

    def __init__(
        self,
        dataset: Dataset,
        executor: Executor,
        max_bytes: int,
        disk: DiskCache | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._dataset = dataset
        self._executor = executor
        self._max_bytes = max_bytes
        self._disk = DiskCache(CacheConfig()) if disk is None else disk
        self._telemetry = Telemetry() if telemetry is None else telemetry
        self._lock = threading.RLock()  # an inline executor opens the shard under it
        self._shards: OrderedDict[tuple[int, int], Future[OpenShard]] = OrderedDict()
        self._sizes: dict[int, np.ndarray] = {}
        self._total = 0
        self._checked: set[tuple[str, int, int, int]] = set()

    def get(self, view: int, number: int) -> Future[OpenShard]:
        """The shard, open or being opened. Its error, if it has one, is raised by the future, once."""
        key = (view, number)
        with self._lock:
            if key in self._shards:
                if not _failed(self._shards[key]):
                    self._shards.move_to_end(key)
                    return self._shards[key]
                self._forget(key)
            # Room is made before the shard is opened, so that a node's cache has it too.
            size = self.size(view, number)
            while self._shards and self._total + size > self._max_bytes:
                self._forget(next(iter(self._shards)))
            self._total += size
            future = self._executor.submit(self._open, view, number)
            self._shards[key] = future
            return future

    def touch(self, view: int, numbers: Iterable[int]) -> None:
        """Shards are used on: those that are not give way before them.

        What gives way while somebody holds it stays mapped, and keeps its room on the disk too.
        """
        with self._lock:
            for number in numbers:
                if (view, number) in self._shards:
                    self._shards.move_to_end((view, number))

    def size(self, view: int, number: int) -> int:
        """Bytes that a shard takes of `max_bytes`."""
        if view not in self._sizes:
            self._sizes[view] = shard_bytes(self._dataset, view)
        return int(self._sizes[view][number])

    def _forget(self, key: tuple[int, int]) -> None:
        del self._shards[key]
        self._total -= self.size(*key)

    def _open(self, view: int, number: int) -> OpenShard:
        info = self._dataset.shard(view, number)
        columns = [*_PLACE_COLUMNS]
        if self._dataset.kind == "tokens":
            columns.append("codes")
        if info.in_place:
            columns.append("image_hash")
        with named_failures(info):
            table = self._dataset.read_index(view, number, columns)
            offsets = table.column("image_offset").to_numpy()
            lengths = table.column("image_bytes").to_numpy()
            first, end = int(offsets.min()), int((offsets + lengths).max())
            file, file_start = self._file(info, first, end)
        if first < file_start or end > file_start + len(file.payload):
            raise InputError(
                f"{info.index} of shard {info.name} points outside {info.tar}; repair the dataset"
            )
        self._telemetry.opened(hit=file.was_here)
        starts = offsets.astype(np.int64) - file_start
        records = np.empty(len(table), record_type(self._dataset))
        records["sample_id"] = table.column("sample_id").to_numpy()
        records["label"] = table.column("label").fill_null(-1).to_numpy()
        if self._dataset.kind == "tokens":
            records["codes"] = codes_of(table)
        return OpenShard(
            info=info,
            records=records,
            # Lists: one sample is looked up ten times faster than in an array.
            starts=starts.tolist(),
            ends=(starts + lengths).tolist(),
            hashes=table.column("image_hash").to_pylist() if info.in_place else None,
            payload=memoryview(file.payload),
        )

    def _file(self, info: ShardInfo, first: int, end: int) -> tuple[MappedFile, int]:
        """A file that holds the bytes [first, end) of the tar, checked, and where in the tar it starts."""
        if info.in_place:
            check_in_place(info)
            if storage.is_local(info.tar):
                return _mapped(info), 0
            place = f"{info.tar} {info.tar_version} {first} {end}"
            part = CachedObject(
                name=sha256_hex(place.encode()), bytes=end - first, what=f"{info.tar} of shard {info.name}"
            )
            return self._disk.open(part, functools.partial(self._fetched_part, info, first, end)), first
        entry = cached_tar(info)
        if entry is None:
            file = _mapped(info)
            if (wrong := self._unlike(info, file)) is not None:
                raise _damaged(info, wrong)
            return file, 0
        file = self._disk.open(entry, functools.partial(self._fetched, info))
        if self._unlike(info, file) is not None:
            self._disk.drop(entry)  # damaged on this disk; the store may have it whole
            file = self._disk.open(entry, functools.partial(self._fetched, info))
            if (wrong := self._unlike(info, file)) is not None:
                raise _damaged(info, wrong)
        return file, 0

    def _unlike(self, info: ShardInfo, file: MappedFile) -> str | None:
        """What is wrong with a tar, hashed once per version of its file; what was fetched is checked."""
        if file.was_here and file.identity not in self._checked:
            sha256 = hashlib.sha256(file.payload).hexdigest()
            if sha256 != info.tar_sha256:
                return f"{len(file.payload)} bytes with sha256 {sha256[:8]}…"
        self._checked.add(file.identity)
        return None

    def _fetched(self, info: ShardInfo) -> bytes:
        """A remote tar; fetched again when it arrives damaged: the transfer may have been at fault."""
        data = b""
        for _ in range(FETCH_TRIES):
            data = self._timed(info, 0, None)
            if len(data) == info.tar_bytes and sha256_hex(data) == info.tar_sha256:
                return data
        raise _damaged(info, f"{len(data)} bytes with sha256 {sha256_hex(data)[:8]}…")

    def _fetched_part(self, info: ShardInfo, first: int, end: int) -> bytes:
        """Part of a foreign tar, whose images are checked one by one when they are read."""
        for _ in range(FETCH_TRIES):
            data = self._timed(info, first, end - first)
            if len(data) == end - first:
                return data
        raise InputError(f"{info.tar} of shard {info.name} ends before byte {end}; bring the old one back")

    def _timed(self, info: ShardInfo, start: int, length: int | None) -> bytes:
        began = time.perf_counter()
        try:
            data = storage.read(info.tar, start, length, on_retry=self._telemetry.retried)
        except FileNotFoundError:
            raise _missing(info) from None
        self._telemetry.fetched(len(data), time.perf_counter() - began)
        return data


@contextlib.contextmanager
def named_failures(info: ShardInfo) -> Iterator[None]:
    """Failures of a store inside, with the shard they concern and the way out."""
    try:
        yield
    except PermissionError as error:
        raise InputError(
            f"shard {info.name} of {info.tar} may not be read ({' '.join(str(error).split())}); check the "
            "credentials of this node and who may read the dataset"
        ) from None
    except StoreError as error:
        raise StoreError(f"shard {info.name}: {error}") from error


def _failed(future: Future[OpenShard]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def _mapped(info: ShardInfo) -> MappedFile:
    """A local tar, mapped where it lies."""
    try:
        with open(storage.absolute(info.tar), "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != info.tar_bytes:
                raise _damaged(info, f"{num_bytes} bytes")
            # A tar indexed in place may be of any size, and a shard only a part of it.
            return map_file(file.fileno(), info.tar, was_here=True, read_now=not info.in_place)
    except FileNotFoundError:
        raise _missing(info) from None


def _damaged(info: ShardInfo, actual: str) -> DamageError:
    written = f"{info.tar_bytes} bytes" + (f" with sha256 {info.tar_sha256[:8]}…" if info.tar_sha256 else "")
    return DamageError(
        f"{info.tar} of shard {info.name} is damaged, or of another dataset: {actual}, written were {written}"
        "; copy the dataset again or repair it"
    )


def _missing(info: ShardInfo) -> DamageError:
    return DamageError(f"{info.tar} of shard {info.name} is missing; copy the dataset again or repair it")
