"""The outcome of a round's tasks when it was published: the result of each query, and the numbers of answers."""

from __future__ import annotations

from datetime import datetime
from functools import partial

from al_pipeline.annotation.aggregation import fold, most_asked
from al_pipeline.annotation.confidence import ConsensusRule, rule_for
from al_pipeline.annotation.tasks import Standing, standing
from al_pipeline.annotation.votes import people, skips, times_asked
from al_pipeline.data.ledger import read_forecasts, read_refused, still_refused
from al_pipeline.data.pool import fetch
from al_pipeline.params import MAJORITY, Labels
from al_pipeline.records import Event, LabeledItem, PlannedTask, is_of_review
from al_pipeline.reporting.view_model import Answers, AskedItem
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.workspace import Workspace


def asked_items(
    workspace: Workspace, record: RoundRecord, plan: list[PlannedTask], known: list[Event]
) -> tuple[AskedItem, ...]:
    """The round's queries (not its test tasks) with their outcome when it was published.

    `known`: the events that counted then. A label also depends on answers of earlier rounds to the same item.
    """
    queries = [task for task in plan if task.part == "pool"]
    items = fetch([workspace.layout.pool], [task.item_id for task in queries])
    wanted = {task.item_id for task in queries}
    about = [event for event in known if event.item_id in wanted]
    rule = rule_for(_labels_of(record), partial(read_forecasts, workspace.layout.events))
    labels, unresolved = _folded(record, about if rule is None else known, people(known), rule)
    refused = {
        str(row.get("push_key")): f"refused: {row['reason']}"
        for row in still_refused(read_refused(workspace.layout.events), known)
    }
    without = _without_label(record, queries, known, about)
    rows = []
    for task in queries:
        label = labels.get(task.item_id)
        why = unresolved.get(task.item_id) or refused.get(task.push_key) or without[task.push_key]
        rows.append(
            AskedItem(
                task.item_id,
                items[task.item_id].text if task.item_id in items else "",
                _score(task),
                task.strategy,
                label.label if label else None,
                label.answers if label else 0,
                label.agreement if label else None,
                "" if label else why,
            )
        )
    return tuple(rows)


def _labels_of(record: RoundRecord) -> Labels:
    row = record.params.labels
    return MAJORITY if row is None else Labels(consensus=row.consensus, min_confidence=row.min_confidence)


def _folded(
    record: RoundRecord, about: list[Event], heard: int, rule: ConsensusRule | None
) -> tuple[dict[str, LabeledItem], dict[str, str]]:
    """Fold the events `about` items: labels, and reasons for having none, by item. `heard`: annotators so far."""
    everybody = len(record.params.annotators) or heard
    named = (event.label for event in about if event.label is not None)
    classes = tuple(dict.fromkeys([*record.params.schema_.labels, *named]))
    most = most_asked(bool(record.params.select.relabel))
    folded = fold(about, classes, everybody, times_asked(about), rule, most)
    return {row.item_id: row for row in folded.labeled}, {row.item_id: row.reason for row in folded.unresolved}


def _without_label(
    record: RoundRecord, queries: list[PlannedTask], known: list[Event], about: list[Event]
) -> dict[str, str]:
    """Why tasks have no label, by push key, if there is neither a refused answer nor a tie."""
    found = standing(queries, known, record.params.round.overlap, len(record.params.annotators) or None)
    skipped = skips(event for event in about if event.push_key in found)
    return {task.push_key: _in_words(found[task.push_key], skipped.get(task.item_id, 0)) for task in queries}


def _in_words(found: Standing, skipped: int) -> str:
    if found == "given_up":
        return "given up: skipped by enough people"
    return f"skipped by {skipped} {'person' if skipped == 1 else 'people'}, not answered" if skipped else "not answered"


def _score(task: PlannedTask) -> float | None:
    """The model's uncertainty about a task's item; None if no model scored it.

    A plan holds a score even then: 0 or, before the first model, that of equal probabilities.
    """
    return task.score if task.predicted is not None and task.score else None


def count_answers(
    record: RoundRecord, plan: list[PlannedTask], known: list[Event], ledger: list[Event], waiting: int
) -> Answers:
    """Count the round's answers. `known`: the events that counted at its publication; `ledger` has late ones too."""
    given, closed = record.answers, record.closed_at
    events = [event for event in known if event.round == record.round and not is_of_review(event.annotation_key)]
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
    """Seconds that each annotation took: the newest value, since Label Studio adds the time of each edit to it."""
    return {event.annotation_key: event.lead_time for event in events if event.lead_time is not None}


def _seconds(stamp: str | None) -> float:
    """A timestamp of the server in seconds since 1970; 0 if it is missing or invalid."""
    try:
        return datetime.fromisoformat((stamp or "").replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return 0.0
