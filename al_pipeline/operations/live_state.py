"""The state of `al live`, from what it knows after a step."""

from __future__ import annotations

import os

from al_pipeline.evaluation.online import Forecast, running_accuracy
from al_pipeline.live.asker import STABLE
from al_pipeline.live.state import (
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
from al_pipeline.records import RANDOM_SLICE

NOTHING = StopProposal(None, False, "there are too few labels to tell")


def state_of(live: Live, page: str | None = None) -> LiveState:
    """What `al live` shows of itself now."""
    now, found, asker = live.now(), live.round, live.asker
    people = live.people
    running = _running(live)
    return LiveState(
        time=now,
        started=live.started,
        pid=os.getpid(),
        workspace=live.workspace.layout.root.name,
        health=live.health,
        waits_for=live.waits_for,
        round=None if found is None else found.number,
        round_size=0 if found is None else len(found.batch),
        settled=0 if found is None else found.settled,
        labels=0 if found is None else len(found.labels),
        test_labels=0 if found is None else len(found.tests),
        labels_per_hour=3600 * live.answers_per_second(),
        running=running,
        curve=_curve(live, running),
        classes=tuple(
            ClassState(one.name, one.labels, one.predicted, one.uncertainty)
            for one in (asker.class_figures() if asker is not None else ())
        ),
        people=tuple(
            PersonState(who, live.answers_of.get(who, 0), max(0.0, now - last), who in people.present)
            for who, last in sorted(live.seen.items())
        ),
        stop=_stop(live),
        queue=_queue(live, now),
        model="" if asker is None else asker.digest,
        model_labels=0 if asker is None else asker.labels,
        stale=live.stale(),
        label_studio_page=project_page(live.workspace),
        page=page,
    )


def _queue(live: Live, now: float) -> tuple[QueueEntry, ...]:
    """The open questions, the newest first."""
    if live.round is None:
        return ()
    open_keys = live.round.open_keys
    return tuple(
        QueueEntry(one.task.item_id, one.kind, one.model, one.events, one.task.score, max(0.0, now - one.asked_at))
        for one in reversed(live.round.asked)
        if one.task.push_key in open_keys
    )


def _running(live: Live) -> Interval | None:
    """The running accuracy: on the random share of all rounds, each predicted before its answer was known."""
    found = live.round
    if found is None:
        return None
    labels = {row.item_id: row.label for row in found.labels}
    forecasts = [
        Forecast(task.round, task.predicted, labels.get(task.item_id))
        for task in live.plans().values()
        if task.strategy == RANDOM_SLICE and task.predicted is not None and task.round not in found.history.abandoned
    ]
    measured = running_accuracy(forecasts, live.workspace.params.evaluate.confidence)
    if measured is None:
        return None
    one = measured.recent if measured.recent.answered else measured.whole
    return Interval(one.accuracy, one.low, one.high, one.answered)


def _curve(live: Live, running: Interval | None) -> tuple[CurvePoint, ...]:
    """The accuracy of published rounds on the test set, and the open round's running accuracy."""
    found = live.round
    if found is None:
        return ()
    points = []
    for record in found.history.rounds:
        figure = record.metrics.accuracy
        if figure.value is not None:
            labelled = record.counts.labelled
            points.append(CurvePoint(labelled, figure.value, figure.low, figure.high, "test accuracy", record.round))
    if running is not None and running.value is not None:
        here = (len(found.labels), running.value, running.low, running.high, "running accuracy", found.number)
        points.append(CurvePoint(*here))
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
