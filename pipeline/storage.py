"""The only door to files: local paths and every fsspec URL behind a dozen verbs.

Objects are published whole or not at all. fsspec's buffered files commit what was written when the body
raises, so nothing here streams into place: bytes are built in memory, then put once. Every request to a
remote store has time limits and is repeated while that may help; the clients' own retries are off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import random
import re
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar, cast

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from pipeline.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")
T = TypeVar("T")

_TEMPORARY = re.compile(r"\..*\.\d+\.[0-9a-f]{8}\.partial", re.DOTALL)
"""Names of temporary files; a listing leaves them out, because they are nobody's finished object."""

_S3 = ("s3", "s3a")
_CONDITIONAL = (*_S3, "gs", "gcs", "az", "abfs", "abfss")
"""Stores whose clients hand "only if absent" to the store; others look first and then write."""


class StoreError(Exception):
    """A remote store kept failing until patience ended; names the URL, the attempts and the last failure.

    No OSError: those are caught in places where one unreadable file is an everyday matter.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a remote store is borne with, in seconds."""

    connect_s: float = 10.0
    answer_s: float = 60.0
    """Without a byte from it."""
    request_s: float = 3600.0
    """For one request with all its bytes, however steadily they come."""
    retry_s: float = 300.0
    """From the first attempt on, failures are repeated."""
    first_wait_s: float = 0.1
    """Doubled with every repetition, and shortened by up to a half at random."""
    longest_wait_s: float = 20.0
    warn_after_s: float = 10.0


PATIENCE = Patience()


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStat:
    """One stored object. `version` is its ETag or modification time in ns: equal version, equal bytes.

    `modified` is when it was written by the store's clock, in seconds since 1970; None where it does not say.
    """

    url: str
    bytes: int
    version: str
    modified: float | None = dataclasses.field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfinishedWrite:
    """What a writer that ended left of an object: a temporary file or, on S3, parts of a multipart upload.

    `bytes` is None where the store does not say at once.
    """

    url: str
    bytes: int | None
    modified: float
    upload_id: str | None = None


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


def read(
    url: str,
    start: int = 0,
    length: int | None = None,
    *,
    retry_s: float | None = None,
    on_retry: Callable[[], None] | None = None,
) -> bytes:
    """The bytes [start, start + length) of an object, or all of it. FileNotFoundError names the URL.

    `retry_s` instead of the usual patience is for places somebody may have mistyped; `on_retry` is called
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
        data = _ask(
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
            found = os.stat(absolute(url))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not os.path.isfile(absolute(url)):
            return None
        return FileStat(url=url, bytes=found.st_size, version=str(found.st_mtime_ns), modified=found.st_mtime)
    try:
        info = _ask(url, lambda fs, path, timeout: fs.info(path, **timeout))
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
        yield from sorted(_walk(absolute(url)), key=lambda found: os.fsencode(found.url))
        return
    try:
        found: dict[str, dict[str, Any]] = _ask(
            url, lambda fs, path, timeout: fs.find(path, detail=True, **timeout)
        )
    except FileNotFoundError:
        return
    scheme = url.split("://", 1)[0]
    for key in sorted(key for key, info in found.items() if info.get("type") != "directory"):
        yield _file_stat(f"{scheme}://{key.lstrip('/')}", found[key])


def list_folders(url: str) -> list[str]:
    """Names of the folders directly below `url`, sorted; none where there is no such place."""
    if is_local(url):
        try:
            with os.scandir(absolute(url)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
    try:
        found: list[dict[str, Any]] = _ask(url, lambda fs, path, timeout: fs.ls(path, detail=True, **timeout))
    except FileNotFoundError:
        return []
    return sorted(name(entry["name"]) for entry in found if entry["type"] == "directory")


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
    found = stat(url)
    if found is None:
        raise FileNotFoundError(f"no such object: {url}")
    with io.BufferedReader(_RemoteFile(found), buffer_size=8 << 20) as file:
        yield cast(BinaryIO, file)


# ------------------------------------------------------------------------------------------------ writing


def put(url: str, data: bytes) -> None:
    """Publish `data` at `url`, replacing what was there; a reader sees the old bytes or the new."""
    if is_local(url):
        path = Path(absolute(url))
        with _local_temporary(path, data) as temporary:
            os.replace(temporary, path)
        return
    _ask(url, lambda fs, path, timeout: fs.pipe_file(path, data, **timeout), writes=True)


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
    marked: dict[str, Any] = {"Metadata": mark} if protocol in _S3 else {}

    def attempt(fs: Any, path: str, timeout: dict[str, float]) -> bool:
        try:
            fs.pipe_file(path, data, mode="create", **marked, **timeout)
        except Exception as error:
            status, _ = _answer(error)
            if status == 412 or isinstance(error, FileExistsError):
                return bool(marked) and fs.metadata(path, **timeout) == mark
            if status == 501:
                return _look_and_put(url, data)
            raise
        return True

    return _ask(url, attempt, writes=True)


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
        _ask(url, lambda fs, path, timeout: fs.rm_file(path, **timeout))


# ------------------------------------------------------------------------------------------------ leftovers


def unfinished_writes(url: str) -> Iterator[UnfinishedWrite]:
    """What is left below `url` of writes that never ended, or still go on: `modified` tells which.

    Local temporary files, and multipart uploads on S3; other stores drop theirs by themselves.
    """
    if is_local(url):
        for folder, _, names in os.walk(absolute(url)):
            for name in sorted(names):
                path = os.path.join(folder, name)
                if _TEMPORARY.fullmatch(name):
                    with contextlib.suppress(FileNotFoundError):
                        found = os.stat(path, follow_symlinks=False)
                        yield UnfinishedWrite(url=path, bytes=found.st_size, modified=found.st_mtime)
        return
    protocol, _, path = url.partition("://")
    if protocol not in ("s3", "s3a"):
        return
    bucket, _, prefix = path.partition("/")
    markers: dict[str, str] = {}
    while True:
        query = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", **markers}

        def ask_for(
            fs: Any, path: str, timeout: dict[str, float], query: dict[str, str] = query
        ) -> dict[str, Any]:
            del path, timeout
            return fs.call_s3("list_multipart_uploads", **query)

        page = _ask(url, ask_for)
        for upload in page.get("Uploads", []):
            yield UnfinishedWrite(
                url=f"{protocol}://{bucket}/{upload['Key']}",
                bytes=None,
                modified=upload["Initiated"].timestamp(),
                upload_id=upload["UploadId"],
            )
        if not page.get("IsTruncated"):
            return
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def discard(write: UnfinishedWrite) -> None:
    """Remove what an unfinished write left; one that ended in the meantime is no error."""
    if write.upload_id is None:
        remove(write.url)
        return
    bucket, _, key = write.url.partition("://")[2].partition("/")

    def abort(fs: Any, path: str, timeout: dict[str, float]) -> None:
        del path, timeout
        try:
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=write.upload_id)
        except Exception as error:
            if not isinstance(error, FileNotFoundError) and _answer(error)[1] != "NoSuchUpload":
                raise

    _ask(write.url, abort)


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
        # fsspec's HTTP paths are whole URLs.
        return _clients[key], url if protocol in ("http", "https") else path


def _new_client(protocol: str, url: str) -> AbstractFileSystem:
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in _S3:
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},  # `_ask` repeats, in one place for all stores
            "connect_timeout": PATIENCE.connect_s,
            "read_timeout": PATIENCE.answer_s,
        }
    elif protocol in ("http", "https"):
        import aiohttp

        # Its own limit is five minutes for a whole object, however steadily it comes.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(
                total=None, sock_connect=PATIENCE.connect_s, sock_read=PATIENCE.answer_s
            )
        }
    try:
        client = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot open {url}: {error}; install the extra for this store (gcs, azure) or fix the URL"
        ) from None
    if protocol in _S3:
        client.retries = 1
    return client


def _ask(
    url: str,
    request: Callable[[Any, str, dict[str, float]], T],
    *,
    writes: bool = False,
    retry_s: float | None = None,
    on_retry: Callable[[], None] | None = None,
) -> T:
    """What a store answers, asked again with growing pauses while its failures may pass.

    `request` gets the client, the path and the time limit as a keyword argument, where the client knows it.
    Raises StoreError at the end of patience, InputError where the settings cannot work, and whatever is a
    plain answer, such as FileNotFoundError, at once.
    """
    began, wait, attempts, warned = time.monotonic(), PATIENCE.first_wait_s, 0, False
    limit_s = PATIENCE.retry_s if retry_s is None else retry_s
    while True:
        fs, path = _remote(url)
        timeout = {"timeout": PATIENCE.request_s} if isinstance(fs, AsyncFileSystem) else {}
        attempts += 1
        try:
            return request(fs, path, timeout)
        except Exception as error:  # the clients' errors have no class in common
            if not _may_pass(error):
                _raise_clearly(url, error, writes)
            elapsed = time.monotonic() - began
            what = f"{type(error).__name__}: {error}"
            if elapsed + wait > limit_s:
                raise StoreError(
                    f"{url}: the store did not recover in {elapsed:.1f} s and {attempts} attempts, "
                    f"last {what}; check that it is up, and run the same command again"
                ) from error
            if elapsed > PATIENCE.warn_after_s and not warned:
                warned = True
                print(
                    f"warning: {url}: {what}; {attempts} attempts so far, for {limit_s:.0f} s at most",
                    flush=True,
                )
        if on_retry is not None:
            on_retry()
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, PATIENCE.longest_wait_s)


_PASSING_STATUS = (408, 409, 425, 429)
_PASSING_CODES = (
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "NoSuchUpload",
)
"""Answers that mean damage on the way; an unknown upload is one that was completed, its answer lost."""
_PASSING_ERRORS = {
    "HTTPClientError", "ConnectionError", "ResponseParserError",  # botocore
    "ClientPayloadError", "ClientConnectionError", "IncompleteRead",  # aiohttp, urllib3
}  # fmt: skip
"""By name: the clients behind fsspec are not imported here."""


def _may_pass(error: Exception) -> bool:
    if isinstance(error, StoreError | InputError):
        return False
    if _PASSING_ERRORS & {kind.__name__ for kind in type(error).__mro__}:
        return True
    status, code = _answer(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in _PASSING_STATUS or code in _PASSING_CODES
    plain = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, plain)


def _answer(error: BaseException | None) -> tuple[int | None, str]:
    """HTTP status and error code that a store gave; (None, "") where it gave no answer.

    s3fs translates the client's errors, of which some stay only as the context of what it raises.
    """
    for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
        if isinstance(status := getattr(error, name, None), int):
            return status, ""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return None, ""


def _raise_clearly(url: str, error: Exception, writes: bool) -> NoReturn:
    """Raise an error that will not pass, by the name of the URL."""
    if isinstance(error, FileNotFoundError) and writes:
        raise InputError(f"cannot write {url}: {error}; create the bucket, or fix the URL") from None
    if isinstance(error, PermissionError):
        raise PermissionError(f"{url}: {error}") from error
    if "BotoCoreError" in {kind.__name__ for kind in type(error).__mro__}:
        raise InputError(f"cannot use {url}: {error}; check credentials, region and endpoint") from error
    raise error


class _RemoteFile(io.RawIOBase):
    """A remote object as a file: every read is a range request of its own, repeated like any other."""

    def __init__(self, found: FileStat) -> None:
        self._found = found
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._found.bytes}[whence]
        if begin + offset < 0:
            raise OSError(errno.EINVAL, f"seek before the beginning of {self._found.url}")
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self._found.bytes)  # in one request: the base class asks for 8 KiB at a time

    def _next(self, num_bytes: int) -> bytes:
        wanted = min(num_bytes, self._found.bytes - self._position)
        data = read(self._found.url, self._position, wanted) if wanted > 0 else b""
        self._position += len(data)
        return data


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
            found = os.stat(folder)
            if (found.st_dev, found.st_ino) in entered:
                continue
            entered.add((found.st_dev, found.st_ino))
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
                info = entry.stat()
                yield FileStat(
                    url=entry.path,
                    bytes=info.st_size,
                    version=str(info.st_mtime_ns),
                    modified=info.st_mtime,
                )
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
