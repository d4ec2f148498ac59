"""A proxy that stands before a real server and loses, garbles or refuses replies, as bad networks do."""

from __future__ import annotations

import http.client
import http.server
import threading
from typing import Literal, Self
from urllib.parse import urlsplit

Fault = Literal["drop_after", "502_after", "truncate", "html_200", "502_before", "429_before", "wrong_json"]

AFTER: tuple[Fault, ...] = ("drop_after", "502_after", "truncate", "html_200")
"""Faults that strike when the server has already done what it was asked."""


class FaultProxy:
    """Forwards to `upstream`; strikes the next `times` requests of `method` whose path holds `path` with `fault`."""

    def __init__(self, upstream: str) -> None:
        address = urlsplit(upstream)
        self._upstream = (str(address.hostname), int(address.port or 80))
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._method = self._path = ""
        self._times = 0
        self.struck = 0
        """Requests that were struck so far."""
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Be silent."""

            def forward(self) -> None:
                proxy._handle(self)

            do_GET = do_POST = do_PATCH = do_DELETE = forward

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def strike(self, fault: Fault, times: int, method: str = "POST", path: str = "/import") -> None:
        """Strike the next `times` matching requests."""
        with self._lock:
            self._fault, self._times, self._method, self._path = fault, times, method, path

    def _next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            if self._times == 0 or method != self._method or self._path not in path:
                return None
            self._times -= 1
            self.struck += 1
            return self._fault

    def _handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("content-length") or 0)
        body = request.rfile.read(length) if length else None
        fault = self._next_fault(request.command, request.path)
        if fault == "502_before":
            return _reply(request, 502, b"bad gateway")
        if fault == "429_before":
            return _reply(request, 429, b"slow down")
        upstream = http.client.HTTPConnection(*self._upstream, timeout=120)
        try:
            headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "connection")}
            upstream.request(request.command, request.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
            kind = answer.getheader("Content-Type") or ""
        finally:
            upstream.close()
        if fault == "drop_after":
            request.close_connection = True
            return None
        if fault == "502_after":
            return _reply(request, 502, b"bad gateway")
        if fault == "html_200":
            return _reply(request, 200, b"<html>log in first</html>", "text/html")
        if fault == "wrong_json":
            return _reply(request, 200, b'["not", "what", "was", "asked"]', "application/json")
        if fault == "truncate":
            request.close_connection = True
            return _reply(request, answer.status, data[: len(data) // 2], kind, len(data))
        return _reply(request, answer.status, data, kind)


def _reply(
    request: http.server.BaseHTTPRequestHandler, status: int, body: bytes, kind: str = "", length: int | None = None
) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    if kind:
        request.send_header("Content-Type", kind)
    request.end_headers()
    request.wfile.write(body)
