"""The report of a round, rendered on demand from what is published."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from al_pipeline.annotation.aggregation import Standing, active, fold, people, skips, standing, times_asked
from al_pipeline.cron import check_timezone
from al_pipeline.data.ledger import read_events, read_refused, still_refused
from al_pipeline.data.outputs import Predictions, parse_predictions
from al_pipeline.data.pool import fetch
from al_pipeline.errors import NothingToDo
from al_pipeline.files import write_text
from al_pipeline.integrations.git import Git
from al_pipeline.operations.connect import task_pages
from al_pipeline.operations.history import History, events_known, labels_saved_by, read_history, read_plan
from al_pipeline.operations.status import status
from al_pipeline.records import Event, PlannedTask, round_name
from al_pipeline.reporting.page import (
    Answers,
    AskedItem,
    Histogram,
    LabelMix,
    Mistake,
    PoolCounts,
    ReportData,
    RoundRow,
    render,
)
from al_pipeline.rounds.manifests import RoundRecord, parse_histogram
from al_pipeline.workspace.workspace import Workspace

MISTAKES = 25


def write_report(workspace: Workspace, number: int | None = None) -> Path:
    """Render the report of round `number` (default: the latest published) to `reports/`; returns its path."""
    data = report_data(workspace, number)
    path = workspace.layout.reports / f"{round_name(data.round)}.html"
    write_text(path, render(data))
    return path


def report_data(workspace: Workspace, number: int | None = None) -> ReportData:
    """What the report of a round says. Raises NothingToDo where it is not published."""
    layout = workspace.layout
    git = Git(layout.root)
    history = read_history(layout, git)
    if not history.rounds:
        raise NothingToDo("no round is published yet; `al status` says what the first one waits for")
    record = history.rounds[-1] if number is None else history.record(number)
    number = record.round
    revision = round_name(number) if round_name(number) in git.tags() else "HEAD"
    schema, counts, zone = record.params.schema_, record.counts, _zone(record)
    plan = read_plan(git, number, revision)
    ledger = read_events(layout.events)
    known = active(ledger[: events_known(record, ledger)])
    histogram = parse_histogram(git.show(revision, "rounds/histogram.json") or "{}")
    latest, now = number == history.rounds[-1].round, status(workspace, ask=False)
    return ReportData(
        title=layout.root.name,
        question=schema.question,
        classes=schema.labels,
        round=number,
        state="published",
        labels=counts.labelled,
        date=_date(record, zone),
        history=tuple(_row(r, zone) for r in history.rounds if r.round <= number),
        metrics=record.metrics,
        decision=record.decision,
        pool=PoolCounts(counts.labelled, counts.pending, counts.ignored, counts.unlabelled),
        mix=LabelMix(counts.labels, counts.test_labels),
        histogram=Histogram(histogram.edges, histogram.counts) if histogram.edges else None,
        asked=_asked(workspace, record, plan, known),
        mistakes=_mistakes(
            workspace, parse_predictions(git.show(revision, "rounds/predictions.csv") or "item_id,label\n")
        ),
        answers=_answers(record, plan, known, ledger, now["tasks"] - now["settled"] if latest else 0),
        next_step=now["next"] if latest else f"This is history; the latest round is {history.rounds[-1].round}.",
        params_digest=record.hashes["params"][:12],
        engine={
            "version": record.engine.version,
            "sources": record.engine.sources[:12],
            **record.engine.packages,
        },
        confidence=record.params.evaluate.confidence,
        running=record.running,
        saved=labels_saved_by(history, number),
        asked_because=_asked_because(history, number),
        links=task_pages(workspace, number),
    )


def _asked_because(history: History, number: int) -> str:
    """Which strategy chose the batch of round `number`, and why: the build before it wrote that down."""
    before = [record for record in history.rounds if record.round < number]
    record = before[-1] if before else history.genesis
    choice = record.next_batch if record else None
    return f"{choice.strategy}: {choice.reason}" if choice else ""


def _asked(
    workspace: Workspace, record: RoundRecord, plan: list[PlannedTask], known: list[Event]
) -> tuple[AskedItem, ...]:
    """The round's queries (not its test tasks) with what had come of them when it was published.

    `known`: the events that counted then. Earlier rounds' answers to the same items are among what gives a label.
    """
    queries = [task for task in plan if task.part == "pool"]
    items = fetch([workspace.layout.pool], [task.item_id for task in queries])
    everybody = len(record.params.annotators) or None
    wanted = {task.item_id for task in queries}
    about = [event for event in known if event.item_id in wanted]
    classes = dict.fromkeys([*record.params.schema_.labels, *(e.label for e in about if e.label is not None)])
    folded = fold(about, tuple(classes), everybody or people(known), times_asked(about))
    labels = {row.item_id: row for row in folded.labeled}
    unresolved = {row.item_id: row.reason for row in folded.unresolved}
    found = standing(queries, known, record.params.round.overlap, everybody)
    skipped = skips(event for event in about if event.annotation_key.rpartition("#")[0] in found)
    refused = {
        str(row.get("push_key")): f"refused: {row['reason']}"
        for row in still_refused(read_refused(workspace.layout.events), known)
    }
    rows = []
    for task in queries:
        label = labels.get(task.item_id)
        outcome = (
            ""
            if label
            else unresolved.get(task.item_id)
            or refused.get(task.push_key)
            or _without_label(found[task.push_key], skipped.get(task.item_id, 0))
        )
        rows.append(
            AskedItem(
                task.item_id,
                items[task.item_id].text if task.item_id in items else "",
                _score(task),
                task.strategy,
                label.label if label else None,
                label.answers if label else 0,
                label.agreement if label else None,
                outcome,
            )
        )
    return tuple(rows)


def _without_label(found: Standing, skipped: int) -> str:
    """Why a task that no refused answer and no tie explains has no label."""
    if found == "given_up":
        return "given up: skipped by enough people"
    return f"skipped by {skipped} {'person' if skipped == 1 else 'people'}, not answered" if skipped else "not answered"


def _score(task: PlannedTask) -> float | None:
    """How unsure a model was of a task's item; None where no model was asked about it.

    A plan holds a number even then: 0, or before the first model what equal probabilities come to.
    """
    return task.score if task.predicted is not None and task.score else None


def _mistakes(workspace: Workspace, predictions: Predictions) -> tuple[Mistake, ...]:
    best = predictions.proba.argmax(axis=1) if len(predictions.item_ids) else []
    wrong = [
        (float(predictions.proba[row, column]), item, label, predictions.classes[column])
        for row, (item, label, column) in enumerate(zip(predictions.item_ids, predictions.labels, best, strict=True))
        if predictions.classes[column] != label
    ]
    wrong = sorted(wrong, reverse=True)[:MISTAKES]
    items = fetch([workspace.layout.test], [item for _, item, _, _ in wrong])
    return tuple(
        Mistake(item, items[item].text if item in items else "", label, predicted, probability)
        for probability, item, label, predicted in wrong
    )


def _answers(
    record: RoundRecord, plan: list[PlannedTask], known: list[Event], ledger: list[Event], waiting: int
) -> Answers:
    """What came back. `known`: the events that counted when the round was published; late answers are in `ledger`."""
    given, closed = record.answers, record.closed_at
    events = [event for event in known if event.round == record.round]
    late = {
        event.annotation_key
        for event in ledger
        if closed and event.round == record.round and event.type in ("label", "skip", "supersede")
        if _seconds(event.created_at) > closed
    }
    times = _lead_times(events)
    return Answers(
        asked=len(plan),
        answered=given.answered,
        for_test=sum(task.part == "test" for task in plan),
        skipped=sum(skips(events).values()),
        given_up=given.given_up,
        late=len(late),
        unanswered=given.unanswered,
        kept=given.kept,
        carried=sum(task.first_round < task.round for task in plan),
        waiting=waiting,
        refused=given.refused,
        annotators=people(events),
        lead_seconds=sum(times.values()) if times else None,
    )


def _lead_times(events: list[Event]) -> dict[str, float]:
    """Seconds that each annotation took. An edit adds to what Label Studio counts, so that the newest figure is all."""
    return {event.annotation_key: event.lead_time for event in events if event.lead_time is not None}


def _row(record: RoundRecord, zone: tzinfo) -> RoundRow:
    return RoundRow(record.round, record.counts.labelled, record.metrics, record.decision, _date(record, zone))


def _zone(record: RoundRecord) -> tzinfo:
    """The time zone that a record's schedule is in; UTC where it names none that we know."""
    schedule = record.params.schedule
    name = schedule.get("timezone") if isinstance(schedule, dict) else None
    try:
        return ZoneInfo(check_timezone(name)) if isinstance(name, str) and name != "UTC" else UTC
    except ValueError:
        return UTC


def _date(record: RoundRecord, zone: tzinfo) -> str | None:
    closed = record.closed_at
    return datetime.fromtimestamp(closed, zone).strftime("%Y-%m-%d %H:%M %Z") if closed else None


def _seconds(stamp: str | None) -> float:
    """A time of the server's in seconds since 1970; 0 where the event has none that can be read."""
    try:
        return datetime.fromisoformat((stamp or "").replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return 0.0
