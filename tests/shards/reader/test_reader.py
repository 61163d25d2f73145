"""Batches against an obvious reading of the same dataset, over ranks, threads, epochs, resumes and damage."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.format.build import ForeignTar, build_shard
from shards.format.manifest import Recipe, TokenizerSpec
from shards.format.records import RejectedSample, StoredSample
from shards.format.tar import build_tar
from shards.pixels.crops import Crops, FreshCrops, StoredCrops
from shards.pixels.decode import DecodeConfig, decode_image, decode_recipe
from shards.pixels.views import (
    CENTER_FRACTION,
    CropBox,
    ViewPolicy,
    center_view,
    decode_crop,
    encode_crop,
    render,
    view_at,
)
from shards.reader import open_shards as cache
from shards.reader.disk_cache import CacheConfig
from shards.reader.order import Order, view_of_epoch
from shards.reader.reader import Batches, SampleBatch, ShardReader
from shards.reader.workers import Buffers
from shards.writer.commit import Plan, commit, finish, pending, start

SIZE = 16
GRID = (2, 3)
STORED = StoredCrops()
CODEBOOK_SIZE = 4096
POLICY = ViewPolicy(image_size=SIZE, scale=(0.3, 0.9), views_per_image=3, color_jitter=0.2, seed=5)
PREPARED = DecodeConfig(max_pixels=5000, high_bit_depth="window", window=(0.0, 900.0))
RANGES = (0, 7, 9, 15, 16, 24)
REJECTED = {3: "truncated", 7: "corrupt", 8: "corrupt"}  # shard 1 has no sample left
IDS = [i for i in range(RANGES[-1]) if i not in REJECTED]


def source_image(sample_id: int) -> bytes:
    """A JPEG of its own size and content per sample."""
    rng = np.random.default_rng(sample_id)
    height, width = 20 + sample_id % 5, 24 + sample_id % 7
    y, x = np.mgrid[:height, :width]
    waves = np.stack(
        [np.sin(x * rng.uniform(0.1, 0.6) + y * rng.uniform(0.1, 0.6)) for _ in range(3)], axis=-1
    )
    return encode_crop((127 + 120 * waves).astype(np.uint8), 97)


def stored_crop(sample_id: int, view: int) -> tuple[bytes, CropBox]:
    image = decode_image(source_image(sample_id), DecodeConfig())
    drawn = view_at(POLICY, sample_id, view, height=image.shape[0], width=image.shape[1])
    return encode_crop(render(image, drawn, POLICY.interpolation), POLICY.jpeg_quality), drawn.crop


def codes_of_pixels(pixels: np.ndarray) -> np.ndarray:
    """Stands in for a tokenizer: codes that belong to exactly these pixels."""
    return (pixels.astype(np.int64).sum(axis=(0, 2))[: GRID[0] * GRID[1]] % CODEBOOK_SIZE).astype(np.uint16)


def label_of(sample_id: int) -> int | None:
    return None if sample_id % 4 == 3 else sample_id % 3


def stored_sample(sample_id: int, view: int, tokens: bool) -> StoredSample:
    image, crop = stored_crop(sample_id, view) if tokens else (source_image(sample_id), None)
    return StoredSample(
        sample_id=sample_id,
        view=view,
        image=image,
        extension="jpg",
        source=f"pictures/{sample_id}.jpg",
        source_width=24 + sample_id % 7,
        source_height=20 + sample_id % 5,
        label=label_of(sample_id),
        crop=crop,
        codes=codes_of_pixels(decode_crop(image)).reshape(GRID) if tokens else None,
    )


def write_dataset(root: str, kind: str, ranges: tuple[int, ...] = RANGES) -> Dataset:
    """Token shards with three views, or image shards, of the same samples and id ranges."""
    tokens = kind == "tokens"
    tokenizer = TokenizerSpec(fingerprint="f" * 64, grid=GRID, codebook_size=CODEBOOK_SIZE, image_size=SIZE)
    plan = Plan(
        kind="tokens" if tokens else "images",
        inputs={"source": "a" * 64},
        recipe=Recipe() if tokens else Recipe(decode=decode_recipe(PREPARED)),
        first_ids=ranges,
        views=POLICY.views_per_image if tokens else 1,
        tokenizer=tokenizer if tokens else None,
    )
    start(root, plan)
    for item in pending(root, plan):
        ids = range(item.first_id, item.end_id)
        rejects = [
            RejectedSample(sample_id=i, source=f"pictures/{i}.jpg", reason=REJECTED[i], message="why")
            for i in ids
            if i in REJECTED
        ]
        samples = [stored_sample(i, item.view, tokens) for i in ids if i not in REJECTED]
        grid, codebook = (GRID, CODEBOOK_SIZE) if tokens else (None, None)
        commit(root, plan, item, build_shard(samples, rejects, grid=grid, codebook_size=codebook))
    finish(root, plan, decode_crop)
    return open_dataset(root)


def write_foreign(root: str, tar_path: Path) -> Dataset:
    """Image shards over one tar of somebody else's: two shards point into it."""
    payload, offsets = build_tar([(f"cat/{i}.jpg", source_image(i)) for i in range(8)])
    tar_path.write_bytes(payload)
    found = storage.stat(str(tar_path))
    assert found is not None
    plan = Plan(kind="images", inputs={}, first_ids=(0, 5, 8), views=1)
    start(root, plan)
    for item in pending(root, plan):
        samples = [
            StoredSample(
                sample_id=i,
                view=0,
                image=source_image(i),
                extension="jpg",
                source=f"{tar_path}#cat/{i}.jpg",
                source_width=24 + i % 7,
                source_height=20 + i % 5,
                label=None,
                image_offset=offsets[i],
            )
            for i in range(item.first_id, item.end_id)
        ]
        foreign = ForeignTar(url=found.url, bytes=found.bytes, version=found.version)
        commit(root, plan, item, build_shard(samples, [], grid=None, codebook_size=None, foreign=foreign))
    finish(root, plan, lambda data: decode_image(data, DecodeConfig()))
    return open_dataset(root)


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


def assert_same(left: Iterable[SampleBatch], right: Iterable[SampleBatch]) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.keys, one.position, one.next_position, one.global_size) == (
            other.keys, other.position, other.next_position, other.global_size,
        )  # fmt: skip
        for name in ("sample_ids", "pixels", "codes", "labels", "positions"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def keys(batches: Iterable[SampleBatch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


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


def test_three_epochs_see_three_views(tokens: Dataset, reader_of: Callable[..., ShardReader]) -> None:
    reader = reader_of(tokens, drop_last=False)
    views = [{key[-2:] for key in keys(reader.batches(epoch))} for epoch in range(3)]
    assert sorted(next(iter(found)) for found in views) == ["00", "01", "02"]
    assert [len(found) for found in views] == [1, 1, 1]


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


# ----------------------------------------------------------------------------------- threads, processes


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


def test_images_may_stay_encoded(tokens: Dataset, reader_of: Callable[..., ShardReader]) -> None:
    expected = list(reader_of(tokens, seed=4).batches(2))
    encoded = reader_of(tokens, crops=None, seed=4, num_threads=2).batches(2)
    for batch, other in zip(encoded, expected, strict=True):
        assert (batch.keys, batch.pixels.shape) == (other.keys, (5, 0, 0, 3))
        assert np.array_equal([decode_crop(data) for data in batch.encoded], other.pixels)
