"""HTTP requests to one Label Studio server, with authorisation, timeouts and retries.

Only reads are retried: after a lost reply it is unknown whether a write took place, and Label Studio does not reject
duplicates.

If a server asks us to wait (429 or 503 with `Retry-After`), no request is sent before that time. All waits of one
client together are limited to a minute; a call that would have to wait longer fails with that reason.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from al_pipeline.errors import LabelStudioDown, LabelStudioRefused
from al_pipeline.integrations.label_studio.failures import (
    UnusableReply,
    busy,
    no_reply,
    refused_token,
    unusable_reply,
)
from al_pipeline.integrations.label_studio.tokens import Authorization, TokenExpired
from al_pipeline.logs import get_logger
from al_pipeline.sanitize import has_tls, redact

_logger = get_logger(__name__)

_T = TypeVar("_T")

_READ_ATTEMPTS = 4
_FIRST_DELAY = 0.5
_PATIENCE_SECONDS = 60.0
"""How long one client waits in total because of `Retry-After`: a tick must end."""


class Transport:
    """Label Studio at `url`, with a token of either kind. Creating it sends nothing.

    `timeout` limits each request, in seconds; `transport` replaces the network in tests. Raises LabelStudioRefused for
    an invalid address or token.
    """

    def __init__(
        self,
        url: str,
        token: str,
        timeout: float,
        *,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        _check(url, token)
        self.url = url.rstrip("/")
        self.http = httpx.Client(
            timeout=timeout,
            transport=transport,
            trust_env=not _on_this_machine(self.url),
            verify=has_tls(self.url),
        )
        self.http.event_hooks = {"request": [_note_begin], "response": [_log_reply]}
        self._authorization = Authorization(token, self._post)
        self._sleep = sleep
        self._jitter = random.Random()
        self._not_before = 0.0
        """No request may be sent before this `time.monotonic`, at the server's request."""
        self._patience = _PATIENCE_SECONDS

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def get(self, path: str, parameters: Mapping[str, str | int] | None = None) -> Any:
        """Send a plain GET request and return the reply's JSON; call it through `read`."""
        headers = self._authorization.header()
        return _content(self.http.get(f"{self.url}/{path}", params=parameters or None, headers=headers))

    def send(self, method: str, path: str, body: Any, parameters: Mapping[str, str] | None = None) -> Any:
        """Send a plain request with a JSON body and return the reply's JSON; call it through `write`."""
        headers = self._authorization.header()
        return _content(
            self.http.request(method, f"{self.url}/{path}", json=body, params=parameters or None, headers=headers)
        )

    def read(self, what: str, send: Callable[[], Any], parse: Callable[[Any], _T]) -> _T:
        """Send a request that changes nothing; on LabelStudioDown retry up to three times with exponential backoff."""
        for attempt in range(1, _READ_ATTEMPTS):
            try:
                return self.write(what, send, parse)
            except LabelStudioDown as error:
                if self._silence() > self._patience:
                    raise
                seconds = _FIRST_DELAY * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.5)
                _logger.warning("attempt %d of %d, the next in %.1f s: %s", attempt, _READ_ATTEMPTS, seconds, error)
                self._sleep(seconds)
        return self.write(what, send, parse)

    def write(self, what: str, send: Callable[[], Any], parse: Callable[[Any], _T]) -> _T:
        """Send a request once, as soon as the server allows, and parse its reply.

        Raises LabelStudioDown, LabelStudioRefused, or NotFound for a 404.
        """
        self._keep_silence(what)
        try:
            return parse(send())
        except Exception as error:
            failure = self._failure(what, error)
            if failure is None:
                raise
        # Outside the handler, so that the original error, which holds headers and bodies, is not chained to ours.
        raise failure

    def _failure(self, what: str, error: Exception) -> Exception | None:
        """The error to raise for a failed request or parse; None if `error` is one of ours or a bug."""
        match error:
            case UnusableReply():
                if error.status_code in (429, 503):
                    self._not_before = time.monotonic() + asked_to_wait(error.headers)
                return unusable_reply(what, self.url, error, self._silence())
            case TokenExpired():
                return refused_token(what, self.url, 401)
            case httpx.TimeoutException():
                return LabelStudioDown(
                    f"{what}: Label Studio at {self.url} gave no reply in time "
                    "(label_studio.timeout_seconds in params.yaml)"
                )
            case httpx.HTTPError():
                return no_reply(what, self.url, error)
            case httpx.InvalidURL() | UnicodeError():
                return LabelStudioRefused(
                    f"{what}: {self.url!r} is not a valid address, or the request contains invalid text"
                )
            case AttributeError() | LookupError() | TypeError() | ValueError() | RecursionError():
                return LabelStudioDown(
                    f"{what}: Label Studio at {self.url} sent an unexpected reply ({type(error).__name__})"
                )
            case _:
                return None

    def clock_ahead(self) -> float | None:
        """How far the server's clock is ahead of ours, in seconds; None if the server does not send a date."""
        try:
            reply = self.http.get(f"{self.url}/health")
            return (parsedate_to_datetime(reply.headers["date"]) - datetime.now(UTC)).total_seconds()
        except (httpx.HTTPError, KeyError, ValueError, TypeError):
            return None

    def _post(self, path: str, body: Mapping[str, str]) -> Any:
        return _content(self.http.post(f"{self.url}/{path}", json=dict(body)))

    def _silence(self) -> float:
        """The number of seconds before the next request may be sent."""
        return max(0.0, self._not_before - time.monotonic())

    def _keep_silence(self, what: str) -> None:
        """Wait as long as the server asked. Raises LabelStudioDown at once if that is too long."""
        seconds = self._silence()
        if seconds > self._patience:
            raise busy(what, self.url, 429, seconds)
        if seconds:
            _logger.warning("%s: Label Studio asks us to wait for %.0f s", what, seconds)
            self._patience -= seconds
            self._sleep(seconds)
            self._not_before = 0.0


def _note_begin(request: httpx.Request) -> None:
    request.extensions["al_begin"] = time.perf_counter()


def _log_reply(reply: httpx.Response) -> None:
    """Log only method, path and status: parameters, headers and bodies hold texts and tokens."""
    request, seconds = reply.request, time.perf_counter() - reply.request.extensions["al_begin"]
    _logger.debug("%s %s: %d after %.3f s", request.method, request.url.path, reply.status_code, seconds)


def _check(url: str, token: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise LabelStudioRefused("the address of Label Studio must begin with http:// or https://")
    if redact(url) != url:
        raise LabelStudioRefused(
            "the address of Label Studio must not contain a user or password, which would be shown in `al status` and "
            "in messages; the token alone is enough"
        )
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise LabelStudioRefused(
            "the token of Label Studio is empty or contains invalid characters; copy it again from Account & Settings "
            "in Label Studio"
        )


def _on_this_machine(url: str) -> bool:
    """Whether `url` is on this machine, so that proxies in the environment must be ignored."""
    try:
        return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
    except httpx.InvalidURL:
        raise LabelStudioRefused(f"{url!r} is not an address; use one such as https://labels.example.org") from None


def _content(reply: httpx.Response) -> Any:
    """The JSON of a successful reply. Raises UnusableReply for any other."""
    try:
        content = reply.json()
    except ValueError:
        raise UnusableReply(reply.status_code, dict(reply.headers), reply.text) from None
    if not reply.is_success:
        raise UnusableReply(reply.status_code, dict(reply.headers), content)
    return content


def asked_to_wait(headers: Mapping[str, str]) -> float:
    """The number of seconds that a reply's `Retry-After` asks us to wait; 0 if it is absent or invalid.

    `Retry-After` is a number of seconds or a date; a date is compared with the server's own `Date`, if sent.
    """
    found = {name.lower(): value.strip() for name, value in headers.items()}
    asked = found.get("retry-after", "")
    if asked.isascii() and asked.isdecimal():
        return float(asked)
    try:
        until = _header_date(asked)
    except (ValueError, TypeError):
        return 0.0
    try:
        now = _header_date(found.get("date", ""))
    except (ValueError, TypeError):
        now = datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _header_date(text: str) -> datetime:
    moment = parsedate_to_datetime(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
