"""Turn failed requests into errors that say what to do.

Errors name the call and the status, never a body or a header: these contain texts, tokens and session cookies.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from al_pipeline.errors import LabelStudioDown, LabelStudioRefused

_DAY = 86_400.0


class UnusableReply(Exception):
    """A reply that is unsuccessful or not JSON. Holds the body: never show it."""

    def __init__(self, status_code: int | None, headers: Mapping[str, str], body: Any) -> None:
        super().__init__(f"status {status_code}")
        self.status_code = status_code
        self.headers = headers
        self.body = body


class NotFound(LabelStudioRefused):
    """The server has no such object (404), or does not let us see it."""


def unusable_reply(what: str, url: str, reply: UnusableReply, wait: float = 0.0) -> Exception:
    """The error for an unsuccessful reply; `wait`: the seconds that the server asked us to wait."""
    status = reply.status_code
    if status == 404:
        return _not_found(what, url, reply)
    if status in (401, 403):
        return refused_token(what, url, status) if _is_label_studios(reply) else _refused_in_front(what, url, status)
    if status is not None and 300 <= status < 400:
        return _redirected(what, url, reply)
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return LabelStudioRefused(f"{what}: Label Studio at {url} rejected the request as invalid (status {status})")
    if status is not None and 200 <= status < 300:
        return LabelStudioDown(
            f"{what}: {url} answered {status}, but not as Label Studio does; is the address right, or is there a "
            "log-in page in front of it?"
        )
    return busy(what, url, status, wait)


def _is_label_studios(reply: UnusableReply) -> bool:
    """Whether Label Studio sent the reply: its errors are JSON or empty; HTML pages come from other servers."""
    return not reply.body or isinstance(reply.body, Mapping)


def _not_found(what: str, url: str, reply: UnusableReply) -> LabelStudioRefused:
    if _is_label_studios(reply):
        return NotFound(f"{what}: Label Studio at {url} has no such object (404), or does not let us see it")
    return no_label_studio(what, url)


def refused_token(what: str, url: str, status: int) -> LabelStudioRefused:
    """The error for a token that the server refuses."""
    return LabelStudioRefused(
        f"{what}: Label Studio at {url} refused the token ({status}): it has expired, was revoked, or belongs to "
        "another server. Copy a new one from Account & Settings there; legacy tokens must also be allowed for the "
        "organisation"
    )


def _refused_in_front(what: str, url: str, status: int) -> LabelStudioRefused:
    return LabelStudioRefused(
        f"{what}: a server in front of Label Studio at {url} asks for a password ({status}), or another service runs "
        "there; use an address at which programs reach Label Studio itself"
    )


def _redirected(what: str, url: str, reply: UnusableReply) -> LabelStudioRefused | LabelStudioDown:
    headers = {name.lower(): value for name, value in reply.headers.items()}
    status, target = reply.status_code, _origin(headers.get("location", ""))
    if target and target != _origin(url):
        return LabelStudioRefused(f"{what}: {url} redirects to {target} ({status}); if that is right, use that address")
    return LabelStudioDown(
        f"{what}: {url} redirects to another page ({status}), such as a log-in page in front of Label Studio; use an "
        "address at which programs reach Label Studio itself"
    )


def no_label_studio(what: str, url: str) -> LabelStudioRefused:
    """The error if another service answers. Not NotFound: that service cannot tell what Label Studio has."""
    return LabelStudioRefused(
        f"{what}: there is no Label Studio at {url} (404); is the address right? It is what a browser shows before "
        "/projects"
    )


def busy(what: str, url: str, status: int | None, wait: float) -> LabelStudioDown:
    """The error for a server that asks us to wait (`wait` seconds, if known) or has failed."""
    if wait:
        why = f"asks us to wait for {wait:.0f} s" if wait <= _DAY else "asks us to wait for more than a day"
    else:
        why = "asks us to wait" if status == 429 else "failed; its own log says why"
    return LabelStudioDown(f"{what}: Label Studio at {url} {why} (status {status}). Nothing is lost: try again later")


def no_reply(what: str, url: str, error: httpx.HTTPError) -> LabelStudioDown | LabelStudioRefused:
    """The error for a request that got no reply."""
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return LabelStudioRefused(
            f"{what}: this machine does not trust the certificate of {url}, or it is for another host; if your own "
            "authority issued it, set SSL_CERT_FILE to the authority's certificate"
        )
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return LabelStudioRefused(f"{what}: {url} does not use TLS; should it be http://?")
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return LabelStudioDown(f"{what}: the host of {url} was not found; check its name and the network")
    if isinstance(error, httpx.ConnectError):
        return LabelStudioDown(
            f"{what}: no server answers at {url} ({type(error).__name__}); is it running? (`al labelstudio start` "
            "starts the workspace's own)"
        )
    return LabelStudioDown(
        f"{what}: no usable reply from {url} ({type(error).__name__}); is it running, and is it Label Studio? "
        "(`al labelstudio start` starts the workspace's own)"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the chain of its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _origin(address: str) -> str:
    """`https://host:port` of an address; empty if it has no host, is invalid or holds a user name."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return ""
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}" if url.host and "@" not in address else ""
