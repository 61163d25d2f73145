"""Objects of remote stores kept on the disk of one node, for all processes there: each is fetched once.

Files are named by what they hold, so datasets never collide. A reader keeps a shared lock on what it has
mapped; only files that nobody has mapped are removed, and none is ever changed or truncated.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import mmap
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline import remote, storage
from pipeline.errors import InputError

ROOM_WAIT_S = 60.0
"""How long a shard waits for room that others hold before the run stops."""

_LOCK = ".lock"
_PARTIAL = re.compile(r"\..+\.partial")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where shards of remote stores are kept on each node, and how much of them."""

    folder: str | None = None
    """A folder on a local disk; null is `shard-cache-<user>` in the folder for temporary files. Runs that
    share it share what is in it."""
    bytes: int = 16 << 30
    """At most so many bytes in the folder. Too few for 64 shards and those fetched ahead give fewer lanes
    and so a poorer shuffle; too few for twice as many and each epoch begins with a wait for its first shards,
    unless lanes are fewer still. Local datasets are read where they lie."""

    def __post_init__(self) -> None:
        if self.bytes < 1:
            raise InputError(f"cache.bytes is {self.bytes}; give the bytes that shards may take on each node")
        if self.folder is not None and not storage.is_local(self.folder):
            raise InputError(f"cache.folder is {self.folder}; give a folder on a local disk of each node")

    @property
    def place(self) -> str:
        """The folder, absolute."""
        if self.folder is not None:
            return storage.absolute(self.folder)
        return os.path.join(tempfile.gettempdir(), f"shard-cache-{getpass.getuser()}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedObject:
    """What a file of the cache holds: `name` says it uniquely and is a file name; `what` is for people."""

    name: str
    bytes: int
    what: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MappedFile:
    """A file mapped for reading. Equal `identity` (path, size, modification time, inode), equal bytes."""

    payload: mmap.mmap
    identity: tuple[str, int, int, int]
    was_here: bool
    """False where it had to be fetched for this."""


def map_file(descriptor: int, path: str, *, was_here: bool, read_now: bool = True) -> MappedFile:
    """What an open file holds. The map keeps a duplicate of the descriptor, and with it any lock.

    With `read_now` all its pages are there at once where the system can do that: no reader of it waits for
    the disk.
    """
    status = os.fstat(descriptor)
    flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if read_now else 0)
    return MappedFile(
        payload=mmap.mmap(descriptor, 0, flags, mmap.PROT_READ),
        identity=(path, status.st_size, status.st_mtime_ns, status.st_ino),
        was_here=was_here,
    )


class DiskCache:
    """A folder of at most `max_bytes`, shared by the threads and processes of a node.

    What was used longest ago goes first. Downloads that a killed process left are removed by the next one
    that needs room. The folder is made when something is stored for the first time.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._folder = config.place
        self._max_bytes = config.bytes

    def has(self, entry: CachedObject) -> bool:
        """True where the object is in the folder now."""
        try:
            return os.stat(self._path(entry)).st_size == entry.bytes
        except OSError:
            return False

    def open(self, entry: CachedObject, fetch: Callable[[], bytes]) -> MappedFile:
        """The object, mapped; where it is not there it is fetched, by one process only.

        `fetch` gives exactly `entry.bytes` bytes that are right, or raises. What was there already is known
        by name and size only: check it. InputError where there is no room, naming the folder and the fix.
        """
        if entry.bytes > self._max_bytes:
            raise InputError(
                f"{entry.what} has {entry.bytes:,} bytes, cache.bytes is {self._max_bytes:,}; raise it"
            )
        mapped = self._mapped(entry)
        if mapped is not None:
            return mapped
        with self._fetching(entry):
            # Another process may have fetched it meanwhile.
            return self._mapped(entry) or self._stored(entry, fetch)

    def drop(self, entry: CachedObject) -> None:
        """Remove an object that turned out to be damaged; whoever has it mapped keeps what they have."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(entry))

    # -------------------------------------------------------------------------------------------- inside

    def _path(self, entry: CachedObject) -> str:
        return os.path.join(self._folder, entry.name)

    def _mapped(self, entry: CachedObject) -> MappedFile | None:
        """The object, mapped under a shared lock that lasts as long as the map; None where it is absent."""
        path = self._path(entry)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if status.st_nlink == 0 or status.st_size != entry.bytes:
                return None
            # Last used now. The modification time stays: by it the bytes are known to have been checked.
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
            return map_file(descriptor, path, was_here=True)
        except FileNotFoundError:
            return None  # removed in between
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _fetching(self, entry: CachedObject) -> Iterator[None]:
        """Alone on this node in fetching an object; after the longest a fetch may take, not alone."""
        self._make_folder()
        # 256 locks for all names: two objects may have to wait for each other, and no lock is ever removed.
        path = os.path.join(self._folder, f".{entry.name[:2]}{_LOCK}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + remote.RETRIES.request_s + remote.RETRIES.retry_s
            while time.monotonic() < deadline and not _locked(descriptor):
                time.sleep(0.05)
            yield
        finally:
            os.close(descriptor)

    def _stored(self, entry: CachedObject, fetch: Callable[[], bytes]) -> MappedFile:
        descriptor, partial = self._reserved(entry)
        try:
            data = fetch()
            written = 0
            with memoryview(data) as view:
                while written < len(view):
                    written += os.pwrite(descriptor, view[written:], written)
            # Where somebody cleared the folder meanwhile, the bytes are right nevertheless, only not shared.
            # Not while another counts the files: under neither name it would be left out.
            with contextlib.suppress(FileNotFoundError), self._alone():
                os.rename(partial, self._path(entry))
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # after the rename: in between nobody has the lock
            return map_file(descriptor, self._path(entry), was_here=False)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            if isinstance(error, OSError) and error.errno in _FULL_DISK:
                raise self._no_room(entry) from None
            raise
        finally:
            os.close(descriptor)

    def _reserved(self, entry: CachedObject) -> tuple[int, str]:
        """A locked temporary file of full size already, so that the sum of all files is the bound."""
        deadline = time.monotonic() + ROOM_WAIT_S
        while True:
            self._make_folder()
            with self._alone():
                used = self._make_room(entry.bytes)
                if used + entry.bytes <= self._max_bytes:
                    return self._partial(entry)
            if time.monotonic() > deadline:
                raise InputError(
                    f"no room for {entry.what}: {used:,} of the {self._max_bytes:,} bytes of cache.bytes in "
                    f"{self._folder} are in use by this run or others on the node; raise --cache.bytes, "
                    "lower --batch_size, or give each run a --cache.folder of its own"
                )
            time.sleep(0.05)

    def _partial(self, entry: CachedObject) -> tuple[int, str]:
        path = os.path.join(self._folder, f".{entry.name[:32]}.{os.getpid()}.{secrets.token_hex(4)}.partial")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(descriptor, 0, entry.bytes)
        except OSError as error:
            os.unlink(path)
            os.close(descriptor)
            if error.errno in _FULL_DISK:
                raise self._no_room(entry) from None
            raise
        return descriptor, path

    def _make_room(self, num_bytes: int) -> int:
        """Remove files that nobody uses, the longest unused first, as needed; the bytes that remain."""
        files: list[tuple[int, int, str]] = []
        with os.scandir(self._folder) as entries:
            for item in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    if item.name.endswith(_LOCK):
                        continue
                    # What a killed process left is the first to go; a living one has it locked.
                    used_ns = 0 if _PARTIAL.fullmatch(item.name) else status.st_atime_ns
                    files.append((used_ns, status.st_size, item.path))
        total = sum(size for _, size, _ in files)
        free = shutil.disk_usage(self._folder).free
        for used_ns, size, path in sorted(files):
            if used_ns > 0 and total + num_bytes <= self._max_bytes and free >= num_bytes:
                break
            if _removed(path):
                total -= size
                free += size
        return total

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The only one on this node that makes room; for moments."""
        descriptor = os.open(os.path.join(self._folder, _LOCK), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_folder(self) -> None:
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the cache folder {self._folder} ({error.strerror}); give another --cache.folder"
            ) from None
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise InputError(
                f"cannot write into the cache folder {self._folder}; give another --cache.folder"
            )

    def _no_room(self, entry: CachedObject) -> InputError:
        free = shutil.disk_usage(self._folder).free
        return InputError(
            f"the disk of {self._folder} is full: {entry.what} needs {entry.bytes:,} bytes, {free:,} are "
            "free; free some, lower --cache.bytes, or give a --cache.folder on a larger disk"
        )


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _removed(path: str) -> bool:
    """True where a file could be removed, because no process has it open under a lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not _locked(descriptor):
            return False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return True
    finally:
        os.close(descriptor)
