"""The cache of a node: one fetch for all, a bound that holds, and nothing removed that somebody reads."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from shards.reader import disk_cache as node_cache
from shards.reader.disk_cache import CacheConfig, CachedObject, DiskCache, MappedFile


def content(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def wanted(number: int, size: int = 1000) -> CachedObject:
    return CachedObject(name=sha256_hex(content(number, size)), bytes=size, what=f"object {number}")


def get(cache: DiskCache, number: int, size: int = 1000) -> MappedFile:
    return cache.open(wanted(number, size), lambda: content(number, size))


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make_cache(folder: Path) -> Callable[[int], DiskCache]:
    return lambda max_bytes: DiskCache(CacheConfig(folder=str(folder), bytes=max_bytes))


def test_many_threads_fetch_an_object_once(make_cache: Callable[[int], DiskCache]) -> None:
    fetched: list[int] = []
    together = threading.Barrier(6)

    def fetch() -> bytes:
        fetched.append(1)
        return content(7)

    def ask(_: int) -> bytes:
        together.wait()
        return bytes(make_cache(10_000).open(wanted(7), fetch).payload)

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(ask, range(6))) == {content(7)}
    assert len(fetched) == 1


def _read_in_child(folder: str, log: str) -> None:
    def fetch() -> bytes:
        with open(log, "a") as file:
            file.write("fetched\n")
        return content(3)

    cache = DiskCache(CacheConfig(folder=folder, bytes=10_000))
    os._exit(0 if bytes(cache.open(wanted(3), fetch).payload) == content(3) else 1)


def test_processes_of_a_node_share_a_fetch(folder: Path, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_read_in_child, args=(str(folder), log)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert Path(log).read_text() == "fetched\n"


def test_what_was_used_longest_ago_goes_first_and_the_bound_holds(
    make_cache: Callable[[int], DiskCache], folder: Path
) -> None:
    cache = make_cache(3000)
    for number in (1, 2, 3):
        get(cache, number)
    assert get(cache, 1).was_here  # used again, so the second is now the oldest
    assert not get(cache, 4).was_here
    assert kept(folder) == {wanted(number).name for number in (1, 3, 4)}
    get(cache, 5, 2500)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3000
    assert cache.has(wanted(5, 2500)) and not cache.has(wanted(4))


def test_what_is_read_is_never_removed(
    make_cache: Callable[[int], DiskCache], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_cache, "ROOM_WAIT_S", 0.2)
    cache = make_cache(2000)
    first, second = get(cache, 1), get(cache, 2)
    with pytest.raises(InputError, match=r"no room for object 3: 2,000 of the 2,000 bytes of cache\.bytes"):
        get(cache, 3)
    assert (bytes(first.payload), bytes(second.payload)) == (content(1), content(2))
    assert kept(folder) == {wanted(1).name, wanted(2).name}
    del first
    assert not get(cache, 3).was_here  # the first may go now
    assert bytes(second.payload) == content(2)


def test_room_is_waited_for(make_cache: Callable[[int], DiskCache]) -> None:
    cache, held = make_cache(1000), []
    held.append(get(cache, 1))
    timer = threading.Timer(0.2, held.clear)
    timer.start()
    assert bytes(get(cache, 2).payload) == content(2)
    timer.join()


def test_a_download_that_a_killed_process_left_is_removed(
    make_cache: Callable[[int], DiskCache], folder: Path
) -> None:
    folder.mkdir()
    (folder / f".{wanted(1).name[:32]}.99.abcd.partial").write_bytes(bytes(900))
    get(make_cache(1000), 1)
    assert kept(folder) == {wanted(1).name}


def test_a_failed_fetch_leaves_nothing(make_cache: Callable[[int], DiskCache], folder: Path) -> None:
    def fail() -> bytes:
        raise ConnectionError("gone")

    cache = make_cache(1000)
    with pytest.raises(ConnectionError):
        cache.open(wanted(1), fail)
    assert kept(folder) == set()
    assert not get(cache, 1).was_here


@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_named_and_leaves_nothing(
    make_cache: Callable[[int], DiskCache], folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node_cache.os, where, full)
    with pytest.raises(
        InputError, match=rf"the disk of {folder} is full: object 1 needs 1,000 bytes.*free some"
    ):
        get(make_cache(5000), 1)
    assert kept(folder) == set()


def test_a_cut_or_damaged_file_is_not_served(make_cache: Callable[[int], DiskCache], folder: Path) -> None:
    cache = make_cache(5000)
    get(cache, 1)
    (folder / wanted(1).name).write_bytes(b"short")
    assert not cache.has(wanted(1))
    found = get(cache, 1)
    assert not found.was_here and bytes(found.payload) == content(1)
    cache.drop(wanted(1))
    cache.drop(wanted(1))
    assert kept(folder) == set()


def test_identity_changes_with_the_file_not_with_its_use(
    make_cache: Callable[[int], DiskCache], folder: Path
) -> None:
    cache = make_cache(5000)
    first, again = get(cache, 1).identity, get(cache, 1).identity
    assert first == again
    path = folder / wanted(1).name
    replaced = folder / "new"
    replaced.write_bytes(content(2))
    os.replace(replaced, path)
    assert get(cache, 1).identity != first


def test_wrong_settings_are_named(tmp_path: Path, make_cache: Callable[[int], DiskCache]) -> None:
    with pytest.raises(InputError, match=r"object 1 has 1,000 bytes, cache\.bytes is 999"):
        get(make_cache(999), 1)
    with pytest.raises(InputError, match=r"cache\.bytes is 0"):
        CacheConfig(bytes=0)
    with pytest.raises(InputError, match="local disk"):
        CacheConfig(folder="s3://bucket/cache")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot make the cache folder .*another --cache\.folder"):
        get(DiskCache(CacheConfig(folder=str(tmp_path / "file"))), 1)
