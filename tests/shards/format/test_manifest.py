"""Opening datasets: what is absent, unfinished, damaged or of another kind is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, index_files, open_dataset
from shards.dataset.rows import pixels_hash, read_shard_index
from shards.format.manifest import ROW_GROUP, Manifest, Recipe, ShardInfo, TableName, TableWriter
from shards.writer.commit import start

MakeDataset = Callable[..., Any]


def made_up(view: int, number: int) -> ShardInfo:
    """A shard record that differs from every other in every field."""
    tar, index, rejects = (hashlib.sha256(f"{what}{view}{number}".encode()).hexdigest() for what in "abc")
    has_rejects, foreign = number % 3 == 1, number % 5 == 4
    return ShardInfo(
        view=view,
        number=number,
        first_id=100 * number,
        end_id=100 * number + 100,
        samples=100 - number % 7,
        rejected=number % 7,
        tar=f"s3://theirs/{number}.tar" if foreign else f"shards/v{view:02d}-{number:05d}-{tar[:8]}.tar",
        tar_bytes=10**9 + number,
        tar_sha256=None if foreign else tar,
        tar_version=f"etag-{number}" if foreign else None,
        index=f"index/v{view:02d}-{number:05d}-{index[:8]}.parquet",
        index_bytes=10**6 + number,
        index_sha256=index,
        rejects=f"rejects/v{view:02d}-{number:05d}-{rejects[:8]}.parquet" if has_rejects else None,
        rejects_bytes=77 if has_rejects else None,
        rejects_sha256=rejects if has_rejects else None,
    )


def write_made_up(root: Path, views: int, num_shards: int) -> Manifest:
    """A manifest with its table, and no objects: what opening must be content with."""
    writer = TableWriter()
    written = [0] * views
    for view in range(views):
        for number in range(num_shards):
            shard = made_up(view, number)
            writer.append(shard)
            written[view] += shard.samples
    table = writer.finish()
    sha256 = sha256_hex(table)
    manifest = Manifest(
        kind="images",
        plan="p" * 64,
        inputs={"sources": "s" * 64},
        recipe=Recipe(other={"decode_version": 1}),
        first_view=0,
        shards_per_view=num_shards,
        written_per_view=tuple(written),
        samples_in=100 * views * num_shards,
        samples_written=sum(written),
        samples_rejected={"empty": 100 * views * num_shards - sum(written)},
        class_names=None,
        tokenizer=None,
        details={"note": "made up"},
        probe=(),
        table=TableName(path=f"manifest-{sha256[:8]}.parquet", bytes=len(table), sha256=sha256),
    )
    storage.put(storage.join(str(root), manifest.table.path), table)
    storage.put(storage.join(str(root), "manifest.json"), manifest.to_bytes())
    return manifest


def test_any_shard_of_a_table_of_many_row_groups_is_found(tmp_path: Path) -> None:
    num_shards = ROW_GROUP + 1000  # two views: the row groups do not end where views do
    manifest = write_made_up(tmp_path, 2, num_shards)
    dataset = open_dataset(str(tmp_path))

    assert dataset.manifest == manifest and dataset.fingerprint == manifest.fingerprint
    assert (dataset.num_views, dataset.num_shards, dataset.kind) == (2, num_shards, "images")
    for view in range(2):
        expected = np.array([made_up(view, number).samples for number in range(num_shards)])
        sizes = dataset.shard_sizes(view)
        assert sizes.dtype == np.int64 and dataset.num_samples(view) == sizes.sum()
        np.testing.assert_array_equal(sizes, expected)
        with pytest.raises(ValueError, match="read-only"):
            sizes[0] = 1
        for number in (0, 1, 4, ROW_GROUP - 1, ROW_GROUP, num_shards - 1):
            assert dataset.shard(view, number) == made_up(view, number).resolved(str(tmp_path))
    assert dataset.shard(0, 4).tar == "s3://theirs/4.tar"
    assert dataset.shard(0, 5).tar.startswith(f"{tmp_path}/shards/v00-00005-")
    assert dataset.id_ranges()[0] == tuple(range(0, 100 * num_shards + 1, 100))
    assert len(dataset.index_files()) == 2 * num_shards
    assert dataset.index_files(1)[7] == f"{tmp_path}/{made_up(1, 7).index}"

    for call in (lambda: dataset.shard(0, num_shards), lambda: dataset.shard(0, -1)):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(InputError, match="has 2 views; there is no view 2"):
        dataset.shard_sizes(2)


def test_a_dataset_travels_to_other_threads_and_processes(tmp_path: Path) -> None:
    write_made_up(tmp_path, 1, 50)
    dataset = open_dataset(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda i: dataset.shard(0, i % 50).number, range(400)))
    assert numbers == [i % 50 for i in range(400)]

    (tmp_path / "manifest.json").unlink()  # nothing is read again
    there = pickle.loads(pickle.dumps(dataset))
    assert isinstance(there, Dataset)
    assert there.fingerprint == dataset.fingerprint and there.shard(0, 9) == dataset.shard(0, 9)


def test_the_fingerprint_depends_on_header_and_table(tmp_path: Path) -> None:
    manifest = write_made_up(tmp_path, 1, 3)
    changed = [
        dataclasses.replace(manifest, recipe=Recipe(other={"decode_version": 2})),
        dataclasses.replace(manifest, table=dataclasses.replace(manifest.table, sha256="0" * 64)),
        dataclasses.replace(manifest, details={}),
    ]
    assert len({manifest.fingerprint, *(other.fingerprint for other in changed)}) == 4


# ------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_opened_is_explained_in_one_line(tmp_path: Path, small_dataset: MakeDataset) -> None:
    small_dataset(kind="images", views=1).write(str(tmp_path / "images"))
    small_dataset().write(str(tmp_path / "split" / "train"))
    start(str(tmp_path / "unfinished"), small_dataset().plan)
    (tmp_path / "file").write_text("x")
    sound = json.loads((tmp_path / "images" / "manifest.json").read_text())
    for name, content in {
        "junk": b"not json",
        "list": b"[]",
        "other": b'{"name": "package"}',
        "odd": b'{"format_version": 1}',
        "newer": json.dumps(sound | {"format_version": 2}).encode(),
    }.items():
        storage.put(f"{tmp_path}/{name}/manifest.json", content)

    for name, kind, message in [
        ("nowhere", None, "there is no dataset at"),
        ("file", None, "there is no dataset at"),
        ("unfinished", None, "is unfinished"),
        ("split", None, "name one of them, such as .*/split/train"),
        ("junk", None, "is not the manifest"),
        ("list", None, "is not the manifest"),
        ("other", None, "is not the manifest"),
        ("odd", None, "is damaged"),
        ("newer", None, "format version 2"),
        ("images", "tokens", "holds images, but tokens are needed"),
        ("split/train", "images", "holds tokens, but images are needed"),
    ]:
        with pytest.raises(InputError, match=message) as refused:
            open_dataset(str(tmp_path / name), kind)  # type: ignore[arg-type]
        assert str(tmp_path / name) in str(refused.value) and "\n" not in str(refused.value)
    assert open_dataset(str(tmp_path / "images"), "images").kind == "images"


@pytest.mark.parametrize("how", ["flipped", "short", "missing", "swapped"])
def test_a_damaged_table_or_index_is_never_read(tmp_path: Path, small_dataset: MakeDataset, how: str) -> None:
    manifest = small_dataset().write(str(tmp_path))
    dataset = open_dataset(str(tmp_path))
    shard = dataset.shard(1, 1)
    assert read_shard_index(shard).column("key").to_pylist() == ["0000000004-01", "0000000006-01"]
    assert read_shard_index(shard, ["label", "key"]).num_columns == 2
    with pytest.raises(InputError, match="no column"):
        read_shard_index(shard, ["colour"])

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= how == "flipped"
        path.write_bytes(data[:-1] if how == "short" else data)
        if how == "swapped":
            path.write_bytes(Path(dataset.shard(0, 1).index).read_bytes())
        if how == "missing":
            path.unlink()

    damage(Path(shard.index))
    with pytest.raises(InputError, match=f"{Path(shard.index).name} of shard v01-00001 is (damaged|missing)"):
        read_shard_index(shard)
    damage(tmp_path / manifest.table.path)
    with pytest.raises(InputError, match=f"{manifest.table.path} .* is (damaged|missing)"):
        open_dataset(str(tmp_path))


def test_index_files_are_those_of_the_manifest_only(tmp_path: Path, small_dataset: MakeDataset) -> None:
    small_dataset().write(str(tmp_path))
    (tmp_path / "index" / "v00-00000-deadbeef.parquet").write_bytes(b"left over by an attempt that lost")
    dataset = open_dataset(str(tmp_path))
    assert index_files(str(tmp_path)) == [dataset.shard(view, i).index for view in range(2) for i in range(3)]
    assert all(Path(path).exists() for path in index_files(str(tmp_path)))


def test_hash_of_pixels_sees_values_and_shape() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    others = [pixels.reshape(4, 2, 3), pixels + 1, pixels.transpose(1, 0, 2)]
    assert len({pixels_hash(p) for p in (pixels, *others)}) == 4
    assert pixels_hash(pixels) == pixels_hash(np.asfortranarray(pixels))
    with pytest.raises(TypeError):
        pixels_hash(pixels.astype(np.float32))


def test_opening_imports_neither_torch_nor_pandas_nor_image_libraries(tmp_path: Path) -> None:
    write_made_up(tmp_path, 1, 10)
    program = (
        "import sys; from shards.dataset.dataset import open_dataset; dataset = open_dataset(sys.argv[1]);"
        "dataset.shard(0, 3); dataset.shard_sizes(0);"
        "heavy = ('torch', 'pandas', 'PIL', 'simplejpeg', 'ray');"
        "print([name for name in heavy if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[3]
    done = run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
