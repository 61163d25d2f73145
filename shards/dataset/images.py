"""Stored images in order of ids, as the write passes read them: sources of a range, crops of a shard."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset
from shards.dataset.rows import check_foreign_tar, read_checked, read_shard_index
from shards.format.manifest import ShardInfo

COLUMNS = ("sample_id", "image_offset", "image_bytes", "image_hash", "source", "label")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSample:
    """One image as an image dataset holds it: the encoded source file and where it came from."""

    sample_id: int
    image: bytes
    source: str
    label: int | None


def read_images(dataset: Dataset, first_id: int, end_id: int) -> Iterator[ImageSample]:
    """The images with ids in [first_id, end_id), each checked against its hash.

    One shard at a time is read, in one request for the bytes its rows cover; a tar indexed in place must
    still be the one that was indexed. InputError names the object that is not what was written.
    """
    first_ids, _ = dataset.id_ranges()
    number = bisect_right(first_ids, first_id) - 1
    while number < dataset.num_shards and first_ids[number] < end_id:
        yield from read_rows(dataset.shard(0, number), first_id, end_id)
        number += 1


def read_rows(shard: ShardInfo, first_id: int, end_id: int) -> Iterator[ImageSample]:
    """The images, or crops, of one shard with ids in [first_id, end_id): one request for their bytes."""
    table = read_shard_index(shard, COLUMNS)
    ids = table.column("sample_id").to_numpy()
    rows = table.filter((ids >= first_id) & (ids < end_id)).to_pylist()
    if not rows:
        return
    if shard.is_foreign:
        check_foreign_tar(shard)
    start = min(row["image_offset"] for row in rows)
    end = max(row["image_offset"] + row["image_bytes"] for row in rows)
    try:
        block = storage.read(shard.tar, start, end - start)
    except FileNotFoundError:
        raise InputError(
            f"{shard.tar} of shard {shard.name} is missing; copy the dataset again or repair it"
        ) from None
    for row in rows:
        offset = row["image_offset"] - start
        image = block[offset : offset + row["image_bytes"]]
        if hashlib.sha256(image).digest() != row["image_hash"]:
            raise InputError(
                f"{shard.tar} of shard {shard.name} is damaged at sample {row['sample_id']} "
                f"({row['source']}); copy the dataset again or repair it"
            )
        yield ImageSample(sample_id=row["sample_id"], image=image, source=row["source"], label=row["label"])


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCrop:
    """One crop of a token dataset, as it is stored, and the tar it lies in."""

    sample_id: int
    image: bytes
    tar: str


def read_crops(shard: ShardInfo) -> Iterator[StoredCrop]:
    """The crops of a token shard in the order of its index; the whole tar is read, size and hash checked."""
    table = read_shard_index(shard, ("sample_id", "image_offset", "image_bytes"))
    if shard.tar_sha256 is None:
        raise InputError(f"{shard.tar} was indexed in place: it holds source images, not crops")
    data = read_checked(shard.tar, shard.tar_bytes, shard.tar_sha256, shard.name)
    for row in table.to_pylist():
        start = row["image_offset"]
        image = data[start : start + row["image_bytes"]]
        yield StoredCrop(sample_id=row["sample_id"], image=image, tar=shard.tar)


def sample_ids(shard: ShardInfo) -> np.ndarray:
    """The ids of a shard's samples, int64, ascending."""
    return read_shard_index(shard, ("sample_id",)).column("sample_id").to_numpy()
