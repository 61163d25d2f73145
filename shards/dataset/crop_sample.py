"""Some crops of a token dataset, drawn by a seed: codes at once, pixels one by one when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset
from shards.dataset.summary import codebook_size, require_codes
from shards.format.index import codes_of
from shards.pixels.views import decode_crop

SAMPLED_SHARDS = 64
"""A sample is drawn from so many shards, whose indexes are read; from more where these hold too little."""
_PLACE = ("key", "image_offset", "image_bytes", "image_hash")


@dataclass(frozen=True, kw_only=True, slots=True)
class CropPlace:
    """Where one stored crop lies."""

    tar: str
    key: str
    offset: int
    bytes: int
    sha256: bytes

    @classmethod
    def of(cls, tar: str, row: Mapping[str, Any]) -> CropPlace:
        """The place that a row of the index of `tar` names."""
        return cls(
            tar=tar,
            key=row["key"],
            offset=row["image_offset"],
            bytes=row["image_bytes"],
            sha256=row["image_hash"],
        )

    def pixels(self) -> np.ndarray:
        """uint8 [S, S, 3], read by its byte range; InputError where its bytes are not what was written."""
        try:
            data = storage.read(self.tar, self.offset, self.bytes)
        except FileNotFoundError:
            raise InputError(f"{self.tar} is missing; copy the dataset again or repair it") from None
        if hashlib.sha256(data).digest() != self.sha256:
            raise InputError(f"{self.tar} is damaged at {self.key}; repair or copy it again")
        return decode_crop(data)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CropSample:
    """Crops of view 0, so of n different images, by id: codes uint16 [n, N], and where each lies."""

    codes: np.ndarray
    places: tuple[CropPlace, ...]


def draw_sample(dataset: Dataset, number: int, *, seed: int) -> CropSample:
    """Up to `number` crops of view 0, a pure function of dataset, number and seed; no pixels are read."""
    sizes = dataset.shard_sizes(0)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sizes))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), number)) + 1
    numbers = np.sort(order[: max(SAMPLED_SHARDS, enough)])
    ends = np.cumsum(sizes[numbers])
    held = int(ends[-1]) if len(ends) else 0
    if held == 0:
        raise InputError(f"{dataset.url} holds no crops: every image was rejected")
    drawn = np.sort(rng.choice(held, min(number, held), replace=False))
    codes: list[np.ndarray] = []
    places: list[CropPlace] = []
    for shard, end, size in zip(numbers.tolist(), ends.tolist(), sizes[numbers].tolist(), strict=True):
        rows = drawn[(drawn >= end - size) & (drawn < end)] - (end - size)
        if len(rows) == 0:
            continue
        table, info = dataset.read_index(0, shard, (*_PLACE, "codes")), dataset.shard(0, shard)
        codes.append(codes_of(table)[rows])
        require_codes(codes[-1], codebook_size(dataset), info)
        chosen = table.select(_PLACE).take(pa.array(rows))
        places += [CropPlace.of(info.tar, row) for row in chosen.to_pylist()]
    return CropSample(codes=np.concatenate(codes), places=tuple(places))
