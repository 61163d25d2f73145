"""Shards are opened once, checked again when they changed, and dropped when there are too many."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from shards.dataset import dataset as dataset_module
from shards.dataset.dataset import Dataset, open_dataset
from shards.reader.open_shards import OpenShards


@pytest.fixture
def dataset(tmp_path: Path, small_dataset: Callable[..., Any]) -> Dataset:
    small_dataset().write(str(tmp_path))
    return open_dataset(str(tmp_path))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose index was read: one per opening."""
    names: list[str] = []
    read = dataset_module.read_shard_index

    def counted(shard: Any, columns: Any) -> Any:
        names.append(shard.name)
        return read(shard, columns)

    monkeypatch.setattr(dataset_module, "read_shard_index", counted)
    return names


def test_many_threads_open_a_shard_once(dataset: Dataset, opened: list[str]) -> None:
    with ThreadPoolExecutor(2) as fetchers, ThreadPoolExecutor(8) as askers:
        shards = OpenShards(dataset, fetchers, max_bytes=1 << 30)
        together = threading.Barrier(8)

        def ask() -> Any:
            together.wait()
            return shards.get(1, 2).result()

        found = [future.result() for future in [askers.submit(ask) for _ in range(8)]]
    assert opened == ["v01-00002"]
    assert len({id(shard) for shard in found}) == 1
    assert found[0].info == dataset.shard(1, 2)


def test_the_shard_used_longest_ago_is_dropped(dataset: Dataset, opened: list[str]) -> None:
    sizes = [dataset.shard(0, number).tar_bytes for number in range(3)]
    with ThreadPoolExecutor(1) as fetchers:
        shards = OpenShards(dataset, fetchers, max_bytes=sizes[0] + max(sizes[1:]))
        first = shards.get(0, 0).result()
        for number in (1, 0, 2, 0, 1):
            shards.get(0, number).result()
    assert opened == ["v00-00000", "v00-00001", "v00-00002", "v00-00001"]
    assert bytes(first.image(0)).startswith(b"\xff\xd8")  # what was dropped stays valid for its holder


def test_a_failure_is_not_remembered(dataset: Dataset) -> None:
    tar = Path(dataset.shard(0, 0).tar)
    good = tar.read_bytes()
    with ThreadPoolExecutor(1) as fetchers:
        shards = OpenShards(dataset, fetchers, max_bytes=1 << 30)
        tar.write_bytes(good[:-1] + b"!")
        with pytest.raises(InputError, match="damaged"):
            shards.get(0, 0).result()
        tar.write_bytes(good)
        assert bytes(shards.get(0, 0).result().image(0)).startswith(b"\xff\xd8")


def test_a_tar_that_changed_after_its_first_use_is_checked_again(dataset: Dataset) -> None:
    tar = Path(dataset.shard(0, 0).tar)
    with ThreadPoolExecutor(1) as fetchers:
        shards = OpenShards(dataset, fetchers, max_bytes=1)
        shards.get(0, 0).result()
        replaced = tar.with_suffix(".new")
        replaced.write_bytes(tar.read_bytes()[:-1] + b"!")
        os.replace(replaced, tar)
        shards.get(0, 1).result()  # pushes the first one out
        with pytest.raises(InputError, match=r"shard v00-00000 is damaged"):
            shards.get(0, 0).result()
