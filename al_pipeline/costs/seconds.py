"""The seconds of an answer, predicted by the length of the text, the class and the annotator.

A linear model of the logarithm of the capped time, by ridge regression: log-normal times and effects of annotators are
what Settles, Craven & Friedland 2008 (Active learning with real annotation costs) and Arora, Nyberg & Rosé 2009 found.
The effects of classes and annotators are shrunk towards 0, so that few answers change little. A mean of seconds is the
exponential times the mean of the exponentials of the residuals (Duan's smearing estimate, 1983).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from al_pipeline.costs.answer_times import Floats, as_array, capped
from al_pipeline.params import AnswerCost

LEAST = 30
"""With fewer times no model is fitted: every answer is expected to take the mean."""
_SHRINK_SLOPE, _SHRINK_EFFECTS = 1.0, 4.0
"""Ridge penalties, as numbers of answers."""


class AnswerSeconds(Struct, frozen=True, kw_only=True):
    """A fitted model of the seconds of an answer."""

    cost: AnswerCost
    people: Mapping[str, float]
    """Effect of each annotator on the logarithm."""
    answers: int
    """Answers with a time that it was fitted on."""
    explained: float
    """Share of the variance of the logarithms that the model explains."""


def predict(
    cost: AnswerCost, characters: Floats, proba: Floats | None = None, classes: Sequence[str] = (), effect: float = 0.0
) -> Floats:
    """Expected seconds (n,) for texts with this many characters (n,).

    `proba` (n, C): probabilities of `classes`, over which the expectation goes; None: no class is known. `effect`: that
    of the annotator who will answer; 0: anybody.
    """
    lengths = np.clip(np.log1p(np.maximum(characters, 0)), cost.shortest, cost.longest)
    seconds = np.exp(cost.base + cost.slope * (lengths - cost.length) + effect)
    if proba is None:
        return np.asarray(seconds)
    factors = np.exp([cost.classes.get(name, 0.0) for name in classes])
    return np.asarray(seconds * (np.asarray(proba, dtype=np.float64) @ factors))


def fit_seconds(
    seconds: Sequence[float | None],
    characters: Sequence[int],
    labels: Sequence[str | None],
    annotators: Sequence[str],
) -> AnswerSeconds | None:
    """Fit the model on n answers; None with fewer than LEAST times.

    `seconds` are as Label Studio measured them: `capped` deals with negative and idle times. A label of None is a
    skip, whose time says nothing of a class. The same answers give the same model, in whatever order.
    """
    times, _ = capped(as_array(seconds))
    rows = [row for row in range(len(times)) if np.isfinite(times[row])]
    if len(rows) < LEAST:
        return None
    rows.sort(key=lambda row: (times[row], characters[row], labels[row] or "", annotators[row]))
    y, x = np.log(times[rows]), np.log1p(np.array([characters[row] for row in rows], dtype=np.float64))
    kinds = sorted({label for row in rows if (label := labels[row]) is not None})
    people = sorted({annotators[row] for row in rows})
    columns = [_members([labels[row] for row in rows], kinds), _members([annotators[row] for row in rows], people)]
    design, mean, length = np.column_stack([x - x.mean(), *columns]), float(y.mean()), float(x.mean())
    penalty = np.diag([_SHRINK_SLOPE, *[_SHRINK_EFFECTS] * (len(kinds) + len(people))])
    weights = np.linalg.solve(design.T @ design + penalty, design.T @ (y - mean))
    residuals = y - mean - design @ weights
    base = mean + float(residuals.mean())
    residuals -= residuals.mean()
    variance = float(y.var())
    effects = weights[1:].tolist()
    cost = AnswerCost(
        base=base + float(np.log(np.exp(residuals).mean())),
        slope=float(weights[0]),
        length=length,
        shortest=float(x.min()),
        longest=float(x.max()),
        classes=dict(zip(kinds, effects, strict=False)),
    )
    return AnswerSeconds(
        cost=cost,
        people=dict(zip(people, effects[len(kinds) :], strict=True)),
        answers=len(rows),
        explained=max(0.0, 1 - float(residuals.var()) / variance) if variance > 0 else 0.0,
    )


def _members(values: Sequence[str | None], names: Sequence[str]) -> NDArray[np.float64]:
    """A column for each name, with 1 where a value is it."""
    number = {name: place for place, name in enumerate(names)}
    table = np.zeros((len(values), len(names)))
    for row, value in enumerate(values):
        if value is not None:
            table[row, number[value]] = 1.0
    return table
