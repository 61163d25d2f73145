from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline import remote, storage
from pipeline.errors import InputError
from pipeline.remote import StoreError

if TYPE_CHECKING:
    from tests.chaos.proxy import FaultProxy


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


# ------------------------------------------------------------------------------------------ failing stores

ONCE = ("slow_down", "drop_after")
"""Faults that any request can meet; the others are met by the passes of tests/chaos."""


@pytest.mark.parametrize("fault", ONCE)
def test_every_verb_outlasts_a_fault_of_each_of_its_requests(
    fault_proxy: FaultProxy, s3_url: str, fault: str
) -> None:
    url = f"{s3_url}/folder/object"

    def break_next(*methods: str) -> None:
        assert not fault_proxy.script
        fault_proxy.script.extend((method, fault) for method in methods)

    break_next("PUT", "PUT")
    storage.put(url, b"0123456789")
    break_next("PUT")
    assert storage.create(f"{url}-2", b"two")
    break_next("HEAD", "GET")
    assert storage.read(url) == b"0123456789"
    break_next("GET")
    assert storage.read(url, 3, 4) == b"3456"
    break_next("HEAD")
    found = storage.stat(url)
    assert found is not None and found.bytes == 10
    break_next("GET")
    assert [entry.url for entry in storage.list_files(s3_url)] == [url, f"{url}-2"]
    break_next("GET")
    assert storage.list_folders(s3_url) == ["folder"]
    break_next("HEAD", "GET", "GET")
    with storage.open_file(url) as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"6789"
    break_next("DELETE")
    storage.remove(url)
    assert not storage.exists(url)
    assert fault_proxy.counts[fault] >= 9


def test_an_answer_that_ends_early_is_asked_for_again(fault_proxy: FaultProxy, s3_url: str) -> None:
    data = os.urandom(300_000)
    storage.put(f"{s3_url}/large", data)
    fault_proxy.script.extend([("GET", "cut")] * 3)
    assert storage.read(f"{s3_url}/large") == data
    before = fault_proxy.counts["GET"]
    fault_proxy.script.extend([("GET", "cut")] * 2)
    with storage.open_file(f"{s3_url}/large") as file:
        assert file.read() == data
    assert fault_proxy.counts["GET"] == before + 3  # all of it in one request, and that again twice
    fault_proxy.script.append(("GET", "cut"))
    assert len(list(storage.list_files(s3_url))) == 1
    assert fault_proxy.counts["cut"] == 6


@pytest.mark.parametrize("fault", ["drop_after", "internal"])
def test_a_create_whose_answer_was_lost_knows_its_own_object(
    fault_proxy: FaultProxy, s3_url: str, fault: str
) -> None:
    url = f"{s3_url}/once"
    fault_proxy.script.append(("PUT", fault))
    assert storage.create(url, b"mine")
    assert fault_proxy.counts["PUT"] == 2  # the second was refused
    assert not storage.create(url, b"mine")
    for data in (b"mine", b"other"):
        fault_proxy.script.append(("PUT", fault))
        assert not storage.create(url, data)
    assert storage.read(url) == b"mine"


@pytest.mark.chaos
def test_a_large_object_whose_last_answer_was_lost_is_there(fault_proxy: FaultProxy, s3_url: str) -> None:
    """From 100 MiB on it goes up in parts; putting them together is a request of its own."""
    data = os.urandom(1 << 20) * 101
    completed = [("POST", ""), ("POST", "drop_after")]
    fault_proxy.script.extend(completed)
    storage.put(f"{s3_url}/put", data)
    fault_proxy.script.extend(completed)
    assert storage.create(f"{s3_url}/once", data)
    assert not storage.create(f"{s3_url}/once", data)
    fault_proxy.script.extend([("PUT", "slow_down"), ("GET", "cut")])
    storage.put(f"{s3_url}/again", data)
    for name in ("put", "once", "again"):
        assert storage.read(f"{s3_url}/{name}") == data
    assert fault_proxy.counts["drop_after"] == 2 and fault_proxy.counts["cut"] == 1


def test_a_conflict_of_two_creators_is_tried_again(fault_proxy: FaultProxy, s3_url: str) -> None:
    fault_proxy.script.extend([("PUT", "conflict")] * 3)
    assert storage.create(f"{s3_url}/once", b"mine")
    fault_proxy.script.append(("PUT", "conflict"))
    assert not storage.create(f"{s3_url}/once", b"mine")
    assert fault_proxy.counts["conflict"] == 4


@pytest.fixture
def no_patience(fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A store that is given a fifth of a second."""
    patience = remote.RetryPolicy(
        connect_s=0.2, answer_s=0.15, request_s=1, retry_s=0.2, first_wait_s=0.02, longest_wait_s=0.1
    )
    monkeypatch.setattr(remote, "RETRIES", patience)
    yield fault_proxy


@pytest.mark.parametrize("trouble", ["slow_down", "silent", "gone"])
def test_a_store_that_never_recovers_is_named(
    no_patience: FaultProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    from tests.chaos.proxy import Faults

    url = f"{s3_url}/x"
    no_patience.faults = Faults(silent=trouble == "silent", slow_down=float(trouble == "slow_down"))
    if trouble == "gone":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    for verb in (
        lambda: storage.read(url),
        lambda: storage.put(url, b"x"),
        lambda: storage.create(url, b"x"),
        lambda: storage.exists(url),
        lambda: list(storage.list_files(s3_url)),
    ):
        with pytest.raises(StoreError, match=rf"{s3_url}\S*: the store did not recover in .* attempts, last"):
            verb()


def test_what_will_not_pass_is_said_at_once(
    s3_url: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = "s3://no-such-bucket-here/x"
    with pytest.raises(InputError, match=f"cannot write {absent}.*create the bucket"):
        storage.put(absent, b"x")
    with pytest.raises(InputError, match=f"cannot write {absent}"):
        storage.create(absent, b"x")
    with pytest.raises(FileNotFoundError, match=absent):
        storage.read(absent)
    assert list(storage.list_files(absent)) == [] and storage.stat(absent) is None
    for method, verb in (("PUT", storage.create), ("GET", lambda url, _: list(storage.list_files(url)))):
        fault_proxy.script.append((method, "forbidden"))
        with pytest.raises(PermissionError, match=f"{s3_url}/x: .*AccessDenied"):
            verb(f"{s3_url}/x", b"x")
    before = fault_proxy.counts["requests"]
    assert before < 12
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setattr(remote, "_clients", {})
    with pytest.raises(InputError, match=rf"cannot use {s3_url}/x: .*credentials"):
        storage.put(f"{s3_url}/x", b"x")
    assert fault_proxy.counts["requests"] == before


# --------------------------------------------------------------------------------- stores that cannot refuse


def test_a_file_system_without_hard_links_is_named_and_still_serves_one_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.warns(UserWarning, match="the file system at / cannot refuse an overwrite: one driver only"):
        assert storage.create(str(tmp_path / "deep" / "once"), b"first")
    with pytest.warns(UserWarning, match="one driver only"):
        assert not storage.create(str(tmp_path / "deep" / "once"), b"second")
    assert (tmp_path / "deep" / "once").read_bytes() == b"first"
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "once"]


def test_a_store_whose_client_only_looks_before_it_writes_is_named() -> None:
    with pytest.warns(UserWarning, match="the store of memory://one cannot refuse an overwrite"):
        assert storage.create("memory://one/once", b"first")
    with pytest.warns(UserWarning):
        assert not storage.create("memory://one/once", b"second")
    assert storage.read("memory://one/once") == b"first"


def test_a_remote_file_is_read_like_a_local_one(root: str) -> None:
    data = os.urandom(10_000)
    storage.put(storage.join(root, "file"), data)
    with storage.open_file(storage.join(root, "file")) as file:
        for seek, whence in (
            (9_990, os.SEEK_SET),
            (-20, os.SEEK_CUR),
            (-9_000, os.SEEK_END),
            (0, os.SEEK_SET),
        ):
            position = file.seek(seek, whence)
            assert file.tell() == position and file.read(100) == data[position : position + 100]
        file.seek(10_000)
        assert file.read() == b"" and file.read(5) == b""
    storage.put(storage.join(root, "empty"), b"")
    with storage.open_file(storage.join(root, "empty")) as file:
        assert file.read() == b""
    with pytest.raises(FileNotFoundError, match="missing"), storage.open_file(storage.join(root, "missing")):
        pass


def test_new_folders_are_synced_from_the_top_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    storage.put(str(tmp_path / "a" / "b" / "file"), b"x")
    assert synced[:2] == [str(tmp_path), str(tmp_path / "a")] and synced[-1] == str(tmp_path / "a" / "b")
    assert len(synced) == 4
