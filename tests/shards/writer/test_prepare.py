"""Preparing: every source is written untouched or rejected with its reason, whatever happens."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.dataset.rows import read_shard_index
from shards.pixels.decode import DecodeConfig, decode_config_of
from shards.sources.table import Sources, load_sources
from shards.writer import commit
from shards.writer.prepare import PrepareConfig, plan_ranges, prepare_images

IN_PROCESS = ClusterConfig(num_workers=0)


def prepare(source: object, output: object, **settings) -> None:
    prepare_images(
        PrepareConfig(source=str(source), output=str(output), **({"cluster": IN_PROCESS} | settings))
    )


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


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def rows(dataset: Dataset) -> list[dict]:
    return [row for shard in dataset.shards() for row in read_shard_index(shard).to_pylist()]


def rejects(dataset: Dataset) -> dict[str, str]:
    """Reason by source."""
    files = [shard.rejects for shard in dataset.shards() if shard.rejects is not None]
    return {row["source"]: row["reason"] for file in files for row in pq.read_table(file).to_pylist()}


def stored(dataset: Dataset) -> dict[str, bytes]:
    """Image bytes by source, through plain `tarfile`-like access: tar, offset, length."""
    found: dict[str, bytes] = {}
    for shard in dataset.shards():
        data = Path(shard.tar).read_bytes()
        for row in read_shard_index(shard).to_pylist():
            image = data[row["image_offset"] : row["image_offset"] + row["image_bytes"]]
            assert hashlib.sha256(image).digest() == row["image_hash"]
            found[row["source"]] = image
    return found


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------- what is written


def test_a_folder_becomes_a_dataset(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        f"{kind}/{i}.png": image_bytes(i + 100 * len(kind)) for kind in ("ant", "zebra") for i in range(8)
    }
    files |= {"ant/turned.jpeg": image_bytes(50, "JPEG", exif=exif), "top.WEBP": image_bytes(51, "WEBP")}
    files |= {
        "zebra/really_a_png.jpg": image_bytes(52),
        "zebra/text.jpg": b"no picture",
        "readme.md": b"# hi",
    }
    root = write_files(tmp_path / "pictures", files)
    prepare(root, tmp_path / "out", max_shard_samples=6)
    said = capsys.readouterr().out
    assert "21 in = 19 written + 2 rejected (not_an_image 2)" in said and str(tmp_path / "out") in said

    dataset = open_dataset(str(tmp_path / "out"), "images")
    manifest = dataset.manifest
    assert (manifest.samples_in, manifest.samples_written, manifest.samples_rejected) == (
        21,
        19,
        {"not_an_image": 2},
    )
    assert manifest.class_names == ("ant", "zebra")
    assert decode_config_of(manifest.recipe.require_decode()) == DecodeConfig()
    assert rejects(dataset) == {f"{root}/zebra/text.jpg": "not_an_image", f"{root}/readme.md": "not_an_image"}
    accepted = {name: data for name, data in files.items() if data[:2] != b"no" and data[:2] != b"# "}
    assert stored(dataset) == {f"{root}/{name}": data for name, data in accepted.items()}
    sources = load_sources(str(tmp_path / "out" / "sources.parquet"))
    assert sources is not None
    listing = sources.table.column("path").to_pylist()
    for row in rows(dataset):
        name = row["source"][len(str(root)) + 1 :]
        with Image.open(io.BytesIO(files[name])) as image:
            extension = {"JPEG": "jpg"}.get(image.format or "", (image.format or "").lower())
            assert (row["source_width"], row["source_height"]) == ImageOps.exif_transpose(image).size
        folder = os.path.dirname(name)
        assert row["label"] == (("ant", "zebra").index(folder) if folder else None)
        assert listing[row["sample_id"]] == row["source"].encode()
        assert row["extension"] == extension
    for shard in dataset.shards():
        with tarfile.open(shard.tar) as archive:
            keys = read_shard_index(shard).column("key").to_pylist()
            extensions = read_shard_index(shard).column("extension").to_pylist()
            names = [f"{key}.{extension}" for key, extension in zip(keys, extensions, strict=True)]
            assert archive.getnames() == names and all(
                name.islower() or name.isdigit() for name in extensions
            )


def test_a_rerun_skips_and_never_lists_again(tmp_path, capsys):
    root = write_files(tmp_path / "p", {f"{i}.png": image_bytes(i) for i in range(5)})
    prepare(root, tmp_path / "out")
    before = tree(tmp_path / "out")
    shutil.rmtree(root)
    write_files(tmp_path / "p", {"new.png": image_bytes(9)})
    capsys.readouterr()
    prepare(root, tmp_path / "out")
    assert tree(tmp_path / "out") == before
    said = capsys.readouterr().out
    assert "finished already" in said and "5 in = 5 written + 0 rejected" in said


def test_other_settings_at_the_same_output_are_refused(tmp_path):
    root = write_files(tmp_path / "p", {f"{i % 2}/{i}.png": image_bytes(i) for i in range(40)})
    other = write_files(tmp_path / "q", {f"{i}.png": image_bytes(i) for i in range(5)})
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
    assert tree(tmp_path / "taken") == {"thesis.txt": b"precious"}


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


def test_interrupted_and_repeated_gives_the_bytes_of_an_undisturbed_run(tmp_path, monkeypatch):
    files = {f"{i % 3}/{i}.png": image_bytes(i) for i in range(23)} | {"0/x.txt": b"x", "1/y.txt": b"y"}
    root = write_files(tmp_path / "p", files)
    prepare(root, tmp_path / "straight", max_shard_samples=4)
    whole_commit: Callable[..., commit.Receipt] = commit.commit
    for step in ("put_tar", "put_index", "put_rejects", "create_receipt", "finish", "create_manifest"):
        output = tmp_path / f"after-{step}"
        original = getattr(commit, step)
        calls = 0

        def interrupted(*args, original=original, **settings):
            nonlocal calls
            calls += 1
            if calls % 3 == 0 or original.__name__ in ("finish", "create_manifest"):
                raise KeyboardInterrupt
            return original(*args, **settings)

        monkeypatch.setattr(commit, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, output, max_shard_samples=4)
        assert not (output / "manifest.json").exists()
        monkeypatch.setattr(commit, step, original)
        prepare(root, output, max_shard_samples=4)
        assert tree(output) == tree(tmp_path / "straight"), step
    assert commit.commit is whole_commit


def test_interrupted_between_listing_and_plan(tmp_path, monkeypatch):
    root = write_files(tmp_path / "p", {f"{i}.png": image_bytes(i) for i in range(30)})
    for settings in ({}, {"val_fraction": 0.3}):
        output = tmp_path / f"out-{len(settings)}"
        with monkeypatch.context() as patch:
            patch.setattr(commit, "start", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(root, output, **settings)
        write_files(root, {"late.png": image_bytes(99)})
        prepare(root, output, **settings)
        (root / "late.png").unlink()
        parts = [output] if not settings else [output / "train", output / "val"]
        assert sum(open_dataset(str(part)).manifest.samples_in for part in parts) == 30


# ---------------------------------------------------------------------------------- splits


def test_a_split_keeps_duplicates_together_and_loses_nothing(tmp_path):
    files = {f"{i % 4}/{i}.png": image_bytes(i % 60) for i in range(120)} | {
        "0/no.txt": b"no",
        "empty.jpg": b"",
    }
    root = write_files(tmp_path / "p", files)
    prepare(root, tmp_path / "out", val_fraction=0.25)
    train, val = (open_dataset(str(tmp_path / "out" / part)) for part in ("train", "val"))
    assert train.manifest.samples_in + val.manifest.samples_in == 122
    assert 10 < val.manifest.samples_written < 60
    both = stored(train) | stored(val)
    assert both == {f"{root}/{name}": data for name, data in files.items() if name.endswith("png")}
    assert not set(stored(train).values()) & set(stored(val).values())
    assert train.manifest.class_names == val.manifest.class_names == ("0", "1", "2", "3")
    for dataset in (train, val):
        assert sorted(row["sample_id"] for row in rows(dataset)) == [
            row["sample_id"] for row in rows(dataset)
        ]
        for row in rows(dataset):
            assert row["label"] == int(row["source"][len(str(root)) + 1])
        sources = load_sources(f"{dataset.url}/sources.parquet")
        assert sources is not None and len(sources) == dataset.manifest.samples_in
    before = tree(tmp_path / "out")
    prepare(root, tmp_path / "out", val_fraction=0.25)
    assert tree(tmp_path / "out") == before


# ---------------------------------------------------------------------------------- tars and Parquet


def test_tars_are_indexed_where_they_are(tmp_path):
    tars: dict[str, dict[str, bytes]] = {}
    for number in range(3):
        members: dict[str, bytes] = {}
        for i in range(7):
            members |= {
                f"{i}.jpg": image_bytes(10 * number + i, "JPEG"),
                f"{i}.cls": str((i * 3) % 5).encode(),
            }
        tars[f"x-{number}.tar"] = members
    tars["x-1.tar"]["bad.png"] = b"no image"
    tars["x-1.tar"]["../up.jpg"] = image_bytes(1, "JPEG")
    (tmp_path / "tars").mkdir()
    for name, members in tars.items():
        write_tar(tmp_path / "tars" / name, members)
    prepare(tmp_path / "tars" / "x-{0..2}.tar", tmp_path / "out", max_shard_samples=5)
    assert not list((tmp_path / "out").rglob("*.tar"))
    dataset = open_dataset(str(tmp_path / "out"), "images")
    assert dataset.manifest.samples_in == 23 and dataset.manifest.samples_written == 21
    assert rejects(dataset) == {
        f"{tmp_path}/tars/x-1.tar#bad.png": "not_an_image",
        f"{tmp_path}/tars/x-1.tar#../up.jpg": "unsafe_name",
    }
    expected = {
        f"{tmp_path}/tars/{tar}#{name}": data
        for tar, members in tars.items()
        for name, data in members.items()
        if name.endswith("jpg") and name[0] != "."
    }
    assert stored(dataset) == expected
    for shard in dataset.shards():
        assert shard.in_place and shard.tar_bytes == os.path.getsize(shard.tar)
        assert shard.samples + shard.rejected <= 5
        assert {row["source"].split("#")[0] for row in read_shard_index(shard).to_pylist()} <= {shard.tar}
    for row in rows(dataset):
        assert row["label"] == int(row["source"].split("#")[1][0]) * 3 % 5


def test_a_tar_that_changes_under_the_pass_is_an_error_that_names_it(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", {"1.png": image_bytes(1)})
    with monkeypatch.context() as patch:
        patch.setattr(commit, "start", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(tar, tmp_path / "out")
    write_tar(tar, {"1.png": image_bytes(2)})
    with pytest.raises(InputError, match=r"a\.tar has changed"):
        prepare(tar, tmp_path / "out")


def test_nothing_in_a_tar_is_executed_or_unpacked(tmp_path):
    owned = tmp_path / "owned"
    members = {
        "1.png": image_bytes(1),
        "1.pyd": b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(owned),
        "2.pickle": b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(owned),
        "3.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n%%EOF",
        f"../../{tmp_path.name}-out.png": image_bytes(2),
    }
    (tmp_path / "in").mkdir()
    tar = write_tar(tmp_path / "in" / "a.tar", members)
    prepare(tar, tmp_path / "in" / "out")
    assert not owned.exists()
    assert sorted(os.listdir(tmp_path)) == ["in"] and sorted(os.listdir(tmp_path / "in")) == ["a.tar", "out"]
    manifest = open_dataset(str(tmp_path / "in" / "out")).manifest
    assert manifest.samples_written == 1
    assert manifest.samples_rejected == {"not_an_image": 2, "unsafe_name": 1}


def test_parquet_becomes_tars(tmp_path):
    images = [image_bytes(i, "JPEG") for i in range(11)] + [b"no image", None]
    column = pa.array([None if image is None else {"bytes": image, "path": "x"} for image in images])
    labels = pa.array([i % 3 for i in range(13)])
    pq.write_table(pa.table({"img": column, "label": labels}), tmp_path / "a.parquet", row_group_size=4)
    for settings in ({}, {"val_fraction": 0.4}):
        output = tmp_path / f"out{len(settings)}"
        prepare(tmp_path / "a.parquet", output, image_column="img", max_shard_samples=5, **settings)
        parts = [
            open_dataset(str(path))
            for path in ([output] if not settings else [output / "train", output / "val"])
        ]
        assert sum(part.manifest.samples_in for part in parts) == 13
        assert {source: data for part in parts for source, data in stored(part).items()} == {
            f"{tmp_path}/a.parquet#row={i}": images[i] for i in range(11)
        }
        assert {reason for part in parts for reason in rejects(part).values()} == {"not_an_image", "empty"}
        for row in (row for part in parts for row in rows(part)):
            assert row["label"] == int(row["source"].rpartition("=")[2]) % 3


# ---------------------------------------------------------------------------------- limits


def sources_of(
    sizes: list[int], paths: list[bytes], kind: str, reasons: list[str | None] | None = None
) -> Sources:
    count = len(sizes)
    offsets: list[int] = []
    for i, path in enumerate(paths):  # one behind the other, each with its header
        begins = i == 0 or path != paths[i - 1]
        offsets.append(512 if begins else offsets[-1] + sizes[i - 1] + 512)
    columns = {"path": paths, "bytes": sizes, "offset": offsets}
    table = pa.table({**columns, "reject_reason": pa.array(reasons or [None] * count, pa.string())})
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
    from pipeline import storage

    files = {f"{i % 2}/{i}.png": image_bytes(i) for i in range(12)} | {"bad.txt": b"bad"}
    for name, data in files.items():
        storage.put(f"{s3_url}/in/{name}", data)
    prepare(f"{s3_url}/in", f"{s3_url}/out", val_fraction=0.4, max_shard_samples=4)
    found: dict[str, bytes] = {}
    for part in ("train", "val"):
        dataset = open_dataset(f"{s3_url}/out/{part}")
        for shard in dataset.shards():
            data = storage.read(shard.tar)
            for row in read_shard_index(shard).to_pylist():
                found[row["source"]] = data[row["image_offset"] : row["image_offset"] + row["image_bytes"]]
    assert found == {f"{s3_url}/in/{name}": data for name, data in files.items() if name != "bad.txt"}
    tar = write_tar(tmp_path / "a.tar", {name: data for name, data in files.items()})
    storage.put(f"{s3_url}/tars/a.tar", tar.read_bytes())
    prepare(f"{s3_url}/tars", str(tmp_path / "indexed"))
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


def test_what_made_it_is_written_beside_it(tmp_path):
    root = write_files(tmp_path / "p", {"1.png": image_bytes(1)})
    prepare(root, tmp_path / "out", seed=5)
    record = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert record["code_version"] and record["config"]["seed"] == 5
    assert dataclasses.asdict(DecodeConfig())["max_pixels"] == record["config"]["decode"]["max_pixels"]
