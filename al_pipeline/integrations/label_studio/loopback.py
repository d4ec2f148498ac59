"""One plain request to a Label Studio on this machine, by a socket: no TLS, no proxy, no redirect, no library.

For short commands: to import urllib or httpx takes more processor time than what they do.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from al_pipeline.sanitize import on_this_machine

MOST_BYTES = 1_000_000


def request(url: str, headers: Mapping[str, str], seconds: float, body: str | None = None) -> tuple[int, bytes] | None:
    """Status and content of the reply, at most a megabyte; a POST where there is a JSON `body`.

    It speaks HTTP/1.0, so that the reply ends with the connection. None where that is not enough: another address than
    one of this machine, or a reply in pieces. Raises URLError where nobody can be reached, as urllib does; OSError or
    HTTPException where the connection breaks.
    """
    texts = [url, *headers, *headers.values()]
    if not (url.startswith("http://") and on_this_machine(url) and all(t.isascii() and t.isprintable() for t in texts)):
        return None
    parts = urlsplit(url)
    target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    if " " in target:
        return None
    content = b"" if body is None else body.encode()
    sent = {"Host": parts.netloc, "Connection": "close", **headers}
    if body is not None:
        sent |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    lines = [f"{'GET' if body is None else 'POST'} {target} HTTP/1.0", *(f"{k}: {v}" for k, v in sent.items()), "", ""]
    try:
        connection = socket.create_connection((parts.hostname, parts.port or 80), seconds)
    except OSError as error:
        from urllib.error import URLError

        raise URLError(error) from None
    with connection:
        connection.sendall("\r\n".join(lines).encode("ascii") + content)
        reply = bytearray()
        while len(reply) < MOST_BYTES and (piece := connection.recv(65_536)):
            reply += piece
    return _parsed(bytes(reply))


def _parsed(reply: bytes) -> tuple[int, bytes] | None:
    head, _, content = reply.partition(b"\r\n\r\n")
    words = head.split(b"\r\n")[0].split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        from http.client import BadStatusLine, RemoteDisconnected

        raise BadStatusLine(repr(head[:100])) if reply else RemoteDisconnected("no reply")
    return None if b"\ntransfer-encoding:" in head.lower() else (int(words[1]), content)
