"""Validate the cron expressions and time zones of a schedule.

Accepts less than Prefect does (no seconds, no `@hourly`, no `L`, `#` or `?`), and nothing that Prefect rejects.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class _Field(NamedTuple):
    """One of the five fields: the range of its numbers, and names for them."""

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()
    """Names of `low`, `low` + 1, and so on."""


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")),
    _Field("day of the week", 0, 7, ("sun", "mon", "tue", "wed", "thu", "fri", "sat")),
)
_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
"""The maximum number of days in each month."""
_ITEM = re.compile(r"(?:\*|([0-9A-Za-z]+)(?:-([0-9A-Za-z]+))?)(?:/([0-9]{1,3}))?")


def check_cron(text: str) -> str:
    """Return `text` if it is a cron expression that ever comes due. Raises ValueError saying what is wrong."""
    words = text.split(" ")
    if len(words) != len(_FIELDS) or not all(words):
        raise ValueError(
            "a cron expression has five fields separated by single blanks: minute, hour, day of the month, month, day "
            f"of the week, such as 0 * * * *; got {len(text.split())}"
        )
    _, _, days, months, _ = (_values(field, word) for field, word in zip(_FIELDS, words, strict=True))
    if words[4] == "*" and not any(day <= _DAYS[month - 1] for day in days for month in months):
        raise ValueError("none of its months has any of its days, so it never comes due")
    return text


_OTHER_ON_EACH_MACHINE = frozenset({"localtime", "factory", "posixrules"})
_OTHER_TREES = ("posix/", "right/")
"""Folders in a system's time zones that repeat every zone, without and with leap seconds; Prefect rejects both."""


def check_timezone(name: str) -> str:
    """Return `name` if it is a time zone that means the same on every machine. Raises ValueError saying what to write.

    Valid names are those of the tzdata package, which Prefect has on any machine, not those of this system.
    """
    zones = _zones()
    if name in zones:
        return name
    if name.lower() in _OTHER_ON_EACH_MACHINE:
        raise ValueError(
            f"{name} means a different time zone on each machine; name the zone itself, such as UTC or Europe/Berlin"
        )
    bare = name.removeprefix(_OTHER_TREES[0]).removeprefix(_OTHER_TREES[1])
    meant = {zone.lower(): zone for zone in zones}.get(bare.lower())
    if meant is not None:
        raise ValueError(f"not a name that Prefect accepts; write {meant}")
    raise ValueError("unknown time zone; names look like UTC or Europe/Berlin")


@cache
def _zones() -> frozenset[str]:
    package = find_spec("tzdata")  # importlib.resources would cost every command 10 ms
    assert package is not None and package.origin is not None, "tzdata is one of our requirements"
    names = Path(package.origin).with_name("zones").read_text(encoding="utf-8").split()
    return frozenset(name for name in names if name.lower() not in _OTHER_ON_EACH_MACHINE)


def _values(field: _Field, word: str) -> set[int]:
    """The numbers that `word` selects in a field. Raises ValueError if it is invalid."""
    found: set[int] = set()
    for item in word.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ValueError(
                f"{field.name}: {item!r} is not valid; use *, 5, 1-5, */15 or 0-30/10, separated by commas"
            )
        first, last, step = match.groups()
        if first is not None and last is None and step is not None:
            raise ValueError(
                f"{field.name}: {item!r} gives a step for a single number; */{step} steps through all numbers"
            )
        low = field.low if first is None else _number(field, first)
        high = low if first is not None and last is None else field.high if last is None else _number(field, last)
        if low > high:
            raise ValueError(f"{field.name}: {item!r} ends before it begins")
        if step is not None and not 1 <= int(step) <= field.high:
            raise ValueError(f"{field.name}: a step must be from 1 to {field.high}, got {step}")
        found |= set(range(low, high + 1, int(step or 1)))
    return found


def _number(field: _Field, word: str) -> int:
    if word.lower() in field.names:
        return field.low + field.names.index(word.lower())
    if not word.isdigit() or len(word) > 2 or not field.low <= int(word) <= field.high:
        names = f" or {field.names[0]} to {field.names[-1]}" if field.names else ""
        raise ValueError(f"{field.name}: must be from {field.low} to {field.high}{names}, got {word}")
    return int(word)
