"""The time of an answer, and the rule that caps it: a task may stay on a screen for hours while nobody works."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

IDLE = 10.0
"""An answer counts for at most this many times the median of all answers and skips: the rest of its time was idle."""


def capped(seconds: Floats) -> tuple[Floats, float | None]:
    """The times (n,) without those that are no times, at most IDLE times their median; and that cap.

    NaN where a time is not known, not finite, zero or negative. The cap is None if no time is left.
    """
    seconds = np.where(np.isfinite(seconds) & (seconds > 0), seconds, np.nan)
    if np.isnan(seconds).all():
        return seconds, None
    cap = IDLE * float(np.nanmedian(seconds))
    return np.minimum(seconds, cap), cap


def as_array(seconds: Sequence[float | None]) -> Floats:
    """Times as an array (n,), NaN for those that are not known."""
    return np.array([np.nan if one is None else one for one in seconds], dtype=np.float64)


def filled(seconds: Sequence[float | None]) -> list[float] | None:
    """The capped times, with the mean of the known ones for the others; None if none is known."""
    times, cap = capped(as_array(seconds))
    if cap is None:
        return None
    known = np.isfinite(times)
    found: list[float] = np.where(known, times, np.sort(times[known]).mean()).tolist()
    return found
