"""A folder made to break the pass: every file is written or rejected with a reason, as Pillow decides."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.dataset.rows import read_shard_index
from shards.format.records import to_utf8
from shards.pixels.decode import FORMATS, REASONS, DecodeConfig, Rejected, decode, decode_image
from shards.writer import commit
from shards.writer.prepare import PrepareConfig, prepare_images
from tests.shards.sources.hostile_pictures import (
    SEED,
    broken_pictures,
    damaged_pictures,
    limits,
    picture,
    saved,
    whole_pictures,
)

MAX_PIXELS = 20_000_000
READ_REASONS = ("empty", "unreadable", "changed", "too_large")


def prepare(source: object, output: object, **settings) -> Dataset:
    here = {"cluster": ClusterConfig(num_workers=0), "decode": DecodeConfig(max_pixels=MAX_PIXELS)}
    config = PrepareConfig(source=str(source), output=str(output), **(here | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_images(config)
    return open_dataset(str(output), "images")


def oracle(data: bytes) -> tuple[int, int] | None:
    """Upright (width, height) of a file's first picture, if plain Pillow decodes all of a listed format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                image.load()
                size = image.size
                with contextlib.suppress(Exception):  # the picture is whole, only its EXIF block is not
                    size = ImageOps.exif_transpose(image).size
                return size
        except Exception:
            return None


def account(dataset: Dataset) -> tuple[dict[str, tuple[bytes, int, int]], dict[str, tuple[str, str]]]:
    """(bytes, width, height) of every stored source and (reason, message) of every reject, by source."""
    written: dict[str, tuple[bytes, int, int]] = {}
    rejected: dict[str, tuple[str, str]] = {}
    for shard in dataset.shards():
        archive = Path(shard.tar).read_bytes()
        for row in read_shard_index(shard).to_pylist():
            assert row["source"] not in written
            image = archive[row["image_offset"] : row["image_offset"] + row["image_bytes"]]
            written[row["source"]] = image, row["source_width"], row["source_height"]
        if shard.rejects is not None:
            for row in pq.read_table(shard.rejects).to_pylist():
                assert row["source"] not in rejected
                rejected[row["source"]] = row["reason"], row["message"]
    manifest = dataset.manifest
    assert manifest.samples_in == len(written) + len(rejected)
    assert manifest.samples_written == len(written)
    reasons = [reason for reason, _ in rejected.values()]
    assert manifest.samples_rejected == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    assert not set(written) & set(rejected)
    assert all(reason and message and "\n" not in message for reason, message in rejected.values())
    return written, rejected


def check(root: Path, dataset: Dataset, files: dict[bytes, bytes]) -> dict[str, tuple[str, str]]:
    """Assert that regular files met the fate that plain Pillow decides; the other rejects are returned."""
    written, rejected = account(dataset)
    for name, data in files.items():
        source = to_utf8(os.fsdecode(os.fsencode(root) + b"/" + name))
        expected = oracle(data)
        if expected is None:
            assert source not in written, f"{source} was written, but Pillow cannot decode it"
            reason, _ = rejected.pop(source)
            assert reason in REASONS
        else:
            assert source not in rejected, f"{source} was rejected: {rejected[source]}"
            assert written.pop(source) == (data, *expected)
    assert not written
    return rejected


def write(root: Path, files: dict[bytes, bytes]) -> None:
    for name, data in files.items():
        path = os.fsencode(root) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def odd_names() -> Iterator[tuple[bytes, bytes]]:
    names = [
        b"no_extension", b".hidden.jpg", b".hidden_folder/a.png", b"folder.jpg/inside.png", b"new\nline.png",
        b"quo'te\".png", b"back\\slash.png", b"caf\xe9.png", b"caf\xc3\xa9.png", b"\xff\xfe\xfd", b"#1.png",
        b"100%.png", b"a*b?.png", b"{000..002}.png", b"-rf.png", b" spaces ", "日本語🙂.png".encode(),
        b"tab\t.png", b"$(touch owned).png", b"x" * 251 + b".png", b"CON", b"a.tar.png", b"\x01\x7f",
    ]  # fmt: skip
    for number, name in enumerate(names):
        yield (
            b"na\xefve names/" + name,
            saved(picture(size=(8, 8), seed=number), "JPEG" if number % 2 else "PNG"),
        )


# ------------------------------------------------------------------------------------------ the tests


def test_every_file_is_written_or_rejected_as_plain_pillow_decides(tmp_path):
    files = {
        name.encode(): data
        for source in (whole_pictures, broken_pictures, limits, damaged_pictures)
        for name, data in source()
    }
    files |= dict(odd_names())
    root = tmp_path / "pictures"
    write(root, files)
    dataset = prepare(root, tmp_path / "out", max_shard_samples=400)
    assert check(root, dataset, files) == {}
    assert dataset.manifest.samples_written > 150 and len(dataset.manifest.samples_rejected) == len(REASONS)
    assert dataset.manifest.samples_in == len(files) > 900
    assert not Path("/tmp/hostile-was-here").exists() and not (tmp_path / "owned").exists()
    assert dataset.manifest.class_names is not None and "na\\xefve names" in dataset.manifest.class_names


def test_special_files_links_and_permissions(tmp_path):
    image = saved(picture(), "PNG")
    root, outside = tmp_path / "pictures", tmp_path / "outside"
    files = {b"a/1.png": image, b"a/b/2.png": image, b"secret.png": image, b"locked/3.png": image}
    write(root, files)
    write(outside, {b"far.png": image, b"deep/er.png": image})
    special = {
        name: "unreadable" for name in ("dangling.png", "self.png", "pipe.jpg", "socket.png", "zero.png")
    }
    (root / "dangling.png").symlink_to("/nowhere/at/all.png")
    (root / "self.png").symlink_to("self.png")
    os.mkfifo(root / "pipe.jpg")
    (root / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(root)  # the name of a socket is short
        listener.bind("socket.png")
        os.chdir(here)
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "b" / "here").symlink_to(".")
    (root / "0-first-by-name").symlink_to(root / "a" / "b")
    (root / "far").symlink_to(outside)
    (root / "far.png").symlink_to(outside / "far.png")
    files |= {b"far/far.png": image, b"far/deep/er.png": image, b"far.png": image}
    for name in ("one", "two"):
        (root / name).symlink_to({"one": "two", "two": "one"}[name])
        special[name] = "unreadable"
    os.chmod(root / "secret.png", 0)
    os.chmod(root / "locked", 0)
    readable = os.access(root / "secret.png", os.R_OK)  # for root everything is
    try:
        dataset = prepare(root, tmp_path / "out")
    finally:
        os.chmod(root / "locked", 0o700)
    if not readable:
        del files[b"secret.png"], files[b"locked/3.png"]
        special |= {"secret.png": "unreadable", "locked": "unreadable"}
    rest = check(root, dataset, files)
    assert {name: reason for name, (reason, _) in rest.items()} == {
        f"{root}/{name}": reason for name, reason in special.items()
    }


def test_a_path_too_long_to_open_is_named(tmp_path):
    root = tmp_path / "pictures"
    write(root, {b"fine.png": saved(picture(), "PNG")})
    folder = os.open(root, os.O_RDONLY)
    for _ in range(18):
        os.mkdir("d" * 250, dir_fd=folder)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(os.open("lost.png", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    written, rejected = account(prepare(root, tmp_path / "out"))
    assert list(written) == [f"{root}/fine.png"]
    [(place, (reason, _))] = rejected.items()
    assert len(place) > 4000 and reason == "unreadable"


def test_files_that_change_after_the_listing_are_rejected_by_name(tmp_path, monkeypatch):
    image, other = saved(picture(), "BMP"), saved(picture(seed=1), "BMP")
    assert len(image) == len(other)
    names = ("gone", "grown", "cut", "other", "touched", "pipe", "folder", "link", "loop", "same")
    root = tmp_path / "pictures"
    write(root, {name.encode(): image for name in names})
    with monkeypatch.context() as patch:
        patch.setattr(commit, "start", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(root, tmp_path / "out")
    for name in ("gone", "pipe", "folder", "link", "loop"):
        (root / name).unlink()
    (root / "grown").write_bytes(image + b"more")
    (root / "cut").write_bytes(image[:-5])
    (root / "other").write_bytes(other)
    os.utime(root / "touched", ns=(1, 1))
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    (root / "link").symlink_to(root / "other")
    (root / "loop").symlink_to(root / "loop")
    (root / "new").write_bytes(image)
    written, rejected = account(prepare(root, tmp_path / "out"))
    assert {os.path.basename(source) for source in written} == {"same"}
    reasons = {os.path.basename(source): reason for source, (reason, _) in rejected.items()}
    changed = dict.fromkeys(("grown", "cut", "other", "touched", "link"), "changed")
    assert reasons == changed | dict.fromkeys(("gone", "pipe", "folder", "loop"), "unreadable")


def test_a_file_that_is_written_to_while_it_is_read_is_rejected(tmp_path, monkeypatch):
    root = tmp_path / "pictures"
    write(root, {b"a.bmp": saved(picture(), "BMP"), b"b.bmp": saved(picture(), "BMP")})
    read = storage.read

    def half_and_half(url: str, start: int = 0, length: int | None = None) -> bytes:
        data = read(url, start, length)
        if url.endswith("a.bmp"):
            new = saved(picture(seed=3), "BMP")
            Path(url).write_bytes(new)
            return data[:1000] + new[1000:]
        return data

    monkeypatch.setattr(storage, "read", half_and_half)
    written, rejected = account(prepare(root, tmp_path / "out"))
    assert list(written) == [f"{root}/b.bmp"] and rejected[f"{root}/a.bmp"][0] == "changed"


def test_many_files_in_one_folder(tmp_path):
    root = tmp_path / "pictures"
    kinds = {
        b"0.png": saved(picture(size=(4, 4)), "PNG"),
        b"1.jpg": b"no",
        b"2.bmp": saved(picture(size=(4, 4)), "BMP"),
    }
    write(root, kinds)
    for number in range(3, 20_000):
        os.link(root / os.fsdecode(sorted(kinds)[number % 3]), root / str(number))
    dataset = prepare(root, tmp_path / "out")
    written, rejected = account(dataset)
    assert len(written) == 13_333 and dataset.manifest.samples_rejected == {"not_an_image": 6_667}
    names = {os.path.basename(source).partition(".")[0] for source in (*written, *rejected)}
    assert names == set(map(str, range(20_000)))


def test_a_source_that_cannot_be_looked_at_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "dangling", "pipe", "x" * 300):
        with pytest.raises(InputError, match=name):
            prepare(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ decoding alone


def agrees(data: bytes) -> bool:
    """Whether decoding says what Pillow says; True where both have pixels."""
    expected = oracle(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            height, width = decode_image(data, DecodeConfig(max_pixels=MAX_PIXELS)).shape[:2]
        except Rejected as rejected:
            assert rejected.reason in REASONS
            assert expected is None, f"{rejected} of what Pillow decodes"
            return False
    assert (width, height) == expected
    return True


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damage_has_the_outcome_that_pillow_gives_it(file_format):
    rng = np.random.default_rng([SEED, 2])
    outcomes = {True: 0, False: 0}
    for seed in range(6):
        mode = ("RGB", "L", "RGB", "P" if file_format not in ("JPEG", "WEBP") else "RGB")[seed % 4]
        options = {"progressive": True} if file_format == "JPEG" and seed % 2 else {}
        data = saved(picture(mode, (30 + seed, 25), seed), file_format, **options)
        outcomes[agrees(data)] += 1
        for _ in range(40):
            flipped = bytearray(data)
            for place in rng.integers(0, len(data), rng.integers(1, 3)):
                flipped[place] ^= 1 << rng.integers(8)
            outcomes[agrees(bytes(flipped[: rng.integers(1, 2 * len(data))]))] += 1
    assert min(outcomes.values()) >= 6


def test_only_listed_formats_are_opened():
    Image.init()
    programs_and_stubs = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "FPX", "MIC"}
    assert set(FORMATS) <= set(Image.OPEN) and not set(FORMATS) & programs_and_stubs
    unsupported = ["nothing/postscript.eps", "nothing/wmf.wmf"]
    if importlib.util.find_spec("pillow_heif") is None:
        unsupported.append("nothing/heic.heic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in broken_pictures():
            with pytest.raises(Rejected) as raised:
                decode(data, DecodeConfig())
            assert (raised.value.reason == "unsupported") == (name in unsupported), name
