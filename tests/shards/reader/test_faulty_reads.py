"""Reading from a store that is slow, faulty or wrong: every batch is right, or the failure has a name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.errors import InputError
from pipeline.remote import RetryPolicy, StoreError
from shards.dataset.dataset import Dataset, open_dataset
from shards.format.manifest import ShardInfo
from shards.pixels.crops import StoredCrops
from shards.reader import disk_cache as node_cache
from shards.reader import open_shards as cache
from shards.reader.disk_cache import CacheConfig
from shards.reader.order import view_of_epoch
from shards.reader.reader import Batches, SampleBatch, ShardReader
from tests.chaos.proxy import Faults

if TYPE_CHECKING:
    from tests.chaos.proxy import FaultProxy
    from tests.shards.conftest import SmallDataset, Written

BATCH = 4


@pytest.fixture
def remote(fault_proxy: FaultProxy, s3_url: str, written_once: Written) -> Dataset:
    """The written tokens in a bucket behind the proxy."""
    del fault_proxy
    for found in storage.list_files(written_once.tokens):
        storage.put(s3_url + found.url.removeprefix(written_once.tokens), storage.read(found.url))
    return open_dataset(s3_url, "tokens")


@pytest.fixture
def make_reader(remote: Dataset, tmp_path: Path) -> Callable[..., ShardReader]:
    def make(folder: str = "cache", num_bytes: int = 1 << 20, **how: Any) -> ShardReader:
        kept = CacheConfig(folder=str(tmp_path / folder), bytes=num_bytes)
        batches = Batches(**{"size": BATCH, "num_threads": 1, **how})
        return ShardReader(remote, StoredCrops(), batches, kept)

    return make


def read(reader: ShardReader, epochs: int = 1) -> list[SampleBatch]:
    with reader:
        return [batch for epoch in range(epochs) for batch in reader.batches(epoch)]


def assert_same(found: list[SampleBatch], expected: list[SampleBatch]) -> None:
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert one.codes is not None and other.codes is not None and np.array_equal(one.codes, other.codes)


@pytest.fixture
def expected(written_once: Written) -> list[SampleBatch]:
    return read(
        ShardReader(open_dataset(written_once.tokens), StoredCrops(), Batches(BATCH, num_threads=0)), 3
    )


def _bytes_in(folder: Path) -> int:
    """What the files of a cache take, those that are being fetched too, while nobody makes room."""
    with open(folder / node_cache._LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes: dict[int, int] = {}
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # renamed, once it is complete
                found = path.stat()
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def first_shard(dataset: Dataset) -> ShardInfo:
    """A shard that epoch 0 reads."""
    return dataset.shard(view_of_epoch(dataset.num_views, 0, 0), 0)


# ------------------------------------------------------------------------------------------------ slow


def test_runs_on_one_node_fetch_each_shard_once(
    fault_proxy: FaultProxy, make_reader: Callable[..., ShardReader], expected: list[SampleBatch]
) -> None:
    fault_proxy.faults = Faults(delay=1.0, delay_s=0.03)
    readers = [make_reader(epochs=3), make_reader(epochs=3)]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda reader: read(reader, 3), readers):
            assert_same(found, expected)
    figures = [reader.telemetry.take() for reader in readers]
    assert sum(one.gets for one in figures) == 3 * 3  # shards of three views
    assert min(one.get_p50_s for one in figures if one.gets) >= 0.03
    assert sum(one.samples for one in figures) == 2 * 3 * 12


def test_a_small_cache_holds_its_bound_and_gives_fewer_lanes(
    remote: Dataset, make_reader: Callable[..., ShardReader], tmp_path: Path
) -> None:
    largest = max(int(remote.shard_bytes(view).max()) for view in range(3))
    reader = make_reader(num_bytes=2 * largest, epochs=2, size=2, prefetch=1)
    assert (reader.lanes, reader.window) == (1, 1)
    assert "before the first batch; 0 of them in" in reader.begin()
    seen = []
    with reader:
        for epoch in range(2):
            for batch in reader.batches(epoch):
                seen += batch.keys
                kept = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
                assert sum(kept) <= 2 * largest
    assert len(set(seen)) == 2 * 12
    with pytest.raises(InputError, match=rf"cache\.bytes is {largest:,}.*give at least {2 * largest:,}"):
        make_reader(num_bytes=largest)


@pytest.mark.parametrize(("room", "batch_size"), [(7, 3), (24, 26)])
def test_a_cache_for_some_of_many_shards_is_never_too_full_to_go_on(
    fault_proxy: FaultProxy,
    s3_url: str,
    small_dataset: Callable[..., SmallDataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    batch_size: int,
) -> None:
    """Shards that are done give way to those that are due, whatever order they were opened in."""
    monkeypatch.setattr(node_cache, "ROOM_WAIT_S", 15.0)
    local = str(tmp_path / "local")
    small = small_dataset(first_ids=(*range(0, 400, 10), 400), views=1, rejected={})
    small.write(local)
    for found in storage.list_files(local):
        storage.put(s3_url + found.url.removeprefix(local), storage.read(found.url))
    dataset = open_dataset(s3_url, "tokens")
    bound = room * int(dataset.shard_bytes(0).max())
    folder = tmp_path / "cache"
    with ShardReader(
        dataset,
        StoredCrops(),
        Batches(batch_size, epochs=3, drop_last=False),
        CacheConfig(folder=str(folder), bytes=bound),
    ) as reader:
        assert reader.lanes > 1
        for epoch in range(3):
            seen = []
            for batch in reader.batches(epoch):
                seen += batch.keys
                assert _bytes_in(folder) <= bound
            assert len(set(seen)) == len(seen) == 400


# ------------------------------------------------------------------------------------------------ faulty


@pytest.mark.parametrize("kind", ["cut", "slow_down", "drop_after"])
def test_faults_that_pass_are_repeated_and_counted(
    fault_proxy: FaultProxy,
    make_reader: Callable[..., ShardReader],
    expected: list[SampleBatch],
    kind: str,
) -> None:
    fault_proxy.faults = Faults(**{kind: 0.4})
    reader = make_reader()
    assert_same(read(reader, 3), expected)
    assert fault_proxy.counts[kind] > 0


@pytest.mark.parametrize("faults", [Faults(slow_down=1.0), Faults(silent=True)])
def test_a_store_that_never_recovers_is_named(
    fault_proxy: FaultProxy,
    remote: Dataset,
    make_reader: Callable[..., ShardReader],
    monkeypatch: pytest.MonkeyPatch,
    faults: Faults,
) -> None:
    patience = RetryPolicy(connect_s=0.2, answer_s=0.2, request_s=1, retry_s=0.3, first_wait_s=0.02)
    monkeypatch.setattr("pipeline.remote.RETRIES", patience)
    monkeypatch.setattr("pipeline.remote._clients", {})
    fault_proxy.faults = faults
    with pytest.raises(StoreError, match=rf"shard v0\d-0000\d: {remote.url}/\S+: the store did not recover"):
        read(make_reader())


def test_an_object_that_is_gone_is_named(remote: Dataset, make_reader: Callable[..., ShardReader]) -> None:
    shard = first_shard(remote)
    for url in (shard.tar, shard.index):
        data = storage.read(url)
        storage.remove(url)
        with pytest.raises(InputError, match=rf"{url} of shard {shard.name} is missing; copy"):
            read(make_reader())
        storage.put(url, data)


def test_a_hash_mismatch_is_fetched_twice_more_then_named(
    remote: Dataset, make_reader: Callable[..., ShardReader]
) -> None:
    shard = first_shard(remote)
    data = bytearray(storage.read(shard.tar))
    data[700] ^= 1
    storage.put(shard.tar, bytes(data))
    reader = make_reader()
    with pytest.raises(InputError, match=rf"{shard.tar} of shard {shard.name} is damaged.*; copy"):
        read(reader)
    assert reader.telemetry.take().gets >= cache.FETCH_TRIES


def test_a_shard_of_another_dataset_is_named(
    remote: Dataset, make_reader: Callable[..., ShardReader]
) -> None:
    shard, other = first_shard(remote), remote.shard(view_of_epoch(3, 0, 1), 0)
    storage.put(shard.tar, storage.read(other.tar))
    with pytest.raises(
        InputError, match=rf"{shard.tar} of shard {shard.name} is damaged, or of another dataset"
    ):
        read(make_reader())


def test_a_refusal_is_named(
    remote: Dataset, make_reader: Callable[..., ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, ask = first_shard(remote), storage.read

    def refuse(url: str, *where: Any, **how: Any) -> bytes:
        if url == shard.tar:
            raise PermissionError(f"{url}: Access Denied")
        return ask(url, *where, **how)

    monkeypatch.setattr(storage, "read", refuse)
    with pytest.raises(InputError, match=rf"shard {shard.name} of {shard.tar} may not be read.*credentials"):
        read(make_reader())


def test_a_full_disk_is_named(
    make_reader: Callable[..., ShardReader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node_cache.os, "posix_fallocate", full)
    with pytest.raises(
        InputError, match=r"the disk of .*cache is full: s3://\S+\.tar of shard v0\d-0000\d needs"
    ):
        read(make_reader())
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".partial"]


def test_a_cache_that_vanishes_is_filled_again(
    make_reader: Callable[..., ShardReader], tmp_path: Path, expected: list[SampleBatch]
) -> None:
    reader = make_reader(epochs=3)
    with reader:
        found = list(reader.batches(0))
        shutil.rmtree(tmp_path / "cache")
        found += [*reader.batches(1), *reader.batches(2)]
    assert_same(found, expected)
