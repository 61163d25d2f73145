"""Small datasets for readers: the same samples as tokens, as images, and in a tar indexed in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipeline import storage
from shards.dataset.dataset import Dataset, open_dataset
from shards.format.build import ForeignTar, build_shard
from shards.format.manifest import Recipe, TokenizerSpec
from shards.format.records import RejectedSample, StoredSample
from shards.format.tar import build_tar
from shards.pixels.crops import StoredCrops
from shards.pixels.decode import DecodeConfig, decode_image, decode_recipe
from shards.pixels.views import (
    CropBox,
    ViewPolicy,
    decode_crop,
    encode_crop,
    render,
    view_at,
)
from shards.reader.reader import SampleBatch
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
