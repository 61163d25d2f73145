"""Datasets and readers that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shards.dataset.dataset import Dataset
from shards.pixels.crops import Crops
from shards.reader.disk_cache import CacheConfig
from shards.reader.reader import Batches, ShardReader
from tests.shards.reader.reading import (
    STORED,
    write_dataset,
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(str(tmp_path_factory.mktemp("tokens")), "tokens")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(str(tmp_path_factory.mktemp("images")), "images")


@pytest.fixture
def reader_of() -> Iterator[Callable[..., ShardReader]]:
    """Readers that are closed when the test ends; inline unless it asks for threads."""
    made: list[ShardReader] = []

    def make(
        dataset: Dataset,
        crops: Crops | None = STORED,
        cache: CacheConfig | None = None,
        **settings: Any,
    ) -> ShardReader:
        batches = Batches(**{"size": 5, "num_threads": 0, **settings})
        made.append(ShardReader(dataset, crops, batches, cache))
        return made[-1]

    yield make
    for reader in made:
        reader.close()
