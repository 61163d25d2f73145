"""The only door to files: local paths and every fsspec URL behind a dozen verbs.

Objects are published whole or not at all. fsspec's buffered files commit what was written when the body
raises, so nothing here streams into place: bytes are built in memory, then put once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.spec import AbstractFileSystem

from pipeline.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")

_TEMPORARY = re.compile(r"\..*\.\d+\.[0-9a-f]{8}\.partial", re.DOTALL)
"""Names of temporary files; a listing leaves them out, because they are nobody's finished object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStat:
    """One stored object. `version` is its ETag or modification time in ns: equal version, equal bytes."""

    url: str
    bytes: int
    version: str


# ------------------------------------------------------------------------------------------------ names


def is_local(url: str) -> bool:
    """True for a plain path and for `file://`."""
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """The same place under a name that is valid in any process: Ray workers run in other folders."""
    if not url:
        raise InputError("an empty path was given; name a folder or a URL such as s3://bucket/name")
    if is_local(url):
        return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
    return url.rstrip("/")


def absolute_places(config: ConfigT, *fields: str) -> ConfigT:
    """A configuration whose named fields (those that are set) hold absolute URLs.

    Ray Train runs its workers in a folder of its own, where a relative path means something else.
    """
    given = {field: getattr(config, field) for field in fields}
    return dataclasses.replace(config, **{k: absolute(v) for k, v in given.items() if v is not None})


def join(root: str, *parts: str) -> str:
    """`root/part/part`, for paths and URLs alike."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def name(url: str) -> str:
    """The last component of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


# ------------------------------------------------------------------------------------------------ reading


def read(url: str, start: int = 0, length: int | None = None) -> bytes:
    """The bytes [start, start + length) of an object, or all of it. FileNotFoundError names the URL."""
    if is_local(url):
        with open(absolute(url), "rb") as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)
    fs, path = _remote(url)
    try:
        if start == 0 and length is None:
            return cast(bytes, fs.cat_file(path))
        return cast(bytes, fs.cat_file(path, start=start, end=None if length is None else start + length))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such object: {url}") from None


def stat(url: str) -> FileStat | None:
    """Size and version of an object, always asked anew; None when there is none."""
    if is_local(url):
        try:
            found = os.stat(absolute(url))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not os.path.isfile(absolute(url)):
            return None
        return FileStat(url=url, bytes=found.st_size, version=str(found.st_mtime_ns))
    fs, path = _remote(url)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return None
    return _file_stat(url, info) if info.get("type") == "file" else None


def exists(url: str) -> bool:
    """True when an object (not a folder) is there."""
    return stat(url) is not None


def list_files(url: str) -> Iterator[FileStat]:
    """Every file below a folder, sorted by URL; nothing when the folder is absent.

    Local folders: symbolic links are followed, each real folder is entered once, so a loop ends; a file or
    folder that cannot be examined (a dangling link, no permission) is listed with 0 bytes rather than lost,
    and names that are not UTF-8 come as surrogate-escaped strings.
    """
    if is_local(url):
        yield from sorted(_walk(absolute(url)), key=lambda found: os.fsencode(found.url))
        return
    fs, path = _remote(url)
    try:
        found = cast(dict[str, dict[str, Any]], fs.find(path, detail=True))
    except FileNotFoundError:
        return
    scheme = url.split("://", 1)[0]
    for key in sorted(found):
        yield _file_stat(f"{scheme}://{key.lstrip('/')}", found[key])


def is_empty(url: str) -> bool:
    """True when no file lies below `url`."""
    return next(iter(list_files(url)), None) is None


@contextlib.contextmanager
def open_file(url: str) -> Iterator[BinaryIO]:
    """A seekable binary file, read in large blocks: for walking a tar or opening Parquet in place."""
    if is_local(url):
        with open(absolute(url), "rb") as file:
            yield file
        return
    fs, path = _remote(url)
    with fs.open(path, "rb", block_size=8 << 20) as file:
        yield cast(BinaryIO, file)


# ------------------------------------------------------------------------------------------------ writing


def put(url: str, data: bytes) -> None:
    """Publish `data` at `url`, replacing what was there; a reader sees the old bytes or the new."""
    if is_local(url):
        path = Path(absolute(url))
        with _local_temporary(path, data) as temporary:
            os.replace(temporary, path)
        return
    fs, path = _remote(url)
    fs.pipe_file(path, data)


def create(url: str, data: bytes) -> bool:
    """Publish `data` only if nothing is there yet, decided by the store itself; False when something is.

    Local: a hard link to a finished temporary file, which fails when the name is taken and never leaves an
    empty file behind. S3: `If-None-Match: *`. fsspec's generic check-then-write does not count.
    """
    if is_local(url):
        path = Path(absolute(url))
        with _local_temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True
    fs, path = _remote(url)
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def remove(url: str) -> None:
    """Delete one object; deleting what is not there is no error."""
    if is_local(url):
        Path(absolute(url)).unlink(missing_ok=True)
        return
    fs, path = _remote(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


# ------------------------------------------------------------------------------------------------ inside

_clients: dict[tuple[int, str], AbstractFileSystem] = {}
_clients_lock = threading.Lock()


def _remote(url: str) -> tuple[AbstractFileSystem, str]:
    """The client of this process (it must not cross a fork) and the path inside the store."""
    protocol, _, path = url.partition("://")
    with _clients_lock:
        key = (os.getpid(), protocol)
        if key not in _clients:
            _clients[key] = _new_client(protocol, url)
        return _clients[key], path


def _new_client(protocol: str, url: str) -> AbstractFileSystem:
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol == "s3":
        options["config_kwargs"] = {
            "retries": {"max_attempts": 10, "mode": "adaptive"},
            "connect_timeout": 10,
            "read_timeout": 60,
        }
    try:
        return fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot open {url}: {error}; install the extra for this store (gcs, azure) or fix the URL"
        ) from None


def _file_stat(url: str, info: dict[str, Any]) -> FileStat:
    version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or ""
    return FileStat(url=url, bytes=int(info["size"] or 0), version=str(version).strip('"'))


def _walk(root: str) -> Iterator[FileStat]:
    entered: set[tuple[int, int]] = set()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            found = os.stat(folder)
            if (found.st_dev, found.st_ino) in entered:
                continue
            entered.add((found.st_dev, found.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            yield FileStat(url=folder, bytes=0, version="")
            continue
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                continue
            try:
                if entry.is_dir():
                    folders.append(entry.path)
                    continue
                info = entry.stat()
                yield FileStat(url=entry.path, bytes=info.st_size, version=str(info.st_mtime_ns))
            except OSError:
                yield FileStat(url=entry.path, bytes=0, version="")


@contextlib.contextmanager
def _local_temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A finished, synced temporary file beside `path`; afterwards it is gone and the folder is synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
