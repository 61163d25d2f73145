"""Tars and Parquet files made to break the pass: accounted for, nothing executed or written outside.

What Parquet does to pyarrow itself is tried in a process of its own.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.format.tar import BLOCK
from shards.pixels.decode import Rejected
from shards.sources.listing import SourceConfig, list_sources, read_sources
from shards.sources.table import Sources, rows_of
from shards.writer.prepare import PrepareConfig, prepare_images

HERE = ClusterConfig(num_workers=0)
SEED = int(os.environ.get("HOSTILE_SEED", "0"))


def image_bytes(seed: int, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng([SEED, seed]).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def member(
    name: str,
    data: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
    size: int | None = None,
    form: int = tarfile.GNU_FORMAT,
    pax: dict[str, str] | None = None,
) -> bytes:
    """One member as bytes: header (of a claimed size, if one is given), payload, padding."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(data) if size is None else size
    info.pax_headers = pax or {}
    return info.tobuf(form, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)


def prepare(source: object, output: object, **settings) -> Dataset:
    prepare_images(PrepareConfig(source=str(source), output=str(output), **({"cluster": HERE} | settings)))
    return open_dataset(str(output), "images")


def listed(url: object, **settings) -> Sources:
    return list_sources(SourceConfig(url=str(url), **settings), HERE)


def read(sources: Sources) -> list[bytes | str]:
    """Bytes, or the reason why there are none."""
    with ThreadPoolExecutor(2) as pool:
        images = read_sources(rows_of(sources.table), image_column="image", max_file_bytes=1 << 20, pool=pool)
        return [image.reason if isinstance(image, Rejected) else image for image in images]


def outcome(url: Path) -> list[tuple[str, str | None]]:
    """(member, reason) of every row; None is an image to be read."""
    return [(row.name.partition("#")[2], row.reject_reason) for row in rows_of(listed(url).table)]


def fates(dataset: Dataset) -> list[tuple[str, str]]:
    """(source, `written` or the reason) of all that went in, sorted."""
    ids, _ = dataset.id_ranges()
    found = [(sample.source, "written") for sample in dataset.read_images(ids[0], ids[-1])]
    assert len(found) == dataset.manifest.samples_written
    for shard in dataset.shards():
        if shard.rejects is not None:
            found += [(row["source"], row["reason"]) for row in pq.read_table(shard.rejects).to_pylist()]
    assert len(found) == dataset.manifest.samples_in
    return sorted(found)


# ------------------------------------------------------------------------------------------ members


def test_every_hostile_member_is_accounted_for_and_none_is_followed(tmp_path):
    owned = tmp_path / "owned"
    pickled = b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(owned)
    image = image_bytes(0)
    (tmp_path / "in").mkdir()
    tar = tmp_path / "in" / "a.tar"
    members = {  # fate, and the member
        "good.png": ("written", member("good.png", image)),
        "good.pyd": (None, member("good.pyd", pickled)),
        "good.json": (None, member("good.json", b"[" * 100_000)),
        "bad.pyd": ("not_an_image", member("bad.pyd", pickled)),
        "model.pickle": ("not_an_image", member("model.pickle", pickled)),
        "weights.pt": ("not_an_image", member("weights.pt", pickled)),
        "pickle.png": ("not_an_image", member("pickle.png", pickled)),
        "array.npy": ("not_an_image", member("array.npy", b"\x93NUMPY\1\0")),
        "run.eps": ("not_an_image", member("run.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run")),
        "eps.png": ("unsupported", member("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run")),
        "../up.png": ("unsafe_name", member("../up.png", image)),
        "a/../../b.png": ("unsafe_name", member("a/../../b.png", image)),
        "/absolute.png": ("unsafe_name", member("/absolute.png", image)),
        "symbolic.png": ("link", member("symbolic.png", kind=tarfile.SYMTYPE, link="/etc/passwd")),
        "hard.png": ("link", member("hard.png", kind=tarfile.LNKTYPE, link="good.png")),
        "sized-link.png": ("link", member("sized-link.png", kind=tarfile.SYMTYPE, link="x", size=0)),
        "fifo.png": ("special", member("fifo.png", kind=tarfile.FIFOTYPE)),
        "disk.png": ("special", member("disk.png", kind=tarfile.BLKTYPE)),
        "tty.png": ("special", member("tty.png", kind=tarfile.CHRTYPE)),
        "volume.png": ("special", member("volume.png", kind=b"V")),
        "dotted.key.a.png": ("written", member("dotted.key.a.png", image_bytes(1))),
        "dotted.key.b.png": ("written", member("dotted.key.b.png", image_bytes(2))),
        "apart.png": ("written", member("apart.png", image_bytes(3))),
        "up/a..b.png": ("written", member("up/a..b.png", image_bytes(9))),
        "long/" * 40 + "name.png": ("written", member("long/" * 40 + "name.png", image_bytes(4))),
        "pax/" * 40 + "ü.png": (
            "written",
            member("pax/" * 40 + "ü.png", image_bytes(5), form=tarfile.PAX_FORMAT),
        ),
        "new\nline.png": ("written", member("new\nline.png", image_bytes(6))),
        "empty.png": ("empty", member("empty.png")),
        "text.png": ("not_an_image", member("text.png", b"text")),
        "cut.png": ("truncated", member("cut.png", image_bytes(7)[:300])),
        "folder.png": (None, member("folder.png", kind=tarfile.DIRTYPE)),
        "apart.cls": (None, member("apart.cls", b"5")),
        "apart.txt": (None, member("apart.txt", b"far from its image, and still its own")),
    }
    again = member("good.png", image_bytes(8))
    tar.write_bytes(b"".join(data for _, data in members.values()) + again + END)
    expected = [(f"{tar}#{name}", fate) for name, (fate, _) in members.items() if fate is not None]
    dataset = prepare(tar, tmp_path / "in" / "out")
    assert fates(dataset) == sorted([*expected, (f"{tar}#good.png", "duplicate_name")])
    assert not owned.exists()
    assert sorted(os.listdir(tmp_path)) == ["in"] and sorted(os.listdir(tmp_path / "in")) == ["a.tar", "out"]


def test_names_and_sizes_in_extended_headers(tmp_path):
    image = image_bytes(0)
    tar = tmp_path / "a.tar"
    good = member("good.png", image)

    def pax(name: str, **fields: str) -> bytes:
        return member(name, image, form=tarfile.PAX_FORMAT, pax=fields)

    def overridden(kind: bytes, record: bytes) -> bytes:
        return member("header", record, kind=kind) + good

    def pax_record(text: str) -> bytes:
        """`text` behind its own length; that of `key=value` and a newline is at most two digits here."""
        return b"%d %s\n" % (len(text) + 4, text.encode())

    for payload, expected in [
        (pax("fine.png", path="../up.png"), [("../up.png", "unsafe_name")]),
        (pax("fine.png", path="/etc/cron.d/x.png"), [("/etc/cron.d/x.png", "unsafe_name")]),
        (
            overridden(tarfile.GNUTYPE_LONGNAME, b"../" * 60 + b"x.png\0"),
            [("../" * 60 + "x.png", "unsafe_name")],
        ),
        (overridden(tarfile.GNUTYPE_LONGNAME, b"a\0b.png\0"), [("a", "not_an_image")]),
        (overridden(tarfile.GNUTYPE_LONGNAME, b"\0"), [("", "unsafe_name")]),
        (pax("fine.png", comment="hello"), [("fine.png", None)]),
        (overridden(tarfile.XGLTYPE, pax_record("comment=somebody")), [("good.png", None)]),
        (overridden(tarfile.XGLTYPE, pax_record("path=../all.png")), "sets path"),
        (overridden(tarfile.XGLTYPE, pax_record("size=00005")), "sets size"),
        (overridden(tarfile.XHDTYPE, pax_record("size=999999999")), "cut off"),
        (overridden(tarfile.XHDTYPE, pax_record("size=-1000")), "damaged pax"),
        (overridden(tarfile.XHDTYPE, b"99 path=x\n"), "damaged pax"),
        (overridden(tarfile.XHDTYPE, pax_record("GNU.sparse.major=1")), "sparse"),
        (member("s.png", bytes(512), kind=tarfile.GNUTYPE_SPARSE), "sparse"),
        (member("n", kind=tarfile.GNUTYPE_LONGNAME, size=8 << 30), "claims"),
        (member("p", kind=tarfile.XHDTYPE, size=1 << 40), "claims"),
        (member("huge.png", size=1 << 60), "cut off"),
        (member("huge.png", size=(1 << 33) - 1, form=tarfile.USTAR_FORMAT), "cut off"),
    ]:
        tar.write_bytes(member("first.png", image) + payload + END)
        if isinstance(expected, str):
            # damage costs what is behind it, never what was before, and says so
            rows = rows_of(listed(tar).table)
            assert [row.reject_reason for row in rows] == [None, "damaged_tar"], expected
            assert expected in (rows[1].reject_message or "") and rows[1].name == str(tar)
        else:
            assert outcome(tar) == [("first.png", None), *expected]
        assert read(listed(tar))[0] == image


def test_what_follows_the_end_is_not_lost_without_a_word(tmp_path):
    first = member("1.png", image_bytes(1)) + END
    second = member("2.png", image_bytes(2)) + END
    tar = tmp_path / "a.tar"
    for after, sound in [
        (b"", True),
        (bytes(20_480), True),
        (second, False),
        (bytes(BLOCK) + second, False),
        (bytes(3 << 20) + b"x", False),
    ]:
        tar.write_bytes(first + after)
        assert outcome(tar) == [("1.png", None)] + ([] if sound else [("", "damaged_tar")])
    tar.write_bytes(first[:-BLOCK])  # one zero block is an end, too
    assert outcome(tar) == [("1.png", None)]


def test_every_cut_gives_the_sound_members_and_says_that_there_was_more(tmp_path):
    images = [image_bytes(seed) for seed in range(3)]
    parts = [member("0.png", images[0]), member("x" * 120 + "/1.png", images[1]), member("2.png", images[2])]
    whole = b"".join(parts) + END
    ends = np.cumsum([len(part) for part in parts])
    tar = tmp_path / "a.tar"
    for cut in sorted({*range(0, len(whole), BLOCK), *range(100, len(whole), 333)}):
        tar.write_bytes(whole[:cut])
        if cut == 0:
            assert outcome(tar) == [("", "damaged_tar")]
            continue
        payload_ends = [end - -len(image) % BLOCK for end, image in zip(ends, images, strict=True)]
        sound = sum(end <= cut for end in payload_ends)
        complete = cut >= ends[-1] + BLOCK
        assert read(listed(tar)) == images[:sound] + ([] if complete else ["damaged_tar"]), cut


def test_compressed_and_other_archives_are_refused_or_rejected(tmp_path):
    whole = member("1.png", image_bytes(1)) + END
    for name, data in [
        ("gzip.tar", gzip.compress(whole)),
        ("zip.tar", b"PK\3\4" + bytes(600)),
        ("text.tar", b"this is no tar\n" * 100),
        ("random.tar", np.random.default_rng(SEED).bytes(3000)),
    ]:
        (tmp_path / name).write_bytes(data)
        assert outcome(tmp_path / name) == [("", "damaged_tar")]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(InputError, match="unpack"):
        listed(tmp_path / "a.tar.gz")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(InputError, match="no files"):
        listed(tmp_path / "pipe.tar")
    dataset = prepare(tmp_path / "gzip.tar", tmp_path / "out")
    assert dataset.manifest.samples_rejected == {"damaged_tar": 1} and dataset.manifest.samples_written == 0


def test_labels_that_are_texts_are_no_classes(tmp_path):
    tar = tmp_path / "a.tar"
    labels = [b"cat", b"x" * 5000, b"\xff\xfe", b"", b"9" * 30, b"\0", b"7"]
    parts = [member(f"{i}.png", image_bytes(i)) + member(f"{i}.cls", label) for i, label in enumerate(labels)]
    parts += [member("j.png", image_bytes(9)), member("j.json", json.dumps({"label": "y" * 5000}).encode())]
    tar.write_bytes(b"".join(parts) + END)
    sources = listed(tar)
    assert sources.class_names is not None and max(map(len, sources.class_names)) < 1000
    found = [None if row.label is None else sources.class_names[row.label] for row in rows_of(sources.table)]
    assert found == ["cat", None, "\ufffd\ufffd", None, "9" * 30, "\0", "7", None]


def test_ranges_of_a_tar_count_what_lies_between_the_images(tmp_path):
    tar = tmp_path / "a.tar"
    film = member("film.mp4", bytes(300_000))
    parts = [member(f"{i}.png", image_bytes(i)) + (film if i in (2, 3, 7) else b"") for i in range(10)]
    tar.write_bytes(b"".join(parts) + END)
    dataset = prepare(tar, tmp_path / "out", max_shard_bytes=100_000)
    ranges = dataset.id_ranges()[0]
    # films are sources too (rejected, in a range with what comes before the next image)
    assert sum(fate == "written" for _, fate in fates(dataset)) == 10
    assert len(ranges) - 1 >= 6


# ------------------------------------------------------------------------------------------ Parquet


def write_parquet(path: Path, table: pa.Table, **options) -> Path:
    pq.write_table(table, path, **options)
    return path


def test_parquet_of_wrong_types_is_refused_by_name(tmp_path):
    image = [b"x", b"y"]
    for name, table in {
        "numbers": {"image": [1, 2]},
        "text": {"image": ["a", "b"]},
        "lists": {"image": [[b"a"], [b"b"]]},
        "struct": {"image": [{"path": "a"}, {"path": "b"}]},
        "bytes-of-text": {"image": [{"bytes": "a"}, {"bytes": "b"}]},
        "absent": {"picture": image},
        "categories": {"image": pa.array(image).dictionary_encode()},
        "float-labels": {"image": image, "label": [0.5, 1.5]},
        "list-labels": {"image": image, "label": [[1], [2]]},
        "bool-labels": {"image": image, "label": [True, False]},
    }.items():
        path = write_parquet(tmp_path / f"{name}.parquet", pa.table(table))
        with pytest.raises(InputError, match=name):
            listed(path)
    twice = pa.Table.from_arrays([pa.array(image), pa.array(image)], names=["image", "image"])
    with pytest.raises(InputError, match="twice"):
        listed(write_parquet(tmp_path / "twice.parquet", twice))


def test_nulls_and_odd_labels(tmp_path):
    images = [image_bytes(1), None, b"", image_bytes(2), image_bytes(3)]
    texts = [b"dog", b"lost with its image", None, b"caf\xe9", b"caption " * 1000]
    validity, offsets, data = pa.array(texts, pa.binary()).buffers()
    names = pa.StringArray.from_buffers(5, offsets, data, validity, 1)
    path = write_parquet(tmp_path / "a.parquet", pa.table({"image": images, "label": names}))
    sources = listed(path)
    assert sources.class_names == ("caf\\xe9", "dog")
    assert [row.label for row in rows_of(sources.table)] == [1, None, None, 0, None]
    assert read(sources) == [images[0], "empty", "empty", images[3], images[4]]
    numbers = pa.table({"image": images, "label": pa.array([2**63, 2**31, None, 5, 0], pa.uint64())})
    rows = rows_of(listed(write_parquet(tmp_path / "b.parquet", numbers)).table)
    assert [row.label for row in rows] == [None, None, None, 5, 0]
    nothing = pa.table({"image": pa.nulls(5000, pa.binary())})
    assert read(listed(write_parquet(tmp_path / "c.parquet", nothing))) == ["empty"] * 5000
    deep = pa.table({"image": [b"x"]}).replace_schema_metadata({"huggingface": "[" * 100_000})
    assert listed(write_parquet(tmp_path / "d.parquet", deep)).class_names is None


def test_a_flipped_byte_in_a_parquet_file_never_escapes(tmp_path):
    """In a process of its own: what breaks pyarrow itself must not break the tests."""
    images = [image_bytes(seed) for seed in range(12)]
    table = pa.table({"image": images, "label": [f"class {i % 3}" for i in range(12)]})
    path = write_parquet(tmp_path / "whole.parquet", table, row_group_size=4)
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
import importlib.util
spec = importlib.util.spec_from_file_location("hostile_tars", {__file__!r})
module = importlib.util.module_from_spec(spec); sys.modules["hostile_tars"] = module
spec.loader.exec_module(module)
module.flip_parquet({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["rejected"] > 5 and counts["read"] > 5, counts


def flip_parquet(path: str) -> None:
    """Flip bytes of a Parquet file, list and read it; prints how often which outcome was seen."""
    rng = np.random.default_rng([SEED, 3])
    whole = Path(path).read_bytes()
    known = {hashlib.sha256(data).digest() for data in read(listed(path)) if isinstance(data, bytes)}
    footer = struct.unpack("<I", whole[-8:-4])[0] + 8
    counts = {"refused": 0, "rejected": 0, "read": 0}
    flipped_path = Path(path).with_name("flipped.parquet")
    for number in range(150):
        data = bytearray(whole)
        first = len(data) - footer if number % 2 else 0
        for place in rng.integers(first, len(data), rng.integers(1, 4)):
            data[place] ^= 1 << rng.integers(8)
        flipped_path.write_bytes(data if number % 10 else data[: rng.integers(1, len(data))])
        try:
            sources = listed(flipped_path)
            images = read(sources)
        except InputError as error:
            assert str(flipped_path) in str(error) or "holds no images" in str(error)
            counts["refused"] += 1
            continue
        assert len(images) == len(sources)
        counts["rejected"] += any(isinstance(image, str) for image in images)
        counts["read"] += any(
            isinstance(image, bytes) and hashlib.sha256(image).digest() in known for image in images
        )
    print(json.dumps(counts))


def test_a_file_that_claims_a_billion_rows_is_one_reject(tmp_path):
    table = pa.table({"image": pa.nulls(3_000_000, pa.binary())})
    path = write_parquet(tmp_path / "a.parquet", table, compression="zstd")
    assert path.stat().st_size < 1 << 20
    [row] = rows_of(listed(path).table)
    assert row.reject_reason == "damaged_parquet" and "3000000 rows" in (row.reject_message or "")


def test_rows_of_a_damaged_group_are_named_one_by_one(tmp_path):
    images = [image_bytes(seed) for seed in range(9)]
    path = write_parquet(
        tmp_path / "a.parquet",
        pa.table({"image": images}),
        row_group_size=3,
        compression="gzip",
        use_dictionary=False,
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start + 40 : start + column.total_compressed_size - 10] = bytes(column.total_compressed_size - 50)
    path.write_bytes(data)
    dataset = prepare(path, tmp_path / "out")
    assert fates(dataset) == [
        (f"{path}#row={i}", "written" if i // 3 != 1 else "damaged_parquet") for i in range(9)
    ]
