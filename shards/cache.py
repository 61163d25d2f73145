"""Shards opened for reading: fetched whole and once, checked before first use, the last few kept open."""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import threading
from collections import OrderedDict
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from shards.index import codes_of
from shards.manifest import Dataset, ShardInfo, check_foreign_tar, read_shard_index

FETCH_TRIES = 3
"""A remote object that arrives damaged is fetched again; one that stays damaged stops the run."""

_PLACE_COLUMNS = ("sample_id", "image_offset", "image_bytes", "label")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OpenShard:
    """One shard ready to read; row i of everything is sample i of its index.

    `sample_ids` and `labels` are int64 [n], a label of -1 means none; `codes` are uint16 [n, grid area], None
    for image shards. `payload` starts at byte `payload_start` of the tar.
    """

    info: ShardInfo
    sample_ids: np.ndarray
    labels: np.ndarray
    codes: np.ndarray | None
    offsets: np.ndarray
    lengths: np.ndarray
    hashes: list[bytes] | None
    payload: mmap.mmap
    payload_start: int

    def image(self, row: int) -> bytes:
        """The encoded image of a row. In a tar indexed in place each image is checked here, at every read."""
        start = int(self.offsets[row]) - self.payload_start
        data = self.payload[start : start + int(self.lengths[row])]
        if self.hashes is not None and hashlib.sha256(data).digest() != self.hashes[row]:
            raise InputError(
                f"sample {self.sample_ids[row]} in {self.info.tar}, indexed in place as shard "
                f"{self.info.name}, has changed; bring the old tar back or prepare again"
            )
        return data


class ShardCache:
    """Opens shards of one dataset through an executor and keeps the last used ones, up to `max_bytes` of tar.

    Local tars are mapped where they lie, so what is kept is the kernel's page cache; remote ones go to an
    unnamed temporary file, which disappears with the process, and are mapped there. A shard that was evicted
    stays valid for whoever still holds it.
    """

    def __init__(self, dataset: Dataset, executor: Executor, max_bytes: int) -> None:
        self._dataset = dataset
        self._executor = executor
        self._max_bytes = max_bytes
        self._lock = threading.RLock()  # an inline executor opens the shard under it
        self._shards: OrderedDict[tuple[int, int], Future[OpenShard]] = OrderedDict()
        self._sizes: dict[tuple[int, int], int] = {}
        self._hashed: set[tuple[str, int, int, int]] = set()

    def get(self, view: int, number: int) -> Future[OpenShard]:
        """The shard, open or being opened. Its error, if it has one, is raised by the future, once."""
        key = (view, number)
        with self._lock:
            found = self._shards.get(key)
            failed = found is not None and found.done() and (found.cancelled() or found.exception())
            if found is None or failed:
                found = self._executor.submit(self._open, view, number)
                self._shards[key] = found
            self._shards.move_to_end(key)
            self._evict()
            return found

    def _open(self, view: int, number: int) -> OpenShard:
        info = self._dataset.shard(view, number)
        columns = [*_PLACE_COLUMNS]
        if self._dataset.kind == "tokens":
            columns.append("codes")
        if info.is_foreign:
            columns.append("image_hash")
        table = read_shard_index(info, columns)
        offsets = table.column("image_offset").to_numpy()
        lengths = table.column("image_bytes").to_numpy()
        first, end = int(offsets.min()), int((offsets + lengths).max())
        payload, payload_start = self._payload(info, first, end)
        if first < payload_start or end > payload_start + len(payload):
            raise InputError(
                f"{info.index} of shard {info.name} points outside {info.tar}; repair the dataset"
            )
        opened = OpenShard(
            info=info,
            sample_ids=table.column("sample_id").to_numpy(),
            labels=table.column("label").fill_null(-1).to_numpy().astype(np.int64),
            codes=codes_of(table) if self._dataset.kind == "tokens" else None,
            offsets=offsets,
            lengths=lengths,
            hashes=table.column("image_hash").to_pylist() if info.is_foreign else None,
            payload=payload,
            payload_start=payload_start,
        )
        with self._lock:
            self._sizes[view, number] = end - first if info.is_foreign else info.tar_bytes
            self._evict()
        return opened

    def _payload(self, info: ShardInfo, first: int, end: int) -> tuple[mmap.mmap, int]:
        """Bytes that hold [first, end) of the tar, checked, and where in the tar they start."""
        if info.is_foreign:
            check_foreign_tar(info)
            if storage.is_local(info.tar):
                return _mapped(info)[0], 0
            return _spooled(storage.read(info.tar, first, end - first)), first
        if not storage.is_local(info.tar):
            return _spooled(_fetched(info)), 0
        payload, identity = _mapped(info)
        if identity not in self._hashed:
            sha256 = hashlib.sha256(payload).hexdigest()
            if sha256 != info.tar_sha256:
                raise _damaged(info, f"{len(payload)} bytes with sha256 {sha256[:8]}…")
            self._hashed.add(identity)
        return payload, 0

    def _evict(self) -> None:
        """Drop what was used longest ago; the caller holds the lock."""
        total = sum(self._sizes.values())
        for key in list(self._shards):
            if total <= self._max_bytes or len(self._shards) == 1:
                return
            if key in self._sizes:
                total -= self._sizes.pop(key)
                del self._shards[key]


def _mapped(info: ShardInfo) -> tuple[mmap.mmap, tuple[str, int, int, int]]:
    """A local tar, mapped, and what its bytes are known by: path, size, modification time, inode."""
    try:
        with open(storage.absolute(info.tar), "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_size != info.tar_bytes:
                raise _damaged(info, f"{found.st_size} bytes")
            payload = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise _missing(info) from None
    return payload, (info.tar, found.st_size, found.st_mtime_ns, found.st_ino)


def _fetched(info: ShardInfo) -> bytes:
    """A remote tar; fetched again when it arrives damaged, because the transfer may have been at fault."""
    data = b""
    for _ in range(FETCH_TRIES):
        try:
            data = storage.read(info.tar)
        except FileNotFoundError:
            raise _missing(info) from None
        if len(data) == info.tar_bytes and sha256_hex(data) == info.tar_sha256:
            return data
    raise _damaged(info, f"{len(data)} bytes with sha256 {sha256_hex(data)[:8]}…")


def _spooled(data: bytes) -> mmap.mmap:
    """The bytes in an unnamed temporary file, mapped: the kernel may write them out, so memory stays free."""
    try:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(
            f"no room for {len(data)} bytes in {tempfile.gettempdir()} ({error.strerror}); "
            "free some, or set TMPDIR to a larger disk"
        ) from None


def _damaged(info: ShardInfo, found: str) -> InputError:
    written = f"{info.tar_bytes} bytes" + (f" with sha256 {info.tar_sha256[:8]}…" if info.tar_sha256 else "")
    return InputError(
        f"{info.tar} of shard {info.name} is damaged: {found}, written were {written}; "
        "copy the dataset again or repair it"
    )


def _missing(info: ShardInfo) -> InputError:
    return InputError(f"{info.tar} of shard {info.name} is missing; copy the dataset again or repair it")
