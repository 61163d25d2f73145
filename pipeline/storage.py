"""The only door to files: local paths and every fsspec URL behind a dozen verbs.

Objects are published whole or not at all. fsspec's buffered files commit what was written when the body
raises, so nothing here streams into place: bytes are built in memory, then put once. Requests to remote
stores go through `remote.with_retries`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import re
import secrets
import stat as stat_module
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from pipeline.errors import InputError
from pipeline.remote import S3, http_status, with_retries

T = TypeVar("T")

_TEMPORARY = re.compile(r"\..*\.\d+\.[0-9a-f]{8}\.partial", re.DOTALL)
"""Names of temporary files; a listing leaves them out, because they are nobody's finished object."""

_CONDITIONAL = (*S3, "gs", "gcs", "az", "abfs", "abfss")
"""Stores whose clients hand "only if absent" to the store; others look first and then write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStat:
    """One stored object. `version` is its ETag or modification time in ns: equal version, equal bytes.

    `modified` is when it was written by the store's clock, in seconds since 1970; None where it does not say.
    """

    url: str
    bytes: int
    version: str
    modified: float | None = dataclasses.field(default=None, compare=False)


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


def join(root: str, *parts: str) -> str:
    """`root/part/part`, for paths and URLs alike."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def name(url: str) -> str:
    """The last component of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


# ------------------------------------------------------------------------------------------------ reading


def read(
    url: str,
    start: int = 0,
    length: int | None = None,
    *,
    retry_s: float | None = None,
    on_retry: Callable[[], None] | None = None,
) -> bytes:
    """The bytes [start, start + length) of an object, or all of it. FileNotFoundError names the URL.

    `retry_s` instead of the usual limit is for places somebody may have mistyped; `on_retry` is called
    before a request is repeated.
    """
    if is_local(url):
        with open(absolute(url), "rb", opener=_open_without_waiting) as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)
    if length == 0:
        return b""  # a range request cannot ask for nothing
    limits = {} if start == 0 and length is None else {"start": start, "end": length and start + length}
    try:
        data = with_retries(
            url,
            lambda fs, path, timeout: fs.cat_file(path, **limits, **timeout),
            retry_s=retry_s,
            on_retry=on_retry,
        )
        return cast(bytes, data)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such object: {url}") from None


def read_or_none(url: str) -> bytes | None:
    """All bytes of an object; None where there is none."""
    try:
        return read(url)
    except (FileNotFoundError, NotADirectoryError):
        return None


def stat(url: str) -> FileStat | None:
    """Size and version of an object, always asked anew; None when there is none."""
    if is_local(url):
        try:
            info = os.stat(absolute(url))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _local_stat(url, info) if stat_module.S_ISREG(info.st_mode) else None
    try:
        info = with_retries(url, lambda fs, path, timeout: fs.info(path, **timeout))
    except FileNotFoundError:
        return None
    return _file_stat(url, info) if info.get("type") == "file" else None


def exists(url: str) -> bool:
    """True when an object (not a folder) is there."""
    return stat(url) is not None


def list_files(url: str) -> Iterator[FileStat]:
    """Every file below a folder, sorted by URL; nothing when the folder is absent.

    Local folders: symbolic links are followed, each real folder is entered once, so a loop ends; what cannot
    be examined (a dangling link, no permission, a path too long) or is no file (a named pipe, a device) is
    listed with 0 bytes and no version rather than lost, and names that are not UTF-8 come as
    surrogate-escaped strings.
    """
    if is_local(url):
        yield from sorted(_walk(absolute(url)), key=lambda file: os.fsencode(file.url))
        return
    try:
        objects: dict[str, dict[str, Any]] = with_retries(
            url, lambda fs, path, timeout: fs.find(path, detail=True, **timeout)
        )
    except FileNotFoundError:
        return
    scheme = url.split("://", 1)[0]
    for key in sorted(key for key, info in objects.items() if info.get("type") != "directory"):
        yield _file_stat(f"{scheme}://{key.lstrip('/')}", objects[key])


def list_folders(url: str) -> list[str]:
    """Names of the folders directly below `url`, sorted; none where there is no such place."""
    if is_local(url):
        try:
            with os.scandir(absolute(url)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
    try:
        entries = with_retries(url, lambda fs, path, timeout: fs.ls(path, detail=True, **timeout))
    except FileNotFoundError:
        return []
    return sorted(name(entry["name"]) for entry in entries if entry["type"] == "directory")


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
    file_stat = stat(url)
    if file_stat is None:
        raise FileNotFoundError(f"no such object: {url}")
    with io.BufferedReader(_RemoteFile(file_stat), buffer_size=8 << 20) as file:
        yield cast(BinaryIO, file)


# ------------------------------------------------------------------------------------------------ writing


def put(url: str, data: bytes) -> None:
    """Publish `data` at `url`, replacing what was there; a reader sees the old bytes or the new."""
    if is_local(url):
        path = Path(absolute(url))
        with _local_temporary(path, data) as temporary:
            os.replace(temporary, path)
        return
    with_retries(url, lambda fs, path, timeout: fs.pipe_file(path, data, **timeout), writes=True)


def create(url: str, data: bytes) -> bool:
    """Publish `data` only if nothing is there yet, decided by the store itself; False when something is.

    Local: a hard link to a finished temporary file, which fails when the name is taken and never leaves an
    empty file behind. S3: `If-None-Match: *`, repeated on 409; on 412 what is there is asked for the mark of
    this call, for the answer to an earlier attempt may have been lost. Stores and file systems that cannot
    decide get a look before the write, which does not count, and a warning: one driver only.
    """
    if is_local(url):
        path = Path(absolute(url))
        with _local_temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                return _look_and_put(url, data)
        return True
    protocol = url.partition("://")[0]
    if protocol not in _CONDITIONAL:
        return _look_and_put(url, data)
    # A mark, not the bytes: another driver's may be the same. And always: where a connection that was kept
    # open breaks, aiohttp repeats a PUT by itself and nobody hears of it.
    mark = {"created-by": secrets.token_hex(8)}
    marked: dict[str, Any] = {"Metadata": mark} if protocol in S3 else {}

    def attempt(fs: Any, path: str, timeout: dict[str, float]) -> bool:
        try:
            fs.pipe_file(path, data, mode="create", **marked, **timeout)
        except Exception as error:
            status, _ = http_status(error)
            if status == 412 or isinstance(error, FileExistsError):
                return bool(marked) and fs.metadata(path, **timeout) == mark
            if status == 501:
                return _look_and_put(url, data)
            raise
        return True

    return with_retries(url, attempt, writes=True)


def _look_and_put(url: str, data: bytes) -> bool:
    warn_one_driver(url)
    if exists(url):
        return False
    put(url, data)
    return True


def warn_one_driver(url: str) -> None:
    """Say aloud, once for each store, that nothing protects against a second driver there."""
    if is_local(url):
        place = os.path.dirname(absolute(url))
        while not os.path.ismount(place):
            place = os.path.dirname(place)
        store = f"the file system at {place}"
    else:
        store = f"the store of {'/'.join(url.split('/')[:3])}"
    warnings.warn(f"{store} cannot refuse an overwrite: one driver only may write there", stacklevel=3)


def remove(url: str) -> None:
    """Delete one object; deleting what is not there is no error."""
    if is_local(url):
        Path(absolute(url)).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        with_retries(url, lambda fs, path, timeout: fs.rm_file(path, **timeout))


def temporary_files(url: str) -> Iterator[FileStat]:
    """Temporary files below a local folder, left by writers that were killed, or still being written.

    Remote stores have none; a bucket's lifecycle rule drops multipart uploads that were never completed.
    """
    if not is_local(url):
        return
    for folder, _, names in os.walk(absolute(url)):
        for path in (os.path.join(folder, name) for name in sorted(names) if _TEMPORARY.fullmatch(name)):
            with contextlib.suppress(FileNotFoundError):
                yield _local_stat(path, os.stat(path, follow_symlinks=False))


# ------------------------------------------------------------------------------------------------ inside


class _RemoteFile(io.RawIOBase):
    """A remote object as a file: every read is a range request of its own, repeated like any other."""

    def __init__(self, file: FileStat) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.bytes}[whence]
        if begin + offset < 0:
            raise OSError(errno.EINVAL, f"seek before the beginning of {self._file.url}")
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self._file.bytes)  # in one request: the base class asks for 8 KiB at a time

    def _next(self, num_bytes: int) -> bytes:
        length = min(num_bytes, self._file.bytes - self._position)
        data = read(self._file.url, self._position, length) if length > 0 else b""
        self._position += len(data)
        return data


def _local_stat(url: str, info: os.stat_result) -> FileStat:
    return FileStat(url=url, bytes=info.st_size, version=str(info.st_mtime_ns), modified=info.st_mtime)


def _file_stat(url: str, info: dict[str, Any]) -> FileStat:
    version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or ""
    return FileStat(
        url=url, bytes=int(info["size"] or 0), version=str(version).strip('"'), modified=_modified(info)
    )


def _modified(info: dict[str, Any]) -> float | None:
    for key in ("LastModified", "last_modified", "updated", "mtime", "created"):
        value = info.get(key)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


def _open_without_waiting(path: str, flags: int) -> int:
    """Where a named pipe has taken a file's place: nothing is read, instead of waiting for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _walk(root: str) -> Iterator[FileStat]:
    entered: set[tuple[int, int]] = set()
    folders, linked = [root], []
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        try:
            info = os.stat(folder)
            if (info.st_dev, info.st_ino) in entered:
                continue
            entered.add((info.st_dev, info.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            yield FileStat(url=folder, bytes=0, version="")
            continue
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                continue
            try:
                if entry.is_dir():
                    # links last, so that a folder keeps its own name where a link leads to it as well
                    (linked if entry.is_symlink() else folders).append(entry.path)
                    continue
                if not entry.is_file():
                    yield FileStat(url=entry.path, bytes=0, version="")
                    continue
                yield _local_stat(entry.path, entry.stat())
            except OSError:
                yield FileStat(url=entry.path, bytes=0, version="")


@contextlib.contextmanager
def _local_temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A finished, synced temporary file beside `path`; afterwards it is gone and the folder is synced."""
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each recorded in the one above before anything is put into it."""
    missing: list[Path] = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
