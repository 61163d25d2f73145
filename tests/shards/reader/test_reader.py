"""Batches against an obvious reading of the same dataset, over ranks, threads, epochs, resumes and damage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.pixels.crops import FreshCrops
from shards.pixels.decode import DecodeConfig, decode_image
from shards.pixels.views import (
    CENTER_FRACTION,
    ViewPolicy,
    center_view,
    decode_crop,
    render,
    view_at,
)
from shards.reader import open_shards as cache
from shards.reader.disk_cache import CacheConfig
from shards.reader.order import Order, view_of_epoch
from shards.reader.reader import ShardReader
from tests.shards.reader.reading import (
    IDS,
    POLICY,
    PREPARED,
    RANGES,
    SIZE,
    assert_same,
    codes_of_pixels,
    keys,
    label_of,
    source_image,
    stored_crop,
    write_dataset,
    write_foreign,
)

# ------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("epoch", range(4))
def test_token_epoch_is_every_sample_of_its_view_once(
    tokens: Dataset, reader_of: Callable[..., ShardReader], epoch: int
) -> None:
    reader = reader_of(tokens, seed=3, drop_last=False)
    view = view_of_epoch(3, 3, epoch)
    seen = list(reader.batches(epoch))
    assert sorted(keys(seen)) == [f"{i:010d}-{view:02d}" for i in IDS]
    order = Order(tokens.shard_sizes(view), 3, epoch)
    for batch in seen:
        assert batch.codes is not None
        shard, row = order.locate(batch.positions)
        for place, sample_id in enumerate(batch.sample_ids.tolist()):
            pixels = decode_crop(stored_crop(sample_id, view)[0])
            assert np.array_equal(batch.pixels[place], pixels)
            assert np.array_equal(batch.codes[place], codes_of_pixels(pixels))
            assert batch.labels[place] == (-1 if label_of(sample_id) is None else label_of(sample_id))
            ids = [i for i in range(RANGES[shard[place]], RANGES[shard[place] + 1]) if i in IDS]
            assert ids[row[place]] == sample_id


def test_batches_do_not_depend_on_threads_or_cache(
    tokens: Dataset, reader_of: Callable[..., ShardReader]
) -> None:
    inline = list(reader_of(tokens, seed=1, drop_last=False).batches(2))
    for settings in (
        {"num_threads": 1, "prefetch": 0},
        {"num_threads": 3, "prefetch": 4},
        {"num_threads": 2, "prefetch": 2, "cache": CacheConfig(bytes=1)},
        {"num_threads": 0, "cache": CacheConfig(bytes=1)},
    ):
        assert_same(reader_of(tokens, seed=1, drop_last=False, **settings).batches(2), inline)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_each_global_batch(
    tokens: Dataset, reader_of: Callable[..., ShardReader], world_size: int
) -> None:
    whole = list(reader_of(tokens, drop_last=False, lanes=4, window=1).batches(1))
    ranks = [
        list(
            reader_of(tokens, drop_last=False, lanes=4, window=1, rank=rank, world_size=world_size).batches(1)
        )
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(whole)}  # a short batch may leave a rank nothing
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert keys(parts) == batch.keys
        assert np.array_equal(np.concatenate([part.pixels for part in parts]), batch.pixels)
        assert {(part.position, part.next_position, part.global_size) for part in parts} == {
            (batch.position, batch.next_position, batch.global_size)
        }


def test_resuming_continues_at_the_next_unseen_sample(
    tokens: Dataset, reader_of: Callable[..., ShardReader]
) -> None:
    reader = reader_of(tokens, drop_last=False)
    straight = list(reader.batches(0))
    assert_same(reader_of(tokens, drop_last=False).batches(0, straight[1].next_position), straight[2:])
    # Another batch size and more workers take over in mid-epoch.
    seen = keys(straight[:2])
    for rank in range(2):
        other = reader_of(tokens, size=4, drop_last=False, rank=rank, world_size=2)
        seen += keys(other.batches(0, straight[1].next_position))
    assert sorted(seen) == sorted(keys(straight))
    assert list(reader.batches(0, len(IDS))) == []


def test_training_drops_the_tail_and_evaluation_keeps_it(
    tokens: Dataset, reader_of: Callable[..., ShardReader]
) -> None:
    assert len(IDS) == 21
    training, evaluation = reader_of(tokens, size=4), reader_of(tokens, size=4, drop_last=False)
    assert (training.steps_per_epoch, training.num_dropped) == (5, 1)
    assert (evaluation.steps_per_epoch, evaluation.num_dropped) == (6, 0)
    assert [batch.global_size for batch in training.batches(0)] == [4] * 5
    assert [batch.global_size for batch in evaluation.batches(0)] == [4] * 5 + [1]
    [alone] = reader_of(tokens, size=100, drop_last=False).batches(0)
    assert alone.global_size == 21


def test_unshuffled_is_the_order_of_ids(tokens: Dataset, reader_of: Callable[..., ShardReader]) -> None:
    reader = reader_of(tokens, shuffle=False, drop_last=False)
    assert [i for batch in reader.batches(0) for i in batch.sample_ids.tolist()] == IDS
    parts = [reader_of(tokens, shuffle=False, drop_last=False, rank=rank, world_size=2) for rank in (0, 1)]
    first, second = (next(part.batches(0)) for part in parts)
    assert [*first.sample_ids, *second.sample_ids] == IDS[:5]


# ------------------------------------------------------------------------------------------- online


def test_online_crops_equal_stored_ones_bit_for_bit(
    tokens: Dataset, images: Dataset, reader_of: Callable[..., ShardReader]
) -> None:
    for epoch in range(3):
        stored = list(reader_of(tokens, seed=9).batches(epoch))
        online = list(reader_of(images, crops=FreshCrops(POLICY, stored_pixels=True), seed=9).batches(epoch))
        for one, other in zip(stored, online, strict=True):
            assert np.array_equal(one.sample_ids, other.sample_ids)
            assert np.array_equal(one.pixels, other.pixels)
            assert np.array_equal(one.labels, other.labels)
            assert other.codes is None


def test_online_views(images: Dataset, reader_of: Callable[..., ShardReader]) -> None:
    """Without a fixed number of views every epoch draws its own; centre crops are the same in all of them."""
    fresh = ViewPolicy(image_size=SIZE, views_per_image=0)
    for epoch in (0, 7):
        batch = next(reader_of(images, FreshCrops(fresh)).batches(epoch))
        centre = next(reader_of(images, FreshCrops(fresh, center_fraction=CENTER_FRACTION)).batches(epoch))
        for place, sample_id in enumerate(batch.sample_ids.tolist()):
            image = decode_image(source_image(sample_id), DecodeConfig())
            height, width = image.shape[:2]
            drawn = view_at(fresh, sample_id, epoch, height=height, width=width)
            assert np.array_equal(batch.pixels[place], render(image, drawn, fresh.interpolation))
            middle = center_view(fresh, height=height, width=width)
            assert np.array_equal(centre.pixels[place], render(image, middle, fresh.interpolation))


def test_tar_indexed_in_place(tmp_path: Path, reader_of: Callable[..., ShardReader]) -> None:
    tar_path = tmp_path / "cats.tar"
    dataset = write_foreign(str(tmp_path / "images"), tar_path)
    crops = FreshCrops(POLICY, center_fraction=CENTER_FRACTION)
    settings = {"crops": crops, "shuffle": False, "drop_last": False, "size": 8}
    [batch] = reader_of(dataset, **settings).batches(0)
    for place in range(8):
        image = decode_image(source_image(place), DecodeConfig())
        middle = center_view(POLICY, height=image.shape[0], width=image.shape[1])
        assert np.array_equal(batch.pixels[place], render(image, middle, POLICY.interpolation))

    # The same size and, by deceit, the same time: the hash of each image tells.
    payload = bytearray(tar_path.read_bytes())
    payload[payload.index(source_image(6)) + 300] ^= 1
    version = tar_path.stat().st_mtime_ns
    tar_path.write_bytes(payload)
    with pytest.raises(InputError, match=r"cats\.tar.*changed"):
        list(reader_of(dataset, **settings).batches(0))
    os.utime(tar_path, ns=(version, version))
    reader = reader_of(dataset, **{**settings, "size": 2})
    good = reader.batches(0)
    assert [next(good).sample_ids.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(InputError, match=r"sample 6 in .*cats\.tar.*v00-00001.*changed"):
        next(good)


# ------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("what", ["tar", "index"])
def test_damage_is_an_error_that_names_the_object(
    tmp_path: Path,
    reader_of: Callable[..., ShardReader],
    what: str,
    damage: Callable[[Path], None],
    num_threads: int,
) -> None:
    dataset = write_dataset(str(tmp_path), "tokens", ranges=(10, 13, 16))
    info = dataset.shard(view_of_epoch(3, 0, 0), 1)
    url = getattr(info, what)
    damage(Path(url))
    with pytest.raises(InputError) as caught:
        list(reader_of(dataset, size=2, num_threads=num_threads).batches(0))
    assert url in str(caught.value) and info.name in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_settings_are_named(
    tokens: Dataset, images: Dataset, reader_of: Callable[..., ShardReader]
) -> None:
    wrong: list[tuple[Dataset, dict[str, Any], str]] = [
        (tokens, {"size": 22}, "batch of 22 .* 21 samples"),
        (tokens, {"size": 4, "world_size": 5, "rank": 1}, "5 workers .* batch of 4"),
        (tokens, {"size": 4, "world_size": 2, "rank": 2}, "rank 2"),
        (tokens, {"size": 0}, "batch size 0"),
        (tokens, {"size": 4, "seed": -1}, "seed -1"),
        (tokens, {"size": 4, "crops": FreshCrops(POLICY)}, "stored crops"),
        (images, {"size": 4}, "view policy"),
    ]
    for dataset, settings, message in wrong:
        with pytest.raises(InputError, match=message):
            reader_of(dataset, **settings)
    with pytest.raises(InputError, match=r"position 22 .* 21"):
        reader_of(tokens, size=4).batches(0, 22)


def test_image_that_cannot_be_decoded_is_named(
    images: Dataset, reader_of: Callable[..., ShardReader]
) -> None:
    """Decoding with a tighter limit than preparing: nothing is skipped."""
    crops = reader_of(images, FreshCrops(POLICY)).crops
    assert crops == FreshCrops(POLICY, decode=PREPARED)
    reader = reader_of(images, FreshCrops(POLICY, decode=DecodeConfig(max_pixels=500)))
    with pytest.raises(InputError, match=r"sample 00000000\d\d-00 of .*\.tar cannot be decoded .*too_large"):
        list(reader.batches(0))


# ------------------------------------------------------------------------------------------- object storage


def test_remote_shards_are_fetched_once_and_again_when_damaged(
    s3_url: str,
    tokens: Dataset,
    reader_of: Callable[..., ShardReader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for found in storage.list_files(tokens.url):  # a finished dataset may be copied with any tool
        storage.put(storage.join(s3_url, found.url.removeprefix(tokens.url)), storage.read(found.url))
    remote = open_dataset(s3_url)
    fetched: list[str] = []
    faults: list[Callable[[bytes], bytes]] = [
        lambda data: data[:-700],
        lambda data: data[:99] + b"!" + data[100:],
    ]
    read = storage.read

    def flaky(url: str, start: int = 0, length: int | None = None, **how: Any) -> bytes:
        data = read(url, start, length, **how)
        if url.endswith(".tar"):
            fetched.append(url)
            return faults.pop()(data) if faults else data
        return data

    monkeypatch.setattr(cache.storage, "read", flaky)
    expected = list(reader_of(tokens, size=3).batches(0))
    kept = CacheConfig(folder=str(tmp_path / "kept"))
    assert_same(reader_of(remote, size=3, num_threads=2, cache=kept).batches(0), expected)
    assert len(fetched) == 4 + 2 and len(set(fetched)) == 4  # four shards with samples, two transfers damaged

    faults += [lambda data: data[:-1]] * 4
    with pytest.raises(InputError, match=r"s3://.*\.tar of shard v0\d-0000\d is damaged"):
        list(reader_of(remote, size=3, cache=CacheConfig(folder=str(tmp_path / "other"))).batches(0))

    # Another run on the node finds them; one that was damaged on its disk meanwhile is fetched again.
    faults.clear()
    fetched.clear()
    with reader_of(remote, size=3, cache=kept) as reader:
        assert_same(reader.batches(0), expected)
        assert (fetched, reader.telemetry.take().cache_hits) == ([], 4)
    flip(next(path for path in sorted((tmp_path / "kept").iterdir()) if not path.name.startswith(".")))
    assert_same(reader_of(remote, size=3, cache=kept).batches(0), expected)
    assert len(fetched) == 1


def test_a_reader_says_what_it_begins_with_and_refuses_another_decoder(
    tokens: Dataset, images: Dataset, reader_of: Callable[..., ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = reader_of(tokens, size=21).begin(0)
    assert tokens.fingerprint[:12] in said and "1 lanes of 5 shards" in said and "4 shards with" in said
    assert f"{len(tokens.manifest.probe)} images of the decode probe agree" in said
    parts = [reader_of(tokens, rank=rank, world_size=3)._probe(tokens) for rank in range(3)]
    assert sum(parts) == len(tokens.manifest.probe)
    assert "no shards" not in reader_of(images, FreshCrops(POLICY)).begin(3, 21)
    monkeypatch.setattr("shards.reader.reader.decode_crop", lambda data: decode_crop(data) ^ 1)
    with pytest.raises(InputError, match=r"sample \d{10}-0\d of .*\.tar decodes to other pixels here"):
        reader_of(tokens).begin(0)


def test_images_may_stay_encoded(tokens: Dataset, reader_of: Callable[..., ShardReader]) -> None:
    expected = list(reader_of(tokens, seed=4).batches(2))
    encoded = reader_of(tokens, crops=None, seed=4, num_threads=2).batches(2)
    for batch, other in zip(encoded, expected, strict=True):
        assert (batch.keys, batch.pixels.shape) == (other.keys, (5, 0, 0, 3))
        assert np.array_equal([decode_crop(data) for data in batch.encoded], other.pixels)
