"""Sources: everything is listed, in a frozen order, and what is read is what was listed."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.pixels.decode import Rejected
from shards.sources import parquet as source_parquet
from shards.sources.listing import SourceConfig, list_sources, read_sources
from shards.sources.table import (
    Source,
    Sources,
    freeze,
    load_rows,
    load_sources,
    rows_of,
    split_by_content,
    with_hashes,
)
from shards.sources.tars import read_members
from tests.shards.files import write_files, write_tar

IN_PROCESS = ClusterConfig(num_workers=0)


def listed(url: object, **settings) -> Sources:
    return list_sources(SourceConfig(url=str(url), **settings), IN_PROCESS)


def read(sources: Sources, rows: list[Source] | None = None, limit: int = 1 << 20) -> list[bytes | str]:
    """Bytes, or the reason why there are none."""
    with ThreadPoolExecutor(4) as pool:
        images = read_sources(
            rows_of(sources.table) if rows is None else rows,
            image_column=sources.origin["image_column"],
            max_file_bytes=limit,
            pool=pool,
        )
        return [image.reason if isinstance(image, Rejected) else image for image in images]


# ------------------------------------------------------------------------------------------ image folders


def test_a_folder_lists_every_file_once_with_its_label(tmp_path):
    files = {
        f"{kind}/{i}.jpg": f"{kind}{i}".encode() for kind in ("dog", "cat", "wild/fox") for i in range(9)
    }
    files |= {"notes.txt": b"not an image", "cat/.hidden": b"h"}
    sources = listed(write_files(tmp_path / "pictures", files))
    rows = rows_of(sources.table)
    root = str(tmp_path / "pictures")
    assert sorted(row.url for row in rows) == sorted(f"{root}/{name}" for name in files)
    assert sources.class_names == ("cat", "dog", "wild/fox")
    for row in rows:
        folder = os.path.dirname(row.url)[len(root) + 1 :]
        assert row.label == (sources.class_names.index(folder) if folder else None)
        assert row.bytes == os.path.getsize(row.url) and row.version == str(os.stat(row.url).st_mtime_ns)
        assert (row.offset, row.row, row.image_hash, row.member, row.name) == (-1, -1, None, None, row.url)
    assert read(sources) == [Path(row.url).read_bytes() for row in rows]


def test_label_rules(tmp_path):
    root = write_files(tmp_path, {"a/x/1.jpg": b"1", "a/y/2.jpg": b"2", "b/3.jpg": b"3", "4.jpg": b"4"})
    assert listed(root).class_names == ("a/x", "a/y", "b")
    assert listed(root, labels="top_folder").class_names == ("a", "b")
    none = listed(root, labels="none")
    assert none.class_names is None and none.table.column("label").null_count == 4
    flat = listed(write_files(tmp_path / "flat", {"1.jpg": b"1", "2.jpg": b"2"}))
    assert flat.class_names is None and flat.table.column("label").null_count == 2


def test_the_order_of_a_folder_is_a_seeded_permutation_that_mixes_classes(tmp_path):
    root = write_files(tmp_path, {f"{kind}/{i:03d}.jpg": b"x" for kind in "abcd" for i in range(50)})
    paths = listed(root).table.column("path").to_pylist()
    assert paths == listed(root).table.column("path").to_pylist()
    other = listed(root, seed=1).table.column("path").to_pylist()
    assert paths != other and sorted(paths) == sorted(other) and paths != sorted(paths)
    labels = listed(root).table.column("label").to_numpy()
    assert len(set(labels[:20].tolist())) == 4


def test_names_that_are_not_text_survive(tmp_path):
    odd = os.fsencode(tmp_path) + b"/caf\xe9 \n#1.jpg"
    try:
        with open(odd, "wb") as file:
            file.write(b"odd")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    sources = listed(tmp_path)
    [row] = rows_of(sources.table)
    assert row.path == odd and "\\xe9" in row.name
    frozen = freeze(str(tmp_path / "frozen.parquet"), sources)
    assert read(frozen) == [b"odd"]


def test_what_cannot_be_read_has_a_reason(tmp_path):
    root = write_files(
        tmp_path / "p", {f"{name}.jpg": b"12345678" for name in ("gone", "grown", "cut", "large")}
    )
    write_files(root, {"empty.jpg": b"", "whole.jpg": b"whole"})
    (root / "large.jpg").write_bytes(b"x" * 2000)
    (root / "dangling.jpg").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.jpg")
    sources = listed(root)
    (root / "gone.jpg").unlink()
    (root / "grown.jpg").write_bytes(b"123456789")
    (root / "cut.jpg").write_bytes(b"1")
    names = [os.path.basename(row.url).removesuffix(".jpg") for row in rows_of(sources.table)]
    assert dict(zip(names, read(sources, limit=1000), strict=True)) == {
        "gone": "unreadable",
        "grown": "changed",
        "cut": "changed",
        "large": "too_large",
        "empty": "empty",
        "dangling": "unreadable",
        "pipe": "unreadable",
        "whole": b"whole",
    }


def test_other_content_of_the_same_size_is_noticed_where_the_hash_is_known(tmp_path):
    root = write_files(tmp_path, {"a.jpg": b"before"})
    sources = with_hashes(listed(root), [hashlib.sha256(b"before").digest()])
    assert read(sources) == [b"before"]
    (root / "a.jpg").write_bytes(b"after!")
    assert read(sources) == ["changed"]


# ------------------------------------------------------------------------------------------ tars


def test_tars_are_indexed_in_place_and_in_order(tmp_path):
    members = [
        [
            (f"{tar}-{i}.{ext}", f"{tar}/{i}/{ext}".encode() * 50)
            for i in range(5)
            for ext in ("jpg", "txt", "cls")
        ]
        for tar in range(3)
    ]
    for tar in range(3):
        for i in range(5):
            members[tar][3 * i + 2] = (f"{tar}-{i}.cls", str((tar * 5 + i) % 4).encode())
        write_tar(tmp_path / f"x-{tar:03d}.tar", members[tar])
    sources = listed(tmp_path)
    rows = rows_of(sources.table)
    assert [row.name for row in rows] == [
        f"{tmp_path}/x-{tar:03d}.tar#{tar}-{i}.jpg" for tar in range(3) for i in range(5)
    ]
    assert [row.label for row in rows] == [i % 4 for i in range(15)] and sources.class_names is None
    assert read(sources) == [f"{tar}/{i}/jpg".encode() * 50 for tar in range(3) for i in range(5)]
    for row in rows:
        with open(row.url, "rb") as file:
            file.seek(row.offset)
            assert file.read(row.bytes) == read(sources, [row])[0]
    for url in (tmp_path / "x-{000..002}.tar", tmp_path / "x-*.tar", tmp_path / "x-00{0,1,2}.tar"):
        assert listed(url).table.equals(sources.table)
    assert listed(tmp_path / "x-001.tar").table.equals(sources.table.slice(5, 5))
    assert listed(tmp_path / "x-{001..002}.tar").table.equals(sources.table.slice(5, 10))


def test_labels_in_tars(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar",
        [
            ("a/1.cls", b" 7\n"),
            ("a/1.jpg", b"x"),
            ("a/2.png", b"x"),
            ("a/2.json", json.dumps({"label": 3, "caption": "hi"}).encode()),
            ("a/3.jpg", b"x"),
            ("a/3.json", b"[1, 2"),
            ("a/4.JPEG", b"x"),
            ("a/4.cls", b"-1"),
            ("a/5.jpg", b"x"),
            ("a/5.json", b'{"label": 1}'),
            ("a/5.cls", b"2"),
        ],
    )
    assert [row.label for row in rows_of(listed(tar).table)] == [7, 3, None, None, 2]
    assert [row.label for row in rows_of(listed(tar, labels="none").table)] == [None] * 5
    named = write_tar(
        tmp_path / "b.tar",
        [("1.jpg", b"x"), ("1.cls", b"dog"), ("2.jpg", b"x"), ("2.cls", "kätzchen".encode())],
    )
    sources = listed(named)
    assert sources.class_names == ("dog", "kätzchen")
    assert [row.label for row in rows_of(sources.table)] == [0, 1]


def test_neighbours_in_a_tar_are_read_together_and_strangers_apart(tmp_path, monkeypatch):
    members = [(f"{i}.jpg", bytes([i]) * 3000) for i in range(6)]
    members.insert(3, ("film.bin", bytes(3 << 20)))
    tar = write_tar(tmp_path / "a.tar", members)
    rows = rows_of(listed(tar).table)
    reads: list[int] = []
    read_whole = storage.read

    def counted(url: str, start: int = 0, length: int | None = None) -> bytes:
        reads.append(length or -1)
        return read_whole(url, start, length)

    monkeypatch.setattr(storage, "read", counted)
    images = [row for row in rows if row.reject_reason is None]
    assert list(read_members(images)) == [bytes([i]) * 3000 for i in range(6)]
    assert len(reads) == 2 and sum(reads) < 30_000
    backwards = images[::-1]
    assert list(read_members(backwards)) == [bytes([i]) * 3000 for i in reversed(range(6))]


def test_a_tar_that_changed_is_refused(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    sources = listed(tar)
    os.utime(tar, ns=(1, 1))
    with pytest.raises(InputError, match=r"a\.tar has changed"):
        read(sources)


def test_a_label_sorted_order_is_warned_about(tmp_path, capsys):
    labels = [i // 50 for i in range(200)]
    shuffled = np.random.default_rng(0).permutation(labels).tolist()
    for name, order in (("sorted", labels), ("shuffled", shuffled)):
        members = [
            member
            for i, label in enumerate(order)
            for member in ((f"{i}.jpg", b"x"), (f"{i}.cls", str(label).encode()))
        ]
        listed(write_tar(tmp_path / f"{name}.tar", members))
        assert ("sorted by label" in capsys.readouterr().out) == (name == "sorted")


# ------------------------------------------------------------------------------------------ Parquet


@pytest.mark.parametrize("layout", ["bytes", "large_bytes", "struct"])
@pytest.mark.parametrize("batch_bytes", [8 << 20, 200])
def test_parquet(tmp_path, layout, batch_bytes, monkeypatch):
    monkeypatch.setattr(source_parquet, "_BATCH_BYTES", batch_bytes)
    images: list[bytes | None] = [f"image {i}".encode() * (i % 7 + 1) for i in range(60)]
    images[11] = None
    labels = [i % 5 for i in range(60)]
    match layout:
        case "bytes":
            column = pa.array(images, pa.binary())
        case "large_bytes":
            column = pa.array(images, pa.large_binary())
        case _:
            column = pa.array([None if i is None else {"bytes": i, "path": "p"} for i in images])
    table = pa.table({"image": column, "label": pa.array(labels), "other": pa.array(["o"] * 60)})
    (tmp_path / "p").mkdir()
    pq.write_table(table.slice(0, 40), tmp_path / "p" / "0.parquet", row_group_size=16)
    pq.write_table(table.slice(40), tmp_path / "p" / "1.parquet")
    sources = listed(tmp_path / "p")
    rows = rows_of(sources.table)
    assert [row.label for row in rows] == [*labels[:11], None, *labels[12:]]
    assert [row.row for row in rows] == [*range(40), *range(20)]
    assert [row.bytes for row in rows] == [len(image or b"") for image in images]
    assert rows[5].image_hash == hashlib.sha256(images[5] or b"").digest()
    assert read(sources) == ["empty" if image is None else image for image in images]
    assert rows[41].name.endswith("1.parquet#row=1")
    some = [rows[i] for i in (3, 15, 16, 39, 40, 59)]
    assert read(sources, some) == [images[i] for i in (3, 15, 16, 39, 40, 59)]


def test_parquet_class_names(tmp_path):
    table = pa.table({"img": pa.array([b"1", b"2", b"3"]), "label": pa.array([1, 0, 9])})
    features = {"info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}}
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet"
    )
    sources = listed(tmp_path / "a.parquet", image_column="img")
    assert sources.class_names == ("zebra", "ant")
    assert sources.table.column("label").to_pylist() == [1, 0, None]
    pq.write_table(pa.table({"image": [b"1", b"2"], "kind": ["b", "a"]}), tmp_path / "b.parquet")
    sources = listed(tmp_path / "b.parquet", label_column="kind")
    assert sources.class_names == ("a", "b") and sources.table.column("label").to_pylist() == [1, 0]
    assert listed(tmp_path / "b.parquet").table.column("label").null_count == 2


def test_damaged_parquet_is_accounted_for(tmp_path):
    pq.write_table(
        pa.table({"image": [bytes([i]) * 5000 for i in range(8)]}), tmp_path / "a.parquet", row_group_size=4
    )
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    assert read(listed(tmp_path / "cut.parquet")) == ["damaged_parquet"]


# ------------------------------------------------------------------------------------------ bad input


def test_bad_sources_are_named(tmp_path):
    write_files(tmp_path, {"one.jpg": b"x", "mixed/a.tar": b"x", "mixed/b.bin": b"x", "a.tar.gz": b"x"})
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "none.tar", [])
    pq.write_table(pa.table({"image": [1], "label": [1.5]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"image": [b"x"], "label": [1.5]}), tmp_path / "floats.parquet")
    for url, message in [
        ("missing", "no files at"),
        ("empty", "no files at"),
        ("one.jpg", "name the folder"),
        ("a.tar.gz", "unpack"),
        ("mixed", "pattern"),
        ("x-{0..3}.tar", "x-0.tar.*does not exist"),
        ("x-*.tar", "matches no file"),
        ("*.jpg", "must match .tar or .parquet"),
        ("none.tar", "holds no images"),
        ("numbers.parquet", "image_column"),
        ("floats.parquet", "label_column"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            listed(tmp_path / url)
        assert "\n" not in str(raised.value)
    for settings in ({"image_column": "x"}, {"label_column": "x"}):
        with pytest.raises(InputError, match="no column x"):
            listed(tmp_path / "floats.parquet", **settings)


# ------------------------------------------------------------------------------------------ the frozen table


def test_frozen_listings_are_created_once_and_read_by_range(tmp_path):
    count = 20_000
    rows = pa.table(
        {
            "path": pa.array([b"/p/%d" % i for i in range(count)], pa.binary()),
            "member": pa.nulls(count, pa.binary()),
            "offset": pa.array(np.full(count, -1)),
            "row": pa.array(np.full(count, -1)),
            "bytes": pa.array(np.arange(count)),
            "version": pa.array(["v"] * count),
            "label": pa.array(np.arange(count) % 7, pa.int32()),
            "image_hash": pa.nulls(count, pa.binary(32)),
            "reject_reason": pa.nulls(count, pa.string()),
            "reject_message": pa.nulls(count, pa.string()),
        }
    )
    url = str(tmp_path / "sources.parquet")
    assert load_sources(url) is None
    first = freeze(url, Sources(kind="folder", origin={"url": "/p"}, class_names=("a", "b"), table=rows))
    assert first.fingerprint and (first.kind, first.class_names) == ("folder", ("a", "b"))
    again = freeze(
        url, Sources(kind="folder", origin={"url": "/q"}, class_names=None, table=rows.slice(0, 9))
    )
    assert again.table.equals(first.table) and again.origin == {"url": "/p"}
    assert again.fingerprint == first.fingerprint
    for start, end in [(0, 1), (8191, 8193), (5, 19_999), (19_999, 20_000), (16_384, 20_000)]:
        assert [row.bytes for row in load_rows(url, start, end)] == list(range(start, end))
    (tmp_path / "sources.parquet").write_bytes(b"something else")
    with pytest.raises(InputError, match="not a listing"):
        load_sources(url)


def test_the_split_depends_on_content_and_seed_alone(tmp_path):
    files = {f"{i}.jpg": b"content %d" % (i % 700) for i in range(1000)}
    sources = listed(write_files(tmp_path, files))
    hashes: list[bytes | None] = [
        hashlib.sha256(Path(row.url).read_bytes()).digest() for row in rows_of(sources.table)
    ]
    hashes[3] = None
    sources = with_hashes(sources, hashes)
    train, val = split_by_content(sources, 0.2, seed=0)
    sides = {
        part: {row.image_hash for row in rows_of(table.table)} for part, table in (("t", train), ("v", val))
    }
    assert not sides["t"] & sides["v"] and len(train) + len(val) == 1000
    assert 0.14 < len(val) / 1000 < 0.26
    assert None in sides["t"]
    order = {row.path: i for i, row in enumerate(rows_of(sources.table))}
    for part in (train, val):
        places = [order[row.path] for row in rows_of(part.table)]
        assert places == sorted(places)
    # An image keeps its side when half of the others are gone; another seed draws other sides.
    half = Sources(kind="folder", origin={}, class_names=None, table=sources.table.slice(0, 500))
    assert {row.image_hash for row in rows_of(split_by_content(half, 0.2, seed=0)[1].table)} <= sides["v"]
    assert {row.image_hash for row in rows_of(split_by_content(sources, 0.2, seed=1)[1].table)} != sides["v"]
    few = Sources(kind="folder", origin={}, class_names=None, table=sources.table.slice(0, 1))
    with pytest.raises(InputError, match="leaves"):
        split_by_content(few, 0.2, seed=0)
