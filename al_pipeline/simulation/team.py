"""What a simulation says of annotators who make mistakes: right labels, and what more answers per item are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.evaluation.savings import Interval, area, mean_interval
from al_pipeline.simulation.annotators import Team
from al_pipeline.simulation.runs import AGAIN, OVERLAP, Run

Floats = NDArray[np.float64]

CONFIDENCE = 0.95


def team_figures(
    team: Team, arms: Sequence[str], seeds: Sequence[int], found: Mapping[Run, Mapping[str, Any]], metric: str
) -> dict[str, Any]:
    """The key `team` of `result.json`.

    `arms`: for each the labels at the end, the share of them that is right, and the tasks of items asked before, as
    means over seeds. `gains`: for each arm with several answers per item or labels asked again, the difference of
    `metric` to the same strategy with one answer each at equal numbers of answers: of the area and at the end, paired
    by seed, with Student's interval of the mean.
    """
    rows = {
        arm: {key: _mean([found[arm, seed][key][-1] for seed in seeds]) for key in ("labels", "right", "again")}
        for arm in arms
    }
    pairs = {arm: arm.partition(AGAIN)[0].partition(OVERLAP)[0] for arm in arms}
    gains = {arm: _gain(arm, plain, seeds, found, metric) for arm, plain in pairs.items() if plain != arm}
    return {**asdict(team), "arms": rows, "gains": gains}


def _gain(
    arm: str, plain: str, seeds: Sequence[int], found: Mapping[Run, Mapping[str, Any]], metric: str
) -> dict[str, Any]:
    """The gain of an arm over `plain`, up to the last number of answers that both have."""
    budgets = np.asarray(found[plain, seeds[0]]["budgets"], np.float64)
    mine, theirs = (_table([found[name, seed][metric] for seed in seeds]) for name in (arm, plain))
    both = np.flatnonzero(np.isfinite(mine - theirs).any(axis=0))
    if not len(both):
        return {"plain": plain, "answers": 0, "area": [None] * 3, "end": [None] * 3}
    last = int(both[-1])
    areas = [area(budgets[: last + 1], curves[:, : last + 1]) for curves in (mine, theirs)]
    return {
        "plain": plain,
        "answers": int(budgets[last]),
        "area": _told(mean_interval(areas[0] - areas[1], CONFIDENCE)),
        "end": _told(mean_interval((mine - theirs)[:, last], CONFIDENCE)),
    }


def _table(rows: Sequence[Sequence[float | None]]) -> Floats:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], np.float64)


def _told(interval: Interval) -> list[float | None]:
    return [interval.value, interval.low, interval.high]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
