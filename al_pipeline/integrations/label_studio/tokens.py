"""Label Studio's two kinds of token, and the header that says who we are. Knows no HTTP library: it is given how to
post.

A legacy token is sent as it is. A personal access token is a JSON Web Token, which is exchanged for an access token of
a few minutes.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

Post = Callable[[str, Mapping[str, str]], Any]
"""Sends a JSON body to a path of the server; what its reply holds."""

_REFRESH = "api/token/refresh/"


class TokenExpired(Exception):
    """A personal access token has ended, or never said when it would: the server would refuse it."""


class Authorization:
    """The `Authorization` header for `token`. An access token is kept until it ends."""

    def __init__(self, token: str, post: Post) -> None:
        self._token = token
        self._post = post
        self._access = ""
        self._access_until = 0.0

    def header(self) -> dict[str, str]:
        """The header of a request that is sent now.

        Raises TokenExpired, and TypeError or KeyError for a reply that holds no access token.
        """
        claims = _claims(self._token)
        if claims is None:
            return {"Authorization": f"Token {self._token}"}
        if _expiry(claims) <= time.time():
            raise TokenExpired("the token has expired, or does not say when it will")
        if not self._access or self._access_until <= time.time():
            access = self._post(_REFRESH, {"refresh": self._token})["access"]
            if not isinstance(access, str) or not access.isascii() or not access.isprintable():
                raise TypeError("no access token")
            self._access, self._access_until = access, _expiry(_claims(access) or {})
        return {"Authorization": f"Bearer {self._access}"}


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
