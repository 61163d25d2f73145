"""Source files for the tests of sources and writer, and what a dataset stored of them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline import storage
from shards.dataset.dataset import Dataset
from shards.dataset.rows import read_shard_index


def image_bytes(seed: int, file_format: str = "PNG", size: tuple[int, int] = (12, 16), **options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tree(root: Path | str) -> dict[str, bytes]:
    """Every file below a folder or URL, by relative path."""
    root = str(root)
    return {file.url.removeprefix(root): storage.read(file.url) for file in storage.list_files(root)}


def rows(dataset: Dataset) -> list[dict]:
    return [row for shard in dataset.shards() for row in read_shard_index(shard).to_pylist()]


def rejects(dataset: Dataset) -> dict[str, str]:
    """Reason by source."""
    files = [shard.rejects for shard in dataset.shards() if shard.rejects is not None]
    return {row["source"]: row["reason"] for file in files for row in pq.read_table(file).to_pylist()}


def stored(dataset: Dataset) -> dict[str, bytes]:
    """Image bytes by source, without a tar library: tar, offset, length."""
    images: dict[str, bytes] = {}
    for shard in dataset.shards():
        data = storage.read(shard.tar)
        for row in read_shard_index(shard).to_pylist():
            image = data[row["image_offset"] : row["image_offset"] + row["image_bytes"]]
            assert hashlib.sha256(image).digest() == row["image_hash"]
            images[row["source"]] = image
    return images
