"""Preparing: every source is written untouched or rejected with its reason, whatever happens."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.dataset.rows import read_shard_index
from shards.pixels.decode import DecodeConfig, decode_config_of
from shards.sources.table import Sources, load_sources
from shards.writer import commit
from shards.writer.prepare import SPLITS, PrepareConfig, plan_ranges, prepare_images
from tests.shards.files import image_bytes, rejects, rows, stored, tree, write_files, write_tar


def prepare(source: object, output: object, **settings) -> None:
    here = {"cluster": ClusterConfig(num_workers=0)}
    prepare_images(PrepareConfig(source=str(source), output=str(output), **(here | settings)))


def splits(output: object) -> list[Dataset]:
    return [open_dataset(f"{output}/{name}", "images") for name in SPLITS]


def numbered(count: int, classes: int = 1) -> dict[str, bytes]:
    return {f"{i % classes}/{i}.png": image_bytes(i) for i in range(count)}


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------- what is written


def test_a_folder_becomes_a_dataset(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        f"{kind}/{i}.png": image_bytes(i + 100 * len(kind)) for kind in ("ant", "zebra") for i in range(8)
    }
    files |= {"ant/turned.jpeg": image_bytes(50, "JPEG", exif=exif), "top.WEBP": image_bytes(51, "WEBP")}
    files |= {"zebra/really_a_png.jpg": image_bytes(52)}
    broken = {"zebra/text.jpg": b"no picture", "readme.md": b"# hi"}
    root = write_files(tmp_path / "pictures", files | broken)
    prepare(root, tmp_path / "out", max_shard_samples=6)
    assert f"{tmp_path}/out: 21 in = 19 written + 2 rejected (not_an_image 2)" in capsys.readouterr().out

    dataset = open_dataset(str(tmp_path / "out"), "images")
    manifest = dataset.manifest
    assert (manifest.samples_in, manifest.samples_written) == (21, 19)
    assert manifest.samples_rejected == {"not_an_image": 2} and manifest.class_names == ("ant", "zebra")
    assert decode_config_of(manifest.recipe.require_decode()) == DecodeConfig()
    assert rejects(dataset) == dict.fromkeys((f"{root}/{name}" for name in broken), "not_an_image")
    assert stored(dataset) == {f"{root}/{name}": data for name, data in files.items()}
    sources = load_sources(str(tmp_path / "out" / "sources.parquet"))
    assert sources is not None
    listing = sources.table.column("path").to_pylist()
    for row in rows(dataset):
        name = row["source"][len(str(root)) + 1 :]
        with Image.open(io.BytesIO(files[name])) as image:
            size, extension = ImageOps.exif_transpose(image).size, str(image.format).lower()
        assert (row["source_width"], row["source_height"]) == size
        assert row["extension"] == extension.replace("jpeg", "jpg")
        assert row["label"] == {"ant": 0, "zebra": 1, "": None}[os.path.dirname(name)]
        assert listing[row["sample_id"]] == row["source"].encode()
    for shard in dataset.shards():
        members = read_shard_index(shard).to_pylist()
        with tarfile.open(shard.tar) as archive:
            assert archive.getnames() == [f"{row['key']}.{row['extension']}" for row in members]

    record = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert record["code_version"] and record["config"]["max_shard_samples"] == 6
    assert record["config"]["decode"]["max_pixels"] == DecodeConfig().max_pixels


def test_a_rerun_skips_and_never_lists_again(tmp_path, capsys):
    root = write_files(tmp_path / "p", numbered(5))
    prepare(root, tmp_path / "out")
    before = tree(tmp_path / "out")
    shutil.rmtree(root)
    write_files(tmp_path / "p", {"new.png": image_bytes(9)})
    capsys.readouterr()
    prepare(root, tmp_path / "out")
    assert tree(tmp_path / "out") == before
    assert re.search(r"finished already\n.*: 5 in = 5 written \+ 0 rejected\n", capsys.readouterr().out)


def test_other_settings_at_the_same_output_are_refused(tmp_path):
    root = write_files(tmp_path / "p", numbered(40, classes=2))
    other = write_files(tmp_path / "q", numbered(5))
    prepare(root, tmp_path / "out")
    before = tree(tmp_path / "out")
    for source, settings, named in [
        (other, {}, "url"),
        (root, {"seed": 1}, "seed"),
        (root, {"labels": "none"}, "labels"),
        (root, {"val_fraction": 0.2}, "val_fraction"),
        (root, {"decode": DecodeConfig(max_pixels=100_000)}, "max_pixels"),
        (root, {"max_shard_samples": 7}, "id ranges"),
    ]:
        with pytest.raises(InputError, match=named):
            prepare(source, tmp_path / "out", **settings)
    assert tree(tmp_path / "out") == before
    write_files(tmp_path / "taken", {"thesis.txt": b"precious"})
    for settings in ({}, {"val_fraction": 0.2}):
        with pytest.raises(InputError, match="already holds something else"):
            prepare(root, tmp_path / "taken", **settings)
    assert tree(tmp_path / "taken") == {"/thesis.txt": b"precious"}


def test_bad_input_writes_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in ("missing", "empty"):
        with pytest.raises(InputError, match="no files"):
            prepare(tmp_path / source, tmp_path / "out")
    write_files(tmp_path / "one", {"1.png": image_bytes(1)})
    with pytest.raises(InputError, match="empty"):
        prepare(tmp_path / "one", tmp_path / "out", val_fraction=0.5)
    assert not (tmp_path / "out").exists()
    for wrong in ({"val_fraction": 1.0}, {"seed": -1}, {"max_shard_samples": 5000}, {"labels": "x"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            prepare(tmp_path / "one", tmp_path / "out", **wrong)


def test_a_folder_without_any_image_is_an_empty_dataset_with_an_account(tmp_path, capsys):
    prepare(write_files(tmp_path / "p", {"a.txt": b"a", "b.txt": b"b"}), tmp_path / "out")
    assert "2 in = 0 written + 2 rejected (not_an_image 2)" in capsys.readouterr().out
    assert open_dataset(str(tmp_path / "out")).manifest.samples_written == 0


# ---------------------------------------------------------------------------------- under interruption


@pytest.mark.parametrize("step", ["put_object", "create_receipt", "finish", "create_manifest"])
def test_interrupted_and_repeated_gives_the_bytes_of_an_undisturbed_run(tmp_path, monkeypatch, step):
    root = write_files(tmp_path / "p", numbered(23, classes=3) | {"0/x.txt": b"x", "1/y.txt": b"y"})
    prepare(root, tmp_path / "straight", max_shard_samples=4)
    original: Callable[..., object] = getattr(commit, step)
    calls = itertools.count(1)

    def interrupted(*args, **settings):
        if next(calls) % 3 == 0 or step in ("finish", "create_manifest"):
            raise KeyboardInterrupt
        return original(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(commit, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, tmp_path / "out", max_shard_samples=4)
    assert not (tmp_path / "out" / "manifest.json").exists()
    prepare(root, tmp_path / "out", max_shard_samples=4)
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


@pytest.mark.parametrize("val_fraction", [0, 0.3])
def test_interrupted_between_listing_and_plan(tmp_path, monkeypatch, val_fraction):
    root = write_files(tmp_path / "p", numbered(30))
    with monkeypatch.context() as patch:
        patch.setattr(commit, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, tmp_path / "out", val_fraction=val_fraction)
    write_files(root, {"late.png": image_bytes(99)})
    prepare(root, tmp_path / "out", val_fraction=val_fraction)
    datasets = splits(tmp_path / "out") if val_fraction else [open_dataset(str(tmp_path / "out"))]
    assert sum(dataset.manifest.samples_in for dataset in datasets) == 30


# ---------------------------------------------------------------------------------- splits


def test_a_split_keeps_duplicates_together_and_loses_nothing(tmp_path):
    images = {f"{i % 4}/{i}.png": image_bytes(i % 60) for i in range(120)}
    root = write_files(tmp_path / "p", images | {"0/no.txt": b"no", "empty.jpg": b""})
    prepare(root, tmp_path / "out", val_fraction=0.25)
    train, val = splits(tmp_path / "out")
    assert train.manifest.samples_in + val.manifest.samples_in == 122
    assert 10 < val.manifest.samples_written < 60
    assert stored(train) | stored(val) == {f"{root}/{name}": data for name, data in images.items()}
    assert not set(stored(train).values()) & set(stored(val).values())
    assert train.manifest.class_names == val.manifest.class_names == ("0", "1", "2", "3")
    for dataset in (train, val):
        ids = [row["sample_id"] for row in rows(dataset)]
        assert ids == sorted(ids)
        assert all(row["label"] == int(row["source"][len(str(root)) + 1]) for row in rows(dataset))
        sources = load_sources(f"{dataset.url}/sources.parquet")
        assert sources is not None and len(sources) == dataset.manifest.samples_in
    before = tree(tmp_path / "out")
    prepare(root, tmp_path / "out", val_fraction=0.25)
    assert tree(tmp_path / "out") == before


# ---------------------------------------------------------------------------------- tars and Parquet


def test_tars_are_indexed_where_they_are(tmp_path):
    expected: dict[str, bytes] = {}
    for number in range(3):
        members: dict[str, bytes] = {}
        for i in range(7):
            members[f"{i}.jpg"] = image_bytes(10 * number + i, "JPEG")
            members[f"{i}.cls"] = str((i * 3) % 5).encode()
            expected[f"{tmp_path}/tars/x-{number}.tar#{i}.jpg"] = members[f"{i}.jpg"]
        if number == 1:
            members |= {"bad.png": b"no image", "../up.jpg": image_bytes(1, "JPEG")}
        write_tar(tmp_path / "tars" / f"x-{number}.tar", [*members.items()])
    prepare(tmp_path / "tars" / "x-{0..2}.tar", tmp_path / "out", max_shard_samples=5)
    assert not list((tmp_path / "out").rglob("*.tar"))
    dataset = open_dataset(str(tmp_path / "out"), "images")
    assert dataset.manifest.samples_in == 23 and dataset.manifest.samples_written == 21
    assert rejects(dataset) == {
        f"{tmp_path}/tars/x-1.tar#bad.png": "not_an_image",
        f"{tmp_path}/tars/x-1.tar#../up.jpg": "unsafe_name",
    }
    assert stored(dataset) == expected
    for shard in dataset.shards():
        assert shard.in_place and storage.stat(shard.tar) == storage.FileStat(
            url=shard.tar, bytes=shard.tar_bytes, version=shard.tar_version
        )
        assert shard.tar_sha256 is None
        assert shard.samples + shard.rejected <= 5
        assert {row["source"].split("#")[0] for row in read_shard_index(shard).to_pylist()} <= {shard.tar}
    for row in rows(dataset):
        assert row["label"] == int(row["source"].split("#")[1][0]) * 3 % 5


@pytest.mark.parametrize("step", ["start", "finish"])
def test_a_tar_that_changes_under_the_pass_is_an_error_that_names_it(tmp_path, monkeypatch, step):
    tar = write_tar(tmp_path / "a.tar", [("1.png", image_bytes(1))])
    with monkeypatch.context() as patch:
        patch.setattr(commit, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tar, tmp_path / "out")
    write_tar(tar, [("1.png", image_bytes(2)), ("2.png", image_bytes(3))])
    in_place = ", indexed in place as shard v00-00000," if step == "finish" else ""
    with pytest.raises(InputError, match=rf"a\.tar{in_place} has changed"):
        prepare(tar, tmp_path / "out")
    tar.unlink()
    if step == "finish":
        with pytest.raises(InputError, match=rf"a\.tar{in_place} is gone"):
            prepare(tar, tmp_path / "out")


@pytest.mark.parametrize("val_fraction", [0, 0.4])
def test_parquet_becomes_tars(tmp_path, val_fraction):
    images = [image_bytes(i, "JPEG") for i in range(11)] + [b"no image", None]
    column = pa.array([None if image is None else {"bytes": image, "path": "x"} for image in images])
    labels = pa.array([i % 3 for i in range(13)])
    pq.write_table(pa.table({"img": column, "label": labels}), tmp_path / "a.parquet", row_group_size=4)
    settings = {"image_column": "img", "max_shard_samples": 5, "val_fraction": val_fraction}
    prepare(tmp_path / "a.parquet", tmp_path / "out", **settings)
    datasets = splits(tmp_path / "out") if val_fraction else [open_dataset(str(tmp_path / "out"))]
    assert sum(dataset.manifest.samples_in for dataset in datasets) == 13
    assert {source: data for dataset in datasets for source, data in stored(dataset).items()} == {
        f"{tmp_path}/a.parquet#row={i}": images[i] for i in range(11)
    }
    assert {x for dataset in datasets for x in rejects(dataset).values()} == {"not_an_image", "empty"}
    for row in (row for dataset in datasets for row in rows(dataset)):
        assert row["label"] == int(row["source"].rpartition("=")[2]) % 3


# ---------------------------------------------------------------------------------- limits


def sources_of(sizes: list[int], paths: list[bytes], kind: str) -> Sources:
    offsets: list[int] = []
    for i, path in enumerate(paths):  # one behind the other, each with its header
        first = i == 0 or path != paths[i - 1]
        offsets.append(512 if first else offsets[-1] + sizes[i - 1] + 512)
    reasons = pa.nulls(len(sizes), pa.string())
    table = pa.table({"path": paths, "bytes": sizes, "offset": offsets, "reject_reason": reasons})
    return Sources(kind=kind, origin={}, class_names=None, table=table)  # type: ignore[arg-type]


def test_ranges_respect_both_limits_and_tars():
    rng = np.random.default_rng(0)
    config = PrepareConfig(
        source="s",
        output="o",
        max_shard_samples=10,
        max_shard_bytes=50_000,
        decode=DecodeConfig(max_file_bytes=60_000),
    )
    for _ in range(50):
        sizes = rng.integers(0, 20_000, rng.integers(1, 200)).tolist()
        sizes[rng.integers(len(sizes))] = 10**9  # rejected unread: takes no room
        paths = [b"%d" % i for i in sorted(rng.integers(0, 5, len(sizes)).tolist())]
        for kind in ("folder", "tars"):
            ids = plan_ranges(sources_of(sizes, paths, kind), config)
            assert ids[0] == 0 and ids[-1] == len(sizes) and list(ids) == sorted(set(ids))
            if kind == "tars":  # read in one piece, whatever lies between
                room = [512 + size for size in sizes]
            else:
                room = [1024 + (size if size <= 60_000 else 0) for size in sizes]
            for first, end in itertools.pairwise(ids):
                assert end - first <= 10 and (sum(room[first:end]) <= 50_000 or end == first + 1)
                one_tar = kind == "tars" and len(set(paths[first : end + 1])) > 1
                assert kind != "tars" or len(set(paths[first:end])) == 1
                if end < len(sizes) and not one_tar:  # full: one more would break a limit
                    assert end - first == 10 or sum(room[first : end + 1]) > 50_000


def test_limits_of_shards_hold_on_disk(tmp_path):
    root = write_files(tmp_path / "p", {f"{i}.bmp": image_bytes(i, "BMP", size=(40, 40)) for i in range(12)})
    prepare(root, tmp_path / "out", max_shard_bytes=20_000)
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.num_shards == 4 and all(shard.tar_bytes <= 20_000 + 10_240 for shard in dataset.shards())


# ---------------------------------------------------------------------------------- real data, clusters


def test_real_photographs_in_a_tar(tmp_path, shared_dir):
    tar = shared_dir / "data" / "imagenet-sample.tar"
    if not tar.exists():
        pytest.skip(f"{tar} is not there")
    prepare(tar, tmp_path / "out", max_shard_samples=100)
    manifest = open_dataset(str(tmp_path / "out")).manifest
    assert (manifest.samples_in, manifest.samples_written, manifest.samples_rejected) == (250, 250, {})
    table = pyarrow.dataset.dataset(open_dataset(str(tmp_path / "out")).index_files()).to_table()
    assert table.num_rows == 250 and min(table.column("source_width").to_pylist()) > 100


def test_object_storage(tmp_path, s3_url):
    files = numbered(12, classes=2)
    for name, data in (files | {"bad.txt": b"bad"}).items():
        storage.put(f"{s3_url}/in/{name}", data)
    prepare(f"{s3_url}/in", f"{s3_url}/out", val_fraction=0.4, max_shard_samples=4)
    train, val = splits(f"{s3_url}/out")
    assert stored(train) | stored(val) == {f"{s3_url}/in/{name}": data for name, data in files.items()}

    tar = write_tar(tmp_path / "a.tar", [*files.items()])
    storage.put(f"{s3_url}/tars/a.tar", tar.read_bytes())
    prepare(f"{s3_url}/tars", tmp_path / "indexed")
    dataset = open_dataset(str(tmp_path / "indexed"))
    assert dataset.shard(0, 0).tar == f"{s3_url}/tars/a.tar" and dataset.manifest.samples_written == 12


@pytest.mark.ray
def test_a_cluster_writes_the_same_bytes(tmp_path, ray_head, make_image_folder):
    root = make_image_folder(classes=3, per_class=8)
    write_files(root, {"class-0/bad.jpg": b"bad"})
    prepare(root, tmp_path / "one", val_fraction=0.3, max_shard_samples=4)
    cluster = ClusterConfig(num_workers=2, cpus_per_worker=1, address=ray_head.address)
    prepare(root, tmp_path / "two", val_fraction=0.3, max_shard_samples=4, cluster=cluster)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
