"""Texts whose two best classes are so close that rounding could exchange them: they are computed again, exactly.

A quantized model is fast, and its errors change a label only near the boundary of two classes. On a sample it is
measured how large they get; texts that are closer to a boundary get the probabilities of the exact model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SAFETY = 1.5
"""How many times the largest error on the sample is allowed for."""


def margins(proba: Floats) -> Floats:
    """The logarithm of the ratio of the two largest probabilities, (n,); 0 with fewer than two classes."""
    if proba.shape[1] < 2:
        return np.zeros(len(proba))
    best = np.sort(proba, axis=1)[:, -2:]
    return np.asarray(np.log(best[:, 1]) - np.log(best[:, 0]), np.float64)


def needed_margin(rough: Floats, exact: Floats) -> float:
    """The margin of `rough` probabilities (n, C) below which `exact` ones of the same texts may have another label."""
    if not rough.size or rough.shape[1] < 2:
        return 0.0
    best, second = np.argsort(-rough, axis=1, kind="stable")[:, :2].T
    rows = np.arange(len(rough))
    theirs = np.log(exact[rows, best]) - np.log(exact[rows, second])
    return float(SAFETY * np.abs(margins(rough) - theirs).max())


def refined(rough: Floats, margin: float, exact: Callable[[Sequence[int]], Floats]) -> Floats:
    """`rough` probabilities, with those of rows within `margin` replaced by what `exact` says of these rows."""
    close = np.flatnonzero(margins(rough) < margin)
    if not len(close):
        return rough
    found = rough.copy()
    found[close] = exact(close.tolist())
    return found
