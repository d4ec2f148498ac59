"""Acquisition functions: class probabilities (n, C) -> one score per item (n,), higher = ask sooner."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Acquisition = Callable[[ArrayLike], Floats]

_SUM_TOLERANCE = 1e-3
"""How far a row may be from 1: wide enough for bfloat16 softmax sums, far too narrow for logits."""


def check_proba(proba: ArrayLike) -> Floats:
    """`proba` as float64 of shape (n, C), C >= 2, rows distributions. Raises ValueError naming the first bad row."""
    checked = np.asarray(proba, dtype=np.float64)
    if checked.ndim != 2 or checked.shape[1] < 2:
        raise ValueError(f"probabilities must have shape (items, 2 or more classes), got {checked.shape}")
    finite = np.isfinite(checked).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"row {row} of the probabilities is not finite: {checked[row].tolist()}")
    proper = (checked >= 0).all(axis=1) & (np.abs(checked.sum(axis=1) - 1) <= _SUM_TOLERANCE)
    if not proper.all():
        row = int(np.argmin(proper))
        raise ValueError(f"row {row} of the probabilities must be >= 0 and sum to 1, got {checked[row].tolist()}")
    return checked


def least_confidence(proba: ArrayLike) -> Floats:
    """Least confidence: `1 - p(most likely class)`, from 0 to 1 - 1/C (Lewis & Gale 1994, arXiv:cmp-lg/9407020)."""
    return np.asarray(1.0 - check_proba(proba).max(axis=1))


def margin(proba: ArrayLike) -> Floats:
    """Margin: `1 - (p(first class) - p(second class))`, from 0 to 1 (Scheffer, Decomain & Wrobel 2001)."""
    ordered = np.partition(check_proba(proba), -2, axis=1)
    return np.asarray(1.0 - (ordered[:, -1] - ordered[:, -2]))


def entropy(proba: ArrayLike) -> Floats:
    """Entropy of the predicted distribution in nats, from 0 to log C (Shannon 1948; Settles 2009, section 3.1)."""
    checked = np.sort(check_proba(proba), axis=1)  # one order of summation: equal distributions, equal bits
    logs = np.log(checked, out=np.zeros_like(checked), where=checked > 0)
    return np.asarray(-(checked * logs).sum(axis=1) + 0.0)


ACQUISITION: dict[str, Acquisition] = {
    "least_confidence": least_confidence,
    "margin": margin,
    "entropy": entropy,
}
"""Every acquisition function, by the name that `params.yaml` uses."""
