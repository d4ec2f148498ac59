"""What a further round brings: the next score of a learning curve, with its interval.

The error falls as an inverse power of the number of labels, `a + b n^-c` (Cortes et al. 1993, Learning curves:
asymptotic values and rate of convergence; Figueroa et al. 2012, Predicting sample size required for classification
performance). For each exponent of a grid, a and b are those of a linear regression, with its Student's t prediction;
the grid is weighed by how likely it makes the scores, and curves that rise with labels (b < 0) are left out. So the
interval holds the noise of the next measurement, the uncertainty of the curve and that of its form. The scores of all
rounds are measured on one test set, so what they share does not enter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

LEAST_ROUNDS = 3
"""With fewer scores there is no forecast."""
NEWEST = 12
"""The number of newest scores that are used: a power law holds over part of a curve."""
_EXPONENTS = np.array([0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5])
_DRAWS = 2000
_FREEDOM, _NOISE = 3.0, 0.01
"""The prior of the noise of a score: so many scores' worth of a standard deviation of `_NOISE`."""
_SEED = 20_081_218


class Forecast(Struct, frozen=True):
    """The expected next score and its interval."""

    labels: int
    """The number of labels after the further round."""
    value: float
    low: float
    high: float
    rounds: int
    """Number of scores that it follows from."""


def forecast(
    labels: Sequence[int],
    scores: Sequence[float],
    more: int,
    noise: float | None = None,
    confidence: float = 0.95,
) -> Forecast | None:
    """Forecast the score after `more` labels, from the scores (n,) at numbers of labels (n,), oldest first.

    `noise`: the standard deviation of a score due to its test set, if it is known; it scales the prior, so that a small
    test set gives a wide interval after few rounds. Scores lie between 0 and 1. None with fewer than LEAST_ROUNDS
    scores at different numbers of labels. Equal scores give an equal forecast.
    """
    newest: dict[int, float] = {}
    for count, score in zip(labels, scores, strict=True):
        if count > 0 and np.isfinite(score):
            newest.pop(count, None)
            newest[count] = float(score)  # a repeated round replaces the score
    rows = sorted(newest.items())[-NEWEST:]
    if len(rows) < LEAST_ROUNDS or more <= 0:
        return None
    counts, errors = np.array([row[0] for row in rows], float), 1 - np.array([row[1] for row in rows])
    target = int(counts[-1]) + more
    draws = 1 - _predicted(counts, errors, float(target), _NOISE if noise is None else max(noise / 2, 1e-4))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(np.median(draws))
    return Forecast(target, value, float(low), float(high), len(rows))


def _predicted(
    counts: NDArray[np.float64], errors: NDArray[np.float64], target: float, noise: float
) -> NDArray[np.float64]:
    """Draws of the next error."""
    rng = np.random.default_rng(_SEED)
    parts, logs = [], []
    for exponent in _EXPONENTS:
        x = (counts / target) ** -exponent
        found = _regression(x, errors, noise, rng)
        if found is not None:
            parts.append(found[0])
            logs.append(found[1])
    if not parts:  # every curve rises with labels: the next error is like the newest ones
        spread = np.sqrt((errors.var() * len(errors) + _FREEDOM * noise**2) / (len(errors) + _FREEDOM))
        return np.asarray(np.clip(errors[-3:].mean() + spread * rng.standard_t(len(errors), _DRAWS), 0, 1))
    weights = np.exp(np.array(logs) - max(logs))
    share = np.floor(weights / weights.sum() * _DRAWS).astype(int)
    share[int(np.argmax(weights))] += _DRAWS - share.sum()
    return np.clip(np.concatenate([part[:size] for part, size in zip(parts, share, strict=True)]), 0, 1)


def _regression(
    x: NDArray[np.float64], y: NDArray[np.float64], noise: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], float] | None:
    """Draws of the next y, at x = 1 of a line with a slope above 0, and its log-likelihood; None without such a slope.

    Conjugate normal and inverse gamma priors: flat for the line, `_FREEDOM` scores of standard deviation `noise`.
    """
    design = np.column_stack([np.ones_like(x), x])
    gram = design.T @ design + np.diag([1e-9, 1e-6])
    inverse = np.linalg.inv(gram)
    weights = inverse @ design.T @ y
    residual = float(((y - design @ weights) ** 2).sum())
    freedom = _FREEDOM + max(0, len(y) - 2)
    scale = residual + _FREEDOM * noise**2
    variances = scale / rng.chisquare(freedom, _DRAWS)
    root = np.linalg.cholesky(inverse)
    lines = weights + (rng.standard_normal((_DRAWS, 2)) @ root.T) * np.sqrt(variances)[:, None]
    y_next = lines.sum(axis=1) + np.sqrt(variances) * rng.standard_normal(_DRAWS)
    falling = lines[:, 1] >= 0
    if falling.sum() < _DRAWS // 20:
        return None
    kept = y_next[falling]
    log_likelihood = -freedom / 2 * np.log(scale) - 0.5 * np.linalg.slogdet(gram)[1] + np.log(falling.mean())
    return np.resize(kept, _DRAWS), float(log_likelihood)
