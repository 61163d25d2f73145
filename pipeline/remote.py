"""Clients of remote stores, and requests that are repeated in one place for all of them.

Every request has time limits and is repeated while its failures are transient; the clients' own retries are
off.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from pipeline.errors import InputError

T = TypeVar("T")

S3 = ("s3", "s3a")


class StoreError(Exception):
    """A remote store kept failing until the time limit; names the URL, the attempts and the last failure.

    It is no OSError: those are caught in places where one unreadable file is an everyday matter.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Time limits and retries of requests to remote stores, all in seconds."""

    connect_s: float = 10.0
    """Limit for opening a connection."""
    answer_s: float = 60.0
    """Limit between two bytes from the store."""
    request_s: float = 3600.0
    """Limit for one request with all its bytes."""
    retry_s: float = 300.0
    """Time from the first attempt on during which failures are repeated."""
    first_wait_s: float = 0.1
    """Pause before the first repetition; it doubles, and is shortened by up to a half at random."""
    longest_wait_s: float = 20.0
    """Longest pause between two attempts."""
    warn_after_s: float = 10.0
    """Time from the first attempt on after which a failure is reported once."""


RETRIES = RetryPolicy()


_clients: dict[tuple[int, str], AbstractFileSystem] = {}
_clients_lock = threading.Lock()


def _client(url: str) -> tuple[AbstractFileSystem, str]:
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
    if protocol in S3:
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},  # `with_retries` repeats, in one place for all stores
            "connect_timeout": RETRIES.connect_s,
            "read_timeout": RETRIES.answer_s,
        }
    elif protocol in ("http", "https"):
        import aiohttp

        # Its own limit is five minutes for a whole object, however steadily it comes.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(
                total=None, sock_connect=RETRIES.connect_s, sock_read=RETRIES.answer_s
            )
        }
    try:
        client = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot open {url}: {error}; install the extra for this store (gcs, azure) or fix the URL"
        ) from None
    if protocol in S3:
        client.retries = 1
    return client


def with_retries(
    url: str,
    request: Callable[[Any, str, dict[str, float]], T],
    *,
    writes: bool = False,
    retry_s: float | None = None,
    on_retry: Callable[[], None] | None = None,
) -> T:
    """The result of a request to a store, repeated with growing pauses while its failures are transient.

    `request` gets the client, the path and the time limit as a keyword argument, where the client knows it.
    Raises StoreError when the time limit is reached, InputError where the settings cannot work, and whatever
    is a plain answer, such as FileNotFoundError, at once.
    """
    began, wait, attempts, warned = time.monotonic(), RETRIES.first_wait_s, 0, False
    limit_s = RETRIES.retry_s if retry_s is None else retry_s
    while True:
        fs, path = _client(url)
        timeout = {"timeout": RETRIES.request_s} if isinstance(fs, AsyncFileSystem) else {}
        attempts += 1
        try:
            return request(fs, path, timeout)
        except Exception as error:  # the clients' errors have no class in common
            if not _is_transient(error):
                _raise_lasting(url, error, writes)
            elapsed = time.monotonic() - began
            what = f"{type(error).__name__}: {error}"
            if elapsed + wait > limit_s:
                raise StoreError(
                    f"{url}: the store did not recover in {elapsed:.1f} s and {attempts} attempts, "
                    f"last {what}; check that it is up, and run the same command again"
                ) from error
            if elapsed > RETRIES.warn_after_s and not warned:
                warned = True
                print(
                    f"warning: {url}: {what}; {attempts} attempts so far, for {limit_s:.0f} s at most",
                    flush=True,
                )
        if on_retry is not None:
            on_retry()
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, RETRIES.longest_wait_s)


_TRANSIENT_STATUS = (408, 409, 425, 429)
_TRANSIENT_CODES = (
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "NoSuchUpload",
)
"""Answers that mean damage on the way; an unknown upload is one that was completed, its answer lost."""
_TRANSIENT_ERRORS = {
    "HTTPClientError", "ConnectionError", "ResponseParserError",  # botocore
    "ClientPayloadError", "ClientConnectionError", "IncompleteRead",  # aiohttp, urllib3
}  # fmt: skip
"""By name: the clients behind fsspec are not imported here."""


def _is_transient(error: Exception) -> bool:
    if isinstance(error, StoreError | InputError):
        return False
    if _TRANSIENT_ERRORS & {kind.__name__ for kind in type(error).__mro__}:
        return True
    status, code = http_status(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
    plain = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, plain)


def http_status(error: BaseException | None) -> tuple[int | None, str]:
    """HTTP status and error code of a store's answer; (None, "") where it gave none.

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


def _raise_lasting(url: str, error: Exception, writes: bool) -> NoReturn:
    """Raise an error that is not transient, naming the URL."""
    if isinstance(error, FileNotFoundError) and writes:
        raise InputError(f"cannot write {url}: {error}; create the bucket, or fix the URL") from None
    if isinstance(error, PermissionError):
        raise PermissionError(f"{url}: {error}") from error
    if "BotoCoreError" in {kind.__name__ for kind in type(error).__mro__}:
        raise InputError(f"cannot use {url}: {error}; check credentials, region and endpoint") from error
    raise error
