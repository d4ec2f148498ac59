"""The three requests of a tick that only waits, as plain HTTP: the project, the tasks, the users.

They are what the SDK would send; its import alone costs a second of processor time.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

import httpx


class UnusableReply(Exception):
    """A reply with another status than success, or that is no JSON. Holds a body: never show it."""

    def __init__(self, status_code: int | None, headers: Mapping[str, str], body: Any) -> None:
        super().__init__(f"status {status_code}")
        self.status_code = status_code
        self.headers = headers
        self.body = body


class Row:
    """An object of a reply, by attributes like the SDK's; None where it lacks one, as there."""

    def __init__(self, values: Any) -> None:
        if not isinstance(values, dict):
            raise TypeError("not an object")
        self._values = values

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["_values"].get(name)


class PlainReads:
    """Reads over `http`, which bounds their time. They raise httpx's errors, UnusableReply, and TypeError or KeyError
    for a reply of another form.
    """

    def __init__(self, url: str, token: str, http: httpx.Client) -> None:
        self._url = url
        self._token = token
        self._http = http
        self._access = ""
        self._access_until = 0.0

    def project(self, number: int) -> Row:
        """One project."""
        found = Row(self._get(f"api/projects/{number}/", {}))
        if found.id is None or found.label_config is None:
            raise KeyError("no project")
        return found

    def users(self) -> list[Row]:
        """Everybody in the organisation."""
        return _rows(self._get("api/users/", {}))

    def tasks(self, **wanted: str | int) -> list[Row]:
        """One page of tasks; `wanted` are the parameters of the request."""
        return _rows(self._get("api/tasks/", wanted)["tasks"])

    def _get(self, path: str, wanted: Mapping[str, str | int]) -> Any:
        headers = {"Authorization": self._authorization()}
        return _content(self._http.get(f"{self._url}/{path}", params=wanted or None, headers=headers))

    def _authorization(self) -> str:
        """The header for a legacy token, or for a personal access token, which first buys a short-lived one."""
        claims = _claims(self._token)
        if claims is None:
            return f"Token {self._token}"
        if _expiry(claims) <= time.time():
            raise UnusableReply(401, {}, {"detail": "the token has expired, or never said when it would"})
        if not self._access or self._access_until <= time.time():
            reply = _content(self._http.post(f"{self._url}/api/token/refresh/", json={"refresh": self._token}))
            access = reply["access"]
            if not isinstance(access, str) or not access.isascii() or not access.isprintable():
                raise TypeError("no token")
            self._access, self._access_until = access, _expiry(_claims(access) or {})
        return f"Bearer {self._access}"


def _content(reply: httpx.Response) -> Any:
    try:
        content = reply.json()
    except ValueError:
        raise UnusableReply(reply.status_code, dict(reply.headers), reply.text) from None
    if not reply.is_success:
        raise UnusableReply(reply.status_code, dict(reply.headers), content)
    return content


def _rows(values: Any) -> list[Row]:
    if not isinstance(values, list):
        raise TypeError("not a list")
    return [Row(value) for value in values]


def _claims(token: str) -> dict[str, Any] | None:
    """What a JSON Web Token says of itself, unverified (the server does that); None for a token of another kind."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        head, claims = (json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in parts[:2])
    except ValueError:
        return None
    return claims if isinstance(head, dict) and isinstance(claims, dict) else None


def _expiry(claims: Mapping[str, Any]) -> float:
    """When a token ends, in seconds since 1970; 0 where it does not say."""
    found = claims.get("exp")
    return found if isinstance(found, int | float) else 0.0
