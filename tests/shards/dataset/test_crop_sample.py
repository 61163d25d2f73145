"""A sample of crops is a pure function of its seed, comes with the codes of its own crops, and is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from shards.dataset import crop_sample
from shards.dataset.crop_sample import draw_sample
from shards.dataset.dataset import Dataset, open_dataset
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
        np.testing.assert_array_equal(place.pixels(), decode_crop(encode_crop(pixels, 95)))


def test_the_seed_decides_and_no_crop_comes_twice(dataset: Dataset):
    def keys(number: int, seed: int) -> list[str]:
        return [place.key for place in draw_sample(dataset, number, seed=seed).places]

    assert keys(4, 1) == keys(4, 1)
    assert len({tuple(keys(4, seed)) for seed in range(8)}) > 4
    assert len(keys(100, 0)) == 8 == len(set(keys(100, 0))), "one of nine was rejected"


def test_few_shards_are_read_unless_they_hold_too_little(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crop_sample, "SAMPLED_SHARDS", 1)

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
        place.pixels()
    tar.unlink()
    with pytest.raises(InputError, match="is missing"):
        place.pixels()
