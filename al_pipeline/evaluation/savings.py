"""Comparison of strategies by their learning curves: area under the curve, labels needed and saved, wins, losses.

A curve is one row of a table (seeds, budgets). All tables share the budgets and, row by row, the seeds, so that arms
are compared in pairs. Nothing is extrapolated: a target that a curve does not reach within its budget has no value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from al_pipeline.records import RANDOM

Floats = NDArray[np.float64]

SHARES = (90, 95, 98)
"""Targets, as percentages of the full-data score."""
BOOTSTRAP = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic over seeds with its interval; None if it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Saving:
    """Labels that a strategy needs for a share of the full-data score, and the ratio to those of random sampling.

    `saving`: labels of random sampling divided by those of the strategy; None if one of the two does not reach the
    score. `at_least`: the budget divided by the strategy's labels, if only the strategy reaches the score. An
    end of the interval beyond the budget is None.
    """

    labels: float | None
    random_labels: float | None
    saving: Interval
    at_least: float | None = None


@dataclass(frozen=True, slots=True)
class Arm:
    """The results of one strategy by one metric."""

    curve: tuple[Interval, ...]
    """Mean over seeds at each budget, with Student's t interval."""
    area: Interval
    """Normalised area under the learning curve (ALC), with Student's t interval over seeds."""
    gain: Interval
    """Area minus that of random sampling, paired by seed."""
    savings: Mapping[int, Saving]
    wins: Mapping[str, int]
    """Number of seeds in which its area is larger than the other strategy's."""
    below_random: tuple[int, ...]
    """Budgets at which it is significantly worse than random sampling (paired t test, Bonferroni-corrected)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of all strategies by one metric. `full`: mean score over seeds of a model with all labels."""

    budgets: tuple[int, ...]
    seeds: int
    full: Interval
    arms: Mapping[str, Arm]


def compare(
    budgets: Sequence[int],
    curves: Mapping[str, Floats],
    full: Floats,
    rng: Generator,
    confidence: float = 0.95,
    bootstrap: int = BOOTSTRAP,
    shares: Sequence[int] = SHARES,
) -> Comparison:
    """Compare strategies by their `curves` (seeds, budgets) and the scores `full` (seeds,) with all labels.

    NaN marks an undefined score; means omit it. `bootstrap`: number of resamples of the seeds, the same for every arm
    (Efron & Tibshirani 1993, chapter 13). Raises ValueError on tables of unequal shape, or without a random arm.
    """
    if RANDOM not in curves:
        raise ValueError("savings are relative to random sampling, but `curves` has no random arm")
    shapes = {table.shape for table in curves.values()} | {(len(full), len(budgets))}
    if len(shapes) > 1:
        raise ValueError(f"curves must have the same shape, got {sorted(shapes)}")
    points = np.asarray(budgets, dtype=np.float64)
    draws = rng.integers(0, len(full), size=(bootstrap, len(full)))
    areas = {name: area(points, table) for name, table in curves.items()}
    arms = {}
    for name, table in curves.items():
        against = table - curves[RANDOM]
        arms[name] = Arm(
            curve=tuple(mean_interval(table[:, column], confidence) for column in range(len(points))),
            area=mean_interval(areas[name], confidence),
            gain=mean_interval(areas[name] - areas[RANDOM], confidence),
            savings={
                share: _saving(points, table, curves[RANDOM], full, share / 100, draws, confidence) for share in shares
            },
            wins={other: int((areas[name] > areas[other]).sum()) for other in curves if other != name},
            below_random=tuple(
                int(budget)
                for budget, column in zip(budgets, against.T, strict=True)
                if name != RANDOM and _surely_below(column, 1 - (1 - confidence) / len(points))
            ),
        )
    return Comparison(tuple(budgets), len(full), mean_interval(full, confidence), arms)


def area(budgets: Floats, curves: Floats) -> Floats:
    """Normalised area under the learning curve (ALC), (seeds,), of curves (seeds, budgets), by the trapezoidal rule.

    An undefined point is interpolated between its neighbours.
    """
    heights = np.full(len(curves), np.nan)
    for row, curve in enumerate(curves):
        known = np.isfinite(curve)
        x, y = budgets[known], curve[known]
        if len(x) > 1:
            heights[row] = float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))
        elif len(x) == 1:
            heights[row] = float(y[0])
    return heights


def labels_needed(budgets: Floats, curves: Floats, targets: Floats) -> Floats:
    """The labels at which curves (b, budgets) first reach their targets (b,), linearly interpolated; infinity: never.

    A curve that reaches its target at its first budget needs that many: smaller budgets were not measured.
    """
    filled = np.where(np.isfinite(curves), curves, -np.inf)
    there = filled >= targets[:, None]
    first = np.where(there.any(axis=1), there.argmax(axis=1), -1)
    found = np.full(len(curves), np.inf)
    for row in np.flatnonzero(first >= 0):
        column = int(first[row])
        found[row] = budgets[column]
        if column and np.isfinite(filled[row, column - 1]):
            low, high = filled[row, column - 1], filled[row, column]
            step = budgets[column] - budgets[column - 1]
            found[row] -= step * (high - targets[row]) / (high - low)
    return found


def fewer_labels(
    budgets: Sequence[int],
    own: Floats,
    other: Floats,
    full: Floats,
    rng: Generator,
    confidence: float = 0.95,
    bootstrap: int = BOOTSTRAP,
    shares: Sequence[int] = SHARES,
) -> dict[int, Interval]:
    """How many labels fewer `own` needs than `other` for each share of the full-data score, with percentile intervals.

    Both (seeds, budgets), resampled by the same seeds. The value is None if one of them does not reach the score, an
    end of the interval if it lies beyond the budget.
    """
    points = np.asarray(budgets, dtype=np.float64)
    draws = rng.integers(0, len(full), size=(bootstrap, len(full)))
    found = {}
    for share in shares:
        mine, theirs = (float(_needed(points, table, full, share / 100, None)[0]) for table in (own, other))
        value = None if np.isinf(mine) or np.isinf(theirs) else theirs - mine
        if value is None or len(full) < 2:
            found[share] = Interval(value)
            continue
        drawn = [_needed(points, table, full, share / 100, draws) for table in (other, own)]
        with np.errstate(invalid="ignore"):
            differences = np.where(np.isinf(drawn[0]) & np.isinf(drawn[1]), 0.0, drawn[0] - drawn[1])
        low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2], method="nearest")
        found[share] = Interval(value, *(None if np.isinf(end) else float(end) for end in (low, high)))
    return found


def over_seconds(
    curves: Mapping[str, Sequence[Floats]], seconds: Mapping[str, Sequence[Floats]], points: int = 100
) -> tuple[Floats, dict[str, Floats]]:
    """All curves over the seconds that their labels took: a grid (points,), and tables (seeds, points) by arm.

    `curves` and `seconds`: for each arm a row for each seed, of scores and of the seconds up to each score; rows may
    have different lengths. The grid is what all of them cover, and scores are interpolated linearly. With the grid for
    budgets, `compare` then compares seconds in place of labels. Raises ValueError if nothing is covered by all.
    """
    rows = [np.asarray(row, dtype=np.float64) for arm in seconds.values() for row in arm]
    first, last = max(row[0] for row in rows), min(row[-1] for row in rows)
    if not first < last:
        raise ValueError(f"no number of seconds is covered by all curves: they share {first:.0f} to {last:.0f}")
    grid = np.linspace(first, last, points)
    return grid, {
        name: np.array([np.interp(grid, time, row) for time, row in zip(seconds[name], arm, strict=True)])
        for name, arm in curves.items()
    }


def mean_interval(values: Floats, confidence: float) -> Interval:
    """The mean of the defined values, with Student's t interval; no interval from a single value."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return Interval(None)
    mean = float(known.mean())
    if len(known) < 2:
        return Interval(mean)
    half = _t((1 + confidence) / 2, len(known) - 1) * float(known.std(ddof=1)) / np.sqrt(len(known))
    return Interval(mean, mean - float(half), mean + float(half))


def _saving(
    budgets: Floats, own: Floats, random: Floats, full: Floats, share: float, draws: Any, confidence: float
) -> Saving:
    mine, other = (_needed(budgets, table, full, share, None) for table in (own, random))
    labels, random_labels = (None if np.isinf(needed[0]) else float(needed[0]) for needed in (mine, other))
    ratios = _ratio(_needed(budgets, own, full, share, draws), _needed(budgets, random, full, share, draws))
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2], method="nearest")
    value = None if labels is None or random_labels is None else random_labels / labels
    if value is None or len(full) < 2:
        interval = Interval(value)
    else:
        interval = Interval(value, None if low == 0 else float(low), None if np.isinf(high) else float(high))
    at_least = float(budgets[-1]) / labels if labels is not None and random_labels is None else None
    return Saving(labels, random_labels, interval, at_least)


def _needed(budgets: Floats, table: Floats, full: Floats, share: float, draws: Any) -> Floats:
    """Number of labels with which the mean curve of each resample of seeds (b, seeds) reaches the target score."""
    if draws is None:
        draws = np.arange(len(full))[None, :]
    return labels_needed(budgets, _mean(table[draws]), share * _mean(full[draws]))


def _mean(values: Floats) -> Floats:
    """Means (b,) over the seeds, axis 1, of the defined values; NaN if there are none."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def _ratio(own: Floats, random: Floats) -> Floats:
    """Labels of random sampling over `own`: infinite if only random sampling never reaches the target, 0 if only
    `own` never does, 1 if neither does.
    """
    neither = np.isinf(own) & np.isinf(random)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(neither, 1.0, random / own), dtype=np.float64)


def _surely_below(differences: Floats, confidence: float) -> bool:
    """Whether the mean of the paired differences is below zero, by a two-sided t interval at this confidence."""
    found = mean_interval(differences, confidence)
    return found.high is not None and found.high < 0


def _t(probability: float, freedom: int) -> float:
    from scipy.special import stdtrit  # type: ignore[import-untyped, unused-ignore]

    return float(stdtrit(freedom, probability))
