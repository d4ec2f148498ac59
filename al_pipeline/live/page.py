"""The page of `al live`: one page on loopback that follows the state by server-sent events. It only shows.

Whoever has the token may read it. Requests that name another host are refused, so that a site whose name is made to
point to this machine (DNS rebinding) cannot read it. The page fills in texts as text, never as markup.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from al_pipeline.errors import UsageError
from al_pipeline.files import write_text
from al_pipeline.live.plan import is_running
from al_pipeline.live.state import LiveState, read_state, to_row
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

LOOPBACK = "127.0.0.1"
EVENT_SECONDS = 1.0
"""Between two events of a stream, at least."""
BEAT_SECONDS = 10.0
"""Between two signs of life of a stream, at most."""
RETRY_MS = 2000
"""After which a browser connects again."""
MOST_STREAMS = 32
"""Streams at a time; more are refused with 503."""
_SECONDS = 10.0
"""Within which a client must send its request, and take what is sent."""
_FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}

Source = Callable[[], LiveState | None]


def token_of(workspace: Workspace) -> str:
    """The token of the workspace's page, from a file (0600) that is created if missing: the address stays the same."""
    workspace.make_home()
    file = private_folder(workspace.home / "live") / "token"
    stored = file.read_text(encoding="ascii", errors="replace").strip() if file.exists() else ""
    if not re.fullmatch(r"[\w-]{32,100}", stored, re.ASCII):
        stored = secrets.token_urlsafe(32)
        write_text(file, f"{stored}\n", mode=0o600)
    return stored


def address_of(url: str, token: str) -> str:
    """The whole address of the page of the server at `url`."""
    return f"{url}/?token={token}"


def page_of(workspace: Workspace) -> str | None:
    """The whole address of the page of the running `al live`; None if it does not run, or serves none."""
    state = read_state(workspace.layout) if is_running(workspace.layout) else None
    return None if state is None or not state.page else address_of(state.page, token_of(workspace))


def usual_port(layout: Layout) -> int:
    """The port of the last page, so that an open page finds the next one; 0 if there was none."""
    state = read_state(layout)
    try:
        return (urlsplit(state.page).port or 0) if state is not None and state.page else 0
    except ValueError:
        return 0


@contextmanager
def serve_page(
    source: Source, port: int | None, token: str, is_healthy: Callable[[], bool] = lambda: True, usual: int = 0
) -> Iterator[str]:
    """Serve the page while the context lasts; yields its address, without `token`: see `address_of`.

    `source` gives the newest state. `port`: 0: any free one; None: `usual` if it is free, else any. Without a token,
    `GET /health` answers 200 while `is_healthy()`, else 503. Raises UsageError if the port is taken.
    """
    server = _bound((usual, 0) if port is None else (port,))
    server.source, server.token, server.is_healthy = source, token, is_healthy
    number = server.server_address[1]
    server.hosts = frozenset(f"{host}:{number}" for host in (LOOPBACK, "localhost"))
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="al-live-page", daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{number}"
    finally:
        server.ends.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _bound(ports: tuple[int, ...]) -> _Server:
    for place, port in enumerate(ports):
        try:
            return _Server((LOOPBACK, port), _Handler)
        except OSError as error:
            if place == len(ports) - 1:
                raise UsageError(
                    f"port {port} cannot be used: {error.strerror}; `--port 0` takes any free one"
                ) from None
    raise AssertionError("no port to try")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    source: Source
    token: str
    is_healthy: Callable[[], bool]
    hosts: frozenset[str]

    def __init__(self, *given: Any) -> None:
        self.ends = threading.Event()
        self.streams = threading.BoundedSemaphore(MOST_STREAMS)
        super().__init__(*given)

    def handle_error(self, *_: object) -> None:
        """A browser that went away, or took too long, is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SECONDS
    server_version, sys_version = "al", ""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            return self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this page is served under its own address alone")
        if address.path == "/health":
            healthy = self.server.is_healthy()
            return self._reply(HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, b"", "text/plain")
        if address.path in ("/page.css", "/page.js"):  # the same for everybody
            return self._file(_FILES[address.path])
        given = parse_qs(address.query).get("token", [""])[0]
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.server.token.encode()):
            return self._refuse(HTTPStatus.FORBIDDEN, "the address lacks its token; `al status` prints the whole one")
        if address.path == "/":
            return self._file(_FILES["/"])
        if address.path == "/state":
            state = self.server.source()
            return self._reply(HTTPStatus.OK, json.dumps(state and to_row(state)).encode(), "application/json")
        if address.path == "/events":
            if not self.server.streams.acquire(blocking=False):
                return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many pages are open")
            try:
                return self._stream()
            finally:
                self.server.streams.release()
        return self._refuse(HTTPStatus.NOT_FOUND, "there is no such address")

    def _stream(self) -> None:
        """Send each new state as an event, and a comment now and then so that both ends notice a lost connection."""
        self._head(HTTPStatus.OK, "text/event-stream", None)
        self.wfile.write(f"retry: {RETRY_MS}\n\n".encode())
        sent, sent_at = None, 0.0
        while not self.server.ends.is_set():
            state = self.server.source()
            if state is not None and state is not sent:
                self.wfile.write(b"data: " + msgspec.json.encode(state) + b"\n\n")
                sent, sent_at = state, time.monotonic()
            elif time.monotonic() - sent_at >= BEAT_SECONDS:
                self.wfile.write(b": beat\n\n")
                sent_at = time.monotonic()
            self.server.ends.wait(EVENT_SECONDS)

    def _file(self, name: str) -> None:
        kind = f"{_KINDS[name.rpartition('.')[2]]}; charset=utf-8"
        self._reply(HTTPStatus.OK, (files("al_pipeline.live") / "templates" / name).read_bytes(), kind)

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self._reply(status, f"{sentence}\n".encode(), "text/plain; charset=utf-8")

    def _reply(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, length: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: addresses contain the token."""
