"""Threads end with their reader, a fork starts its own, and memory is taken again only when nobody has it."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from shards.dataset.dataset import Dataset
from shards.pixels.crops import StoredCrops
from shards.reader.order import view_of_epoch
from shards.reader.reader import Batches, ShardReader
from shards.reader.workers import Buffers
from tests.shards.reader.reading import (
    assert_same,
    keys,
    write_dataset,
)


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shard-")]


def test_close_leaves_no_thread(tokens: Dataset, tmp_path: Path) -> None:
    reader = ShardReader(tokens, StoredCrops(), Batches(2, num_threads=3))
    assert reader_threads() == []  # nothing starts before the first batch
    next(reader.batches(0))  # abandoned in mid-epoch
    assert reader_threads() != []
    reader.close()
    reader.close()
    assert reader_threads() == []

    damaged = write_dataset(str(tmp_path), "tokens", ranges=(10, 13, 16))
    Path(damaged.shard(view_of_epoch(3, 0, 0), 0).tar).unlink()
    with pytest.raises(InputError), ShardReader(damaged, StoredCrops(), Batches(2)) as reader:
        list(reader.batches(0))
    assert reader_threads() == []


def test_closing_under_an_iterator_ends_it_with_an_error(tokens: Dataset) -> None:
    reader = ShardReader(tokens, StoredCrops(), Batches(2, num_threads=1, prefetch=1))
    batches = reader.batches(0)
    next(batches)
    reader.close()
    with pytest.raises(RuntimeError):
        list(batches)
    assert len(list(reader.batches(0))) == 10  # and the reader can be used anew
    reader.close()


def test_a_reader_in_use_may_be_pickled_and_forked(tokens: Dataset) -> None:
    with ShardReader(tokens, StoredCrops(), Batches(4, seed=2, num_threads=2)) as reader:
        expected = list(reader.batches(1))
        with pickle.loads(pickle.dumps(reader)) as copy:
            assert_same(copy.batches(1), expected)

        def read_in_child(results: Any) -> None:
            results.put(keys(reader.batches(1)))
            reader.close()

        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        child = context.Process(target=read_in_child, args=(results,))
        child.start()
        child.join(30)
        exitcode = child.exitcode
        child.kill()  # one that hangs would keep the whole session waiting
        assert exitcode == 0
        assert results.get() == keys(expected)


def test_what_is_kept_of_a_batch_never_changes(
    tokens: Dataset, reader_of: Callable[..., ShardReader]
) -> None:
    """Arrays are used again, but not while anything refers to a part of them."""
    expected = np.concatenate([batch.pixels.copy() for batch in reader_of(tokens).batches(0)])
    kept: list[Any] = []
    reader, places = reader_of(tokens, num_threads=2), set()
    for epoch in (0, 3, 6):  # the same view, mostly in another order
        for number, batch in enumerate(reader.batches(epoch)):
            places.add(batch.pixels.ctypes.data)
            if epoch == 0:
                kept.append(batch.pixels[1:3] if number % 2 else memoryview(batch.pixels)[1:3])
            del batch
    for number, part in enumerate(kept):
        assert np.array_equal(np.asarray(part), expected[5 * number + 1 : 5 * number + 3])
    assert len(places) < 12


def test_memory_is_taken_again_once_nothing_refers_to_it() -> None:
    buffers = Buffers(most=2)
    first, second = buffers.take((2, 3)), buffers.take((4, 5))
    places = [first.ctypes.data, second.ctypes.data]
    part = memoryview(first)[1:]
    del first
    assert not np.shares_memory(buffers.take((2, 3)), np.asarray(part))  # of an array that is not kept
    del part
    again = buffers.take((1, 6))  # a smaller batch, or one of another shape
    assert (again.ctypes.data, again.shape) == (places[0], (1, 6))
    del second
    assert buffers.take((3, 6)).ctypes.data == places[1]
