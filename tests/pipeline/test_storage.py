from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import InputError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh folder, on disk and in a bucket of a local S3 server."""
    if request.param == "local":
        return str(tmp_path / "root")
    return request.getfixturevalue("s3_url") + "/root"


def test_put_read_stat_remove(root: str) -> None:
    url = storage.join(root, "a", "b.bin")
    assert storage.stat(url) is None and not storage.exists(url)
    storage.put(url, b"0123456789")
    assert storage.read(url) == b"0123456789"
    assert storage.read(url, 3) == b"3456789" and storage.read(url, 3, 4) == b"3456"
    found = storage.stat(url)
    assert found is not None and found.bytes == 10 and found.version
    storage.put(url, b"other")
    again = storage.stat(url)
    assert again is not None and again.version != found.version
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)


def test_reading_what_is_not_there_names_it(root: str) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        storage.read(storage.join(root, "missing"))


def test_create_refuses_to_overwrite(root: str) -> None:
    url = storage.join(root, "once")
    assert storage.create(url, b"first")
    assert not storage.create(url, b"second")
    assert storage.read(url) == b"first"


def test_only_one_of_many_creators_wins(root: str) -> None:
    url = storage.join(root, "race")
    won: list[int] = []

    def attempt(number: int) -> None:
        if storage.create(url, str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=attempt, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and storage.read(url) == str(won[0]).encode()


def test_list_is_complete_and_sorted(root: str) -> None:
    assert list(storage.list_files(root)) == [] and storage.is_empty(root)
    for name in ("b/2", "a/10", "a/9", "c"):
        storage.put(storage.join(root, name), name.encode())
    found = list(storage.list_files(root))
    assert [entry.url for entry in found] == [
        storage.join(root, name) for name in ("a/10", "a/9", "b/2", "c")
    ]
    assert [entry.bytes for entry in found] == [4, 3, 3, 1]
    assert not storage.is_empty(root)


def test_open_file_seeks(root: str) -> None:
    url = storage.join(root, "file")
    storage.put(url, bytes(range(100)))
    with storage.open_file(url) as file:
        file.seek(90)
        assert file.read() == bytes(range(90, 100))


def test_local_listing_survives_loops_dangling_links_and_odd_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image.jpg").write_bytes(b"x")
    os.symlink(tmp_path, tmp_path / "folder" / "loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", os.O_CREAT | os.O_WRONLY))
    found = [
        os.fsencode(entry.url)[len(os.fsencode(tmp_path)) + 1 :]
        for entry in storage.list_files(str(tmp_path))
    ]
    assert found == [b"caf\xe9.jpg", b"dangling", b"folder/image.jpg"]


def test_a_failed_put_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk on fire"):
        storage.put(str(tmp_path / "a"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_file_is_nobodys_but_a_users_partial_is_listed(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.123.0123abcd.partial").write_bytes(b"x")
    (tmp_path / "download.partial").write_bytes(b"x")
    assert [storage.name(found.url) for found in storage.list_files(str(tmp_path))] == ["download.partial"]


def test_names() -> None:
    assert storage.join("s3://bucket/a/", "/b", "c") == "s3://bucket/a/b/c"
    assert storage.name("s3://bucket/a/b/") == "b"
    assert storage.absolute("x") == os.path.join(os.getcwd(), "x")
    assert storage.absolute("file:///x/y/") == "/x/y"
    assert storage.is_local("/x") and not storage.is_local("s3://b/x")


def test_unknown_store_is_bad_input() -> None:
    with pytest.raises(InputError, match="cannot open"):
        storage.read("nosuchstore://x/y")
