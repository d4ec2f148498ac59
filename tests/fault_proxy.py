"""A proxy in front of a real server that drops, garbles or refuses replies, as bad networks do."""

from __future__ import annotations

import http.client
import http.server
import threading
from typing import Literal, Self
from urllib.parse import urlsplit

Fault = Literal[
    "drop_before",
    "drop_after",
    "500_before",
    "500_after",
    "502_before",
    "502_after",
    "429_before",
    "truncate",
    "html_200",
    "wrong_json",
    "slow",
]

AFTER: tuple[Fault, ...] = ("drop_after", "502_after", "truncate", "html_200")
"""Faults that occur after the server has processed the request."""

ALWAYS = 1_000_000_000

_SLOW_SECONDS = 120.0
_STATUS: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "500": (500, b"<h1>Server Error (500)</h1>", {"Content-Type": "text/html"}),
    "502": (502, b"bad gateway", {}),
    "429": (429, b"slow down", {"Retry-After": "1"}),
}


class FaultProxy:
    """Forwards to `upstream`; applies `fault` to the next `times` requests of `method` whose path contains `path`."""

    def __init__(self, upstream: str) -> None:
        self.lead_to(upstream)
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._method = self._path = ""
        self._times = 0
        self._is_down = False
        self._awake = threading.Event()
        self.struck = 0
        """Requests that were struck so far."""
        self.seen: list[tuple[str, str]] = []
        """Method and path of each request."""
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Be silent."""

            def forward(self) -> None:
                proxy._handle(self)

            do_GET = do_POST = do_PATCH = do_DELETE = forward

        self._handler = Handler
        self._server = self._listen(0)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_down()

    def lead_to(self, upstream: str) -> None:
        """Forward to another server from now on, at the same address."""
        address = urlsplit(upstream)
        self._upstream = (str(address.hostname), int(address.port or 80))

    def go_down(self) -> None:
        """Stop listening at the address."""
        self._awake.set()
        self._is_down = True  # open connections get no more replies
        self._server.shutdown()
        self._server.server_close()

    def come_back(self) -> None:
        """Listen again, at the same address."""
        self._awake.clear()
        self._is_down = False
        self._server = self._listen(int(self._server.server_address[1]))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def strike(self, fault: Fault, times: int, method: str = "POST", path: str = "/import") -> None:
        """Apply the fault to the next `times` matching requests; an empty `method` or `path` matches all."""
        with self._lock:
            self._fault, self._times, self._method, self._path = fault, times, method, path
            self._awake.clear()

    def rest(self) -> None:
        """Apply no more faults."""
        with self._lock:
            self._times = 0
            self._awake.set()

    def _listen(self, port: int) -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        server.daemon_threads = True
        return server

    def _next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.seen.append((method, path))
            if self._times == 0 or self._method not in ("", method) or self._path not in path:
                return None
            self._times -= 1
            self.struck += 1
            return self._fault

    def _handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        if self._is_down:
            return _drop(request)
        length = int(request.headers.get("content-length") or 0)
        body = request.rfile.read(length) if length else None
        fault = self._next_fault(request.command, request.path)
        status, _, when = (fault or "").partition("_")
        if when == "before":
            return _drop(request) if status == "drop" else _reply(request, *_STATUS[status])
        upstream = http.client.HTTPConnection(*self._upstream, timeout=120)
        try:
            headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "connection")}
            upstream.request(request.command, request.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
            kind = {"Content-Type": answer.getheader("Content-Type") or ""}
        finally:
            upstream.close()
        if fault == "slow":
            self._awake.wait(_SLOW_SECONDS)
            return _drop(request)
        if fault == "drop_after":
            return _drop(request)
        if when == "after":
            return _reply(request, *_STATUS[status])
        if fault == "html_200":
            return _reply(request, 200, b"<html>log in first</html>", {"Content-Type": "text/html"})
        if fault == "wrong_json":
            return _reply(request, 200, b'["not", "what", "was", "asked"]', {"Content-Type": "application/json"})
        if fault == "truncate":
            request.close_connection = True
            return _reply(request, answer.status, data[: len(data) // 2], kind, len(data))
        return _reply(request, answer.status, data, kind)


def _drop(request: http.server.BaseHTTPRequestHandler) -> None:
    request.close_connection = True


def _reply(
    request: http.server.BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str],
    length: int | None = None,
) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        if value:
            request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)
