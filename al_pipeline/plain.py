"""Text of others, fit to be shown: nothing in it steers a terminal, and no address in it tells a password."""

from __future__ import annotations

import re

_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://)[^\s/?#\"'<>]*@")


def printable(text: str) -> str:
    """`text` with blanks for whatever is not printed but obeyed: control sequences, bidi overrides, half characters.

    Line feeds stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def redact(text: str) -> str:
    """`text` with `***` for the user and password of each address in it: `https://***@host/path`."""
    return _USERINFO.sub(r"\1***@", text)


def has_password(address: str) -> bool:
    """Whether an address such as `https://user:secret@host/path` holds more than the name of a user."""
    found = _USERINFO.search(address)
    return found is not None and ":" in found[0].removeprefix(found[1])


def on_this_machine(address: str) -> bool:
    """Whether an address such as `http://127.0.0.1:8080` leads to this machine, so that nobody listens on the way."""
    host = re.sub(r"^[a-z]+://", "", address.lower()).split("/")[0]
    return bool(re.fullmatch(r"(127(\.\d{1,3}){3}|localhost|\[::1\])(:\d+)?", host))
