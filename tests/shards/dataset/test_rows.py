"""Rows and samples of crops: the bytes that were stored, checked, in as few requests as their gaps allow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset import codes as codes_module
from shards.dataset import rows as rows_module
from shards.dataset.codes import draw_sample
from shards.dataset.dataset import Dataset, open_dataset
from shards.dataset.rows import read_rows
from shards.format.index import codes_of
from shards.pixels.views import decode_crop, encode_crop


@pytest.fixture
def dataset(small_dataset: Callable, tmp_path: Path) -> Dataset:
    small_dataset(first_ids=(0, 4, 7, 9), views=2, rejected={5: "truncated"}).write(str(tmp_path / "tokens"))
    return open_dataset(str(tmp_path / "tokens"))


def test_codes_and_pixels_are_those_of_the_named_crop(dataset: Dataset):
    sample = draw_sample(dataset, 5, seed=3)
    stored = {}
    for shard in dataset.shards(0):
        table = dataset.read_index(0, shard.number)
        stored |= dict(zip(table.column("key").to_pylist(), codes_of(table), strict=True))
    keys = [place.key for place in sample.places]
    assert len(keys) == 5 == len(set(keys)) and keys == sorted(keys)
    for place, codes in zip(sample.places, sample.codes, strict=True):
        np.testing.assert_array_equal(codes, stored[place.key])
        pixels = np.random.default_rng([int(place.key[:10]), 0]).integers(0, 256, (16, 16, 3), np.uint8)
        np.testing.assert_array_equal(decode_crop(place.read()), decode_crop(encode_crop(pixels, 95)))


def test_the_seed_decides_and_no_crop_comes_twice(dataset: Dataset):
    def keys(number: int, seed: int) -> list[str]:
        return [place.key for place in draw_sample(dataset, number, seed=seed).places]

    assert keys(4, 1) == keys(4, 1)
    assert len({tuple(keys(4, seed)) for seed in range(8)}) > 4
    assert len(keys(100, 0)) == 8 == len(set(keys(100, 0))), "one of nine was rejected"


def test_few_shards_are_read_unless_they_hold_too_little(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codes_module, "SAMPLED_SHARDS", 1)

    def shards(number: int, seed: int) -> set[str]:
        return {place.tar for place in draw_sample(dataset, number, seed=seed).places}

    assert all(len(shards(1, seed)) == 1 for seed in range(6))
    assert len(set.union(*(shards(1, seed) for seed in range(12)))) == 3, "not always the same one"
    assert len(draw_sample(dataset, 8, seed=0).places) == 8


def test_what_is_damaged_or_gone_is_named(dataset: Dataset):
    place = draw_sample(dataset, 1, seed=0).places[0]
    tar = Path(place.tar)
    data = bytearray(tar.read_bytes())
    data[place.offset + 200] ^= 1
    tar.write_bytes(bytes(data))
    with pytest.raises(InputError, match=f"damaged at {place.key}"):
        place.read()
    tar.unlink()
    with pytest.raises(InputError, match="is missing"):
        place.read()


@pytest.mark.parametrize("gap", [0, 2_000, 1 << 20])
def test_rows_are_the_images_that_were_stored(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, gap: int):
    """Whatever is read in one request: nothing, neighbours, or all of a shard."""
    monkeypatch.setattr(rows_module, "MAX_GAP_BYTES", gap)
    requests: list[tuple[int, int]] = []

    def counted(url: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        if num_bytes is not None:
            requests.append((start, num_bytes))
        return read(url, start, num_bytes)

    read = storage.read
    monkeypatch.setattr(storage, "read", counted)
    shard = dataset.shard(0, 0)
    index = dataset.read_index(0, 0)
    tar = Path(shard.tar).read_bytes()
    for chosen in ([], [2], [0, 1, 3], [3, 0], list(range(4))):
        requests.clear()
        rows = list(read_rows(shard, chosen))
        assert [row.row for row in rows] == chosen
        for row, record in zip(rows, index.take(np.array(chosen, np.int64)).to_pylist(), strict=True):
            start = record["image_offset"]
            assert row.image == tar[start : start + record["image_bytes"]]
            assert (row.key, row.sample_id) == (record["key"], record["sample_id"])
            assert (row.source, row.label) == (record["source"], record["label"])
        if gap != 2_000:
            assert len(requests) == (len(chosen) if gap == 0 else min(1, len(chosen)))
    assert [row.row for row in read_rows(shard)] == [0, 1, 2, 3]
    assert [row.sample_id for row in dataset.read_images(2, 8)] == [2, 3, 4, 6, 7]
