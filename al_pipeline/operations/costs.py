"""What answers have cost, what the budget leaves, and what a further round is expected to bring. Reads only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from al_pipeline.annotation.active_events import active
from al_pipeline.data.ledger import read_events, signature
from al_pipeline.data.pool import fetch
from al_pipeline.operations.counting import counted_events
from al_pipeline.operations.history import History
from al_pipeline.params import AnswerCost, Budget, Params
from al_pipeline.records import Event
from al_pipeline.rounds.manifests import Cost, Outlook, RoundRecord
from al_pipeline.workspace.layout import Layout

if TYPE_CHECKING:  # numpy, which most ticks and `al status` do not need
    from al_pipeline.costs.budget import Spent, Use
    from al_pipeline.quality.answers import Given

_FITTED = 5000
"""The number of newest answers that the prediction of seconds is fitted on."""


def spent_so_far(layout: Layout) -> Spent:
    """What all answers that count have cost, those in the inbox included."""
    return _spent(signature(layout.events, layout.inbox_events), layout)


@lru_cache(maxsize=1)
def _spent(_events: tuple[tuple[str, int, int], ...], layout: Layout) -> Spent:
    """Kept for the next call with the same events, whose `signature` is given: a tick asks before each of its steps."""
    return _spent_of([one for one, _ in _answers(layout)])


def _answers(layout: Layout, *, closed: bool = False, coming: Sequence[Event] = ()) -> Iterator[tuple[Given, bool]]:
    """The vote of each annotator on each item, and whether it is about the pool; `closed`: without the inbox.

    `coming`: events that the ledger is about to get.
    """
    from al_pipeline.operations.answers import answers_given

    folders = [layout.events] if closed else [layout.events, layout.inbox_events]
    counted = active([*read_events(*folders), *coming]) if coming else counted_events(*folders).events
    parts = {event.item_id: event.part for event in counted}
    return ((given, parts.get(given.item) == "pool") for given, _ in answers_given(counted))


def _spent_of(answers: Sequence[Given]) -> Spent:
    from al_pipeline.costs.budget import spent

    return spent([one.seconds for one in answers], [one.label is None for one in answers])


def budget_uses(layout: Layout, budget: Budget) -> tuple[Use, ...]:
    """The limits of the budget with what is spent; none without a budget, which is found out without an import."""
    if not budget.is_set:
        return ()
    from al_pipeline.costs.budget import uses

    return uses(budget, spent_so_far(layout))


def budget_reached(layout: Layout, budget: Budget) -> str:
    """Which limits of the budget are reached, as a sentence; empty if none is."""
    if not budget.is_set:
        return ""
    from al_pipeline.costs.budget import exhausted

    return exhausted(budget, spent_so_far(layout))


def room_in_budget(layout: Layout, budget: Budget) -> int | None:
    """How many more answers the budget has room for; None: no limit is known."""
    if not budget.is_set:
        return None
    from al_pipeline.costs.budget import answers_left

    return answers_left(budget, spent_so_far(layout))


def cost_of_round(layout: Layout, drawn: Collection[str]) -> Cost:
    """What the answers in the ledger have cost. `drawn`: the items of the pool that were drawn at random."""
    from al_pipeline.costs.answer_times import filled

    found = list(_answers(layout, closed=True))
    cost, times = _spent_of([one for one, _ in found]), filled([one.seconds for one, _ in found])
    if times is None:
        return Cost(labels=cost.labels, answers=cost.answers, timed=cost.timed)
    random = set(drawn)
    of_pool = [(one, time) for time, (one, pool) in zip(times, found, strict=True) if pool]
    of_random = [(one, time) for one, time in of_pool if one.item in random]
    items = {one.item for one, _ in of_random if one.label is not None}
    return Cost(
        labels=cost.labels,
        answers=cost.answers,
        timed=cost.timed,
        seconds=cost.seconds,
        pool_seconds=sum(time for _, time in of_pool),
        random_seconds=sum(time for _, time in of_random) / len(items) if items else None,
    )


def answer_cost(layout: Layout, coming: Sequence[Event] = ()) -> AnswerCost | None:
    """The expected seconds of an answer by length and class, from the newest answers; None if too few have a time.

    `coming`: events of the interventions that the close carries out, so that a close that was killed after it appended
    them finds the same.
    """
    from al_pipeline.costs.seconds import fit_seconds

    timed = [one for one, _ in _answers(layout, coming=coming) if one.seconds is not None]
    timed = sorted(timed, key=lambda one: (one.round, one.item, one.annotator))[-_FITTED:]
    items = fetch([layout.pool, layout.test], sorted({one.item for one in timed}))
    timed = [one for one in timed if one.item in items]
    fitted = fit_seconds(
        [one.seconds for one in timed],
        [len(items[one.item].text) for one in timed],
        [one.label for one in timed],
        [one.annotator for one in timed],
    )
    return None if fitted is None else fitted.cost


def outlook(history: History, record: RoundRecord, params: Params) -> Outlook | None:
    """The forecast of the round after `record`, from its test score and those of the rounds before it.

    Rounds that were rolled back, had more labels or other classes are no part of the curve. Without scores on the test
    set it follows the running accuracy. None with too few of both.
    """
    classes = record.params.schema_.labels
    abandoned = history.abandoned
    before = [one for one in history.rounds if one.round not in abandoned and one.params.schema_.labels == classes]
    return outlook_of([*before, record], ("macro-F1", "running accuracy"), params)


def outlook_of(rounds: Sequence[RoundRecord], metrics: Sequence[str], params: Params) -> Outlook | None:
    """The forecast of the round after the newest of `rounds` (oldest first), by the first metric that has one."""
    from statistics import NormalDist

    from al_pipeline.costs.forecast import forecast

    confidence, most = params.evaluate.confidence, rounds[-1].counts.labelled
    for metric in metrics:
        points = [point for one in rounds if (point := _point(one, metric)) is not None]
        points = [point for point in points if point[0] <= most]
        labels, scores, widths = zip(*points, strict=True) if points else ((), (), ())
        ends = 2 * NormalDist().inv_cdf((1 + confidence) / 2)
        noise = widths[-1] / ends if widths and widths[-1] else None
        found = forecast(labels, scores, params.select.batch_size, noise, confidence)
        if found is not None and points[-1][0] == most:
            return Outlook(
                metric=metric,
                labels=found.labels,
                now=scores[-1],
                value=found.value,
                low=found.low,
                high=found.high,
                rounds=found.rounds,
                confidence=confidence,
            )
    return None


def _point(record: RoundRecord, metric: str) -> tuple[int, float, float] | None:
    """Labels, score, and width of its interval (0: it has none)."""
    if metric in ("macro-F1", "accuracy"):
        estimate = record.metrics.macro_f1 if metric == "macro-F1" else record.metrics.accuracy
        value, low, high = estimate.value, estimate.low, estimate.high
    elif record.running is not None:
        recent = record.running.recent
        value, low, high = recent.accuracy, recent.low, recent.high
    else:
        return None
    if value is None or not 0 <= value <= 1:
        return None
    return record.counts.labelled, value, 0.0 if low is None or high is None else high - low
