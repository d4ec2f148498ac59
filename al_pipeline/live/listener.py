"""A small HTTP server on loopback: Label Studio's webhook wakes the next step, `al up` asks whether all is well.

A webhook carries nothing that is believed: it only makes the process look sooner. So lost, late, doubled and forged
ones do no harm.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from al_pipeline.errors import UsageError

LOOPBACK = "127.0.0.1"
SECRET_HEADER = "X-AL-Secret"
_MOST_BYTES = 65_536
_SECONDS = 5.0


class Listener:
    """Where it listens, and the secret that a webhook must send."""

    def __init__(self, port: int, secret: str) -> None:
        self.url = f"http://{LOOPBACK}:{port}"
        self.secret = secret
        self.woken = 0
        """Webhooks with the secret."""
        self.refused = 0
        """Webhooks without it."""


@contextmanager
def listening(port: int, wake: Callable[[], None], is_healthy: Callable[[], bool]) -> Iterator[Listener]:
    """Listen on `port` (0: any free one) while the context lasts. Raises UsageError if the port is taken.

    `POST /wake` with the secret calls `wake`; `GET /health` answers 200 while `is_healthy()`, else 503.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _SECONDS
        server_version, sys_version = "al", ""

        def do_GET(self) -> None:
            found = HTTPStatus.NOT_FOUND
            if self.path == "/health":
                found = HTTPStatus.OK if is_healthy() else HTTPStatus.SERVICE_UNAVAILABLE
            self._reply(found)

        def do_POST(self) -> None:
            given = self.headers.get(SECRET_HEADER, "")
            length = self.headers.get("Content-Length", "0")
            if not length.isdigit() or int(length) > _MOST_BYTES:
                self.close_connection = True
                return self._reply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            self.rfile.read(int(length))
            if self.path != "/wake":
                return self._reply(HTTPStatus.NOT_FOUND)
            if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), found.secret.encode()):
                found.refused += 1
                return self._reply(HTTPStatus.FORBIDDEN)
            found.woken += 1
            wake()
            return self._reply(HTTPStatus.NO_CONTENT)

        def _reply(self, status: HTTPStatus) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: a request says nothing that the next step does not find."""

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise UsageError(f"port {port} cannot be used: {error.strerror}; `--listen 0` takes any free one") from None
    server.daemon_threads = True
    found = Listener(server.server_address[1], secrets.token_urlsafe(32))
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="al-live-listener", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
