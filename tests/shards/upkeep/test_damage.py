"""Reading never returns a byte that is not what was written: damage is refused, by the object's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from shards.dataset.dataset import open_dataset
from shards.dataset.rows import read_rows
from shards.pixels.crops import FreshCrops, StoredCrops
from shards.pixels.views import ViewPolicy
from shards.reader.reader import Batches, ShardReader

Written = Any  # of conftest
LAYER = "1a2b3c4d"


def read_all(root: str, codes: str | None = None) -> int:
    """Open a dataset and read every sample of every view; how many there were."""
    dataset = open_dataset(root, codes=codes)
    crops = FreshCrops(ViewPolicy(image_size=16)) if dataset.kind == "images" else StoredCrops()
    count = 0
    with ShardReader(dataset, crops, Batches(5, drop_last=False, num_threads=0)) as reader:
        for epoch in range(dataset.num_views):
            count += sum(len(batch.keys) for batch in reader.batches(epoch))
    return count


def read_objects(root: str) -> Iterator[Path]:
    """What reading a dataset needs, of one part: its manifest, its table, indexes and tars."""
    yield Path(root) / "manifest.json"
    yield from sorted(Path(root).glob("manifest-*.parquet"))
    for folder in ("index", "shards"):
        if (Path(root) / folder).exists():
            yield from sorted((Path(root) / folder).iterdir())


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes | None]] = {
    "missing": lambda data, rng: None,
    "empty": lambda data, rng: b"",
    "cut anywhere": lambda data, rng: data[: rng.integers(1, len(data))],
    "longer": lambda data, rng: data + b"\0",
    "a bit flipped": flipped,
    "foreign, of the same size": lambda data, rng: rng.integers(0, 256, len(data), np.uint8).tobytes(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["images", "tokens", "added views", "code layer"])
def test_a_damaged_object_is_refused_by_its_name(written: Written, part: str, damage: str) -> None:
    rng = np.random.default_rng([*map(ord, damage)])
    tokens, added, layer, _ = written.parts()
    folder = {"images": written.images, "tokens": tokens, "added views": added, "code layer": layer}[part]
    root = written.images if part == "images" else written.tokens
    codes = LAYER if part == "code layer" else None
    whole = read_all(root, codes)
    assert whole == (13 if part == "images" else 36)
    for path in read_objects(folder):
        data = path.read_bytes()
        spoiled = DAMAGES[damage](data, rng)
        if spoiled is not None:
            path.write_bytes(spoiled)
        elif path.name == "manifest.json" and part in ("added views", "code layer"):
            continue  # without its manifest it is not there, and that is no damage
        else:
            path.unlink()
        named = path.name if path.name != "manifest.json" or spoiled is not None else str(path.parent)
        with pytest.raises(InputError) as refused:
            read_all(root, codes)
        assert named in str(refused.value) and "\n" not in str(refused.value)
        path.write_bytes(data)
    assert read_all(root, codes) == whole


@pytest.mark.parametrize("damage", DAMAGES)
def test_write_passes_refuse_damaged_inputs(written: Written, damage: str) -> None:
    """Crops are made from image shards, code layers from crops."""
    rng = np.random.default_rng([*map(ord, damage)])
    images = open_dataset(written.images).shard(0, 1)
    crops = open_dataset(written.tokens).shard(1, 2)
    for path in (images.index, images.tar, crops.index, crops.tar):
        data = Path(path).read_bytes()
        spoiled = DAMAGES[damage](data, rng)
        # of a tar only the images are read, and each has its hash
        is_tar = path in (images.tar, crops.tar)
        harmless = is_tar and damage == "longer"
        Path(path).unlink() if spoiled is None else Path(path).write_bytes(spoiled)
        if not harmless and not (is_tar and "bit flipped" in damage):
            with pytest.raises(InputError, match=Path(path).name):
                list(open_dataset(written.images).read_images(0, 14)) and list(read_rows(crops))
        Path(path).write_bytes(data)


def test_every_flipped_bit_of_a_manifest_is_refused(written: Written) -> None:
    """Nothing else vouches for a manifest; it does so itself."""
    path = Path(written.tokens) / "manifest.json"
    data = path.read_bytes()
    rng = np.random.default_rng(3)
    for place in rng.choice(len(data), 150, replace=False).tolist():
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(changed))
        with pytest.raises(InputError, match=written.tokens):
            open_dataset(written.tokens)


def test_parts_of_another_dataset_are_refused(written: Written, tmp_path: Path) -> None:
    """Whole and sound in themselves: the views that were added to one dataset, copied into another."""
    added = Path(written.parts()[1])
    base = Path(written.tokens)
    swapped = base / "manifest.json"
    mine = swapped.read_bytes()
    swapped.write_bytes((added / "manifest.json").read_bytes())
    with pytest.raises(InputError, match=next(added.glob("manifest-*")).name):
        read_all(str(base))
    swapped.write_bytes(mine)
    (added / "manifest.json").write_bytes(mine)
    with pytest.raises(InputError, match=str(added)):
        read_all(str(base))
