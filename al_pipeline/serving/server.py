"""The server process: socket, token, limits on connections, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import secrets
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from al_pipeline.drift.look import Looks
from al_pipeline.errors import ServerFailed, UsageError
from al_pipeline.files import write_text
from al_pipeline.params import Serve
from al_pipeline.serving.app import Recorder, make_app
from al_pipeline.serving.log import RequestLog
from al_pipeline.serving.versions import Versions
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.workspace import Workspace

TOKEN_VARIABLE = "AL_SERVE_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SHORTEST_TOKEN = 16
_CONNECTIONS = 1000
"""Most connections at once; others are refused with 503."""
_HEAD_SECONDS = 10.0
"""Within which a connection must have sent the head of a request."""
_HEAD_BYTES = 16 * 2**10
_SEND_SECONDS = 30.0
"""Within which a client must have taken what was written to it."""


def token_of(workspace: Workspace) -> tuple[str, str]:
    """The token that clients send, and where it is: in AL_SERVE_TOKEN, else in a file (0600), created if missing."""
    if given := os.environ.get(TOKEN_VARIABLE, "").strip():
        if not _is_token(given):
            raise UsageError(
                f"{TOKEN_VARIABLE} must have at least {_SHORTEST_TOKEN} characters, printable ASCII without blanks; "
                "`openssl rand -hex 32` makes one"
            )
        return given, f"in {TOKEN_VARIABLE}"
    workspace.make_home()
    file = private_folder(workspace.home / "serve") / "token"
    if not file.exists():
        write_text(file, f"{secrets.token_urlsafe(32)}\n", mode=0o600)
    stored = file.read_text(encoding="utf-8", errors="replace").strip()
    if not _is_token(stored):
        raise UsageError(f"{file} holds no token; delete it, and `al serve` makes one")
    return stored, f"in {file}, readable only by you"


def _is_token(given: str) -> bool:
    return len(given) >= _SHORTEST_TOKEN and re.fullmatch(r"[\x21-\x7e]+", given) is not None


def model_name(workspace: Workspace) -> str:
    """The name of the model in addresses: that of the workspace's folder, in plain characters."""
    return re.sub(r"[^\w.]+", "-", workspace.layout.root.name, flags=re.ASCII).strip("-._") or "model"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `host` and `port` (0: any free one). Raises UsageError or ServerFailed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is no address of this machine: {error}") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        raise ServerFailed(f"cannot listen on {host} port {port}: {error.strerror}; --port chooses another") from None
    return found


def url_of(bound: socket.socket) -> str:
    """The address of a listening socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """A server of `versions` on a bound socket. `run` serves until a signal comes, or `stop` is called."""

    def __init__(
        self,
        versions: Versions,
        settings: Serve,
        name: str,
        token: str,
        bound: socket.socket,
        log: RequestLog,
        recorder: Recorder | None = None,
        kept: Callable[[], Mapping[str, int]] | None = None,
        looks: Callable[[], Looks | None] | None = None,
    ) -> None:
        """`recorder` gets every answer before it goes out; `kept` and `looks` are for the metrics, see `make_app`."""
        self._bound = bound
        app = make_app(versions, settings, name, token, log, recorder, kept, looks)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_TimedProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_CONNECTIONS,
                backlog=2048,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(settings.timeout_seconds) + 1,
                h11_max_incomplete_event_size=_HEAD_BYTES,
            )
        )

    def run(self) -> None:
        """Serve. At the end no more connections are accepted, and requests that were accepted are answered."""
        _raise_file_limit()
        with _calm_signals():
            self._server.run(sockets=[self._bound])

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.should_exit = True


class _TimedProtocol(H11Protocol):
    """HTTP by uvicorn, with time limits for the head of a request and for taking its answer.

    Slow clients must not hold connections: a closed one stays open until what was written to it is taken.
    """

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        transport.set_write_buffer_limits(0)  # whatever waits pauses writing, and so starts the clock
        super().connection_made(transport)
        self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(_SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._clear()
        elif self._late is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear()
        self._taken()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._clear()
        super().on_response_complete()

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _clear(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _taken(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up(self) -> None:
        self._late = None
        if self.cycle is not None and not self.cycle.response_complete or self.transport.is_closing():
            return
        body = json.dumps({"error": f"the request's head did not arrive within {_HEAD_SECONDS:g} s"}).encode()
        head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()


def _raise_file_limit() -> None:
    """Let this process open as many files as it may: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def _calm_signals() -> Any:
    """Uvicorn ends on a signal and then raises it again; that must not kill this process, which has ended as asked."""
    try:
        before: dict[int, Any] = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
