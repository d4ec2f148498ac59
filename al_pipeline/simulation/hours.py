"""What a simulation says of the hours that answers take: the same curves over time in place of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.costs.seconds import predict
from al_pipeline.evaluation.savings import Interval, compare, fewer_labels, over_seconds
from al_pipeline.params import AnswerCost
from al_pipeline.records import RANDOM
from al_pipeline.simulation.corpus import LabeledTexts
from al_pipeline.simulation.runs import FULL, Run, parse_arm

Floats = NDArray[np.float64]


def same_seconds(seconds: float) -> AnswerCost:
    """The model by which every answer takes this long."""
    return AnswerCost(base=float(np.log(seconds)), slope=0.0, length=0.0, shortest=0.0, longest=0.0)


def answer_seconds(texts: LabeledTexts, cost: AnswerCost) -> Floats:
    """The expected seconds (n,) of an answer to each text, whose class is the true one."""
    lengths = np.array([len(item.text) for item in texts.items], np.float64)
    return predict(cost, lengths, np.eye(len(texts.classes))[texts.truth], texts.classes)


def hours_figures(
    texts: LabeledTexts,
    cost: AnswerCost,
    arms: Sequence[str],
    seeds: Sequence[int],
    found: Mapping[Run, Mapping[str, Any]],
    metric: str,
) -> dict[str, Any]:
    """The key `hours` of `result.json`: by strategy and share of the full-data score.

    `needed`: the hours until the mean curve reaches the score. `savings`: those of random sampling divided by the
    strategy's, `fewer`: those of random sampling minus the strategy's, each with its 95 % interval over resampled
    seeds. `answer_seconds`: the mean of an answer to a text of the corpus. `found`: the runs, each on its own budgets.
    Empty if the runs share no span of time.
    """
    each = answer_seconds(texts, cost)
    took = {arm: [_took(found[arm, seed], each, parse_arm(arm)[1]) for seed in seeds] for arm in arms}
    scores = {arm: [_floats(found[arm, seed][metric]) for seed in seeds] for arm in arms}
    try:
        grid, tables = over_seconds(scores, took)
    except ValueError:
        return {}
    full = _floats([found[FULL, seed][metric] for seed in seeds])
    told = compare(grid.tolist(), tables, full, np.random.default_rng(0)).arms
    needed, savings, fewer = {}, {}, {}
    for arm in arms:
        by_share = told[arm].savings
        needed[arm] = {str(share): _hours(one.labels) for share, one in by_share.items()}
        if arm != RANDOM:
            savings[arm] = {str(share): _row(one.saving) for share, one in by_share.items()}
            less = fewer_labels(grid.tolist(), tables[arm], tables[RANDOM], full, np.random.default_rng(0))
            fewer[arm] = {str(share): [_hours(end) for end in _row(one)] for share, one in less.items()}
    return {"hours": {"answer_seconds": float(each.mean()), "needed": needed, "savings": savings, "fewer": fewer}}


def _took(row: Mapping[str, Any], each: Floats, people: int) -> Floats:
    """The seconds (rounds,) that all answers up to each round took."""
    return np.cumsum([people * float(each[asked].sum()) for asked in row["asked"]])


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600


def _row(interval: Interval) -> list[float | None]:
    return [interval.value, interval.low, interval.high]
