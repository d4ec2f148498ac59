"""Make untrusted text safe to display: without terminal control sequences, and without passwords in URLs."""

from __future__ import annotations

import re
import unicodedata

JOINERS = "\u200c\u200d"
"""Zero-width joiners: not printable, but part of words in some scripts, and of emoji."""

_TAGS = frozenset(map(chr, range(0xE0020, 0xE0080)))
"""Tag characters: parts of the flags of regions such as Scotland."""

_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://)[^\s/?#\"'<>]*@")


def storable(text: str) -> bool:
    """Whether UTF-8 can encode the text; it cannot encode a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """`text` with blanks for non-printable characters: control characters, bidi overrides, lone surrogates.

    Line feeds are kept.
    """
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def one_line(text: str) -> str:
    """`text` as a name on one line: like `printable`, but the joiners in words and emoji are kept."""
    kept = "".join(c if c.isprintable() or c in JOINERS or c in _TAGS else " " for c in text)
    return " ".join(kept.split())


def shortened(text: str, most: int) -> str:
    """At most `most` characters of `text`, ending in … if it was cut.

    Cuts between words if that costs little, and never inside a grapheme cluster.
    """
    if len(text) <= most:
        return text
    end = max(0, most - 1)
    blank = text.rfind(" ", 0, end + 1)
    if blank >= 0.6 * end:
        end = blank
    while end > 0 and _belongs_together(text, end):
        end -= 1
    return f"{text[:end].rstrip(' ,;:.-–')}…"


def _belongs_together(text: str, place: int) -> bool:
    """Whether the characters before and after `place` are displayed as one."""
    behind = text[place]
    if text[place - 1] == "\u200d" or behind in JOINERS or behind in _TAGS or "\U0001f3fb" <= behind <= "\U0001f3ff":
        return True
    if unicodedata.category(behind).startswith("M"):
        return True
    flags = re.search("[\U0001f1e6-\U0001f1ff]*$", text[:place])
    return flags is not None and len(flags[0]) % 2 == 1 and "\U0001f1e6" <= behind <= "\U0001f1ff"


def counted(number: int, noun: str) -> str:
    """`1 commit`, `2,000 commits`: a number and a noun whose plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def redact(text: str) -> str:
    """`text` with `***` for the user and password of each address in it: `https://***@host/path`."""
    return _USERINFO.sub(r"\1***@", text)


def has_password(address: str) -> bool:
    """Whether an address such as `https://user:secret@host/path` contains a password."""
    found = _USERINFO.search(address)
    return found is not None and ":" in found[0].removeprefix(found[1])


def is_web_address(address: str) -> bool:
    """Whether a page may link to an address: http or https, a host, and no user or password."""
    plain = address.isprintable() and not re.search(r"[\s\"'<>\\^`{|}]", address)
    return plain and re.match(r"(?i)https?://[^/?#@]+(?:[/?#]|$)", address) is not None and redact(address) == address


def on_this_machine(address: str) -> bool:
    """Whether an address such as `http://127.0.0.1:8080` is this machine's, so that nobody can intercept requests."""
    host = re.sub(r"^[a-z]+://", "", address.lower()).split("/")[0]
    return bool(re.fullmatch(r"(127(\.\d{1,3}){3}|localhost|\[::1\])(:\d+)?", host))


def has_tls(address: str) -> bool:
    """Whether a client of `address` must verify certificates: loading the authorities takes 25 ms of processor time."""
    return not address.startswith("http:")


def plain_form(name: str) -> str:
    """A name without differences that are hard to see: case, blanks, invisible characters, Unicode forms."""
    visible = "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFC", " ".join(visible.split()).casefold())
