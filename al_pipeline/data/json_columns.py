"""JSON objects of rows that are given column by column."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any

_encoder = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_object(values: Mapping[str, Any]) -> str:
    """A row as a JSON object with sorted keys, without blanks. Raises ValueError for NaN and infinities."""
    return _encoder.encode(values)


def json_objects(columns: Mapping[str, Sequence[Any]], rows: int) -> list[str]:
    """`json_object` of each row, (rows,). Raises ValueError also if UTF-8 cannot encode one."""
    if not columns:
        return ["{}"] * rows
    parts = [f"{encode_basestring(name)}:".replace("%", "%%") + "%s" for name in sorted(columns)]
    template = "{" + ",".join(parts) + "}"
    found = list(map(template.__mod__, zip(*(_encoded(columns[name]) for name in sorted(columns)), strict=True)))
    "".join(found).encode()
    return found


def _encoded(column: Sequence[Any]) -> list[str]:
    kinds = set(map(type, column))
    encode = _ENCODERS.get(next(iter(kinds))) if len(kinds) == 1 else None
    return list(map(encode or _encoder.encode, column))


def _encoded_number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError("not a JSON number")
    return float.__repr__(value)


_ENCODERS: Mapping[type, Callable[[Any], str]] = {
    str: encode_basestring,
    int: int.__repr__,
    float: _encoded_number,
}
"""Faster encoders of values of one type, with the same result."""
