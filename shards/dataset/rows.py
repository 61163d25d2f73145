"""Objects and rows of one shard, read and checked: every byte is what was written, or an error names it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from shards.format.index import IndexFormatError, read_index, read_rejects
from shards.format.manifest import DamageError, ProbeEntry, ShardInfo

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


def check_foreign_tar(shard: ShardInfo) -> None:
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


def pixels_hash(pixels: np.ndarray) -> str:
    """sha256 of decoded pixels uint8 [H, W, 3], shape included."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise TypeError(f"decoded pixels are uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def probe_shard(shard: ShardInfo, rows: Sequence[int], decode: Decode) -> list[ProbeEntry]:
    """Decode some rows of a shard (with complete URLs) and hash their pixels; reads only those images."""
    columns = ("key", "image_offset", "image_bytes", "image_hash")
    table = read_shard_index(shard, columns).take(pa.array(rows, pa.int64()))
    entries: list[ProbeEntry] = []
    for row, record in zip(rows, table.to_pylist(), strict=True):
        data = storage.read(shard.tar, record["image_offset"], record["image_bytes"])
        if hashlib.sha256(data).digest() != record["image_hash"]:
            raise InputError(
                f"{shard.tar} of shard {shard.name} is damaged at {record['key']}; repair or copy it again"
            )
        sha256 = pixels_hash(decode(data))
        entries.append(
            ProbeEntry(view=shard.view, number=shard.number, row=row, key=record["key"], sha256=sha256)
        )
    return entries
