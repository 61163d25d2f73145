"""A faulty network and a faulty store: a proxy on loopback before an S3 server; faults come from a seed."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Shares of the requests that meet a fault; at most one each. The last three are what the store lacks."""

    slow_down: float = 0.0
    """503 SlowDown; the store never hears of the request."""
    internal: float = 0.0
    """500 InternalError, although the store did as it was asked."""
    cut: float = 0.0
    """The answer ends before its Content-Length."""
    drop_before: float = 0.0
    """The connection breaks before the store hears of the request."""
    drop_after: float = 0.0
    """The store did as it was asked, then the connection breaks."""
    late: float = 0.0
    """The connection breaks, and the store hears of the request `delay_s` later."""
    delay: float = 0.0
    """The answer comes `delay_s` late."""
    stale: float = 0.0
    """A listing is answered as it was answered at an earlier time."""
    conflict: float = 0.0
    """409 ConditionalRequestConflict for a conditional write."""
    delay_s: float = 0.1
    no_condition: bool = False
    """If-None-Match is ignored: the store silently overwrites."""
    refuse_condition: bool = False
    """501 NotImplemented for If-None-Match."""
    silent: bool = False
    """Connections are taken, and nothing is ever answered."""


_DRAWN = ("slow_down", "internal", "cut", "drop_before", "drop_after", "late", "delay", "stale", "conflict")


@dataclass(frozen=True, kw_only=True)
class _Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def is_conditional(self) -> bool:
        return self.method == "PUT" and "If-None-Match" in self.headers

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type" in self.path


@dataclass(frozen=True, kw_only=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class FaultProxy:
    """Listens at `endpoint` and passes requests on to `store`, with `faults`; a context manager.

    Conditional writes go one at a time, because moto looks and then writes. `script` names faults for the
    next requests whose method is given with them, before any are drawn (also "forbidden", and "" for none);
    `counts` says what happened, and how often. `after_put(number)` is called when the store has done a write
    and the answer is still held.
    """

    def __init__(self, store: str, *, seed: int = 0) -> None:
        self.faults = Faults()
        self.script: deque[tuple[str, str]] = deque()
        self.counts: Counter[str] = Counter()
        self.after_put: Callable[[int], None] | None = None
        self._store = urllib.parse.urlsplit(store)
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._conditional = threading.Lock()
        self._listings: dict[str, list[_Answer]] = {}
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def do_GET(self) -> None:
                body = _read_body(self)
                headers = {key.title(): value for key, value in self.headers.items()}
                proxy._serve(self, _Request(method=self.command, path=self.path, headers=headers, body=body))

            do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        return Handler

    def _fault(self, request: _Request) -> str:
        """What goes wrong with this request; "" for nothing."""
        with self._lock:
            self.counts["requests"] += 1
            self.counts[request.method] += 1
            fault = ""
            if self.script and self.script[0][0] == request.method:
                fault = self.script.popleft()[1]
            else:
                drawn = self._rng.random()
                for name in _DRAWN:
                    drawn -= getattr(self.faults, name)
                    if drawn < 0:
                        fault = name
                        break
            if fault == "conflict" and not request.is_conditional:
                fault = ""
            if fault == "cut" and request.method == "HEAD":
                fault = ""
            if fault:
                self.counts[fault] += 1
            return fault

    def _serve(self, handler: BaseHTTPRequestHandler, request: _Request) -> None:
        faults = self.faults
        if faults.silent:
            self._ended.wait()
            return
        if request.is_conditional and faults.refuse_condition:
            return _reply(handler, request, _error(501, "NotImplemented"))
        if faults.no_condition:
            request.headers.pop("If-None-Match", None)
        fault = self._fault(request)
        match fault:
            case "slow_down":
                return _reply(handler, request, _error(503, "SlowDown"))
            case "forbidden":
                return _reply(handler, request, _error(403, "AccessDenied"))
            case "conflict":
                return _reply(handler, request, _error(409, "ConditionalRequestConflict"))
            case "drop_before":
                return self._break(handler)
            case "late":
                threading.Timer(faults.delay_s, self._forward, (request,)).start()
                return self._break(handler)
            case "delay":
                time.sleep(faults.delay_s)
        answer = self._forward(request)
        if request.method == "PUT":
            with self._lock:
                self.counts["puts done"] += 1
                number = self.counts["puts done"]
            if self.after_put is not None:
                self.after_put(number)
        if request.is_listing:
            with self._lock:
                known = self._listings.setdefault(request.path, [])
                known.append(answer)
                if fault == "stale":
                    answer = self._rng.choice(known)
        match fault:
            case "internal":
                return _reply(handler, request, _error(500, "InternalError"))
            case "drop_after":
                return self._break(handler)
            case "cut" if len(answer.body) > 1:
                _reply(handler, request, answer, sent=len(answer.body) // 2)
                return self._break(handler)
        _reply(handler, request, answer)

    def _forward(self, request: _Request) -> _Answer:
        if request.is_conditional:
            with self._conditional:
                return self._ask_store(request)
        return self._ask_store(request)

    def _ask_store(self, request: _Request) -> _Answer:
        connection = http.client.HTTPConnection(self._store.hostname or "", self._store.port, timeout=30)
        try:
            headers = {
                key: value
                for key, value in request.headers.items()
                if key not in ("Connection", "Transfer-Encoding", "Expect", "Content-Length")
            }
            body = request.body if request.body or request.method in ("PUT", "POST") else None
            connection.request(request.method, request.path, body, headers)
            answer = connection.getresponse()
            return _Answer(status=answer.status, headers=answer.getheaders(), body=answer.read())
        finally:
            connection.close()

    def _break(self, handler: BaseHTTPRequestHandler) -> None:
        """End the connection: in order, or with a reset."""
        handler.close_connection = True
        with self._lock:
            reset = self._rng.random() < 0.5
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        else:
            handler.connection.shutdown(socket.SHUT_RDWR)


def _read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    parts: list[bytes] = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        parts.append(handler.rfile.read(size))
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return b"".join(parts)


def _error(status: int, code: str) -> _Answer:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
    )
    return _Answer(status=status, headers=[("Content-Type", "application/xml")], body=body.encode())


def _reply(
    handler: BaseHTTPRequestHandler, request: _Request, answer: _Answer, *, sent: int | None = None
) -> None:
    """Pass an answer on, or the first `sent` bytes of its body."""
    handler.send_response_only(answer.status)
    length = str(len(answer.body))
    for key, value in answer.headers:
        if key.lower() == "content-length":
            length = value  # of HEAD: the object's, without its bytes
        elif key.lower() not in ("connection", "transfer-encoding", "keep-alive"):
            handler.send_header(key, value)
    if answer.status not in (204, 304):
        handler.send_header("Content-Length", length)
    handler.end_headers()
    if request.method != "HEAD":
        handler.wfile.write(answer.body[:sent])
    handler.wfile.flush()
