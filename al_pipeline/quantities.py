"""Sizes and durations in words."""

from __future__ import annotations


def format_size(count: int) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def format_duration(seconds: float) -> str:
    """A time in days, hours, minutes or seconds, of at least two of them."""
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
