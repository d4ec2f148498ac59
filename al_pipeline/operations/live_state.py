"""The state of `al live`, from what it knows after a step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime

from al_pipeline.data.pool import fetch
from al_pipeline.evaluation.online import Forecast, running_accuracy
from al_pipeline.live.asker import STABLE
from al_pipeline.live.state import (
    RUNNING,
    TEST,
    ClassState,
    CurvePoint,
    Interval,
    LiveState,
    PersonState,
    QueueEntry,
    StopProposal,
)
from al_pipeline.operations.connect import project_page
from al_pipeline.operations.live import Live
from al_pipeline.records import RANDOM_SLICE, Event, PlannedTask
from al_pipeline.reporting.html import excerpt
from al_pipeline.workspace.layout import Layout

EXCERPT = 160
"""Characters of a question's text that are shown."""
_RATE_SECONDS, _LEAST_SECONDS = 600.0, 60.0
"""The time over which labels per hour are measured."""
_MOST_POINTS = 60
"""Points of the open round's running accuracy."""

NOTHING = StopProposal(None, False, "there are too few labels to tell")


class LiveStates:
    """The states of `al live`. Texts of open questions are read once, and the curve when a label has come."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._curve: tuple[object, tuple[CurvePoint, ...]] = (None, ())

    def now(self, live: Live, page: str | None = None) -> LiveState:
        """What `al live` shows of itself now; `page`: the address of its page."""
        now, found, asker = live.now(), live.round, live.asker
        people = live.people
        forecasts = _forecasts(live)
        return LiveState(
            time=now,
            started=live.started,
            pid=os.getpid(),
            workspace=live.workspace.layout.root.name,
            health=live.health,
            waits_for=live.waits_for if found is None else "",  # in an open round it is as old as the last tick
            round=None if found is None else found.number,
            round_size=0 if found is None else len(found.batch),
            settled=0 if found is None else found.settled,
            labels=0 if found is None else len(found.fold.labels),
            test_labels=0 if found is None else len(found.fold.tests),
            labels_per_hour=0.0 if found is None else labels_per_hour(found.events, now),
            running=_running(forecasts, live.workspace.params.evaluate.confidence),
            curve=self._curve_of(live, forecasts),
            classes=tuple(
                ClassState(one.name, one.labels, one.predicted, one.uncertainty)
                for one in (asker.class_figures() if asker is not None else ())
            ),
            people=tuple(
                PersonState(who, live.answers_of.get(who, 0), max(0.0, now - last), who in people.present)
                for who, last in sorted(live.seen.items())
            ),
            stop=_stop(live),
            queue=self._queue(live, now),
            model="" if asker is None else asker.digest,
            model_labels=0 if asker is None else asker.labels,
            stale=live.stale(),
            label_studio_page=project_page(live.workspace),
            page=page,
        )

    def _queue(self, live: Live, now: float) -> tuple[QueueEntry, ...]:
        """The open questions, the newest first."""
        if live.round is None:
            return ()
        open_keys = live.round.open_keys
        shown = [one for one in reversed(live.round.asked) if one.task.push_key in open_keys]
        texts = self._texts_of(live.workspace.layout, [one.task for one in shown])
        return tuple(
            QueueEntry(
                one.task.item_id, one.kind, one.model, one.events, one.task.score, max(0.0, now - one.asked_at),
                texts.get(one.task.item_id, ""), one.task.predicted, one.task.confidence,
            )
            for one in shown
        )  # fmt: skip

    def _texts_of(self, layout: Layout, tasks: Sequence[PlannedTask]) -> Mapping[str, str]:
        """The start of each text; only those of these tasks are kept."""
        known = {task.item_id: self._texts.get(task.item_id) for task in tasks}
        if missing := [item for item, text in known.items() if text is None]:
            found = fetch([layout.pool, layout.test], missing)
            known |= {item: excerpt(found[item].text, EXCERPT) if item in found else "" for item in missing}
        self._texts = {item: text or "" for item, text in known.items()}
        return self._texts

    def _curve_of(self, live: Live, forecasts: Sequence[Forecast]) -> tuple[CurvePoint, ...]:
        found = live.round
        if found is None:
            return ()
        answered = sum(one.label is not None for one in forecasts)
        key = (found.number, len(found.history.rounds), answered)
        if self._curve[0] != key:
            self._curve = (key, _curve(live, forecasts))
        return self._curve[1]


def labels_per_hour(events: Sequence[Event], now: float) -> float:
    """The labels of the last ten minutes, or since the first label if nobody had answered before, as a rate.

    `events`: as they were observed; `now`: seconds since 1970.
    """
    times: list[float] = []
    earlier = False
    for event in reversed(events):
        if event.type != "label" or not event.observed_at:
            continue
        try:
            seen = datetime.fromisoformat(event.observed_at).timestamp()
        except ValueError:
            continue
        if earlier := now - seen > _RATE_SECONDS:
            break
        times.append(seen)
    if not times:
        return 0.0
    span = _RATE_SECONDS if earlier else now - min(times)
    return 3600 * len(times) / max(_LEAST_SECONDS, span)


def _forecasts(live: Live) -> list[Forecast]:
    """The random share of all rounds, each predicted before its answer was known."""
    found = live.round
    if found is None:
        return []
    labels = found.fold.labels
    abandoned = found.history.abandoned
    return [
        Forecast(task.round, task.predicted, labels.get(task.item_id))
        for task in live.plans().values()
        if task.strategy == RANDOM_SLICE and task.predicted is not None and task.round not in abandoned
    ]


def _running(forecasts: Sequence[Forecast], confidence: float) -> Interval | None:
    measured = running_accuracy(forecasts, confidence)
    if measured is None:
        return None
    one = measured.recent if measured.recent.answered else measured.whole
    return Interval(one.accuracy, one.low, one.high, one.answered)


def _curve(live: Live, forecasts: Sequence[Forecast]) -> tuple[CurvePoint, ...]:
    """The accuracy of published rounds on the test set, and the running accuracy up to each round and answer."""
    found, confidence = live.round, live.workspace.params.evaluate.confidence
    assert found is not None
    points: list[CurvePoint] = []

    def add_running(known: Sequence[Forecast], labels: int, number: int) -> None:
        one = _running(known, confidence)
        if one is not None and one.value is not None:
            points.append(CurvePoint(labels, one.value, one.low, one.high, RUNNING, number))

    for record in found.history.rounds:
        figure, labelled = record.metrics.accuracy, record.counts.labelled
        if figure.value is not None:
            points.append(CurvePoint(labelled, figure.value, figure.low, figure.high, TEST, record.round))
        if any(one.round == record.round for one in forecasts):
            add_running([one for one in forecasts if one.round <= record.round], labelled, record.round)
    known = [one for one in forecasts if one.round < found.number]
    labels, own = found.fold.labels, []
    before = found.history.latest
    count = 0 if before is None else before.counts.labelled
    for question in found.asked:
        task = question.task
        if task.part != "pool" or (label := labels.get(task.item_id)) is None:
            continue
        count += 1
        if task.strategy == RANDOM_SLICE and task.predicted is not None:
            own.append((count, Forecast(task.round, task.predicted, label)))
    step = max(1, -(-len(own) // _MOST_POINTS))
    for end in [*range(step, len(own), step), len(own)]:
        if own:
            add_running([*known, *(one for _, one in own[:end])], own[end - 1][0], found.number)
    return tuple(points)


def _stop(live: Live) -> StopProposal:
    """Whether the predictions have become stable; a proposal, no proof: only random labels can certify."""
    agreement = None if live.asker is None else live.asker.agreement()
    if agreement is None:
        return NOTHING
    stable = agreement >= STABLE
    said = f"the model agrees with its own earlier predictions (kappa {agreement:.3f}"
    more = "further labels change little" if stable else "further labels still change it"
    return StopProposal(agreement, stable, f"{said}): {more}")
