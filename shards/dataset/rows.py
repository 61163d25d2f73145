"""Objects and rows of one shard, read and checked: every byte is what was written, or an error names it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from shards.format.index import IndexFormatError, read_index, read_rejects
from shards.format.manifest import DamageError, ProbeEntry, ShardInfo

MAX_GAP_BYTES = 1 << 20
"""Images that lie no further apart are read in one request: in 30 ms a store sends more than this."""
PLACE_COLUMNS = ("key", "image_offset", "image_bytes", "image_hash")
_ROW_COLUMNS = (*PLACE_COLUMNS, "sample_id", "source", "label")

Decode = Callable[[bytes], np.ndarray]
"""Encoded image -> uint8 [H, W, 3]: `views.decode_crop`, or `decode.decode_image` with its config."""


def read_checked(url: str, num_bytes: int, sha256: str, shard: str) -> bytes:
    """An object's bytes, if they are those that were written; otherwise an error that names it."""
    try:
        data = storage.read(url)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamageError(f"{url} of shard {shard} is missing; copy the dataset again or repair it") from None
    if len(data) != num_bytes or sha256_hex(data) != sha256:
        raise DamageError(
            f"{url} of shard {shard} is damaged: {len(data)} bytes with sha256 {sha256_hex(data)[:8]}…, "
            f"written were {num_bytes} with {sha256[:8]}…; copy the dataset again or repair it"
        )
    return data


def read_shard_index(shard: ShardInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """The index of a shard from `Dataset.shard`, or some of its columns, after checking size and hash."""
    data = read_checked(shard.index, shard.index_bytes, shard.index_sha256, shard.name)
    try:
        table = read_index(data, columns)
    except IndexFormatError as error:
        raise InputError(f"{shard.index} of shard {shard.name}: {error}") from None
    if table.num_rows != shard.samples:
        raise InputError(
            f"{shard.index} of shard {shard.name} has {table.num_rows} rows, not {shard.samples}"
        )
    return table


def read_shard_rejects(shard: ShardInfo) -> pa.Table | None:
    """What was rejected from the id range of a shard from `Dataset.shard`, after checking size and hash."""
    if shard.rejects is None or shard.rejects_bytes is None or shard.rejects_sha256 is None:
        return None
    return read_rejects(read_checked(shard.rejects, shard.rejects_bytes, shard.rejects_sha256, shard.name))


def check_in_place(shard: ShardInfo) -> None:
    """Raise InputError where a tar that was indexed in place is no longer the one that was indexed."""
    found = storage.stat(shard.tar)
    if found is None:
        raise InputError(
            f"{shard.tar}, indexed in place as shard {shard.name}, is gone; bring it back or prepare again"
        )
    if (found.bytes, found.version) != (shard.tar_bytes, shard.tar_version):
        raise InputError(
            f"{shard.tar}, indexed in place as shard {shard.name}, has changed: it was "
            f"{shard.tar_bytes} bytes, version {shard.tar_version}, and is {found.bytes}, {found.version}; "
            "bring the old one back or prepare again"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The bytes of one stored image: where they lie in which tar, and their sha256."""

    tar: str
    key: str
    offset: int
    bytes: int
    sha256: bytes

    @classmethod
    def of(cls, shard: ShardInfo, record: Mapping[str, Any]) -> Place:
        """The place that the PLACE_COLUMNS of an index row name."""
        return cls(
            tar=shard.tar,
            key=record["key"],
            offset=record["image_offset"],
            bytes=record["image_bytes"],
            sha256=record["image_hash"],
        )

    def read(self) -> bytes:
        """The encoded image, checked."""
        [image] = read_places([self])
        return image


def read_places(places: Sequence[Place]) -> Iterator[bytes]:
    """The encoded images at some places of one tar, in the order given; neighbours in one request.

    DamageError names the tar and the key where the bytes are not those that were written.
    """
    first = 0
    while first < len(places):
        end, start, stop = first, places[first].offset, places[first].offset
        while end < len(places) and -MAX_GAP_BYTES <= places[end].offset - stop <= MAX_GAP_BYTES:
            start = min(start, places[end].offset)
            stop = max(stop, places[end].offset + places[end].bytes)
            end += 1
        tar = places[first].tar
        try:
            block = storage.read(tar, start, stop - start)
        except FileNotFoundError:
            raise DamageError(f"{tar} is missing; copy the dataset again or repair it") from None
        for place in places[first:end]:
            image = block[place.offset - start : place.offset - start + place.bytes]
            if hashlib.sha256(image).digest() != place.sha256:
                raise DamageError(f"{tar} is damaged at {place.key}; copy the dataset again or repair it")
            yield image
        first = end


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One stored image as a row of its shard: the encoded file, its id and key, and where it came from."""

    row: int
    key: str
    sample_id: int
    image: bytes
    source: str
    label: int | None


def read_rows(
    shard: ShardInfo, rows: Sequence[int] | np.ndarray | None = None, *, ids: range | None = None
) -> Iterator[Row]:
    """Some rows of a shard from `Dataset.shard`, those with some ids, or all: each image is what was written.

    A tar indexed in place must still be the one that was indexed. DamageError or InputError name the object
    that is not what it was.
    """
    table = read_shard_index(shard, _ROW_COLUMNS)
    numbers = np.arange(table.num_rows) if rows is None else np.asarray(rows, np.int64)
    if ids is not None:
        sample_ids = table.column("sample_id").to_numpy()[numbers]
        numbers = numbers[(sample_ids >= ids.start) & (sample_ids < ids.stop)]
    records = table.take(pa.array(numbers)).to_pylist()
    if records and shard.in_place:
        check_in_place(shard)
    images = read_places([Place.of(shard, record) for record in records])
    for row, record, image in zip(numbers.tolist(), records, images, strict=True):
        origin = {name: record[name] for name in ("key", "sample_id", "source", "label")}
        yield Row(row=row, image=image, **origin)


def pixels_hash(pixels: np.ndarray) -> str:
    """sha256 of decoded pixels uint8 [H, W, 3], shape included."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise TypeError(f"decoded pixels are uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def probe_shard(shard: ShardInfo, rows: Sequence[int], decode: Decode) -> list[ProbeEntry]:
    """Decode some rows of a shard and hash their pixels; reads only those images."""
    return [
        ProbeEntry(
            view=shard.view,
            number=shard.number,
            row=row.row,
            key=row.key,
            sha256=pixels_hash(decode(row.image)),
        )
        for row in read_rows(shard, rows)
    ]
