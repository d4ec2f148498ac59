"""The authorisation header for Label Studio's two kinds of token. Needs no HTTP library: callers pass a `Post`.

A legacy token is sent as it is. A personal access token is a JSON Web Token that is exchanged for an access token valid
for a few minutes.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

Post = Callable[[str, Mapping[str, str]], Any]
"""Posts a JSON body to a path of the server and returns the content of the reply."""

_REFRESH = "api/token/refresh/"


class TokenExpired(Exception):
    """A personal access token has expired or has no expiry time: the server would refuse it."""


class Authorization:
    """The `Authorization` header for `token`. Access tokens are cached until they expire."""

    def __init__(self, token: str, post: Post) -> None:
        self._token = token
        self._post = post
        self._access = ""
        self._access_until = 0.0

    def header(self) -> dict[str, str]:
        """The header for a request that is sent now; fetches an access token if necessary.

        Raises TokenExpired, and TypeError or KeyError if the reply holds no access token.
        """
        claims = _claims(self._token)
        if claims is None:
            return {"Authorization": f"Token {self._token}"}
        if _expiry(claims) <= time.time():
            raise TokenExpired("the token has expired, or does not say when it expires")
        if not self._access or self._access_until <= time.time():
            access = self._post(_REFRESH, {"refresh": self._token})["access"]
            if not isinstance(access, str) or not access.isascii() or not access.isprintable():
                raise TypeError("no access token")
            self._access, self._access_until = access, _expiry(_claims(access) or {})
        return {"Authorization": f"Bearer {self._access}"}


def _claims(token: str) -> dict[str, Any] | None:
    """The claims of a JSON Web Token, unverified (the server verifies them); None for other kinds of token."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        head, claims = (json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in parts[:2])
    except ValueError:
        return None
    return claims if isinstance(head, dict) and isinstance(claims, dict) else None


def _expiry(claims: Mapping[str, Any]) -> float:
    """When a token expires, in seconds since 1970; 0 if it does not say."""
    found = claims.get("exp")
    return found if isinstance(found, int | float) else 0.0
