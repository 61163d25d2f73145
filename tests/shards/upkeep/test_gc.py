"""Garbage: nothing that anything names, nothing young, nothing of a user's, nothing while work goes on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.gc_shards import GcConfig, main, seconds
from pipeline import storage
from pipeline.artifacts import canonical_json
from pipeline.errors import InputError
from shards.upkeep.gc import DAY_S, delete, find_garbage
from shards.upkeep.verify import verify_dataset
from shards.writer.commit import Receipt

Written = Any  # of conftest


def tree(root: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def litter(root: str, path: str, *, days: float = 2, data: bytes = b"left over") -> str:
    file = Path(root) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    os.utime(file, (time.time() - days * DAY_S,) * 2)
    return str(file)


LEFT_OVER = (
    "shards/v00-00001-deadbeef.tar",
    "index/v01-00002-deadbeef.parquet",
    "rejects/v00-00000-deadbeef.parquet",
    "shards/v07-00000-deadbeef.tar",
    "manifest-deadbeef.parquet",
    "more/v02/index/v02-00001-deadbeef.parquet",
    "codes/1a2b3c4d/v00/index/v00-00001-deadbeef.parquet",
)
TEMPORARY = "shards/.v00-00001-deadbeef.tar.123.0123abcd.partial"


def test_a_finished_dataset_has_no_garbage(written_once: Written) -> None:
    for root in (written_once.images, written_once.tokens):
        garbage = find_garbage(root, older_than_s=0)
        assert (garbage.objects, garbage.writes, garbage.young, garbage.others) == ((), (), 0, ())


def test_leftovers_go_and_everything_else_stays(written: Written) -> None:
    root = written.tokens
    for path in Path(root).rglob("*"):
        os.utime(path, (1, 1))  # what is named stays, however old
    before = tree(root)
    mine = litter(root, "shards/notes.txt"), litter(root, "README"), litter(root, "codes/notalayer/x.tar")
    young = litter(root, "index/v00-00000-01234567.parquet", days=0.9), litter(root, f"{TEMPORARY}", days=0.5)
    garbage_urls = {litter(root, path) for path in LEFT_OVER}
    stale = litter(root, f"index/{Path(TEMPORARY).name}")

    garbage = find_garbage(root)
    assert {found.url for found in garbage.objects} == garbage_urls
    assert [write.url for write in garbage.writes] == [stale]
    assert garbage.bytes == len(b"left over") * (len(LEFT_OVER) + 1)
    assert garbage.young == 2 and {found.url for found in garbage.others} == set(mine)
    assert all(Path(path).exists() for path in (*garbage_urls, stale))

    delete(garbage)
    kept = {path: b"left over" for path in (*mine, *young)}
    assert tree(root) == before | kept
    assert verify_dataset(root, sample=0).sound


def test_what_any_receipt_names_stays(written: Written) -> None:
    """Of another plan, whose driver may still be at it; a receipt that cannot be read may name anything."""
    root = written.tokens
    receipt = next((Path(root) / "receipts").rglob("v00-00001.json"))
    record = json.loads(receipt.read_bytes())
    record["shard"]["tar"] = LEFT_OVER[0]
    other = Receipt.from_bytes(canonical_json(record)).to_bytes()
    litter(root, "receipts/00c0ffee/v00-00001.json", data=other)
    litter(root, "receipts/00c0ffee/v01-00002.json", data=b"{")
    kept = litter(root, LEFT_OVER[0]), litter(root, LEFT_OVER[1])
    gone = litter(root, "index/v00-00001-deadbeef.parquet")
    assert [found.url for found in find_garbage(root).objects] == [gone]
    assert all(Path(path).exists() for path in kept)


def test_unfinished_datasets_are_refused(written: Written) -> None:
    part = Path(written.parts()[1])
    (part / "manifest.json").unlink()
    with pytest.raises(InputError, match=rf"{part} is unfinished"):
        find_garbage(written.tokens)
    (Path(written.tokens) / "manifest.json").unlink()
    with pytest.raises(InputError, match=rf"{written.tokens} is unfinished"):
        find_garbage(written.tokens)
    with pytest.raises(InputError, match="there is no dataset"):
        find_garbage(str(part / "nowhere"))


def test_the_job_deletes_only_when_told(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    left = litter(written.images, LEFT_OVER[0])
    main(GcConfig(dataset=written.images))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{left}  9 bytes", "to delete with --delete: 1 objects, 9 bytes"]
    main(GcConfig(dataset=written.images, older_than="1w", delete=True))
    assert Path(left).exists() and "nothing to delete" in capsys.readouterr().out
    main(GcConfig(dataset=written.images, delete=True, json=True))
    said = json.loads(capsys.readouterr().out)
    assert said["objects"] == [{"url": left, "bytes": 9}] and said["deleted"] and not Path(left).exists()
    for age in ("1", "day", "-1d"):
        with pytest.raises(InputError, match="older_than"):
            seconds(age)
    assert (seconds("36h"), seconds("0.5d")) == (129_600, 43_200)


def test_on_s3_left_over_objects_are_deleted(written_once: Written, s3_url: str) -> None:
    root = f"{s3_url}/deep/images"
    for path, data in tree(written_once.images).items():
        storage.put(root + path.removeprefix(written_once.images), data)
    assert verify_dataset(root).sound
    left = f"{root}/{LEFT_OVER[0]}"
    storage.put(left, b"left over")
    assert find_garbage(root).young == 1  # seconds old
    garbage = find_garbage(root, older_than_s=-60)
    assert [file.url for file in garbage.objects] == [left]
    delete(garbage)
    delete(garbage)  # what is gone already is no error
    assert not storage.exists(left)

    storage.put(open_tar(root), b"damaged")
    assert [problem.object for problem in verify_dataset(root, sample=0).problems] == [open_tar(root)]


def open_tar(root: str) -> str:
    return next(found.url for found in storage.list_files(root) if found.url.endswith(".tar"))
